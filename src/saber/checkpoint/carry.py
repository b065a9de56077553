"""What else goes with a checkpoint: tokenizer, configuration, templates; and what must stay behind."""

from __future__ import annotations

import errno
import fnmatch
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from saber import artifacts
from saber.checkpoint import blocks
from saber.checkpoint.shards import INDEX, Source
from saber.paths import expanded

OTHER_WEIGHTS = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.ggml", "*.h5"),
    *("*.msgpack", "*.ot", "*.onnx", "*.onnx[._]data*", "*.tflite", "*.npz", "*.mlmodel", "*.nemo"),
    "*.index.json",
)
"""Files that hold weights, or point to them: left as they are they would still be unedited."""
PRIVATE = (".git", ".cache", "__pycache__")
RECORDS = ("run.json", "state.json", "sweep.json", "study.json", "audit.json", "audit-state.json")
"""By these a run, sweep or audit is known; one that lies in a model's folder is no part of the model."""
LARGEST = 100_000_000
"""Bytes up to which a file of a hub model that is no weight is fetched."""


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
            unedited = _holds_weights(file)
            unedited = unedited and not (path == INDEX and _is_ours(source))
            (skipped if unedited else carried).append(path)
    return Cargo(tuple(carried), tuple(skipped))


def _holds_weights(file: str) -> bool:
    """Whether a file holds weights, or points to them, by its name."""
    return any(fnmatch.fnmatch(file.lower(), pattern) for pattern in OTHER_WEIGHTS)


def carry_others(folder: Path, target: Path) -> None:
    """Copy a model folder's files that hold no weights to where another was saved, but none that is there."""
    for root, files in _walk(folder):
        for file in files:
            path = (root / file).relative_to(folder)
            if _holds_weights(file) or path.parts[0] in _OURS or (target / path).exists():
                continue
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / file, target / path)


_OURS = ("README.md", "saber_provenance.json")
"""What is ours in a folder that we write: an edited base has files of these names too."""


def fetch_rest(name: str, folder: Path) -> tuple[str, ...]:
    """Fetch what the hub has of a model beside weights into its folder in the hub's cache; return notes.

    A cache holds what was read so far, which leaves out a processor, code and a licence. The files are
    those of the commit that `folder` is of; any other folder stays as it is. Where the hub cannot be
    asked, a note says what may be missing.
    """
    from saber.checkpoint.hub_errors import FAILURES

    if folder.parent.name != "snapshots" or expanded(name).exists():
        return ()
    try:
        left = _fetched(name, folder)
    except FAILURES as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        return (
            f"The hub was not asked what else {name} has: files that were never downloaded (of a "
            f"processor, a licence) are missing. To have all, run this first: hf download {name}",
        )
    if not left:
        return ()
    return (f"Left on the hub, as they are larger than {LARGEST // 10**6} MB: {', '.join(left)}",)


def _fetched(name: str, folder: Path) -> list[str]:
    """Fetch a commit's files that are no weights; return those that are too large."""
    from huggingface_hub import HfApi, RepoFile, constants, hf_hub_download

    left = []
    api = HfApi(endpoint=constants.ENDPOINT)
    for entry in api.list_repo_tree(name, recursive=True, revision=folder.name):
        path = Path(entry.path)
        if not isinstance(entry, RepoFile) or (folder / path).exists():
            continue
        hidden = any(part.startswith(".") or part in PRIVATE for part in path.parts)
        if hidden or _holds_weights(path.name):
            continue
        if entry.size > LARGEST:
            left.append(entry.path)
        else:
            hf_hub_download(name, entry.path, revision=folder.name)
    return left


def lies_in(place: Path, folder: Path) -> bool:
    """Whether a place is a model's folder, or lies in it or in one that is linked there."""
    target = place.resolve()
    return any(target.is_relative_to(root.resolve()) for root, _ in _walk(folder))


def _walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield a model's folders and the names of their files.

    Links that lead back to where they lie are left out, and so are runs, and hidden files such as `.env`,
    which may hold keys.
    """
    for here, folders, files in os.walk(folder, followlinks=True):
        root = Path(here)
        way = [p.resolve() for p in (root, *root.parents) if p.is_relative_to(folder)]
        folders[:] = sorted(
            name
            for name in folders
            if name not in PRIVATE
            and not ((root / name).is_symlink() and _leads_to(root / name, way))
            and not any((root / name / record).is_file() for record in RECORDS)
        )
        yield root, sorted(f for f in files if not f.startswith(".") or f == ".gitattributes")


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
