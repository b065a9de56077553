"""A GGUF file tensor by tensor: read lazily, rewritten with changes in memory that a block needs."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from saber.errors import ModelError, OutputError

BLOCK = 1 << 22
"""Values that are decoded at a time."""
OWN = "saber."
"""Prefix of our metadata keys."""
_STRING = 8


class GgufTensor(NamedTuple):
    """Where a tensor lies in a file."""

    name: str
    """Its name."""
    type: str
    """Its type, as ggml calls it: F16, Q4_1, ..."""
    shape: tuple[int, ...]
    """Rows before columns: the reverse of ggml's order."""
    offset: int
    """First byte, from the start of the file."""
    nbytes: int
    """Length in bytes."""

    @property
    def experts(self) -> int:
        """Matrices in it."""
        return prod(self.shape[:-2])

    @property
    def rows(self) -> int:
        """Rows of each matrix."""
        return self.shape[-2] if len(self.shape) > 1 else 1


@dataclass(frozen=True)
class Change:
    """What is added to one tensor of a GGUF file: row i of expert e gains left[i] @ right[:, e]."""

    tensor: GgufTensor
    """The tensor, as it lies in the file."""
    factor: str
    """Name of the plan's factor."""
    left: Float[Tensor, "rows k"]
    """Along the rows of the tensor."""
    right: Float[Tensor, "k experts columns"]
    """Along its columns, for each expert."""
    bias: bool = False
    """Whether it is a bias, whose rows are experts."""
    embedding: bool = False
    """Whether it is the token embedding, whose rows are tokens: there `left` is the input side."""

    def block(self, expert: int, start: int, stop: int) -> Tensor:
        """Return rows `start` to `stop` of the change of an expert."""
        return self.left[start:stop] @ self.right[:, expert]


@dataclass(frozen=True)
class GgufFile:
    """What a GGUF file says of itself; its weights stay on disk."""

    path: Path
    """The file."""
    architecture: str
    """`general.architecture`."""
    tensors: Mapping[str, GgufTensor]
    """All tensors in the file's order."""
    names: Any
    """The library's table from names in transformers to names in the file."""
    reader: Any
    """The library's reader."""

    @property
    def paired_rows(self) -> bool:
        """Whether rows of queries and keys are stored by rotary pairs, as llama.cpp's llama has them."""
        return self.architecture == "llama"

    def heads(self, tensor: str) -> int:
        """Return how many heads the rows of a query or key tensor hold."""
        kind = "head_count_kv" if ".attn_k." in tensor else "head_count"
        field = self.reader.get_field(f"{self.architecture}.attention.{kind}")
        return int(field.contents()) if field else 1


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


def open_gguf(path: Path) -> GgufFile:
    """Read the head of a GGUF file; raises `ModelError` when it is none, cut off, split or unknown."""
    import gguf

    if not path.is_file():
        raise ModelError(f"no such file: {path}.", "Check the path of the .gguf file.")
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, KeyError, IndexError, OSError, UnicodeDecodeError) as error:
        raise ModelError(
            f"{path.name} cannot be read as GGUF ({error}).",
            "It may be cut off: compare its size with the original's.",
        ) from error
    field = reader.get_field("general.architecture")
    architecture = str(field.contents()) if field else ""
    arch = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}.get(architecture)
    if arch is None or reader.byte_order == "S":
        what = "is big-endian" if arch else f"has the architecture {architecture!r}"
        raise ModelError(
            f"{path.name} {what}, which is not known here.", "Upgrade the gguf package."
        )
    split = reader.get_field("split.count")
    if split is not None and int(split.contents()) > 1:
        raise ModelError(
            f"{path.name} is one of {split.contents()} parts of a model.",
            "Join them first: llama-gguf-split --merge FIRST-PART.gguf WHOLE.gguf",
        )
    tensors = {
        t.name: GgufTensor(
            t.name,
            t.tensor_type.name,
            tuple(reversed(t.shape.tolist())),
            int(t.data_offset),
            int(t.n_bytes),
        )
        for t in reader.tensors
    }
    blocks = reader.get_field(f"{architecture}.block_count")
    names = gguf.get_tensor_name_map(arch, int(blocks.contents()) if blocks else 1)
    return GgufFile(path, architecture, tensors, names, reader)


@cache
def writable(kind: str) -> bool:
    """Whether the `gguf` library can store values in a type, not only read it."""
    from gguf import GGML_QUANT_SIZES, quants

    enum = _type(kind)
    try:
        quants.quantize(np.zeros((1, GGML_QUANT_SIZES[enum][0]), np.float32), enum)
    except NotImplementedError:
        return False
    return True


def fits(kind: str, columns: int) -> bool:
    """Whether rows of this length can be stored in a type at all."""
    from gguf import GGML_QUANT_SIZES

    return columns % GGML_QUANT_SIZES[_type(kind)][0] == 0


def known_types() -> list[str]:
    """Return the types that changed tensors can be written in, smallest first."""
    return ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "bf16", "f16", "f32"]


def _type(kind: str) -> Any:
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType[kind.upper()]


def _row_bytes(kind: str, columns: int) -> int:
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[_type(kind)]
    return columns // block * size


def decode(raw: bytes, kind: str, columns: int) -> Float32[np.ndarray, "rows columns"]:
    """Return stored rows as float32; raises `ModelError` for a type that the library cannot read."""
    from gguf import quants

    stored = np.frombuffer(bytearray(raw), np.uint8).reshape(-1, _row_bytes(kind, columns))
    try:
        return np.asarray(quants.dequantize(stored, _type(kind)), np.float32)
    except NotImplementedError as error:
        raise ModelError(
            f"tensors of the type {kind} cannot be read by the gguf package.",
            "Upgrade it, or give a file in another type.",
        ) from error


def encode(rows: Float32[np.ndarray, "rows columns"], kind: str) -> bytes:
    """Return rows of float32 as they are stored in a type."""
    from gguf import quants

    with np.errstate(over="ignore"):
        stored = quants.quantize(np.ascontiguousarray(rows, np.float32), _type(kind))
    return np.ascontiguousarray(stored).tobytes()


def read_rows(
    file: IO[bytes], tensor: GgufTensor, first: int, last: int
) -> Float32[np.ndarray, "rows columns"]:
    """Return rows `first` to `last` of a tensor, its experts one below the other, as float32."""
    columns = tensor.shape[-1]
    step = _row_bytes(tensor.type, columns)
    file.seek(tensor.offset + first * step)
    return decode(file.read((last - first) * step), tensor.type, columns)


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
    few blocks of `BLOCK` values. The file appears whole or not at all. Raises `OutputError`.
    """
    part = out.with_name(f".{out.name}.part")
    try:
        with file.path.open("rb") as source, part.open("wb") as target:
            report = _write(file, source, target, edits, metadata, each)
            target.flush()
            os.fsync(target.fileno())
        os.replace(part, out)
    except OSError as error:
        raise OutputError(
            f"cannot write {out}: {error.strerror}.", "Free space or choose another --out."
        ) from error
    finally:
        part.unlink(missing_ok=True)
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
                target.write(stored)
                sums += part
            report.append(rounding(change, kind, sums))
        else:
            _copy(source, target, tensor.offset, tensor.nbytes)
        _pad(target, alignment)
        each(tensor)
    return report


def _head(
    file: GgufFile,
    source: IO[bytes],
    edits: Mapping[str, tuple[Change, str]],
    metadata: Mapping[str, str],
) -> bytes:
    """Return magic, counts, metadata and the table of tensors.

    The metadata are carried over as bytes, so that nothing of them depends on how the library reads it.
    """
    fields = [f for f in file.reader.fields.values() if not f.name.startswith("GGUF.")]
    end = file.reader.tensors[0].field.offset if file.reader.tensors else file.reader.data_offset
    ends = [f.offset for f in fields[1:]] + [end]
    pairs = []
    for field, stop in zip(fields, ends, strict=True):
        if not field.name.startswith(OWN):
            source.seek(field.offset)
            pairs.append(source.read(stop - field.offset))
    pairs += [
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
        head += struct.pack("<IQ", int(_type(kind)), offset)
        length = _row_bytes(kind, dims[0]) * prod(dims[1:])
        offset += -(-length // alignment) * alignment
    return head


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _pad(target: IO[bytes], alignment: int) -> None:
    target.write(b"\0" * (-target.tell() % alignment))


def _copy(source: IO[bytes], target: IO[bytes], offset: int, length: int) -> None:
    source.seek(offset)
    while length:
        piece = source.read(min(length, 1 << 24))
        if not piece:
            raise ModelError(f"{source.name} ends before its last tensor does.")
        target.write(piece)
        length -= len(piece)
