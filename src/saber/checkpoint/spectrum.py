"""Leading singular values and vectors of a difference, and what they look like with norms undone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from saber.checkpoint.rounding import CHUNK, Survey

KEEP, OVERSAMPLE = 32, 16
EXACT = 256
"""Matrices with a side up to this go through their Gram matrix in float64."""
LEAD = 16
"""Most directions that a law is tested on."""
ROUNDS = 12
"""Most rounds in which a rescaling is looked for."""


@dataclass(frozen=True)
class Spectrum:
    """The leading part of a singular value decomposition, and what rounding leaves of it."""

    left: Float[Tensor, "m k"]
    """Left singular vectors, float32."""
    values: Float[Tensor, " k"]
    """Singular values, largest first, float64."""
    right: Float[Tensor, "n k"]
    """Right singular vectors, float32."""
    above: int
    """Singular values above the rounding floor, of those computed."""
    limit: int
    """Most that could be called low-rank: what was computed, and a quarter of the smaller side."""
    rest: float
    """Energy beyond those above the floor, less what rounding brings, at least zero."""

    @property
    def rank(self) -> int | None:
        """Numerical rank: singular values above rounding; None where that is no low rank."""
        return self.above if self.above <= self.limit else None


def singular(
    d: Float[Tensor, "m n"], keep: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading left vectors, values and right vectors of a matrix.

    A small matrix goes through the Gram matrix of its smaller side in float64. A large one through a
    randomised range finder with one power step (Halko, Martinsson and Tropp, 0909.4061), in float32:
    four passes of 2 (keep + 16) m n operations.
    """
    m, n = d.shape
    if min(m, n) <= EXACT:
        wide = d.double() if m <= n else d.T.double()
        values, vectors = torch.linalg.eigh(wide @ wide.T)
        values = values.flip(0)[:keep].clamp_min(0).sqrt()
        near = vectors.flip(1)[:, :keep]
        far = (wide.T @ near) / values.clamp_min(1e-300)
        left, right = (near, far) if m <= n else (far, near)
        return left.float(), values, right.float()
    columns = min(keep + OVERSAMPLE, m, n)
    scale = float(d.abs().max())
    if scale == 0.0:
        return torch.zeros(m, keep), torch.zeros(keep, dtype=torch.float64), torch.zeros(n, keep)
    start = torch.randn(n, columns, generator=generator)
    q = torch.linalg.qr(d @ start).Q
    q = torch.linalg.qr(d.T @ q).Q
    q = torch.linalg.qr(d @ q).Q
    small = (d.T @ q).T
    inner, values, right = torch.linalg.svd(small, full_matrices=False)
    return (q @ inner)[:, :keep], values[:keep].double(), right[:keep].T


def spectrum(s: Survey, generator: torch.Generator) -> Spectrum:
    """Return the leading spectrum of a surveyed difference."""
    left, values, right = singular(s.delta, KEEP, generator)
    above = int((values > s.floor).sum())
    rest = s.energy - float(values[:above].square().sum()) - s.noise
    limit = min(KEEP - 1, max(1, min(s.delta.shape) // 4))
    return Spectrum(left, values, right, above, limit, max(0.0, rest))


def kept_norms(s: Survey) -> str:
    """Return which norms of a changed matrix are those of the base: columns, rows, whole, or none.

    An edit that moves a column by x leaves its length unless it turns it: a length that stays within
    a tenth of what |x|^2 / 2 would make of it, for all columns together, was put back.
    """
    for axis, noise in (("columns", s.column_noise), ("rows", s.row_noise)):
        if len(noise) < 4:
            continue
        before, after = (s.squares[f"{side}_{axis}"].sqrt() for side in ("base", "edited"))
        usual = s.squares[f"delta_{axis}"] / (2 * before.clamp_min(1e-30))
        blur = float(noise.mean()) / (s.delta.numel() / len(noise))
        expected = float(usual.square().mean())
        drift = float((after - before).square().mean())
        if expected > 25 * blur and drift < expected / 100 + 4 * blur:
            return axis
    before, after = s.base_energy**0.5, float(s.squares["edited_rows"].sum()) ** 0.5
    moved = s.energy / max(2 * before, 1e-30)
    noise = (s.noise / s.delta.numel()) ** 0.5
    return "whole" if moved > 10 * noise and abs(after - before) < 0.1 * moved else ""


def unscaled(
    s: Survey, first: Spectrum, edited: Tensor, kept: str, generator: torch.Generator
) -> tuple[Survey, Spectrum]:
    """Return survey and spectrum of a difference with a rescaling of rows or columns taken back.

    Where W' = (W + U Z) C with a diagonal C, off the span of U column j of W' is that of W times
    c_j; so c_j is a ratio of projections, and W' C^-1 - W has the rank of U Z. Repeated for as long
    as it helps, since the first U has the rescaling in it. The same with rows, and with one number
    for all.
    """
    base, after = edited.float() - s.delta, edited.float()
    current, found = s, first
    for _ in range(ROUNDS):
        lead = _lead(found)
        if kept == "rows":
            v = found.right[:, :lead]
            x, y = after - (after @ v) @ v.T, base - (base @ v) @ v.T
        else:
            u = found.left[:, :lead]
            x, y = after - u @ (u.T @ after), base - u @ (u.T @ base)
        over = {"rows": (1,), "columns": (0,), "whole": (0, 1)}[kept]
        scale = (x * y).sum(over, keepdim=True) / y.square().sum(over, keepdim=True).clamp_min(
            1e-30
        )
        delta = after / scale.clamp_min(0.1) - base
        squares = {**s.squares, "delta_rows": delta.double().square().sum(1)}
        trial = replace(s, delta=delta, squares=squares, along=float((delta * base).sum()))
        better = spectrum(trial, generator)
        if _beside(trial, better) > 0.7 * _beside(current, found):
            break
        current, found = trial, better
    return current, found


def _beside(s: Survey, found: Spectrum) -> float:
    """Return the energy off the directions that stand out."""
    return max(0.0, s.energy - float(found.values[: _lead(found)].square().sum()))


def _lead(found: Spectrum) -> int:
    """Return how many directions stand out: those above a tenth of the strongest."""
    out = int((found.values > 0.1 * found.values[0]).sum())
    return max(1, min(out, LEAD, found.limit))


def left_product(
    vectors: Float[Tensor, "d k"], base: Float[Tensor, "m n"], axis: int
) -> Float[Tensor, "k across"]:
    """Return U^T W (axis 0) or V^T W^T (axis 1) in float64 sums of float32 blocks."""
    m, n = base.shape
    step = max(1, CHUNK // n)
    if axis == 1:
        return torch.cat([(part.float() @ vectors).T for part in base.split(step)], 1).double()
    total = torch.zeros(vectors.shape[1], n, dtype=torch.float64)
    for start in range(0, m, step):
        rows = slice(start, start + step)
        total += (vectors[rows].T @ base[rows].float()).double()
    return total
