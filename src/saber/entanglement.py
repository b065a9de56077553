"""Stage 3: how much of each direction the model's capabilities use; purity = 1 - entanglement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from saber.linalg import principal_components
from saber.probing import Activations
from saber.spectral import Direction

Measure = Literal["overlap", "energy"]


@dataclass(frozen=True)
class EntanglementSpec:
    """How entanglement is measured."""

    measure: Measure = "energy"
    """overlap: with the capability subspace (the card's); energy: Wiener ratio of energies."""
    components: int = 10
    """Principal components of a capability subspace, 1 or more."""
    weight: float = 0.5
    """lambda: weight of capability energy against the behaviour's own, >= 0 (energy only)."""
    null_draws: int = 200
    """Random directions of the covariance-matched null."""


@dataclass(frozen=True)
class Entanglement:
    """The entanglement of one direction."""

    by_category: Mapping[str, float]
    """0 (capabilities do not use it) to 1, per capability category, by the chosen measure."""
    overlap: Mapping[str, float]
    """Squared overlap with each category's subspace, whatever the measure."""
    worst_category: str
    """The category that decides."""
    worst: float
    """Its entanglement."""
    null_percentile: float
    """Share of covariance-matched random directions whose worst overlap is lower, 0 to 1."""

    @property
    def purity(self) -> float:
        """1 - entanglement of the worst category."""
        return 1.0 - self.worst


def entangle(
    directions: Sequence[Direction],
    target: Activations,
    neutral: Activations,
    capability: Activations,
    spec: EntanglementSpec,
    *,
    generator: torch.Generator,
) -> list[Entanglement]:
    """Measure every direction against every capability category at its own layer.

    overlap of category c: |C_c v|^2, C_c the top principal components of its activations.
    energy: lambda e_c / (s + lambda e_c) with e_c the variance of v.x within the category and
    s = (v.(mu_target - mu_neutral))^2, so that purity is the Wiener ratio s / (s + lambda e).
    """
    names = sorted(set(capability.categories))
    member = {c: torch.tensor([x == c for x in capability.categories]) for c in names}
    layers = sorted({d.layer for d in directions})
    results: dict[int, Entanglement] = {}
    for layer in layers:
        cap = capability.hidden[:, 0, layer + 1]
        groups = {c: cap[member[c]] for c in names}
        subspaces = {c: principal_components(g, spec.components) for c, g in groups.items()}
        null = _null_overlaps(target, neutral, cap, subspaces, layer, spec.null_draws, generator)
        for index, direction in enumerate(directions):
            if direction.layer != layer:
                continue
            v = direction.pattern
            overlap = {c: float((basis @ v).pow(2).sum()) for c, basis in subspaces.items()}
            by_category = overlap
            if spec.measure == "energy":
                gap = target.hidden[:, direction.position, layer + 1].mean(0)
                gap = gap - neutral.hidden[:, direction.position, layer + 1].mean(0)
                signal = float((v @ gap) ** 2)
                by_category = {
                    c: _wiener(signal, spec.weight * _variance(g, v)) for c, g in groups.items()
                }
            worst = max(sorted(by_category.items()), key=itemgetter(1))[0]
            lower = float((null < max(overlap.values())).float().mean())
            results[index] = Entanglement(by_category, overlap, worst, by_category[worst], lower)
    return [results[i] for i in range(len(directions))]


def _variance(x: Float[Tensor, "n d_model"], v: Float[Tensor, " d_model"]) -> float:
    return float((x @ v).var(unbiased=False))


def _wiener(signal: float, cost: float) -> float:
    """Return the entangled share cost / (signal + cost), 0 where both vanish."""
    total = signal + cost
    return cost / total if total > 0 else 0.0


def _null_overlaps(
    target: Activations,
    neutral: Activations,
    capability: Tensor,
    subspaces: Mapping[str, Tensor],
    layer: int,
    draws: int,
    generator: torch.Generator,
) -> Float[Tensor, " draws"]:
    """Worst overlaps of random directions drawn with the covariance of all activations."""
    pools = [target.hidden[:, -1, layer + 1], neutral.hidden[:, -1, layer + 1], capability]
    pool = torch.cat([p - p.mean(0) for p in pools])
    random = torch.randn(draws, len(pool), generator=generator) @ pool
    random = random / random.norm(dim=1, keepdim=True).clamp_min(1e-30)
    return torch.stack([(random @ b.T).pow(2).sum(1) for b in subspaces.values()]).amax(0)
