"""Frozen results as plain data and tensors, and back: what caches on disk are made of."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import math
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saber import artifacts
from saber.errors import DataError, OutputError

KIND = "kept-result"
PACKAGE = "saber."
"""Only dataclasses of this package come back from a file."""


def digest(*values: Any) -> str:
    """Return the SHA-256 (hex) of values: tensors by their bytes, all else by its `repr`.

    A tensor inside a tuple counts as one of its own.
    """
    found = hashlib.sha256()
    flat = [part for v in values for part in ((len(v), *v) if isinstance(v, tuple) else (v,))]
    for value in flat:
        if isinstance(value, Tensor):
            plain = value.detach().cpu().contiguous()
            found.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
            found.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(value).encode())
        found.update(b"\0")
    return found.hexdigest()


def save(folder: Path, value: Any, meta: Mapping[str, Any]) -> None:
    """Save a result with some meta data, whole or not at all; of two that save it at once one wins."""
    tensors: dict[str, Tensor] = {}
    tree = _pack(value, tensors)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=".", suffix=".part", dir=folder.parent))
    try:
        artifacts.save(part, KIND, tensors, {**meta, "value": tree})
        if not folder.exists():
            part.rename(folder)
    except OSError as error:
        if not folder.is_dir():
            raise OutputError(f"cannot write {folder}: {error.strerror}.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def load(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Load a saved result and its meta data; raises `DataError` when the folder holds none."""
    tensors, meta = artifacts.load(folder, KIND)
    return _unpack(meta.pop("value"), tensors), meta


def size(value: Any) -> int:
    """Return the memory that a result's tensors and arrays take, bytes; shared ones count once."""
    seen: dict[int, int] = {}

    def walk(node: Any) -> None:
        if isinstance(node, Tensor):
            seen[id(node)] = node.numel() * node.element_size()
        elif isinstance(node, np.ndarray):
            seen[id(node)] = node.nbytes
        elif isinstance(node, Mapping):
            for item in node.values():
                walk(item)
        elif isinstance(node, list | tuple):
            for item in node:
                walk(item)
        elif type(node).__module__.startswith(PACKAGE) and id(node) not in seen:
            seen[id(node)] = 0
            for item in vars(node).values() if hasattr(node, "__dict__") else ():
                walk(item)

    walk(value)
    return sum(seen.values())


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, bool | str) or type(value) is int:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"number": repr(value)}
    if isinstance(value, np.generic):
        return _pack(value.item(), tensors)
    if isinstance(value, Tensor | np.ndarray):
        name = str(len(tensors))
        plain = torch.from_numpy(value) if isinstance(value, np.ndarray) else value.detach().cpu()
        tensors[name] = plain.clone()  # of its own memory: a file holds no two tensors of one
        return {"array" if isinstance(value, np.ndarray) else "tensor": name}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(kind)}
        packed = {name: _pack(item, tensors) for name, item in fields.items()}
        return {"class": f"{kind.__module__}:{kind.__qualname__}", "fields": packed}
    if isinstance(value, tuple | list | frozenset):
        name = next(k.__name__ for k in (tuple, list, frozenset) if isinstance(value, k))
        items = sorted(value) if isinstance(value, frozenset) else value
        return {name: [_pack(item, tensors) for item in items]}
    if isinstance(value, Mapping):
        return {"map": [[_pack(k, tensors), _pack(v, tensors)] for k, v in value.items()]}
    raise TypeError(f"no way to keep a {type(value).__name__}")


def _unpack(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(node, dict):
        return node
    if "class" in node:
        return _made(node, tensors)
    (name, held), = node.items()  # fmt: skip
    if name in ("tensor", "array"):
        return tensors[held] if name == "tensor" else tensors[held].numpy()
    if name == "number":
        return float(held)
    if name == "map":
        return {_unpack(k, tensors): _unpack(v, tensors) for k, v in held}
    kinds: dict[str, Any] = {"tuple": tuple, "list": list, "frozenset": frozenset}
    return kinds[name](_unpack(item, tensors) for item in held)


def _made(node: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    module, _, name = str(node["class"]).partition(":")
    if not module.startswith(PACKAGE):
        raise DataError(
            f"a kept result names {node['class']!r}, which is no class of this package."
        )
    kind = getattr(importlib.import_module(module), name, None)
    fields = {f.name for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else None
    if not isinstance(kind, type) or fields != set(node["fields"]):
        raise DataError(f"a kept result is of another version of {node['class']!r}.")
    return kind(**{k: _unpack(v, tensors) for k, v in node["fields"].items()})
