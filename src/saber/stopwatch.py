"""How long stages take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter


class Stopwatch:
    """Adds up wall time by stage, seconds."""

    def __init__(self) -> None:
        self.start = perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time a block under a stage's name."""
        begin = perf_counter()
        try:
            yield
        finally:
            self.add({stage: perf_counter() - begin})

    def add(self, seconds: dict[str, float]) -> None:
        """Add times measured elsewhere."""
        for stage, value in seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + value

    def total(self) -> float:
        """Return the time since the start."""
        return perf_counter() - self.start
