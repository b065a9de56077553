"""Which prompts of two sets belong together, whatever was left out of either."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import NamedTuple

Pair = str | int
"""What a prompt shares with its twin alone: both ids, or its number where no twin is named."""


class Numbers(NamedTuple):
    """A number for each prompt of two sets, from 0 in each and none twice; twins have the same."""

    first: list[int]
    """Of the one set, in its order."""
    second: list[int]
    """Of the other."""


def paired(first: Sequence[Pair], second: Sequence[Pair]) -> list[tuple[int, int]]:
    """Return the rows (in the one set, in the other) of prompts that belong together, in order."""
    rows = {pair: row for row, pair in enumerate(second)}
    return [(row, rows[pair]) for row, pair in enumerate(first) if pair in rows]


def numbered(first: Sequence[Pair], second: Sequence[Pair]) -> Numbers:
    """Number pairs in order, and behind them, in either set, what has no twin in the other.

    Row numbers come out where no prompt has lost its twin, and where only the longer set goes on.
    """
    known: tuple[dict[int, int], ...] = ({}, {})
    pairs = paired(first, second)
    for number, rows in enumerate(pairs):
        for side, row in zip(known, rows, strict=True):
            side[row] = number

    def numbers(rows: int, side: dict[int, int]) -> list[int]:
        later = count(len(pairs))
        return [side[row] if row in side else next(later) for row in range(rows)]

    return Numbers(numbers(len(first), known[0]), numbers(len(second), known[1]))
