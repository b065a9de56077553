"""Progress bars on standard error, by stage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from saber.lm.device import give_back_memory
from saber.passes import Pass
from saber.pipeline import Listener


@contextmanager
def listening(console: Console) -> Iterator[Listener]:
    """Give a listener that draws stages, steps and finished passes on the console."""
    bars = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )

    def progress(steps: Iterable[Any], label: str, total: int) -> Iterator[Any]:
        task = bars.add_task(label, total=total)
        try:
            for step in steps:
                yield step
                bars.advance(task)
        finally:
            bars.remove_task(task)
            give_back_memory()

    def stage(text: str) -> None:
        bars.console.print(Text.assemble((">", "bold cyan"), f" {text}"))

    def finished(this: Pass) -> None:
        layers = sorted({c.direction.layer for c in this.ablated})
        bars.console.print(
            f"  pass {this.index}: {len(this.ablated)} directions in layers {_ranges(layers)}, "
            f"shown on validation targets {this.rate_before:.0%} -> {this.rate_after:.0%}, "
            f"log-odds {this.log_odds_before:+.2f} -> {this.log_odds_after:+.2f}"
        )
        if this.by_answers:
            bars.console.print(
                "  first tokens tell nothing here: each strength was told by answers"
            )

    with bars:
        yield Listener(progress=progress, on_stage=stage, on_pass=finished)


def _ranges(numbers: list[int]) -> str:
    """Write sorted numbers with runs shortened: 3-5, 9."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
