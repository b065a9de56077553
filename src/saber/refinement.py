"""Stage 5: probe, choose, edit, and probe again, until the behaviour is gone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from time import perf_counter
from typing import Any, Literal

import numpy as np
import torch

from saber.ablation import EditPlan, EditSpec, Removal, applied, orthogonal
from saber.codec import digest
from saber.entanglement import Entanglement, EntanglementSpec, entangle
from saber.evaluation.divergence import exact, kl_divergence, reference_of
from saber.evaluation.readout import Readout, derive_readout
from saber.hydra import Compensation, compensation
from saber.linalg import d_prime
from saber.lm.chat import encode, encode_answers
from saber.lm.forward import Progress, silent
from saber.lm.generate import Request, answer
from saber.lm.inputs import routes
from saber.lm.model import LanguageModel
from saber.lm.writers import Writer, ablated_stream
from saber.memo import Memo, forgetful
from saber.moments import Decisions, Preserved, read_decisions
from saber.openings import Opening, likeliest
from saber.probing import Activations, ProbeSpec, probe, probe_capabilities
from saber.prompts import PromptSet
from saber.selective import solve
from saber.spectral import Direction, SpectralSpec, extract
from saber.strength import ANSWER_TOKENS, LAMBDAS, LATE_LAMBDAS, Ruler, Shown, Trial, search

Status = Literal["ablated", "weakened", "skipped", "not selected"]


@dataclass(frozen=True)
class RefineSpec:
    """How many passes there are, and what each takes."""

    passes: int = 4
    """Most passes, 1 or more."""
    top_k: int = 0
    """global_top_k: directions ablated in a pass, over all layers; 0 sets no limit."""
    per_layer: int = 1
    """Most directions a pass takes from one layer; 0 sets no limit."""
    decay: float = 1.0
    """Factor on the strength for each pass after the first, 0 to 1."""
    shortlist: int = 0
    """Candidates with the best score that are tested causally, by a hook; 0 ranks by score alone."""
    stop: Literal["behaviour", "never"] = "behaviour"
    """behaviour: end once hardly any validation target shows it; never: do all passes."""
    stop_rate: float = 0.03
    """Share of validation targets that may still show the behaviour at the end, and of fit targets that
    may come to it late, 0 to 1."""
    max_q: float = 0.05
    """Candidates whose separability has a larger false-discovery rate are dropped, 0 to 1."""


@dataclass(frozen=True)
class RefineData:
    """The prompts that select: fit and validation only, never held-out ones."""

    target: PromptSet
    """Fit targets."""
    neutral: PromptSet
    """Fit neutral prompts."""
    target_validation: PromptSet
    """Targets on which causal scores and the stop are measured."""
    neutral_validation: PromptSet
    """Neutral prompts on which the cost of a direction is measured."""
    capability: PromptSet
    """Labelled capability prompts with reference answers."""
    keep: tuple[PromptSet, ...] = ()
    """Further fit prompts, the answers to which must stay as they are."""
    keep_validation: tuple[PromptSet, ...] = ()
    """Validation prompts of the same kinds."""


@dataclass(frozen=True)
class Candidate:
    """A direction with all that was measured of it, and what became of it."""

    direction: Direction
    """Where it was found, and how well it separates."""
    entanglement: Entanglement
    """How capabilities use it."""
    score: float
    """Fisher ratio d'^2 / 2 times purity."""
    causal: float | None
    """Fall of the mean refusal log-odds on validation targets when it is projected out, nats."""
    causal_kl: float | None
    """First-token KL on validation neutral prompts of that projection, nats."""
    strength: float
    """Removed share."""
    status: Status
    """What became of it."""
    lambda_: float | None = None
    """Weight of preserved inputs (selective edit)."""
    removed: float | None = None
    """Share of what its layer's writers write of it on targets that the fit expects to go."""
    collateral: float | None = None
    """Energy of the change on preserved inputs that the fit expects, per what they write of it."""


@dataclass(frozen=True)
class Hydra:
    """What was left, or came up, when a pass began, and what other writers put back."""

    top_auroc: float
    """AUROC of the best separating candidate at the start of the pass."""
    top_d_prime: float
    """Its d'."""
    top_layer: int
    """Its layer."""
    dormant: int | None
    """Ablated directions that separate more than twice as well now as in the untouched model; None behind
    a forced start, where the untouched model was not probed."""
    compensation: Compensation | None
    """Of the pass's first direction; None where no writer is unedited."""


@dataclass(frozen=True)
class Pass:
    """One round of stages 1 to 4."""

    index: int
    """From 1."""
    candidates: tuple[Candidate, ...]
    """All candidates, best first."""
    log_odds_before: float
    """Mean refusal log-odds on validation targets at its start, nats."""
    log_odds_after: float
    """The same at its end."""
    rate_before: float
    """Share of validation targets that showed the behaviour at its start, by judged answers."""
    rate_after: float
    """The same at its end."""
    hydra: Hydra
    """Hydra statistics."""
    plan: EditPlan
    """The edit from the original weights, this pass and all before it."""
    incoherent_after: float = 0.0
    """Share of incoherent answers to validation targets at its end."""
    lost_after: float = 0.0
    """Share of answers to keep sets' validation prompts with another label than before."""
    trials: tuple[Trial, ...] = ()
    """Strengths that were tried (selective edit)."""
    opening: str = ""
    """Start of the answer behind which it looked; empty for the answer's own start."""
    late: int | None = None
    """Fit targets whose answers show the behaviour late at its end (of those that did before it, where
    validation targets are clean); None where not looked for."""

    @property
    def ablated(self) -> tuple[Candidate, ...]:
        """The candidates that were taken out."""
        return tuple(c for c in self.candidates if c.status in ("ablated", "weakened"))

    @property
    def removals(self) -> list[Removal]:
        """The same as removals for a plan."""
        return _removals(self.ablated, self.index)


@dataclass(frozen=True)
class Refinement:
    """The outcome of all passes."""

    passes: tuple[Pass, ...]
    """In order."""
    plan: EditPlan
    """The one edit, from the original weights, that they add up to."""
    stop_reason: str
    """Why no further pass was made."""
    seconds: dict[str, float]
    """Wall time by stage."""

    @property
    def removals(self) -> list[Removal]:
        """Everything taken out, in order."""
        return [r for p in self.passes for r in p.removals]


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
    behaviour: Callable[[], Shown],
    shown: Shown | None = None,
    late: Late = lambda _rows: {},
    progress: Progress[Any] = silent,
    finished: Callable[[Pass], None] | None = None,
    done: Sequence[Pass] = (),
    memo: Memo = forgetful,
    self_repair: bool = True,
) -> Refinement:
    """Run the passes; the model's weights are the untouched ones before and after.

    `behaviour` answers validation targets with the model as it stands and tells what they show;
    `shown` is that of the untouched model, where it is known already. A selective pass after the first
    looks behind a start that `late` finds: of the three commonest, the likeliest over all targets.
    `done` holds passes of an interrupted run, which are not repeated; `finished` hears of each new
    one. Every plan is made from the original weights with all removals so far, and rounded once.

    A `memo` for this model and these prompts spares what other settings have computed already: its
    keys hold the plan in force by content, so settings share their passes until they part. Without
    `self_repair` the hydra's compensation, on which nothing depends, is not measured.
    """
    clock = _Clock()

    # A selective edit needs what goes into writers too; routed experts are read by themselves.
    tapped = () if edit.kind != "selective" or routes(lm, writers) else writers

    def look(
        prompts: PromptSet, opening: Opening = (), writers: Sequence[Writer] = (), at: str = ""
    ) -> Activations:
        names = tuple(w.name for w in writers)
        return memo(
            ("probe", at, prompts.fingerprint(), probing, opening, names),
            lambda: probe(
                lm,
                prompts,
                probing,
                first_token=True,
                opening=opening,
                writers=writers,
                progress=progress,
            ),
        )

    def sides(opening: Opening = (), at: str = "") -> _Sides:
        return look(data.target, opening, tapped, at), look(data.neutral, opening, tapped, at)

    with clock("probe"):
        original = sides()
        assert original[0].first_token is not None
        assert original[1].first_token is not None
        readout = derive_readout(original[0].first_token, original[1].first_token)
        untouched = look(data.neutral_validation)
        start = _mean_log_odds(look(data.target_validation), readout)
        start_rate = (behaviour() if shown is None else shown).rate
        # What must be kept is what the untouched model does: this is probed once.
        capability = memo(
            ("capability", "", probing),
            lambda: probe_capabilities(lm, data.capability, probing, progress=progress),
        )
    passes = list(done)
    plan = passes[-1].plan if passes else EditPlan()
    editor: _Editor
    if edit.kind == "selective":
        with clock("moments"):
            editor = _Selective(
                lm, writers, data, edit, spec, probing, readout, behaviour, late, progress, memo
            )
    else:
        editor = _Orthogonal(lm, writers, edit, [r for p in passes for r in p.removals])
    current = passes[-1].log_odds_after if passes else start
    rate = passes[-1].rate_after if passes else start_rate
    amiss, selective = math.inf, edit.kind == "selective"
    pending: Mapping[int, Opening] = {}

    everyone, few = range(len(data.target)), spec.stop_rate * len(data.target)

    def turns(plan: EditPlan, rows: Sequence[int]) -> Mapping[int, Opening]:
        with clock("refine"), applied(lm.model, plan):
            return memo(("late", plan.digest(), tuple(rows)), lambda: late(rows))

    if passes:
        amiss = passes[-1].rate_after + passes[-1].incoherent_after + passes[-1].lost_after
        last = passes[-1]
        settled = last.opening and last.rate_after <= spec.stop_rate and (last.late or 0) <= few
        pending = turns(plan, everyone) if selective and not settled else pending
    reason, vain = "all passes made", set[Opening]()
    while len(passes) + len(vain) < spec.passes:
        if spec.stop == "behaviour" and rate <= spec.stop_rate and len(pending) <= few:
            reason = "the behaviour is gone on validation targets"
            break
        # Seeded by the pass, so that a resumed run draws as an undisturbed one does.
        rng = np.random.default_rng([seed, len(passes)])
        torch_rng = torch.Generator().manual_seed(seed * 1009 + len(passes))
        at = plan.digest() if plan.factors else ""
        with applied(lm.model, plan):
            with clock("probe"):
                opening: Opening = ()
                target, neutral = original
                if passes:
                    left = {i: o for i, o in pending.items() if o not in vain}
                    opening = likeliest(lm, data.target.texts, left)
                    target, neutral = sides(opening, at)
            where = (at, probing, opening, spectral, seed, len(passes))
            with clock("spectral"):
                found = memo(
                    ("directions", *where),
                    partial(
                        extract, target, neutral, spectral, capability=capability, generator=rng
                    ),
                )
            with clock("entanglement"):
                measured = memo(
                    ("entanglement", *where, entanglement),
                    partial(
                        entangle,
                        found,
                        target,
                        neutral,
                        capability,
                        entanglement,
                        generator=torch_rng,
                    ),
                )
            with clock("refine"):
                causal = memo(
                    ("causal", *where, entanglement, spec.shortlist),
                    partial(
                        _causal_scores,
                        lm,
                        found,
                        measured,
                        data,
                        probing,
                        readout,
                        untouched,
                        current,
                        spec,
                        progress,
                    ),
                )
        candidates = choose(found, measured, causal, edit, spec, scale=spec.decay ** len(passes))
        chosen = [c for c in candidates if c.status in ("ablated", "weakened")]
        if not chosen:
            reason = "no candidate passes the filters"
            break
        number = len(passes) + 1
        with clock("ablate"):
            earlier = plan
            plan, trials, chosen = editor(
                earlier, chosen, opening, list(pending), (target, neutral)
            )
            fate = {id(c.direction): c for c in chosen}
            candidates = [fate.get(id(c.direction), c) for c in candidates]
        with clock("refine"):
            with applied(lm.model, plan):
                mark = plan.digest()
                after = _mean_log_odds(look(data.target_validation, at=mark), readout)
                reached = next((t.shown for t in trials if t.chosen), None)
                reached = reached or memo(("shown", mark), behaviour)
            back = None
            if self_repair and len(plan.factors) < len(writers):
                back = compensation(
                    lm,
                    writers,
                    earlier,
                    plan,
                    chosen[0].direction.pattern,
                    data.target_validation.texts,
                    data.neutral_validation.texts,
                    generator=rng,
                )
        best = found[0]
        woken = None if opening else _dormant(chosen, original)
        hydra = Hydra(best.auroc, best.d_prime, best.layer, woken, back)
        before = pending
        if selective:
            # Once validation targets are clean, those that came late may do: they are asked first.
            clean = bool(opening) and reached.rate <= spec.stop_rate
            pending = turns(plan, list(pending)) if clean else {}
            if not clean or len(pending) > few:
                pending = turns(plan, everyone)
        this = Pass(
            index=number,
            candidates=tuple(candidates),
            log_odds_before=current,
            log_odds_after=after,
            rate_before=rate,
            rate_after=reached.rate,
            hydra=hydra,
            plan=plan,
            incoherent_after=reached.incoherent,
            lost_after=reached.lost,
            trials=trials,
            opening=str(lm.tokenizer.decode(list(opening))),
            late=len(pending) if selective else None,
        )
        worse = (reached.amiss - amiss) * len(data.target_validation)
        if passes and selective and worse + len(pending) - len(before) >= 0:
            reason = (
                f"a further pass did not help (amiss {amiss:.0%} -> {reached.amiss:.0%} on validation "
                f"prompts, late {len(before)} -> {len(pending)} of {len(data.target)} fit targets)"
            )
            plan, pending = earlier, before
            vain.add(opening)
            if set(before.values()) <= vain:
                break
            continue
        passes.append(this)
        current, rate, amiss = after, reached.rate, reached.amiss
        if finished is not None:
            finished(passes[-1])
    return Refinement(tuple(passes), plan, reason, clock.seconds)


Step = tuple[EditPlan, tuple[Trial, ...], list[Candidate]]
"""The plan with the new pass in it, the strengths tried, and the candidates with what they got."""
_Sides = tuple[Activations, Activations]
_Editor = Callable[[EditPlan, Sequence[Candidate], Opening, Sequence[int], _Sides], Step]
Late = Callable[[Sequence[int]], Mapping[int, Opening]]
"""Answers some fit targets, given by number, with the model as it stands; tells which of them come to
show the behaviour late, and behind which start."""


@dataclass(frozen=True)
class _Orthogonal:
    """Takes all removals so far out of the original weights."""

    lm: LanguageModel
    writers: Sequence[Writer]
    edit: EditSpec
    removals: list[Removal]

    def __call__(
        self,
        plan: EditPlan,
        chosen: Sequence[Candidate],
        opening: Opening,
        pending: Sequence[int],
        sides: _Sides,
    ) -> Step:
        del opening, pending, sides
        number = 1 + max((r.step for r in self.removals), default=0)
        self.removals.extend(_removals(chosen, number))
        plan = orthogonal(self.lm, self.writers, self.removals, self.edit.scope)
        return plan, (), list(chosen)


class _Selective:
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
        behaviour: Callable[[], Shown],
        late: Late,
        progress: Progress[Any],
        memo: Memo = forgetful,
    ) -> None:
        self.late, self.memo = late, memo
        self.lm, self.writers, self.data, self.edit, self.spec = lm, writers, data, edit, spec
        self.probing, self.behaviour, self.progress = probing, behaviour, progress
        edited = tuple(w.name for w in writers)
        self.ruler, self.preserved = memo(
            ("preserved", "", probing, edit.memory, edited), partial(self._prepared, readout)
        )

    def _prepared(self, readout: Readout) -> tuple[Ruler, Preserved]:
        """Let the untouched model answer what must not change; return what is measured by that."""
        lm, data, progress = self.lm, self.data, self.progress
        watched = [t for p in (data.neutral_validation, *data.keep_validation) for t in p.texts]
        kept = (data.neutral, *data.keep)
        asked = [Request(text, ANSWER_TOKENS, look=exact(lm)) for text in watched]
        asked += [Request(text, ANSWER_TOKENS) for p in kept for text in p.texts]
        written = iter(answer(lm, asked, progress=progress, label="own answers"))
        reference = reference_of(
            lm, watched, list(islice(written, len(watched))), progress=progress
        )
        ruler = Ruler(
            lm,
            data.target_validation,
            data.neutral_validation,
            data.keep_validation,
            readout,
            progress,
            reference,
        )
        answers = [[c.ids for c in islice(written, len(p))] for p in kept]
        references = encode_answers(lm, [p.reference for p in data.capability], end=False)
        return ruler, Preserved(
            lm,
            self.writers,
            [
                *(encode(lm, p.texts, a) for p, a in zip(kept, answers, strict=True)),
                encode(lm, data.capability.texts, references),
            ],
            [encode(lm, p.texts) for p in data.keep],
            positions=self.probing.positions,
            memory=self.edit.memory * 2**30,
            progress=progress,
        )

    def __call__(
        self,
        plan: EditPlan,
        chosen: Sequence[Candidate],
        opening: Opening,
        pending: Sequence[int],
        sides: _Sides,
    ) -> Step:
        def shown() -> Shown:
            found = self.behaviour()
            if not opening:
                return found
            still = self.late(pending)
            return replace(found, late=len(still) / len(self.data.target))

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
            where = (at, self.probing, opening, self.edit, digest(*stacked.items()))
            solved = self.memo(
                ("solved", *where[:3], self.edit.ridge, self.edit.embeddings, where[-1]),
                lambda: solve(
                    self.lm,
                    stacked,
                    self._decisions(sides, opening),
                    self.preserved,
                    ridge=self.edit.ridge,
                    progress=self.progress,
                ),
            )
        alphas = {k: [c.strength for c in cs] for k, cs in by_layer.items()}

        def lambdas(base: float) -> dict[int, list[float]]:
            if self.edit.strength != "lambda":
                return {k: [base] * len(cs) for k, cs in by_layer.items()}
            return {k: [base / c.entanglement.purity for c in cs] for k, cs in by_layer.items()}

        lambdas_tried: Sequence[float] = LATE_LAMBDAS if opening else LAMBDAS
        if self.edit.lambda_:
            lambdas_tried = (self.edit.lambda_,)
        plan, trials = self.memo(
            (
                "searched",
                *(*where, digest(alphas, lambdas(1.0))),
                *(self.spec.stop_rate, tuple(pending)),
            ),
            lambda: search(
                self.lm,
                lambda base: plan + solved.plan(lambdas(base), alphas),
                ruler,
                shown,
                lambdas=lambdas_tried,
                aim=self.spec.stop_rate,
                direct=bool(opening),
                progress=self.progress,
            ),
        )
        used = lambdas(next(t.lambda_ for t in trials if t.chosen))
        balance = solved.balance(used, alphas)
        done = [
            replace(
                c, lambda_=used[k][i], removed=balance[k].removed, collateral=balance[k].collateral
            )
            for k, cs in by_layer.items()
            for i, c in enumerate(cs)
        ]
        return plan, trials, done

    def _decisions(self, sides: _Sides, opening: Opening) -> Decisions:
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
            positions=1 if opening else self.probing.positions,
            progress=self.progress,
        )


def _removals(chosen: Sequence[Candidate], step: int) -> list[Removal]:
    return [Removal(c.direction.pattern, c.strength, c.direction.layer, step) for c in chosen]


def choose(
    directions: Sequence[Direction],
    measured: Sequence[Entanglement],
    causal: Sequence[tuple[float, float] | None],
    edit: EditSpec,
    spec: RefineSpec,
    scale: float = 1.0,
) -> list[Candidate]:
    """Rank the candidates and give the `top_k` best a strength of scale x alpha x purity.

    Without a shortlist the rank is by score, as on the card. With one it is by causal fall per
    cost, fall / (1 + kl), among those tested. Candidates below the skip floor are left alone and
    their place goes to the next, as it does beyond `per_layer`.
    """
    rows = list(zip(directions, measured, causal, strict=True))
    scored = [(d, e, c, d.d_prime**2 / 2 * e.purity) for d, e, c in rows]
    if spec.shortlist:
        ranked = sorted(scored, key=lambda row: (row[2] is None, -(_merit(row[2])), -row[3]))
    else:
        ranked = sorted(scored, key=lambda row: -row[3])
    result = []
    taken: Counter[int] = Counter()
    for d, e, c, score in ranked:
        status: Status = "not selected"
        strength = 0.0
        eligible = d.q_value <= spec.max_q and d.d_prime > 0
        if spec.shortlist and (c is None or c[0] <= 0):
            eligible = False
        if spec.per_layer and taken[d.layer] >= spec.per_layer:
            eligible = False
        if eligible and (not spec.top_k or taken.total() < spec.top_k):
            if e.purity < edit.skip_below:
                status = "skipped"
            else:
                strength = scale * edit.alpha * (e.purity if edit.strength == "purity" else 1.0)
                status = "ablated" if e.purity >= 0.5 else "weakened"
                taken[d.layer] += 1
        fall, kl = c if c is not None else (None, None)
        result.append(Candidate(d, e, score, fall, kl, strength, status))
    return result


def _merit(causal: tuple[float, float] | None) -> float:
    return 0.0 if causal is None else causal[0] / (1.0 + causal[1])


def _causal_scores(
    lm: LanguageModel,
    found: Sequence[Direction],
    measured: Sequence[Entanglement],
    data: RefineData,
    probing: ProbeSpec,
    readout: Readout,
    untouched: Activations,
    current: float,
    spec: RefineSpec,
    progress: Progress[Any],
) -> list[tuple[float, float] | None]:
    """Project each shortlisted direction out of the stream; return (log-odds fall, neutral KL)."""
    scores = [d.d_prime**2 / 2 * e.purity for d, e in zip(found, measured, strict=True)]
    order = sorted(range(len(found)), key=lambda i: -scores[i])[: spec.shortlist]
    result: list[tuple[float, float] | None] = [None] * len(found)
    assert untouched.first_token is not None
    for index in progress(order, "causal scores", len(order)):
        with ablated_stream(lm, found[index].pattern[None]):
            target = probe(lm, data.target_validation, probing, first_token=True)
            neutral = probe(lm, data.neutral_validation, probing, first_token=True)
        assert neutral.first_token is not None
        kl = float(kl_divergence(untouched.first_token, neutral.first_token).mean())
        result[index] = (current - _mean_log_odds(target, readout), kl)
    return result


def _mean_log_odds(activations: Activations, readout: Readout) -> float:
    assert activations.first_token is not None
    return float(readout.log_odds(activations.first_token).mean())


def _dormant(chosen: Sequence[Candidate], original: tuple[Activations, Activations]) -> int:
    count = 0
    for candidate in chosen:
        d = candidate.direction
        x, y = (a.hidden[:, d.position, d.layer + 1] @ d.detector for a in original)
        count += abs(float(d_prime(x, y))) < 0.5 * d.d_prime
    return count


class _Clock:
    """Adds up wall time by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._running: tuple[str, float] | None = None

    def __call__(self, stage: str) -> _Clock:
        self._running = (stage, perf_counter())
        return self

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        assert self._running is not None
        stage, start = self._running
        self.seconds[stage] = self.seconds.get(stage, 0.0) + perf_counter() - start
