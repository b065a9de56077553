"""A judge by regular expressions: an answer in which one is found shows the behaviour."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from saber.errors import UsageError
from saber.evaluation.judge import Collapse, Label, behind_thought
from saber.paths import expanded


@dataclass(frozen=True)
class RegexJudge:
    """Labels `refusal` (the behaviour is shown), `incoherent` or `answer`; never `partial`."""

    patterns: tuple[re.Pattern[str], ...]
    """Any of them, anywhere in the answer behind its thoughts."""
    collapse: Collapse = field(default_factory=Collapse)
    """When an answer without a match counts as incoherent."""

    @classmethod
    def read(cls, source: str) -> RegexJudge:
        """Make the judge of one pattern, or of the lines of `@FILE` (blank ones and # left out)."""
        if not source:
            raise UsageError(
                "the judge 'regex' needs a pattern.", "Give --judge-pattern PATTERN or @FILE."
            )
        if not source.startswith("@"):
            return cls((_compiled(source, "--judge-pattern"),))
        path = expanded(source[1:])
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise UsageError(f"cannot read the patterns in {path}: {reason}.") from error
        found = tuple(
            _compiled(line, f"{path}, line {number}")
            for number, line in enumerate(lines, 1)
            if line.strip() and not line.startswith("#")
        )
        if not found:
            raise UsageError(f"{path} holds no patterns.", "Put one in each line.")
        return cls(found)

    def label(self, completion: str, *, prompt: str = "", surprise: float | None = None) -> Label:
        """Label a completion: a match first, then signs of collapse."""
        text = behind_thought(completion)
        if any(pattern.search(text) for pattern in self.patterns):
            return "refusal"
        return "incoherent" if self.collapse.found(text, surprise) else "answer"

    def settled(self, text_so_far: str) -> bool:
        """More text can undo a match (`\\bno\\b` in `now`), so nothing is settled before the end."""
        return False

    def described(self) -> dict[str, Any]:
        """Return the patterns."""
        return {"patterns": [pattern.pattern for pattern in self.patterns]}


def _compiled(pattern: str, where: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern, re.MULTILINE)
    except re.error as error:
        raise UsageError(
            f"{where}: {pattern!r} is not a regular expression: {error}.",
            "It is written as for Python's re module.",
        ) from error
    if compiled.search(""):
        raise UsageError(
            f"{where}: {pattern!r} is found in an empty answer, so every answer would show the "
            "behaviour.",
            "Ask for at least one character.",
        )
    return compiled
