"""The main job: the five stages in order, measured before and after, with everything on disk."""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from types import MappingProxyType
from typing import Any

import torch
import transformers

from saber import __version__, artifacts, prompts
from saber.ablation import EditPlan, applied, originals_kept
from saber.checkpoint import plan_on_disk
from saber.checkpoint.export import PLACES, check_formats, check_places, export_all
from saber.checkpoint.licence import licence
from saber.checkpoint.runs import SKETCH, Run, way_back
from saber.checkpoint.sketch import take
from saber.config import DataSpec, RunConfig, resolved
from saber.entanglement import Entanglement
from saber.errors import (
    DataError,
    ModelError,
    NoGain,
    OutputError,
    UnknownName,
    UsageError,
    WeakBehaviour,
)
from saber.evaluation.baseline import baseline
from saber.evaluation.judging import describe, make_judge
from saber.evaluation.measure import (
    EvaluationSets,
    compare,
    examples,
    measure,
    summarise,
)
from saber.linalg import finite
from saber.lm.forward import Progress, silent
from saber.lm.model import LanguageModel
from saber.lm.writers import embedding_share
from saber.passes import Candidate, Pass, RefineData, Refinement
from saber.prompts import (
    Prompt,
    PromptSet,
    Splits,
    Use,
    check_apart,
    check_disjoint,
    normalised,
    split,
)
from saber.prompts.splits import NAMES as SPLIT_NAMES
from saber.spectral import Direction, candidate_layers
from saber.strength import Shown, Trial
from saber.subject import Subject, Watch, refined

RUN, STATE, PLAN, PASSES = "run.json", "state.json", "plan", "passes"


@dataclass(frozen=True)
class RunData:
    """All prompts of a run: those that select, and those that report."""

    selecting: RefineData
    """Fit and validation splits."""
    reporting: EvaluationSets
    """Held-out splits."""
    validation: EvaluationSets
    """The same kinds of sets from the validation splits: what a sweep chooses by."""


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    folder: Path
    """Where everything lies."""
    record: dict[str, Any]
    """What `run.json` holds."""


@dataclass(frozen=True)
class Origin:
    """The trial of a sweep that a run builds again."""

    sweep: str
    """Name of the sweep's folder."""
    trial: int
    """Number of the trial."""
    fingerprint: str
    """Fingerprint of the model that was swept."""
    plan: str
    """Digest of the trial's plan."""

    def require(self, model: str, mark: str) -> None:
        """Raise `ModelError` for another model."""
        if mark != self.fingerprint:
            raise ModelError(
                f"{model} is not the model that {self.sweep} swept "
                f"({mark[:19]} instead of {self.fingerprint[:19]}).",
                "Give that model.",
            )

    def describe(self, plan: EditPlan) -> dict[str, Any]:
        """Return the origin as it stands in `run.json`, and whether the very same edit came out."""
        return {"name": self.sweep, "trial": self.trial, "same_plan": plan.digest() == self.plan}


@dataclass(frozen=True)
class Listener:
    """What the caller wants to hear of; every default is silence."""

    progress: Progress[Any] = silent
    """Wraps long loops."""
    on_stage: Callable[[str], None] = lambda _text: None
    """Told in a few words what begins."""
    on_pass: Callable[[Pass], None] = lambda _pass: None
    """Told of each finished pass."""
    on_record: Callable[[Path], None] = lambda _folder: None
    """Told of the run folder once all but the exports is there."""


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
    origin: Origin | None = None,
) -> RunResult:
    """Find, measure and remove the behaviour; write the run folder `out`.

    `run.json` marks the folder as complete; exports come after it and are noted in it one by one, so
    that one that fails loses nothing else. Raises children of `SaberError`; `WeakBehaviour` when the
    model hardly shows the behaviour and `force` is not set. `origin` names the trial of a sweep that the
    configuration is from.
    """
    started = datetime.datetime.now(datetime.timezone.utc)
    clock = Stopwatch()
    check_formats(export, model)
    data = gather(config)
    judge = make_judge(config.evaluation.judge, config.judging, config.data.behaviour)
    judged_by = describe(config.evaluation.judge, judge)
    prepare_folder(out, model, overwrite=overwrite, resume=resume)
    with clock("load"), _removed_if_empty(out):
        listener.on_stage(f"loading {model}")
        subject = Subject.load(model, config)
        lm, mark = subject.lm, subject.mark
        check_places(export, lm, subject.edited(config))  # what cannot be edited is told at once
        if origin is not None:
            origin.require(model, mark)
    identity = {
        "model": mark,
        "config": resolved(config),
        "judge": judged_by,
        "prompts": describe_data(data),
        "template": subject.template,
        "version": __version__,
    }
    done = _resume_state(out, identity) if resume else []
    artifacts.write_json(out / STATE, identity)

    with clock("check"):
        listener.on_stage("checking that the behaviour is there")
        watch = Watch(lm, judge, data.selecting, config, listener.progress)
        for kind, count in watch.left_out.items():
            if count:
                listener.on_stage(
                    f"leaving out {count} of the {kind} prompts: the behaviour shows there too"
                )
    if not force:
        try:
            watch.require(model, config.minimum_rate)
        except WeakBehaviour:
            if not done:
                (out / STATE).unlink()
            raise
    with clock("evaluate"):
        listener.on_stage("measuring the untouched model")
        start = lm.work.tokens
        before, tokens = baseline(
            lm,
            mark,
            data.reporting,
            config.evaluation,
            judge,
            judged_by,
            progress=listener.progress,
        )
        kept = lm.work.tokens == start
        if kept:
            listener.on_stage("taking the untouched model's measures from an earlier run")

    def finished(this: Pass) -> None:
        _save_pass(out / PASSES / str(this.index), this)
        listener.on_pass(this)

    listener.on_stage("refining")
    with originals_kept(lm.model):
        outcome = refined(
            subject, watch, config, progress=listener.progress, finished=finished, done=done
        )
    clock.add(outcome.seconds)
    if outcome.passes and 0 < outcome.passes[0].rate_before <= outcome.passes[-1].rate_after:
        first, last = outcome.passes[0].rate_before, outcome.passes[-1].rate_after
        raise NoGain(first, last, len(watch.selecting.target_validation))
    plan_on_disk.save(out / PLAN, lm, outcome.plan)
    outcome.plan.save(
        out / PLAN, {"fingerprint": mark, "config": resolved(config), "saber_version": __version__}
    )
    sketch = take(lm.model, outcome.plan)
    sketch.save(out / PLAN / SKETCH)
    with clock("evaluate"), applied(lm.model, outcome.plan):
        listener.on_stage("measuring the edited model")
        after = measure(
            lm,
            data.reporting,
            config.evaluation,
            judge,
            untouched=before,
            progress=listener.progress,
        )
    record = {
        "schema": artifacts.SCHEMA,
        "saber_version": __version__,
        "command": command,
        "model": {
            **describe_model(lm, mark),
            **licence(lm.name, lm.source),
            **way_back(out, lm.name, lm.source),
        },
        "environment": environment(started),
        "config": resolved(config),
        "judge": judged_by,
        "prompts": describe_data(data, watch.left_out),
        "seconds": {},
        "work": {},
        "baseline": summarise(before),
        "edited": summarise(after),
        "comparison": compare(before, after, seed=config.seed),
        **_describe_passes(lm, outcome, config),
        "examples": examples(before, after),
        "exports": [],
        **({"sweep": origin.describe(outcome.plan)} if origin else {}),
    }
    total = clock.total()
    record["seconds"] = {**clock.seconds, "total": total}
    record["work"] = {
        "tokens": lm.work.tokens,
        "tflop": lm.flops / 1e12,
        "gflops": lm.flops / 1e9 / total,
        "baseline": {"tokens": tokens, "kept": kept},
    }
    artifacts.write_json(out / RUN, record)
    (out / STATE).unlink(missing_ok=True)
    listener.on_record(out)
    if export:
        listener.on_stage("saving the edit")
    made, begun = Run(record, outcome.plan, sketch, out), perf_counter()
    for one in export_all(made, export, out, lm=lm, spec=config.load, progress=listener.progress):
        record["exports"].append(one)
        took = perf_counter() - begun
        record["seconds"] = {**clock.seconds, "save": took, "total": total + took}
        artifacts.write_json(out / RUN, record)
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
    """Load, check and split all prompt sets; nothing is read twice, and `DataError` where uses overlap."""
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
    seen = frozenset(p.category for p in targets.fit)
    kept = [_keep_set(name, target, config.seed) for name in spec.keep]
    borderline: Splits | None = None
    if spec.borderline or not spec.target:
        loaded = prompts.load(spec.borderline) if spec.borderline else prompts.borderline()
        if spec.borderline and spec.mode == "removal":
            borderline = Splits(_none_of(loaded), _none_of(loaded), loaded)
        else:
            borderline = split(loaded, seed=config.seed)
    if spec.mode == "over-refusal":
        if borderline is None:
            raise UsageError(
                "--mode over-refusal needs prompts that are refused wrongly.", "Give --borderline."
            )
        if spec.retain:
            raise UsageError(
                "--mode over-refusal keeps all targets; --retain has no meaning there."
            )
        refused = targets
        if not spec.target:
            refused = _with_more(targets, prompts.harmful())
        wrong, kept = borderline, [refused, *kept]
    else:
        wrong, retained = _without(targets, spec.retain, config.seed)
        if retained is not None:
            kept.append(retained)
            held_target, _ = _parted(held_target, spec.retain)

    def some(chosen: PromptSet) -> PromptSet:
        if not spec.limit or len(chosen) <= spec.limit:
            return chosen
        step = len(chosen) / spec.limit
        return replace(
            chosen, prompts=tuple(chosen.prompts[int(i * step)] for i in range(spec.limit))
        )

    splits = [s for s in (borderline, *kept) if s]
    everyday = _everyday(
        spec.everyday,
        [target, neutral, held_target, held_neutral]
        + [part for s in splits for part in (s.fit, s.validation, s.heldout)],
        config.seed,
    )

    # What is kept in over-refusal mode is the reported target set itself.
    reported = kept[1:] if spec.mode == "over-refusal" else kept
    battery = prompts.battery()
    choosing, checking = halves(battery)
    between = borderline.validation if borderline and len(borderline.validation) else None
    data = RunData(
        RefineData(
            target=wrong.fit,
            neutral=neutrals.fit,
            target_validation=wrong.validation,
            neutral_validation=neutrals.validation,
            capability=prompts.capability(),
            # False refusals lie closer to true ones than to these, which only made the edit weaker.
            everyday=everyday.fit if spec.mode == "removal" else _none_of(everyday.fit),
            keep=tuple(k.fit for k in kept),
            keep_validation=tuple(k.validation for k in kept),
        ),
        EvaluationSets(
            target=some(held_target),
            neutral=some(held_neutral),
            borderline=some(borderline.heldout) if borderline else None,
            battery=some(checking if spec.battery == "half" else battery),
            seen=seen,
            kept=tuple(some(k.heldout) for k in reported),
            everyday=some(everyday.heldout) if len(everyday.heldout) else None,
        ),
        EvaluationSets(
            target=some(targets.validation if spec.mode == "over-refusal" else wrong.validation),
            neutral=some(neutrals.validation),
            borderline=some(between) if between else None,
            battery=some(choosing),
            seen=seen,
            kept=tuple(some(k.validation) for k in reported),
        ),
    )
    _require_apart(data, spec)
    return data


def _require_apart(data: RunData, spec: DataSpec) -> None:
    """Raise `DataError` for a prompt that selects and is reported on, or is target and preserved.

    None is left out instead: that would change what the user asked for, or what runs are compared by.
    """
    chosen, held, between = data.selecting, data.reporting, data.validation.borderline
    target, neutral, borderline, everyday = (
        f"--{name}" if getattr(spec, name) else ""
        for name in ("target", "neutral", "borderline", "everyday")
    )
    narrow, files = spec.mode == "over-refusal", ["--keep"] * len(spec.keep)
    kept = [target, *files] if narrow else [*files, "--retain"]
    wrong = borderline if narrow else target
    targets = [Use(chosen.target, wrong), Use(chosen.target_validation, wrong)]
    preserved = [
        Use(chosen.neutral, neutral),
        Use(chosen.neutral_validation, neutral),
        Use(chosen.capability),
        Use(chosen.everyday, everyday),
        *map(Use, chosen.keep, kept),
        *map(Use, chosen.keep_validation, kept),
    ]
    reported = [
        Use(held.target, "--eval-target" if spec.eval_target else target),
        Use(held.neutral, "--eval-neutral" if spec.eval_neutral else neutral),
        Use(held.battery),
        *map(Use, held.kept, kept[1:] if narrow else kept),
    ]
    if held.borderline:
        reported.append(Use(held.borderline, borderline))
    if held.everyday:
        reported.append(Use(held.everyday, everyday))
    # A sweep chooses by half of the battery too, which is reported on unless `data.battery` is half.
    choosing = [Use(between, borderline)] if between else []
    check_apart(
        [*targets, *preserved, *choosing], reported, "what selects must not be reported on as well"
    )
    check_apart(targets, preserved, "what is to lose the behaviour cannot be preserved as well")


def _everyday(name: str, sets: Sequence[PromptSet], seed: int) -> Splits:
    """Split the ordinary requests in two; what other sets hold is left out of the bundled ones."""
    none = PromptSet("everyday", ())
    if name == "none":
        return Splits(none, none, none)
    if not name:
        taken = {normalised(text) for one in sets for text in one.texts}
        bundled = prompts.everyday()
        fit, heldout = (
            replace(part, prompts=tuple(p for p in part if normalised(p.text) not in taken))
            for part in (bundled.where(split="fit"), bundled.where(split="heldout"))
        )
        return Splits(fit, none, heldout)
    own = prompts.load(name)
    for one in sets:
        check_disjoint(own, one)
    parts = split(own, seed=seed)
    # Nothing is chosen by these.
    return replace(parts, fit=_joined([parts.fit, parts.validation]), validation=none)


def _keep_set(name: str, target: PromptSet, seed: int) -> Splits:
    loaded = prompts.load(name)
    check_disjoint(loaded, target)
    return split(loaded, seed=seed)


def _with_more(targets: Splits, more: PromptSet) -> Splits:
    """Add prompts to what is fitted and chosen on; what is reported stays."""
    stem = targets.fit.name.removesuffix("/fit")
    fit, validation = (
        replace(_joined([part, more.where(split=name)]), name=f"{stem} and {more.name}/{name}")
        for name, part in (("fit", targets.fit), ("validation", targets.validation))
    )
    return replace(targets, fit=fit, validation=validation)


def halves(battery: PromptSet) -> tuple[PromptSet, PromptSet]:
    """Return every second item of each category, to choose by, and the rest, to report on."""
    seen: Counter[str] = Counter()
    parts: tuple[list[Prompt], list[Prompt]] = ([], [])
    for item in battery:
        parts[seen[item.category] % 2].append(item)
        seen[item.category] += 1
    names = (f"{battery.name}/validation", f"{battery.name}/heldout")
    first, second = (PromptSet(n, tuple(p)) for n, p in zip(names, parts, strict=True))
    return first, second


def _none_of(prompts_: PromptSet) -> PromptSet:
    return replace(prompts_, prompts=())


def _parted(chosen: PromptSet, categories: Sequence[str]) -> tuple[PromptSet, PromptSet]:
    """Return the prompts outside some categories, and those in them."""
    inside = tuple(p for p in chosen if p.category in categories)
    outside = tuple(p for p in chosen if p.category not in categories)
    name = chosen.name.replace("target", "retained", 1)
    return replace(chosen, prompts=outside), PromptSet(name, inside)


def _without(targets: Splits, categories: Sequence[str], seed: int) -> tuple[Splits, Splits | None]:
    """Take categories out of the targets; raises for unknown ones and when too little is left."""
    if not categories:
        return targets, None
    parts = (targets.fit, targets.validation, targets.heldout)
    known = {p.category for part in parts for p in part} - {""}
    if not known:
        raise UsageError(
            "--retain names categories, and these targets have none.",
            "Give them a column category: .jsonl, .csv or .parquet.",
        )
    for name in categories:
        if name not in known:
            raise UnknownName("category to retain", name, sorted(known))
    pairs = [_parted(part, categories) for part in parts]
    left, kept = Splits(*(p[0] for p in pairs)), [Splits(*(p[1] for p in pairs))]
    fitted = {p.category for p in targets.fit}
    for name in categories:
        if name not in fitted:
            # A category that was held out as a whole has to be divided now.
            mine = PromptSet(
                f"retained {name}", tuple(p for p in kept[0].heldout if p.category == name)
            )
            free = replace(mine, prompts=tuple(replace(p, split="") for p in mine))
            kept[0] = replace(kept[0], heldout=_parted(kept[0].heldout, [name])[0])
            kept.append(split(free, seed=seed))
    retained = Splits(*(_joined([getattr(k, part) for k in kept]) for part in SPLIT_NAMES))
    if len(left.fit) < 8 or len(left.validation) < 4 or not len(left.heldout):
        raise DataError(
            f"--retain leaves {len(left.fit)} targets to fit and {len(left.validation)} to choose on; "
            "8 and 4 are needed.",
            "Retain fewer categories.",
        )
    return left, retained


def _joined(sets: Sequence[PromptSet]) -> PromptSet:
    return replace(sets[0], prompts=tuple(p for one in sets for p in one))


def _separate(reporting: PromptSet, selecting: PromptSet) -> PromptSet:
    check_disjoint(reporting, selecting)
    if not len(reporting):
        raise DataError(f"{reporting.name} holds no prompts.")
    return reporting


def prepare_folder(out: Path, model: str = "", *, overwrite: bool, resume: bool) -> None:
    """Make the run folder usable before any work is done; raises `OutputError` when it is not.

    Only a folder that a run has marked as its own is gone on with or replaced, and none with `model` in it.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"--out {out} is a file.", "Choose a folder.")
    if model:
        artifacts.require_apart(out, model)
    if out.is_dir() and any(not _is_part(p.name) for p in out.iterdir()):
        finished, begun = _is_marked(out / RUN), _is_marked(out / STATE)
        if not (finished or begun):
            raise OutputError(
                f"--out {out} is not empty and holds no run{' to resume' if resume else ''}.",
                "Choose another folder; --overwrite replaces runs alone.",
            )
        if resume and finished:
            raise OutputError(
                f"the run in {out} is finished.",
                "There is nothing to resume. What it lacks of exports, saber export writes.",
            )
        if not resume:
            if not overwrite:
                what, ways = (
                    ("a finished run", "--overwrite")
                    if finished
                    else ("an interrupted run", "--resume, or --overwrite")
                )
                raise OutputError(f"--out {out} holds {what}.", f"Choose another, or {ways}.")
            _remove_run(out)
    artifacts.require_writable(out)


def _is_part(name: str) -> bool:
    """Whether a name is that of a file that was being written."""
    return name.startswith(".") and name.endswith(".part")


def _is_marked(path: Path) -> bool:
    """Whether a file is a run's `run.json` or `state.json`, and not somebody else's."""
    if not path.is_file():
        return False
    try:
        found = artifacts.read_json(path)
    except DataError:
        return False
    return "config" in found and bool({"version", "saber_version"} & found.keys())


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
    ours = {RUN, STATE, PLAN, PASSES, "plots", "report.html", "README.md", *PLACES.values()}
    foreign = sorted(
        p.name for p in out.iterdir() if p.name not in ours and not p.name.endswith(".part")
    ) + artifacts.foreign_plots(out)
    if foreign:
        raise OutputError(
            f"--out {out} holds files that are not a run's ({', '.join(foreign[:3])}).",
            "Choose another folder; --overwrite replaces runs alone.",
        )
    if (out / RUN).exists():
        # What is left when this is cut off is an unfinished run's, and still marked as such.
        os.replace(out / RUN, out / STATE)
    for path in sorted(out.iterdir(), key=lambda p: p.name == STATE):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _resume_state(out: Path, identity: dict[str, Any]) -> list[Pass]:
    """Return the finished passes of an interrupted run of the very same configuration."""
    if not (out / STATE).exists():
        return []
    state = artifacts.read_json(out / STATE)
    if state != identity:
        words = {"prompts": "set of prompts", "template": "chat template"}
        changed = [words.get(k, k) for k in identity if state.get(k) != identity[k]]
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
    from saber.passes import Hydra

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
        **{k: meta[k] for k in (*numbers, "incoherent_after", "lost_after", "opening", "late")},
        candidates=tuple(candidates),
        hydra=hydra,
        plan=EditPlan.load(folder / PLAN),
        trials=tuple(trials),
        by_answers=meta.get("by_answers", False),
        in_vain=tuple(map(tuple, meta.get("in_vain", ()))),
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


def describe_model(lm: LanguageModel, mark: str) -> dict[str, Any]:
    """Return the model as it stands in `run.json`."""
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
        "response_prefix": lm.response_prefix,
    }


def describe_data(
    data: RunData, left_out: Mapping[str, int] = MappingProxyType({})
) -> dict[str, Any]:
    """Return the prompt sets as they stand in `run.json`, and how many of a kind were not used.

    `fingerprint` is that of the prompts to fit on, or of all where there is no split; the other splits have
    their own.
    """
    chosen, held = data.selecting, data.reporting
    # In over-refusal mode borderline prompts are fitted on, and what is kept first are the targets.
    narrow = len(chosen.keep) > len(held.kept)

    def splits(fit: PromptSet, validation: PromptSet, heldout: PromptSet) -> dict[str, Any]:
        return {
            "name": fit.name.removesuffix("/fit"),
            "fit": len(fit),
            "validation": len(validation),
            "heldout": len(heldout),
            "fingerprint": (fit if len(fit) else heldout).fingerprint(),
            "validation_fingerprint": validation.fingerprint(),
            "heldout_fingerprint": heldout.fingerprint(),
        }

    everyday, nothing = None, _none_of(chosen.target)
    if len(chosen.everyday) or held.everyday:
        everyday = {
            **splits(chosen.everyday, nothing, held.everyday or nothing),
            "left_out": left_out.get("everyday", 0),
        }
    fitted = splits(chosen.target, chosen.target_validation, held.target)
    border = _described(held.borderline) if held.borderline else None
    kept = list(zip(chosen.keep, chosen.keep_validation, strict=True))
    if narrow:
        border = splits(chosen.target, chosen.target_validation, held.borderline or nothing)
        fitted = splits(*kept.pop(0), held.target)
    rest = [splits(*some, heldout) for some, heldout in zip(kept, held.kept, strict=True)]
    return {
        "target": fitted,
        "neutral": {
            **splits(chosen.neutral, chosen.neutral_validation, held.neutral),
            "left_out": left_out.get("neutral", 0),
        },
        "borderline": border,
        "capability": {**_described(chosen.capability), "left_out": left_out.get("capability", 0)},
        "everyday": everyday,
        "battery": _described(held.battery),
        **({"kept": rest} if rest else {}),
    }


def _described(prompts_: PromptSet) -> dict[str, Any]:
    """Return a set that is not split as it stands in `run.json`."""
    return {
        "name": prompts_.name,
        "n": len(prompts_),
        "categories": dict(sorted(Counter(prompts_.categories).items())),
        "fingerprint": prompts_.fingerprint(),
    }


def describe_reporting(held: EvaluationSets) -> dict[str, Any]:
    """Return the sets that a model is measured on, as `saber eval` tells them."""
    sets = {kind: getattr(held, kind) for kind in ("target", "neutral", "borderline", "everyday")}
    found: dict[str, Any] = {kind: _described(some) for kind, some in sets.items() if some}
    return {**found, "battery": _described(held.battery), "kept": list(map(_described, held.kept))}


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
        "lost_after": this.lost_after,
        "opening": this.opening,
        "late_after": this.late,
        "by_answers": this.by_answers,
        "in_vain": [str(lm.tokenizer.decode(list(start))) for start in this.in_vain],
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
        "sensitivity": c.sensitivity,
        "removed": c.removed,
        "collateral": c.collateral,
        "status": c.status,
    }
