"""The main job: the five stages in order, measured before and after, with everything on disk."""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers

from saber import __version__, artifacts, prompts
from saber.ablation import EditPlan, applied
from saber.checkpoint import save_merged
from saber.config import RunConfig, resolved
from saber.entanglement import Entanglement
from saber.errors import DataError, NoGain, OutputError, UsageError, WeakBehaviour
from saber.evaluation.judge import named_judge
from saber.evaluation.measure import (
    EvaluationSets,
    compare,
    examples,
    measure,
    summarise,
)
from saber.inspection import require_ablated
from saber.linalg import finite
from saber.lm.forward import Progress, silent
from saber.lm.generate import generate
from saber.lm.load import load
from saber.lm.model import LanguageModel, fingerprint
from saber.lm.writers import embedding_share, embedding_writer, find_writers
from saber.prompts import PromptSet, check_disjoint, split
from saber.refinement import Candidate, Pass, RefineData, Refinement, refine
from saber.spectral import Direction, candidate_layers
from saber.strength import Shown, Trial

RUN, STATE, PLAN, MODEL, PASSES = "run.json", "state.json", "plan", "model", "passes"


@dataclass(frozen=True)
class RunData:
    """All prompts of a run: those that select, and those that report."""

    selecting: RefineData
    """Fit and validation splits."""
    reporting: EvaluationSets
    """Held-out splits."""


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    folder: Path
    """Where everything lies."""
    record: dict[str, Any]
    """What `run.json` holds."""


@dataclass(frozen=True)
class Listener:
    """What the caller wants to hear of; every default is silence."""

    progress: Progress[Any] = silent
    """Wraps long loops."""
    on_stage: Callable[[str], None] = lambda _text: None
    """Told in a few words what begins."""
    on_pass: Callable[[Pass], None] = lambda _pass: None
    """Told of each finished pass."""


def run(
    model: str,
    out: Path,
    config: RunConfig,
    *,
    export: Sequence[str] = ("merged",),
    overwrite: bool = False,
    resume: bool = False,
    force: bool = False,
    command: str = "",
    listener: Listener = Listener(),
) -> RunResult:
    """Find, measure and remove the behaviour; write the run folder `out`.

    `run.json` is written last and marks the folder as complete. Raises children of `SaberError`;
    `WeakBehaviour` when the model hardly shows the behaviour and `force` is not set.
    """
    started = datetime.datetime.now(datetime.timezone.utc)
    clock = Stopwatch()
    data = gather(config)
    prepare_folder(out, overwrite=overwrite, resume=resume)
    with clock("load"), _removed_if_empty(out):
        listener.on_stage(f"loading {model}")
        lm = load(model, config.load)
        mark = fingerprint(lm.model)
        writers = find_writers(lm)
        require_ablated(lm, writers)
        if config.edit.embeddings:
            writers = [embedding_writer(lm), *writers]
    identity = {"model": mark, "config": resolved(config), "version": __version__}
    done = _resume_state(out, identity) if resume else []
    artifacts.write_json(out / STATE, identity)
    judge = named_judge(config.evaluation.judge)

    def behaviour() -> Shown:
        texts = data.selecting.target_validation.texts
        tried = generate(lm, texts, config.evaluation.max_new_tokens, settled=judge.settled)
        labels = Counter(judge.label(c.text) for c in tried)
        return Shown(labels["refusal"] / len(tried), labels["incoherent"] / len(tried))

    with clock("check"):
        listener.on_stage("checking that the behaviour is there")
        shown = behaviour()
    rate = shown.rate
    if rate < config.minimum_rate and not force:
        (out / STATE).unlink()
        raise WeakBehaviour(
            f"{model} shows the behaviour on only {rate:.0%} of "
            f"{len(data.selecting.target_validation)} validation targets "
            f"(needed: {config.minimum_rate:.0%}); nothing was edited.",
            "Give other --target prompts, or --force.",
        )
    with clock("evaluate"):
        listener.on_stage("measuring the untouched model")
        before = measure(lm, data.reporting, config.evaluation, judge, progress=listener.progress)

    def finished(this: Pass) -> None:
        _save_pass(out / PASSES / str(this.index), this)
        listener.on_pass(this)

    listener.on_stage("refining")
    outcome = refine(
        lm,
        writers,
        data.selecting,
        probing=config.probe,
        spectral=config.spectral,
        entanglement=config.entanglement,
        edit=config.edit,
        spec=config.refine,
        seed=config.seed,
        behaviour=behaviour,
        shown=shown,
        progress=listener.progress,
        finished=finished,
        done=done,
    )
    clock.add(outcome.seconds)
    if outcome.passes and 0 < rate <= outcome.passes[-1].rate_after:
        raise NoGain(rate, outcome.passes[-1].rate_after, len(data.selecting.target_validation))
    outcome.plan.save(
        out / PLAN, {"fingerprint": mark, "config": resolved(config), "saber_version": __version__}
    )
    with clock("evaluate"), applied(lm.model, outcome.plan):
        listener.on_stage("measuring the edited model")
        after = measure(
            lm,
            data.reporting,
            config.evaluation,
            judge,
            reference=before.reference,
            progress=listener.progress,
        )
    record = {
        "schema": artifacts.SCHEMA,
        "saber_version": __version__,
        "command": command,
        "model": _describe(lm, mark),
        "environment": environment(started),
        "config": resolved(config),
        "prompts": _describe_data(data),
        "seconds": {},
        "work": {},
        "baseline": summarise(before),
        "edited": summarise(after),
        "comparison": compare(before, after, seed=config.seed),
        **_describe_passes(lm, outcome, config),
        "examples": examples(before, after),
    }
    if "merged" in export:
        with clock("save"):
            listener.on_stage("saving the edited model")
            save_merged(lm, outcome.plan, out / MODEL)
    total = clock.total()
    record["seconds"] = {**clock.seconds, "total": total}
    record["work"] = {
        "tokens": lm.work.tokens,
        "tflop": lm.flops / 1e12,
        "gflops": lm.flops / 1e9 / total,
    }
    artifacts.write_json(out / RUN, record)
    (out / STATE).unlink(missing_ok=True)
    return RunResult(out, record)


class Stopwatch:
    """Adds up wall time by stage, seconds."""

    def __init__(self) -> None:
        self.start = perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time a block under a stage's name."""
        begin = perf_counter()
        try:
            yield
        finally:
            self.add({stage: perf_counter() - begin})

    def add(self, seconds: dict[str, float]) -> None:
        """Add times measured elsewhere."""
        for stage, value in seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + value

    def total(self) -> float:
        """Return the time since the start."""
        return perf_counter() - self.start


def gather(config: RunConfig) -> RunData:
    """Load, check and split all prompt sets; nothing is read twice and no split overlaps."""
    spec = config.data
    if bool(spec.target) != bool(spec.neutral):
        raise UsageError("--target and --neutral go together.", "Give both, or neither.")
    target = prompts.load(spec.target) if spec.target else prompts.target()
    neutral = prompts.load(spec.neutral) if spec.neutral else prompts.neutral()
    check_disjoint(target, neutral)
    targets, neutrals = split(target, seed=config.seed), split(neutral, seed=config.seed)
    held_target, held_neutral = targets.heldout, neutrals.heldout
    if spec.eval_target:
        held_target = _separate(prompts.load(spec.eval_target), target)
    if spec.eval_neutral:
        held_neutral = _separate(prompts.load(spec.eval_neutral), neutral)
    borderline: PromptSet | None = None
    if spec.borderline:
        borderline = prompts.load(spec.borderline)
    elif not spec.target:
        borderline = prompts.borderline().where(split="heldout")
    seen = frozenset(p.category for p in targets.fit)

    def some(chosen: PromptSet) -> PromptSet:
        if not spec.limit or len(chosen) <= spec.limit:
            return chosen
        step = len(chosen) / spec.limit
        return replace(
            chosen, prompts=tuple(chosen.prompts[int(i * step)] for i in range(spec.limit))
        )

    return RunData(
        RefineData(
            target=targets.fit,
            neutral=neutrals.fit,
            target_validation=targets.validation,
            neutral_validation=neutrals.validation,
            capability=prompts.capability(),
        ),
        EvaluationSets(
            target=some(held_target),
            neutral=some(held_neutral),
            borderline=some(borderline) if borderline else None,
            battery=some(prompts.battery()),
            seen=seen,
        ),
    )


def _separate(reporting: PromptSet, selecting: PromptSet) -> PromptSet:
    check_disjoint(reporting, selecting)
    if not len(reporting):
        raise DataError(f"{reporting.name} holds no prompts.")
    return reporting


def prepare_folder(out: Path, *, overwrite: bool, resume: bool) -> None:
    """Make the run folder usable before any work is done; raises `OutputError` when it is not."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"--out {out} is a file.", "Choose a folder.")
    if out.is_dir() and any(out.iterdir()):
        if resume and (out / RUN).exists():
            raise OutputError(f"the run in {out} is finished.", "There is nothing to resume.")
        if not resume:
            if not overwrite:
                raise OutputError(
                    f"--out {out} is not empty.", "Choose another, or --overwrite, or --resume."
                )
            _remove_run(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".write-test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(
            f"cannot write to --out {out}: {error.strerror}.", "Choose another folder."
        ) from error


@contextmanager
def _removed_if_empty(out: Path) -> Iterator[None]:
    """Take the folder away again when the block fails and nothing was written to it."""
    try:
        yield
    except BaseException:
        if not any(out.iterdir()):
            out.rmdir()
        raise


def _remove_run(out: Path) -> None:
    """Remove a former run's files; refuse a folder that holds anything that is not ours."""
    ours = {RUN, STATE, PLAN, MODEL, PASSES, "plots", "report.html", "README.md"}
    foreign = sorted(
        p.name for p in out.iterdir() if p.name not in ours and not p.name.endswith(".part")
    )
    if foreign:
        raise OutputError(
            f"--out {out} holds files that are not a run's ({', '.join(foreign[:3])}).",
            "Choose another folder; --overwrite replaces runs alone.",
        )
    for path in sorted(out.iterdir(), key=lambda p: p.name != RUN):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _resume_state(out: Path, identity: dict[str, Any]) -> list[Pass]:
    """Return the finished passes of an interrupted run of the very same configuration."""
    if not (out / STATE).exists():
        return []
    state = artifacts.read_json(out / STATE)
    if state != identity:
        changed = [k for k in identity if state.get(k) != identity[k]]
        raise UsageError(
            f"the run in {out} was made with another {' and '.join(changed)}.",
            "Give the same arguments, or start anew with --overwrite.",
        )
    done: list[Pass] = []
    while (folder := out / PASSES / str(len(done) + 1)).joinpath(artifacts.META).exists():
        done.append(_load_pass(folder))
    return done


def _save_pass(folder: Path, this: Pass) -> None:
    tensors = {
        "patterns": torch.stack([c.direction.pattern for c in this.candidates]),
        "detectors": torch.stack([c.direction.detector for c in this.candidates]),
    }
    plain = dataclasses.asdict(replace(this, plan=EditPlan()))
    del plain["plan"]
    for row in plain["candidates"]:
        del row["direction"]["pattern"], row["direction"]["detector"]
    this.plan.save(folder / PLAN, {"passes": this.index})
    artifacts.save(folder, "pass", tensors, plain)


def _load_pass(folder: Path) -> Pass:
    from saber.hydra import Compensation
    from saber.refinement import Hydra

    tensors, meta = artifacts.load(folder, "pass")
    candidates = []
    for i, row in enumerate(meta["candidates"]):
        direction = Direction(
            **row.pop("direction"), pattern=tensors["patterns"][i], detector=tensors["detectors"][i]
        )
        candidates.append(
            Candidate(
                direction=direction, entanglement=Entanglement(**row.pop("entanglement")), **row
            )
        )
    back = meta["hydra"].pop("compensation")
    hydra = Hydra(**meta["hydra"], compensation=Compensation(**back) if back else None)
    numbers = ("index", "log_odds_before", "log_odds_after", "rate_before", "rate_after")
    trials = [
        Trial(**{**row, "shown": Shown(**row["shown"]) if row["shown"] else None})
        for row in meta["trials"]
    ]
    return Pass(
        **{k: meta[k] for k in (*numbers, "incoherent_after")},
        candidates=tuple(candidates),
        hydra=hydra,
        plan=EditPlan.load(folder / PLAN),
        trials=tuple(trials),
    )


def environment(started: datetime.datetime) -> dict[str, Any]:
    """Return what the numbers may depend on, and when they were made."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.system(),
        "processor": f"{os.cpu_count()}-core {platform.machine()}",
        "threads": torch.get_num_threads(),
        "started": started.strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _describe(lm: LanguageModel, mark: str) -> dict[str, Any]:
    return {
        "name": lm.name,
        "source": lm.source,
        "model_type": lm.model.config.model_type,
        "base": lm.base,
        "fingerprint": mark,
        "layers": len(lm.layers),
        "d_model": lm.d_model,
        "parameters": sum(p.numel() for p in lm.model.parameters()),
        "compute_dtype": str(lm.dtype).removeprefix("torch."),
        "storage_dtype": str(lm.stored_dtype).removeprefix("torch."),
        "device": lm.device.type,
    }


def _describe_data(data: RunData) -> dict[str, Any]:
    chosen, held = data.selecting, data.reporting

    def splits(fit: PromptSet, validation: PromptSet, heldout: PromptSet) -> dict[str, Any]:
        return {
            "name": fit.name.removesuffix("/fit"),
            "fit": len(fit),
            "validation": len(validation),
            "heldout": len(heldout),
            "fingerprint": fit.fingerprint(),
        }

    def one(prompts_: PromptSet) -> dict[str, Any]:
        counts = dict(sorted(Counter(prompts_.categories).items()))
        return {
            "name": prompts_.name,
            "n": len(prompts_),
            "categories": counts,
            "fingerprint": prompts_.fingerprint(),
        }

    return {
        "target": splits(chosen.target, chosen.target_validation, held.target),
        "neutral": splits(chosen.neutral, chosen.neutral_validation, held.neutral),
        "borderline": one(held.borderline) if held.borderline else None,
        "capability": one(chosen.capability),
        "battery": one(held.battery),
    }


def _describe_passes(lm: LanguageModel, outcome: Refinement, config: RunConfig) -> dict[str, Any]:
    removals = outcome.removals
    return {
        "directions_ablated": len(removals),
        "layers_edited": len({r.layer for r in removals}),
        "writers_edited": len(outcome.plan.factors),
        "candidate_layers": candidate_layers(len(lm.layers), config.spectral),
        "stop_reason": outcome.stop_reason,
        "passes": [_describe_pass(lm, p) for p in outcome.passes],
    }


def _describe_pass(lm: LanguageModel, this: Pass) -> dict[str, Any]:
    back = this.hydra.compensation
    rows = [_describe_candidate(c) for c in this.ablated]
    patterns = [c.direction.pattern for c in this.ablated]
    for row, share in zip(rows, embedding_share(lm, torch.stack(patterns)), strict=True):
        row["embedding_share"] = finite(share)
    return {
        "index": this.index,
        "log_odds_before": this.log_odds_before,
        "log_odds_after": this.log_odds_after,
        "rate_before": this.rate_before,
        "rate_after": this.rate_after,
        "incoherent_after": this.incoherent_after,
        "search": [_describe_trial(t) for t in this.trials],
        "directions": rows,
        "candidates": [_describe_candidate(c) for c in this.candidates],
        "hydra": {
            **{k: v for k, v in dataclasses.asdict(this.hydra).items() if k != "compensation"},
            "compensation": dataclasses.asdict(back) if back else None,
        },
    }


def _describe_trial(t: Trial) -> dict[str, Any]:
    row = dataclasses.asdict(t)
    return {"lambda": row.pop("lambda_"), **row}


def _describe_candidate(c: Candidate) -> dict[str, Any]:
    d, e = c.direction, c.entanglement
    return {
        "layer": d.layer,
        "component": d.component,
        "position": d.position,
        "d_prime": d.d_prime,
        "auroc": d.auroc,
        "auroc_low": d.auroc_low,
        "auroc_high": d.auroc_high,
        "p_value": d.p_value,
        "q_value": d.q_value,
        "entanglement": dict(e.by_category),
        "overlap": dict(e.overlap),
        "worst_category": e.worst_category,
        "worst_entanglement": e.worst,
        "null_percentile": e.null_percentile,
        "purity": e.purity,
        "score": c.score,
        "causal": c.causal,
        "causal_kl": c.causal_kl,
        "strength": c.strength,
        "lambda": c.lambda_,
        "removed": c.removed,
        "collateral": c.collateral,
        "status": c.status,
    }
