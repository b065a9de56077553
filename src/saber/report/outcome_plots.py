"""Plots of what changed for the user: refusals by prompt set, and capabilities by category."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    MaxNLocator,
    NullLocator,
    PercentFormatter,
)

from saber.report import reading, style
from saber.report.reading import Run, both, change, count, dig, fixed, known, number, percent, plain

BORDERLINE = ("borderline", ("over_refusal", "borderline"))
ROWS = (
    ("target prompts", ("refusal",)),
    ("seen categories", ("refusal_seen",)),
    ("unseen categories", ("refusal_unseen",)),
    BORDERLINE,
    ("neutral", ("over_refusal", "neutral")),
)
"""The rows of the plot of refusals: what they are called, and where their proportion is."""


def refusal_rates(run: Run) -> Figure:
    """Refusal rates with Wilson intervals, before and after, and how answers were labelled."""
    # What was to be lowered comes first.
    order = sorted(ROWS, key=lambda row: row is not BORDERLINE) if reading.narrow(run) else ROWS
    rows = [(name, both(run, *path)) for name, path in order]
    rows = [(name, pair) for name, pair in rows if dig(pair[0], "rate") is not None]
    if not rows:
        return style.blank("Refusals were not measured in this run.")
    bars = _label_rows(run)
    heights = (0.42 * len(rows) + 0.55, 0.30 * len(bars) + 0.75)
    drawn = style.figure(1.05 + heights[0] + (heights[1] if bars else 0))
    grid = drawn.add_gridspec(2 if bars else 1, 1, height_ratios=heights if bars else None)
    title = reading.worded(run, "Prompts refused", "Prompts answered with: {}")
    _intervals(drawn.add_subplot(grid[0]), rows, title)
    if bars:
        _stacked(drawn.add_subplot(grid[1]), bars, reading.behaviour(run))
    style.headed(
        drawn,
        reading.finding(run),
        "Rates with 95% Wilson intervals"
        + ("; ○ untouched model, ● edited model" if run.get("edited") else ""),
    )
    return drawn


def _intervals(axes: Axes, rows: list[tuple[str, tuple[Run, Run | None]]], title: str) -> None:
    axes.grid(True, axis="x")
    for y, (_, (before, after)) in enumerate(rows):
        lift = 0.0 if after is None else 0.17
        _interval(axes, y - lift, before, style.BEFORE, hollow=True)
        if after is not None:
            _interval(axes, y + lift, after, style.AFTER, hollow=False)
        text = percent(before["rate"]) + ("" if after is None else f" → {percent(after['rate'])}")
        axes.text(
            1.04,
            y,
            f"{text}  (n = {before.get('n', '–')})",
            va="center",
            size=9,
            transform=axes.get_yaxis_transform(),
            clip_on=False,
        )
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_xlim(-0.02, 1.02)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    style.bare(axes)
    axes.set_title(title)


def _interval(axes: Axes, y: float | int, value: Run, colour: str, hollow: bool) -> None:
    low, high = known(value.get("low")), known(value.get("high"))
    if low is not None and high is not None:
        axes.plot([low, high], [y, y], color=colour, lw=2, solid_capstyle="butt", zorder=2)
    axes.plot(
        [value["rate"]],
        [y],
        "o",
        ms=6.5,
        mfc="white" if hollow else colour,
        mec=colour,
        mew=1.7,
        zorder=3,
        clip_on=False,
    )


def _label_rows(run: Run) -> list[tuple[str, dict[str, int]]]:
    rows = []
    first = ("borderline", "target") if reading.narrow(run) else ("target", "borderline")
    for kind in (*first, "neutral"):
        before, after = both(run, "labels", kind)
        if before:
            rows.append((f"{kind}, before" if after else kind, dict(before)))
        if after:
            rows.append(("after", dict(after)))
    return rows


def _stacked(axes: Axes, bars: list[tuple[str, dict[str, int]]], behaviour: str) -> None:
    y, places = 0.0, []
    for i, (name, labels) in enumerate(bars):
        y += 0.0 if i == 0 else 0.95 if name == "after" else 1.3
        places.append(y)
        total, left = max(1, sum(labels.values())), 0.0
        for label, colour in style.LABELS.items():
            share = labels.get(label, 0) / total
            axes.barh(y, share, left=left, height=0.8, color=colour, edgecolor="white", lw=0.8)
            if share >= 0.045:
                axes.text(
                    left + share / 2,
                    y,
                    str(labels[label]),
                    ha="center",
                    size=9,
                    va="center_baseline",
                    weight="bold",
                    color=style.INK if label in ("partial", "incoherent") else "white",
                )
            left += share
    axes.set_yticks(places, [name for name, _ in bars])
    axes.set_ylim(places[-1] + 0.55, -0.55)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xticks([])
    style.bare(axes)
    axes.set_title("How the answers were labelled (numbers are prompts)")
    axes.legend(
        handles=[
            Patch(color=c, label=behaviour if name == "refusal" else name)
            for name, c in style.LABELS.items()
        ],
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        ncols=4,
        handlelength=1,
        handleheight=1,
        handletextpad=0.5,
        columnspacing=1.6,
        borderaxespad=0.3,
    )


def capability(run: Run) -> Figure:
    """Perplexity of the battery's reference answers and accuracy, per category and in all."""
    names = reading.categories(run, "perplexity", "by_category")
    names += [n for n in reading.categories(run, "accuracy", "by_category") if n not in names]
    if known(dig(run, "baseline", "perplexity", "overall")) is None:
        return style.blank("Capabilities were not measured in this run.")
    drawn = style.figure(1.55 + 0.36 * (len(names) + 1))
    left, right = drawn.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": (1.25, 1)})
    _pairs(left, run, "perplexity", names, number)
    _pairs(right, run, "accuracy", names, percent)
    left.set_yticks(range(len(names) + 1), ["all", *(plain(n) for n in names)])
    left.set_ylim(len(names) + 0.5, -0.5)
    left.get_yticklabels()[0].set_fontweight("bold")
    left.set_title("Perplexity of reference answers")
    right.set_title("Battery accuracy")
    for axes in (left, right):
        style.bare(axes)
        axes.axhline(0.5, color="#B5BAC2", lw=0.8)
    ratio = dig(run, "comparison", "perplexity_ratio")
    title = f"Perplexity {change(run, number, 'perplexity', 'overall')}"
    accuracy = change(run, percent, "accuracy", "overall")
    n = dig(run, "baseline", "accuracy", "n")
    title += f"; accuracy {accuracy}" + (f" on {count(n, 'item')}" if n is not None else "")
    said = "○ untouched model, ● edited model" if run.get("edited") else "Untouched model"
    if run.get("edited") and known(dig(ratio, "estimate")) is not None:
        said += (
            f"; perplexity ratio {ratio['estimate']:.3f} "
            f"[{fixed(dig(ratio, 'low'), 3)}, {fixed(dig(ratio, 'high'), 3)}]"
        )
    style.headed(drawn, title, said)
    return drawn


def _pairs(axes: Axes, run: Run, what: str, names: list[str], form: object) -> None:
    rows = [both(run, what, "overall")] + [both(run, what, "by_category", n) for n in names]
    values = [v for v in (known(x) for pair in rows for x in pair) if v is not None]
    spread = max(values, default=1.0) / max(min(values, default=1.0), 1e-9)
    axes.grid(True, axis="x")
    if what == "perplexity" and spread > 12:
        axes.set_xscale("log")
        decades = range(math.ceil(math.log10(min(values))), math.ceil(math.log10(max(values))) + 1)
        axes.xaxis.set_major_locator(FixedLocator([10.0**e for e in decades]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
        axes.set_xlim(min(values) / spread**0.06, max(values) * spread**0.8)  # room for the text
    else:
        top = max([*values, 0.1])
        axes.set_xlim(-0.04 * top, 1.85 * top)
        ticks = MaxNLocator(3).tick_values(0, top)
        axes.set_xticks([t for t in ticks if 0 <= t <= (1.0 if what == "accuracy" else 1.3 * top)])
    if what == "accuracy":
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for y, pair in enumerate(rows):
        before, after = known(pair[0]), known(pair[1])
        if before is None:
            continue
        if after is not None:
            axes.plot([before, after], [y, y], color=style.AFTER, lw=2, alpha=0.5, zorder=2)
        axes.plot([before], [y], "o", ms=7.5, mfc="white", mec=style.BEFORE, mew=1.6, zorder=3)
        if after is not None:
            axes.plot([after], [y], "o", ms=4.6, color=style.AFTER, zorder=4)
        text = form(before) + ("" if after is None else f" → {form(after)}")  # type: ignore[operator]
        axes.annotate(
            text,
            (max(before, after or before), y),
            (8, 0),
            va="center",
            size=9,
            textcoords="offset points",
            weight="bold" if y == 0 else "normal",
            bbox={"facecolor": style.PAPER, "edgecolor": "none", "pad": 0.8},
        )
