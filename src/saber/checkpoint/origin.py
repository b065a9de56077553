"""Where an exported artifact comes from, in a few strings that it carries in its own metadata."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from saber import __version__
from saber.ablation import EditPlan


def origin(record: Mapping[str, Any], plan: EditPlan) -> dict[str, str]:
    """Return base model, its fingerprint, the plan's hash, configuration and its hash, versions, seed."""
    model, config = record.get("model") or {}, record.get("config") or {}
    text = json.dumps(config, sort_keys=True, allow_nan=False)
    found = {
        "base": model.get("base") or model.get("name"),
        "base_fingerprint": model.get("fingerprint"),
        "plan_hash": plan_hash(plan),
        "config_hash": f"sha256:{hashlib.sha256(text.encode()).hexdigest()}",
        "config": text,
        "seed": config.get("seed"),
        "version": __version__,
        "run_version": record.get("saber_version"),
    }
    return {name: str(value) for name, value in found.items() if value is not None}


def plan_hash(plan: EditPlan) -> str:
    """Return a SHA-256 over the names, layouts and float32 values of a plan's factors."""
    digest = hashlib.sha256()
    for name, factor in sorted(plan.factors.items()):
        digest.update(json.dumps([name, factor.axis, factor.weight, factor.bias_name]).encode())
        for part in (factor.left, factor.right, factor.bias):
            if part is not None:
                digest.update(json.dumps(list(part.shape)).encode())
                digest.update(part.float().contiguous().numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"
