"""What `saber verify` finds: each thing that was checked, and what was not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from saber.errors import few


@dataclass(frozen=True)
class Check:
    """One thing that was checked."""

    what: str
    """In a few words."""
    passed: bool
    """Whether it holds."""
    detail: str = ""
    """What was found, where it does not."""


class Held(NamedTuple):
    """What came of holding an artifact against a base."""

    checks: tuple[Check, ...]
    """In the order in which they were made."""
    unchecked: tuple[str, ...] = ()
    """What this could not check, with what is missing for it."""


def none_of(what: str, names: Sequence[str], lead: str) -> Check:
    """Return a check that holds where no name is left; its detail tells the first few."""
    return Check(what, not names, f"{lead} {few(names)}" if names else "")
