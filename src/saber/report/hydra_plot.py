"""Plot of the passes: what each did to refusal, and what grew back or was left to find."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from saber.report import reading, style
from saber.report.reading import PRIME, Run, count, dig, fixed, known, plain


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
        what = reading.behaviour(run)
        title += f" {verb} the {what} log-odds from {fixed(first, 1)} to {fixed(last, 1)} nats"
    total = run.get("directions_ablated")
    said = f"{count(total, 'direction')} ablated in all" if total is not None else ""
    if run.get("stop_reason"):
        said += f"; stopped at: {plain(str(run['stop_reason']))}"
    if any(known(dig(p, "hydra", "dormant")) for p in passes) and len(passes) <= 8:
        said += "; +n: separate over twice as well as in the untouched model"
    style.headed(drawn, title, said)
    return drawn


def _pass_axis(axes: Axes, n: int) -> None:
    axes.grid(True, axis="y")
    axes.set_xlim(0.5, n + 0.5)
    axes.xaxis.set_major_locator(
        MaxNLocator(8, integer=True, min_n_ticks=1) if n > 1 else FixedLocator([1])
    )


def _log_odds(axes: Axes, passes: list[Run]) -> None:
    axes.axhline(0, color=style.MUTED, lw=1, ls=(0, (4, 3)), zorder=1)
    wide = len(passes) > 8
    for i, one in enumerate(passes, 1):
        before, after = known(one.get("log_odds_before")), known(one.get("log_odds_after"))
        if before is None or after is None:
            continue
        axes.annotate(
            "",
            (i, after),
            (i, before),
            arrowprops={
                "arrowstyle": "-|>",
                "color": style.BLUE,
                "lw": 2,
                "shrinkA": 3,
                "shrinkB": 2,
                "mutation_scale": 10,
            },
        )
        axes.plot([i], [before], "o", ms=6.5, mfc="white", mec=style.BEFORE, mew=1.6, zorder=3)
        axes.plot([i], [after], "o", ms=6.5, color=style.BLUE, zorder=4)
        if i < len(passes) and known(passes[i].get("log_odds_before")) is not None:
            axes.plot(
                [i, i + 1],
                [after, passes[i]["log_odds_before"]],
                color=style.GREY,
                lw=1,
                ls=(0, (2, 2)),
                zorder=1,
            )
        label = f"{len(one.get('directions') or [])}" + ("" if wide else " dir.")
        axes.annotate(
            label,
            (i, max(before, after)),
            (0, 8),
            textcoords="offset points",
            ha="center",
            size=9,
            color=style.MUTED,
        )
    _pass_axis(axes, len(passes))
    axes.margins(y=0.14)
    axes.set(xlabel="pass", ylabel="log-odds (nats, validation)")
    axes.set_title("○ before, ● after each pass")


def _separability_left(axes: Axes, passes: list[Run]) -> None:
    found = [
        (i, p["hydra"])
        for i, p in enumerate(passes, 1)
        if known(dig(p, "hydra", "top_d_prime")) is not None
    ]
    axes.plot(
        [i for i, _ in found],
        [h["top_d_prime"] for _, h in found],
        "o-",
        ms=5,
        color=style.GREEN,
        lw=1.6,
    )
    for i, h in found:
        if known(h.get("dormant")) and len(passes) <= 8:
            axes.annotate(
                f"+{h['dormant']}",
                (i, h["top_d_prime"]),
                (0, 6),
                ha="center",
                size=9,
                textcoords="offset points",
                color=style.VERMILLION,
            )
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
