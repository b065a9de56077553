"""Pure tensor mathematics: bases, shrinkage, low-rank solves, and held-out separability."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import norm, rankdata
from torch import Tensor


def unit(x: Float[Tensor, "*batch d"], eps: float = 1e-12) -> Float[Tensor, "*batch d"]:
    """Scale vectors to Euclidean length one (zero stays zero)."""
    return x / x.norm(dim=-1, keepdim=True).clamp_min(eps)


def orthonormal_basis(rows: Float[Tensor, "n d"], tolerance: float = 1e-6) -> Float[Tensor, "k d"]:
    """Return an orthonormal basis of the row space, `k <= n`, singular values below tolerance dropped."""
    if rows.shape[0] == 0:
        return rows
    _, values, right = torch.linalg.svd(rows, full_matrices=False)
    return right[values > tolerance * values[0].clamp_min(1e-30)]


def principal_components(x: Float[Tensor, "n d"], k: int) -> Float[Tensor, "k d"]:
    """Return the top `k` centred principal directions of the rows of `x`, orthonormal, or all there are."""
    centred = x - x.mean(0)
    _, values, right = torch.linalg.svd(centred, full_matrices=False)
    # What is left of n rows about their mean spans n - 1 dimensions at most; the rest is any direction.
    return right[:k][values[:k] > 1e-6 * values[0].clamp_min(1e-30)]


def ledoit_wolf(x: Float[Tensor, "n d"]) -> float:
    """Return the Ledoit-Wolf shrinkage in [0, 1] of centred samples towards (tr S / d) I.

    Computed from the n x n Gram matrix, so that d may be large. Ledoit and Wolf (2004), eq. 14.
    """
    n, d = x.shape
    gram = x.double() @ x.double().T
    mu = gram.diagonal().sum() / (n * d)
    squared = (gram**2).sum() / n**2
    delta = squared / d - mu**2
    beta = ((gram.diagonal() ** 2).sum() / n - squared) / (n * d)
    return float((beta / delta.clamp_min(1e-30)).clamp(0, 1))


@dataclass(frozen=True)
class LowRankNoise:
    """The matrix N = Z^T Z + ridge I, kept as its factor; solves in the smaller of both spaces."""

    factor: Float[Tensor, "m d"]
    """Z: rows whose outer products sum to the structured part of N."""
    ridge: float
    """Weight of the identity, in squared activation units, above zero."""

    def solve(self, rhs: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
        """Return N^-1 rhs: by N itself, or by Woodbury of fewer samples than dimensions, `m` below `d`.

        N^-1 = (I - Z^T (ridge I + Z Z^T)^-1 Z) / ridge.
        """
        z = self.factor
        few = z.shape[0] < z.shape[1]
        inner = z @ z.T if few else z.T @ z
        inner.diagonal().add_(self.ridge)
        chol = torch.linalg.cholesky(inner)
        if not few:
            return torch.cholesky_solve(rhs, chol)
        return (rhs - z.T @ torch.cholesky_solve(z @ rhs, chol)) / self.ridge


def d_prime(positive: Float[Tensor, n * k], negative: Float[Tensor, m * k]) -> Float[Tensor, "*k"]:
    """Return (mean_+ - mean_-) / sqrt((var_+ + var_-) / 2) along the first axis (Green & Swets)."""
    spread = ((positive.var(0) + negative.var(0)) / 2).clamp_min(1e-30).sqrt()
    return (positive.mean(0) - negative.mean(0)) / spread


@dataclass(frozen=True)
class Auroc:
    """Area under the ROC curve of scores, with its interval and permutation p-value."""

    value: np.ndarray
    """P(score of a target > score of a neutral), per column."""
    low: np.ndarray
    """Lower end of the 95% score interval (variance by Hanley & McNeil 1982)."""
    high: np.ndarray
    """Upper end of the 95% interval."""
    p_value: np.ndarray
    """One-sided permutation p-value, (1 + hits) / (1 + permutations), per column."""


def auroc(
    positive: np.ndarray, negative: np.ndarray, *, permutations: int, generator: np.random.Generator
) -> Auroc:
    """Return AUROC per column of `positive (n, k)` against `negative (m, k)`.

    The null permutes the labels; as the statistic is the rank sum, one ranking serves all
    permutations. Raises ValueError when a side is empty.
    """
    n, m = len(positive), len(negative)
    if not n or not m:
        raise ValueError("both sides need at least one score")
    ranks = rankdata(np.concatenate([positive, negative]), axis=0)
    offset, pairs = n * (n + 1) / 2, n * m
    value = (ranks[:n].sum(0) - offset) / pairs
    labels = np.zeros((permutations, n + m))
    for row in labels:
        row[generator.permutation(n + m)[:n]] = 1
    null = (labels @ ranks - offset) / pairs
    p_value = (1 + (null >= value - 1e-12).sum(0)) / (1 + permutations)
    low = _auroc_bound(value, n, m, -1)
    return Auroc(value, low, _auroc_bound(value, n, m, +1), p_value)


def _auroc_bound(value: np.ndarray, n: int, m: int, side: int) -> np.ndarray:
    """Return the a at which |value - a| is z standard errors of an AUROC of a, by bisection.

    The score interval (Newcombe 2006, method 5) keeps a sensible width at an AUROC of one.
    """
    z = norm.ppf(0.975)
    near, far = value.astype(float), np.full_like(value, 1.0 if side > 0 else 0.0, dtype=float)
    for _ in range(60):
        middle = (near + far) / 2
        q1, q2 = middle / (2 - middle), 2 * middle**2 / (1 + middle)
        variance = middle * (1 - middle) + (n - 1) * (q1 - middle**2) + (m - 1) * (q2 - middle**2)
        inside = np.abs(value - middle) <= z * np.sqrt(np.maximum(variance / (n * m), 0))
        near, far = np.where(inside, middle, near), np.where(inside, far, middle)
    return near


def benjamini_hochberg(p_values: np.ndarray) -> np.ndarray:
    """Return q-values: the least false discovery rate at which each test is rejected (1995)."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p)[::-1]
    scaled = p[order] * len(p) / np.arange(len(p), 0, -1)
    q = np.empty_like(p)
    q[order] = np.minimum.accumulate(np.minimum(scaled, 1.0))
    return q


def log_odds(p: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Return log(p / (1 - p)) in nats, with p held within 1e-6 of the ends."""
    p = p.clamp(1e-6, 1 - 1e-6)
    return torch.log(p) - torch.log1p(-p)


def accumulated_removal(
    directions: Float[Tensor, "k d"], strengths: Float[Tensor, " k"]
) -> tuple[Float[Tensor, "r d"], Float[Tensor, "r r"]]:
    """Return an orthonormal Q and symmetric S such that I - Q^T S Q keeps what is left of a stream.

    Starting from K = I, each direction r takes its share a of what K still lets through along it:
    K <- K^(1/2) (I - a u u^T) K^(1/2), u the unit vector along K^(1/2) r. One direction taken
    several times leaves (1 - a)^n, as successive passes do; at a = 1 the span of all directions is
    gone whatever their angles, which a plain product of projections does not achieve; and the order
    matters only in so far as strengths are below one. S = I - K in the coordinates of Q.
    """
    q = orthonormal_basis(directions)
    kept = torch.eye(q.shape[0], dtype=directions.dtype, device=directions.device)
    for r, share in zip(directions @ q.T, strengths, strict=True):
        values, vectors = torch.linalg.eigh(kept)
        root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
        u = root @ r
        if float(u @ u) < 1e-6 * float(r @ r):
            continue  # nothing is left of it
        step = root @ unit(u)
        kept = kept - share * torch.outer(step, step)
        kept = (kept + kept.T) / 2
    return q, torch.eye(q.shape[0], dtype=kept.dtype, device=kept.device) - kept


def finite(value: float) -> float | None:
    """Return the number, or None where JSON has no word for it."""
    return float(value) if math.isfinite(value) else None
