"""Stage 4: how a pass's directions become a plan, orthogonal or selective."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saber.ablation import EditPlan, EditSpec, Removal, applied, orthogonal
from saber.codec import digest
from saber.errors import ModelError
from saber.evaluation.divergence import exact, reference_of
from saber.evaluation.readout import Readout, derive_readout
from saber.lm.chat import Encoded, encode, encode_answers
from saber.lm.forward import Progress
from saber.lm.generate import Completion, Request, answer
from saber.lm.model import LanguageModel
from saber.lm.writers import Writer
from saber.memo import Memo, forgetful
from saber.moments import RIDGE, Decisions, Preserved, affordable, read_decisions
from saber.openings import Fitted, Opening
from saber.passes import Candidate, RefineData, RefineSpec, removals
from saber.probing import Activations, ProbeSpec, decision_count
from saber.selective import Selective, solve
from saber.sensitivity import fisher, sample, weights
from saber.strength import ANSWER_TOKENS, BOOSTS, LAMBDAS, LATE_LAMBDAS, Ruler, Shown, Trial, search

Sides = tuple[Activations, Activations]
Ask = Callable[[Sequence[int]], Fitted]
"""Answers some fit targets, given by number, with the model as it stands."""
Both = Callable[[Sequence[int]], tuple[Shown, Fitted]]
"""Answers validation targets as well, and tells of both."""
Watched = Callable[..., Mapping[int, Opening]]
"""Answers validation targets, all or some given by number; tells behind which starts they turn late."""


@dataclass(frozen=True)
class Answers:
    """How judged answers are asked of the model as it stands."""

    shown: Callable[[], Shown]
    """Tells what those to validation targets show."""
    fitted: Ask
    """Tells what those to fit targets show."""
    watched: Watched
    """Tells which validation targets turn late."""
    together: Both | None = None
    """Does what the first two do, where that is less work than one after the other."""

    def both(self, rows: Sequence[int]) -> tuple[Shown, Fitted]:
        """Return what validation targets show, and some fit targets given by number."""
        return self.together(rows) if self.together else (self.shown(), self.fitted(rows))


@dataclass(frozen=True)
class Turn:
    """Where in an answer a pass looks."""

    opening: Opening = ()
    """Behind which start; empty for the answer's own."""
    late: Sequence[int] = ()
    """Fit targets that come to show the behaviour late, by number."""
    mended: Callable[[], int] | None = None
    """Tells, by a few answers, how many the model as it stands sets right here; None where that is not asked
    apart."""


class Step(NamedTuple):
    """What an editor makes of a pass."""

    plan: EditPlan
    """The plan with the new pass in it."""
    trials: tuple[Trial, ...]
    """The strengths tried."""
    chosen: list[Candidate]
    """The candidates with what they got."""
    fitted: Fitted | None
    """What all fit targets show now, where they were asked."""
    turning: Mapping[int, Opening] | None = None
    """Which validation targets come to show the behaviour late now, where they were asked."""
    by_answers: bool = False
    """Whether each strength was told by answers, as first tokens tell nothing of the behaviour."""


Editor = Callable[[EditPlan, Sequence[Candidate], Turn, Sides, float], Step | None]
"""Makes a plan of a pass; None where no strength does anything."""


@dataclass(frozen=True)
class OrthogonalEditor:
    """Takes all removals so far out of the original weights."""

    lm: LanguageModel
    writers: Sequence[Writer]
    edit: EditSpec
    removals: list[Removal]

    def __call__(
        self,
        plan: EditPlan,
        chosen: Sequence[Candidate],
        turn: Turn,
        sides: Sides,
        amiss: float,
    ) -> Step:
        """Return the plan with what was chosen taken out too."""
        del turn, sides, amiss
        number = 1 + max((r.step for r in self.removals), default=0)
        self.removals.extend(removals(chosen, number))
        plan = orthogonal(self.lm, self.writers, self.removals, self.edit.scope)
        return Step(plan, (), list(chosen), None)


class SelectiveEditor:
    """Solves for the writers as the plan so far leaves them, with lambda by a line search."""

    def __init__(
        self,
        lm: LanguageModel,
        writers: Sequence[Writer],
        data: RefineData,
        edit: EditSpec,
        spec: RefineSpec,
        probing: ProbeSpec,
        readout: Readout,
        together: Both,
        progress: Progress[Any],
        own: Mapping[str, Completion],
        memo: Memo = forgetful,
        first: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Let the untouched model answer what must not change.

        `first` holds log-probabilities of the first answer tokens that it would give to validation targets
        and to neutral ones, where it was probed already.
        """
        self.first = first
        self.together, self.memo = together, memo
        self.lm, self.writers, self.data, self.edit, self.spec = lm, writers, data, edit, spec
        self.probing, self.progress = probing, progress
        self.own, edited = own, tuple(w.name for w in writers)
        self.ruler, self.preserved, self.felt = memo(
            ("preserved", "", probing, edit.memory, edited), partial(self._prepared, readout)
        )

    def _prepared(self, readout: Readout) -> tuple[Ruler, Preserved, list[Encoded]]:
        """Let the untouched model answer what must not change; return what is measured by that.

        The last are the texts along which a change is felt, as many of each set.
        """
        lm, data, progress = self.lm, self.data, self.progress
        watched = [t for p in (data.neutral_validation, *data.keep_validation) for t in p.texts]
        kept = (data.neutral, data.everyday, *data.keep)
        missing = [text for text in watched if text not in self.own]
        asked = [Request(text, ANSWER_TOKENS, look=exact(lm)) for text in missing]
        others = {text for p in kept for text in p.texts} - self.own.keys() - set(watched)
        asked += [Request(text, ANSWER_TOKENS) for text in sorted(others)]
        written = answer(lm, asked, progress=progress, label="own answers")
        own = {**self.own, **{a.prompt: w for a, w in zip(asked, written, strict=True)}}
        reference = reference_of(lm, watched, [own[text] for text in watched], progress=progress)
        ruler = Ruler(
            lm,
            data.target_validation,
            data.neutral_validation,
            data.keep_validation,
            readout,
            progress,
            reference,
            None if self.first is None else self.first[1],
        )
        answers = [[own[text].ids for text in p.texts] for p in kept]
        references = encode_answers(lm, [p.reference for p in data.capability], end=False)
        answered = [
            encode(lm, p.texts, a) if len(p) else [] for p, a in zip(kept, answers, strict=True)
        ]
        preserved = Preserved(
            lm,
            self.writers,
            [*answered, encode(lm, data.capability.texts, references)],
            # With keep sets an edit tells inputs apart that lie close together, and neutral ones feel it.
            [encode(lm, p.texts) for p in (data.neutral, *data.keep)] if data.keep else [],
            positions=decision_count(lm, self.probing),
            memory=self.edit.memory * 2**30 or affordable(lm, self.writers),
            progress=progress,
        )
        pairs = zip(kept, answered, strict=True)
        felt = [e for p, some in pairs if p is not data.everyday for e in sample(some)]
        return ruler, preserved, felt

    def __call__(
        self,
        plan: EditPlan,
        chosen: Sequence[Candidate],
        turn: Turn,
        sides: Sides,
        amiss: float,
    ) -> Step | None:
        """Return the plan with an edit for what was chosen, as strong as validation prompts ask for.

        `sides` are the activations of targets and neutral prompts where the pass looks, `amiss` is the
        share of answers that is so before it.
        """
        opening, asked = turn.opening, list[Fitted]()
        targets, validation = len(self.data.target), len(self.data.target_validation)

        def shown() -> Shown:
            found, fit = self.together(turn.late if opening else range(targets))
            asked.append(fit)
            if opening:
                return replace(found, late=len(fit.late) / targets)
            return found.with_fit(validation, fit.showing, fit.incoherent, targets)

        by_layer: dict[int, list[Candidate]] = {}
        for candidate in chosen:
            by_layer.setdefault(candidate.direction.layer, []).append(candidate)
        patterns = {k: [c.direction.pattern for c in cs] for k, cs in by_layer.items()}
        ruler = self.ruler
        with applied(self.lm.model, plan):
            if opening:
                target, neutral = (side.first_token for side in sides)
                assert target is not None
                assert neutral is not None
                ruler = ruler.behind(opening, derive_readout(target, neutral))
            stacked = {layer: torch.stack(found).float() for layer, found in patterns.items()}
            at = plan.digest() if plan.factors else ""
            felt = self._felt(stacked, at)
            known = None if at or self.first is None else self.first[0]
            telling = bool(opening) or self.memo(
                ("telling", at, self.probing), lambda: ruler.tells(known)
            )
        where = (at, self.probing, opening, self.edit, digest(*stacked.items()))

        def solving() -> Selective:
            with applied(self.lm.model, plan):
                decisions = self._decisions(sides, opening)
            return solve(
                self.lm,
                stacked,
                decisions,
                self.preserved,
                plan=plan,
                ridge=self.edit.ridge or RIDGE,
                progress=self.progress,
            )

        key = ("solved", *where[:3], self.edit.ridge, where[-1])
        solved = self.memo(key, solving)
        dear = {k: [1.0] * len(cs) for k, cs in by_layer.items()}
        if felt is not None:
            dear = weights(felt, self.edit.sensitivity)

        def alphas(boost: float = 1.0) -> dict[int, list[float]]:
            return {k: [boost * c.strength for c in cs] for k, cs in by_layer.items()}

        def lambdas(base: float) -> dict[int, list[float]]:
            over = self.edit.strength == "lambda"
            return {
                k: [
                    base * w / (c.entanglement.purity if over else 1.0)
                    for c, w in zip(cs, dear[k], strict=True)
                ]
                for k, cs in by_layer.items()
            }

        lambdas_tried: Sequence[float] = LATE_LAMBDAS if opening else LAMBDAS
        if self.edit.lambda_:
            lambdas_tried = (self.edit.lambda_,)
        found = self.memo(
            (
                "searched",
                *(*where, digest(alphas(), lambdas(1.0))),
                *(self.spec.stop_rate, tuple(turn.late)),
            ),
            lambda: search(
                self.lm,
                lambda base, boost: plan + solved.plan(lambdas(base), alphas(boost)),
                ruler,
                shown,
                lambdas=lambdas_tried,
                aim=self.spec.stop_rate,
                direct=bool(opening) or not telling,
                # Behind a start few show it, and little is left to gain.
                before=None if opening else amiss,
                # What comes late is not for this position, and who sets lambda sets the strength.
                boosts=() if opening or self.edit.lambda_ else BOOSTS,
                mended=turn.mended,
                progress=self.progress,
            ),
        )
        if found is None:
            return None
        plan, trials = found
        taken = next(t for t in trials if t.chosen)
        used, strengths = lambdas(taken.lambda_), alphas(taken.boost)
        balance = solved.balance(used, strengths)
        done = [
            replace(
                c,
                strength=strengths[k][i],
                lambda_=used[k][i],
                removed=balance[k].removed,
                collateral=balance[k].collateral,
                sensitivity=None if felt is None else float(felt[k][i]),
            )
            for k, cs in by_layer.items()
            for i, c in enumerate(cs)
        ]
        # Nothing was asked where a memo knew the outcome.
        told = dict(zip((t for t in trials if t.shown), asked, strict=False)).get(taken)
        turning = told.validation if told else None
        return Step(plan, trials, done, None if opening else told, turning, not telling)

    def _felt(self, stacked: Mapping[int, Tensor], at: str) -> Mapping[int, Tensor] | None:
        """Return what the answers feel of each direction; None where nothing is set by it."""
        if not self.edit.sensitivity:
            return None

        def read() -> Mapping[int, Tensor]:
            try:
                return fisher(self.lm, stacked, self.felt, progress=self.progress)
            except RuntimeError as error:
                # Some kernels have no way back, and it needs more memory than forward passes do.
                reason = str(error).strip().partition("\n")[0]
                raise ModelError(
                    f"the gradients that edit.sensitivity needs cannot be had here: {reason}",
                    "Leave edit.sensitivity at 0.",
                ) from error

        return self.memo(("sensitivity", at, self.probing, digest(*stacked.items())), read)

    def _decisions(self, sides: Sides, opening: Opening) -> Decisions:
        """Return what goes into the writers where the behaviour is decided; read, where not probed."""
        target, neutral = sides
        if target.inputs is not None and neutral.inputs is not None:
            prompts, positions = target.hidden.shape[:2]
            return Decisions.of(target.inputs, neutral.inputs, prompts * positions)
        encoded = (
            encode(self.lm, p.texts, [opening] * len(p))
            for p in (self.data.target, self.data.neutral)
        )
        return read_decisions(
            self.lm,
            self.writers,
            *encoded,
            positions=1 if opening else decision_count(self.lm, self.probing),
            progress=self.progress,
        )
