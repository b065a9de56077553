"""Plot of a comparison of two checkpoints: how much, of what rank, by which law, along what."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter

from saber.report import style

COLOURS = {
    "attention out": style.BLUE,
    "mlp down": style.ORANGE,
    "expert down": style.VERMILLION,
    "mixer out": style.PURPLE,
    "embedding": style.GREEN,
}
"""The colour of each kind of residual writer; other matrices are grey."""
SPECTRA = 60
"""Most spectra that are drawn; of more, an even choice."""


def difference(found: Mapping[str, Any]) -> Figure:
    """Relative change and explained share by layer, spectra over the rounding floor, and overlaps."""
    matrices = [c for c in found["changes"] if c["values"]]
    verdict = found["verdict"]
    if not matrices:
        return style.blank(f"{_title(verdict)}: there is no spectrum to draw.")
    shared = found["shared_directions"]
    drawn = style.figure(6.2)
    grid = drawn.add_gridspec(2, 2)
    _sizes(drawn.add_subplot(grid[0, 0]), matrices)
    _spectra(drawn.add_subplot(grid[0, 1]), matrices)
    _laws(drawn.add_subplot(grid[1, 0]), matrices)
    _overlaps(drawn, drawn.add_subplot(grid[1, 1]), shared)
    said = (
        f"{Path(found['base']).name} to {Path(found['edited']).name}, {len(matrices)} changed matrices: "
        "their size, spectrum, share that an ablation explains, and overlap of output directions"
    )
    style.headed(drawn, _title(verdict), said)
    return drawn


_TITLES = {
    "identical": "Nothing changed",
    "rounding": "The same weights, up to rounding",
    "vectors": "Only vectors changed",
    "directional_ablation": "A directional ablation of rank {rank}, strength {strength:.2f}",
    "directional_amplification": "An amplification of rank {rank}, strength {strength:.2f}",
    "low_rank_writers": "A low-rank edit (rank {rank}) of writers with shared output directions",
    "low_rank": "A low-rank update (rank {rank}), as a merged LoRA leaves it",
    "full_rank": "A change of high rank: fine-tune, merge or quantisation",
    "not_measured": "Quantised weights changed; not measured",
}


def _title(verdict: Mapping[str, Any]) -> str:
    strength = verdict["strength"]
    known = {"rank": verdict["rank"], "strength": 0.0 if strength is None else abs(strength)}
    return _TITLES[verdict["name"]].format(**known)


def _powers(axes: Axes) -> None:
    """Put a log scale on the y axis, with plain numbers for ticks: math text is off."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _colour(change: Mapping[str, Any]) -> str:
    return COLOURS.get(change["kind"], style.GREY)


def _layer(change: Mapping[str, Any]) -> int:
    return -1 if change["layer"] is None else int(change["layer"])


def _dots(axes: Axes, matrices: list[Mapping[str, Any]], values: list[float]) -> None:
    axes.scatter(
        [_layer(c) for c in matrices],
        values,
        s=16,
        c=[_colour(c) for c in matrices],
        alpha=0.85,
        linewidths=0,
    )
    axes.grid(True, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlabel("layer (-1: outside of the layers)" if _outside(matrices) else "layer")


def _outside(matrices: list[Mapping[str, Any]]) -> bool:
    return any(c["layer"] is None for c in matrices)


def _legend(axes: Axes, matrices: list[Mapping[str, Any]]) -> None:
    present = [kind for kind in COLOURS if any(c["kind"] == kind for c in matrices)]
    others = any(c["kind"] not in COLOURS for c in matrices)
    shown = [(kind, COLOURS[kind]) for kind in present] + [("other", style.GREY)] * others
    handles = [Line2D([], [], marker="o", ls="", ms=4.5, color=c, label=k) for k, c in shown]
    axes.legend(handles=handles, fontsize=8, loc="best", handletextpad=0.1)


def _sizes(axes: Axes, matrices: list[Mapping[str, Any]]) -> None:
    _dots(axes, matrices, [max(c["relative"] or 0.0, 1e-9) for c in matrices])
    _powers(axes)
    _legend(axes, matrices)
    axes.set_ylabel("change / weight, norms")
    axes.set_title("Size of the change")


def _spectra(axes: Axes, matrices: list[Mapping[str, Any]]) -> None:
    step = max(1, len(matrices) // SPECTRA)
    for c in matrices[::step]:
        if c["floor"] <= 0:
            continue
        ratios = np.maximum(np.array(c["values"]) / c["floor"], 1e-3)
        axes.plot(range(1, len(ratios) + 1), ratios, "-", lw=0.9, color=_colour(c), alpha=0.6)
    axes.axhline(1, color=style.INK, lw=1, ls=(0, (4, 3)))
    _powers(axes)
    axes.grid(True, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set(xlabel="singular value", ylabel="over the rounding floor")
    axes.set_title("Spectra; below 1 is rounding")


def _laws(axes: Axes, matrices: list[Mapping[str, Any]]) -> None:
    known = [c for c in matrices if c["law"] is not None]
    if not known:
        axes.set_title("No matrix as wide as the stream changed")
        style.bare(axes)
        axes.set_yticks([])
        return
    _dots(axes, known, [c["law"]["share"] for c in known])
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylabel("of the change")
    axes.set_title("Explained by U (UᵀW)")


def _overlaps(drawn: Figure, axes: Axes, shared: Mapping[str, Any]) -> None:
    groups, matrix = shared["groups"], shared["matrix"]
    if len(groups) < 2:
        axes.set_title("Fewer than two writers changed")
        style.bare(axes)
        axes.set_xticks([])
        axes.set_yticks([])
        return
    image = axes.imshow(np.array(matrix), vmin=0, vmax=1, cmap=style.SEQUENTIAL, aspect="auto")
    drawn.colorbar(image, ax=axes, shrink=0.9)
    layers = ["-" if g["layer"] is None else str(g["layer"]) for g in groups]
    first = [i for i, layer in enumerate(layers) if i == 0 or layer != layers[i - 1]]
    ticks = first[:: max(1, len(first) // 6)]
    axes.set_xticks(ticks, [layers[i] for i in ticks])
    axes.set_yticks(ticks, [layers[i] for i in ticks])
    axes.set(xlabel="layer of a writer", ylabel="layer of a writer")
    axes.set_title("Output directions in common")
