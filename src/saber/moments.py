"""Stage 1, for the selective edit: what goes into each residual writer, and its second moments."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saber.errors import NonFinite
from saber.lm.chat import Encoded
from saber.lm.device import free_memory
from saber.lm.forward import Progress, silent
from saber.lm.inputs import plan_reading, read_inputs, read_prefix
from saber.lm.model import LanguageModel
from saber.lm.tap import Key
from saber.lm.writers import Writer

RIDGE = 1e-3
"""Least shrinkage towards a multiple of the identity, as a share of the mean eigenvalue."""
FEW = 0.75
"""Rows, as a share of their width, up to which a solve in sample space is the faster one."""
LEAST = 4.0 * 2**30
"""Bytes that moments may take where nothing is said, if the machine has them."""


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
    smaller of the two; beyond that as a float64 sum of float32 products. From `FEW` of the width on
    rows that are all there is are summed too.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._rows: list[Tensor] = []
        self._count = 0
        self._sum: Tensor | None = None
        self._pinned: list[Tensor] = []
        self._trace: float | None = None
        self._device = torch.device("cpu")
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

    def _fold(self, *, last: bool = False) -> None:
        """Turn the rows kept so far into their sum of products; in float64 those that are all there is."""
        if not self._count:
            return
        if self._sum is None:
            self._sum = torch.zeros(self.width, self.width, dtype=torch.float64)
        kept = torch.cat(self._rows)
        kept = kept.cpu().double() if last else kept
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
        if self._sum is not None or self._count > FEW * self.width:
            self._fold(last=self._sum is None)
        if self._sum is not None:
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

    def on(self, device: torch.device) -> Moment:
        """Return the same moment to be used on a device that has float64; it shares what lies there."""
        other = copy.copy(self)
        other._device, other._rows = device, [part.to(device) for part in self._rows]
        other._sum = None if self._sum is None else self._sum.to(device)
        return other

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
        return (self._stack() @ vectors.T).pow(2).sum(0)

    def _stack(self) -> Tensor:
        return torch.cat([torch.zeros(0, self.width, device=self._device), *self._rows]).double()

    def solver(self, ridge: float, least: float = 0.0, where: str = "") -> Solver:
        """Return a solver of (C + e I) x = b, e = ridge x tr C / d_in; raises `NonFinite`.

        `least` stands in for tr C where that is smaller. Where C is so ill-conditioned that the
        factorisation fails, the ridge is raised tenfold until it does not; the solver tells its ridge.
        """
        trace = max(self.trace(), least)
        if not math.isfinite(trace):
            raise NonFinite(f"the input of {where or 'a writer'}")
        rows = None if self._sum is not None else self._stack()
        square = self._sum if rows is None else rows @ rows.T
        assert square is not None
        diagonal = square.diagonal().clone()
        while True:
            e = max(ridge * trace / self.width, 1e-300)
            # In place, as a large C is gigabytes.
            square.diagonal().add_(e)
            try:
                factor, failed = torch.linalg.cholesky_ex(square)
            finally:
                square.diagonal().copy_(diagonal)
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


class Preserved:
    """Second moments of each writer's inputs over all tokens of texts that must not change.

    C = sum over sets of E_set[h h^T]: a set counts as one whatever its size, so that a small keep
    set is not drowned. The prefix that all texts of a set share, where it is read once, is a set of its
    own. Of the sets in `decisions` the last `positions` tokens alone are read. An expert's moment is
    over the tokens routed to it, per token of the set. They are read of the layers that are asked for, and
    kept when those of all writers would fit into `memory` bytes; otherwise `groups` reads the texts again for
    each group of writers that fits. Which writers are read together changes no bit of a moment.
    """

    def __init__(
        self,
        lm: LanguageModel,
        writers: Sequence[Writer],
        sets: Sequence[Sequence[Encoded]],
        decisions: Sequence[Sequence[Encoded]] = (),
        *,
        positions: int = 1,
        memory: float = LEAST,
        progress: Progress[Any] = silent,
    ) -> None:
        self._lm, self._progress = lm, progress
        self.writers = tuple(writers)
        """All writers, in order of depth."""
        self._readings = [plan_reading(lm, writers, encoded) for encoded in sets if encoded]
        self._readings += [
            plan_reading(lm, writers, encoded, last=positions) for encoded in decisions if encoded
        ]
        self._memory = memory
        self._kept: dict[Key, Moment] = {}
        self._known: set[str] = set()
        self.tokens = sum(reading.tokens for reading in self._readings)
        """Tokens that are read."""

    def groups(
        self, layers: Collection[int] | None = None
    ) -> Iterator[tuple[list[Writer], dict[Key, Moment]]]:
        """Yield groups of writers with their moments, shallow layers first.

        The writers of `layers` alone are read; of all where it is None. The model reads as it stands; no
        plan should be in force meanwhile.
        """
        wanted = [w for w in self.writers if layers is None or w.layer in layers]
        if len(packed(self._lm, self.writers, self._memory)) == 1:
            missing = [w for w in wanted if w.name not in self._known]
            if missing:
                self._kept |= self._read(missing)
                self._known |= {w.name for w in missing}
            yield wanted, self._kept
            return
        for group in packed(self._lm, wanted, self._memory):
            moments = self._read(group)
            yield group, moments
            moments.clear()  # whoever still holds them would hold two groups'

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


def moment_bytes(lm: LanguageModel, writer: Writer) -> int:
    """Return how many bytes the second moment of a writer's inputs takes at most, float64."""
    return 8 * width(lm, writer) ** 2 * (writer.experts or 1)


def packed(lm: LanguageModel, writers: Sequence[Writer], memory: float) -> list[list[Writer]]:
    """Pack writers, given in order of depth, into few groups whose moments fit into `memory` bytes.

    What is deepest opens a group, and the next deepest that still fit fill it: a reading ends behind its
    group's last layer, so shallow writers are left to groups of their own. The largest writer has to
    fit in any case.
    """
    sizes = [moment_bytes(lm, writer) for writer in writers]
    bound = max([memory, *sizes])
    rest = list(range(len(writers)))[::-1]
    groups: list[list[Writer]] = []
    while rest:
        room, group, left = bound, [], []
        for index in rest:
            if sizes[index] <= room:
                room -= sizes[index]
                group.append(index)
            else:
                left.append(index)
        groups.append([writers[index] for index in group[::-1]])
        rest = left
    return groups[::-1]


def affordable(lm: LanguageModel, writers: Sequence[Writer]) -> float:
    """Return how many bytes moments may take where nothing is said: half of what is free here.

    Free is what is left beside the copies of the writers by which an edit is undone. `LEAST` is taken
    where that is more and is there.
    """
    parameters = (lm.model.get_parameter(w.weight) for w in writers)
    copies = sum(p.numel() * p.element_size() for p in parameters)
    free = max(0.0, float(free_memory() - copies))
    return max(free / 2, min(free, LEAST))
