"""The main job: the five stages in order, measured before and after, with everything on disk."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from inspect import signature
from pathlib import Path
from time import perf_counter
from typing import Any, ParamSpec, TypeVar

from saber import __version__, artifacts
from saber.ablation import EditPlan, applied, originals_kept
from saber.checkpoint import plan_on_disk
from saber.checkpoint.export import check_formats, check_places, export_all
from saber.checkpoint.licence import licence
from saber.checkpoint.runs import PLAN, RUN, SKETCH, Run, alone, exports_with, way_back
from saber.checkpoint.sketch import take
from saber.config import RunConfig, require_empty_thoughts, resolved
from saber.errors import (
    ModelError,
    NoEdit,
    NoGain,
    NonFinite,
    WeakBehaviour,
)
from saber.evaluation.baseline import baseline
from saber.evaluation.judge import Judge
from saber.evaluation.judging import describe, make_judge
from saber.evaluation.measure import (
    answers,
    compare,
    examples,
    measure,
    not_finite,
    summarise,
)
from saber.gathering import RunData, gather
from saber.lm.forward import Progress, silent
from saber.passes import Pass, Refinement
from saber.record import describe_data, describe_model, describe_passes, environment
from saber.report import write_answers
from saber.run_folder import (
    PASSES,
    RUNS,
    STATE,
    Files,
    abandon,
    prepare_folder,
    removed_if_empty,
    resume_state,
    save_pass,
)
from saber.stopwatch import Stopwatch
from saber.subject import Subject, Watch, refined

P = ParamSpec("P")
R = TypeVar("R")


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


def one_at_a_time(work: Callable[P, R]) -> Callable[P, R]:
    """Let one process at a time work in the folder `out`; another is refused with an `OutputError`."""

    @wraps(work)
    def held(*args: P.args, **kwargs: P.kwargs) -> R:
        out: Path = signature(work).bind(*args, **kwargs).arguments["out"]
        with artifacts.claimed(out):
            return work(*args, **kwargs)

    return held


@dataclass(frozen=True)
class Begun:
    """What a run or an audit is of, once the untouched model is known to show the behaviour."""

    subject: Subject
    """The loaded model."""
    data: RunData
    """All prompts."""
    judge: Judge
    """Who labels answers."""
    judged_by: Mapping[str, Any]
    """How the record describes the judge."""
    watch: Watch
    """Answers to the prompts that select."""
    done: Sequence[Pass]
    """Passes of an interrupted one."""

    def refined(
        self, out: Path, config: RunConfig, clock: Stopwatch, listener: Listener
    ) -> Refinement:
        """Run the passes, and write each to `out` as it ends."""

        def finished(this: Pass) -> None:
            save_pass(out / PASSES / str(this.index), this)
            listener.on_pass(this)

        with originals_kept(self.subject.lm.model):
            outcome = refined(
                self.subject,
                self.watch,
                config,
                progress=listener.progress,
                finished=finished,
                done=self.done,
            )
        clock.add(outcome.seconds)
        return outcome


def begin(
    model: str,
    out: Path,
    config: RunConfig,
    clock: Stopwatch,
    files: Files = RUNS,
    *,
    overwrite: bool,
    resume: bool,
    force: bool,
    listener: Listener,
    check: Callable[[Subject], None] = lambda _subject: None,
) -> Begun:
    """Read the prompts, make `out` ready, load the model, and see that it shows the behaviour.

    `check` may refuse the model as soon as it is loaded. Raises children of `SaberError`; `WeakBehaviour`
    when the model hardly shows the behaviour and `force` is not set.
    """
    require_empty_thoughts(config)
    data = gather(config)
    judge = make_judge(config.evaluation.judge, config.judging, config.data.behaviour)
    judged_by = describe(config.evaluation.judge, judge)
    prepare_folder(out, model, overwrite=overwrite, resume=resume, files=files)
    with clock("load"), removed_if_empty(out):
        listener.on_stage(f"loading {model}")
        subject = Subject.load(model, config)
        for text in subject.lm.notes:
            listener.on_stage(f"note: {text}")
        check(subject)
    identity = {
        "model": subject.mark,
        # Of a revision the fingerprint tells: it may be named in more than one way.
        "config": resolved(replace(config, load=replace(config.load, revision=""))),
        "judge": judged_by,
        "prompts": describe_data(data),
        "template": subject.template,
        "version": __version__,
    }
    done = resume_state(out, identity, files) if resume else []
    artifacts.write_json(out / files.state, identity)

    with clock("check"):
        listener.on_stage("checking that the behaviour is there")
        watch = Watch(subject.lm, judge, data.selecting, config, listener.progress)
        for kind, count in watch.left_out.items():
            if count:
                listener.on_stage(
                    f"leaving out {count} of the {kind} prompts: the behaviour shows there too"
                )
        if watch.remark:
            listener.on_stage(f"note: {watch.remark}")
    if not force:
        try:
            watch.require(model, config.minimum_rate)
        except WeakBehaviour:
            if not done:
                abandon(out, files)
            raise
    return Begun(subject, data, judge, judged_by, watch, done)


@one_at_a_time
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

    def check(subject: Subject) -> None:
        # What cannot be edited is told at once.
        check_places(export, subject.lm, subject.edited(config))
        if origin is not None:
            origin.require(model, subject.mark)

    begun = begin(
        model,
        out,
        config,
        clock,
        overwrite=overwrite,
        resume=resume,
        force=force,
        listener=listener,
        check=check,
    )
    lm, mark, data, judge = begun.subject.lm, begun.subject.mark, begun.data, begun.judge
    with clock("evaluate"):
        listener.on_stage("measuring the untouched model")
        start = lm.work.tokens
        before, tokens = baseline(
            lm,
            mark,
            data.reporting,
            config.evaluation,
            judge,
            begun.judged_by,
            progress=listener.progress,
        )
        kept = lm.work.tokens == start
        if kept:
            listener.on_stage("taking the untouched model's measures from an earlier run")

    listener.on_stage("refining")
    outcome = begun.refined(out, config, clock, listener)
    if in_vain := _in_vain(outcome, begun.watch, config):
        abandon(out)
        raise in_vain
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
    shown = {"untouched": summarise(before), "edited": summarise(after)}
    for which, measured in shown.items():
        if name := not_finite(measured):
            raise NonFinite(f"the {which} model's {name}")
    record = {
        "schema": artifacts.SCHEMA,
        "saber_version": __version__,
        "command": command,
        "model": {
            **describe_model(lm, mark),
            **licence(lm.name, lm.source, config.load.revision),
            **way_back(out, lm.name, lm.source),
        },
        "environment": environment(started),
        "config": resolved(config),
        "judge": begun.judged_by,
        "prompts": describe_data(data, begun.watch.left_out),
        "seconds": {},
        "work": {},
        "baseline": shown["untouched"],
        "edited": shown["edited"],
        "comparison": compare(before, after, seed=config.seed),
        **describe_passes(lm, outcome, config),
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
    write_answers(out, answers(before, after))
    artifacts.write_json(out / RUN, record)
    (out / STATE).unlink(missing_ok=True)
    listener.on_record(out)
    if export:
        listener.on_stage("saving the edit")
    made, start_of_exports = Run(record, outcome.plan, sketch, out), perf_counter()
    for one in export_all(made, export, out, lm=lm, spec=config.load, progress=listener.progress):
        took = perf_counter() - start_of_exports
        record["seconds"] = {**clock.seconds, "save": took, "total": total + took}
        with alone(out):
            record["exports"] = exports_with(out, one)
            artifacts.write_json(out / RUN, record)
    return RunResult(out, record)


def _in_vain(outcome: Refinement, watch: Watch, config: RunConfig) -> NoEdit | NoGain | None:
    """Return what to say where the behaviour is there as it was."""
    count = len(watch.selecting.target_validation)
    if not outcome.passes:
        before = watch.untouched.rate
        there = before > config.refine.stop_rate
        return NoEdit(outcome.stop_reason, before, count) if there else None
    first, last = outcome.passes[0].rate_before, outcome.passes[-1].rate_after
    if not 0 < first <= last:
        return None
    return NoGain(first, last, count, config.edit.kind == "selective")
