"""What a tensor is, from its name and shape on disk: kind, layer, and the axis of the stream.

Names are hints. They sort tensors into rows of a table and say which are residual writers; the tests
that an edit has to pass (`checkpoint/delta.py`) are made on numbers alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from saber.checkpoint.reading import Checkpoint, Stored

Kind = Literal[
    "attention out",
    "mlp down",
    "expert down",
    "mixer out",
    "embedding",
    "attention in",
    "mlp in",
    "expert in",
    "mixer in",
    "router",
    "head",
    "norm",
    "bias",
    "other",
]
WRITERS: tuple[Kind, ...] = ("attention out", "mlp down", "expert down", "mixer out", "embedding")
"""Kinds that write to the residual stream."""

_DOWN = (
    r"(down_proj|dense_4h_to_h|fc_out|fc2|w2|lin2|linear2|c_proj|wo|proj_out|output_linear|down)\b"
)
_OUT = r"(o_proj|out_proj|c_proj|dense|wo|out_lin|attn_out|attn_output|o|proj|output)\b"
_MIXER = r"mamba|ssm|mixer|\bconv|recurrent|delta_?net|linear_attn|time_mix|temporal_block"
_ATTENTION = r"attn|attention"
_MLP = r"mlp|ffn|feed_?forward|\bff\b|shared_expert"
_RULES: tuple[tuple[str, Kind], ...] = (
    (r"lm_head|embed_out|^output\.weight$|score\.weight", "head"),
    (r"per_layer_projection", "mlp down"),
    (r"(embed|\bwte\b|\bwpe\b|token_embd)(?!.*proj)", "embedding"),
    (r"router|\bgate\.(weight|wg)|\bmoe_gate|shared_expert_gate", "router"),
    (rf"(?<!shared_)experts?\b.*\b{_DOWN}", "expert down"),
    (r"(?<!shared_)experts?\b", "expert in"),
    (rf"({_MIXER}).*\b(out_proj|o_proj|linear_out|output)\b", "mixer out"),
    (rf"({_MIXER})", "mixer in"),
    (rf"({_MLP}).*\b{_DOWN}", "mlp down"),
    (rf"({_MLP})", "mlp in"),
    (rf"({_ATTENTION}).*\b{_OUT}", "attention out"),
    (rf"({_ATTENTION})", "attention in"),
    (r"\b(fc2|down_proj|w2|fc_out)\b", "mlp down"),
    (r"\b(fc1|up_proj|gate_proj|w1|w3|fc_in|c_fc)\b", "mlp in"),
)
_FUSED_LAST = {"gpt_oss", "llama4", "llama4_text"}
"""Model types whose fused experts are stored (experts, in, out)."""
_ONE_PLUS = {"gemma2", "gemma3", "gemma3_text", "vaultgemma", "t5gemma", "t5gemma2"}
"""Model types with a norm behind the writer whose gain is one plus its weight."""


def kind_of(name: str, stored: Stored) -> Kind:
    """Return what a tensor is, by its name."""
    lowered = name.lower()
    if lowered.endswith(("bias", "_bias")):
        return "bias"
    if len(stored.shape) <= 1:
        return "norm" if re.search(r"norm|\bln_|_ln\b|\bln\b", lowered) else "other"
    return next((kind for pattern, kind in _RULES if re.search(pattern, lowered)), "other")


def layer_of(name: str) -> int | None:
    """Return the decoder layer that a name says, counted from 0; None outside of the layers."""
    found = re.search(r"(?:^|\.)(\d+)\.", name)
    return int(found[1]) if found else None


def d_model_of(checkpoint: Checkpoint) -> int:
    """Return the width of the residual stream: by the configuration, else by what most tensors share."""
    config = checkpoint.config
    for part in (
        config,
        *(config.get(k) for k in ("text_config", "llm_config", "language_config")),
    ):
        if isinstance(part, Mapping):
            for key in ("hidden_size", "n_embd", "d_model"):
                if isinstance(part.get(key), int):
                    return int(part[key])
    votes: Counter[int] = Counter()
    for name, stored in checkpoint.tensors.items():
        if layer_of(name) is not None and len(stored.shape) == 2:
            votes.update(set(stored.shape))
    if not votes:
        votes.update(size for stored in checkpoint.tensors.values() for size in stored.shape)
    return votes.most_common(1)[0][0] if votes else 0


@dataclass(frozen=True)
class Layout:
    """Where the stream's axis lies in the matrices of a checkpoint."""

    d_model: int
    """Width of the stream."""
    transposed: bool
    """Whether weights are stored (in, out), as GPT-2's are."""
    fused_last: bool
    """Whether fused experts are stored (experts, in, out)."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Layout:
        """Read the layout off the rectangular writers, whose shapes leave no doubt."""
        d = d_model_of(checkpoint)
        plain: Counter[bool] = Counter()
        fused: Counter[bool] = Counter()
        for name, stored in checkpoint.tensors.items():
            kind, shape = kind_of(name, stored), stored.shape
            if kind not in WRITERS or kind == "embedding" or len(shape) not in (2, 3):
                continue
            if (shape[-1] == d) != (shape[-2] == d):
                (plain if len(shape) == 2 else fused)[shape[-1] == d] += 1
        listed = str(checkpoint.config.get("model_type", "")) in _FUSED_LAST
        return cls(d, plain[True] > plain[False], fused[True] > fused[False] if fused else listed)

    def sides(self, kind: Kind, shape: tuple[int, ...], fused: bool) -> tuple[int, ...]:
        """Return the axes of a matrix that can be the stream's, the likeliest first."""
        both = [axis for axis in (0, 1) if shape[axis] == self.d_model]
        if len(both) < 2:
            return tuple(both)
        last = self.fused_last if fused else self.transposed
        out = 1 if kind == "embedding" or last else 0
        if kind not in WRITERS and kind != "other":
            out = 1 - out
        return (out, 1 - out)


def gain_behind(checkpoint: Checkpoint, name: str, kind: Kind) -> Tensor | None:
    """Return the gain of the norm between a writer and the stream, where the layer has one.

    Told by names: a layer with norms behind both attention and MLP (Gemma 2 and 3, OLMo 2, GLM-4,
    Exaone 4). Whether the gain is the weight or one plus it goes by the model type.
    """
    found = re.match(r"(.*?(?:^|\.)\d+\.)", name)
    if found is None or kind not in ("attention out", "mlp down"):
        return None
    prefix = found[1]
    attention = ("post_self_attn_layernorm.weight", "post_attention_layernorm.weight")
    mlp = ("post_feedforward_layernorm.weight", "post_mlp_layernorm.weight")
    if not any(prefix + norm in checkpoint.tensors for norm in mlp):
        return None
    for norm in attention if kind == "attention out" else mlp:
        stored = checkpoint.tensors.get(prefix + norm)
        if stored is not None and stored.numeric and len(stored.shape) == 1:
            weight = checkpoint.read(prefix + norm).float()
            text = checkpoint.config.get("text_config")
            types = {checkpoint.config.get("model_type")}
            types |= {text.get("model_type")} if isinstance(text, Mapping) else set()
            return 1 + weight if types & _ONE_PLUS else weight
    return None


_PREFIXES = ("model.", "language_model.", "transformer.", "base_model.", "gpt_neox.", "module.")


def aligned(base: Checkpoint, edited: Checkpoint) -> dict[str, str]:
    """Return the edited checkpoint's name for each tensor that both have, by the base's name.

    Names that only one of them has are compared without the prefixes that savers add (`transformer.`,
    `model.`, `language_model.`): an output head has none, and is called the same by all of them.
    """
    ours = _bare(name for name in base.tensors if name not in edited.tensors)
    theirs = _bare(name for name in edited.tensors if name not in base.tensors)
    renamed = {name: theirs[bare] for bare, name in ours.items() if bare in theirs}
    called = {name: name if name in edited.tensors else renamed.get(name) for name in base.tensors}
    return {name: other for name, other in called.items() if other is not None}


def _bare(names: Iterable[str]) -> dict[str, str]:
    """Return names by what is left of them without prefixes; none where two become one."""
    found: dict[str, str] = {}
    for name in names:
        bare = name
        while bare.startswith(_PREFIXES):
            bare = bare.partition(".")[2]
        if bare in found:
            return {}
        found[bare] = name
    return found
