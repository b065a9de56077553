"""Read a checkpoint tensor by tensor, off its files, without building the model."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saber.errors import ModelError

INDEX = "model.safetensors.index.json"
OPEN_FILES = 4
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Stored dtypes whose values are plain numbers, by their name in the files."""


@dataclass(frozen=True)
class Stored:
    """A tensor as the files have it."""

    dtype: str
    """Name of the dtype in the files (BF16, F32, ...)."""
    shape: tuple[int, ...]
    """Sizes of its axes."""
    place: Path | Tensor
    """File that holds it, or the tensor itself where it is in memory."""

    @property
    def numeric(self) -> bool:
        """Whether the values are plain numbers, not codes of a quantised weight."""
        return self.dtype in FLOATS


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model by name, read when they are asked for."""

    name: str
    """What the user called it."""
    tensors: Mapping[str, Stored]
    """All tensors, in the order of the files and then of names."""
    config: Mapping[str, Any]
    """Content of `config.json`; empty where there is none."""
    _handles: OrderedDict[Path, Any] = field(default_factory=OrderedDict, repr=False)

    def read(self, name: str, index: int | None = None) -> Tensor:
        """Return a tensor in its stored dtype, or one slice of it along the first axis.

        Raises `ModelError` when the file has been damaged or removed since it was opened.
        """
        place = self.tensors[name].place
        if isinstance(place, Tensor):
            return place if index is None else place[index]
        try:
            handle = self._handle(place)
            if index is None:
                return handle.get_tensor(name)
            return handle.get_slice(name)[index]
        except (SafetensorError, OSError) as error:
            raise ModelError(f"cannot read {name} from {place}: {error}.") from error

    def _handle(self, path: Path) -> Any:
        if path not in self._handles:
            while len(self._handles) >= OPEN_FILES:
                self._handles.popitem(last=False)
            self._handles[path] = safe_open(path, "pt")
        self._handles.move_to_end(path)
        return self._handles[path]


def in_memory(
    name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None
) -> Checkpoint:
    """Return a checkpoint of tensors that are in memory already."""
    codes = {dtype: code for code, dtype in FLOATS.items()}
    stored = {
        key: Stored(codes.get(t.dtype, str(t.dtype).removeprefix("torch.")), tuple(t.shape), t)
        for key, t in tensors.items()
    }
    return Checkpoint(name, stored, config or {})


def open_checkpoint(name: str) -> Checkpoint:
    """Open `demo`, a model folder, a finished run's folder, a `.safetensors` file, or a hub id.

    Only the headers are read. Raises `ModelError` when it cannot be found, holds no safetensors
    weights, or a shard is missing or cut short.
    """
    if name == "demo":
        return _demo()
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ModelError(f"{name} is no .safetensors file.", _file_hint(path))
        config = path.parent / "config.json"
        return Checkpoint(name, _headers([path]), _config(config) if config.is_file() else {})
    if path.is_dir():
        return _folder(name, path)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) is None or name.startswith((".", "/", "~")):
        raise ModelError(
            f"no such checkpoint: {name!r} is no folder or file here and no hub id.",
            "Give a model folder, a .safetensors file, a hub id like owner/name, or demo.",
        )
    return _folder(name, _fetched(name))


def _file_hint(path: Path) -> str:
    if path.suffix == ".gguf":
        return "Give the safetensors checkpoints that the .gguf files were made from."
    if any(path.match(pattern) for pattern in PICKLED):
        return _convert(path.parent)
    return "Give a model folder, a .safetensors file, a hub id, or demo."


def _convert(folder: Path) -> str:
    return (
        "Pickle files can run code when they are read. Convert them first: python -c "
        f'"from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{folder}', dtype='auto').save_pretrained('{folder}-safetensors')\""
    )


def _folder(name: str, folder: Path) -> Checkpoint:
    if (folder / "run.json").is_file():
        if not (folder / "model").is_dir():
            raise ModelError(
                f"the run {name} has no exported model.", "Run it with --export merged."
            )
        folder = folder / "model"
    config = folder / "config.json"
    tensors = _headers(_shards(folder))
    return Checkpoint(name, tensors, _config(config) if config.is_file() else {})


def _shards(folder: Path) -> list[Path]:
    """Return the files of a folder that hold its weights, in order, all of them there."""
    index = folder / INDEX
    if not index.is_file():
        others = sorted(folder.glob("*.safetensors.index.json"))
        index = others[0] if others else index
    if index.is_file():
        listed = _config(index).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise ModelError(f"{index} has no weight_map.", "Download the checkpoint again.")
        names = sorted({str(shard) for shard in listed.values()})
        missing = [n for n in names if not (folder / n).is_file()]
        if missing:
            raise ModelError(
                f"{index.name} of {folder} names {missing[0]}, which is not there"
                f"{f' (nor are {len(missing) - 1} more)' if missing[1:] else ''}.",
                "Download the missing files.",
            )
        return [folder / n for n in names]
    files = sorted(folder.glob("*.safetensors"))
    if [f.name for f in files] == ["adapter_model.safetensors"]:
        raise ModelError(f"{folder} holds a LoRA adapter, no model.", "Merge it into its base.")
    files = [f for f in files if f.name != "adapter_model.safetensors"]
    whole = [f for f in files if f.name == "model.safetensors"]
    if files:
        return whole or files
    pickled = [f for pattern in PICKLED for f in folder.glob(pattern)]
    if pickled:
        raise ModelError(f"{folder} has pickle weights only ({pickled[0].name}).", _convert(folder))
    raise ModelError(f"{folder} has no weights (*.safetensors).", "Check the path, or download it.")


def _headers(files: list[Path]) -> dict[str, Stored]:
    """Return all tensors of some files from their headers; each file is checked to be whole."""
    found: dict[str, Stored] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as handle:
                for key in list(handle.keys()):
                    part = handle.get_slice(key)
                    found[key] = Stored(part.get_dtype(), tuple(part.get_shape()), file)
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{file} is cut short or no safetensors file ({error}).", "Download it again."
            ) from error
    if not found:
        raise ModelError(f"{files[0]} holds no tensors.", "Download it again.")
    return found


def _config(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}.", "Download it again.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold a JSON object.", "Download it again.")
    return value


def _fetched(name: str) -> Path:
    """Return the folder of a hub checkpoint, downloaded unless it is in the cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(name, allow_patterns=["*.safetensors", "*.index.json", "config.json"])
        )
    except (OSError, ValueError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(
            f"cannot fetch {name!r}: {first}",
            "Check the name and the connection to the hub, or give a folder.",
        ) from error


def _demo() -> Checkpoint:
    """Return the demo model: it has no files of its own, so it is built in memory."""
    from saber.lm.load import LoadSpec, load

    lm = load("demo", LoadSpec(device="cpu", dtype="float32"), tokenizer=False)
    tensors = {name: p.detach() for name, p in lm.model.named_parameters()}
    return in_memory("demo", tensors, lm.model.config.to_dict())
