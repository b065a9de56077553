"""What apply and verify do with their arguments."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from saber.checkpoint.apply import Applied, ApplySpec, apply_to_files
from saber.checkpoint.parcel import inside
from saber.checkpoint.runs import RUN
from saber.checkpoint.verification import verify
from saber.cli import push
from saber.cli.console import console, note
from saber.errors import UsageError


@contextmanager
def _bytes(console: Console, label: str) -> Iterator[Callable[[int, int], None]]:
    """Give a function that draws how many bytes are done."""
    columns = (TextColumn(label), BarColumn(bar_width=24), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def apply_command(arguments: argparse.Namespace) -> int:
    """`saber apply`."""
    if arguments.workers < 0:
        raise UsageError("--workers must be at least 0 (0: one a core).")
    target = push.destination(arguments)
    spec = ApplySpec(
        arguments.workers,
        arguments.force,
        arguments.copy,
        arguments.allow_pickle,
        arguments.sync,
    )
    with _bytes(console(stderr=True, quiet=arguments.json), "writing") as watch:
        made = apply_to_files(arguments.run, arguments.model, arguments.out, spec, watch)
    if not arguments.json:
        _tell(made)
    row = {
        "folder": str(made.folder),
        "tensors": made.tensors,
        "resumed": made.resumed,
        "forced": made.forced,
        "seconds": made.seconds,
        "notes": list(made.notes),
        **dataclasses.asdict(made.record),
    }
    return push.finish(arguments, target, made.folder, row)


def _tell(made: Applied) -> None:
    out = console()
    size = sum(m.size for m in made.record.files.values())
    out.print(
        f"{made.tensors} tensors edited in {len(made.record.edited)} shards, "
        f"{len(made.record.files)} files, {size / 1e9:.2f} GB, {made.seconds:.1f} s"
        f"{f', {made.resumed} shards were there already' if made.resumed else ''}"
    )
    if made.record.rounding:
        worst = max(made.record.rounding.values())
        out.print(
            note(
                f"{len(made.record.rounding)} tensors are stored in 8 bits; storing them "
                f"lost up to {worst:.1%} of the edit's norm (by tensor in saber_provenance.json)"
            )
        )
    if made.record.skipped:
        out.print(
            note(
                "left behind, as they hold the unedited weights in another form: "
                + ", ".join(made.record.skipped[:5])
                + (" ..." if len(made.record.skipped) > 5 else "")
            )
        )
    for one in made.notes:
        out.print(note(one), soft_wrap=True)
    if made.forced:
        out.print(note("the plan was made from another model (--force)"))
    out.print(f"model: {made.folder}", soft_wrap=True)


def verify_command(arguments: argparse.Namespace) -> int:
    """`saber verify`: a run folder is the edited model in it, held against the run."""
    path, run = arguments.path, arguments.run
    if (path / RUN).is_file():
        path, run = inside(path), run or path
    with _bytes(console(stderr=True, quiet=arguments.json), "reading") as watch:
        found = verify(path, run, arguments.base or "", watch)
    if arguments.json:
        checks = [dataclasses.asdict(check) for check in found.checks]
        row = {"passed": found.passed, "origin": dict(found.origin), "checks": checks}
        print(json.dumps({**row, "unchecked": list(found.unchecked)}))
        return 0 if found.passed else 1
    out = console()
    for check in found.checks:
        state = ("holds", "green") if check.passed else ("FAILS", "red")
        detail = f": {check.detail}" if check.detail else ""
        out.print(Text.assemble(state, f"  {check.what}{detail}"), soft_wrap=True)
    for line in found.unchecked:
        out.print(Text.assemble(("not checked", "yellow"), f": {line}"), soft_wrap=True)
    return 0 if found.passed else 1
