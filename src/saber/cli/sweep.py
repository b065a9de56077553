"""What `saber sweep` and `saber run --from-sweep` do with their arguments."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from saber.checkpoint.plan_on_disk import cached_commit
from saber.cli.commands import consoles, run_command, slug
from saber.cli.console import note
from saber.cli.main import FLAGS, require_used
from saber.cli.progress import listening
from saber.config import RunConfig, override, preset
from saber.errors import DataError, UsageError
from saber.lm.device import keep_freed_memory
from saber.pipeline import Listener, Origin
from saber.report import build_sweep, read_sweep
from saber.report.sweep_card import columns, helps, shrinkage, vain
from saber.sweep.drive import Hearing, Plan, sweep
from saber.sweep.front import AIM
from saber.sweep.grid import changed
from saber.sweep.journal import TRIALS, Journal, Row, read_study

SHOWN = 30
"""Rows of the table that the terminal shows."""
SHORT = {"Dirs ablated": "Dirs", "Incoherent": "Incoh.", "Accuracy": "Acc."}
"""Names of columns with which the card's grid fits into 80 characters."""


def sweep_command(arguments: argparse.Namespace, config: RunConfig) -> int:
    """`saber sweep`."""
    axes = list(arguments.axis)
    for name, given in (
        ("refine.top_k", arguments.axis_top_k),
        ("edit.alpha", arguments.axis_alpha),
    ):
        if given is not None:
            axes.append(f"{name}={given}")
    given = [axis.partition("=") for axis in axes]
    require_used(
        config,
        axes={name.strip(): [v.strip() for v in values.split(",")] for name, _, values in given},
    )
    if not (arguments.trials >= 0 and arguments.minutes >= 0):  # what is no number is neither
        raise UsageError("--trials and --minutes must not be below 0.")
    if not arguments.trials and (arguments.also or arguments.storage):
        raise UsageError("--also and --storage are for a search.", "Give --trials N.")
    plan = Plan(
        axes=tuple(axes),
        trials=arguments.trials,
        minutes=arguments.minutes,
        workers=arguments.workers,
        aim=AIM if arguments.aim is None else arguments.aim,
        also=tuple(name for name in (arguments.also or "").split(",") if name),
        storage=arguments.storage,
        ray=arguments.ray_address or ("local" if arguments.ray else ""),
    )
    arguments.out = arguments.out or Path("runs") / f"{slug(arguments.model)}-sweep"
    out, progress = consoles(arguments)
    keep_freed_memory()
    with _hearing(progress) as listener:
        result = sweep(
            arguments.model,
            arguments.out,
            config,
            plan,
            overwrite=arguments.overwrite,
            resume=arguments.resume,
            force=arguments.force,
            command=shlex.join(["saber", *sys.argv[1:]]),
            listener=listener,
        )
        listener.on_stage("drawing the plots")
        made = build_sweep(result.folder)
    best = result.record["best"]
    if arguments.json:
        print(json.dumps(result.record))
    else:
        out.print(_table(result.record))
        if result.left:
            out.print(
                f"{result.left} settings are left. Go on with: saber sweep {arguments.model} "
                f"--out {result.folder} --resume (and the same options)"
            )
        if best:
            out.print(f"rule: {result.record['rule']}.")
            out.print(shrinkage(result.record))
            out.print(
                f"build it: saber run {arguments.model} --from-sweep {result.folder} "
                f"--trial {best['number']}"
                if helps(result.record)
                else note(vain(result.record))
            )
        out.print(f"table and plots: {made.card}")
    missed = arguments.aim is not None and best is not None and not best["reached"]
    return 3 if missed else 0


@contextmanager
def _hearing(console: Console) -> Iterator[Hearing]:
    with listening(console) as listener:

        def ended(row: Row, total: int) -> None:
            values = ", ".join(f"{k.rpartition('.')[2]} {v}" for k, v in row.values.items())
            said = row.error or row.state
            if row.measured is not None:
                said = (
                    f"shown {row.measured['refusal']['rate']:.0%}, "
                    f"incoherent {row.measured['incoherent']['rate']:.0%}, "
                    f"KL {row.measured['kl']['sequence']:.4f}"
                )
            listener.on_stage(f"setting {row.number} of {total} ({values}): {said}")

        kept = {f.name: getattr(listener, f.name) for f in fields(Listener)}
        yield Hearing(**{**kept, "on_pass": lambda _pass: None}, on_trial=ended)


def _table(record: dict[str, Any]) -> Table:
    rows = record["trials"]
    title = f"{len(rows)} settings, validation prompts, 95% intervals; * Pareto front"
    title += f" (first {SHOWN})" if len(rows) > SHOWN else ""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    names, cells = columns(record, intervals=False)
    for name in names:
        table.add_column(SHORT.get(name, name), justify="right", no_wrap=True)
    for line in cells[:SHOWN]:
        table.add_row(*line)
    return table


def build_trial(arguments: argparse.Namespace) -> int:
    """`saber run MODEL --from-sweep SWEEP --trial N`."""
    given = [f for f, path in FLAGS.items() if getattr(arguments, f, None) is not None]
    given = [f for f in given if not FLAGS[f].startswith("load.")]
    if given or arguments.set or arguments.config or arguments.preset:
        name = (
            f"--{given[0].rstrip('_').replace('_', '-')}" if given else "--set, --config, --preset"
        )
        raise UsageError(
            f"a trial is built with its own settings; {name} would change them.",
            "Leave it out, or make a run of its own.",
        )
    folder = arguments.from_sweep
    study, rows = read_study(folder), Journal(folder / TRIALS).rows
    number = arguments.trial
    if number is None:
        record = read_sweep(folder)
        best = record.get("best")
        if best and not helps(record) and not arguments.force:
            raise DataError(
                f"no trial of the sweep in {folder} leaves less amiss than the untouched model.",
                f"--force or --trial {best['number']} builds the best of them all the same.",
            )
        if not best:
            raise DataError(
                f"the sweep in {folder} has not chosen a trial yet.",
                "Finish it with --resume, or give --trial N.",
            )
        number = best["number"]
    row = next((r for r in rows if r.number == number), None)
    if row is None or row.state != "done":
        known = ", ".join(str(r.number) for r in rows if r.state == "done")
        fate = f"has failed ({row.error})" if row and row.error else "was not measured"
        raise DataError(f"trial {number} of {folder} {fate}.", f"Measured ones: {known or 'none'}.")
    base = override(preset(study["config"]["preset"]), study["config"])
    load = {path: getattr(arguments, f, None) for f, path in FLAGS.items() if "load." in path}
    load = {path: value for path, value in load.items() if value is not None}
    if commit := cached_commit(study, arguments.model):
        load.setdefault("load.revision", commit)
    config = changed(base, {**row.values, **load})
    if arguments.out is None:
        arguments.out = Path("runs") / f"{slug(arguments.model)}-trial-{number}"
    origin = Origin(folder.resolve().name, number, study["model"]["fingerprint"], row.plan)
    return run_command(arguments, config, origin)
