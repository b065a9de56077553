"""Read a checkpoint tensor by tensor, off its files, without building the model."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from saber import artifacts
from saber.checkpoint.shards import CONFIG, DTYPES, INDEX, WEIGHTS, read_shard
from saber.errors import ModelError
from saber.paths import expanded
from saber.weight_index import PICKLED, conversion, read_index

OPEN_FILES = 4
FLOATS = {code: dtype for code, dtype in DTYPES.items() if dtype.itemsize > 1}
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
    path = expanded(name)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ModelError(f"{name} is no .safetensors file.", _file_hint(path))
        config = path.parent / CONFIG
        return Checkpoint(
            name, _headers([path]), artifacts.read_json(config) if config.is_file() else {}
        )
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
        return conversion(path.parent)
    return "Give a model folder, a .safetensors file, a hub id, or demo."


def _folder(name: str, folder: Path) -> Checkpoint:
    if (folder / "run.json").is_file():
        if not (folder / "model").is_dir():
            raise ModelError(
                f"the run {name} has no exported model.", "Run it with --export merged."
            )
        folder = folder / "model"
    config = folder / CONFIG
    tensors = _headers(_shards(folder))
    return Checkpoint(name, tensors, artifacts.read_json(config) if config.is_file() else {})


def _shards(folder: Path) -> list[Path]:
    """Return the files of a folder that hold its weights, in order, all of them there."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]  # what transformers reads, whatever an index beside it says
    index = folder / INDEX
    if not index.is_file():
        others = sorted(folder.glob("*.safetensors.index.json"))
        index = others[0] if others else index
    if index.is_file():
        return [folder / name for name in sorted(set(read_index(index).values()))]
    files = sorted(folder.glob("*.safetensors"))
    if [f.name for f in files] == ["adapter_model.safetensors"]:
        raise ModelError(f"{folder} holds a LoRA adapter, no model.", "Merge it into its base.")
    files = [f for f in files if f.name != "adapter_model.safetensors"]
    if files:
        return files
    pickled = [f for pattern in PICKLED for f in folder.glob(pattern)]
    if pickled:
        raise ModelError(
            f"{folder} has pickle weights only ({pickled[0].name}).", conversion(folder)
        )
    raise ModelError(f"{folder} has no weights (*.safetensors).", "Check the path, or download it.")


def _headers(files: list[Path]) -> dict[str, Stored]:
    """Return all tensors of some files from their headers; each file is checked to be whole."""
    found = {
        name: Stored(t.dtype, t.shape, file)
        for file in files
        for name, t in sorted(read_shard(file).tensors.items())
    }
    if not found:
        raise ModelError(f"{files[0]} holds no tensors.", "Download it again.")
    return found


def _fetched(name: str) -> Path:
    """Return the folder of a hub checkpoint, downloaded unless it is in the cache."""
    from huggingface_hub import errors, snapshot_download

    from saber.lm.load import GATED, UNKNOWN

    try:
        return Path(
            snapshot_download(name, allow_patterns=["*.safetensors", "*.index.json", "config.json"])
        )
    except (OSError, ValueError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        remedy = "Check the name and the connection to the hub, or give a folder."
        if isinstance(error, errors.GatedRepoError):
            first, remedy = "it is a gated repository.", GATED
        elif isinstance(error, errors.RepositoryNotFoundError):
            first, remedy = "the hub shows no such repository.", UNKNOWN
        raise ModelError(f"cannot fetch {name!r}: {first}", remedy) from error


def _demo() -> Checkpoint:
    """Return the demo model: it has no files of its own, so it is built in memory."""
    from saber.lm.load import LoadSpec, load

    lm = load("demo", LoadSpec(device="cpu", dtype="float32"), tokenizer=False)
    tensors = {name: p.detach() for name, p in lm.model.named_parameters()}
    return in_memory("demo", tensors, lm.model.config.to_dict())
