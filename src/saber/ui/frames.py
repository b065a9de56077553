"""Numbers of a run or a sweep as data frames, one row a point of a plot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from saber.report import reading
from saber.report.reading import Run, dig, known
from saber.report.sweep_card import columns

SEPARABILITY, LEFT, COST = "d′", "left, %", "KL per token"
"""Axes of the plots."""
SIDES = ("before", "after")


def directions(run: Run) -> pd.DataFrame:
    """Every candidate direction of every pass: what was measured of it, and whether it was ablated."""
    rows = []
    for i, one in enumerate(reading.passes(run), 1):
        taken = one.get("directions") or []
        for found in one.get("candidates") or taken:
            rows.append(
                {
                    "pass": int(one.get("index", i)),
                    "layer": int(found["layer"]),
                    "component": str(found.get("component", "")),
                    "ablated": any(_same(found, other) for other in taken),
                    SEPARABILITY: known(found.get("d_prime")),
                    "AUROC": known(found.get("auroc")),
                    "q": known(found.get("q_value")),
                    "causal, nats": known(found.get("causal")),
                    "purity": known(found.get("purity")),
                    "worst entanglement": known(found.get("worst_entanglement")),
                    "with": reading.plain(str(found.get("worst_category") or "")),
                    "strength": known(found.get("strength")),
                    "status": str(found.get("status") or ""),
                }
            )
    return pd.DataFrame(rows)


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(one.get(key) == other.get(key) for key in ("layer", "component", "position"))


def answers(run: Run, rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Every held-out prompt with what it was answered before and after; `rows` are those of the run folder.

    A run without them has its few examples.
    """
    few = (
        {"set": kind, **one} for kind, some in (run.get("examples") or {}).items() for one in some
    )
    return pd.DataFrame(
        {
            "set": reading.plain(str(row["set"])),
            "category": reading.plain(str(row.get("category") or "")),
            "prompt": str(row["prompt"]),
            **{side: _verdict(row.get(side)) for side in SIDES},
            **{f"answer {side}": str(dig(row, side, "excerpt") or "") for side in SIDES},
        }
        for row in list(rows) or few
    )


def _verdict(side: Any) -> str:
    """What was said of an answer: the judge's label, or whether it solves the problem."""
    solved = dig(side, "correct")
    return str(dig(side, "label") or "") if solved is None else "solved" if solved else "not solved"


def settings(record: Mapping[str, Any]) -> pd.DataFrame:
    """The settings of a sweep that were measured: what each leaves of the behaviour, and what it costs."""
    lowered = reading.lowered(record)
    rows = []
    for row in record["trials"]:
        if row["state"] != "done":
            continue
        rate = known(dig(row, *lowered, "rate"))
        values = ", ".join(f"{k.rpartition('.')[2]} {v}" for k, v in row["values"].items())
        rows.append(
            {
                "setting": f"{row['number']}: {values}",
                "is": "best" if row["best"] else "front" if row["front"] else "behind it",
                LEFT: None if rate is None else 100 * rate,
                COST: known(dig(row, "kl", "sequence")),
                "incoherent, %": 100 * (known(dig(row, "incoherent", "rate")) or 0.0),
            }
        )
    return pd.DataFrame(rows)


def table_of_settings(record: Mapping[str, Any]) -> pd.DataFrame:
    """The table of a sweep's page, best setting first."""
    names, cells = columns(record)
    return pd.DataFrame(cells, columns=names)
