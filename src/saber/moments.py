"""Stage 1, for the selective edit: second moments of what goes into each residual writer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saber.errors import NonFinite
from saber.lm.chat import Encoded
from saber.lm.forward import Progress, silent
from saber.lm.inputs import Key, read_inputs
from saber.lm.model import LanguageModel
from saber.lm.writers import Writer

MEMORY = 2**30
"""Bytes that second moments may take at a time; beyond it, writers are read group by group."""


@dataclass(frozen=True)
class Decisions:
    """What goes into each writer where the behaviour is decided."""

    target: dict[Key, Float[Tensor, "n d_in"]]
    """Rows of target prompts, float32 on the CPU."""
    neutral: dict[Key, Float[Tensor, "m d_in"]]
    """Rows of neutral prompts."""


def read_decisions(
    lm: LanguageModel,
    writers: Sequence[Writer],
    target: Sequence[Encoded],
    neutral: Sequence[Encoded],
    *,
    positions: int = 1,
    progress: Progress[Any] = silent,
) -> Decisions:
    """Read the inputs of all writers at the last `positions` tokens of each sequence."""

    def rows(encoded: Sequence[Encoded], label: str) -> dict[Key, Tensor]:
        found: dict[Key, list[Tensor]] = defaultdict(list)
        read_inputs(
            lm,
            writers,
            encoded,
            lambda key, given: found[key].append(given.float().cpu()),
            last=positions,
            progress=progress,
            label=label,
        )
        return {key: torch.cat(parts) for key, parts in found.items()}

    return Decisions(rows(target, "inputs on targets"), rows(neutral, "inputs on neutral"))


class Preserved:
    """Second moments C = E[h h^T] of each writer's inputs over all tokens that must not change.

    Accumulated in float64 from float32 products. They are kept when all of them fit into `memory`
    bytes; otherwise `groups` reads the prompts again for each group of writers that fits.
    """

    def __init__(
        self,
        lm: LanguageModel,
        writers: Sequence[Writer],
        encoded: Sequence[Encoded],
        *,
        memory: int = MEMORY,
        progress: Progress[Any] = silent,
    ) -> None:
        self._lm, self._encoded, self._progress = lm, encoded, progress
        self._groups = _grouped(lm, writers, memory)
        self._kept: dict[Key, Tensor] | None = None
        self.bytes = max((sum(_size(lm, w) for w in group) for group in self._groups), default=0)
        """Memory that the moments take at their peak."""

    def groups(self) -> Iterator[tuple[list[Writer], dict[Key, Float[Tensor, "d_in d_in"]]]]:
        """Yield groups of writers with their moments, shallow layers first."""
        for group in self._groups:
            moments = self._kept
            if moments is None:
                moments = self._read(group)
                if len(self._groups) == 1:
                    self._kept = moments
            yield group, moments

    def _read(self, writers: Sequence[Writer]) -> dict[Key, Tensor]:
        sums: dict[Key, Tensor] = {}
        counts: dict[Key, int] = defaultdict(int)

        def add(key: Key, rows: Tensor) -> None:
            rows = rows.float()
            product = (rows.T @ rows).to("cpu", torch.float64)
            counts[key] += len(rows)
            if key in sums:
                sums[key] += product
            else:
                sums[key] = product

        read_inputs(
            self._lm,
            writers,
            self._encoded,
            add,
            progress=self._progress,
            label="inputs to preserve",
        )
        for key, total in sums.items():
            total /= max(counts[key], 1)
            if not bool(torch.isfinite(total).all()):
                raise NonFinite(f"the input of {key[0]}")
        return sums


def _size(lm: LanguageModel, writer: Writer) -> int:
    weight = lm.model.get_parameter(writer.weight)
    if weight.ndim < 2:
        return 0
    width = weight.numel() // weight.shape[writer.axis] // (writer.experts or 1)
    return 8 * width * width * (writer.experts or 1)


def _grouped(lm: LanguageModel, writers: Sequence[Writer], memory: int) -> list[list[Writer]]:
    groups: list[list[Writer]] = []
    room = 0
    for writer in writers:
        size = _size(lm, writer)
        if not groups or size > room:
            groups.append([])
            room = memory
        groups[-1].append(writer)
        room -= size
    return groups
