"""Plot of an audit: what is left of a behaviour by the size of a change, and behind given starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from saber.report import reading, style
from saber.report.reading import count, dig


def fragility(record: Mapping[str, Any]) -> Figure:
    """Rates with Wilson intervals against the relative size of the change, and by tokens given."""
    rungs = record["rungs"]
    starts = record.get("starts") or []
    drawn = style.figure(3.7)
    grid = drawn.add_gridspec(1, 2, width_ratios=(3, 2)) if starts else drawn.add_gridspec(1, 1)
    _changes(drawn.add_subplot(grid[0]), rungs, record)
    if starts:
        _starts(drawn.add_subplot(grid[1]), starts, record)
    n = dig(rungs[0], "refusal", "n")
    right = "; right: the untouched model behind the first tokens of the edited one's answers"
    style.headed(
        drawn,
        f"How fragile {reading.model_name(record)} is: "
        + reading.worded(record, "its refusals", "its behaviour ({})"),
        f"{count(n, 'held-out prompt')}, 95% Wilson intervals" + (right if starts else ""),
    )
    return drawn


def _changes(axes: Axes, rungs: Sequence[Mapping[str, Any]], record: Mapping[str, Any]) -> None:
    line = [r for r in rungs if r["kind"] in ("untouched", "edit")]
    marks = {
        "edit": (line, style.BLUE, "o", "the edit, share by share"),
        "random": ([r for r in rungs if r["kind"] == "random"], style.GREY, "s", "random directions"),
        "direction": (
            [r for r in rungs if r["kind"] == "direction"], style.ORANGE, "D", "one direction, everywhere",
        ),
    }  # fmt: skip
    for some, colour, marker, label in marks.values():
        if len(some) > (some is line):  # more than the untouched model alone
            _points(
                axes, [r["change"]["edited"] for r in some], [r["refusal"] for r in some],
                colour, marker, label, joined=some is line,
            )  # fmt: skip
    _rates(axes, reading.worded(record, "Refused", "{}"))
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.3g}%"))
    axes.set_xlabel("size of the change (norm, of the weights changed)")
    axes.set_title("By size of the change")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best", fontsize=8)


def _starts(axes: Axes, starts: Sequence[Mapping[str, Any]], record: Mapping[str, Any]) -> None:
    _points(
        axes, list(range(len(starts))), [s["shown"] for s in starts], style.VERMILLION, "o", "", joined=True,
    )  # fmt: skip
    _rates(axes, reading.worded(record, "Still refused", "Still {}"))
    axes.set_xticks(range(len(starts)), [str(s["tokens"]) for s in starts])
    axes.set_xlabel("tokens of an answer given")
    axes.set_title("By length of a given start")


def _points(
    axes: Axes, x: Sequence[float] | Sequence[int], rates: Sequence[Mapping[str, Any]], colour: str,
    marker: str, label: str, *, joined: bool,
) -> None:  # fmt: skip
    y = [p["rate"] for p in rates]
    errors = [
        [max(a - p["low"], 0.0) for a, p in zip(y, rates, strict=True)],
        [max(p["high"] - a, 0.0) for a, p in zip(y, rates, strict=True)],
    ]
    axes.errorbar(
        x, y, errors, color=colour, marker=marker, ms=5.5, lw=1.6, elinewidth=1.1, capsize=2.5,
        ls="-" if joined else "", label=label or None, clip_on=False, zorder=3,
    )  # fmt: skip


def _rates(axes: Axes, name: str) -> None:
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(True, axis="y")
    axes.set_ylabel(name)
