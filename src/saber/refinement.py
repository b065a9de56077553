"""Stage 5: probe, choose, edit, and probe again, until the behaviour is gone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saber.ablation import EditPlan, EditSpec, applied
from saber.candidates import causal_scores, choose, dormant, mean_log_odds
from saber.editors import Answers, Editor, OrthogonalEditor, SelectiveEditor, Sides, Step, Turn
from saber.entanglement import EntanglementSpec, entangle
from saber.evaluation.readout import derive_readout
from saber.hydra import Compensation, compensation
from saber.lm.forward import Progress, silent
from saber.lm.generate import Completion
from saber.lm.model import LanguageModel
from saber.lm.routing import routes
from saber.lm.writers import Writer
from saber.memo import Memo, forgetful
from saber.openings import Fitted, Opening, likeliest
from saber.passes import Candidate, Hydra, Pass, RefineData, Refinement, RefineSpec
from saber.probing import Activations, Look, ProbeSpec, probe_capabilities
from saber.prompts import PromptSet, paired
from saber.spectral import SpectralSpec, extract, rank
from saber.stopwatch import Stopwatch
from saber.strength import Shown


def first_looks(
    lm: LanguageModel,
    writers: Sequence[Writer],
    data: RefineData,
    probing: ProbeSpec,
    edit: EditSpec,
) -> list[Look]:
    """Return what `refine` reads of the untouched model, by whose keys it then asks its memo."""
    tapped = _tapped(lm, writers, edit)
    sides = [Look(side, probing, (), tapped) for side in (data.target, data.neutral)]
    return [
        *sides,
        *(Look(side, probing) for side in (data.neutral_validation, data.target_validation)),
    ]


def _tapped(lm: LanguageModel, writers: Sequence[Writer], edit: EditSpec) -> tuple[Writer, ...]:
    """Return the writers whose inputs a selective edit needs; routed experts are read by themselves."""
    return () if edit.kind != "selective" or routes(lm, writers) else tuple(writers)


def refine(
    lm: LanguageModel,
    writers: Sequence[Writer],
    data: RefineData,
    *,
    probing: ProbeSpec,
    spectral: SpectralSpec,
    entanglement: EntanglementSpec,
    edit: EditSpec,
    spec: RefineSpec,
    seed: int,
    answers: Answers,
    shown: Shown | None = None,
    own: Mapping[str, Completion] = MappingProxyType({}),
    progress: Progress[Any] = silent,
    finished: Callable[[Pass], None] | None = None,
    done: Sequence[Pass] = (),
    memo: Memo = forgetful,
    self_repair: bool = True,
) -> Refinement:
    """Run the passes; the model's weights are the untouched ones before and after.

    `answers` are asked of the model as it stands; `shown` is what those to validation targets show of the
    untouched model, where it is known already. A selective pass after the first looks behind a start of
    fit targets that come late: of the three commonest, the likeliest over all targets. Where none does it
    is a start of validation targets, and a strength that sets no more of these right is asked no further.
    `own` holds answers of the untouched model of `ANSWER_TOKENS`, by prompt, which are not written again.
    `done` holds passes of an interrupted run, which are not repeated; `finished` hears of each new
    one. Every plan is made from the original weights with all removals so far, and rounded once.

    A `memo` for this model and these prompts spares what other settings have computed already: its
    keys hold the plan in force by content, so settings share their passes until they part. Without
    `self_repair` the hydra's compensation, on which nothing depends, is not measured.
    """
    eye = _Eye(lm, _tapped(lm, writers, edit), data, probing, memo, progress)
    loop = _Loop(
        lm, writers, data, eye, spectral, entanglement, edit, spec, seed, answers, self_repair
    )
    loop.start(shown, own, done)
    reason = loop.run(finished or (lambda _pass: None))
    return Refinement(tuple(loop.passes), loop.now.plan, reason, loop.clock.seconds)


@dataclass(frozen=True)
class _Eye:
    """Probes the model as it stands, unless the memo knows how it stood."""

    lm: LanguageModel
    tapped: tuple[Writer, ...]
    data: RefineData
    probing: ProbeSpec
    memo: Memo
    progress: Progress[Any]

    def look(
        self,
        prompts: PromptSet,
        opening: Opening = (),
        writers: tuple[Writer, ...] = (),
        at: str = "",
    ) -> Activations:
        """Probe prompts behind a forced start; `at` is the digest of the plan in force."""
        wanted = Look(prompts, self.probing, tuple(opening), writers)
        return self.memo(wanted.key(at), lambda: wanted.read(self.lm, self.progress))

    def sides(self, opening: Opening = (), at: str = "") -> Sides:
        """Probe fit targets and neutral prompts."""
        target, neutral = self.data.target, self.data.neutral
        return self.look(target, opening, self.tapped, at), self.look(
            neutral, opening, self.tapped, at
        )


@dataclass(frozen=True)
class _Standing:
    """How the model stands between passes."""

    plan: EditPlan
    """The edit so far."""
    log_odds: float
    """Mean refusal log-odds on validation targets, nats."""
    rate: float
    """Share of validation targets that shows the behaviour."""
    amiss: float
    """Share of all answers to validation prompts that is as it should not be."""
    late: Mapping[int, Opening]
    """Fit targets that come to show it late, and behind which start."""

    @property
    def at(self) -> str:
        """What a memo knows it by."""
        return self.plan.digest() if self.plan.factors else ""


@dataclass
class _Loop:
    """The passes, as they are made."""

    lm: LanguageModel
    writers: Sequence[Writer]
    data: RefineData
    eye: _Eye
    spectral: SpectralSpec
    entanglement: EntanglementSpec
    edit: EditSpec
    spec: RefineSpec
    seed: int
    answers: Answers
    self_repair: bool
    clock: Stopwatch = field(default_factory=Stopwatch)
    passes: list[Pass] = field(default_factory=list)
    vain: list[Opening] = field(default_factory=list)
    """Starts behind which a pass did not help."""
    watched: dict[str, Mapping[int, Opening]] = field(default_factory=dict)
    """Validation targets that come to show it late, by the standing."""

    @property
    def selective(self) -> bool:
        """Whether edits are selective."""
        return self.edit.kind == "selective"

    @property
    def few(self) -> float:
        """How many fit targets may come late at the end."""
        return self.spec.stop_rate * len(self.data.target)

    def start(
        self, shown: Shown | None, own: Mapping[str, Completion], done: Sequence[Pass]
    ) -> None:
        """Probe the untouched model, and take up the passes that are done."""
        eye, data = self.eye, self.data
        with self.clock("probe"):
            self.original = eye.sides()
            target, neutral = (side.first_token for side in self.original)
            assert target is not None
            assert neutral is not None
            self.readout = derive_readout(target, neutral)
            if not self.readout.tokens:
                self.spec = replace(self.spec, shortlist=0)  # nothing would tell causes apart
            self.untouched = eye.look(data.neutral_validation)
            behaving = eye.look(data.target_validation)
            log_odds = mean_log_odds(behaving, self.readout)
            rate = (self.answers.shown() if shown is None else shown).rate
            # What must be kept is what the untouched model does: this is probed once.
            # Kinds of edits may read other prompts.
            self.read = tuple(p.fingerprint() for p in (data.target, data.neutral, data.capability))
            self.capability = eye.memo(
                ("capability", "", self.read, eye.probing),
                lambda: probe_capabilities(
                    self.lm, data.capability, eye.probing, progress=eye.progress
                ),
            )
        assert behaving.first_token is not None
        assert self.untouched.first_token is not None
        self.editor = self._editor(own, done, (behaving.first_token, self.untouched.first_token))
        self.now = _Standing(EditPlan(), log_odds, rate, rate, {})
        if done:
            self._take_up(done)

    def _editor(
        self,
        own: Mapping[str, Completion],
        done: Sequence[Pass],
        first: tuple[Tensor, Tensor],
    ) -> Editor:
        lm, eye, asked = self.lm, self.eye, self.answers
        if not self.selective:
            return OrthogonalEditor(
                lm, self.writers, self.edit, [r for p in done for r in p.removals]
            )
        settings = (self.edit, self.spec, eye.probing, self.readout)
        with self.clock("moments"):
            return SelectiveEditor(
                lm,
                self.writers,
                self.data,
                *settings,
                asked.both,
                eye.progress,
                own,
                eye.memo,
                first,
            )

    def _take_up(self, done: Sequence[Pass]) -> None:
        last = done[-1]
        self.passes, self.vain = list(done), [start for p in done for start in p.in_vain]
        amiss = last.rate_after + last.incoherent_after + last.lost_after
        self.now = _Standing(last.plan, last.log_odds_after, last.rate_after, amiss, {})
        settled = (
            last.opening and last.rate_after <= self.spec.stop_rate and (last.late or 0) <= self.few
        )
        if self.selective and not settled:
            self.now = replace(self.now, late=self._late(last.plan, range(len(self.data.target))))

    def run(self, finished: Callable[[Pass], None]) -> str:
        """Make passes until there is a reason to stop; return it."""
        while len(self.passes) + len(self.vain) < self.spec.passes:
            before = self.now
            gone = before.rate <= self.spec.stop_rate and len(before.late) <= self.few
            if self.spec.stop == "behaviour" and gone:
                return "the behaviour is gone on validation targets"
            # Seeded by the pass, so that a resumed run draws as an undisturbed one does.
            rng = np.random.default_rng([self.seed, len(self.passes)])
            with applied(self.lm.model, before.plan):
                with self.clock("probe"):
                    turn = self._turn()
                    if turn is None:
                        return "what is left turns late, behind starts that were tried"
                    sides = (
                        self.eye.sides(turn.opening, before.at) if self.passes else self.original
                    )
                candidates = self._candidates(turn, sides, rng)
            chosen = [c for c in candidates if c.status in ("ablated", "weakened")]
            if not chosen:
                return "no candidate passes the filters"
            with self.clock("ablate"):
                step = self.editor(before.plan, chosen, turn, sides, before.amiss)
            if step is None:
                reason = "no strength set an answer right"
                reason = f"a further pass did not help ({reason})" if self.passes else reason
            else:
                reached, late = self._reached(step), dict[int, Opening]()
                reason = self._no_help(reached)
                if self.selective and not reason:
                    late = self._left_late(step, turn, reached)
                    reason = self._no_help(reached, len(late))
                if not reason:
                    this = self._measured(step, reached, late, chosen, candidates, turn, rng)
                    self.passes.append(this)
                    self.now = _Standing(
                        step.plan, this.log_odds_after, reached.rate, reached.amiss, late
                    )
                    if step.turning is not None:
                        self.watched[self.now.at] = step.turning
                    finished(this)
                    continue
            self.vain.append(turn.opening)
            if not self._untried():
                return reason
        return "all passes made"

    def _turn(self) -> Turn | None:
        """Return where a pass is to look; None where what is left turns late, behind starts tried before."""
        if not self.passes:
            return Turn()
        late, opening = self._turning(), likeliest(self.lm, self.data.target.texts, self._untried())
        at_once = self.now.rate - len(late) / len(self.data.target_validation)
        of_fit = bool(self.now.late)
        if late and not (of_fit or opening) and round(at_once, 9) <= self.spec.stop_rate:
            return None
        if of_fit or not opening:
            return Turn(opening, tuple(self.now.late))
        rows = tuple(late)
        return Turn(opening, mended=lambda: len(rows) - len(self.answers.watched(rows)))

    def _turning(self) -> Mapping[int, Opening]:
        """Return behind which starts fit targets turn late, or where none does validation targets."""
        if self.now.late or not self.selective:
            return self.now.late
        at = self.now.at
        if at not in self.watched:
            self.watched[at] = self.eye.memo(("watched", at), self.answers.watched)
        return self.watched[at]

    def _untried(self) -> dict[int, Opening]:
        """Leave out starts behind which a pass did not help or, of validation targets, was made."""
        done = set() if self.now.late else {this.opening for this in self.passes}
        return {
            i: o
            for i, o in self._turning().items()
            if o not in self.vain and str(self.lm.tokenizer.decode(list(o))) not in done
        }

    def _candidates(self, turn: Turn, sides: Sides, rng: np.random.Generator) -> list[Candidate]:
        """Find directions, measure what capabilities share with them and what they cause, and choose."""
        target, neutral = sides
        number, eye, memo = len(self.passes), self.eye, self.eye.memo
        torch_rng = torch.Generator().manual_seed(self.seed * 1009 + number)
        where = (
            self.now.at,
            self.read,
            eye.probing,
            turn.opening,
            self.spectral,
            self.seed,
            number,
        )
        with self.clock("spectral"):
            found = memo(
                ("directions", *where),
                lambda: extract(
                    target, neutral, self.spectral, capability=self.capability, generator=rng
                ),
            )
        with self.clock("entanglement"):
            measured = memo(
                ("entanglement", *where, self.entanglement),
                lambda: entangle(
                    found, target, neutral, self.capability, self.entanglement, generator=torch_rng
                ),
            )
        with self.clock("refine"):
            causal = memo(
                ("causal", *where, self.entanglement, self.spec.shortlist),
                lambda: causal_scores(
                    self.lm,
                    found,
                    measured,
                    self.data,
                    eye.probing,
                    self.readout,
                    self.untouched,
                    self.now.log_odds,
                    self.spec,
                    eye.progress,
                ),
            )
        scale = self.spec.decay**number
        return choose(found, measured, causal, self.edit, self.spec, scale=scale)

    def _reached(self, step: Step) -> Shown:
        """Return what answers to validation targets show with a new plan."""
        found = next((t.shown for t in step.trials if t.chosen), None)
        if found is None:
            with self.clock("refine"), applied(self.lm.model, step.plan):
                found = self.eye.memo(("shown", step.plan.digest()), self.answers.shown)
        return replace(found.on_validation(), late=0.0)  # the standing tells of fit targets

    def _no_help(self, reached: Shown, late: int | None = None) -> str:
        """Return in words that a pass made nothing better; empty where it did.

        It has to take behaviour away: answers to keep sets that change back by the way do not make it one
        to keep. Empty too where it may have, as long as it is not known how many fit targets come `late`.
        """
        if not self.passes or not self.selective:
            return ""
        before, validation = self.now, len(self.data.target_validation)
        left = (late or 0) - len(before.late)
        showing = round((reached.rate - before.rate) * validation, 9) + left
        worse = round((reached.amiss - before.amiss) * validation, 9) + left
        if max(showing, worse) < 0:
            return ""
        amiss = (
            f"shown {before.rate:.0%} -> {reached.rate:.0%}, amiss {before.amiss:.0%} -> "
            f"{reached.amiss:.0%} on validation prompts"
        )
        if late is None:
            return f"a further pass did not help ({amiss})"
        return (
            f"a further pass did not help ({amiss}, late {len(before.late)} -> {late} of "
            f"{len(self.data.target)} fit targets)"
        )

    def _measured(
        self,
        step: Step,
        reached: Shown,
        late: Mapping[int, Opening],
        chosen: Sequence[Candidate],
        candidates: Sequence[Candidate],
        turn: Turn,
        rng: np.random.Generator,
    ) -> Pass:
        """Return a pass with what is to be told of it."""
        before, plan, validation = self.now, step.plan, self.data.target_validation
        trial = next((t for t in step.trials if t.chosen), None)
        with self.clock("refine"), applied(self.lm.model, plan):
            if trial is None or trial.log_odds is None or turn.opening:
                now = self.eye.look(validation, at=plan.digest())
                log_odds = mean_log_odds(now, self.readout)
            else:
                log_odds = trial.log_odds
        with self.clock("refine"):
            # By the untouched weights: it puts the plans of before and after on them itself.
            back = self._compensation(plan, step.chosen[0], turn, rng)
        best = min((c.direction for c in candidates), key=rank)
        fate = {id(c.direction): c for c in step.chosen}
        return Pass(
            index=len(self.passes) + 1,
            candidates=tuple(fate.get(id(c.direction), c) for c in candidates),
            log_odds_before=before.log_odds,
            log_odds_after=log_odds,
            rate_before=before.rate,
            rate_after=reached.rate,
            hydra=Hydra(
                best.auroc,
                best.d_prime,
                best.layer,
                None if turn.opening else dormant(chosen, self.original),
                back,
            ),
            plan=plan,
            incoherent_after=reached.incoherent,
            lost_after=reached.lost,
            trials=step.trials,
            opening=str(self.lm.tokenizer.decode(list(turn.opening))),
            late=len(late) if self.selective else None,
            by_answers=step.by_answers,
            in_vain=tuple(self.vain[sum(len(p.in_vain) for p in self.passes) :]),
        )

    def _compensation(
        self, plan: EditPlan, first: Candidate, turn: Turn, rng: np.random.Generator
    ) -> Compensation | None:
        # It is measured at the last prompt token, where no direction behind a start lies.
        if not self.self_repair or turn.opening or len(plan.factors) >= len(self.writers):
            return None
        target, neutral = self.data.target_validation, self.data.neutral_validation
        return compensation(
            self.lm,
            self.writers,
            self.now.plan,
            plan,
            first.direction.pattern,
            target.texts,
            neutral.texts,
            generator=rng,
            pairs=paired(target.pairs, neutral.pairs),
        )

    def _left_late(self, step: Step, turn: Turn, reached: Shown) -> dict[int, Opening]:
        """Return the fit targets that come late with a new plan."""
        before = self.now.late
        # Once validation targets are clean, those that came late may do: they are asked first.
        if turn.opening and reached.rate <= self.spec.stop_rate and before:
            late = self._late(step.plan, tuple(before))
            if len(late) <= self.few:
                return late
        return self._late(step.plan, range(len(self.data.target)), step.fitted)

    def _late(
        self, plan: EditPlan, rows: Sequence[int], told: Fitted | None = None
    ) -> dict[int, Opening]:
        """Return which of some fit targets come late with a plan."""
        ask = self.answers.fitted
        with self.clock("refine"), applied(self.lm.model, plan):
            key = ("late", plan.digest(), tuple(rows))
            return dict(self.eye.memo(key, lambda: (told or ask(rows)).late))
