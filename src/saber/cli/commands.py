"""What run, eval, inspect and report do with their arguments."""

from __future__ import annotations

import argparse
import datetime
import json
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding

from saber import __version__, pipeline
from saber.artifacts import DAMAGED
from saber.checkpoint.export import check_formats, commands
from saber.cli import tables
from saber.cli.console import console, no_thoughts, note
from saber.cli.main import MEASURED_BY
from saber.cli.progress import listening
from saber.config import RunConfig, resolved
from saber.errors import DataError, ExportInterrupted, OutputError, UsageError
from saber.evaluation import harness
from saber.evaluation.divergence import own_head
from saber.evaluation.judging import describe, make_judge
from saber.evaluation.language import remark
from saber.evaluation.measure import compare, measure, summarise
from saber.gathering import gather
from saber.inspection import inspect
from saber.lm.device import keep_freed_memory
from saber.lm.load import LoadSpec, at_revision, load
from saber.lm.model import fingerprint
from saber.lm.thought import thinks
from saber.record import describe_reporting, environment
from saber.report import build, build_audit, build_sweep, is_audit, is_sweep, reading


def consoles(arguments: argparse.Namespace) -> tuple[Console, Console]:
    """Return the console for results and the one for progress (standard error)."""
    return console(), console(stderr=True, quiet=bool(arguments.json))


def run_command(
    arguments: argparse.Namespace, config: RunConfig, origin: pipeline.Origin | None = None
) -> int:
    """`saber run`; `origin` is the trial of a sweep that it builds."""
    exports = tuple(dict.fromkeys(name.strip() for name in arguments.export.split(",")))
    if "none" in exports and len(exports) > 1:
        raise UsageError("--export none goes alone.")
    exports = () if exports == ("none",) else exports
    check_formats(exports, arguments.model)
    arguments.out = arguments.out or Path("runs") / slug(arguments.model)
    out, progress = consoles(arguments)
    keep_freed_memory()
    with listening(progress) as listener:

        def report(folder: Path) -> None:
            listener.on_stage("drawing plots, report and model card")
            steps = [shlex.join(["saber", "report", str(folder)])]
            later = " && ".join([*steps, *commands(exports, folder, config.load)])
            try:
                build(folder)
            except OutputError as error:
                raise OutputError(
                    f"the run in {folder} is finished, but not its report: {error.problem}",
                    f"Go on with: {later}",
                ) from error
            except KeyboardInterrupt:
                raise ExportInterrupted(folder, None, later) from None

        result = pipeline.run(
            arguments.model,
            arguments.out,
            config,
            export=exports,
            overwrite=arguments.overwrite,
            resume=arguments.resume,
            force=arguments.force,
            command=shlex.join(["saber", *sys.argv[1:]]),
            listener=replace(listener, on_record=report),
            origin=origin,
        )
    if arguments.json:
        print(json.dumps(result.record))
        return 0
    record = result.record
    out.print(tables.directions_table(record))
    out.print(
        tables.results_table(
            record["baseline"],
            record["edited"],
            record["baseline"]["refusal"]["n"],
            config.data.behaviour,
            config.data.mode == "over-refusal",
        )
    )
    out.print(reading.finding(record))
    test = record["comparison"]["perplexity_ratio"]
    out.print(
        f"perplexity ratio {test['estimate']:.3f} ({test['low']:.3f}-{test['high']:.3f}), "
        f"{record['seconds']['total']:.0f} s, stopped: {record['stop_reason']}"
    )
    out.print(f"report: {result.folder / 'report.html'}\nmodel card: {result.folder / 'README.md'}")
    for made in record["exports"]:
        out.print(f"{made['format']}: {result.folder / made['path']}")
        for text in made["notes"]:
            out.print(Padding(note(text), (0, 0, 0, 2)))
    if "merged" in exports:
        out.print(f"talk to it: saber chat {result.folder} --compare")
    return 0


def eval_command(arguments: argparse.Namespace, config: RunConfig) -> int:
    """`saber eval`."""
    out, progress = consoles(arguments)
    keep_freed_memory()
    started = datetime.datetime.now(datetime.timezone.utc)
    data = gather(config).reporting
    judge = make_judge(config.evaluation.judge, config.judging, config.data.behaviour)
    marks, commits = dict[str, str](), dict[str, str]()
    with listening(progress) as listener:
        heads, told = list[Any](), list[str]()

        def measured(name: str, untouched: Any = None) -> Any:
            listener.on_stage(f"measuring {name}")
            lm = load(*_asked(name, arguments, config.load))
            if lm.thinking and not thinks(lm):
                errors = console(stderr=True) if arguments.json else progress
                errors.print(no_thoughts(name), soft_wrap=True)
            marks[name] = fingerprint(lm.model, dtype=lm.stored_dtype)
            for text in lm.notes:
                listener.on_stage(f"note: {text}")
            if lm.revision:
                commits[name] = lm.revision
            if arguments.base:
                heads.append(lm.head)
            found = measure(
                lm,
                data,
                config.evaluation,
                judge,
                untouched=untouched,
                head=own_head(*heads) if untouched else None,
                progress=listener.progress,
            )
            shown = found.target
            text = remark(judge, shown.prompts.texts, shown.texts, shown.labels)
            if text and text not in told:
                told.append(text)
                listener.on_stage(f"note: {text}")
            return found

        if not arguments.base:
            only = summarise(measured(arguments.model))
            record: dict[str, Any] = {"model": arguments.model, "measured": only}
            before, after = only, None
        else:
            base = measured(arguments.base)
            edited = measured(arguments.model, base)
            before, after = summarise(base), summarise(edited)
            record = {
                "base": arguments.base,
                "model": arguments.model,
                "baseline": before,
                "edited": after,
                "comparison": compare(base, edited, seed=config.seed),
            }
    settings = resolved(config)
    record |= {
        "judge": describe(config.evaluation.judge, judge),
        "fingerprints": marks,
        **({"revisions": commits} if commits else {}),
        "prompts": describe_reporting(data),
        "config": {name: settings[name] for name in MEASURED_BY},
        "saber_version": __version__,
        "environment": environment(started),
    }
    if arguments.json:
        print(json.dumps(record))
    else:
        name, narrow = config.data.behaviour, config.data.mode == "over-refusal"
        out.print(tables.results_table(before, after, before["refusal"]["n"], name, narrow))
    return 0


def tasks_command(arguments: argparse.Namespace, config: RunConfig) -> int:
    """`saber eval --lm-eval`: tasks of lm-eval on a model, or on an edited one and its base."""
    out, progress = consoles(arguments)
    names = harness.task_list(arguments.lm_eval)
    tasks = harness.load_tasks(names)
    models = {"base": arguments.base} if arguments.base else {}
    record: dict[str, Any] = {**models, "model": arguments.model}
    results = []
    with listening(progress) as listener:
        for name in (*models.values(), arguments.model):
            listener.on_stage(f"running {', '.join(names)} on {name}")
            lm = load(*_asked(name, arguments, config.load))
            for text in lm.notes:
                listener.on_stage(f"note: {text}")
            results.append(harness.run_tasks(lm, tasks, limit=config.data.limit))
    record["lm_eval"] = (
        dict(zip(("baseline", "edited"), results, strict=True)) if models else results[0]
    )
    if arguments.json:
        print(json.dumps(record))
    else:
        out.print(tables.tasks_table(results))
    return 0


def _asked(name: str, arguments: argparse.Namespace, spec: LoadSpec) -> tuple[str, LoadSpec]:
    """Return the name of what `saber eval` loads, and how: --revision is that of its model, not its base."""
    return (name, spec) if name == arguments.model else at_revision(name, spec)


def inspect_command(arguments: argparse.Namespace, config: RunConfig) -> int:
    """`saber inspect`."""
    out, _ = consoles(arguments)
    report = inspect(load(arguments.model, config.load, tokenizer=False))
    if arguments.json:
        print(json.dumps(report))
    else:
        out.print(tables.writers_table(report))
        laws, gib = report["laws"], {k: v / 2**30 for k, v in report["memory"].items()}
        out.print(
            f"{report['parameters']:,} parameters, stored in {report['stored_dtype']}, computed in "
            f"{report['compute_dtype']}"
        )
        out.print(
            f"memory: {gib['probe']:.2f} GiB to probe, {gib['edit']:.2f} GiB to edit; with --offload "
            f"{gib['offloaded']:.2f} GiB of the device"
        )
        out.print(
            f"second moments of a selective edit, in main memory: {gib['moments']:.2f} GiB at once, at least "
            f"{gib['moments_least']:.2f} GiB (edit.memory)"
        )
        out.print(
            f"writers in {report['coverage']['layers']} of {report['layers']} layers, "
            f"{report['coverage']['share']:.1%} of the layers' parameters"
        )
        out.print(
            f"laws: zeroed {laws['zeroed']:.1e}, ablated {laws['ablated']:.1e} -> "
            f"{'proved' if report['proved'] else 'NOT proved'}"
        )
        if report["reason"]:
            out.print(report["reason"])
        for text in report["notes"]:
            out.print(note(text))
    return 0 if report["proved"] else 1


def report_command(arguments: argparse.Namespace) -> int:
    """`saber report`."""
    try:
        made = _builder(arguments.run)(arguments.run)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DataError(
            f"the record in {arguments.run} is not as it was written ({type(error).__name__}: {error}).",
            DAMAGED,
        ) from error
    if arguments.json:
        print(
            json.dumps(
                {
                    "card": str(made.card),
                    "html": str(made.html) if made.html else None,
                    "plots": [str(p) for p in made.plots],
                }
            )
        )
    else:
        page = f"report: {made.html}\nmodel card: " if made.html else "page: "
        console().print(f"{page}{made.card}")
    return 0


def _builder(folder: Path) -> Any:
    return build_sweep if is_sweep(folder) else build_audit if is_audit(folder) else build


def slug(name: str) -> str:
    """Return a name for the folder of a model's runs."""
    return (
        re.sub(r"[^\w.-]+", "-", Path(name).name if Path(name).exists() else name).strip("-")
        or "model"
    )
