"""SABER: find, measure and edit the residual-stream directions that carry a behaviour."""

import importlib
from typing import Any

__version__ = "0.1.0"

_FACE = {
    "EditPlan": "saber.ablation",
    "LanguageModel": "saber.lm.model",
    "LoadSpec": "saber.lm.load",
    "RunConfig": "saber.config",
    "SaberError": "saber.errors",
    "applied": "saber.ablation",
    "find_writers": "saber.lm.writers",
    "generate": "saber.lm.generate",
    "inspect": "saber.inspection",
    "load": "saber.lm.load",
    "measure": "saber.evaluation.measure",
    "orthogonal": "saber.ablation",
    "override": "saber.config",
    "preset": "saber.config",
    "refine": "saber.refinement",
    "run": "saber.pipeline",
}

__all__ = sorted(["__version__", *_FACE])


def __getattr__(name: str) -> Any:
    """Import what is asked for, and only then: torch takes seconds to load."""
    if name not in _FACE:
        raise AttributeError(f"module 'saber' has no attribute {name!r}")
    return getattr(importlib.import_module(_FACE[name]), name)
