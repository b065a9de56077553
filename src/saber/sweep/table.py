"""Trials as flat rows: for the table, the plots, and a parquet file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from saber.sweep.front import amiss
from saber.sweep.journal import Row


def row_of(row: Row, mode: str) -> dict[str, Any]:
    """Return a trial as it stands in `sweep.json`."""
    m = row.measured
    found: dict[str, Any] = {
        "number": row.number,
        "values": dict(row.values),
        "state": row.state,
        "error": row.error,
        "directions": row.directions,
        "layers": row.layers,
        "passes": row.passes,
        "stop_reason": row.stop_reason,
        "seconds": row.seconds,
        "tokens": row.tokens,
        "shared": row.shared,
        "nodes": list(row.nodes),
        "cheap": dict(row.cheap) if row.cheap else None,
    }
    for name in ("refusal", "incoherent", "over_refusal", "accuracy", "kl"):
        found[name] = m[name] if m else None
    found["perplexity"] = m["perplexity"]["overall"] if m else None
    found["perplexity_ratio"] = m.get("perplexity_ratio") if m else None
    found["amiss"] = asdict(amiss(m, mode)) if m else None
    found["lost"] = m.get("lost") if m else None
    return found


def flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of `sweep.json` as columns of plain values."""
    found: dict[str, Any] = {}
    for name in ("number", "state", "front", "best"):
        found[name] = row[name]
    found.update({f"set.{field}": value for field, value in row["values"].items()})
    for name in ("amiss", "refusal", "incoherent", "lost"):
        for part in ("rate", "low", "high", "successes", "n"):
            found[f"{name}_{part}"] = row[name][part] if row.get(name) else None
    found["perplexity"] = row["perplexity"]
    ratio = row["perplexity_ratio"] or {}
    found["perplexity_ratio"] = ratio.get("estimate")
    found.update({f"perplexity_ratio_{end}": ratio.get(end) for end in ("low", "high")})
    found["accuracy"] = row["accuracy"]["overall"] if row["accuracy"] else None
    for part in ("first_token", "sequence"):
        for end in ("", "_low", "_high"):
            found[f"kl_{part}{end}"] = row["kl"].get(part + end) if row["kl"] else None
    for name in ("layers", "directions", "passes", "tokens", "shared", "seconds", "error"):
        found[name] = row[name]
    return found


def as_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Write the rows as a parquet file where pyarrow is installed; return whether it was."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return False
    part = path.with_name(f".{path.name}.part")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([flat(row) for row in rows]), part)
    os.replace(part, path)
    return True
