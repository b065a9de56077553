"""What else goes with a checkpoint: tokenizer, configuration, templates; and what must stay behind."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from saber import artifacts
from saber.checkpoint import blocks
from saber.checkpoint.shards import INDEX, Source

OTHER_WEIGHTS = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.ggml", "*.h5"),
    *("*.msgpack", "*.ot", "*.onnx", "*.onnx_data", "*.tflite", "*.npz", "*.mlmodel", "*.nemo"),
    "*.index.json",
)
"""Files that hold weights, or point to them: left as they are they would still be unedited."""
PRIVATE = (".git", ".cache", "__pycache__")


@dataclass(frozen=True)
class Cargo:
    """Files of a checkpoint folder beside its shards, by path in the folder."""

    carried: tuple[str, ...]
    """Copied as they are."""
    skipped: tuple[str, ...]
    """Other copies of the weights, left behind."""


def cargo(source: Source, own: Collection[str]) -> Cargo:
    """Return what to copy and what to leave; `own` are files of ours that are written anew."""
    carried: list[str] = []
    skipped: list[str] = []
    for root, files in _walk(source.folder):
        for file in files:
            path = (root / file).relative_to(source.folder).as_posix()
            if path in source.shards or path in own:
                continue
            unedited = any(fnmatch.fnmatch(file.lower(), p) for p in OTHER_WEIGHTS)
            unedited = unedited and not (path == INDEX and _is_ours(source))
            (skipped if unedited else carried).append(path)
    return Cargo(tuple(carried), tuple(skipped))


def lies_in(place: Path, folder: Path) -> bool:
    """Whether a place is a model's folder, or lies in it or in one that is linked there."""
    target = place.resolve()
    return any(target.is_relative_to(root.resolve()) for root, _ in _walk(folder))


def _walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield a model's folders and the names of their files; of links those that lead back to where they
    lie are left out."""
    for here, folders, files in os.walk(folder, followlinks=True):
        root = Path(here)
        way = [p.resolve() for p in (root, *root.parents) if p.is_relative_to(folder)]
        folders[:] = sorted(
            name
            for name in folders
            if name not in PRIVATE
            and not ((root / name).is_symlink() and _leads_to(root / name, way))
        )
        yield root, sorted(files)


def _leads_to(link: Path, places: Iterable[Path]) -> bool:
    """Whether a linked folder is one of these, or they lie in it."""
    target = link.resolve()
    return any(place.is_relative_to(target) for place in places)


def _is_ours(source: Source) -> bool:
    """Whether the index in a checkpoint folder is that of its shards, and not one that nothing reads."""
    listed = artifacts.read_json(source.folder / INDEX).get("weight_map")
    return isinstance(listed, dict) and set(listed.values()) == set(source.shards)


def link_or_copy(
    source: Path,
    target: Path,
    *,
    link: bool,
    check: Callable[[], None] = lambda: None,
    sync: bool = True,
) -> str:
    """Put a file at `target` by a hard link, or by a copy where there can be none; return its SHA-256."""
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    part.unlink(missing_ok=True)
    target.unlink(missing_ok=True)  # a rename onto a link to the same file would do nothing
    try:
        if not link:
            raise OSError
        # A link to the file itself, where the folder holds a symbolic one (a hub cache).
        os.link(source.resolve(), part)
    except OSError:
        digest = blocks.copy(source, part, check, sync=sync)
    else:
        digest = blocks.sha256(part, check)
    with blocks.writing(target):
        os.replace(part, target)
    return digest
