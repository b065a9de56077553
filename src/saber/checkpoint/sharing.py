"""Do the changes of many residual writers lie along the same directions of the stream?"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saber.checkpoint.delta import Change
from saber.checkpoint.naming import WRITERS, Kind


@dataclass(frozen=True)
class Piece:
    """One matrix or vector, or one expert of a fused tensor, with what changed in it."""

    name: str
    """Name in the base."""
    kind: Kind
    """What it is."""
    layer: int | None
    """Decoder layer, counted from 0; None outside of the layers."""
    matrix: bool
    """Whether it was looked at as a matrix."""
    change: Change
    """What changed."""
    gain: Float[Tensor, " d"] | None = None
    """Gain of the norm between it and the stream."""

    @property
    def beyond(self) -> bool:
        """Whether it changed by more than rounding."""
        return not self.change.within_rounding

    @property
    def ablated(self) -> bool:
        """Whether the law of an ablation holds for a good part of its change."""
        law = self.change.law
        return self.beyond and law is not None and law.holds and law.share >= LEAST

    @property
    def writes(self) -> bool:
        """Whether it writes to the stream: by its kind, or, of unknown kind, by the law it obeys."""
        return self.matrix and (self.kind in WRITERS or (self.kind == "other" and self.ablated))


LEAST = 0.3
"""Least share of a matrix's whole change that counts as an ablation with other changes around it."""


@dataclass(frozen=True)
class Sharing:
    """Overlaps of the output directions of changed writers, those of one kind in a layer as one."""

    labels: tuple[tuple[int | None, Kind], ...]
    """Layer and kind of each group, in order of depth."""
    overlap: Float[Tensor, "groups groups"]
    """Share of the row group's energy that lies in the column group's directions, chance taken off."""
    behind_gain: bool
    """Whether the directions are those that the stream receives, behind the norms' gains."""
    directions: int
    """Dimensions that all groups together span, those that less than half a group lies in apart."""

    @property
    def shared(self) -> float | None:
        """Median over groups of the overlap with the other group that fits best; None for one group."""
        if len(self.labels) < 2:
            return None
        others = self.overlap - 2 * torch.eye(len(self.labels))
        return statistics.median(float(x) for x in others.amax(1))


def sharing(pieces: Iterable[Piece]) -> Sharing:
    """Hold the output directions of changed writers against one another.

    Where norms with gains follow, both the written and the received directions are tried, and those
    that agree better are reported.
    """
    chosen = [p for p in pieces if p.writes and p.beyond and p.change.left is not None]
    plain = _sharing(chosen, behind=False)
    if not any(p.gain is not None for p in chosen):
        return plain
    gained = _sharing(chosen, behind=True)
    better = (gained.shared or 0.0) > (plain.shared or 0.0) + 0.01
    return gained if better else plain


def _sharing(pieces: Sequence[Piece], *, behind: bool) -> Sharing:
    groups: dict[tuple[int | None, Kind], list[Tensor]] = {}
    for piece in pieces:
        groups.setdefault((piece.layer, piece.kind), []).append(_weighted(piece, behind))
    labels = sorted(groups, key=lambda g: (-1 if g[0] is None else g[0], g[1]))
    bases = [_joint(groups[label]) for label in labels]
    n = len(labels)
    overlap = torch.zeros(n, n)
    for i, (u, weights) in enumerate(bases):
        for j, (v, _) in enumerate(bases):
            found = float(weights @ (v.T @ u).square().sum(0))
            chance = v.shape[1] / v.shape[0]
            overlap[i, j] = max(0.0, (found - chance) / (1 - chance)) if chance < 1 else 0.0
    directions = 0
    if bases:
        values = torch.linalg.svdvals(torch.cat([u for u, _ in bases], 1))
        directions = int((values.square() > 0.5).sum())
    return Sharing(tuple(labels), overlap, behind, directions)


def _weighted(piece: Piece, behind: bool) -> Float[Tensor, "d k"]:
    """Return the directions of a piece, each with the square root of its share as length."""
    change = piece.change
    assert change.left is not None
    assert change.weights is not None
    k = change.left.shape[1]
    if change.law is not None and change.law.holds and change.law.axis == change.axis:
        k = min(k, change.law.rank)
    left, weights = change.left[:, :k], change.weights[:k]
    if behind and piece.gain is not None and len(piece.gain) == len(left):
        left = left * piece.gain[:, None]
        left = left / left.norm(dim=0).clamp_min(1e-30)
    return left * (weights / weights.sum()).sqrt()


def _joint(parts: Sequence[Tensor]) -> tuple[Float[Tensor, "d k"], Float[Tensor, " k"]]:
    """Return an orthonormal basis of the leading directions of some pieces, with energy shares."""
    width = max(part.shape[1] for part in parts)
    left, values, _ = torch.linalg.svd(torch.cat(list(parts), 1), full_matrices=False)
    energies = values[:width].square()
    return left[:, :width], energies / energies.sum().clamp_min(1e-30)
