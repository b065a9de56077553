"""A loaded language model with what SABER needs to know of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from saber.errors import ModelError

Source = Literal["demo", "hub", "folder", "gguf"]


@dataclass
class Work:
    """A meter of the forward work done (the only mutable part of a `LanguageModel`)."""

    tokens: int = 0
    """Tokens that went through the decoder layers."""
    head_tokens: int = 0
    """Positions that went through the output head."""
    products: float = 0.0
    """Work beside the model's own, such as second moments, FLOP."""


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model, its tokenizer, and where it came from."""

    model: Any
    """The transformers model, in evaluation mode."""
    tokenizer: Any
    """The transformers tokenizer."""
    name: str
    """What the user called it."""
    source: Source
    """Where it was read from."""
    base: str | None
    """Hub id of the model it derives from, where known."""
    stored_dtype: torch.dtype
    """The checkpoint's own dtype, in which an edited model is saved."""
    layers_path: str
    """Dotted path of the text decoder's layer list inside `model`."""
    allow_unproven: bool = False
    """Edit the writers that were found even where they cannot be proved to be all."""
    before: tuple[tuple[str, str], ...] = ()
    """Messages (role, text) that come before every prompt: a system prompt, an earlier exchange."""
    response_prefix: str = ""
    """Text behind the chat template, in front of every answer: an empty thought, for instance."""
    thinking: bool = False
    """Whether it thinks before it answers, as its chat template has it, without the `response_prefix`."""
    pads: bool = True
    """Whether padding is nothing to the model: prompts of all lengths are answered together."""
    told: bool = True
    """Whether the model is told the tokens' positions, from 0 on; else it numbers them itself."""
    notes: tuple[str, ...] = ()
    """What a user has to know of how it was loaded, each a line."""
    work: Work = field(default_factory=Work)
    """Forward work done so far."""

    @property
    def layers(self) -> nn.ModuleList:
        """The text decoder's layers, in order."""
        return self.model.get_submodule(self.layers_path)

    @property
    def head(self) -> nn.Module:
        """The module that turns hidden states into logits.

        Where the model does not name it, it is the one linear map outside the layers from `d_model`
        to the vocabulary. Raises `ModelError` when there is no such map, or more than one.
        """
        named = self.model.get_output_embeddings()
        if named is not None:
            return named
        shape = (int(self.text_config.vocab_size), self.d_model)
        maps = [
            m
            for m in self.model.modules()
            if isinstance(m, nn.Linear) and tuple(m.weight.shape) == shape
        ]
        if len(maps) != 1:
            raise ModelError(f"the output head is not to be found: {len(maps)} maps fit.")
        return maps[0]

    @property
    def text_config(self) -> Any:
        """The configuration of the text decoder."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.text_config.hidden_size)

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.model.get_input_embeddings().weight.dtype

    @property
    def revision(self) -> str | None:
        """The commit of a hub model that was loaded, None for any other model."""
        commit = getattr(self.model.config, "_commit_hash", None) if self.source == "hub" else None
        return str(commit) if commit else None

    @property
    def eos_ids(self) -> frozenset[int]:
        """Token ids that end an answer, from the generation config and the tokenizer."""
        configured = self.model.generation_config.eos_token_id
        ids = configured if isinstance(configured, list) else [configured]
        return frozenset(i for i in [*ids, self.tokenizer.eos_token_id] if i is not None)

    @property
    def pad_id(self) -> int:
        """Token id that fills up shorter texts: the tokenizer's, or 0 where the model has none of it."""
        own = self.tokenizer.pad_token_id or 0
        return own if own < self.model.get_input_embeddings().weight.shape[0] else 0

    @property
    def flops(self) -> float:
        """Work so far, in FLOP: 2 x parameters x tokens, layers and head apart, and second moments."""
        in_layers = sum(p.numel() for p in self.layers.parameters())
        in_head = sum(p.numel() for p in self.head.parameters())
        forward = self.work.tokens * in_layers + self.work.head_tokens * in_head
        return 2.0 * forward + self.work.products


def fingerprint(model: nn.Module, samples: int = 256, *, dtype: torch.dtype = torch.float32) -> str:
    """Return a SHA-256 over the names, shapes and evenly spaced values of all weights.

    Values count as the `dtype` has them, the checkpoint's own: some files hold single tensors in a wider
    one, of which a model that computes in float32 keeps more than one in 16 bits.

    Reads `samples` values a tensor, so that it stays fast on large models; it tells checkpoints
    apart but is no proof against a malicious change of single weights.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        flat = value.detach().reshape(-1)
        step = max(1, flat.numel() // samples)
        digest.update(f"{name}{tuple(value.shape)}".encode())
        some = flat[::step].to("cpu")
        if some.is_floating_point():
            some = some.to(dtype)
        digest.update(some.to(torch.float32).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def is_of(mark: str, lm: LanguageModel) -> bool:
    """Whether a fingerprint is a model's: of values as the checkpoint has them, or, in runs of older
    versions, of those in memory."""
    return any(fingerprint(lm.model, dtype=d) == mark for d in (lm.stored_dtype, torch.float32))
