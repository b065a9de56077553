"""Checkpoints in low precision: 8-bit floats with blockwise scales are edited, others named and refused.

A weight q (F8_E4M3) stands for q * s, one scale s for each block of rows and columns, kept in a
tensor `NAME_scale_inv`. An edit takes q * s in float32, changes it, and rounds to 8 bits again. A
scale stays as it is unless the block has outgrown it, so that what an edit leaves alone keeps its bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saber.checkpoint.blocks import opened
from saber.checkpoint.shards import DTYPES, Source
from saber.errors import ModelError

if TYPE_CHECKING:
    from saber.checkpoint.plan_on_disk import TensorEdit

FP8, SUFFIX, LARGEST = "F8_E4M3", "_scale_inv", 448.0
_REMEDY = {
    "mxfp4": "Load it with transformers' Mxfp4Config(dequantize=True), save it, apply the plan to that "
    "folder, and quantise the result again.",
    "fp8": "Load it with transformers' FineGrainedFP8Config(dequantize=True), save it, apply the plan "
    "to that folder, and quantise the result again.",
    "bitsandbytes": "Apply the plan to the checkpoint that it was quantised from, or to what "
    "model.dequantize() saves.",
}
_USUAL = (
    "Apply the plan to the checkpoint that it was quantised from, and quantise the result again."
)


@dataclass
class Rounding:
    """What storing an edited tensor in 8 bits lost, as sums of squares over its entries."""

    error: float = 0.0
    """Of stored minus wanted values."""
    edit: float = 0.0
    """Of the edit."""
    weight: float = 0.0
    """Of the wanted values."""

    @property
    def lost(self) -> float:
        """Norm of the rounding error, as a share of the edit's norm (inf where there is no edit)."""
        return math.sqrt(self.error / self.edit) if self.edit else math.inf

    @property
    def relative(self) -> float:
        """Norm of the rounding error, as a share of the weight's norm."""
        return math.sqrt(self.error / self.weight) if self.weight else 0.0


def method(config: Mapping[str, Any]) -> str:
    """Return how the weights of a checkpoint are quantised, empty where they are plain."""
    for part in (config, config.get("text_config") or {}):
        packed = part.get("quantization_config")
        if packed:
            return str(packed.get("quant_method", "an unnamed method"))
    return ""


def refusal(source: Source, what: str) -> ModelError:
    """Return the error for a tensor that is stored in a form that is not edited."""
    how = method(source.config)
    return ModelError(
        f"{what} is quantised in {source.folder} ({how or 'packed integers'}), and SABER edits plain "
        "weights and 8-bit floats with blockwise scales.",
        _REMEDY.get(how, _USUAL),
    )


def check(source: Source, edits: Mapping[str, TensorEdit]) -> None:
    """Raise `ModelError` for the first tensor to edit whose stored form is not one that is edited."""
    for name in edits:
        stored = source.stored(name)
        assert stored is not None
        if stored.dtype not in DTYPES:
            raise refusal(source, f"{name} ({stored.dtype})")
        if stored.dtype == FP8:
            scale = source.stored(name + SUFFIX)
            size = _block(source)
            expected = tuple(math.ceil(n / b) for n, b in zip(stored.shape, size, strict=False))
            if len(stored.shape) != 2 or scale is None or scale.shape != expected:
                raise refusal(source, f"{name} ({FP8} without blockwise scales)")
            if scale.dtype not in ("F32", "BF16"):
                raise refusal(source, f"{name} ({FP8} with scales in {scale.dtype})")


def scales(source: Source, edits: Mapping[str, TensorEdit]) -> dict[str, str]:
    """Return the tensors of scales that edits of 8-bit weights touch -> the weight's name."""
    return {name + SUFFIX: name for name in edits if packed(source, name)}


def packed(source: Source, name: str) -> bool:
    """Whether a tensor is stored in 8-bit floats."""
    stored = source.stored(name)
    return stored is not None and stored.dtype == FP8


def _block(source: Source) -> tuple[int, int]:
    for part in (source.config, source.config.get("text_config") or {}):
        size = (part.get("quantization_config") or {}).get("weight_block_size")
        if isinstance(size, list) and len(size) == 2:
            return int(size[0]), int(size[1])
    return 128, 128


Deltas = Callable[[int], Iterator[Tensor]]
"""Gives a tensor's change in whole rows, about so many entries at a time."""


def edited(source: Source, name: str, deltas: Deltas) -> Iterator[tuple[Tensor, Tensor, Rounding]]:
    """Yield the stored values and the scales of an edited weight, a row of blocks at a time.

    Also what storing that row of blocks lost.
    """
    stored, where = source.stored(name), source.stored(name + SUFFIX)
    assert stored is not None
    assert where is not None
    places = source.place
    height, width = _block(source)
    columns = stored.shape[1]
    dtype = DTYPES[where.dtype]
    with opened(source.shards[places[where.name]].path) as reader:
        raw = bytearray(reader.read(where.begin, where.end - where.begin))
    old = torch.frombuffer(raw, dtype=dtype).reshape(where.shape)
    powers = bool(((torch.frexp(old.float()).mantissa == 0.5) | (old == 0)).all())
    with opened(source.shards[places[name]].path) as reader:
        for row, delta in enumerate(deltas(height * columns)):
            begin = stored.begin + row * height * columns
            held = torch.frombuffer(reader.read(begin, delta.numel()), dtype=torch.uint8)
            codes = held.view(DTYPES[FP8]).float().reshape(delta.shape)
            scale = old[row].float()
            spread = _spread(scale, width, columns)
            wanted = codes * spread + delta
            largest = torch.nn.functional.pad(wanted.abs().amax(0), (0, -columns % width))
            largest = largest.reshape(-1, width).amax(1)
            grown = largest / LARGEST
            if powers:
                grown = torch.exp2(torch.ceil(torch.log2(grown)))
            scale = torch.where(largest > LARGEST * scale, grown, scale).to(dtype)
            spread = _spread(scale.float(), width, columns)
            spread = torch.where(spread == 0, 1.0, spread)  # all of that block is zero
            new = (wanted / spread).clamp(-LARGEST, LARGEST).to(DTYPES[FP8])
            error = (new.float() * spread - wanted).double().square().sum()
            lost = Rounding(
                float(error),
                float(delta.double().square().sum()),
                float(wanted.double().square().sum()),
            )
            yield new, scale, lost


def _spread(scale: Tensor, width: int, columns: int) -> Tensor:
    return scale.repeat_interleave(width)[:columns]
