"""Pickled checkpoints (`pytorch_model.bin`): turned into safetensors when asked for, running no code."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saber import artifacts
from saber.checkpoint.blocks import CHUNK, Sink
from saber.checkpoint.shards import CONFIG, DTYPES, INDEX, WEIGHTS
from saber.errors import ModelError

BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def needed(folder: Path) -> bool:
    """Whether a folder has pickled weights and no safetensors."""
    pickles = (folder / BIN).is_file() or (folder / BIN_INDEX).is_file()
    return pickles and not any([*folder.glob("*.safetensors"), *folder.glob(INDEX)])


def indexes(folder: Path) -> list[str]:
    """Return the names of the index files that a conversion wrote."""
    return [INDEX] if (folder / INDEX).is_file() else []


def convert(folder: Path, out: Path, allowed: bool) -> Path:
    """Write the pickled weights of `folder` as safetensors to `out`, one file for each; return `out`.

    Read with `weights_only`, which runs none of the code that a pickle can hold, and mapped into
    memory instead of read. Raises `ModelError` when it is not allowed, or a file holds more than
    tensors.
    """
    if not allowed:
        raise ModelError(
            f"{folder} has pickled weights (.bin), which can run code when they are read carelessly.",
            "Pass --allow-pickle to convert them first, through torch's weights_only reader; or load "
            "the model with transformers and save it with save_pretrained.",
        )
    if (folder / BIN_INDEX).is_file():
        placed = artifacts.read_json(folder / BIN_INDEX).get("weight_map")
        if not isinstance(placed, dict) or not placed:
            raise ModelError(f"{folder / BIN_INDEX} has no weight_map.", "Download it again.")
    else:
        placed = {}
    files = sorted(set(placed.values())) or [BIN]
    out.mkdir(parents=True, exist_ok=True)
    names: dict[str, str] = {}
    total = 0
    for number, file in enumerate(files, 1):
        name = WEIGHTS if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        tensors = _read(folder / file)
        _write(tensors, out / name)
        names |= dict.fromkeys(tensors, name)
        total += sum(t.numel() * t.element_size() for t in tensors.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
        artifacts.write_json(out / INDEX, index)
    artifacts.write_json(out / CONFIG, artifacts.read_json(folder / CONFIG))
    return out


def _read(path: Path) -> dict[str, Tensor]:
    try:
        value: Any = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except FileNotFoundError as error:
        raise ModelError(
            f"{BIN_INDEX} names {path.name}, which is not in {path.parent}.",
            "Download the missing file.",
        ) from error
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else "it cannot be read"
        raise ModelError(
            f"{path} is damaged, or holds more than weights ({first[:160]}).",
            "It was not converted. Get the model as safetensors.",
        ) from error
    if not isinstance(value, dict) or not all(isinstance(t, Tensor) for t in value.values()):
        raise ModelError(f"{path} does not hold tensors by name.", "Get the model as safetensors.")
    return value


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors one after another; none is held twice but for the part that is being written."""
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, value in tensors.items():
        if value.dtype not in _NAMES:
            raise ModelError(f"{name} has dtype {value.dtype}, which is not converted.")
        end = at + value.numel() * value.element_size()
        head[name] = {
            "dtype": _NAMES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with Sink(path) as sink:
        sink.write(len(text).to_bytes(8, "little") + text)
        for value in tensors.values():
            flat = value.contiguous().reshape(-1).view(torch.uint8)
            for part in flat.split(CHUNK):
                sink.write(part.numpy())
        sink.finish()
