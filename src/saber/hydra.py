"""Self-repair: how far writers that were not edited take over what the edited ones wrote."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from saber.ablation import EditPlan, applied
from saber.lm.chat import encode
from saber.lm.forward import forward
from saber.lm.model import LanguageModel
from saber.lm.routing import one_call
from saber.lm.writers import Writer


@dataclass(frozen=True)
class Compensation:
    """kappa: share of the removed contribution that unedited writers put back, with its interval."""

    estimate: float
    """0: nothing comes back; 1: all of it does; below 0: the removal is amplified."""
    low: float
    """2.5% quantile of the bootstrap over prompt pairs."""
    high: float
    """97.5% quantile."""


def compensation(
    lm: LanguageModel,
    writers: Sequence[Writer],
    before: EditPlan,
    after: EditPlan,
    direction: Float[Tensor, " d_model"],
    target: Sequence[str],
    neutral: Sequence[str],
    *,
    generator: np.random.Generator,
    pairs: Sequence[tuple[int, int]] = (),
    resamples: int = 1000,
) -> Compensation | None:
    """Return kappa = sum_unedited (D_post - D_pre) / sum_edited (D_pre - D_frozen), or None.

    D is a writer's target-minus-neutral contribution along `direction` at the last prompt token;
    frozen means the edited weights on the inputs from before. Edited writers are those whose
    contribution that changes; experts, embeddings, and weights whose module does not show all tokens in one
    call are left out. `pairs` holds the rows of a
    target and of its neutral twin; without any they are paired row by row. None when no writer is left
    unedited or nothing was removed (McGrath et al. 2023, arXiv 2307.15771; Rushing and Nanda 2024,
    arXiv 2402.15390).
    """
    writers = one_call(lm, [w for w in writers if w.layer >= 0])
    if not writers:
        return None
    texts = [*target, *neutral]
    with applied(lm.model, before):
        pre, inputs = _contributions(lm, writers, texts, direction)
    frozen = _frozen(writers, pre, inputs, before, after, direction)
    touched = np.abs(frozen - pre).mean(0)
    edited = touched > 1e-3 * max(float(np.abs(pre).mean()), 1e-12)
    if not edited.any() or edited.all():
        return None
    with applied(lm.model, after):
        post, _ = _contributions(lm, writers, texts, direction)
    n = len(target)
    mine, theirs = zip(*(pairs or zip(range(n), range(len(neutral)), strict=False)), strict=True)

    def gap(values: np.ndarray) -> np.ndarray:
        """Per prompt pair: the target's contribution minus the neutral's; (pairs, writers)."""
        return values[list(mine)] - values[n + np.array(theirs)]

    back = (gap(post) - gap(pre))[:, ~edited].sum(1)
    removed = (gap(pre) - gap(frozen))[:, edited].sum(1)
    if abs(removed.mean()) < 1e-9:
        return None
    picks = generator.integers(0, len(back), (resamples, len(back)))
    ratios = back[picks].mean(1) / removed[picks].mean(1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Compensation(float(back.mean() / removed.mean()), float(low), float(high))


def _read_vector(writer: Writer, direction: Tensor) -> Tensor:
    return writer.read(direction[None])[0]


def _contributions(
    lm: LanguageModel, writers: Sequence[Writer], texts: Sequence[str], direction: Tensor
) -> tuple[np.ndarray, dict[str, Tensor]]:
    """Return each writer's contribution (texts, writers) at the last token, and its inputs there."""
    encoded = encode(lm, texts)
    values = np.zeros((len(texts), len(writers)))
    inputs: dict[str, Tensor] = {}
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def record(name: str) -> Any:
        def hook(_m: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            seen[name] = (args[0], output)

        return hook

    with ExitStack() as stack:
        for writer in writers:
            module = lm.model.get_submodule(writer.name)
            stack.callback(module.register_forward_hook(record(writer.name)).remove)
        for batch, _ in forward(lm, [e.ids for e in encoded], [[] for _ in encoded]):
            last = torch.tensor([length - 1 for length in batch.lengths])
            line = torch.arange(len(last))
            for column, writer in enumerate(writers):
                given, output = seen[writer.name]
                out = output.reshape(len(last), -1, output.shape[-1])[line, last].float().cpu()
                read = _read_vector(writer, direction)
                scale = 1.0 if writer.gain is None else out.pow(2).mean(-1).sqrt().clamp_min(1e-12)
                values[batch.rows, column] = ((out @ read) / scale).double().numpy()
                whole = inputs.setdefault(writer.name, torch.zeros(len(texts), given.shape[-1]))
                whole[batch.rows] = (
                    given.reshape(len(last), -1, given.shape[-1])[line, last].float().cpu()
                )
                if writer.gain is not None:
                    inputs.setdefault(f"{writer.name}.rms", torch.ones(len(texts)))[batch.rows] = (
                        scale
                    )
    return values, inputs


def _frozen(
    writers: Sequence[Writer],
    pre: np.ndarray,
    inputs: dict[str, Tensor],
    before: EditPlan,
    after: EditPlan,
    direction: Tensor,
) -> np.ndarray:
    """Return the contributions of the weights after, on the inputs from before (rms held)."""
    frozen = pre.copy()
    for column, writer in enumerate(writers):
        read = _read_vector(writer, direction)
        for plan, sign in ((after, 1.0), (before, -1.0)):
            factor = plan.factors.get(writer.name)
            if factor is None:
                continue
            change = (inputs[writer.name] @ factor.right.T) @ (factor.left.T @ read)
            if factor.bias is not None:
                change = change + factor.bias @ read
            if writer.gain is not None:
                change = change / inputs[f"{writer.name}.rms"]
            frozen[:, column] += sign * change.double().numpy()
    return frozen
