"""Where an exported artifact comes from, in a few strings that it carries in its own metadata."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from saber import __version__
from saber.ablation import EditPlan


def origin(record: Mapping[str, Any], plan: EditPlan) -> dict[str, str]:
    """Return what an artifact of a run in memory carries."""
    model = record.get("model") or {}
    return stated(
        record.get("config") or {},
        base=called(model),
        base_fingerprint=model.get("fingerprint"),
        plan_hash=plan_hash(plan),
        run_version=record.get("saber_version"),
    )


def called(model: Mapping[str, Any]) -> str | None:
    """Return what a run's model is called where it may be published: of a path the last part alone.

    `model` is what `run.json` says of it; None where that is nothing.
    """
    name = model.get("base") or model.get("name")
    return Path(name).name if name and Path(name).is_absolute() else name


def stated(config: Mapping[str, Any], **known: Any) -> dict[str, str]:
    """Return what is known, with configuration, its hash, seed and version, all of it as text."""
    text = json.dumps(config, sort_keys=True, allow_nan=False)
    found = {
        **known,
        "config_hash": f"sha256:{hashlib.sha256(text.encode()).hexdigest()}",
        "config": text,
        "seed": config.get("seed"),
        "version": __version__,
    }
    return {name: str(value) for name, value in found.items() if value is not None}


def plan_hash(plan: EditPlan) -> str:
    """Return a SHA-256 over the names, layouts and float32 values of a plan's factors."""
    return factors_hash(
        ([name, f.axis, f.weight, f.bias_name], (f.left, f.right, f.bias))
        for name, f in sorted(plan.factors.items())
    )


def factors_hash(factors: Iterable[tuple[list[Any], Iterable[Tensor | None]]]) -> str:
    """Return the SHA-256 of factors in order of their names: layout, and parts where there are any."""
    digest = hashlib.sha256()
    for layout, parts in factors:
        digest.update(json.dumps(layout).encode())
        for part in parts:
            if part is not None:
                digest.update(json.dumps(list(part.shape)).encode())
                digest.update(part.float().contiguous().numpy().data)
    return f"sha256:{digest.hexdigest()}"
