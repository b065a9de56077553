"""A GGUF file tensor by tensor: read lazily, rewritten with changes in memory that a block needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32
from torch import Tensor

from saber.errors import ModelError

OWN = "saber."
"""Prefix of our metadata keys."""
ALSO = {"mistral3": "llama"}
"""An older architecture of llama.cpp that a model type was kept as before it got one of its name."""


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


def open_gguf(path: Path) -> GgufFile:
    """Read the head of a GGUF file; raises `ModelError` when it is none, cut off, split or unknown."""
    import gguf

    if not path.is_file():
        raise ModelError(f"no such file: {path}.", "Check the path of the .gguf file.")
    try:
        reader = _reader(path)
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


def _reader(path: Path) -> Any:
    """Return the library's reader over a plain array: cutting a memory map is slow, and it cuts a piece
    for every token."""
    import gguf

    class Reader(gguf.GGUFReader):
        @property
        def data(self) -> Any:
            return self._plain

        @data.setter
        def data(self, value: Any) -> None:
            self._plain = np.asarray(value)

    return Reader(path)


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


def type_number(kind: str) -> int:
    """Return the number that stands for a type in files."""
    return int(_type(kind))


def row_bytes(kind: str, columns: int) -> int:
    """Return how many bytes a row of a type takes."""
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[_type(kind)]
    return columns // block * size


def decode(raw: bytes, kind: str, columns: int) -> Float32[np.ndarray, "rows columns"]:
    """Return stored rows as float32; raises `ModelError` for a type that the library cannot read."""
    from gguf import quants

    stored = np.frombuffer(bytearray(raw), np.uint8).reshape(-1, row_bytes(kind, columns))
    try:
        with np.errstate(invalid="ignore"):  # an infinite scale, which is told where it is written
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
    step = row_bytes(tensor.type, columns)
    file.seek(tensor.offset + first * step)
    return decode(file.read((last - first) * step), tensor.type, columns)
