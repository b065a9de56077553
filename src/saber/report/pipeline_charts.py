"""The five small charts in the picture of a run, one for each stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.colors import to_rgba

from saber.report import reading
from saber.report.reading import Run, dig, known


def _splits(axes: Axes, run: Run, colour: str) -> None:
    for y, kind in ((1, reading.fitted(run)), (0, "neutral")):
        left = 0
        for part, alpha in (("fit", 1.0), ("validation", 0.6), ("heldout", 0.28)):
            size = dig(run, "prompts", kind, part) or 0
            axes.barh(
                y,
                size,
                left=left,
                height=0.62,
                color=to_rgba(colour, alpha),
                edgecolor="white",
                lw=0.8,
            )
            left += size
    axes.set_ylim(-0.5, 1.5)


def _separability(axes: Axes, run: Run, colour: str) -> None:
    best: dict[int, float] = {}
    for d in reading.candidates(run, first_pass_only=True):
        best[d["layer"]] = max(best.get(d["layer"], 0.0), d["d_prime"])
    if not best:
        return
    layers = sorted(best)
    heights = [best[layer] for layer in layers]
    axes.fill_between(layers, heights, color=colour, alpha=0.22, lw=0)
    axes.plot(
        layers,
        heights,
        color=colour,
        lw=1.8,
        solid_capstyle="round",
        marker="o" if len(layers) < 3 else "",
    )
    top = max(layers, key=lambda layer: best[layer])
    axes.plot([top], [best[top]], "o", color=colour, ms=6, mec="white", mew=1.2, clip_on=False)
    axes.set_ylim(0, 1.15 * max(heights))


def _overlap(axes: Axes, run: Run, colour: str) -> None:
    scored = [d["entanglement"] for d in reading.taken(run) if d.get("entanglement")]
    if not scored:
        return
    names = list(scored[0])
    means = [sum(s.get(n, 0.0) for s in scored) / len(scored) for n in names]
    axes.barh(range(len(names)), means, height=0.8, color=to_rgba(colour, 0.55), lw=0)
    for y, name in enumerate(names):
        axes.text(
            0.02,
            y,
            reading.short(name),
            size=7.5,
            va="center_baseline",
            transform=axes.get_yaxis_transform(),
        )
    axes.set(xlim=(0, 1.05 * max([*means, 1e-9])), ylim=(len(names) - 0.5, -0.5))


def _edited_layers(axes: Axes, run: Run, colour: str) -> None:
    total = dig(run, "model", "layers") or max([0, *(d["layer"] for _, d in reading.ablated(run))])
    per = Counter(d["layer"] for _, d in reading.ablated(run))
    axes.bar(range(total), [1] * total, width=0.72, color="#DDE1E6", lw=0)
    most = max(per.values(), default=1)
    heights = [0.25 + 0.75 * n / most for n in per.values()]
    axes.bar(list(per), heights, width=0.72, color=colour, lw=0)
    axes.set(xlim=(-0.8, max(total, 1) - 0.2), ylim=(0, 1.05))


def _odds(axes: Axes, run: Run, colour: str) -> None:
    path = [(p.get("log_odds_before"), p.get("log_odds_after")) for p in reading.passes(run)]
    xs: list[float] = []
    ys: list[float] = []
    for i, pair in enumerate(path):
        for x, value in zip((i, i + 0.8), map(known, pair), strict=True):
            if value is not None:
                xs.append(x)
                ys.append(value)
    if not ys:
        return
    axes.axhline(0, color="#A9B0BA", lw=1, ls=(0, (3, 2)))
    axes.plot(xs, ys, color=colour, lw=1.8, marker="o", ms=3.2, clip_on=False)
    axes.margins(x=0.05, y=0.12)


CHARTS: tuple[Callable[[Axes, Run, str], None], ...] = (
    _splits,
    _separability,
    _overlap,
    _edited_layers,
    _odds,
)
"""The chart of each stage, drawn into its axes in its colour."""
