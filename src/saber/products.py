"""Low-rank products with the same bits whatever the blocks, the threads and the machine."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

MANTISSA, BLOCK = 53, 1 << 18
"""Bits of a float64's mantissa; entries of a product made at once."""


def on_grid(rows: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    """Round each row to multiples of one power of two, in float64, so that products of rows are exact.

    With b = (53 - ceil(log2 k)) // 2 and |row| < 2^e the grid is 2^(e - b): k products of two such
    numbers, added in any order, fit float64's 53 bits, so no sum is ever rounded. The error is at
    most 2^(-b - 1) of the row's largest entry, with b = 23 at k = 100: that of float32 itself.
    """
    bits = (MANTISSA - max(rows.shape[1] - 1, 0).bit_length()) // 2
    wide = rows.double()
    exponent = torch.frexp(wide.abs().amax(1, keepdim=True)).exponent
    scale = torch.ldexp(torch.ones_like(wide[:, :1]), bits - exponent)
    return torch.round(wide * scale) / scale


def exact_product(left: Float[Tensor, "n k"], right: Float[Tensor, "k m"]) -> Float[Tensor, "n m"]:
    """Return left @ right in float32, with the same bits whatever the blocks, threads and machine.

    A plain matmul adds in an order that depends on all three. Here the factors are put on grids by
    which every sum is exact (`on_grid`), and each entry is rounded once.
    """
    rows, columns = on_grid(left), on_grid(right.T).T
    out = torch.empty(left.shape[0], right.shape[1], device=left.device)
    step = max(1, BLOCK // max(1, out.shape[1]))
    scratch = torch.empty(step, out.shape[1], dtype=torch.float64, device=left.device)
    for begin in range(0, out.shape[0], step):
        part = rows[begin : begin + step]
        out[begin : begin + step] = torch.mm(part, columns, out=scratch[: len(part)])
    return out
