"""How much of a difference between two stored tensors is rounding.

A weight stored with p significant bits is known to half a unit in the last place,
ulp(w) = 2^(1 - p) 2^floor(log2 |w|). Rounding errors are close to uniform and independent, of
variance ulp^2 / 12 each, so as a matrix they have full rank. Their spectral norm is at most about
max_i sqrt(sum_j v_ij) + max_j sqrt(sum_i v_ij), v_ij the variances (Bandeira and van Handel,
1408.6185): singular values of a difference below that say nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

BITS = {torch.float64: 24, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
"""Significant bits by dtype; float64 is read as float32 here."""
TINY = {torch.float16: 2.0**-24}
"""Smallest unit in the last place, where it is reached in practice (subnormal numbers)."""
ARITHMETIC = 4.0
"""An edit computed in float32 errs by a few units in the last place, not by half of one."""
MARGIN = 1.5
"""Safety factor on the spectral norm of rounding noise."""
CHUNK = 1 << 22
"""Elements that are worked on at a time, where work is matrix products."""
BLOCK = 1 << 18
"""The same where it is passes over memory, so that all of them find it in the cache."""


@dataclass(frozen=True)
class Survey:
    """What one pass over a pair of matrices says: their difference and its rounding noise."""

    delta: Float[Tensor, "m n"]
    """Edited minus base, float32."""
    grid: torch.dtype
    """Coarsest dtype of the two sides: the values of one are all on its grid."""
    row_noise: Float[Tensor, " m"]
    """Rounding variances summed over each row, float64."""
    column_noise: Float[Tensor, " n"]
    """Rounding variances summed over each column, float64."""
    squares: dict[str, Tensor]
    """Squared norms of rows and columns: base_rows, edited_rows, delta_rows, and _columns."""
    along: float
    """Inner product of difference and base."""
    changed: int
    """Elements that differ."""
    within_rounding: bool
    """Whether no element differs by more than half a unit in the last place of `grid`."""
    finite: bool
    """Whether both sides are free of NaN and infinity."""

    @property
    def noise(self) -> float:
        """Expected energy of rounding, the sum of all variances."""
        return float(self.row_noise.sum())

    @property
    def floor(self) -> float:
        """Largest singular value that rounding alone would give."""
        rows, columns = self.row_noise.max().sqrt(), self.column_noise.max().sqrt()
        return MARGIN * float(rows + columns)

    @property
    def energy(self) -> float:
        """Squared Frobenius norm of the difference."""
        return float(self.squares["delta_rows"].sum())

    @property
    def base_energy(self) -> float:
        """Squared Frobenius norm of the base."""
        return float(self.squares["base_rows"].sum())


def grid_of(x: Tensor) -> torch.dtype:
    """Return the coarsest dtype that holds every value exactly: a float32 file may hold bfloat16."""
    if x.dtype in (torch.bfloat16, torch.float16):
        return x.dtype
    flat = x.reshape(-1)
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(p.to(dtype).to(p.dtype), p) for p in _few_then_all(flat)):
            return dtype
    return torch.float32


def _few_then_all(flat: Tensor) -> list[Tensor]:
    return [flat[:4096], *flat.split(CHUNK)]


def coarser(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """Return the dtype of fewer significant bits."""
    return min(a, b, key=lambda dtype: BITS[dtype])


def ulp(x: Float[Tensor, "*n"], dtype: torch.dtype) -> Float[Tensor, "*n"]:
    """Return the unit in the last place of float32 values on the grid of a dtype."""
    power = (x.contiguous().view(torch.int32) & 0x7F800000).view(torch.float32)
    return (power * 2.0 ** (1 - BITS[dtype])).clamp_min(TINY.get(dtype, 0.0))


def survey(a: Float[Tensor, "m n"], b: Float[Tensor, "m n"]) -> Survey:
    """Compare a pair of matrices in one pass, by blocks of rows.

    A one-dimensional tensor goes as a matrix of one row.
    """
    grid = coarser(grid_of(a), grid_of(b))
    m, n = a.shape
    delta = torch.empty(m, n)
    rows = {key: torch.zeros(m, dtype=torch.float64) for key in _SUMS}
    columns = {key: torch.zeros(n, dtype=torch.float64) for key in _SUMS}
    changed, within = 0, True
    step = max(1, BLOCK // n)
    over_columns = torch.ones(n)
    for start in range(0, m, step):
        block = slice(start, start + step)
        base, edited = a[block].float(), b[block].float()
        part = torch.sub(edited, base, out=delta[block])
        unit = ulp(torch.maximum(base.abs(), edited.abs()), grid)
        changed += int(part.count_nonzero())
        within = within and bool((part.abs() <= 0.5 * unit).all())
        over_rows = torch.ones(len(part))
        # Sums of a block are matrix-vector products in float32, blocks are added in float64.
        for key, x, y in (
            ("noise", unit, unit),
            ("base", base, base),
            ("along", base, part),
            ("delta", part, part),
        ):
            product = x * y
            rows[key][block] = (product @ over_columns).double()
            columns[key] += (over_rows @ product).double()
    finite = bool(torch.isfinite(rows["delta"]).all() and torch.isfinite(rows["base"]).all())
    scale = (ARITHMETIC**2 if grid == torch.float32 else 1.0) / 12
    squares = {}
    for axis, sums in (("rows", rows), ("columns", columns)):
        squares[f"base_{axis}"], squares[f"delta_{axis}"] = sums["base"], sums["delta"]
        edited_squares = sums["base"] + 2 * sums["along"] + sums["delta"]
        squares[f"edited_{axis}"] = edited_squares.clamp_min(0)
    return Survey(
        delta=delta,
        grid=grid,
        row_noise=scale * rows["noise"],
        column_noise=scale * columns["noise"],
        squares=squares,
        along=float(rows["along"].sum()),
        changed=changed,
        within_rounding=within,
        finite=finite,
    )


_SUMS = ("noise", "base", "along", "delta")
