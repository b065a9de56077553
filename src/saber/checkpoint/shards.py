"""A checkpoint folder as its files have it: shards, their headers, and a fingerprint; no tensor is read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from saber import artifacts
from saber.errors import ModelError
from saber.weight_index import read_index

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
SAMPLES, SAMPLE = 16, 64
"""Places at which a tensor is sampled for the fingerprint, and bytes read at each."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
"""Stored dtypes that can be edited, by their name in the files."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a shard."""

    name: str
    """Its name in the file."""
    dtype: str
    """Name of its dtype in the file (BF16, F32, ...)."""
    shape: tuple[int, ...]
    """Its shape."""
    begin: int
    """First byte, from the start of the file."""
    end: int
    """Byte behind its last."""


@dataclass(frozen=True)
class Shard:
    """A safetensors file: its header."""

    path: Path
    """Where it lies."""
    metadata: Mapping[str, str]
    """What stands in `__metadata__`."""
    tensors: Mapping[str, Stored]
    """Its tensors by name, in the order of their bytes."""
    data: int
    """Where the bytes of tensors begin."""
    size: int
    """Length of the file, bytes."""

    def header(self, added: Mapping[str, str]) -> bytes:
        """Return the file's first bytes with `added` in the metadata; tensors keep their order."""
        head: dict[str, Any] = {"__metadata__": {**self.metadata, **added}}
        for name, t in self.tensors.items():
            offsets = [t.begin - self.data, t.end - self.data]
            head[name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": offsets}
        text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def read_shard(path: Path) -> Shard:
    """Read and check a shard's header; raises `ModelError` when it is damaged or none."""
    try:
        with safe_open(path, "pt"):
            pass  # checks lengths, offsets and dtypes against the size of the file
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            head = json.loads(file.read(length))
    except (SafetensorError, ValueError) as error:
        raise ModelError(
            f"{path} is truncated, damaged or no safetensors file ({error}).",
            "Download or copy it again.",
        ) from error
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}.") from error
    data = 8 + length
    metadata = head.pop("__metadata__", {})
    rows = [
        Stored(name, t["dtype"], tuple(t["shape"]), *(data + o for o in t["data_offsets"]))
        for name, t in head.items()
    ]
    rows.sort(key=lambda t: (t.begin, t.end))
    return Shard(path, metadata, {t.name: t for t in rows}, data, path.stat().st_size)


@dataclass(frozen=True)
class Source:
    """A checkpoint folder of safetensors files."""

    folder: Path
    """Where it lies."""
    shards: Mapping[str, Shard]
    """Shards by path in the folder."""
    config: Mapping[str, Any]
    """Content of `config.json`."""

    @property
    def place(self) -> dict[str, str]:
        """Name of a tensor -> its shard, by path in the folder."""
        return {name: file for file, shard in self.shards.items() for name in shard.tensors}

    def stored(self, name: str) -> Stored | None:
        """Return where a tensor lies, None where there is none of that name."""
        return next((s.tensors[name] for s in self.shards.values() if name in s.tensors), None)

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size for shard in self.shards.values())


def read_source(folder: Path) -> Source:
    """Read the headers of a checkpoint folder.

    Raises `ModelError` when it is none, when its index names shards or tensors that are not there,
    or when a shard is damaged.
    """
    if not (folder / CONFIG).is_file():
        raise ModelError(f"{folder} has no {CONFIG}, so it is no model folder.")
    config = artifacts.read_json(folder / CONFIG)
    index: dict[str, str] = {}
    if (folder / WEIGHTS).is_file():
        files = [WEIGHTS]  # what transformers reads, whatever an index beside it says
    elif (folder / INDEX).is_file():
        index = read_index(folder / INDEX)
        files = sorted(set(index.values()))
    else:
        raise ModelError(
            f"{folder} has neither {INDEX} nor {WEIGHTS}.",
            "Give a transformers folder with safetensors weights.",
        )
    shards = {file: read_shard(folder / file) for file in files}
    for name, file in index.items():
        if name not in shards[file].tensors:
            raise _misplaced(name, file, shards)
    return Source(folder, shards, config)


def _misplaced(name: str, file: str, shards: Mapping[str, Shard]) -> ModelError:
    """Return the error for a tensor that is not where the index says."""
    found = next((other for other, shard in shards.items() if name in shard.tensors), None)
    remedy = f"It is in {found}: say so in the weight_map of the index, or download all again."
    if found is None:
        remedy = (
            "None of its files holds it: take it out of the weight_map of the index, or, if the model "
            "needs it, download all again."
        )
    return ModelError(f"{INDEX} says that {name} is in {file}, but it is not.", remedy)


def fingerprint(source: Source) -> str:
    """Return a SHA-256 over names, dtypes, shapes and samples of all tensors in the files.

    It does not depend on how tensors are spread over shards. Like `lm.model.fingerprint` it tells
    checkpoints apart but is no proof against a malicious change of single weights; unlike it, it
    needs no model.
    """
    digest = hashlib.sha256()
    rows = sorted((t.name, file) for file, s in source.shards.items() for t in s.tensors.values())
    handles: dict[str, int] = {}
    try:
        for name, file in rows:
            shard = source.shards[file]
            if file not in handles:
                handles[file] = os.open(shard.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            t = shard.tensors[name]
            digest.update(json.dumps([name, t.dtype, list(t.shape)]).encode())
            for offset in _places(t.end - t.begin):
                os.lseek(handles[file], t.begin + offset, os.SEEK_SET)
                digest.update(os.read(handles[file], min(SAMPLE, t.end - t.begin - offset)))
    except OSError as error:
        raise ModelError(f"cannot read {source.folder}: {error.strerror or error}.") from error
    finally:
        for handle in handles.values():
            os.close(handle)
    return f"sha256:{digest.hexdigest()}"


def _places(length: int) -> Iterator[int]:
    """Yield evenly spaced offsets, the first and the last bytes among them."""
    last = max(0, length - SAMPLE)
    steps = min(SAMPLES, last // SAMPLE + 1)
    yield from sorted({last * i // max(1, steps - 1) for i in range(steps)})
