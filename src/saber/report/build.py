"""Turn a run folder into its report: plots/, report.html and README.md."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saber.artifacts import DAMAGED, read_json, write_text
from saber.errors import DataError
from saber.report import style
from saber.report.card import model_card
from saber.report.html import html_report
from saber.report.plots import PLOTS, applicable

SCHEMA = 1
"""The schema of run.json that this report reads."""

ANSWERS = "answers.jsonl"
"""The file of a run folder with every held-out prompt, the labels of its answers, and how they begin."""

Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]
"""Wraps an iterable of `total` steps, under a label, to show how far it is."""


@dataclass(frozen=True)
class Report:
    """The files that a report consists of."""

    plots: tuple[Path, ...]
    """Every plot, PNG and SVG, in the order of the report."""
    card: Path
    """README.md, the model card."""
    html: Path | None
    """report.html, the self-contained page; a sweep has none."""


def build(run_folder: Path, *, progress: Progress | None = None) -> Report:
    """Draw the plots of a finished run and write its page and card, each file whole or not at all.

    Reads run.json and nothing else; raises `DataError` where it is missing, broken or of another
    schema, `OutputError` where the folder cannot be written.
    """
    run = read_run(run_folder)
    folder = run_folder / "plots"
    names: Iterable[str] = applicable(run)
    if progress is not None:
        names = progress(names, "draw plots", len(applicable(run)))
    plots: list[Path] = []
    for name in names:
        with style.styled():
            drawn = PLOTS[name](run)
        plots.extend(style.save(drawn, folder, name))
    html, card = run_folder / "report.html", run_folder / "README.md"
    write_text(html, html_report(run, folder))
    write_text(card, model_card(run))
    return Report(tuple(plots), card, html)


def read_run(run_folder: Path) -> dict[str, Any]:
    """The content of a finished run's run.json; raises `DataError` with what to do about it."""
    path = run_folder / "run.json"
    if not path.is_file():
        raise DataError(
            f"{run_folder} holds no run.json, so it is no finished run.",
            "Give the folder that `saber run --out` wrote; if that run was cut off, finish it "
            "with --resume.",
        )
    run = read_json(path)
    if run.get("schema") != SCHEMA:
        raise DataError(
            f"{path} is of schema {run.get('schema')!r}, this report reads schema {SCHEMA}.",
            "Use the version of SABER that made the run, or make the run again.",
        )
    missing = [k for k in ("model", "baseline") if not isinstance(run.get(k), dict)]
    if missing:
        raise DataError(f"{path} lacks {' and '.join(repr(k) for k in missing)}.", DAMAGED)
    return run


def write_answers(run_folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write what every held-out prompt was answered, a JSON object a line."""
    text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    write_text(run_folder / ANSWERS, text)


def read_answers(run_folder: Path) -> list[dict[str, Any]]:
    """Read that again; nothing where the run is of before there was such a file.

    Raises `DataError` where it is damaged.
    """
    path = run_folder / ANSWERS
    if not path.is_file():
        return []
    try:
        # Other separators of lines may stand within a prompt.
        lines = path.read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line]
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}.", DAMAGED) from error
    if not all(isinstance(row, dict) and {"set", "prompt"} <= row.keys() for row in rows):
        raise DataError(f"{path} is no list of answers.", DAMAGED)
    return rows
