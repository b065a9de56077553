"""Save and load the results of stages: a folder with tensors and a meta file, written atomically."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from saber.errors import DataError, OutputError
from saber.paths import expanded

SCHEMA = 1
TENSORS, META = "tensors.safetensors", "meta.json"
FILES, LOCK = "files", "lock"
"""In the folder in which another comes into being: what will be moved, and who is at work there."""
ATTEMPTS = 100
"""Times that a lock is tried for which others keep taking away."""
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


def names_gguf(model: str) -> bool:
    """Whether a model is called as a GGUF file, be it there or not, and is no folder of that name."""
    return model.endswith(".gguf") and not expanded(model).is_dir()


def require_apart(out: Path, model: str) -> None:
    """Raise `OutputError` where a model is `out` itself or lies in it, and would be written over."""
    place, target = expanded(model), expanded(out)
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
    except (ValueError, RecursionError) as error:
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
    """Give a folder to fill beside `final`; move it there when the block ends well, else remove it.

    Raises `OutputError` where another process is filling one, and where `final` is there and not empty.
    """
    part = final.with_name(f".{final.name}.part")
    with claimed(final, part / LOCK):
        try:
            for path in part.iterdir():  # what a process that was killed has left
                if path.name != LOCK:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            (part / FILES).mkdir()
        except OSError as error:
            raise OutputError(f"cannot create {part}: {error.strerror}.") from error
        try:
            require_free(final)
            yield part / FILES
            require_free(final)
            if final.exists():
                final.rmdir()
            os.replace(part / FILES, final)
        except (OSError, SafetensorError) as error:
            raise OutputError(
                f"cannot write {final}: {error}.", "Free space or choose another --out."
            ) from error
        finally:
            shutil.rmtree(part, ignore_errors=True)


def require_free(out: Path, *, file: bool = False) -> None:
    """Raise `OutputError` for what is there already, but for an empty folder, whose place a folder takes.

    `file` asks for the place of a file: that of a folder it cannot take, empty or not.
    """
    if out.exists() and (file or not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} exists already.", "Choose another --out.")


@contextmanager
def claimed(out: Path, lock: Path | None = None) -> Iterator[None]:
    """Hold `out` against another process that would write it too, by a lock file that is removed afterwards.

    `lock` is that file; None takes one beside `out`. A process that was killed holds nothing, whatever it
    has left. Raises `OutputError` where another one holds it.
    """
    if lock is None:
        whole = Path(os.path.abspath(out))
        lock = whole.with_name(f".{whole.name}.lock") if whole.name else whole / LOCK
    try:
        file = _held(lock)
    except BlockingIOError as error:
        raise OutputError(
            f"another process is writing {out}.", "Wait for it, or choose another --out."
        ) from error
    except OSError as error:
        raise OutputError(
            f"cannot write {lock.parent}: {error.strerror or error}.", "Choose another --out."
        ) from error
    try:
        yield
    finally:
        if file is not None:
            with suppress(OSError):
                lock.unlink(missing_ok=True)
            file.close()


def _held(lock: Path) -> IO[bytes] | None:
    """Return the open lock file, which nobody else holds; None where the system has no such locks.

    Raises `BlockingIOError` where another process holds it.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:
        return None
    for attempt in range(ATTEMPTS):
        try:
            file = lock.open("ab")
        except FileNotFoundError:  # who held it has just removed the folder
            lock.parent.mkdir(parents=True, exist_ok=True)
            if attempt + 1 == ATTEMPTS:  # or nothing can be made there, as in /proc
                raise
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                return file
        except BlockingIOError:
            file.close()
            raise
        except FileNotFoundError:
            pass  # who held it has just removed it
        except OSError:
            return file  # a file system without them
        file.close()
    raise BlockingIOError
