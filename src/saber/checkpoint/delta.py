"""What changed in one matrix: size, spectrum, and whether it obeys the law of a directional ablation.

An ablation W' = (I - U A U^T) W changes W by -U A (U^T W): its right side follows from its left side
and W. With U the leading left singular vectors of the difference D, the law asks how much of D is
explained by U (U^T W) with the best A; chance gives k / d_in, a fine-tune or an input-gated edit
little. Where a norm with gain g follows, what reads the direction is not what writes it: with G
diagonal, D = -U A (G U)^T W. See docs/diff.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saber.checkpoint.rounding import Survey, survey
from saber.checkpoint.spectrum import (
    LEAD,
    Spectrum,
    kept_norms,
    left_product,
    spectrum,
    unscaled,
)

WITHIN = 0.9
"""Least share of the difference along its leading directions that the law must explain there."""
EVEN = 0.002
"""Explained shares this close count as even; the smaller rank is taken then."""
SCALING = 0.5
"""A matrix that shrinks by half as much everywhere is scaled, not ablated."""
SHOWN = 16
"""Singular values kept for reports."""


@dataclass(frozen=True)
class Law:
    """How far a difference is explained by what the base itself writes along its output directions."""

    axis: int
    """Axis of the matrix that the directions lie along."""
    share: float
    """Share of the whole difference (beyond rounding) that is explained, 0 to 1."""
    within: float
    """Share of the difference along the directions, chance taken off, at most 1."""
    strengths: tuple[float, ...]
    """Eigenvalues of the removal: 1 takes a direction out whole, below 0 amplifies it."""
    elsewhere: float
    """The same number for the rest of the matrix: how much it shrank as a whole."""
    gain: str
    """Which read-out explains it: empty for the direction itself, "norm gain" or "row norms"."""

    @property
    def rank(self) -> int:
        """Directions that it holds for."""
        return len(self.strengths)

    @property
    def holds(self) -> bool:
        """Whether along its directions the difference is what an ablation would be."""
        mean = sum(self.strengths) / len(self.strengths)
        return self.within >= WITHIN and abs(self.elsewhere) < SCALING * abs(mean)


@dataclass(frozen=True)
class Change:
    """What changed in one matrix or vector."""

    relative: float
    """Norm of the difference over that of the base."""
    share_changed: float
    """Share of elements that differ."""
    grid: str
    """dtype on whose grid the coarser side lies."""
    within_rounding: bool
    """Whether rounding to that dtype explains every element, or no singular value is above it."""
    finite: bool
    """Whether both sides are free of NaN and infinity."""
    values: tuple[float, ...] = ()
    """Leading singular values over the norm of the base, largest first."""
    floor: float = 0.0
    """Rounding floor in the same unit."""
    rank: int | None = None
    """Numerical rank; None where it is no low rank (or this is no matrix)."""
    captured: float = 0.0
    """Share of the difference's energy beyond rounding in its numerical rank (or the leading values)."""
    norms_kept: str = ""
    """Norms that were put back after the edit: columns, rows, whole, or none."""
    law: Law | None = None
    """The law on the side it fits best; None where no side is as wide as the stream."""
    axis: int = 0
    """Axis of the stream in this matrix, as far as is known."""
    left: Float[Tensor, "d k"] | None = None
    """Directions along that axis, orthonormal."""
    weights: Float[Tensor, " k"] | None = None
    """Their shares of the energy, which sum to one."""


def compare_vectors(a: Tensor, b: Tensor) -> Change:
    """Return what changed in tensors that are no matrices, such as norm gains and biases."""
    s = survey(a.reshape(1, -1), b.reshape(1, -1))
    within = s.within_rounding or s.energy <= s.noise
    return Change(_relative(s), s.changed / s.delta.numel(), _name(s), within, s.finite)


def compare_matrices(
    a: Float[Tensor, "m n"],
    b: Float[Tensor, "m n"],
    sides: tuple[int, ...] = (),
    gain: Float[Tensor, " d"] | None = None,
    *,
    generator: torch.Generator,
) -> Change:
    """Return what changed in a matrix.

    `sides` are the axes that may be the stream's, the likeliest first; `gain` is that of the norm
    between the matrix and the stream.
    """
    s = survey(a, b)
    size = s.delta.numel()
    if not s.finite or s.changed == 0 or s.within_rounding:
        return Change(_relative(s), s.changed / size, _name(s), True, s.finite)
    found = spectrum(s, generator)
    kept = kept_norms(s) if found.above else ""
    if kept:
        s, found = unscaled(s, found, b, kept, generator)
    norm = max(s.base_energy, 1e-300) ** 0.5
    strong = found.values[: found.above].square()
    total = float(strong.sum()) + found.rest
    directions = max(1, min(found.above, LEAD))
    law, axis = _best_law(s, found, a, sides, gain, kept) if found.above else (None, 0)
    vectors = found.left if axis == 0 else found.right
    weights = found.values[:directions].square()
    return Change(
        relative=_relative(s),
        share_changed=s.changed / size,
        grid=_name(s),
        within_rounding=found.above == 0,
        finite=True,
        values=tuple(float(v) / norm for v in found.values[:SHOWN]),
        floor=s.floor / norm,
        rank=found.rank,
        captured=float(strong.sum()) / total if total > 0 else 0.0,
        norms_kept=kept,
        law=law,
        axis=axis,
        left=vectors[:, :directions].contiguous() if sides else None,
        weights=(weights / weights.sum().clamp_min(1e-300)).float(),
    )


def _relative(s: Survey) -> float:
    return float(s.energy**0.5 / max(s.base_energy, 1e-300) ** 0.5)


def _name(s: Survey) -> str:
    return str(s.grid).removeprefix("torch.")


def _best_law(
    s: Survey, found: Spectrum, base: Tensor, sides: tuple[int, ...], gain: Tensor | None, kept: str
) -> tuple[Law | None, int]:
    """Return the law that explains most, and the axis of the stream.

    The likeliest side is left, and the direction itself as its own read-out, only for what explains
    distinctly more.
    """
    best: Law | None = None
    for axis in sides:
        # A stream's axis that is no longer than a few directions proves nothing.
        if s.delta.shape[1 - axis] < 8:
            continue
        for name, read in _readings(s, axis, gain, kept).items():
            law = _law(s, found, base, axis, name, read)
            if (
                best is None
                or law.holds > best.holds
                or (law.holds == best.holds and law.share > best.share + 0.01)
            ):
                best = law
    likeliest = sides[0] if sides else 0
    return best, best.axis if best is not None and best.holds else likeliest


def _readings(s: Survey, axis: int, gain: Tensor | None, kept: str) -> Mapping[str, Tensor | None]:
    """Return the diagonals G by which the direction that is read may differ from that written."""
    found: dict[str, Tensor | None] = {"": None}
    if gain is not None and len(gain) == s.delta.shape[axis]:
        # SABER's output side behind a gain: Writer.write in lm/writers.py.
        squared = gain.double().square()
        found["norm gain"] = squared + squared.mean() / len(squared)
    if kept == ("rows" if axis == 0 else "columns"):
        # Directions of rows ablated apart from their norms: M (I - r r^T) M^-1 W.
        found["row norms"] = 1 / s.squares[f"base_{kept}"].clamp_min(1e-30)
    return found


def _law(
    s: Survey, found: Spectrum, base: Tensor, axis: int, name: str, read: Tensor | None
) -> Law:
    across = s.delta.shape[1 - axis]
    most = max(1, min(found.above, LEAD, across // 4))
    left, right = (found.left, found.right) if axis == 0 else (found.right, found.left)
    left = left[:, :most].double()
    reading = left if read is None else left * (read / read.mean())[:, None]
    written = left_product(reading.float(), base, axis)  # (GU)^T W
    moved = found.values[:most, None] * right[:, :most].double().T  # U^T D
    gram, cross = written @ written.T, moved @ written.T
    row_noise = s.row_noise if axis == 0 else s.column_noise
    noise = (left.square().T @ row_noise).cumsum(0)
    energies = moved.square().sum(1).cumsum(0)
    tail = max(0.0, s.energy - float(found.values[: found.above].square().sum()) - s.noise)
    whole = float(found.values[: found.above].square().sum()) + tail
    options = []
    for k in range(1, most + 1):
        # The best A: U^T D ~ -A (GU)^T W.
        a = -torch.linalg.lstsq(gram[:k, :k], cross[:k, :k].T, driver="gelsd").solution.T
        explained = float(-(a * cross[:k, :k]).sum())
        energy = max(float(energies[k - 1] - noise[k - 1]), explained, 1e-300)
        within = 1 - (1 - explained / energy) * across / (across - k)
        share = max(0.0, within) * min(energy / whole, 1.0)
        options.append((within >= WITHIN, share, within, k, a))
    held = max(option[0] for option in options)
    top = max(option[1] for option in options if option[0] == held)
    _, share, within, k, a = next(o for o in options if o[0] == held and o[1] >= top - EVEN)
    strengths = torch.linalg.eigvals(a @ (reading[:, :k].T @ left[:, :k])).real
    ordered = sorted((float(x) for x in strengths), key=abs, reverse=True)
    return Law(axis, share, within, tuple(ordered), _elsewhere(s, moved[:k], written[:k]), name)


def _elsewhere(s: Survey, moved: Tensor, written: Tensor) -> float:
    """Return c of the best D ~ -c W off the directions."""
    rest = s.base_energy - float(written.square().sum())
    return -(s.along - float((moved * written).sum())) / max(rest, 1e-300)
