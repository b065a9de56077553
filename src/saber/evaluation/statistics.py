"""Intervals and paired tests for what is measured: rates, mean differences, perplexity ratios."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import binomtest

from saber.errors import DataError

Statistic = Literal["mean", "perplexity_ratio"]
Values = Sequence[float] | Sequence[int] | np.ndarray
COUNTS = 2**24
"""How often each item is drawn is in memory for so many items and resamples at a time."""


@dataclass(frozen=True)
class Proportion:
    """A rate with its Wilson score interval."""

    rate: float
    """successes / n, in [0, 1]."""
    low: float
    """Lower bound, in [0, rate]."""
    high: float
    """Upper bound, in [rate, 1]."""
    n: int
    """How many items were judged, at least 1."""
    successes: int
    """How many of them showed the property, in [0, n]."""


@dataclass(frozen=True)
class McNemar:
    """The exact McNemar test of one property on the same items before and after."""

    b: int
    """Items that had the property before and not after."""
    c: int
    """Items that had it after and not before."""
    p_value: float
    """Two-sided p-value of equal marginal rates, in (0, 1]."""


@dataclass(frozen=True)
class Interval:
    """An estimate with a percentile bootstrap interval."""

    estimate: float
    """The statistic on all items, in its own unit."""
    low: float
    """Lower bound, same unit."""
    high: float
    """Upper bound, same unit."""


def wilson(successes: int, n: int, confidence: float = 0.95) -> Proportion:
    """Return a rate with its Wilson score interval.

    (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), with p = successes / n and z the
    normal quantile of (1 + confidence) / 2; dimensionless. DataError: no items, or successes
    outside [0, n]. Wilson (1927); Brown, Cai and DasGupta (2001) for its coverage at small n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise DataError(f"there is no rate of {successes} out of {n} items.")
    bounds = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    rate = successes / n
    low, high = min(float(bounds.low), rate), max(float(bounds.high), rate)
    return Proportion(rate, low, high, n, successes)


def mcnemar_exact(before: Sequence[bool], after: Sequence[bool]) -> McNemar:
    """Test whether a property's rate changed between two measurements of the same items.

    p = min(1, 2 P(Binomial(b + c, 1/2) <= min(b, c))), and 1 if nothing changed; dimensionless.
    DataError: unequal lengths. McNemar (1947), in its exact binomial form.
    """
    _check_paired(len(before), len(after))
    pairs = list(zip(before, after, strict=True))
    b = sum(bool(x) and not y for x, y in pairs)
    c = sum(bool(y) and not x for x, y in pairs)
    p_value = float(binomtest(min(b, c), b + c, 0.5).pvalue) if b + c else 1.0
    return McNemar(b, c, min(1.0, p_value))


def paired_bootstrap(
    before: Values,
    after: Values,
    *,
    tokens: Values | None = None,
    statistic: Statistic = "mean",
    n_resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Compare two measurements of the same items, resampling items and keeping pairs together.

    With x_i before and y_i after, each the sum over an item's w_i tokens (default 1), and
    D = sum(y - x) / sum(w): `mean` is D, in the unit of the values; `perplexity_ratio` is
    exp(D), perplexity after over before, for negative log-likelihoods in nats. Bounds are
    percentiles over `n_resamples` draws. DataError: unequal lengths, no items, no tokens.
    Efron and Tibshirani (1993), chapters 8 and 13.
    """
    _check_paired(len(before), len(after))
    w = np.ones(len(before)) if tokens is None else np.asarray(tokens, dtype=np.float64)
    _check_paired(len(before), len(w))
    n = len(w)
    if n == 0 or not np.all(w > 0):
        raise DataError("a paired comparison needs at least one item, and tokens in each.")
    change = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    draws = np.empty(n_resamples)
    rng, shares, step = np.random.default_rng(seed), np.full(n, 1 / n), max(1, COUNTS // n)
    for start in range(0, n_resamples, step):
        counts = rng.multinomial(n, shares, size=min(step, n_resamples - start))
        draws[start : start + len(counts)] = (counts @ change) / (counts @ w)
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    estimate = change.sum() / w.sum()
    if statistic == "perplexity_ratio":
        estimate, low, high = np.exp(estimate), np.exp(low), np.exp(high)
    return Interval(float(estimate), float(low), float(high))


def bootstrap_mean(values: Values, *, n_resamples: int = 2000, seed: int = 0) -> Interval:
    """Return the mean of one value an item with its 95% percentile interval, in the values' unit.

    DataError: no items. Efron and Tibshirani (1993), chapter 13.
    """
    return paired_bootstrap(np.zeros(len(values)), values, n_resamples=n_resamples, seed=seed)


def _check_paired(n_before: int, n_after: int) -> None:
    if n_before != n_after:
        raise DataError(
            f"paired measurements need the same items: {n_before} are not {n_after}.",
            "Measure both models on the same prompts.",
        )
