"""The journal of a sweep: what was asked for, and one line for every finished trial."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import filelock

from saber import artifacts
from saber.errors import DataError, OutputError, UsageError

STUDY, TRIALS, LOCK, SHARED = "study.json", "trials.jsonl", ".lock", "shared"
SWEEP, PARQUET, PLOTS, README = "sweep.json", "trials.parquet", "plots", "README.md"
OPTUNA = "search.journal"
KIND = "sweep-study"


@dataclass(frozen=True)
class Row:
    """A trial that has ended."""

    number: int
    """From 1."""
    key: str
    """Digest of its configuration."""
    values: Mapping[str, Any]
    """Value of each axis."""
    state: Literal["done", "failed", "pruned"]
    """done: measured; failed: its edit is no use, see `error`; pruned: forward passes alone showed that
    another trial is better in all respects."""
    seconds: float = 0.0
    """Wall time."""
    tokens: int = 0
    """Tokens that went through the model for it."""
    shared: int = 0
    """Tokens that did not have to, as another trial's results served."""
    directions: int = 0
    """Directions ablated, over all passes."""
    layers: int = 0
    """Layers that these are from."""
    passes: int = 0
    """Passes made."""
    stop_reason: str = ""
    """Why no further one was."""
    nodes: tuple[str, ...] = ()
    """Digest of the plan after each pass: trials whose lists begin alike share these passes."""
    measured: Mapping[str, Any] | None = None
    """Its measures on validation prompts, as in `run.json`."""
    plan: str = ""
    """Digest of its plan; empty where there is none."""
    cheap: Mapping[str, float] | None = None
    """Its scores by forward passes alone, where these were taken."""
    error: str = ""
    """Why it failed."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the sweep's folder: one driver at a time; raises `UsageError` when another has it.

    Where no study was begun nothing is left, nor the folder where it is empty then.
    """
    lock = filelock.FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise UsageError(
            f"another process works on the sweep in {folder}.",
            "Wait for it to end, or stop it; more workers go to one driver: --workers N.",
        ) from error
    try:
        yield
    finally:
        if not (folder / STUDY).exists():
            shutil.rmtree(folder / SHARED, ignore_errors=True)
            with suppress(OSError):
                (folder / LOCK).unlink(missing_ok=True)
                folder.rmdir()
        lock.release()


class Journal:
    """Finished trials in a file that only grows; each line is on the disk before it counts."""

    def __init__(self, path: Path) -> None:
        """Read what is there, but for half a line at the end: of a killed driver, or of one at work."""
        self._path = path
        self.rows: list[Row] = []
        """In the order in which they ended."""
        whole = path.read_bytes() if path.exists() else b""
        end = whole.rfind(b"\n") + 1
        for count, line in enumerate(whole[:end].splitlines(), 1):
            try:
                row = json.loads(line)
                row["nodes"] = tuple(row["nodes"])
                self.rows.append(Row(**row))
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(f"{path}, line {count}: no trial ({error}).") from error
        self._torn = end if end < len(whole) else None

    def append(self, row: Row) -> None:
        """Write a finished trial down, in place of half a line; it is on the disk when this returns."""
        line = json.dumps(asdict(row), ensure_ascii=False, allow_nan=False) + "\n"
        try:
            new = not self._path.exists()
            if self._torn is not None:
                os.truncate(self._path, self._torn)
                self._torn = None
            with self._path.open("ab") as file:
                file.write(line.encode("utf-8"))
                file.flush()
                os.fsync(file.fileno())
            if new:
                artifacts.sync_folder(self._path.parent)
        except OSError as error:
            raise OutputError(
                f"cannot write {self._path}: {error.strerror}.",
                "Free space, then go on with --resume.",
            ) from error
        self.rows.append(row)

    def done(self) -> dict[str, Row]:
        """Return the trials by the digest of their configuration."""
        return {row.key: row for row in self.rows}


def read_study(folder: Path) -> dict[str, Any]:
    """Return what a sweep was asked for; raises `DataError` for a folder without one."""
    if not (folder / STUDY).is_file():
        raise DataError(
            f"{folder} holds no sweep (no {STUDY}).", "Give the folder of `saber sweep`."
        )
    study = artifacts.read_json(folder / STUDY)
    if study.get("kind") != KIND or study.get("schema") != artifacts.SCHEMA:
        raise DataError(f"{folder / STUDY} is no study of schema {artifacts.SCHEMA}.")
    lacking = [k for k in ("model", "config") if not isinstance(study.get(k), dict)]
    if lacking:
        raise DataError(f"{folder / STUDY} lacks {' and '.join(lacking)}.", artifacts.DAMAGED)
    return study


def write_study(folder: Path, study: Mapping[str, Any]) -> None:
    """Write down what a sweep was asked for."""
    artifacts.write_json(folder / STUDY, {"kind": KIND, "schema": artifacts.SCHEMA, **study})


SAME = ("model", "config", "judge", "prompts", "template", "version")
"""Parts of a study that a resumed sweep must have in common with it."""


def require_same(folder: Path, study: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise `UsageError` that lists what differs between a study and what is asked for now."""
    changes = [line for part in SAME for line in _changes(study.get(part), now.get(part), part)]
    if changes:
        more = f"; and {len(changes) - 6} more" if len(changes) > 6 else ""
        raise UsageError(
            f"the sweep in {folder} was made with something else: {'; '.join(changes[:6])}{more}.",
            "Give the same model, prompts and settings, or another --out.",
        )


def _changes(before: Any, now: Any, path: str) -> list[str]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        return [
            line
            for name in dict.fromkeys([*before, *now])
            for line in _changes(before.get(name), now.get(name), f"{path}.{name}")
        ]
    return [] if before == now else [f"{path} {_short(before)} -> {_short(now)}"]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 24 else f"{text[:23]}\u2026"


def prepare(out: Path, model: str = "", *, overwrite: bool, resume: bool) -> None:
    """Make the folder usable before any work is done; raises `OutputError` when it is not.

    A sweep that is there is gone on with (`resume`) or removed (`overwrite`); other files never are, and
    no folder that holds `model` is taken.
    """
    ours: Sequence[str] = (*(STUDY, TRIALS, LOCK, SHARED, SWEEP, PARQUET, PLOTS, README, OPTUNA),)
    if out.exists() and not out.is_dir():
        raise OutputError(f"--out {out} is a file.", "Choose a folder.")
    if model:
        artifacts.require_apart(out, model)
    if not _has_study(out):
        # What a sweep leaves that ended before it had begun.
        ours = (OPTUNA, *([SHARED] if _is_shared(out / SHARED) else []))
    found = [p.name for p in out.iterdir()] if out.is_dir() else []
    foreign = sorted(n for n in found if not n.startswith((*ours, ".")))
    if overwrite and not resume:
        foreign += artifacts.foreign_plots(out)
    if foreign:
        raise OutputError(
            f"--out {out} holds files that are not a sweep's ({', '.join(foreign[:3])}).",
            "Choose another folder.",
        )
    if _has_study(out) and not (resume or overwrite):
        raise OutputError(
            f"--out {out} holds a sweep.", "Choose another, or --overwrite, or --resume."
        )
    artifacts.require_writable(out)


def _has_study(out: Path) -> bool:
    return (out / STUDY).is_file() and artifacts.read_json(out / STUDY).get("kind") == KIND


def _is_shared(folder: Path) -> bool:
    """Whether a folder holds nothing but results that trials share."""
    ours = re.compile(r"[0-9a-f]{32}|parts|\..*\.part")
    return folder.is_dir() and all(ours.fullmatch(p.name) for p in folder.iterdir())
