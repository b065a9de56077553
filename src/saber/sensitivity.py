"""Stage 4, how dear a change is: what the model's answers feel of each layer's direction.

A small change e r of the stream behind a layer moves the predictions behind it by

    KL(untouched || changed) = e^2 F / 2 + O(e^3),    F = E_y[(r . grad log p(y))^2],

F the Fisher information of the predictions along r, the expectation over tokens y that the model itself
would draw. One backward pass through drawn tokens gives F of all layers. Amari (1998) for the expansion,
Kunstner et al. (2019) for why tokens are drawn, not taken from a text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from saber.errors import NonFinite
from saber.lm.chat import Encoded
from saber.lm.forward import Progress, gathered_head, plan_batches, silent
from saber.lm.layers import stream
from saber.lm.model import LanguageModel
from saber.lm.substitution import streams_axis
from saber.lm.tap import plain_experts

TOKENS_PER_BATCH = 512
"""Half of what forward passes take, as what they compute is kept for the way back."""
RANGE = 1000.0
"""Weights lie between one over this and this."""
TEXTS = 16
"""How many texts of a set are enough."""


def sample(answered: Sequence[Encoded]) -> list[Encoded]:
    """Return up to `TEXTS` evenly spaced texts of a set."""
    count = min(TEXTS, len(answered))
    return [answered[i * len(answered) // count] for i in range(count)]


def fisher(
    lm: LanguageModel,
    directions: Mapping[int, Float[Tensor, "k d_model"]],
    answered: Sequence[Encoded],
    *,
    seed: int = 0,
    progress: Progress[Any] = silent,
) -> dict[int, Float[Tensor, " k"]]:
    """Return, by layer, the Fisher information along each of its directions, float64.

    It is the median over texts of `information`: in some a single token decides over the mean.
    """
    found = information(lm, directions, answered, seed=seed, progress=progress)
    return {layer: felt.median(0).values for layer, felt in found.items()}


def information(
    lm: LanguageModel,
    directions: Mapping[int, Float[Tensor, "k d_model"]],
    answered: Sequence[Encoded],
    *,
    seed: int = 0,
    progress: Progress[Any] = silent,
) -> dict[int, Float[Tensor, "texts k"]]:
    """Return, by layer, what the predictions of each text's answer feel of each direction, float64.

    (r . grad log p)^2 in nats per squared unit of the stream, one draw a prediction, as a mean over the
    tokens of the text. Raises `NonFinite`, and torch's RuntimeError where a model has a product without a
    way back, or memory ends.
    """
    lengths = [len(e.ids) for e in answered]
    wanted = [len(e.answer_positions) for e in answered]
    groups = plan_batches(lengths, wanted, int(lm.text_config.vocab_size), TOKENS_PER_BATCH)
    found = {
        layer: torch.zeros(len(answered), len(r), dtype=torch.float64)
        for layer, r in directions.items()
    }
    rows: list[int] = []

    def watch(layer: int) -> Any:
        def back(gradient: Tensor) -> None:
            # What moves the mean of several streams moves each of them.
            gradient = gradient.sum(axis) if axis is not None and gradient.ndim > 3 else gradient
            along = gradient.float() @ directions[layer].float().to(gradient.device).T
            found[layer][rows] = along.pow(2).sum(1).cpu().double()

        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            stream(output).register_hook(back)

        return hook

    generator = torch.Generator().manual_seed(seed)
    with ExitStack() as stack:
        stack.enter_context(plain_experts(lm))
        axis = streams_axis(lm)
        stack.enter_context(_differentiable(lm))
        for layer in directions:
            handle = lm.layers[layer].register_forward_hook(watch(layer))
            stack.callback(handle.remove)
        for rows in progress(groups, "sensitivity", len(groups)):
            _one(lm, [answered[r] for r in rows], generator)
    for layer, felt in found.items():
        felt /= torch.tensor(lengths, dtype=torch.float64)[:, None]
        if not bool(torch.isfinite(felt).all()):
            raise NonFinite(f"gradients at layer {layer}")
    return found


def _one(lm: LanguageModel, batch: Sequence[Encoded], generator: torch.Generator) -> None:
    """Go forward, draw the answers' tokens anew, and go back from their log-probability."""
    rows = [torch.tensor(e.ids) for e in batch]
    ids = pad_sequence(rows, batch_first=True, padding_value=lm.pad_id)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    flat = [i * ids.shape[1] + p for i, e in enumerate(batch) for p in e.answer_positions]
    with torch.enable_grad(), gathered_head(lm, torch.tensor(flat, dtype=torch.long)):
        out = lm.model(
            input_ids=ids.to(lm.device), attention_mask=mask.to(lm.device), use_cache=False
        )
        logp = out.logits[0].float().log_softmax(-1)
        if not bool(torch.isfinite(logp).all()):
            raise NonFinite("the logits of the model's own answers")
        drawn = torch.multinomial(logp.detach().exp().cpu(), 1, generator=generator)
        logp.gather(1, drawn.to(logp.device)).sum().backward()
    # The way back through activations alone costs what the way there does.
    lm.work.tokens += 2 * int(mask.sum())
    lm.work.head_tokens += len(flat)


@contextmanager
def _differentiable(lm: LanguageModel) -> Iterator[None]:
    """Let gradients reach the stream, and no weight."""

    def enter(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        # A copy, as a model may scale it in place.
        return output.detach().requires_grad_().clone()

    handle = lm.model.get_input_embeddings().register_forward_hook(enter)
    try:
        yield
    finally:
        handle.remove()


def weights(information: Mapping[int, Float[Tensor, " k"]], power: float) -> dict[int, list[float]]:
    """Return (F / mean F)^power for each direction, within `RANGE`; all 1 where nothing is felt."""
    values = torch.cat(list(information.values()))
    mean = float(values.mean())
    if not mean > 0:
        return {layer: [1.0] * len(v) for layer, v in information.items()}
    return {
        layer: [float(x) for x in ((v / mean) ** power).clamp(1 / RANGE, RANGE)]
        for layer, v in information.items()
    }
