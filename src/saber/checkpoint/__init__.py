"""Edit plans to files."""

import importlib
from typing import Any

_FACE = {
    "ApplySpec": "saber.checkpoint.apply",
    "apply_to_files": "saber.checkpoint.apply",
    "save_merged": "saber.checkpoint.merged",
    "verify": "saber.checkpoint.verification",
}

__all__ = ["ApplySpec", "apply_to_files", "save_merged", "verify"]


def __getattr__(name: str) -> Any:
    """Import what is asked for, and only then: workers need no transformers."""
    if name not in _FACE:
        raise AttributeError(f"module 'saber.checkpoint' has no attribute {name!r}")
    module = importlib.import_module(_FACE[name])
    return getattr(module, name)
