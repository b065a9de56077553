"""One trial: a setting's passes on a model that is loaded once, measured on validation prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from types import MappingProxyType
from typing import Any, TypeVar

from torch import Tensor

from saber import __version__
from saber.ablation import EditPlan, applied, originals_kept
from saber.config import RunConfig, resolved
from saber.errors import SaberError, UsageError
from saber.evaluation.baseline import baseline
from saber.evaluation.divergence import diverge
from saber.evaluation.judging import describe, make_judge
from saber.evaluation.measure import (
    Measurement,
    compare,
    lost,
    measure,
    not_finite,
    perplexity_ratio,
    summarise,
)
from saber.evaluation.readout import Readout, derive_readout
from saber.gathering import RunData, gather
from saber.lm.chat import encode
from saber.lm.forward import TOKENS_PER_BATCH, Progress, Share, silent
from saber.memo import Key, Memo
from saber.moments import LEAST, affordable
from saber.passes import Refinement
from saber.probing import Activations, Look, Part, join, probe
from saber.prompts import PromptSet
from saber.record import describe_data, describe_model
from saber.refinement import first_looks
from saber.strength import Shown
from saber.subject import Subject, Watch, refined
from saber.sweep.grid import Setting
from saber.sweep.journal import Row
from saber.sweep.tree import ON_DISK, PART, Kept, Tree

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
    workers: int = 1
    """Workers that may share a machine's memory."""


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
        self,
        job: Job,
        progress: Progress[Any] = silent,
        seed: Seed | None = None,
        device: str = "",
    ) -> None:
        """Load the model, onto this `device` where one is given, and find whether it shows the behaviour."""
        base, self._progress = job.base, progress
        self._on_disk = job.shared is not None
        self.base = base
        """What all settings have in common."""
        self.data = gather(base)
        """All prompts."""
        self._narrow = base.data.mode == "over-refusal"
        self._judge = make_judge(base.evaluation.judge, base.judging, base.data.behaviour)
        self._judged_by = describe(base.evaluation.judge, self._judge)
        mine = replace(base, load=replace(base.load, device=device or base.load.device))
        self.subject = Subject.load(job.model, mine)
        """The model."""
        self.watch = Watch(self.subject.lm, self._judge, self.data.selecting, base, progress)
        """Its answers to the prompts that select."""
        if not job.force:
            self.watch.require(job.model, base.minimum_rate)
        self._memory = _share(self.subject, job.workers)
        self.tree = Tree(self.subject.lm, job.shared)
        """What its trials share."""
        self._untouched: tuple[Measurement, int] | None = None
        self._prompts = _prompts(self.data)
        self._own = 0
        if seed is not None:
            self.adopt(seed)

    def seed(self) -> Seed:
        """Return what other benches can begin with."""
        before, tokens = self._ready()
        return Seed(self.tree.portable(), before, tokens)

    def adopt(self, seed: Seed) -> None:
        """Begin with what another bench prepared."""
        self.tree.adopt(seed.root)
        self._untouched = (seed.before, seed.tokens)

    def _ready(self) -> tuple[Measurement, int]:
        """Return the untouched model's validation measures and their tokens; no edit may be in force."""
        if self._untouched is None:
            self._untouched = self._baseline(held_out=False)
        return self._untouched

    @property
    def _before(self) -> Measurement:
        assert self._untouched is not None
        return self._untouched[0]

    def part(self, share: Share) -> dict[str, Kept]:
        """Read this worker's share of the prompts that the first pass probes, for `about` to join.

        The parts lie on disk where there is a shared folder; where there is none they are returned.
        """
        start = self.subject.lm.work.tokens
        for look in self._shared_out(share.of):
            self._part(look, share)
        self._own = self.subject.lm.work.tokens - start
        parts = self.tree.parts()
        self.tree.drop_parts(disk=False)
        return {} if self._on_disk else parts

    def _part(self, look: Look, share: Share) -> Part:
        work = partial(look.part, self.subject.lm, share, self._progress)
        return self.tree((PART, "", share, *look.key()), work)

    def _joined(self, look: Look, of: int) -> Activations:
        return join([self._part(look, Share(i, of)) for i in range(of)])

    def _shared_out(self, of: int) -> list[Look]:
        """Return what so many workers probe together: what is not there yet and makes batches for all."""
        lm, base = self.subject.lm, self.base
        writers = self.subject.edited(base)
        looks = first_looks(lm, writers, self.watch.selecting, base.probe, base.edit)
        return [
            look
            for look in looks
            if not self.tree.has(look.key())
            and sum(len(e.ids) for e in encode(lm, look.prompts.texts)) >= of * TOKENS_PER_BATCH
        ]

    def _join(self, of: int) -> int:
        """Make one result of the workers' parts, of which those that are missing are read here.

        Returns the tokens that other workers spent on them.
        """
        saved = self.tree.saved
        for look in self._shared_out(of):
            self.tree(look.key(), partial(self._joined, look, of))
        self.tree.drop_parts()
        return self.tree.saved - saved - self._own

    def _opening(self) -> Readout:
        """Return what tells, by one token, whether an answer opens with the behaviour."""
        sides = []
        for chosen in (self.watch.selecting.target, self.watch.selecting.neutral):
            # The key under which the first pass of an orthogonal edit looks it up.
            look = Look(chosen, self.base.probe)
            sides.append(self.tree(look.key(), partial(look.read, self.subject.lm)).first_token)
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

    def about(
        self, of: int = 1, parts: Mapping[str, Kept] = MappingProxyType({})
    ) -> dict[str, Any]:
        """Return what makes trials comparable, and the untouched model's validation measures.

        What the untouched model gives is computed first, so that others can begin with it: from the
        parts of `of` workers where they probed together.
        """
        before, baseline_tokens = self._ready()
        start = self.subject.lm.work.tokens
        self.tree.adopt(parts)
        elsewhere = self._join(of) if of > 1 else 0
        self._prepare()
        tokens = self.subject.lm.work.tokens + elsewhere
        return {
            "model": describe_model(self.subject.lm, self.subject.mark),
            "config": resolved(self.base),
            "judge": self._judged_by,
            "prompts": self._prompts,
            "template": self.subject.template,
            "version": __version__,
            "remark": self.watch.remark,
            "baseline": summarise(before),
            "baseline_tokens": baseline_tokens,
            "tokens": tokens,
            "prepared": tokens - start + self._own,
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
        self._ready()
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
        memory = config.edit.memory or self._memory
        config = replace(config, edit=replace(config.edit, memory=memory))
        with originals_kept(self.subject.lm.model):
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
            after = measure(
                self.subject.lm,
                self.data.validation,
                self.base.evaluation,
                self._judge,
                untouched=self._before,
                progress=self._progress,
            )
            ratio = perplexity_ratio(self._before, after, seed=self.base.seed)
            return {**self._summary(self._before, after), "perplexity_ratio": ratio}

        found = self.tree(("measured", plan.digest()), compute)
        _require_finite(
            {"perplexity": found["perplexity"]["overall"], "KL": found["kl"]["sequence"]}
        )
        _require_finite(found)
        return found

    def _summary(self, before: Measurement, after: Measurement) -> dict[str, Any]:
        """Return a summary with how many answers that were to stay did not, where any were to."""
        gone = lost(before, after, narrow=self._narrow)
        return {**summarise(after), **({"lost": gone} if gone else {})}

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
        found = {"opening": float(odds.sigmoid().mean()), "kl_sequence": float(kl.sequence.mean())}
        _require_finite({"opening": found["opening"], "KL": found["kl_sequence"]})
        return found

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
            "edited": self._summary(before, after),
            "comparison": compare(before, after, seed=config.seed),
            "plan": outcome.plan.digest(),
            "tokens": lm.work.tokens - spent,
            "seconds": perf_counter() - start,
        }


def _require_finite(measured: Mapping[str, Any]) -> None:
    """Raise `SaberError` that names the first number that is not finite, where the model overflows."""
    if name := not_finite(measured):
        raise SaberError(f"the edited model's {name} is not finite.")


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


def _share(subject: Subject, workers: int) -> float:
    """Return a worker's part of what moments may take on this machine, GiB; 0 leaves it open to one alone."""
    if workers == 1:
        return 0.0
    whole = affordable(subject.lm, subject.writers)
    return max(whole / workers, min(whole, LEAST)) / 2**30
