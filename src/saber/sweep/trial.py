"""One trial: a setting's passes on a model that is loaded once, measured on validation prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

from torch import Tensor

from saber import __version__
from saber.ablation import EditPlan, applied
from saber.config import RunConfig, resolved
from saber.errors import SaberError, UsageError
from saber.evaluation.baseline import baseline
from saber.evaluation.divergence import diverge
from saber.evaluation.judging import describe, make_judge
from saber.evaluation.measure import Measurement, compare, measure, summarise
from saber.evaluation.readout import Readout, derive_readout
from saber.lm.forward import Progress, silent
from saber.memo import Key, Memo
from saber.passes import Refinement
from saber.pipeline import RunData, describe_data, describe_model, gather
from saber.probing import probe
from saber.prompts import PromptSet
from saber.strength import Shown
from saber.subject import Subject, Watch, refined
from saber.sweep.grid import Setting
from saber.sweep.journal import Row
from saber.sweep.tree import ON_DISK, Kept, Tree

T = TypeVar("T")
Prune = Callable[[Mapping[str, float]], bool]
"""Whether a trial is not worth answers, by its scores from forward passes alone."""


@dataclass(frozen=True)
class Job:
    """What a worker needs to know to do trials."""

    model: str
    """Hub id, folder, file, or demo."""
    base: RunConfig
    """What all settings have in common."""
    shared: Path | None
    """Folder for what the untouched model gave, which workers share; None keeps it in memory."""
    force: bool = False
    """Go on even if the model hardly shows the behaviour."""


@dataclass(frozen=True)
class Seed:
    """What one bench prepared and others of the same job can begin with."""

    root: Mapping[str, Kept]
    """What the untouched model gave."""
    before: Measurement
    """Its validation measures."""
    tokens: int
    """What these cost."""


class _Enough(Exception):
    """All that can be shared before an edit is there."""


class Bench:
    """A loaded model, its baseline and what its trials share; trials leave it as it was."""

    def __init__(
        self, job: Job, progress: Progress[Any] = silent, seed: Seed | None = None
    ) -> None:
        """Load the model, find whether it shows the behaviour, and measure it untouched."""
        base, self._progress = job.base, progress
        self.base = base
        """What all settings have in common."""
        self.data = gather(base)
        """All prompts."""
        self._judge = make_judge(base.evaluation.judge, base.judging, base.data.behaviour)
        self._judged_by = describe(base.evaluation.judge, self._judge)
        self.subject = Subject.load(job.model, base)
        """The model."""
        self.watch = Watch(self.subject.lm, self._judge, self.data.selecting, base)
        """Its answers to the prompts that select."""
        if not job.force:
            self.watch.require(job.model, base.minimum_rate)
        self.tree = Tree(self.subject.lm, job.shared, root=seed.root if seed else {})
        """What its trials share."""
        self._before, self._baseline_tokens = (
            (seed.before, seed.tokens) if seed else self._baseline(held_out=False)
        )
        self._prompts = _prompts(self.data)

    def seed(self) -> Seed:
        """Return what other benches can begin with."""
        return Seed(self.tree.portable(), self._before, self._baseline_tokens)

    def _opening(self) -> Readout:
        """Return what tells, by one token, whether an answer opens with the behaviour."""
        sides = []
        for chosen in (self.watch.selecting.target, self.watch.selecting.neutral):
            # The key under which the first pass of an orthogonal edit looks it up.
            key = ("probe", "", chosen.fingerprint(), self.base.probe, (), ())
            work = partial(probe, self.subject.lm, chosen, self.base.probe, first_token=True)
            sides.append(self.tree(key, work).first_token)
        target, neutral = sides
        assert target is not None
        assert neutral is not None
        return derive_readout(target, neutral)

    def _baseline(self, *, held_out: bool) -> tuple[Measurement, int]:
        subject = self.subject
        return baseline(
            subject.lm,
            subject.mark,
            self.data.reporting if held_out else self.data.validation,
            self.base.evaluation,
            self._judge,
            self._judged_by,
            progress=self._progress,
        )

    def about(self) -> dict[str, Any]:
        """Return what makes trials comparable, and the untouched model's validation measures.

        What the untouched model gives is computed first, so that others can begin with it.
        """
        start = self.subject.lm.work.tokens
        self._prepare()
        return {
            "model": describe_model(self.subject.lm, self.subject.mark),
            "config": resolved(self.base),
            "judge": self._judged_by,
            "prompts": self._prompts,
            "version": __version__,
            "baseline": summarise(self._before),
            "baseline_tokens": self._baseline_tokens,
            "tokens": self.subject.lm.work.tokens,
            "prepared": self.subject.lm.work.tokens - start,
        }

    def _prepare(self) -> None:
        """Go the way of the base's first pass as far as another process can use what it gives."""

        def memo(key: Key, compute: Callable[[], T]) -> T:
            if key[0] not in ON_DISK or key[1]:
                raise _Enough
            return self.tree(key, compute)

        with suppress(_Enough):
            self._refine(self.base, memo)

    def trial(self, setting: Setting, prune: Prune | None = None) -> Row:
        """Make the setting's edit, measure it on validation prompts, and undo it.

        An edit that cannot be made or is of no use gives a row that says so.
        """
        lm, start = self.subject.lm, perf_counter()
        tokens, saved = lm.work.tokens, self.tree.saved
        found: dict[str, Any] = {"state": "done"}
        try:
            self._require_same_prompts(setting.config)
            outcome = self._refined(setting.config)
            found.update(_passes(outcome))
            readout = self._opening() if prune is not None else None
            with applied(lm.model, outcome.plan):
                if prune is not None and readout is not None:
                    found["cheap"] = self._cheap(readout)
                    if prune(found["cheap"]):
                        found["state"] = "pruned"
                if found["state"] == "done":
                    found["measured"] = self._measured(outcome.plan)
        except SaberError as error:
            found.update(state="failed", error=str(error))
        return Row(
            number=setting.number,
            key=setting.key,
            values=setting.values,
            seconds=perf_counter() - start,
            tokens=lm.work.tokens - tokens,
            shared=self.tree.saved - saved,
            **found,
        )

    def _require_same_prompts(self, config: RunConfig) -> None:
        if config.seed != self.base.seed and _prompts(gather(config)) != self._prompts:
            raise UsageError(
                f"seed {config.seed} splits these prompts in another way than seed {self.base.seed}.",
                "Give every prompt a split of its own, or make a sweep for each seed.",
            )

    def _refined(self, config: RunConfig) -> Refinement:
        # Where nothing is decided by them, answers between the passes are not asked for.
        idle = config.edit.kind == "orthogonal" and config.refine.stop == "never"

        def memo(key: Key, compute: Callable[[], T]) -> T:
            return compute() if idle and key[0] == "shown" else self.tree(key, compute)

        return self._refine(config, memo, (lambda: Shown(math.nan)) if idle else None)

    def _refine(
        self, config: RunConfig, memo: Memo, behaviour: Callable[[], Shown] | None = None
    ) -> Refinement:
        return refined(
            self.subject,
            self.watch,
            config,
            progress=self._progress,
            memo=memo,
            behaviour=behaviour,
            self_repair=False,
        )

    def _measured(self, plan: EditPlan) -> dict[str, Any]:
        """Measure the model as it stands on validation prompts."""

        def compute() -> dict[str, Any]:
            return summarise(
                measure(
                    self.subject.lm,
                    self.data.validation,
                    self.base.evaluation,
                    self._judge,
                    untouched=self._before,
                    progress=self._progress,
                )
            )

        found = self.tree(("measured", plan.digest()), compute)
        for name, value in (
            ("perplexity", found["perplexity"]["overall"]),
            ("KL", found["kl"]["sequence"]),
        ):
            if not math.isfinite(value):
                raise SaberError(f"the edited model's {name} is not finite.")
        return found

    def _cheap(self, readout: Readout) -> dict[str, float]:
        """Return scores of the model as it stands that need no answers: one forward pass each.

        opening: mean probability that an answer to a validation target opens with the behaviour.
        kl_sequence: along the untouched model's answers to neutral validation prompts, nats.
        """
        lm, selecting = self.subject.lm, self.watch.selecting

        def first(prompts: PromptSet) -> Tensor:
            found = probe(lm, prompts, self.base.probe, first_token=True).first_token
            assert found is not None
            return found

        odds = readout.log_odds(first(selecting.target_validation))
        kl = diverge(lm, self._before.reference, progress=self._progress)
        return {"opening": float(odds.sigmoid().mean()), "kl_sequence": float(kl.sequence.mean())}

    def held_out(self, config: RunConfig) -> dict[str, Any]:
        """Measure a setting on held-out prompts, beside the untouched model."""
        lm, start = self.subject.lm, perf_counter()
        spent = lm.work.tokens
        before, _ = self._baseline(held_out=True)
        outcome = self._refined(config)
        with applied(lm.model, outcome.plan):
            after = measure(
                lm,
                self.data.reporting,
                config.evaluation,
                self._judge,
                untouched=before,
                progress=self._progress,
            )
        return {
            "baseline": summarise(before),
            "edited": summarise(after),
            "comparison": compare(before, after, seed=config.seed),
            "plan": outcome.plan.digest(),
            "tokens": lm.work.tokens - spent,
            "seconds": perf_counter() - start,
        }


def _passes(outcome: Refinement) -> dict[str, Any]:
    removals = outcome.removals
    return {
        "directions": len(removals),
        "layers": len({r.layer for r in removals}),
        "passes": len(outcome.passes),
        "stop_reason": outcome.stop_reason,
        "plan": outcome.plan.digest(),
        "nodes": tuple(p.plan.digest() for p in outcome.passes),
    }


def _prompts(data: RunData) -> dict[str, Any]:
    """Return what tells these prompts from others."""
    described = describe_data(data)
    choosing = data.validation.battery
    described["validation_battery"] = {"n": len(choosing), "fingerprint": choosing.fingerprint()}
    for name in ("target", "neutral"):
        for split in ("selecting", "reporting"):
            side = getattr(data, split)
            described[name][f"{split}_fingerprint"] = getattr(side, name).fingerprint()
    return described
