"""Edits of small random models whose nature is known, to hold the verdicts of `saber diff` against.

Peers' ablations are made on the tensors as they lie on disk; SABER's own edits, fine-tunes and LoRA are
made by the model itself, trained for real, if briefly.
"""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from saber.ablation import Removal, apply, orthogonal
from saber.checkpoint.diff import Difference, compare
from saber.checkpoint.reading import open_checkpoint
from saber.linalg import unit
from saber.lm.chat import Encoded
from saber.lm.layers import find_layers
from saber.lm.model import LanguageModel
from saber.lm.writers import find_writers
from saber.moments import Preserved, read_decisions
from saber.selective import solve

Tensors = dict[str, Tensor]
FAMILIES = ("llama", "gpt2", "mixtral", "gemma2")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

WRITERS = {
    "llama": (r"(o_proj|down_proj)\.weight$", 0),
    "gemma2": (r"(o_proj|down_proj)\.weight$", 0),
    "gpt2": (r"c_proj\.weight$", 1),
    "mixtral": (r"(o_proj|w2)\.weight$", 0),
}
"""Residual writers on disk, with the axis of the stream."""


@dataclass(frozen=True)
class Situation:
    """A base model with the means to edit it."""

    family: str
    seed: int
    dtype: torch.dtype
    model: Any
    """The base in float32, its values on the grid of the dtype."""
    tensors: Mapping[str, Tensor]
    """The base's tensors by their names on disk, float32."""

    @property
    def generator(self) -> torch.Generator:
        """A generator of the case's seed, from its start."""
        return torch.Generator().manual_seed(self.seed)

    def directions(self, k: int, number: int = 0) -> Tensor:
        """Return k orthonormal directions of the stream (k, d_model)."""
        generator = torch.Generator().manual_seed(1000 * self.seed + number)
        d = tiny.WIDTH
        return torch.linalg.qr(torch.randn(d, k, generator=generator)).Q.T

    def language_model(self) -> LanguageModel:
        """Return a copy of the model for SABER to work on."""
        model = copy.deepcopy(self.model)
        return LanguageModel(
            model=model,
            tokenizer=SimpleNamespace(pad_token_id=0),
            name=self.family,
            source="folder",
            base=None,
            stored_dtype=torch.float32,
            layers_path=find_layers(model),
        )


def situation(family: str, seed: int, dtype: torch.dtype) -> Situation:
    """Return a random model of a family, with weights that the dtype can hold."""
    model = tiny.tiny_model(family, seed).to(dtype).float()
    return Situation(family, seed, dtype, model, on_disk(model))


def on_disk(model: Any) -> Tensors:
    """Return a model's tensors as its checkpoint has them."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


def differing(s: Situation, edited: Mapping[str, Tensor], folder: Path) -> Difference:
    """Write base and edited in the situation's dtype, and compare them."""
    for name, tensors in (("base", s.tensors), ("edited", edited)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        stored = {key: t.to(s.dtype).contiguous() for key, t in tensors.items()}
        save_file(stored, folder / name / "model.safetensors")
        s.model.config.save_pretrained(folder / name)
    return compare(open_checkpoint(str(folder / "base")), open_checkpoint(str(folder / "edited")))


def _edited(s: Situation, change: Callable[[Tensor, int], Tensor]) -> Tensors:
    """Apply a change of W (stream, inputs) to every writer; its second argument is the layer."""
    pattern, axis = WRITERS[s.family]
    edited = dict(s.tensors)
    for name, weight in s.tensors.items():
        if re.search(pattern, name):
            layer = int(re.search(r"\.(\d+)\.", name)[1])
            changed = change(weight.double().movedim(axis, 0), layer)
            edited[name] = changed.movedim(0, axis).float()
    return edited


def identity(s: Situation) -> Tensors:
    """Nothing at all."""
    return dict(s.tensors)


def ablation(k: int, alpha: float = 1.0) -> Callable[[Situation], Tensors]:
    """Take k directions out of every writer, the same in all layers."""

    def edit(s: Situation) -> Tensors:
        q = s.directions(k).double()
        return _edited(s, lambda w, _: w - alpha * q.T @ (q @ w))

    return edit


def ablation_by_layer(s: Situation) -> Tensors:
    """Take a direction of its own out of each layer's writers."""

    def change(w: Tensor, layer: int) -> Tensor:
        q = s.directions(1, layer).double()
        return w - q.T @ (q @ w)

    return _edited(s, change)


def ablation_with_embedding(s: Situation) -> Tensors:
    """Take a direction out of every writer and of the token embedding."""
    q = s.directions(1)
    edited = ablation(1)(s)
    name = next(n for n in edited if re.search(r"(embed_tokens|wte)\.weight$", n))
    edited[name] = edited[name] - (edited[name] @ q.T) @ q
    return edited


def columns_kept(s: Situation) -> Tensors:
    """Ablate, then give each input's column its old norm."""
    q = s.directions(1).double()

    def change(w: Tensor, _: int) -> Tensor:
        cut = w - q.T @ (q @ w)
        return cut * (w.norm(dim=0) / cut.norm(dim=0))

    return _edited(s, change)


def rows_kept(s: Situation) -> Tensors:
    """Ablate, then give each output's row its old norm (which puts some of the direction back)."""
    q = s.directions(1).double()

    def change(w: Tensor, _: int) -> Tensor:
        cut = w - q.T @ (q @ w)
        return cut * (w.norm(dim=1) / cut.norm(dim=1))[:, None]

    return _edited(s, change)


def rows_apart(s: Situation) -> Tensors:
    """Ablate the rows' directions alone, with their norms set aside and put back."""
    q = s.directions(1).double()

    def change(w: Tensor, _: int) -> Tensor:
        size = w.norm(dim=1, keepdim=True)
        cut = w / size - q.T @ (q @ (w / size))
        return size * cut / cut.norm(dim=1, keepdim=True)

    return _edited(s, change)


def frobenius_kept(s: Situation) -> Tensors:
    """Ablate, then give the whole matrix its old norm."""
    q = s.directions(1).double()

    def change(w: Tensor, _: int) -> Tensor:
        cut = w - q.T @ (q @ w)
        return cut * (w.norm() / cut.norm())

    return _edited(s, change)


def saber_orthogonal(s: Situation) -> Tensors:
    """SABER's orthogonal edit: two directions for each layer, behind gains where there are some."""
    lm = s.language_model()
    removals = [
        Removal(r, 0.9, layer)
        for layer in range(len(lm.layers))
        for r in s.directions(2, 50 + layer)
    ]
    apply(lm.model, orthogonal(lm, find_writers(lm), removals, "own"))
    return on_disk(lm.model)


def saber_selective(s: Situation) -> Tensors:
    """SABER's selective edit at lambda 1, its moments read from random texts."""
    lm = s.language_model()
    writers = find_writers(lm)
    directions = {layer: s.directions(1, 90 + layer // 2) for layer in range(len(lm.layers))}
    texts = [_texts(12, 10 * s.seed + i) for i in range(3)]
    decisions = read_decisions(lm, writers, texts[0], texts[1])
    found = solve(lm, directions, decisions, Preserved(lm, writers, [texts[2]]))
    one = {layer: torch.ones(1) for layer in directions}
    apply(lm.model, found.plan(one, one))
    return on_disk(lm.model)


def _texts(n: int, seed: int) -> list[Encoded]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(6, tiny.VOCAB - 60, (n, 10), generator=generator)
    return [Encoded((10, 11, 12, *row.tolist()), 13) for row in rows]


def trained(
    s: Situation, model: Any, optimiser: Any = torch.optim.AdamW, steps: int = 12, lr: float = 1e-3
) -> Any:
    """Train a model for some steps on a few random texts, as it comes."""
    torch.manual_seed(s.seed)
    ids = torch.randint(6, tiny.VOCAB - 60, (8, 24), generator=s.generator)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = optimiser(parameters, lr=lr)
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model


def fine_tune(s: Situation) -> Tensors:
    """A full fine-tune with AdamW."""
    return on_disk(trained(s, copy.deepcopy(s.model).requires_grad_(True)))


def fine_tune_sgd(s: Situation) -> Tensors:
    """A full fine-tune with plain SGD, whose steps have low rank."""
    model = copy.deepcopy(s.model).requires_grad_(True)
    return on_disk(trained(s, model, torch.optim.SGD, 4, 0.05))


ATTENTION = {"gpt2": ["c_attn"], "": ["q_proj", "k_proj", "v_proj"]}
OUT = {"gpt2": ["c_proj"], "mixtral": ["o_proj"], "": ["o_proj", "down_proj"]}
IN = {"gpt2": ["c_fc"], "mixtral": [], "": ["gate_proj", "up_proj"]}


def _of(table: Mapping[str, list[str]], family: str) -> list[str]:
    return table.get(family, table[""])


def lora(*, readers: bool, rank: int = 4) -> Callable[[Situation], Tensors]:
    """A LoRA on all matrices, or on residual writers alone, trained and merged."""

    def edit(s: Situation) -> Tensors:
        from peft import LoraConfig, get_peft_model

        modules = list(_of(OUT, s.family))
        experts = ["experts.down_proj"] if s.family == "mixtral" else []
        if readers:
            modules += _of(ATTENTION, s.family) + _of(IN, s.family)
            experts += ["experts.gate_up_proj"] if experts else []
        config = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=modules,
            target_parameters=experts or None,
            fan_in_fan_out=s.family == "gpt2",
        )
        torch.manual_seed(s.seed)
        model = get_peft_model(copy.deepcopy(s.model), config)
        return on_disk(trained(s, model, steps=15, lr=1e-2).merge_and_unload())

    return edit


def merge_of_tunes(s: Situation) -> Tensors:
    """Half way to a fine-tune of the same base."""
    other = fine_tune(s)
    return {name: (t + other[name]) / 2 for name, t in s.tensors.items()}


def merge_of_strangers(s: Situation) -> Tensors:
    """A third of the way to a model of another seed."""
    other = situation(s.family, s.seed + 7000, s.dtype).tensors
    return {name: (2 * t + other[name]) / 3 for name, t in s.tensors.items()}


def merge_of_small_stranger(s: Situation) -> Tensors:
    """A third of the way to a model of another seed with weights a fifth as large."""
    other = situation(s.family, s.seed + 7000, s.dtype).tensors
    return {name: (2 * t + 0.2 * other[name]) / 3 for name, t in s.tensors.items()}


def rank_reduced(s: Situation) -> Tensors:
    """Every matrix cut to the leading half of its singular values (layer-selective rank reduction)."""
    edited = dict(s.tensors)
    for name, t in s.tensors.items():
        if t.ndim == 2:
            u, values, vh = torch.linalg.svd(t, full_matrices=False)
            k = len(values) // 2
            edited[name] = (u[:, :k] * values[:k]) @ vh[:k]
    return edited


def pruned(s: Situation) -> Tensors:
    """The smallest 30% of each matrix's entries at zero."""
    return {
        n: torch.where(t.abs() < t.abs().flatten().quantile(0.3), 0.0, t) if t.ndim == 2 else t
        for n, t in s.tensors.items()
    }


def low_precision(s: Situation) -> Tensors:
    """To bfloat16 and back (float16 where the base is bfloat16 already, less three bits)."""
    if s.dtype == torch.bfloat16:
        return {n: t.to(torch.float8_e5m2).float() for n, t in s.tensors.items()}
    return {n: t.to(torch.bfloat16).float() for n, t in s.tensors.items()}


def quantised(bits: int) -> Callable[[Situation], Tensors]:
    """To blocks of 32 with one scale (as Q8_0 and Q4_0 have) and back; vectors stay."""

    def edit(s: Situation) -> Tensors:
        edited = dict(s.tensors)
        top = 2 ** (bits - 1) - 1
        for name, t in s.tensors.items():
            if t.ndim == 2 and t.shape[1] % 32 == 0:
                blocks = t.reshape(-1, 32)
                scale = blocks.abs().amax(1, keepdim=True).clamp_min(1e-12) / top
                edited[name] = ((blocks / scale).round() * scale).reshape(t.shape)
        return edited

    return edit


def norms_only(s: Situation) -> Tensors:
    """Norm gains and biases moved, matrices as they were."""
    g = s.generator
    return {
        n: t + 0.05 * torch.randn(t.shape, generator=g) if t.ndim == 1 else t
        for n, t in s.tensors.items()
    }


def scaled(s: Situation) -> Tensors:
    """All matrices times 0.9, as weight decay would."""
    return {n: 0.9 * t if t.ndim > 1 else t for n, t in s.tensors.items()}


def healed(s: Situation) -> Tensors:
    """An ablation of rank 1, then a LoRA on all matrices at a low rate."""
    lm = s.language_model()
    removals = [Removal(s.directions(1)[0], 1.0, len(lm.layers) - 1)]
    apply(lm.model, orthogonal(lm, find_writers(lm), removals, "all"))
    cut = Situation(s.family, s.seed, s.dtype, lm.model, s.tensors)
    tuned, before = lora(readers=True, rank=2)(cut), on_disk(lm.model)
    return {n: before[n] + 0.2 * (tuned[n] - before[n]) for n in before}


def shared_output(s: Situation) -> Tensors:
    """One output direction for all writers, with input sides drawn at random."""
    r, g = s.directions(1)[0].double(), s.generator

    def change(w: Tensor, _: int) -> Tensor:
        z = unit(torch.randn(w.shape[1], generator=g, dtype=torch.float64))
        return w - 0.5 * (r @ w).norm() * torch.outer(r, z)

    return _edited(s, change)


@dataclass(frozen=True)
class Case:
    """An edit, and the verdicts that are right for it."""

    title: str
    edit: Callable[[Situation], Tensors]
    right: tuple[str, ...]
    rank: int | None = None

    @property
    def ablation(self) -> bool:
        """Whether it is a directional ablation."""
        return "directional_ablation" in self.right


ABLATION, LOW, FULL = ("directional_ablation",), ("low_rank",), ("full_rank",)
CASES: Mapping[str, Case] = {
    "ablation_1": Case("ablation, rank 1", ablation(1), ABLATION, 1),
    "ablation_3": Case("ablation, rank 3", ablation(3), ABLATION, 3),
    "ablation_weak": Case("ablation, rank 1, strength 0.2", ablation(1, 0.2), ABLATION, 1),
    "ablation_layers": Case("ablation, a direction a layer", ablation_by_layer, ABLATION, 1),
    "ablation_embedding": Case("ablation, embedding too", ablation_with_embedding, ABLATION, 1),
    "columns_kept": Case("ablation, column norms kept", columns_kept, ABLATION, 1),
    "rows_kept": Case("ablation, row norms kept", rows_kept, ABLATION, 1),
    "rows_apart": Case("ablation of rows' directions alone", rows_apart, ABLATION, 1),
    "frobenius_kept": Case("ablation, Frobenius norm kept", frobenius_kept, ABLATION, 1),
    "saber_orthogonal": Case("SABER, orthogonal, rank 2", saber_orthogonal, ABLATION, 2),
    "healed": Case("ablation, then LoRA on all matrices", healed, ABLATION, 1),
    "amplified": Case("amplification, strength 0.5", ablation(1, -0.5), ("directional_amplification",), 1),
    "saber_selective": Case("SABER, selective", saber_selective, ("low_rank_writers",), 1),
    "shared_output": Case("shared output, random input", shared_output, ("low_rank_writers",), 1),
    "lora": Case("LoRA on all matrices, rank 4", lora(readers=True), LOW, 4),
    "lora_writers": Case("LoRA on writers alone, rank 4", lora(readers=False), (*LOW, "low_rank_writers"), 4),
    "fine_tune": Case("full fine-tune, AdamW", fine_tune, FULL),
    "fine_tune_sgd": Case("full fine-tune, SGD, 4 steps", fine_tune_sgd, (*FULL, *LOW)),
    "merge_of_tunes": Case("merge with a fine-tune", merge_of_tunes, FULL),
    "merge_of_strangers": Case("merge with another model", merge_of_strangers, FULL),
    "merge_of_small_stranger": Case("merge with a model of small weights", merge_of_small_stranger, FULL),
    "rank_reduced": Case("half of all singular values cut", rank_reduced, FULL),
    "pruned": Case("smallest 30% of weights at zero", pruned, FULL),
    "low_precision": Case("to bfloat16 (8 bits from bfloat16) and back", low_precision, ("rounding", *FULL)),
    "quantised_8": Case("8-bit blocks and back", quantised(8), ("rounding", *FULL)),
    "quantised_4": Case("4-bit blocks and back", quantised(4), FULL),
    "scaled": Case("all matrices times 0.9", scaled, FULL),
    "norms_only": Case("norms and biases alone", norms_only, ("vectors",)),
    "identity": Case("nothing", identity, ("identical",)),
}  # fmt: skip
