"""An edited GGUF file against its base, tensor by tensor, and against the plan that made it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO

import torch
from torch import Tensor

from saber.checkpoint.gguf_file import (
    Change,
    GgufFile,
    GgufTensor,
    decode,
    encode,
    read_rows,
    writable,
)
from saber.checkpoint.gguf_lora import largest_rank, pairs
from saber.checkpoint.gguf_rewrite import BLOCK, blocks, own_metadata

GROUP = 32
"""Values that share their scale in most types: the rounding of each such group is its own."""
SLACK, NOISE = 1.25, 1e-5
"""How much more than our own rounding another's may be, and what float32 sums may differ by: a change is
computed in another order elsewhere, so that a value between two steps may be rounded to the other."""
_TWIN = {"lora_a": "lora_b", "lora_b": "lora_a"}


@dataclass(frozen=True)
class Difference:
    """What is not as base and plan have it, by name."""

    metadata: bool
    """Whether the base's metadata differ."""
    tensors: tuple[str, ...]
    """Tensors that one file lacks, or has in another shape."""
    untouched: tuple[str, ...]
    """Tensors that the plan leaves alone, and that are not the base's byte for byte."""
    edited: tuple[str, ...]
    """Tensors that are not the base's with the plan's change, to the rounding of their type."""


def compare(base: GgufFile, found: GgufFile, changes: Sequence[Change]) -> Difference:
    """Return how a file differs from `base` with `changes` made; memory stays at a few blocks."""
    edits = {change.tensor.name: change for change in changes}
    alike = [t for t in base.tensors.values() if _shape(found.tensors, t.name) == t.shape]
    names = {t.name for t in alike}
    other = [n for n in {**base.tensors, **found.tensors} if n not in names]
    untouched, edited = [], []
    with base.path.open("rb") as source, found.path.open("rb") as target:
        for tensor in alike:
            held = found.tensors[tensor.name]
            if tensor.name not in edits:
                if tensor.type != held.type or not _same_bytes(source, target, tensor, held):
                    untouched.append(tensor.name)
            elif not writable(held.type) or not _changed(source, target, edits[tensor.name], held):
                edited.append(tensor.name)
        metadata = own_metadata(base, source) != own_metadata(found, target)
    return Difference(metadata, tuple(other), tuple(untouched), tuple(edited))


def resemblance(base: GgufFile, found: GgufFile, names: Sequence[str]) -> dict[str, float]:
    """Return the cosine between each of these tensors in two files, which both have in one shape.

    That is near 1 for the same weights, edited or rounded, and near 0 for unrelated ones.
    """
    alike = {}
    with base.path.open("rb") as source, found.path.open("rb") as target:
        for name in names:
            sums = torch.zeros(3, dtype=torch.float64)
            for expert, start, stop in blocks(base.tensors[name]):
                first, last = (expert * base.tensors[name].rows + row for row in (start, stop))
                a, b = (
                    torch.from_numpy(read_rows(file, held, first, last)).double()
                    for file, held in ((source, base.tensors[name]), (target, found.tensors[name]))
                )
                sums += torch.stack([(a * b).sum(), (a * a).sum(), (b * b).sum()])
            along, one, two = sums.tolist()
            alike[name] = along / (one * two) ** 0.5 if one * two > 0 else float(one == two)
    return alike


def adapter_differs(found: GgufFile, changes: Sequence[Change]) -> list[str]:
    """Return the tensors of an adapter that are not those of these changes, bit for bit."""
    alpha, names, other = float(largest_rank(changes)), set(), []
    with found.path.open("rb") as file:
        for name, values in (pair for change in changes for pair in pairs(change, alpha)):
            names.add(name)
            held = found.tensors.get(name)
            if held is None or held.type != "F32" or held.shape != values.shape:
                other.append(name)
                continue
            file.seek(held.offset)
            if file.read(held.nbytes) != values.tobytes():
                other.append(name)
    return other + [name for name in found.tensors if name not in names]


def misfits(base: GgufFile, found: GgufFile) -> list[str]:
    """Return the tensors of an adapter that no tensor of the base has a place for, or without their twin."""
    other = []
    for name, tensor in found.tensors.items():
        stem, _, end = name.rpartition(".")
        over, twin = base.tensors.get(stem), found.tensors.get(f"{stem}.{_TWIN.get(end, '')}")
        if over is None or twin is None or len(over.shape) < 2:
            other.append(name)
            continue
        down, up = (tensor, twin) if end == "lora_a" else (twin, tensor)
        *experts, rows, columns = over.shape
        plain = ((*experts, up.shape[-1], columns), (*experts, rows, up.shape[-1]))
        tokens = ((rows, up.shape[-1]), (columns, up.shape[-1]))
        if (down.shape, up.shape) != (tokens if stem.startswith("token_embd") else plain):
            other.append(name)
    return other


def _shape(tensors: Mapping[str, GgufTensor], name: str) -> tuple[int, ...] | None:
    return tensors[name].shape if name in tensors else None


def _same_bytes(source: IO[bytes], target: IO[bytes], a: GgufTensor, b: GgufTensor) -> bool:
    for start in range(0, a.nbytes, BLOCK):
        length = min(BLOCK, a.nbytes - start)
        source.seek(a.offset + start)
        target.seek(b.offset + start)
        if source.read(length) != target.read(length):
            return False
    return True


def _changed(source: IO[bytes], target: IO[bytes], change: Change, held: GgufTensor) -> bool:
    """Whether a tensor is the base's with its change, each value as near to it as storing can bring it."""
    tensor, columns = change.tensor, change.tensor.shape[-1]
    for expert, start, stop in blocks(tensor):
        first, last = expert * tensor.rows + start, expert * tensor.rows + stop
        old = torch.from_numpy(read_rows(source, tensor, first, last))
        delta = change.block(expert, start, stop)
        wanted = old + delta
        back = torch.from_numpy(decode(encode(wanted.numpy(), held.type), held.type, columns))
        value = torch.from_numpy(read_rows(target, held, first, last))
        allowed = SLACK * _most(back - wanted) + NOISE * (_most(old) + _most(delta))
        # NaN and infinity are near to nothing.
        if not bool(torch.isfinite(value).all() and (_most(value - wanted) <= allowed).all()):
            return False
    return True


def _most(values: Tensor) -> Tensor:
    """Return the largest size in each group that may share a scale; in each row where rows have no groups."""
    columns = values.shape[-1]
    return values.abs().reshape(-1, GROUP if columns % GROUP == 0 else columns).amax(-1)
