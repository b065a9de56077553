"""Plots of what was found and taken out: candidates, entanglement by layer, and the passes."""

from __future__ import annotations

from statistics import median

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, MaxNLocator

from saber.report import reading, style
from saber.report.reading import MINUS, PRIME, Run, count, dig, known, number, plain

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
    axes.scatter([d["purity"] for d in rest], [d["d_prime"] for d in rest], s=20, lw=0.9,
                 facecolors="none", edgecolors="#BFC5CD", zorder=2)
    layers = [d["layer"] for d in scored]
    norm = Normalize(min(layers) - 0.5, max(layers) + 0.5)
    handles = []
    for status, marker in APPLIED.items():
        some = sorted((d for d in used if d["status"] == status), key=_size, reverse=True)
        if not some:
            continue
        points = axes.scatter(
            [d["purity"] for d in some], [d["d_prime"] for d in some], s=[_size(d) for d in some],
            c=[d["layer"] for d in some], norm=norm, cmap=style.LAYERS, marker=marker, lw=0.8,
            edgecolors="white", zorder=3,
        )
        handles.append(Line2D([], [], ls="", marker=marker, ms=7, mfc=style.MUTED, mec="white",
                              label=f"{status} ({len(some)})"))
    if used:
        bar = drawn.colorbar(points, ax=axes, pad=0.02, aspect=26)
        bar.set_label("layer")
        bar.outline.set_visible(False)  # type: ignore[operator]
        bar.ax.tick_params(length=0)
        bar.ax.yaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))
    skipped = [d for d in scored if d.get("status") == "skipped"]
    if skipped:
        axes.scatter([d["purity"] for d in skipped], [d["d_prime"] for d in skipped], marker="x",
                     s=34, lw=1.6, color=style.VERMILLION, zorder=4)
        handles.append(Line2D([], [], ls="", marker="x", ms=6, mew=1.6, color=style.VERMILLION,
                              label=f"skipped, entangled ({len(skipped)})"))
    if rest:
        handles.append(Line2D([], [], ls="", marker="o", ms=5, mfc="none", mec="#A9B0BA",
                              label=f"not selected ({len(rest)})"))
    axes.set(xlabel="purity", ylabel=f"held-out separability d{PRIME}")
    axes.margins(0.05, 0.07)
    drawn.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)),
                 handletextpad=0.3, columnspacing=1.4)
    if used:
        title = (f"{len(used)} of {count(len(scored), 'candidate')} used: median purity "
                 f"{median(d['purity'] for d in used):.2f}, "
                 f"d{PRIME} {median(d['d_prime'] for d in used):.1f}")
    else:
        title = f"{count(len(scored), 'candidate')} scored, none used"
    style.headed(drawn, title, "Every direction scored, all passes; area grows with the strength "
                               "applied, colour is the layer")
    return drawn


def _size(direction: Run) -> float:
    return 24 + 70 * min(2.0, known(direction.get("strength")) or 0.0)


def entanglement_heatmap(run: Run) -> Figure:
    """Layer by capability category: the worst entanglement of the first pass's candidates."""
    scored = [d for d in reading.candidates(run, first_pass_only=True) if d.get("entanglement")]
    if not scored:
        return style.blank("Entanglement was not measured in this run.")
    names = list(scored[0]["entanglement"])
    layers = sorted({d["layer"] for d in scored})
    worst = np.array([[max((known(d["entanglement"].get(n)) or 0.0) for d in scored
                           if d["layer"] == layer) for layer in layers] for n in names])
    drawn = style.figure(1.75 + 0.34 * len(names))
    axes = drawn.add_subplot()
    image = axes.imshow(worst, cmap=style.SEQUENTIAL, aspect="auto", vmin=0.0,
                        vmax=max(worst.max(), 1e-6), interpolation="nearest")
    style.bare(axes)
    axes.set_xticks(np.arange(len(layers) - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(names) - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", lw=1.2)
    axes.tick_params(which="minor", length=0)
    axes.set_yticks(range(len(names)), [plain(n) for n in names])
    step = -(-len(layers) // 20)
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set_xlabel("layer")
    row, column = np.unravel_index(int(worst.argmax()), worst.shape)
    axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, ec=style.VERMILLION,
                             lw=2, zorder=5, clip_on=False))
    taken = {d["layer"] for _, d in reading.ablated(run)}
    marks = [i for i, layer in enumerate(layers) if layer in taken]
    axes.plot(marks, [-0.72] * len(marks), marker="v", ls="", ms=6, color=style.VERMILLION,
              clip_on=False)
    bar = drawn.colorbar(image, ax=axes, pad=0.015, aspect=14)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(length=0)
    bar.ax.yaxis.set_major_locator(MaxNLocator(5))
    style.headed(
        drawn,
        f"Entanglement is at worst {number(float(worst.max()))}: {plain(names[int(row)])}, "
        f"layer {layers[int(column)]}",
        "Worst overlap (0 to 1) of each layer's candidates in pass 1"
        + (f";  ▼ {count(len(marks), 'layer')} ablated" if marks else ""),
    )
    return drawn


def hydra(run: Run) -> Figure:
    """What each pass did to the refusal log-odds, and what the next one still found."""
    passes = reading.passes(run)
    if not passes:
        return style.blank("This run made no pass: nothing was ablated.")
    kept = [dig(p, "hydra", "compensation") for p in passes]
    lower = any(known(dig(c, "estimate")) is not None for c in kept)
    drawn = style.figure(4.0)
    grid = drawn.add_gridspec(2 if lower else 1, 2, width_ratios=(1.45, 1))
    _log_odds(drawn.add_subplot(grid[:, 0]), passes)
    _separability_left(drawn.add_subplot(grid[0, 1]), passes)
    if lower:
        _compensation(drawn.add_subplot(grid[1, 1]), kept)
    first, last = passes[0].get("log_odds_before"), passes[-1].get("log_odds_after")
    title = count(len(passes), "pass", "passes")
    if known(first) is not None and known(last) is not None:
        verb = "takes" if len(passes) == 1 else "take"
        title += f" {verb} the refusal log-odds from {_tenth(first)} to {_tenth(last)} nats"
    total = run.get("directions_ablated")
    said = f"{count(total, 'direction')} ablated in all" if total is not None else ""
    if run.get("stop_reason"):
        said += f"; stopped at: {plain(str(run['stop_reason']))}"
    if any(known(dig(p, "hydra", "dormant")) for p in passes) and len(passes) <= 8:
        said += "; +n: directions with no effect before that have one now"
    style.headed(drawn, title, said)
    return drawn


def _tenth(value: float | int) -> str:
    return f"{value:.1f}".replace("-", MINUS)


def _pass_axis(axes: Axes, n: int) -> None:
    axes.grid(True, axis="y")
    axes.set_xlim(0.5, n + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1) if n > 1
                                 else FixedLocator([1]))


def _log_odds(axes: Axes, passes: list[Run]) -> None:
    axes.axhline(0, color=style.MUTED, lw=1, ls=(0, (4, 3)), zorder=1)
    wide = len(passes) > 8
    for i, one in enumerate(passes, 1):
        if not _has(one, "log_odds_before", "log_odds_after"):
            continue
        before, after = one["log_odds_before"], one["log_odds_after"]
        axes.annotate("", (i, after), (i, before), arrowprops={
            "arrowstyle": "-|>", "color": style.BLUE, "lw": 2, "shrinkA": 3, "shrinkB": 2,
            "mutation_scale": 10})
        axes.plot([i], [before], "o", ms=6.5, mfc="white", mec=style.BEFORE, mew=1.6, zorder=3)
        axes.plot([i], [after], "o", ms=6.5, color=style.BLUE, zorder=4)
        if i < len(passes) and _has(passes[i], "log_odds_before"):
            axes.plot([i, i + 1], [after, passes[i]["log_odds_before"]], color=style.GREY, lw=1,
                      ls=(0, (2, 2)), zorder=1)
        label = f"{len(one.get('directions') or [])}" + ("" if wide else " dir.")
        axes.annotate(label, (i, max(before, after)), (0, 8), textcoords="offset points",
                      ha="center", size=9, color=style.MUTED)
    _pass_axis(axes, len(passes))
    axes.margins(y=0.14)
    axes.set(xlabel="pass", ylabel="refusal log-odds (nats, validation prompts)")
    axes.set_title("○ before, ● after each pass")


def _separability_left(axes: Axes, passes: list[Run]) -> None:
    found = [(i, p["hydra"]) for i, p in enumerate(passes, 1)
             if known(dig(p, "hydra", "top_d_prime")) is not None]
    axes.plot([i for i, _ in found], [h["top_d_prime"] for _, h in found], "o-", ms=5,
              color=style.GREEN, lw=1.6)
    for i, h in found:
        if known(h.get("dormant")) and len(passes) <= 8:
            axes.annotate(f"+{h['dormant']}", (i, h["top_d_prime"]), (0, 6), ha="center", size=9,
                          textcoords="offset points", color=style.VERMILLION)
    _pass_axis(axes, len(passes))
    axes.set_ylim(0, 1.3 * max([h["top_d_prime"] for _, h in found], default=1.0))
    woke = len(passes) <= 8 and any(known(h.get("dormant")) for _, h in found)
    axes.set_title(f"Best d{PRIME} left" + (" (+n woken)" if woke else ""))


def _compensation(axes: Axes, kept: list[Run | None]) -> None:
    axes.axhline(0, color=style.MUTED, lw=1, ls=(0, (4, 3)), zorder=1)
    for i, one in enumerate(kept, 1):
        value = known(dig(one, "estimate"))
        if value is None:
            continue
        low, high = known(dig(one, "low")), known(dig(one, "high"))
        if low is not None and high is not None:
            axes.plot([i, i], [low, high], color=style.PURPLE, lw=1.6, solid_capstyle="butt")
        axes.plot([i], [value], "o", ms=5.5, color=style.PURPLE)
    _pass_axis(axes, len(kept))
    axes.margins(y=0.15)
    axes.set(xlabel="pass")
    axes.set_title("Compensation κ")
