"""What is known of a model's residual writers, with the proof that the list is complete."""

from __future__ import annotations

from typing import Any

import torch

from saber.ablation import Removal, applied, orthogonal
from saber.errors import UnprovenWriter
from saber.linalg import unit
from saber.lm.model import LanguageModel
from saber.lm.writers import LAW_LIMIT, LOW_PRECISION_LIMIT, ablated_law, find_writers, zeroed_law


def inspect(lm: LanguageModel) -> dict[str, Any]:
    """Return layers, writers, both laws' residuals, and whether they prove the list complete."""
    try:
        writers = find_writers(lm)
        zeroed = zeroed_law(lm, writers)
    except UnprovenWriter as error:
        writers, zeroed = [], error.residual
    direction = unit(torch.randn(lm.d_model, generator=torch.Generator().manual_seed(0)))
    before = ablated_law(lm, direction)
    with applied(lm.model, orthogonal(lm, writers, [Removal(direction, 1.0, 0)], "all")):
        after = ablated_law(lm, direction)
    ablated = max(a / max(b, 1e-30) for a, b in zip(after, before, strict=True))
    limit = LAW_LIMIT if lm.dtype == torch.float32 else LOW_PRECISION_LIMIT
    return {
        "model_type": lm.model.config.model_type,
        "layers": len(lm.layers),
        "d_model": lm.d_model,
        "parameters": sum(p.numel() for p in lm.model.parameters()),
        "compute_dtype": str(lm.dtype).removeprefix("torch."),
        "writers": [
            {
                "name": w.weight,
                "layer": w.layer,
                "kind": w.kind,
                "axis": w.axis,
                "bias": w.bias is not None,
                "gain": None if w.gain is None else f"sd {float(w.gain.std()):.3f}",
            }
            for w in writers
        ],
        "laws": {"zeroed": zeroed, "ablated": ablated},
        "proved": bool(writers) and zeroed < limit and ablated < limit,
    }
