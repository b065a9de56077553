"""`saber export`: a run's edit in the formats people use."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from rich.table import Table

from saber.checkpoint.export import Exported, ExportSpec, check_formats, export, left_of
from saber.checkpoint.runs import RUN, Run, base_of, note_export
from saber.cli import push
from saber.cli.console import console, note
from saber.cli.progress import listening
from saber.config import RunConfig
from saber.errors import ExportInterrupted, SaberError, UsageError


def export_command(arguments: argparse.Namespace, config: RunConfig) -> int:
    """Write one format; print where it is and what to know of it."""
    check_formats([arguments.format])
    if arguments.type != "auto" and arguments.format != "gguf":
        raise UsageError(
            f"--type goes with --format gguf, not {arguments.format}.", "Leave it out."
        )
    target = push.destination(arguments)
    run = Run.load(arguments.run)
    spec = ExportSpec(
        base=arguments.base or _base(arguments, run),
        type=arguments.type,
        partial=arguments.partial,
        force=arguments.force,
        load=config.load,
    )
    try:
        with listening(console(stderr=True, quiet=arguments.json)) as listener:
            listener.on_stage(f"exporting as {arguments.format}")
            made = export(run, arguments.format, arguments.out, spec, progress=listener.progress)
    except KeyboardInterrupt:
        left = left_of(arguments.out)
        raise ExportInterrupted(arguments.run, left, arguments.line) from None
    made = _noted(made, arguments.run)
    if not arguments.json:
        _tell(made)
    return push.finish(arguments, target, made.path, as_json(made))


def _noted(made: Exported, folder: Path) -> Exported:
    """Add an export to the run's list; where that cannot be written the export is there all the same."""
    try:
        note_export(folder, made.row(folder))
    except SaberError as error:
        note = f"It is not noted in {RUN} of the run: {error.problem}"
        return dataclasses.replace(made, notes=(*made.notes, note))
    return made


def _base(arguments: argparse.Namespace, run: Run) -> str:
    """Return where the run's own model lies, if not where the run says or if it is no base of the format."""
    if arguments.format.startswith("gguf") and run.model.get("source") != "gguf":
        return ""
    found = base_of(arguments.run, run.model)
    return "" if found == run.model["name"] else found


def _tell(made: Exported) -> None:
    out = console()
    for text in made.notes:
        out.print(note(text))
    if made.tensors:
        out.print(_summary(made))
    out.print(
        f"{made.format}: {made.path} ({made.bytes / 2**20:.1f} MiB, {made.seconds:.1f} s)\ncard: {made.card}",
        highlight=False,
    )


def as_json(made: Exported) -> dict[str, object]:
    """Return what was written as plain data."""
    plain = dataclasses.asdict(dataclasses.replace(made, tensors=()))
    rows = [row._asdict() for row in made.tensors]
    return {**plain, "path": str(made.path), "card": str(made.card), "tensors": rows}


def _summary(made: Exported) -> Table:
    """What storing did to the edit, by type, with the worst tensor of each."""
    table = Table(title="changed tensors")
    for name in ("stored as", "tensors", "edit kept, least", "rounding / edit, most"):
        table.add_column(name, justify="left" if name == "stored as" else "right")
    for kind in sorted({(r.before, r.after) for r in made.tensors}):
        rows = [r for r in made.tensors if (r.before, r.after) == kind]
        table.add_row(
            kind[1] if kind[0] == kind[1] else f"{kind[1]} (was {kind[0]})",
            str(len(rows)),
            f"{min(r.kept for r in rows):.1%}",
            f"{max(r.error for r in rows):.3f}",
        )
    return table
