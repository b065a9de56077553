"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path


def expanded(path: str | Path) -> Path:
    """Return a path with a leading `~` written out; that of an unknown user stays, as in a shell."""
    return Path(os.path.expanduser(path))
