"""Find the text decoder's layer list by running tokens through the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saber.errors import ModelError


def find_layers(model: Any, path: str = "") -> str:
    """Return the dotted path of the decoder's layers.

    A candidate is a `ModuleList` whose members all run, in order, on plain text tokens and hand on
    a stream of width `hidden_size`. Vision and audio towers do not run on text and drop out. The
    model must be causal: changing the last token must leave earlier outputs as they are.

    Raises `ModelError` when there is no such list, several of equal length, or no causality.
    """
    text = model.config.get_text_config(decoder=True)
    if path:
        try:
            found = model.get_submodule(path)
        except AttributeError as error:
            raise ModelError(f"--layers-path {path!r} is not in this model.") from error
        if not isinstance(found, nn.ModuleList):
            raise ModelError(f"--layers-path {path!r} is a {type(found).__name__}, no ModuleList.")
        return path
    candidates = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    outputs: dict[str, list[Tensor]] = {name: [] for name in candidates}
    handles = []
    for name, members in candidates.items():
        for member in members:
            handles.append(member.register_forward_hook(_recorder(outputs[name])))
    try:
        ids = torch.randint(0, text.vocab_size, (2, 8), generator=torch.Generator().manual_seed(0))
        ids[1, :-1] = ids[0, :-1]
        with torch.no_grad():
            model(input_ids=ids.to(model.get_input_embeddings().weight.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    valid = [
        name
        for name, members in candidates.items()
        if len(outputs[name]) == len(members)
        and all(o.ndim == 3 and o.shape[-1] == text.hidden_size for o in outputs[name])
    ]
    if not valid:
        raise ModelError("no list of decoder layers found.", "Name it with --layers-path.")
    longest = max(len(candidates[name]) for name in valid)
    best = [name for name in valid if len(candidates[name]) == longest]
    if len(best) > 1:
        raise ModelError(
            f"several layer lists fit: {', '.join(best)}.", "Choose one with --layers-path."
        )
    last = outputs[best[0]][-1]
    noise = 1e-4 if last.dtype == torch.float32 else 1e-2
    if (last[0, :-1] - last[1, :-1]).abs().max() > noise * last.abs().mean():
        raise ModelError(
            "this model is not causal: a later token changes earlier ones (an encoder?).",
            "Give a decoder-only chat model.",
        )
    return best[0]


def _recorder(into: list[Tensor]) -> Any:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        into.append(stream(output))

    return hook


def stream(output: Any) -> Tensor:
    """Return the hidden states in a layer's output, which is a tensor or a tuple that starts with it."""
    return output[0] if isinstance(output, tuple) else output


def with_stream(output: Any, hidden: Tensor) -> Any:
    """Return a layer's output with its hidden states replaced."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
