"""The picture of a run: the five stages as a flow, each with this run's own numbers."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Polygon

from saber.report import reading, style
from saber.report.pipeline_charts import CHARTS
from saber.report.reading import PRIME, Run, dig, fixed, known, number, percent

WIDTH, HEIGHT = 9.0, 4.9
MARGIN, GAP = 0.16, 0.20
CARD = (WIDTH - 2 * MARGIN - 4 * GAP) / 5
CARD_LOW, CARD_HIGH = 1.80, 3.98
COLOURS = (style.BLUE, style.GREEN, style.ORANGE, style.VERMILLION, style.PURPLE)
NAMES = ("Probe", "Spectral", "Entanglement", "Ablate", "Refine")


@dataclass(frozen=True)
class _Stage:
    lines: tuple[str, str]
    """What the stage did, two short lines."""
    caption: str
    """What the little chart shows."""


def pipeline(run: Run) -> Figure:
    """Draw probe, spectral, entanglement, ablate and refine, and below them before -> after."""
    drawn = style.figure(HEIGHT, WIDTH, arranged=False)
    canvas = drawn.add_axes((0, 0, 1, 1))
    canvas.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    canvas.axis("off")
    _heading(canvas, run)
    stages = _stages(run)
    for i, (stage, chart) in enumerate(zip(stages, CHARTS, strict=True)):
        left = MARGIN + i * (CARD + GAP)
        _card(canvas, left, NAMES[i], i, stage)
        inset = drawn.add_axes(
            (
                (left + 0.14) / WIDTH,
                (CARD_LOW + 0.98) / HEIGHT,
                (CARD - 0.28) / WIDTH,
                0.70 / HEIGHT,
            )
        )
        inset.patch.set_alpha(0)
        style.bare(inset)
        inset.set(xticks=[], yticks=[])
        chart(inset, run, COLOURS[i])
        if i < 4:
            x, y = left + CARD + GAP / 2, (CARD_LOW + CARD_HIGH) / 2
            canvas.add_patch(
                Polygon(
                    [(x - 0.05, y + 0.11), (x + 0.06, y), (x - 0.05, y - 0.11)],
                    closed=True,
                    color="#A9B0BA",
                    lw=0,
                )
            )
    _loop(canvas, run)
    _outcome(canvas, run)
    return drawn


def _heading(canvas: Axes, run: Run) -> None:
    model = run.get("model") or {}
    title, room = f"SABER on {reading.model_name(run)}", WIDTH - 2 * MARGIN
    _fitted(canvas, MARGIN, HEIGHT - 0.25, title, 16, room, weight="bold")
    parts = [
        f"{reading.amount(model.get('parameters'))} parameters",
        reading.count(model.get("layers"), "layer"),
        f"d = {number(model.get('d_model'))}",
        str(dig(run, "config", "edit", "kind") or "") + " edit",
        str(model.get("device") or ""),
        f"{reading.duration(dig(run, 'seconds', 'total'))}" if dig(run, "seconds", "total") else "",
    ]
    text = "  ·  ".join(p for p in parts if p.strip(" edit") and reading.MISSING not in p)
    _fitted(canvas, MARGIN, HEIGHT - 0.53, text, 11, room, color=style.MUTED)


def _stages(run: Run) -> list[_Stage]:
    first = reading.candidates(run, first_pass_only=True)
    layers = run.get("candidate_layers") or sorted({d["layer"] for d in first})
    kind = reading.fitted(run)
    target, neutral = (dig(run, "prompts", k, "fit") for k in (kind, "neutral"))
    held = dig(run, "prompts", kind, "heldout")
    best = max(first, key=lambda d: d["d_prime"], default=None)
    worst, purity = reading.worst(run), reading.median_purity(run)
    strengths = [d["strength"] for _, d in reading.ablated(run) if known(d.get("strength"))]
    alpha = dig(run, "config", "edit", "alpha")
    strength = (
        f"α = {number(alpha)}"
        if known(alpha)
        else (f"strength {number(median(strengths))}" if strengths else "")
    )
    passes = reading.passes(run)
    odds = (
        f"{fixed(passes[0].get('log_odds_before'), 1)} → "
        f"{fixed(passes[-1].get('log_odds_after'), 1)} nats"
        if passes
        else "one look, no edit"
    )
    return [
        _Stage((f"{number(target)} + {number(neutral)} prompts", f"{number(held)} held out"),
               "fit, select, held out"),
        _Stage((f"{reading.count(len(first), 'candidate')}" if first else f"{len(layers)} layers",
                f"best d{PRIME} {best['d_prime']:.1f} (layer {best['layer']})" if best
                else "no candidates"), f"best d{PRIME} by layer"),
        _Stage(("not scored" if purity is None else f"median purity {purity:.2f}",
                f"worst {worst['worst_entanglement']:.2f} "
                f"({reading.short(str(worst.get('worst_category') or ''))})" if worst else "–"),
               f"mean {reading.entanglement_name(run)}"),
        _Stage((reading.count(run.get("directions_ablated", 0), "direction"),
                f"{reading.count(run.get('layers_edited', 0), 'layer')}, {strength}"
               if run.get("directions_ablated") else "nothing edited"),
               "directions by layer"),
        _Stage((reading.count(len(passes), "pass", "passes"), odds),
               reading.worded(run, "refusal log-odds", "log-odds")),
    ]  # fmt: skip


def _card(canvas: Axes, left: float | int, name: str, index: int, stage: _Stage) -> None:
    colour = COLOURS[index]
    canvas.add_patch(
        FancyBboxPatch(
            (left + 0.06, CARD_LOW + 0.06), CARD - 0.12, CARD_HIGH - CARD_LOW - 0.12,
            boxstyle="round,pad=0.06,rounding_size=0.10", lw=1.1,
            facecolor=to_rgba(colour, 0.06), edgecolor=to_rgba(colour, 0.65),
        )
    )  # fmt: skip
    canvas.add_patch(
        Circle((left + 0.28, CARD_HIGH), 0.15, facecolor=colour, edgecolor="white", lw=2, zorder=3)
    )
    canvas.text(
        left + 0.28,
        CARD_HIGH - 0.008,
        str(index + 1),
        size=11,
        weight="bold",
        color="white",
        ha="center",
        va="center_baseline",
        zorder=4,
    )
    left, room = left + 0.13, CARD - 0.22
    _fitted(canvas, left, CARD_HIGH - 0.32, name, 12.5, room, weight="bold")
    _fitted(canvas, left, CARD_LOW + 0.78, stage.caption, 9.5, room, color=style.MUTED)
    _fitted(canvas, left, CARD_LOW + 0.45, stage.lines[0], 11, room, weight="bold")
    _fitted(canvas, left, CARD_LOW + 0.20, stage.lines[1], 10.5, room)


def _fitted(
    canvas: Axes,
    left: float | int,
    y: float | int,
    text: str,
    size: float | int,
    room: float | int,
    **look: Any,
) -> None:
    """Write a line, in smaller type where it would be wider than `room` inches."""
    drawn = canvas.text(left, y, text, size=size, va="center_baseline", **look)
    width = drawn.get_window_extent().width / style.DPI
    drawn.set_fontsize(size * min(1.0, room / max(width, 1e-9)))


def _loop(canvas: Axes, run: Run) -> None:
    n = len(reading.passes(run))
    if n < 2:
        return
    start, end = MARGIN + 4.5 * CARD + 4 * GAP, MARGIN + 0.5 * CARD
    level = CARD_LOW - 0.22
    canvas.plot(
        [start, start, end, end],
        [CARD_LOW - 0.03, level, level, CARD_LOW - 0.10],
        color="#A9B0BA",
        lw=1.6,
        solid_joinstyle="round",
    )
    canvas.add_patch(
        FancyArrowPatch(
            (end, level),
            (end, CARD_LOW - 0.01),
            arrowstyle="-|>",
            mutation_scale=12,
            color="#A9B0BA",
            lw=0,
        )
    )
    again = f"{reading.count(n, 'pass', 'passes')}: each probes the edited model again"
    canvas.text(
        (start + end) / 2,
        level,
        again,
        size=10.5,
        color=style.MUTED,
        ha="center",
        va="center_baseline",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 4},
    )


def _outcome(canvas: Axes, run: Run) -> None:
    """The strip of results: what the edit was for, then what it cost."""
    canvas.add_patch(
        FancyBboxPatch(
            (MARGIN + 0.06, 0.20),
            WIDTH - 2 * MARGIN - 0.12,
            0.98,
            lw=0,
            boxstyle="round,pad=0.06,rounding_size=0.10",
            facecolor="#F2F4F7",
        )
    )
    path = reading.lowered(run)
    n = dig(run, "baseline", *path, "n")
    kl = dig(run, "edited", "kl", "sequence")
    beside = (reading.worded(run, "Over-refusal (neutral)", "Neutral"),
              reading.change(run, percent, "over_refusal", "neutral", "rate"))  # fmt: skip
    lead = reading.worded(run, "Refusals", "Target")
    if reading.narrow(run):
        lead = reading.worded(run, "False refusals", "Borderline")
        if run.get("edited") is not None:
            beside = (reading.worded(run, "Right refusals kept", "Kept where right"),
                      reading.right_kept(run))  # fmt: skip
    items = [
        (f"{lead} ({number(n)} held out)", reading.change(run, percent, *path, "rate")),
        beside,
        ("Perplexity (answers)", reading.change(run, number, "perplexity", "overall")),
        ("KL, nats per token", number(kl)) if known(kl) is not None
        else ("Accuracy", reading.change(run, percent, "accuracy", "overall")),
    ]  # fmt: skip
    cells = (0.0, 2.48, 4.56, 6.78)
    for i, (label, value) in enumerate(items):
        x = MARGIN + 0.24 + cells[i]
        canvas.text(x, 0.93, label, size=10.5, color=style.MUTED, va="center_baseline")
        room = (cells[i + 1] - 0.30 if i < 3 else WIDTH - 2 * MARGIN - 0.35) - cells[i]
        _fitted(
            canvas,
            x,
            0.49,
            value,
            20 if i == 0 else 17,
            room,
            weight="bold",
            color=style.VERMILLION if i == 0 else style.INK,
        )
        if i:
            canvas.plot([x - 0.17] * 2, [0.34, 1.05], color="#D3D8DF", lw=1)
