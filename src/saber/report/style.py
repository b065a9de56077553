"""One look for every plot: palette, type sizes, and files that do not change from run to run."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from saber.errors import OutputError

Plot = Callable[[Mapping[str, Any]], Figure]
"""A plot is a function from a finished run (the content of run.json) to a figure."""

WIDTH = 6.5
"""Width of a figure in a text column, inches."""
DPI = 200

# Okabe and Ito's palette: told apart under every common colour blindness, and in grey print.
BLACK, GREY = "#1A1A1A", "#999999"
ORANGE, SKY, GREEN = "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILLION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"

INK, MUTED, FAINT, PAPER = BLACK, "#5A6270", "#E4E7EB", "#FFFFFF"
BEFORE, AFTER = "#8A8F98", BLUE
LABELS = {"refusal": VERMILLION, "partial": ORANGE, "answer": GREEN, "incoherent": "#B5BAC2"}
"""The colour of each label that a judge gives."""
SEQUENTIAL, LAYERS = "cividis", "viridis"
"""Perceptually even colour maps: for magnitudes, and for depth."""

_RC: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 7,
    "axes.labelsize": 9.5,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": "#B5BAC2",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "xtick.color": "#B5BAC2",
    "ytick.color": "#B5BAC2",
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "text.color": INK,
    "text.parse_math": False,  # a "$" in a model's or category's name is a dollar sign
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "svg.fonttype": "path",
    "svg.hashsalt": "saber",
}


@contextmanager
def styled() -> Iterator[None]:
    """Matplotlib's defaults with SABER's settings on top, for as long as the block runs."""
    default = {k: v for k, v in matplotlib.rcParamsDefault.items() if "backend" not in k}
    settings: Any = {**default, **_RC}
    with matplotlib.rc_context(settings):
        yield


def figure(height: float | int, width: float | int = WIDTH, *, arranged: bool = True) -> Figure:
    """A blank figure in inches on the Agg canvas; pyplot and its global state stay untouched.

    `arranged` figures lay out their axes by themselves; in others each has a fixed place.
    """
    layout = "constrained" if arranged else "none"
    drawn = Figure(figsize=(width, height), dpi=DPI, layout=layout)  # type: ignore[arg-type]
    FigureCanvasAgg(drawn)
    return drawn


def wrap(text: str, size: float | int, width: float | int, em: float | int = 0.54) -> str:
    """Break `text` of `size` points, its letters `em` wide, into lines of `width` inches."""
    return textwrap.fill(text, max(8, int(width * 72 / (em * size))))


def headed(drawn: Figure, title: str, subtitle: str = "") -> None:
    """Put the finding, and below it what the marks are, above a figure with constrained layout."""
    width, height = drawn.get_size_inches()
    title, subtitle = wrap(title, 11.5, width - 0.2, 0.63), wrap(subtitle, 9, width - 0.2)
    top = 0.10
    drawn.text(
        0.1 / width, 1 - top / height, title, size=11.5, weight="bold", va="top", linespacing=1.2
    )
    top += 0.20 * (title.count("\n") + 1)
    if subtitle:
        top += 0.04
        drawn.text(
            0.1 / width, 1 - top / height, subtitle, size=9, color=MUTED, va="top", linespacing=1.25
        )
        top += 0.16 * (subtitle.count("\n") + 1)
    rest = 1 - (top + 0.10) / height
    drawn.set_layout_engine("constrained", rect=(0.008, 0.008, 0.984, rest))


def blank(message: str) -> Figure:
    """A figure that says why there is nothing to draw."""
    drawn = figure(1.6, arranged=False)
    drawn.text(0.5, 0.5, wrap(message, 10, WIDTH - 1), ha="center", va="center", color=MUTED)
    return drawn


def bare(axes: Axes, *, keep: tuple[str, ...] = ()) -> None:
    """Take the frame and tick marks off, except the named spines."""
    for side, spine in axes.spines.items():
        spine.set_visible(side in keep)
    axes.tick_params(length=0)


def save(drawn: Figure, folder: Path, name: str) -> tuple[Path, Path]:
    """Write `name`.png and `name`.svg into `folder`, each whole or not at all.

    The same figure gives the same bytes: no dates, and ids that depend on the content alone.
    """
    png, svg = folder / f"{name}.png", folder / f"{name}.svg"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with styled():
            _settle(drawn)
            _write(drawn, png, "png", {"Software": None})
            _write(drawn, svg, "svg", {"Date": None, "Creator": None})
    except OSError as error:
        raise OutputError(
            f"cannot write the plot {name!r} to {folder}: {error.strerror}.",
            "Free space or make the run folder writable.",
        ) from error
    return png, svg


def save_as(drawn: Figure, path: Path) -> None:
    """Write one file, of the kind that its suffix says (.png or .svg), whole or not at all."""
    kind = path.suffix.lower().removeprefix(".")
    absent: dict[str, Any] = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with styled():
            _settle(drawn)
            _write(drawn, path, kind, absent)
    except OSError as error:
        raise OutputError(f"cannot write the plot {path}: {error.strerror}.") from error


def _settle(drawn: Figure) -> None:
    """Fix the axes where the layout put them, rounded: its solver differs in the last digits."""
    if not isinstance(drawn.get_layout_engine(), ConstrainedLayoutEngine):
        return
    drawn.canvas.draw()
    drawn.set_layout_engine("none")
    for axes in drawn.axes:
        left, bottom, width, height = axes.get_position(original=True).bounds
        axes.set_position((round(left, 5), round(bottom, 5), round(width, 5), round(height, 5)))


def _write(drawn: Figure, path: Path, kind: str, metadata: dict[str, Any]) -> None:
    part = path.with_name(f".{path.name}.part")
    try:
        drawn.savefig(part, format=kind, dpi=DPI, metadata=metadata)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
