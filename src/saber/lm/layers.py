"""Find the text decoder's layer list by running tokens through the model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from saber.errors import ModelError


def find_layers(model: Any, path: str = "") -> str:
    """Return the dotted path of the decoder's layers.

    A candidate is a `ModuleList` whose members all run once on plain text tokens and hand on a
    stream of width `hidden_size`; the one with most parameters is taken, and of equals the longest.
    Vision and audio towers do not run on text and drop out. The model must be causal:
    changing the last token must leave the logits of earlier ones as they are.

    Raises `ModelError` when there is no such list, or no causality.
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
            ids = ids.to(model.get_input_embeddings().weight.device)
            logits = model(input_ids=ids, use_cache=False).logits.float()
    finally:
        for handle in handles:
            handle.remove()
    valid = {
        name: members
        for name, members in candidates.items()
        if len(outputs[name]) == len(members)
        and all(o.ndim > 1 and o.shape[-1] == text.hidden_size for o in outputs[name])
    }
    if not valid:
        raise ModelError(_why_none(candidates, outputs, text), "Name it with --layers-path.")
    if logits.shape[:2] != ids.shape:
        raise ModelError(
            "this model gives no logits for the tokens that go in (an encoder-decoder?)."
        )
    noise = 1e-4 if model.dtype == torch.float32 else 2e-2
    if (logits[0, :-1] - logits[1, :-1]).abs().max() > noise * logits.abs().mean():
        raise ModelError(
            "this model is not causal: a later token changes earlier ones (an encoder?).",
            "Give a decoder-only chat model.",
        )
    return max(valid, key=lambda name: (_parameters(valid[name]), len(valid[name])))


def _why_none(
    candidates: dict[str, nn.ModuleList], outputs: dict[str, list[Tensor]], text: Any
) -> str:
    """Say what the list that comes nearest does instead of running once."""
    ordered = sorted(outputs.items(), key=lambda item: -len(item[1]))
    for name, seen in ordered:
        if seen and all(o.ndim > 1 and o.shape[-1] == text.hidden_size for o in seen):
            count = len(candidates[name])
            return (
                f"no list of decoder layers found: {name} has {count} members, of which "
                f"{len(seen)} runs were seen on plain text, where each should run once."
            )
    for name, seen in ordered:
        width = seen[0].shape[-1] if seen else 0
        if width > text.hidden_size and width % text.hidden_size == 0:
            return (
                f"no list of decoder layers found: {name} hands on {width // text.hidden_size} streams "
                f"joined in one axis ({width} wide, hidden_size is {text.hidden_size}), which SABER "
                "does not take apart."
            )
    return "no list of decoder layers found."


def layers_left_out(model: Any, path: str, unexpected: Iterable[str]) -> int:
    """Return how many whole layers the files hold beyond those of the list at `path`.

    `unexpected` are names in the files that the model has no place for. A layer counts as whole with half as
    many tensors as the last one has: files may split or join them.
    """
    layers, parts = model.get_submodule(path), path.split(".")
    # Files of the decoder alone leave out what holds it in memory.
    ends = "|".join(re.escape(".".join(parts[i:])) for i in range(len(parts)))
    numbered = (re.match(rf"(?:{ends})\.(\d+)\.", name) for name in unexpected)
    found = Counter(int(match[1]) for match in numbered if match)
    whole = len(layers[-1].state_dict())
    return sum(n >= len(layers) and 2 * count >= whole for n, count in found.items())


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _recorder(into: list[Tensor]) -> Any:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        hidden = stream(output)
        if isinstance(hidden, Tensor):
            into.append(hidden)

    return hook


def stream(output: Any) -> Tensor:
    """Return the hidden states in a layer's output, which is a tensor or a tuple that starts with it."""
    return output[0] if isinstance(output, (tuple, list)) else output


def with_stream(output: Any, hidden: Tensor) -> Any:
    """Return a layer's output with its hidden states replaced."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
