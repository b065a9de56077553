"""A GGUF file written anew with changed tensors, in memory that a few blocks need."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import IO, NamedTuple

import torch
from torch import Tensor

from saber import artifacts
from saber.checkpoint.gguf_file import (
    OWN,
    Change,
    GgufFile,
    GgufTensor,
    decode,
    encode,
    read_rows,
    row_bytes,
    type_number,
)
from saber.errors import ModelError

BLOCK = 1 << 22
"""Values that are decoded at a time."""
_STRING = 8


class Rounding(NamedTuple):
    """What became of the change of one tensor."""

    name: str
    """Name of the tensor."""
    before: str
    """Type in the base file."""
    after: str
    """Type as written."""
    size: float
    """Norm of the change over the norm of the weight."""
    error: float
    """Norm of the rounding that storing adds, over the norm of the change."""
    kept: float
    """Share of the change along itself that is there after storing: 1 is all, 0 nothing."""


def blocks(tensor: GgufTensor, values: int = 0) -> Iterator[tuple[int, int, int]]:
    """Yield (expert, first row, last row) of pieces of a tensor of at most `values` values (`BLOCK`)."""
    step = max(1, (values or BLOCK) // tensor.shape[-1])
    for expert in range(tensor.experts):
        for start in range(0, tensor.rows, step):
            yield expert, start, min(start + step, tensor.rows)


def changed_rows(
    file: IO[bytes], change: Change, kind: str, block: tuple[int, int, int]
) -> tuple[bytes, Tensor]:
    """Return rows of a tensor with their change as they are stored in `kind`, and the sums
    (|W|^2, |D|^2, |E|^2, <W' - W, D>) of the weight, its change D and the rounding E."""
    expert, start, stop = block
    tensor = change.tensor
    at = expert * tensor.rows
    old = torch.from_numpy(read_rows(file, tensor, at + start, at + stop))
    delta = change.block(expert, start, stop)
    if not bool(torch.isfinite(delta).all()):
        raise ModelError(f"the plan's change of {tensor.name} holds NaN or infinity.")
    wanted = old + delta
    stored = encode(wanted.numpy(), kind)
    back = torch.from_numpy(decode(stored, kind, tensor.shape[-1]))
    pairs = ((old, old), (delta, delta), (back - wanted, back - wanted), (back - old, delta))
    return stored, torch.stack([(a.double() * b.double()).sum() for a, b in pairs])


def rounding(change: Change, kind: str, sums: Tensor) -> Rounding:
    """Return what the sums of `changed_rows` say."""
    weight, delta, error, along = (float(v) for v in sums)
    if delta == 0:
        return Rounding(change.tensor.name, change.tensor.type, kind, 0.0, 0.0, 1.0)
    size = (delta / weight) ** 0.5 if weight > 0 else float("inf")
    return Rounding(
        change.tensor.name, change.tensor.type, kind, size, (error / delta) ** 0.5, along / delta
    )


def rewrite(
    file: GgufFile,
    out: Path,
    edits: Mapping[str, tuple[Change, str]],
    metadata: Mapping[str, str],
    each: Callable[[GgufTensor], None] = lambda _tensor: None,
) -> list[Rounding]:
    """Write the file anew with changed tensors, in the same order, with all of its metadata.

    `edits` holds the change and the type to store it in by tensor; every other tensor is copied byte
    for byte, and so are the metadata, to which `metadata` is added under `saber.`. Memory stays at a
    few blocks of `BLOCK` values. The file appears whole or not at all. Raises `OutputError`, and
    `ModelError` for values that a type is too narrow for.
    """
    with (
        artifacts.staged_file(out) as part,
        file.path.open("rb") as source,
        part.open("wb") as target,
    ):
        report = _write(file, source, target, edits, metadata, each)
        target.flush()
        os.fsync(target.fileno())
    return report


def _write(
    file: GgufFile,
    source: IO[bytes],
    target: IO[bytes],
    edits: Mapping[str, tuple[Change, str]],
    metadata: Mapping[str, str],
    each: Callable[[GgufTensor], None],
) -> list[Rounding]:
    alignment = int(file.reader.alignment)
    target.write(_head(file, source, edits, metadata))
    _pad(target, alignment)
    report = []
    for tensor in file.tensors.values():
        if tensor.name in edits:
            change, kind = edits[tensor.name]
            sums = torch.zeros(4, dtype=torch.float64)
            for block in blocks(tensor):
                stored, part = changed_rows(source, change, kind, block)
                _require_finite(tensor, kind, part)
                target.write(stored)
                sums += part
            report.append(rounding(change, kind, sums))
        else:
            _copy(source, target, tensor.offset, tensor.nbytes)
        _pad(target, alignment)
        each(tensor)
    return report


def _require_finite(tensor: GgufTensor, kind: str, sums: Tensor) -> None:
    """Raise `ModelError` where the sums of `changed_rows` show NaN or infinity in what is stored."""
    if bool(torch.isfinite(sums).all()):
        return
    if not bool(torch.isfinite(sums[0])):
        raise ModelError(
            f"{tensor.name} of the base file holds NaN or infinity.",
            "Download or convert it again.",
        )
    wider = "f32" if kind == "BF16" else "bf16"
    raise ModelError(
        f"{tensor.name} holds values that are too large for {kind}, and would be stored as infinity.",
        f"Use --type {wider}.",
    )


def _head(
    file: GgufFile,
    source: IO[bytes],
    edits: Mapping[str, tuple[Change, str]],
    metadata: Mapping[str, str],
) -> bytes:
    """Return magic, counts, metadata and the table of tensors.

    The metadata are carried over as bytes, so that nothing of them depends on how the library reads it.
    """
    pairs = own_metadata(file, source) + [
        _text(OWN + name) + struct.pack("<I", _STRING) + _text(value)
        for name, value in metadata.items()
    ]
    source.seek(0)
    head = source.read(8) + struct.pack("<QQ", len(file.tensors), len(pairs)) + b"".join(pairs)
    alignment, offset = int(file.reader.alignment), 0
    for tensor in file.tensors.values():
        kind = edits[tensor.name][1] if tensor.name in edits else tensor.type
        dims = tuple(reversed(tensor.shape))
        head += _text(tensor.name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        head += struct.pack("<IQ", type_number(kind), offset)
        length = row_bytes(kind, dims[0]) * prod(dims[1:])
        offset += -(-length // alignment) * alignment
    return head


def own_metadata(file: GgufFile, source: IO[bytes]) -> list[bytes]:
    """Return a file's metadata but for what we add, pair by pair, as the bytes that they are."""
    fields = [f for f in file.reader.fields.values() if not f.name.startswith("GGUF.")]
    end = file.reader.tensors[0].field.offset if file.reader.tensors else file.reader.data_offset
    ends = [f.offset for f in fields[1:]] + [end]
    pairs = []
    for field, stop in zip(fields, ends, strict=True):
        if not field.name.startswith(OWN):
            source.seek(field.offset)
            pairs.append(source.read(stop - field.offset))
    return pairs


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _pad(target: IO[bytes], alignment: int) -> None:
    target.write(b"\0" * (-target.tell() % alignment))


def _copy(source: IO[bytes], target: IO[bytes], offset: int, length: int) -> None:
    source.seek(offset)
    while length:
        piece = source.read(min(length, 4 * BLOCK))
        if not piece:
            raise ModelError(f"{source.name} ends before its last tensor does.")
        target.write(piece)
        length -= len(piece)
