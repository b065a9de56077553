"""Plots of a sweep: heat maps over two axes, and the front of what is left against what it cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

from saber.report import reading, style
from saber.report.reading import dig, fixed, known, percent

Rows = list[Mapping[str, Any]]
NAMES = {
    "refine.top_k": "Top-K",
    "edit.alpha": "Alpha",
    "edit.lambda": "Lambda",
    "refine.passes": "Passes",
}
"""What axes are called that the card has a name for."""


def axis_name(field: str) -> str:
    """What an axis is called in tables and plots."""
    return NAMES.get(field, field.rpartition(".")[2].replace("_", " "))


def applicable(record: Mapping[str, Any]) -> dict[str, Callable[[Mapping[str, Any]], Figure]]:
    """The plots that this sweep has numbers for."""
    found: dict[str, Callable[[Mapping[str, Any]], Figure]] = {}
    if _measured(record) and _axes(record):
        found["heatmap"] = heatmap
    if _measured(record):
        found["front"] = front
    return found


def _measured(record: Mapping[str, Any]) -> Rows:
    return [row for row in record["trials"] if row["state"] == "done"]


def _axes(record: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first two axes of a grid that have more than one value, columns last."""
    wide = [name for name, values in (record.get("axes") or {}).items() if len(values) > 1]
    return (wide[0], wide[1]) if len(wide) > 1 else None


def heatmap(record: Mapping[str, Any]) -> Figure:
    """What is left and what it cost over the first two axes; further ones at the chosen setting's value."""
    pair = _axes(record)
    rows = _measured(record)
    if pair is None or not rows:
        return style.blank("A heat map needs two axes with several values each.")
    best = next((r for r in rows if r["best"]), rows[0])
    others = {k: v for k, v in best["values"].items() if k not in pair}
    here = [r for r in rows if all(r["values"][k] == v for k, v in others.items())]
    before = dig(record, "baseline", "perplexity", "overall")
    name, path = reading.behaviour(record), reading.lowered(record)
    lead = (
        reading.lowered_name(record) if reading.narrow(record) else f"{name[:1].upper()}{name[1:]}"
    )
    panels: list[tuple[str, Callable[[Mapping[str, Any]], float | None], Callable[[Any], str]]] = [
        (lead, lambda r: dig(r, *path, "rate"), lambda v: percent(v, 0)),
        ("Incoherent", lambda r: r["incoherent"]["rate"], lambda v: percent(v, 0)),
        ("Perplexity change", lambda r: r["perplexity"] / before - 1, lambda v: f"{100 * v:+.1f}%"),
        ("KL, sequence", lambda r: r["kl"]["sequence"], lambda v: fixed(v, 3)),
    ]
    across, down = record["axes"][pair[1]], record["axes"][pair[0]]
    size = 0.75 + 0.36 * len(down)
    drawn = style.figure(0.75 + 2 * size + 0.3)
    grid = drawn.subplots(2, 2)
    for axes, (title, value, form) in zip(grid.flat, panels, strict=True):
        _cells(axes, here, pair, across, down, value, form)
        axes.set_title(title)
        axes.set_xlabel(axis_name(pair[1]))
        axes.set_ylabel(axis_name(pair[0]))
    fixed_at = ", ".join(f"{axis_name(k)} {v}" for k, v in others.items())
    said = (
        "Validation prompts; the frame is the chosen setting"
        if record["best"]
        else ("Validation prompts")
    )
    style.headed(
        drawn,
        f"{axis_name(pair[0])} and {axis_name(pair[1])} on {reading.model_name(record)}",
        said + (f"; {fixed_at}" if fixed_at else ""),
    )
    return drawn


def _cells(
    axes: Axes,
    rows: Rows,
    pair: tuple[str, str],
    across: list[Any],
    down: list[Any],
    value: Callable[[Mapping[str, Any]], float | None],
    form: Callable[[Any], str],
) -> None:
    table = [[float("nan")] * len(across) for _ in down]
    for row in rows:
        y, x = down.index(row["values"][pair[0]]), across.index(row["values"][pair[1]])
        table[y][x] = known(value(row)) if known(value(row)) is not None else float("nan")  # type: ignore[assignment]
        if row["best"]:
            axes.add_patch(
                Rectangle(
                    (x - 0.5, y - 0.5), 1, 1, fill=False, ec=style.VERMILLION, lw=2.2, zorder=4
                )
            )
    flat = [v for line in table for v in line if v == v]
    low, high = min(flat), max(flat)
    axes.imshow(table, cmap=style.SEQUENTIAL, aspect="auto", vmin=low, vmax=max(high, low + 1e-9))
    for y, line in enumerate(table):
        for x, v in enumerate(line):
            dark = v == v and v < low + 0.6 * (high - low)
            axes.text(
                x,
                y,
                form(v) if v == v else reading.MISSING,
                ha="center",
                va="center",
                size=9,
                color="white" if dark else style.INK,
            )
    axes.set_xticks(range(len(across)), [str(v) for v in across])
    axes.set_yticks(range(len(down)), [str(v) for v in down])
    style.bare(axes)


def front(record: Mapping[str, Any]) -> Figure:
    """What is left amiss, with its interval, against KL from the untouched model."""
    rows = _measured(record)
    drawn = style.figure(4.2)
    axes = drawn.add_subplot()
    axes.grid(True)
    on = sorted((r for r in rows if r["front"]), key=lambda r: r["kl"]["sequence"])
    off = [r for r in rows if not r["front"]]
    for some, colour, label in ((off, style.GREY, "beaten by another"), (on, style.BLUE, "front")):
        if some:
            _points(axes, some, colour, label)
    if len(on) > 1:
        axes.step(
            [r["kl"]["sequence"] for r in on],
            [r["amiss"]["rate"] for r in on],
            where="post",
            color=style.BLUE,
            lw=1.4,
            zorder=2,
        )
    best = record["best"]
    if best:
        held = best["amiss"]["heldout"]
        x = best["heldout"]["edited"]["kl"]["sequence"]
        axes.plot([x, x], [held["low"], held["high"]], color=style.VERMILLION, lw=1.6, zorder=5)
        axes.plot(
            [x],
            [held["rate"]],
            "D",
            ms=7.5,
            mfc="white",
            mec=style.VERMILLION,
            mew=1.7,
            zorder=6,
            label=f"setting {best['number']} on held-out prompts",
        )
    for row in on:
        axes.annotate(
            str(row["number"]),
            (row["kl"]["sequence"], row["amiss"]["rate"]),
            (5, 5),
            textcoords="offset points",
            size=8.5,
            color=style.BLUE,
        )
    axes.axhline(record["aim"], color=style.MUTED, lw=1, ls=(0, (4, 3)), zorder=1)
    if all(r["kl"]["sequence"] > 0 for r in rows):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylim(-0.02, None)
    axes.set(xlabel="KL from the untouched model, per token (nats)", ylabel="answers amiss")
    style.bare(axes, keep=("left", "bottom"))
    drawn.legend(loc="outside lower center", ncols=3)
    n = rows[0]["amiss"]["n"]
    style.headed(
        drawn,
        f"{len(on)} of {reading.count(len(rows), 'setting')} are not beaten by another",
        f"Each on {n} validation prompts, with 95% intervals; dashed: the aim",
    )
    return drawn


def _points(axes: Axes, rows: Rows, colour: str, label: str) -> None:
    for row in rows:
        x, y = row["kl"]["sequence"], row["amiss"]
        axes.plot([x, x], [y["low"], y["high"]], color=colour, lw=1.2, alpha=0.55, zorder=2)
        if "sequence_low" in row["kl"]:
            ends = [row["kl"]["sequence_low"], row["kl"]["sequence_high"]]
            axes.plot(ends, [y["rate"]] * 2, color=colour, lw=1.2, alpha=0.55, zorder=2)
    axes.plot(
        [r["kl"]["sequence"] for r in rows],
        [r["amiss"]["rate"] for r in rows],
        "o",
        ms=6,
        color=colour,
        zorder=3,
        label=label,
    )
