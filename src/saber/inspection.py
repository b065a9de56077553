"""What is known of a model's residual writers, with the proof that the list is complete."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from saber.ablation import Removal, applied, orthogonal
from saber.errors import UnprovenWriter
from saber.linalg import unit
from saber.lm.forward import TOKENS_PER_BATCH
from saber.lm.model import LanguageModel
from saber.lm.search import LAW_LIMIT
from saber.lm.substitution import Call, benched, layer_calls
from saber.lm.writers import (
    Writer,
    ablated_law,
    find_writers,
    law_limit,
    written_along,
    zeroed_law,
)
from saber.moments import moment_bytes


def inspect(lm: LanguageModel) -> dict[str, Any]:
    """Return layers, writers, both laws' residuals, and whether they prove the list complete.

    A model whose writers cannot be proved is reported with the reason and what was found of it.
    """
    reason = ""
    try:
        writers = find_writers(replace(lm, allow_unproven=False))
    except UnprovenWriter as error:
        writers, reason = find_writers(replace(lm, allow_unproven=True)), str(error)
    zeroed = zeroed_law(lm, writers)
    shares = shares_left(lm, writers)
    ablated = max(shares)
    carried = next((w for w in writers if w.carried), None)
    if carried is not None and not reason:
        reason = (
            f"layer {carried.layer} passes the stream through {carried.carried} in place: no writer "
            f"writes an edited direction, but up to {ablated:.0%} of it can come back that way."
        )
    limit = law_limit(lm)
    if ablated >= limit and not reason:
        reason = str(UnprovenWriter("ablated", _worst(shares), ablated, limit, lm.layers_path))
    return {
        "model_type": lm.model.config.model_type,
        "layers": len(lm.layers),
        "layers_path": lm.layers_path,
        "d_model": lm.d_model,
        "parameters": sum(p.numel() for p in lm.model.parameters()),
        "stored_dtype": str(lm.stored_dtype).removeprefix("torch."),
        "compute_dtype": str(lm.dtype).removeprefix("torch."),
        "memory": memory(lm, writers),
        "writers": [_row(w) for w in writers],
        "coverage": _coverage(lm, writers),
        "laws": {"zeroed": zeroed, "ablated": ablated},
        "proved": bool(writers) and not reason and zeroed < LAW_LIMIT and ablated < limit,
        "reason": reason,
        "notes": list(lm.notes),
    }


def shares_left(lm: LanguageModel, writers: Sequence[Writer]) -> list[float]:
    """Return for each layer the share of a random direction that a full edit leaves in what it writes.

    r.out for a stream that goes in without r, root mean square over tokens, after the edit relative
    to before; 0 where nothing is left, 1 where the edit did nothing. Of a model in 16 bits each layer is
    asked in float32: the rounding of the stream would hide what is left.
    """
    direction = unit(torch.randn(lm.d_model, generator=torch.Generator().manual_seed(0)))
    if lm.dtype.itemsize == 2:
        calls = zip(lm.layers, layer_calls(lm), strict=True)
        return [_share_left(lm, writers, layer, call, direction) for layer, call in calls]
    before = ablated_law(lm, direction)
    with applied(lm.model, orthogonal(lm, writers, [Removal(direction, 1.0, 0)], "all")):
        after = ablated_law(lm, direction)
    return [a / max(b, 1e-30) for a, b in zip(after, before, strict=True)]


def _share_left(
    lm: LanguageModel, writers: Sequence[Writer], layer: nn.Module, call: Call, direction: Tensor
) -> float:
    inside = {id(p) for p in layer.parameters()}
    own = [w for w in writers if id(lm.model.get_parameter(w.weight)) in inside]
    with benched(layer, call) as bench:
        before = written_along(layer, bench.call, direction)
        with applied(lm.model, orthogonal(lm, own, [Removal(direction, 1.0, 0)], "all")):
            return written_along(layer, bench.call, direction) / max(before, 1e-30)


def require_ablated(lm: LanguageModel, writers: Sequence[Writer]) -> None:
    """Raise `UnprovenWriter` when a full edit of a direction leaves some of it in what a layer writes.

    Not asked of a stream that passes a gain in place, as no edit can keep the law there, nor under
    `allow_unproven`.
    """
    if lm.allow_unproven or any(w.carried for w in writers):
        return
    shares, limit = shares_left(lm, writers), law_limit(lm)
    layer = _worst(shares)
    if shares[layer] > limit:
        raise UnprovenWriter("ablated", layer, shares[layer], limit, lm.layers_path)


def _worst(shares: Sequence[float]) -> int:
    return max(range(len(shares)), key=lambda i: shares[i])


def memory(lm: LanguageModel, writers: Sequence[Writer]) -> dict[str, int]:
    """Return estimates in bytes of what probing and editing hold in memory at their peak.

    Probing: the weights, and the activations of one batch of tokens. Editing: the weights, a copy of
    the writers so that the edit can be undone, and the largest writer twice in float32. Offloaded: the same
    as probing with one layer at a time. Moments: the second moments of a selective edit, in main memory, of
    all writers at once, and at the least, where they are read one after the other.
    """
    weights = sum(p.numel() * p.element_size() for p in lm.model.parameters())
    layers = [sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in lm.layers]
    moments = [moment_bytes(lm, writer) for writer in writers]
    sizes = [lm.model.get_parameter(w.weight) for w in writers]
    activations = 4 * TOKENS_PER_BATCH * lm.d_model * (len(lm.layers) + 16)
    copies = sum(p.numel() * p.element_size() for p in sizes)
    largest = max((4 * p.numel() for p in sizes), default=0)
    return {
        "probe": weights + activations,
        "edit": weights + copies + 2 * largest,
        "offloaded": weights - sum(layers) + max(layers) + activations,
        "moments": sum(moments),
        "moments_least": max(moments, default=0),
    }


def _coverage(lm: LanguageModel, writers: Sequence[Writer]) -> dict[str, Any]:
    """Return in how many layers writers were found, and their share of the layers' parameters."""
    total = sum(p.numel() for p in lm.layers.parameters())
    written = sum(lm.model.get_parameter(w.weight).numel() for w in writers)
    return {"layers": len({w.layer for w in writers}), "share": written / max(total, 1)}


def _row(writer: Writer) -> dict[str, Any]:
    gain = None
    if writer.gain is not None:
        gain = writer.convention or f"measured, sd {float(writer.gain.std()):.3f}"
    return {
        "name": writer.weight,
        "disk": list(writer.disk),
        "layer": writer.layer,
        "kind": writer.kind,
        "axis": writer.axis,
        "bias": writer.bias,
        "experts": writer.experts,
        "gain": gain,
        "scale": writer.scale,
    }
