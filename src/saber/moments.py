"""Stage 1, for the selective edit: what goes into each residual writer, and its second moments."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saber.errors import NonFinite
from saber.lm.chat import Encoded
from saber.lm.forward import Progress, silent
from saber.lm.inputs import Key, plan_reading, read_inputs, read_prefix
from saber.lm.model import LanguageModel
from saber.lm.writers import Writer

RIDGE = 1e-3
"""Least shrinkage towards a multiple of the identity, as a share of the mean eigenvalue."""


@dataclass(frozen=True)
class Decisions:
    """What goes into each writer where the behaviour is decided: the last tokens of a prompt.

    An expert has the rows that were routed to it, so it may have fewer, or none and no entry.
    """

    target: dict[Key, Float[Tensor, "n d_in"]]
    """Rows of target prompts, float32 on the CPU."""
    neutral: dict[Key, Float[Tensor, " d_in"]]
    """Mean row of neutral prompts."""
    rows: int
    """Target rows that a plain weight has: prompts times positions."""

    @classmethod
    def of(
        cls, target: Mapping[Key, Tensor], neutral: Mapping[Key, Tensor], rows: int
    ) -> Decisions:
        """Make them of the rows (n, d_in) of targets and of neutral prompts."""
        return cls(dict(target), {key: value.mean(0) for key, value in neutral.items()}, rows)


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
            plan_reading(lm, writers, encoded, last=positions),
            lambda key, given: found[key].append(given.float().cpu()),
            progress=progress,
            label=label,
        )
        return {key: torch.cat(parts) for key, parts in found.items() if sum(map(len, parts))}

    return Decisions.of(
        rows(target, "inputs on targets"),
        rows(neutral, "inputs on neutral"),
        len(target) * positions,
    )


class Moment:
    """C = sum of h h^T over the rows of one writer, each row scaled by the root of its weight.

    Kept as the rows themselves while these are fewer than their width, so that a solve takes the
    smaller of the two; beyond that as a float64 sum of float32 products.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._rows: list[Tensor] = []
        self._count = 0
        self._sum: Tensor | None = None
        self._pinned: list[Tensor] = []
        self._trace: float | None = None
        self.products = 0.0
        """Work done on sums, FLOP."""

    def add(self, rows: Float[Tensor, "n d_in"], weight: float) -> None:
        """Add rows (on any device, in any dtype), each of this weight."""
        # Rows wait for one larger product; once they are summed, fewer of them, to save memory.
        room = self.width if self._sum is None else self.width // 4
        if self._count + len(rows) > room:
            self._fold()
        self._rows.append(rows.float() * weight**0.5)
        self._count += len(rows)

    def pin(self, rows: Float[Tensor, "n d_in"], weight: float) -> None:
        """Add a few rows that may be larger than all others by orders, and that the ridge leaves out.

        A text's first tokens are such in most models (Sun et al., 2024, arXiv:2402.17762): in a float32
        sum they would drown the rest.
        """
        self._pinned.append(rows.cpu().double() * weight**0.5)

    def _fold(self) -> None:
        """Turn the rows kept so far into their sum of products."""
        if not self._count:
            return
        if self._sum is None:
            self._sum = torch.zeros(self.width, self.width, dtype=torch.float64)
        kept = torch.cat(self._rows)
        for start, end in self._bands():
            self._sum[start:end, start:] += (kept[:, start:end].T @ kept[:, start:]).cpu()
            self.products += 2.0 * len(kept) * (end - start) * (self.width - start)
        self._rows, self._count = [], 0

    def _bands(self) -> list[tuple[int, int]]:
        """Cut the rows of C; each is summed from the diagonal on, as the rest mirrors it."""
        step = -(-self.width // 4)
        return [(start, min(start + step, self.width)) for start in range(0, self.width, step)]

    def done(self) -> None:
        """Say that all rows have come: rows are no longer kept on the model's device."""
        if self._sum is not None:
            self._fold()
            for start, end in self._bands():
                self._sum[end:, start:end] = self._sum[start:end, end:].T
        self._rows = [part.cpu() for part in self._rows]
        self._trace = self.trace()
        if self._sum is None:
            self._rows += self._pinned
        elif self._pinned:
            pinned = torch.cat(self._pinned)
            self._sum += pinned.T @ pinned
        self._pinned = []

    def trace(self) -> float:
        """Return tr C without what is pinned."""
        if self._trace is not None:
            return self._trace
        if self._sum is not None:
            return float(self._sum.diagonal().sum())
        return float(sum(part.double().pow(2).sum() for part in self._rows))

    def energy(self, vectors: Float[Tensor, "k d_in"]) -> Float[Tensor, " k"]:
        """Return v C v^T for each vector v, in float64."""
        if self._sum is not None:
            return (vectors @ self._sum * vectors).sum(1)
        return (_stack(self._rows, self.width) @ vectors.T).pow(2).sum(0)

    def solver(self, ridge: float, least: float = 0.0, where: str = "") -> Solver:
        """Return a solver of (C + e I) x = b, e = ridge x tr C / d_in; raises `NonFinite`.

        `least` stands in for tr C where that is smaller. Where C is so ill-conditioned that the
        factorisation fails, the ridge is raised tenfold until it does not; the solver tells its ridge.
        """
        trace = max(self.trace(), least)
        if not math.isfinite(trace):
            raise NonFinite(f"the input of {where or 'a writer'}")
        rows = None if self._sum is not None else _stack(self._rows, self.width)
        square = self._sum if rows is None else rows @ rows.T
        assert square is not None
        while True:
            e = max(ridge * trace / self.width, 1e-300)
            shifted = square.clone()
            shifted.diagonal().add_(e)
            factor, failed = torch.linalg.cholesky_ex(shifted)
            if not int(failed) and bool(torch.isfinite(factor).all()):
                return Solver(factor, rows, e, ridge)
            ridge *= 10


@dataclass(frozen=True)
class Solver:
    """The factorised C + e I of one writer's inputs."""

    factor: Float[Tensor, "m m"]
    """Cholesky factor: of C + e I itself or, with few rows Z, of Z Z^T + e I."""
    rows: Float[Tensor, "m d_in"] | None
    """Those rows, where they are fewer than their width."""
    e: float
    """What was added to the diagonal."""
    ridge: float
    """The same as a share of the mean eigenvalue."""

    def solve(self, rhs: Float[Tensor, "d_in k"]) -> Float[Tensor, "d_in k"]:
        """Return (C + e I)^-1 rhs, in sample space by Woodbury's identity where rows are few."""
        if self.rows is None:
            return torch.cholesky_solve(rhs, self.factor)
        inner = torch.cholesky_solve(self.rows @ rhs, self.factor)
        return (rhs - self.rows.T @ inner) / self.e

    @property
    def condition(self) -> float:
        """Estimate the condition number from the factor's diagonal (a lower bound)."""
        d = self.factor.diagonal()
        return float((d.max() / d.min()) ** 2) if len(d) else 1.0


def _stack(rows: Sequence[Tensor], width: int) -> Tensor:
    return torch.cat([torch.zeros(0, width, dtype=torch.float64), *(r.double() for r in rows)])


class Preserved:
    """Second moments of each writer's inputs over all tokens of texts that must not change.

    C = sum over sets of E_set[h h^T]: a set counts as one whatever its size, so that a small keep
    set is not drowned. The prefix that all texts of a set share, where it is read once, is a set of its
    own. Of the sets in `decisions` the last `positions` tokens alone are read. An expert's moment is
    over the tokens routed to it, per token of the set. They are kept when all of them fit into `memory`
    bytes; otherwise `groups` reads the texts again for each group of writers that fits.
    """

    def __init__(
        self,
        lm: LanguageModel,
        writers: Sequence[Writer],
        sets: Sequence[Sequence[Encoded]],
        decisions: Sequence[Sequence[Encoded]] = (),
        *,
        positions: int = 1,
        memory: float = 4e9,
        progress: Progress[Any] = silent,
    ) -> None:
        self._lm, self._progress = lm, progress
        self._readings = [plan_reading(lm, writers, encoded) for encoded in sets if encoded]
        self._readings += [
            plan_reading(lm, writers, encoded, last=positions) for encoded in decisions if encoded
        ]
        self._groups = _grouped(lm, writers, memory)
        self._kept: dict[Key, Moment] | None = None
        self.bytes = max((sum(_size(lm, w) for w in group) for group in self._groups), default=0)
        """Memory that the moments take at their peak."""
        self.tokens = sum(reading.tokens for reading in self._readings)
        """Tokens that are read."""

    def groups(self) -> Iterator[tuple[list[Writer], dict[Key, Moment]]]:
        """Yield groups of writers with their moments, shallow layers first."""
        for group in self._groups:
            moments = self._kept
            if moments is None:
                moments = self._read(group)
                if len(self._groups) == 1:
                    self._kept = moments
            yield group, moments

    def _read(self, writers: Sequence[Writer]) -> dict[Key, Moment]:
        moments: dict[Key, Moment] = {}
        for reading in self._readings:
            weight = 1 / max(reading.tokens, 1)

            def add(key: Key, rows: Tensor, weight: float = weight) -> None:
                if key not in moments:
                    moments[key] = Moment(rows.shape[-1])
                moments[key].add(rows, weight)

            read_inputs(
                self._lm,
                writers,
                reading,
                add,
                progress=self._progress,
                label="inputs to preserve",
            )
        for prefix in sorted({reading.prefix for reading in self._readings if reading.prefix}):

            def pin(key: Key, rows: Tensor, weight: float = 1 / len(prefix)) -> None:
                if key not in moments:
                    moments[key] = Moment(rows.shape[-1])
                moments[key].pin(rows, weight)

            read_prefix(self._lm, writers, prefix, pin)
        for moment in moments.values():
            moment.done()
            self._lm.work.products += moment.products
        return moments


def width(lm: LanguageModel, writer: Writer) -> int:
    """Return how many inputs a writer has (one expert of a fused one); 0 for a vector."""
    weight = lm.model.get_parameter(writer.weight)
    if weight.ndim < 2:
        return 0
    return weight.numel() // weight.shape[writer.axis] // (writer.experts or 1)


def _size(lm: LanguageModel, writer: Writer) -> int:
    return 8 * width(lm, writer) ** 2 * (writer.experts or 1)


def _grouped(lm: LanguageModel, writers: Sequence[Writer], memory: float) -> list[list[Writer]]:
    groups: list[list[Writer]] = []
    room = 0.0
    for writer in writers:
        size = _size(lm, writer)
        if not groups or size > room:
            groups.append([])
            room = memory
        groups[-1].append(writer)
        room -= size
    return groups
