"""Write a shard anew with some of its tensors changed, block by block, without holding any whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from saber.checkpoint import fp8
from saber.checkpoint.blocks import Reader, Sink, opened
from saber.checkpoint.plan_on_disk import Factors, TensorEdit
from saber.checkpoint.shards import DTYPES, Shard, Source, Stored
from saber.errors import NonFinite
from saber.products import on_grid

BLOCK = 1 << 17
"""Entries edited at once."""


@dataclass(frozen=True)
class Written:
    """A shard that was written."""

    sha256: str
    """Of the whole file."""
    size: int
    """Bytes."""
    rounding: Mapping[str, fp8.Rounding] = field(default_factory=dict)
    """By tensor: what storing an edited 8-bit tensor lost."""


def touched(source: Source, edits: Mapping[str, TensorEdit]) -> list[str]:
    """Return the shards that edits change, in order."""
    places = source.place
    return sorted({places[name] for name in [*edits, *fp8.scales(source, edits)]})


def write_shard(
    source: Source,
    file: str,
    target: Path | None,
    edits: Mapping[str, TensorEdit],
    factors: Factors,
    added: Mapping[str, str],
    check: Callable[[], None] = lambda: None,
    *,
    sync: bool = True,
) -> Written:
    """Write a shard to `target` (or hash it alone) with its edits made and `added` in its metadata.

    Bytes that no edit touches are copied as they are. An edited tensor is read, changed in float32,
    rounded once and written in blocks, so that memory stays at some MiB and the factor.

    With `sync` all of it is on the disk on return.

    Raises `ModelError` when the source cannot be read, `NonFinite` when an edited tensor holds NaN or
    infinity, `OutputError` when the target cannot be written.
    """
    shard = source.shards[file]
    scales = fp8.scales(source, edits)
    rounding: dict[str, fp8.Rounding] = {}
    with opened(shard.path) as reader, Sink(target, check, sync) as sink:
        sink.write(shard.header(added))
        at = shard.data
        for name, stored in shard.tensors.items():
            if name not in edits and name not in scales:
                continue
            for chunk in reader.chunks(at, stored.begin):
                sink.write(chunk)
            at = stored.end
            weight = scales.get(name, name)
            if not fp8.packed(source, weight):
                for chunk in edited(reader, shard, stored, edits[name], factors):
                    sink.write(chunk)
                continue
            total = fp8.Rounding()
            for codes, scale, lost in fp8.edited(
                source, weight, partial(deltas, edits[weight], factors)
            ):
                sink.write(_bytes(scale if name in scales else codes))
                total.error += lost.error
                total.edit += lost.edit
                total.weight += lost.weight
            _finite(torch.tensor(total.weight), name, shard)
            rounding[weight] = total
        for chunk in reader.chunks(at, shard.size):
            sink.write(chunk)
        return Written(sink.finish(), sink.size, rounding)


def _bytes(values: Tensor) -> memoryview:
    return values.contiguous().view(torch.uint8).reshape(-1).numpy().data


def _finite(values: Tensor, name: str, shard: Shard) -> None:
    if not bool(torch.isfinite(values).all()):
        raise NonFinite(f"{name} ({shard.path})")


def edited(
    reader: Reader, shard: Shard, stored: Stored, edit: TensorEdit, factors: Factors
) -> Iterator[memoryview]:
    """Yield the bytes of a changed tensor in order, each in the buffer that it was read into."""
    dtype = DTYPES[stored.dtype]
    at = stored.begin
    for delta in deltas(edit, factors, BLOCK):
        raw = reader.read(at, delta.numel() * dtype.itemsize)
        held = torch.frombuffer(raw, dtype=dtype)
        wanted = held.float().add_(delta.reshape(-1))
        # The extremes stand for all: NaN is among them if it is anywhere.
        _finite(torch.stack(wanted.aminmax()).to(dtype), stored.name, shard)
        held.copy_(wanted)
        yield raw
        at += len(raw)


def deltas(edit: TensorEdit, factors: Factors, block: int) -> Iterator[Tensor]:
    """Yield the change of a tensor in float32, in the order of its bytes, some whole rows at a time.

    The sums are exact before their one rounding (`products.on_grid`), so that these blocks have the
    same bits as the change of the whole parameter in memory.
    """
    if edit.part == "bias":
        yield factors.bias(edit)
        return
    rows, width, columns = edit.sizes
    left, right = on_grid(factors.left(edit)), factors.right(edit)
    if columns == 1:
        step = max(1, block // width)
        scratch = torch.empty(min(step, rows), width, dtype=torch.float64)
        for begin in range(0, rows, step):
            part = on_grid(right[:, begin : begin + step, 0].T)
            yield torch.mm(part, left.T, out=scratch[: len(part)]).float()
        return
    step = max(1, block // columns)
    scratch = torch.empty(min(step, width), columns, dtype=torch.float64)
    for row in range(rows):
        gridded = on_grid(right[:, row].T).T
        for begin in range(0, width, step):
            part = left[begin : begin + step]
            yield torch.mm(part, gridded, out=scratch[: len(part)]).float()
