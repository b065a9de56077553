"""Consoles that print text as it is: a path or a name may hold what rich takes for markup."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text


def console(**options: Any) -> Console:
    """Return a console that reads neither markup nor names of emoji."""
    return Console(markup=False, emoji=False, **options)


def no_thoughts(name: str) -> Text:
    """Return the remark that a model is asked as ever, as it has no thoughts."""
    return note(
        f"nothing changes with --thinking: the chat template of {name} has no thoughts, and its answers "
        "open with none."
    )


def note(text: str) -> Text:
    """Return a remark behind a result."""
    return Text.assemble(("note", "yellow"), f": {text}")
