"""Stage 5: probe, choose, edit, and probe again, until the behaviour is gone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from saber.ablation import EditPlan, EditSpec, applied
from saber.candidates import causal_scores, choose, dormant, mean_log_odds
from saber.editors import Ask, Both, Editor, OrthogonalEditor, SelectiveEditor, Sides
from saber.entanglement import EntanglementSpec, entangle
from saber.evaluation.readout import derive_readout
from saber.hydra import compensation
from saber.lm.forward import Progress, silent
from saber.lm.generate import Completion
from saber.lm.inputs import routes
from saber.lm.model import LanguageModel
from saber.lm.writers import Writer
from saber.memo import Memo, forgetful
from saber.openings import Fitted, Opening, likeliest
from saber.passes import Hydra, Pass, RefineData, Refinement, RefineSpec
from saber.probing import Activations, Look, ProbeSpec, probe_capabilities
from saber.prompts import PromptSet, paired
from saber.spectral import SpectralSpec, extract
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
    behaviour: Callable[[], Shown],
    shown: Shown | None = None,
    fitted: Ask = lambda _rows: Fitted({}),
    watched: Callable[[], Mapping[int, Opening]] = dict,
    together: Both | None = None,
    own: Mapping[str, Completion] = MappingProxyType({}),
    progress: Progress[Any] = silent,
    finished: Callable[[Pass], None] | None = None,
    done: Sequence[Pass] = (),
    memo: Memo = forgetful,
    self_repair: bool = True,
) -> Refinement:
    """Run the passes; the model's weights are the untouched ones before and after.

    `behaviour` answers validation targets with the model as it stands and tells what they show;
    `shown` is that of the untouched model, where it is known already. A selective pass after the first
    looks behind a start that `fitted` finds: of the three commonest, the likeliest over all targets. Where
    no fit target comes late it is one of those that `watched` finds among validation targets.
    `together` does what both do, where that is less work than one after the other. `own`
    holds answers of the untouched model of `ANSWER_TOKENS`, by prompt, which are not written again.
    `done` holds passes of an interrupted run, which are not repeated; `finished` hears of each new
    one. Every plan is made from the original weights with all removals so far, and rounded once.

    A `memo` for this model and these prompts spares what other settings have computed already: its
    keys hold the plan in force by content, so settings share their passes until they part. Without
    `self_repair` the hydra's compensation, on which nothing depends, is not measured.
    """
    clock = _Clock()

    tapped = _tapped(lm, writers, edit)
    # Kinds of edits may read other prompts.
    read = tuple(p.fingerprint() for p in (data.target, data.neutral, data.capability))

    def look(
        prompts: PromptSet, opening: Opening = (), writers: tuple[Writer, ...] = (), at: str = ""
    ) -> Activations:
        wanted = Look(prompts, probing, tuple(opening), writers)
        return memo(wanted.key(at), lambda: wanted.read(lm, progress))

    def sides(opening: Opening = (), at: str = "") -> Sides:
        return look(data.target, opening, tapped, at), look(data.neutral, opening, tapped, at)

    with clock("probe"):
        original = sides()
        assert original[0].first_token is not None
        assert original[1].first_token is not None
        readout = derive_readout(original[0].first_token, original[1].first_token)
        untouched = look(data.neutral_validation)
        start = mean_log_odds(look(data.target_validation), readout)
        start_rate = (behaviour() if shown is None else shown).rate
        if not readout.tokens:
            spec = replace(spec, shortlist=0)  # nothing would tell causes apart
        # What must be kept is what the untouched model does: this is probed once.
        capability = memo(
            ("capability", "", read, probing),
            lambda: probe_capabilities(lm, data.capability, probing, progress=progress),
        )
    passes = list(done)
    plan = passes[-1].plan if passes else EditPlan()
    editor: Editor
    if edit.kind == "selective":
        with clock("moments"):
            editor = SelectiveEditor(
                lm,
                writers,
                data,
                edit,
                spec,
                probing,
                readout,
                together or (lambda rows: (behaviour(), fitted(rows))),
                progress,
                own,
                memo,
            )
    else:
        editor = OrthogonalEditor(lm, writers, edit, [r for p in passes for r in p.removals])
    current = passes[-1].log_odds_after if passes else start
    rate = passes[-1].rate_after if passes else start_rate
    amiss, selective = start_rate, edit.kind == "selective"
    pending: Mapping[int, Opening] = {}

    everyone, few = range(len(data.target)), spec.stop_rate * len(data.target)

    def turns(
        plan: EditPlan, rows: Sequence[int], told: Fitted | None = None
    ) -> Mapping[int, Opening]:
        with clock("refine"), applied(lm.model, plan):
            return memo(("late", plan.digest(), tuple(rows)), lambda: (told or fitted(rows)).late)

    if passes:
        amiss = passes[-1].rate_after + passes[-1].incoherent_after + passes[-1].lost_after
        last = passes[-1]
        settled = last.opening and last.rate_after <= spec.stop_rate and (last.late or 0) <= few
        pending = turns(plan, everyone) if selective and not settled else pending
    reason, vain = "all passes made", set[Opening]()
    seen: dict[str, Mapping[int, Opening]] = {}

    def turning(at: str) -> Mapping[int, Opening]:
        """Return behind which starts validation targets turn."""
        if at not in seen:
            seen[at] = memo(("watched", at), watched)
        return seen[at]

    def untried(late: Mapping[int, Opening]) -> dict[int, Opening]:
        """Leave out starts behind which a pass did not help or, of validation targets, was made."""
        done = set() if late is pending else {this.opening for this in passes}
        return {
            i: o
            for i, o in late.items()
            if o not in vain and str(lm.tokenizer.decode(list(o))) not in done
        }

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
                    late = pending or (turning(at) if selective else {})
                    opening = likeliest(lm, data.target.texts, untried(late))
                    at_once = rate - len(late) / len(data.target_validation)
                    if late and not (pending or opening) and round(at_once, 9) <= spec.stop_rate:
                        reason = "what is left turns late, behind starts that were tried"
                        break
                    target, neutral = sides(opening, at)
            where = (at, read, probing, opening, spectral, seed, len(passes))
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
                        causal_scores,
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
            plan, trials, chosen, told, by_answers = editor(
                earlier, chosen, opening, list(pending), (target, neutral), amiss
            )
            fate = {id(c.direction): c for c in chosen}
            candidates = [fate.get(id(c.direction), c) for c in candidates]
        with clock("refine"):
            with applied(lm.model, plan):
                mark = plan.digest()
                after = mean_log_odds(look(data.target_validation, at=mark), readout)
                reached = next((t.shown for t in trials if t.chosen), None)
                reached = (reached or memo(("shown", mark), behaviour)).on_validation()
                reached = replace(reached, late=0.0)  # `pending` tells of fit targets
            back = None
            if self_repair and len(plan.factors) < len(writers):
                pairs = paired(data.target_validation.pairs, data.neutral_validation.pairs)
                back = compensation(
                    lm,
                    writers,
                    earlier,
                    plan,
                    chosen[0].direction.pattern,
                    data.target_validation.texts,
                    data.neutral_validation.texts,
                    generator=rng,
                    pairs=pairs,
                )
        best = found[0]
        woken = None if opening else dormant(chosen, original)
        hydra = Hydra(best.auroc, best.d_prime, best.layer, woken, back)
        before = pending
        if selective:
            # Once validation targets are clean, those that came late may do: they are asked first.
            clean = bool(opening) and reached.rate <= spec.stop_rate
            pending = turns(plan, list(pending)) if clean and before else {}
            if not clean or not before or len(pending) > few:
                pending = turns(plan, everyone, told)
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
            by_answers=by_answers,
        )
        worse = (reached.amiss - amiss) * len(data.target_validation)
        if passes and selective and worse + len(pending) - len(before) >= 0:
            reason = (
                f"a further pass did not help (amiss {amiss:.0%} -> {reached.amiss:.0%} on validation "
                f"prompts, late {len(before)} -> {len(pending)} of {len(data.target)} fit targets)"
            )
            plan, pending = earlier, before
            vain.add(opening)
            if not untried(late):
                break
            continue
        passes.append(this)
        current, rate, amiss = after, reached.rate, reached.amiss
        if finished is not None:
            finished(passes[-1])
    return Refinement(tuple(passes), plan, reason, clock.seconds)


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
