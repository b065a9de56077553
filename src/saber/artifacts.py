"""Save and load the results of stages: a folder with tensors and a meta file, written atomically."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from saber.errors import DataError, OutputError

SCHEMA = 1
TENSORS, META = "tensors.safetensors", "meta.json"
DAMAGED = "It is damaged or incomplete: copy it anew, or make it again."
"""How to mend a file that is not what it should be."""


@contextmanager
def staged_file(final: Path) -> Iterator[Path]:
    """Give a file to fill beside `final`; move it there when the block ends well, else remove it."""
    part = final.with_name(f".{final.name}.part")
    try:
        yield part
        os.replace(part, final)
    except OSError as error:
        raise OutputError(
            f"cannot write {final}: {error.strerror}.", "Free space or choose another --out."
        ) from error
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, sync: bool = True) -> None:
    """Write `text` to `path` whole or not at all, and bring it to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged_file(path) as part, part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        if sync:
            os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring a folder's entries to the disk, where the system can do that."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def require_writable(out: Path) -> None:
    """Make a folder that is to be written to; raises `OutputError` where it cannot be."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".write-test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(
            f"cannot write to --out {out}: {error.strerror}.", "Choose another folder."
        ) from error


def require_apart(out: Path, model: str) -> None:
    """Raise `OutputError` where a model is `out` itself or lies in it, and would be written over."""
    place, target = Path(model).expanduser(), out.expanduser()
    if model == "demo" or not place.exists():
        return
    for form in (Path.absolute, Path.resolve):
        if form(target) in (form(place), *form(place).parents):
            raise OutputError(
                f"the model {model} lies in --out {out}, where it would be written over.",
                "Choose another folder for --out.",
            )


def foreign_plots(folder: Path) -> list[str]:
    """Return what lies in the plots of a run or a sweep and is no plot."""
    inside = (folder / "plots").glob("*") if (folder / "plots").is_dir() else ()
    return sorted(f"plots/{p.name}" for p in inside if p.suffix not in (".png", ".svg"))


def write_json(path: Path, value: Mapping[str, Any], *, sync: bool = True) -> None:
    """Write `value` as JSON, whole or not at all; NaN and infinity are refused."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(path, text, sync=sync)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises `DataError` that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}).", DAMAGED) from error
    if not isinstance(value, dict):
        raise DataError(f"{path} does not hold a JSON object.", DAMAGED)
    return value


def save(folder: Path, kind: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Save a stage result; `meta.json` is written last and marks the folder as complete."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{TENSORS}.part"
    try:
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in tensors.items()}, part
        )
        os.replace(part, folder / TENSORS)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise OutputError(
            f"cannot write {folder / TENSORS}: {error}.", "Free space or choose another --out."
        ) from error
    write_json(folder / META, {"kind": kind, "schema": SCHEMA, **meta})


def read_meta(folder: Path, kind: str) -> dict[str, Any]:
    """Read the meta data of a stage result of this kind; raises `DataError`."""
    meta = read_json(folder / META)
    if not {"kind", "schema"} <= meta.keys():
        raise DataError(f"{folder / META} does not say what it belongs to.", DAMAGED)
    if meta["kind"] != kind or meta["schema"] != SCHEMA:
        raise DataError(
            f"{folder} holds {meta['kind']!r} of schema {meta['schema']!r}, "
            f"not {kind!r} of schema {SCHEMA}."
        )
    return meta


def load(folder: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load a stage result of this kind: its tensors and its meta data; raises `DataError`."""
    meta = read_meta(folder, kind)
    try:
        return load_file(folder / TENSORS), meta
    except (OSError, SafetensorError) as error:
        raise DataError(f"{folder / TENSORS} cannot be read ({error}).", DAMAGED) from error


@contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """Give a folder to fill beside `final`; move it there when the block ends well, else remove it."""
    part = final.with_name(f".{final.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"cannot create {part}: {error.strerror}.") from error
    try:
        yield part
        if final.exists():
            shutil.rmtree(final)
        os.replace(part, final)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"cannot write {final}: {error}.", "Free space or choose another --out."
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
