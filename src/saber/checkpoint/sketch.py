"""A few values of the weights that a plan edits, to tell whether another file holds the same weights.

A fingerprint says whether two checkpoints are bit for bit the same; a quantised file never is. A sketch
says whether it is the same matrix, seen through rounding: sampled values agree in direction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saber import artifacts
from saber.ablation import EditPlan
from saber.errors import DataError

KIND, SAMPLES, ALIKE = "weight-sketch", 64, 0.5
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Sketch:
    """Sampled values of the weights behind a plan's factors, before the edit."""

    samples: Mapping[str, Float[Tensor, " samples"]]
    """Name of the factor -> values at `positions` of the weight laid out (experts, d_model, d_in)."""

    def save(self, folder: Path) -> None:
        """Save to a folder."""
        artifacts.save(folder, KIND, dict(self.samples), {"samples": SAMPLES})

    @classmethod
    def load(cls, folder: Path) -> Sketch | None:
        """Load what `save` wrote; None where there is none."""
        if not (folder / artifacts.META).is_file():
            return None
        tensors, meta = artifacts.load(folder, KIND)
        if meta.get("samples") != SAMPLES:
            raise DataError(f"{folder} holds a sketch of {meta.get('samples')} samples.")
        return cls(tensors)


def positions(count: int) -> Int[Tensor, " samples"]:
    """Return `SAMPLES` flat positions in a weight of `count` values: a Weyl sequence, so that neither
    rows nor columns are met in step."""
    steps = torch.arange(1, SAMPLES + 1, dtype=torch.float64) * _GOLDEN
    return ((steps - steps.floor()) * count).long().clamp(max=count - 1)


def take(model: Any, plan: EditPlan) -> Sketch:
    """Sample the weights that a plan edits, from the model as it is now."""
    samples: dict[str, Tensor] = {}
    for name, factor in plan.factors.items():
        weight = model.get_parameter(factor.weight or f"{name}.weight").detach()
        laid = weight.movedim(factor.axis, -2) if weight.ndim > 1 else weight
        at = torch.unravel_index(positions(laid.numel()), laid.shape)
        samples[name] = laid[tuple(i.to(laid.device) for i in at)].float().cpu()
    return Sketch(samples)


def likeness(a: Float[Tensor, " samples"], b: Float[Tensor, " samples"]) -> float:
    """Return the cosine of two sets of samples: near 1 for the same weights through any rounding in
    use, near 0 for unrelated ones (standard deviation 1/8); from `ALIKE` on they count as the same."""
    scale = a.double().norm() * b.double().norm()
    return float(a.double() @ b.double() / scale) if scale > 0 else float(torch.equal(a, b))
