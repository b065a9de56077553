"""`saber audit`: how fragile a behaviour is."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from saber.audit import audit
from saber.cli.commands import consoles, slug
from saber.cli.progress import listening
from saber.lm.device import keep_freed_memory
from saber.report.audit_page import build_audit, changes, findings, starts
from saber.report.tables import Table


def audit_command(arguments: argparse.Namespace, config: Any) -> int:
    """Audit a model, draw the plot, write the page, and show what was found."""
    arguments.out = arguments.out or Path("runs") / f"{slug(arguments.model)}-audit"
    out, progress = consoles(arguments)
    keep_freed_memory()
    with listening(progress) as listener:
        record = audit(
            arguments.model,
            arguments.out,
            config,
            overwrite=arguments.overwrite,
            resume=arguments.resume,
            force=arguments.force,
            command=arguments.line,
            listener=listener,
        )
        listener.on_stage("drawing the plot, writing the page")
        made = build_audit(arguments.out)
    if arguments.json:
        print(json.dumps(record))
        return 0
    out.print(_shown(changes(record, brief=True), "held-out prompts, 95% intervals"))
    if record["starts"]:
        out.print(_shown(starts(record), "behind the first tokens of the edited model's answer"))
    for sentence in findings(record):
        out.print(f"- {sentence}", highlight=False, markup=False)
    out.print(f"page: {made.card}\nplot: {made.plots[0]}", highlight=False, markup=False)
    return 0


def _shown(table: Table, title: str) -> Any:
    from rich.table import Table as Drawn

    drawn = Drawn(title=title)
    for index, name in enumerate(table.header):
        drawn.add_column(name, justify="right" if index else "left")
    for row in table.rows:
        drawn.add_row(*row)
    return drawn
