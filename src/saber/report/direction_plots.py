"""Plots of the candidates: which were used, and where they are entangled."""

from __future__ import annotations

from statistics import median

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from saber.report import reading, style
from saber.report.reading import PRIME, Run, count, fixed, known, number, plain

APPLIED = {"ablated": "o", "weakened": "D"}
"""The mark of each status that changed weights."""


def _has(direction: Run, *fields: str) -> bool:
    return all(known(direction.get(field)) is not None for field in fields)


def purity_separability(run: Run) -> Figure:
    """Purity against separability d' of every scored candidate, and which of them were used."""
    scored = [d for d in reading.candidates(run) if _has(d, "purity", "d_prime", "layer")]
    if not scored:
        return style.blank("No candidate directions were scored in this run.")
    used = [d for d in scored if d.get("status") in APPLIED]
    drawn = style.figure(4.3)
    axes = drawn.add_subplot()
    axes.grid(True)
    rest = [d for d in scored if d.get("status") not in (*APPLIED, "skipped")]
    axes.scatter(
        [d["purity"] for d in rest],
        [d["d_prime"] for d in rest],
        s=20,
        lw=0.9,
        facecolors="none",
        edgecolors="#BFC5CD",
        zorder=2,
    )
    layers = [d["layer"] for d in scored]
    norm = Normalize(min(layers) - 0.5, max(layers) + 0.5)
    handles = []
    for status, marker in APPLIED.items():
        some = sorted((d for d in used if d["status"] == status), key=_size, reverse=True)
        if not some:
            continue
        points = axes.scatter(
            [d["purity"] for d in some],
            [d["d_prime"] for d in some],
            s=[_size(d) for d in some],
            c=[d["layer"] for d in some],
            norm=norm,
            cmap=style.LAYERS,
            marker=marker,
            lw=0.8,
            edgecolors="white",
            zorder=3,
        )
        handles.append(
            Line2D(
                [],
                [],
                ls="",
                marker=marker,
                ms=7,
                mfc=style.MUTED,
                mec="white",
                label=f"{status} ({len(some)})",
            )
        )
    if used:
        bar = drawn.colorbar(points, ax=axes, pad=0.02, aspect=26)
        bar.set_label("layer")
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0)
        bar.ax.yaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))
    skipped = [d for d in scored if d.get("status") == "skipped"]
    if skipped:
        axes.scatter(
            [d["purity"] for d in skipped],
            [d["d_prime"] for d in skipped],
            marker="x",
            s=34,
            lw=1.6,
            color=style.VERMILLION,
            zorder=4,
        )
        handles.append(
            Line2D(
                [],
                [],
                ls="",
                marker="x",
                ms=6,
                mew=1.6,
                color=style.VERMILLION,
                label=f"skipped, entangled ({len(skipped)})",
            )
        )
    if rest:
        handles.append(
            Line2D(
                [],
                [],
                ls="",
                marker="o",
                ms=5,
                mfc="none",
                mec="#A9B0BA",
                label=f"not selected ({len(rest)})",
            )
        )
    axes.set(xlabel="purity", ylabel=f"held-out separability d{PRIME}")
    axes.margins(0.05, 0.07)
    drawn.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(4, len(handles)),
        handletextpad=0.3,
        columnspacing=1.4,
    )
    if used:
        title = (
            f"{len(used)} of {count(len(scored), 'candidate')} used: median purity "
            f"{fixed(reading.median_purity(run))}, "
            f"d{PRIME} {median(d['d_prime'] for d in used):.1f}"
        )
    else:
        title = f"{count(len(scored), 'candidate')} scored, none used"
    style.headed(
        drawn,
        title,
        "Every direction scored, all passes; area grows with the strength "
        "applied, colour is the layer",
    )
    return drawn


def _size(direction: Run) -> float:
    return 24 + 70 * min(2.0, known(direction.get("strength")) or 0.0)


def entanglement_heatmap(run: Run) -> Figure:
    """Layer by capability category: the worst entanglement of what was edited there, in any pass.

    Of a layer that was left alone it is the first pass's candidates.
    """
    scored = [d for d in reading.candidates(run, first_pass_only=True) if d.get("entanglement")]
    if not scored:
        return style.blank("Entanglement was not measured in this run.")
    edited = [d for _, d in reading.ablated(run) if d.get("entanglement")]
    taken = {d["layer"] for d in edited}
    scored = edited + [d for d in scored if d["layer"] not in taken]
    names = list(scored[0]["entanglement"])
    layers = sorted({d["layer"] for d in scored})
    worst = np.array(
        [
            [
                max((known(d["entanglement"].get(n)) or 0.0) for d in scored if d["layer"] == layer)
                for layer in layers
            ]
            for n in names
        ]
    )
    measure = reading.entanglement_name(run)
    drawn = style.figure(1.75 + 0.34 * len(names))
    axes = drawn.add_subplot()
    image = axes.imshow(
        worst,
        cmap=style.SEQUENTIAL,
        aspect="auto",
        vmin=0.0,
        vmax=max(worst.max(), 1e-6),
        interpolation="nearest",
    )
    style.bare(axes)
    axes.set_xticks(np.arange(len(layers) - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(names) - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", lw=1.2)
    axes.tick_params(which="minor", length=0)
    axes.set_yticks(range(len(names)), [plain(n) for n in names])
    step = -(-len(layers) // 20)
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set_xlabel("layer")
    marks = [i for i, layer in enumerate(layers) if layer in taken]
    # What was left alone has no say in what is called the worst.
    eligible = np.zeros_like(worst)
    eligible[:, marks or slice(None)] = 1
    row, column = np.unravel_index(int((worst * eligible).argmax()), worst.shape)
    axes.add_patch(
        Rectangle(
            (column - 0.5, row - 0.5),
            1,
            1,
            fill=False,
            ec=style.VERMILLION,
            lw=2,
            zorder=5,
            clip_on=False,
        )
    )
    axes.plot(
        marks, [-0.72] * len(marks), marker="v", ls="", ms=6, color=style.VERMILLION, clip_on=False
    )
    bar = drawn.colorbar(image, ax=axes, pad=0.015, aspect=14)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    bar.ax.yaxis.set_major_locator(MaxNLocator(5))
    style.headed(
        drawn,
        f"Entanglement {'of edits ' if marks else ''}is at worst "
        f"{number(float(worst[row, column]))}: {plain(names[int(row)])}, layer {layers[int(column)]}",
        f"{measure[:1].upper()}{measure[1:]} (0 to 1), the worst of each layer: "
        + (
            f"▼ {count(len(marks), 'layer')} edited, directions of all passes; "
            "of the others pass 1's candidates"
            if marks
            else "candidates of pass 1"
        ),
    )
    return drawn
