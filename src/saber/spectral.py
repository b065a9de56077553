"""Stage 2: the differences decomposed into several directions per layer, each scored held-out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from saber.linalg import (
    Auroc,
    LowRankNoise,
    auroc,
    benjamini_hochberg,
    d_prime,
    ledoit_wolf,
    orthonormal_basis,
    unit,
)
from saber.probing import Activations
from saber.prompts import numbered, paired

Method = Literal["means", "svd", "covariance"]


@dataclass(frozen=True)
class SpectralSpec:
    """How directions are taken from activations."""

    method: Method = "means"
    """means: the difference of the target and the neutral mean, one direction; svd: of the
    target-minus-neutral differences; covariance: whitened by within-class noise."""
    components: int = 1
    """Directions a layer and position, 1 or more."""
    depth_low: float = 0.0
    """First candidate layer, as a fraction of the depth, 0 to 1."""
    depth_high: float = 1.0
    """Last candidate layer, as a fraction of the depth, 0 to 1."""
    capability_weight: float = 0.1
    """Weight of the capability covariance in the noise, in units of the within-class one, >= 0."""
    resolve: Literal["energy", "means", "none"] = "none"
    """How patterns are kept off what neutral and capability prompts use. energy: shrunk in proportion
    to the energy of their streams; means: made orthogonal to the mean stream of the neutral prompts
    and of each capability category; none: not at all."""
    resolve_energy: float = 0.03
    """Energy of preserved streams at which half of a pattern's component is given up, in units of
    the squared distance between the target and the neutral mean, above 0 (resolve = energy)."""
    folds: int = 4
    """Folds of the cross-validation, 2 or more."""
    permutations: int = 500
    """Label permutations of the null."""


@dataclass(frozen=True)
class Direction:
    """A candidate direction of one layer and position."""

    layer: int
    """Decoder layer whose output it was found in, from 0."""
    position: int
    """Token it was found at, -1 the last before the answer."""
    component: int
    """Rank within its layer and position, from 0."""
    pattern: Float[Tensor, " d_model"]
    """What is written: the unit vector that an edit removes, pointing towards the targets."""
    detector: Float[Tensor, " d_model"]
    """What reads it: the vector whose scores separate the sets (Haufe et al. 2014)."""
    d_prime: float
    """Cross-validated separability, in standard deviations."""
    auroc: float
    """Cross-validated area under the ROC curve."""
    auroc_low: float
    """Lower end of its 95% interval."""
    auroc_high: float
    """Upper end."""
    p_value: float
    """Permutation p-value of the AUROC, one-sided."""
    q_value: float
    """Benjamini-Hochberg q-value over all candidates of the pass."""


class Kept(NamedTuple):
    """The capability prompts at one layer: what directions are to stay away from."""

    stream: Float[Tensor, "s d_model"]
    """Their streams, at the last prompt token and at answer tokens."""
    means: Float[Tensor, "c d_model"]
    """Their mean by category, out of which patterns are resolved."""


class _Fit(NamedTuple):
    patterns: Float[Tensor, "k d_model"]
    detectors: Float[Tensor, "k d_model"]


class _Twins(NamedTuple):
    fold_x: Int[Tensor, " n"]
    fold_y: Int[Tensor, " m"]
    partners: Int[Tensor, " n"]


def _twins(target: Activations, neutral: Activations, folds: int) -> _Twins:
    """Return each prompt's fold, and the neutral row that each target is paired with, or -1.

    Prompts that name no twin share a fold by their numbers, and are pairs where both sets have the same.
    """
    first = target.pairs or tuple(range(len(target.hidden)))
    second = neutral.pairs or tuple(range(len(neutral.hidden)))
    x, y = (torch.tensor(side) % folds for side in numbered(first, second))
    partners = torch.full((len(first),), -1)
    for row, other in paired(first, second):
        if first == second or isinstance(first[row], str):
            partners[row] = other
    return _Twins(x, y, partners)


def _kept(capability: Activations, layer: int) -> Kept:
    stream = capability.hidden[:, 0, layer + 1].double()
    names = capability.categories
    rows = [[i for i, name in enumerate(names) if name == one] for one in sorted(set(names))]
    return Kept(stream, torch.stack([stream[part].mean(0) for part in rows]))


def candidate_layers(layers: int, spec: SpectralSpec) -> list[int]:
    """Return the middle layers: floor(low L) to floor(high L), both ends in (22 of 35 on the card)."""
    low, high = int(spec.depth_low * layers), int(spec.depth_high * layers)
    return list(range(low, min(high, layers - 1) + 1))


def extract(
    target: Activations,
    neutral: Activations,
    spec: SpectralSpec,
    *,
    capability: Activations | None = None,
    generator: np.random.Generator,
) -> list[Direction]:
    """Return the candidate directions of all middle layers and positions, best separated first.

    A direction is fitted on all prompts given; its separability is cross-validated: each fold's
    scores come from a fit that has not seen the fold. Twins share a fold, whatever was left out of
    either set: the prompts that name each other or, where none does, those of equal index before
    anything was left out.
    """
    positions, depths = target.hidden.shape[1], target.hidden.shape[2]
    twins = _twins(target, neutral, spec.folds)
    found: list[Direction] = []
    for layer in candidate_layers(depths - 1, spec):
        kept = _kept(capability, layer) if capability is not None else None
        for offset in range(positions):
            x = target.hidden[:, offset, layer + 1].double()
            y = neutral.hidden[:, offset, layer + 1].double()
            found += _at(
                x, y, target.categories, kept, twins, layer, offset - positions, spec, generator
            )
    q_values = benjamini_hochberg(np.array([d.p_value for d in found]))
    found = [replace(d, q_value=float(q)) for d, q in zip(found, q_values, strict=True)]
    return sorted(found, key=rank)


def rank(direction: Direction) -> tuple[float, int, int, int]:
    """Return a key by which candidates are in order, best separated first."""
    return -direction.d_prime, direction.layer, direction.position, direction.component


def _at(
    x: Tensor,
    y: Tensor,
    categories: Sequence[str],
    capability: Kept | None,
    twins: _Twins,
    layer: int,
    position: int,
    spec: SpectralSpec,
    generator: np.random.Generator,
) -> list[Direction]:
    if not bool((torch.cat([x, y]) - y[0]).any()):
        return []  # nothing of the prompts has come here: the template alone is seen
    whole = fit(x, y, categories, spec, capability, twins.partners)
    scores_x, scores_y = _held_out_scores(
        x, y, categories, capability, spec, whole.detectors, twins
    )
    apart, curve = _separability(scores_x, scores_y, spec.permutations, generator)
    return [
        Direction(
            layer=layer,
            position=position,
            component=i,
            pattern=whole.patterns[i].float(),
            detector=whole.detectors[i].float(),
            d_prime=float(apart[i]),
            auroc=float(curve.value[i]),
            auroc_low=float(curve.low[i]),
            auroc_high=float(curve.high[i]),
            p_value=float(curve.p_value[i]),
            q_value=1.0,
        )
        for i in range(len(whole.patterns))
    ]


def _held_out_scores(
    x: Tensor,
    y: Tensor,
    categories: Sequence[str],
    capability: Kept | None,
    spec: SpectralSpec,
    whole: Float[Tensor, "k d_model"],
    twins: _Twins,
) -> tuple[Float[Tensor, "n k"], Float[Tensor, "m k"]]:
    """Score each prompt by fits without its fold, in units of the training spread.

    A column holds the scores of what is likest, in each fold, to a detector of the whole fit; NaN where
    a fold has none left for it. Which way a detector points is told by the fold's training prompts alone:
    the whole fit has seen the others.
    """
    out_x = torch.full((len(x), len(whole)), torch.nan, dtype=x.dtype)
    out_y = torch.full((len(y), len(whole)), torch.nan, dtype=y.dtype)
    for fold in range(spec.folds):
        in_x, in_y = twins.fold_x != fold, twins.fold_y != fold
        part = [c for c, keep in zip(categories, in_x.tolist(), strict=True) if keep]
        # A pair is in a fold as a whole, so the partner of what is left is there too.
        partners = twins.partners[in_x]
        partners = torch.where(partners < 0, partners, (in_y.cumsum(0) - 1)[partners])
        fitted = fit(x[in_x], y[in_y], part, spec, capability, partners)
        mine, theirs = _matched(whole, fitted.detectors)
        w = fitted.detectors[theirs].T
        train = torch.cat([x[in_x] @ w, y[in_y] @ w])
        centre, spread = train.mean(0), train.std(0).clamp_min(1e-30)
        out_x[(~in_x).nonzero(), mine] = (x[~in_x] @ w - centre) / spread
        out_y[(~in_y).nonzero(), mine] = (y[~in_y] @ w - centre) / spread
    return out_x, out_y


def _matched(
    whole: Float[Tensor, "k d_model"], part: Float[Tensor, "j d_model"]
) -> tuple[Tensor, Tensor]:
    """Return the rows of both that belong together: one to one, with the largest sum of |cosine|."""
    alike = (unit(whole) @ unit(part).T).abs().nan_to_num()
    mine, theirs = linear_sum_assignment(alike.numpy(), maximize=True)
    return torch.from_numpy(mine), torch.from_numpy(theirs)


def _separability(
    x: Float[Tensor, "n k"],
    y: Float[Tensor, "m k"],
    permutations: int,
    generator: np.random.Generator,
) -> tuple[Tensor, Auroc]:
    """Return d' and AUROC of each column without its NaN; chance where fewer than two scores are left."""
    if not bool(torch.cat([x, y]).isnan().any()):
        curve = auroc(x.numpy(), y.numpy(), permutations=permutations, generator=generator)
        return d_prime(x, y), curve
    found = []
    for i in range(x.shape[1]):
        a, b = (s[~s[:, i].isnan(), i : i + 1] for s in (x, y))
        if min(len(a), len(b)) < 2:
            half, none, one = np.full(1, 0.5), np.zeros(1), np.ones(1)
            found.append((torch.zeros(1), Auroc(half, none, one, one)))
        else:
            found.append(_separability(a, b, permutations, generator))
    names = [f.name for f in fields(Auroc)]
    joined = {n: np.concatenate([getattr(curve, n) for _, curve in found]) for n in names}
    return torch.cat([apart for apart, _ in found]), Auroc(**joined)


def fit(
    x: Float[Tensor, "n d_model"],
    y: Float[Tensor, "m d_model"],
    categories: Sequence[str],
    spec: SpectralSpec,
    capability: Kept | None = None,
    partners: Int[Tensor, " n"] | None = None,
) -> _Fit:
    """Return up to `components` patterns and detectors, both pointing from neutral to target.

    means: the difference of the means, which detects itself (Marks and Tegmark 2023, arXiv
    2310.06824).

    svd: right singular vectors of the differences between each target and the row of y that
    `partners` has for it, or the neutral mean where that is -1; without `partners` row by row, or all
    with the mean when the counts differ. A pattern detects itself.

    With `resolve`, patterns then keep off the streams of neutral and capability prompts, see
    `shrunk`. Detectors stay as they are, and so does the separability.

    covariance: anchor a = mean neutral; M = [sqrt(pi_k) (mu_k - a)] over the targets' categories;
    N = shrunk within-class covariance + weight x capability covariance. Eigenpairs of M^T N^-1 M
    with vectors q and values s^2 give detectors N^-1 M q / s and patterns M q / s, biorthogonal.
    """
    if spec.method == "means":
        patterns = detectors = unit(x.mean(0) - y.mean(0))[None]
    elif spec.method == "svd":
        if partners is None:
            partners = torch.arange(len(x)) if len(x) == len(y) else torch.full((len(x),), -1)
        differences = x - torch.where(partners[:, None] < 0, y.mean(0), y[partners])
        _, _, right = torch.linalg.svd(differences, full_matrices=False)
        patterns = right[: spec.components]
        detectors = patterns
    else:
        stream = None if capability is None else capability.stream
        patterns, detectors = _covariance_aware(x, y, categories, spec, stream)
    sign = torch.sign((x.mean(0) - y.mean(0)) @ detectors.T)
    sign[sign == 0] = 1
    if spec.resolve == "energy":
        kept = [y] if capability is None else [y, capability.stream]
        gap = (x.mean(0) - y.mean(0)).pow(2).sum()
        patterns = shrunk(patterns, kept, float(spec.resolve_energy * gap))
    elif spec.resolve == "means":
        means = [y.mean(0)[None]] if capability is None else [y.mean(0)[None], capability.means]
        basis = orthonormal_basis(torch.cat(means))
        patterns = patterns - patterns @ basis.T @ basis
    return _Fit(unit(patterns * sign[:, None]), detectors * sign[:, None])


def shrunk(
    patterns: Float[Tensor, "k d_model"], kept: Sequence[Float[Tensor, "_ d_model"]], energy: float
) -> Float[Tensor, "k d_model"]:
    """Return (I + S / energy)^-1 v for each pattern v, S the sum of the sets' second moments.

    It is the u that minimises |u - v|^2 + u^T S u / energy: near to v, and small on what the sets'
    streams contain, their means included. Along an eigenvector of S with value s a component falls
    to energy / (energy + s) of itself, the Wiener gain.
    """
    rows = torch.cat([x / len(x) ** 0.5 for x in kept])
    ridge = max(energy, 1e-9 * float(rows.pow(2).sum()) / len(rows))
    return ridge * LowRankNoise(rows, ridge).solve(patterns.T).T


def _covariance_aware(
    x: Tensor, y: Tensor, categories: Sequence[str], spec: SpectralSpec, capability: Tensor | None
) -> tuple[Tensor, Tensor]:
    anchor = y.mean(0)
    names = sorted(set(categories))
    index = torch.tensor([names.index(c) for c in categories])
    means = torch.stack([x[index == k].mean(0) for k in range(len(names))])
    share = torch.bincount(index, minlength=len(names)).to(x) / len(x)
    between = (share.sqrt()[:, None] * (means - anchor)).T
    within = torch.cat([x - means[index], y - anchor])
    noise = noise_model(within, capability, spec.capability_weight)
    whitened = noise.solve(between)
    values, vectors = torch.linalg.eigh(between.T @ whitened)
    order = torch.argsort(values, descending=True)[: spec.components]
    order = order[values[order] > 1e-9 * values[order[0]].clamp_min(1e-30)]
    scale = values[order].clamp_min(1e-30).sqrt()
    q = vectors[:, order] / scale
    return (between @ q).T, (whitened @ q).T


def noise_model(
    within: Float[Tensor, "n d_model"], capability: Float[Tensor, "s d_model"] | None, weight: float
) -> LowRankNoise:
    """Return N = (1 - h) S + h (tr S / d) I + weight x S_cap, h by Ledoit and Wolf, S_cap scaled to tr S."""
    n, d = within.shape
    h = ledoit_wolf(within)
    trace = within.pow(2).sum() / n
    parts = [within * ((1 - h) / n) ** 0.5]
    if capability is not None and weight > 0:
        centred = capability - capability.mean(0)
        cap_trace = centred.pow(2).sum().clamp_min(1e-30)
        parts.append(centred * (weight * trace / cap_trace).sqrt())
    return LowRankNoise(torch.cat(parts), float(max(h, 1e-4) * trace / d))


def stacked_patterns(directions: Sequence[Direction]) -> Float[Tensor, "k d_model"]:
    """Return the orthonormal basis that some directions span."""
    return orthonormal_basis(torch.stack([d.pattern for d in directions]))
