"""A finished run as exports read it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from saber import artifacts
from saber.ablation import EditPlan
from saber.checkpoint.sketch import Sketch
from saber.errors import DataError, ModelError, OutputError
from saber.paths import expanded

LOCAL = ("folder", "gguf")
"""Sources of a model that lies on this machine under a name of the user's."""
RUN, PLAN, SKETCH = "run.json", "plan", "sketch"
EXPORTS, ELSEWHERE = "exports", "..."
LOCK, WAIT = ".lock", 60.0
"""What processes that add to one `run.json` take turns by, beside its plan, and for how long, seconds."""
_SCAN, _SPACE = json.JSONDecoder().raw_decode, re.compile(r"\s*")


def read_record(folder: Path) -> dict[str, Any]:
    """Read a run folder's `run.json`; raises `DataError` where it does not say what chat and export need."""
    record = artifacts.read_json(folder / RUN)
    if record.get("schema", artifacts.SCHEMA) != artifacts.SCHEMA:
        raise DataError(
            f"{folder / RUN} is of schema {record['schema']!r}, this version reads schema "
            f"{artifacts.SCHEMA}.",
            "Use the version of SABER that made the run, or make the run again.",
        )
    model, config = record.get("model"), record.get("config")
    named = model if isinstance(model, dict) else {}
    lacking = [f"model.{k}" for k in ("name", "fingerprint") if not isinstance(named.get(k), str)]
    lacking += [] if isinstance(config, dict) else ["config"]
    if lacking:
        raise DataError(
            f"{folder / RUN} lacks {' and '.join(lacking)}.",
            "It is damaged, or no run's: copy it anew, or make the run again.",
        )
    return record


def read_plan(folder: Path, record: Mapping[str, Any]) -> EditPlan:
    """Read a run folder's plan; raises `DataError` where it is damaged, or was made on another model."""
    plan = EditPlan.load(folder / PLAN)
    meta, mark = folder / PLAN / artifacts.META, record["model"]["fingerprint"]
    made_on = artifacts.read_json(meta).get("fingerprint") if meta.is_file() else None
    if made_on is not None and made_on != mark:
        raise DataError(
            f"{folder / PLAN} is of another model than {RUN} ({str(made_on)[:19]}, not {mark[:19]}).",
            "Copy the run folder anew, or make the run again.",
        )
    return plan


def way_back(folder: Path, model: str, source: str) -> dict[str, str]:
    """Return what leads from a run folder to where a relative path of its model begins: folders up alone.

    Nothing where it would name folders of this machine, which a published `run.json` should not.
    """
    here, there = Path.cwd(), folder.resolve()
    if source not in LOCAL or expanded(model).is_absolute() or here not in there.parents:
        return {}
    return {"relative_to": "/".join([".."] * (len(there.parts) - len(here.parts)))}


def base_of(folder: Path, model: Mapping[str, Any]) -> str:
    """Return the name of a run's model as it is to be loaded from here; raises `ModelError` where it is not.

    `model` is what `run.json` says of it.
    """
    name = str(model["name"])
    if model.get("source") not in LOCAL:
        return name
    given, way = expanded(name), model.get("relative_to")
    if isinstance(way, str) and (there := folder.resolve() / way / name).exists():
        same = given.exists() and given.samefile(there)
        return name if same else os.path.relpath(there)
    if not given.exists():
        raise ModelError(f"the run's model {name} is not here.", "Say where it is: --base PATH.")
    return name


def note_export(folder: Path, row: Mapping[str, Any]) -> None:
    """Add an export to the list in a run's `run.json`, in place of an older one at the same place.

    Every other byte of the file stays. Raises `DataError` where it cannot be read, `OutputError` where it
    cannot be written.
    """
    with alone(folder):
        rows = json.dumps(exports_with(folder, row), indent=2, ensure_ascii=False)
        rows = rows.replace("\n", "\n  ")
        text = (folder / RUN).read_text(encoding="utf-8")
        where = _span(text, EXPORTS)
        if where is None:
            text = f'{text.rstrip()[:-1].rstrip()},\n  "{EXPORTS}": {rows}\n}}\n'
        else:
            text = text[: where[0]] + rows + text[where[1] :]
        artifacts.write_text(folder / RUN, text)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a finished run's `run.json`, so that exports made at once lose none of each other's rows.

    Raises `OutputError` where that cannot be had.
    """
    lock = filelock.FileLock(folder / PLAN / LOCK)
    try:
        lock.acquire(timeout=WAIT)
    except filelock.Timeout as error:
        raise OutputError(
            f"another process holds {folder / RUN}.", "Wait for it to end."
        ) from error
    except OSError as error:
        raise OutputError(f"cannot write {folder / RUN}: {error.strerror}.") from error
    try:
        yield
    finally:
        lock.release()


def exports_with(folder: Path, row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the exports in a run's `run.json` and one more, in place of an older one at the same place.

    Raises `DataError` where they cannot be read.
    """
    listed = read_record(folder).get(EXPORTS) or []
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise DataError(f"{folder / RUN} holds no usable list of {EXPORTS}.", artifacts.DAMAGED)
    again = "" if row["path"].startswith(f"{ELSEWHERE}/") else row["path"]
    return [*(one for one in listed if one.get("path") != again), row]


def _span(text: str, key: str) -> tuple[int, int] | None:
    """Return where the value of a key begins and ends in the text of a JSON object; None without it."""

    def behind(at: int) -> int:
        found = _SPACE.match(text, at)
        assert found is not None
        return found.end()

    at = behind(0)
    while text[at] != "}":
        at = behind(at + 1)  # behind the brace or a comma
        name, at = _SCAN(text, at)
        begin = behind(behind(at) + 1)
        _, end = _SCAN(text, begin)
        if name == key:
            return begin, end
        at = behind(end)
    return None


def place_of(out: Path, folder: Path) -> str:
    """Return where an export lies as `run.json` says it: from the run folder on.

    Of one outside the folder in which both are worked on it is the last part alone, behind `.../`: a
    published `run.json` should name no folders of this machine.
    """
    run, there, here = folder.resolve(), out.resolve(), Path.cwd()
    if run in there.parents or (here in run.parents and here in there.parents):
        return Path(os.path.relpath(there, run)).as_posix()
    return f"{ELSEWHERE}/{there.name}"


@dataclass(frozen=True)
class Run:
    """A finished run: what was found, and on which model."""

    record: Mapping[str, Any]
    """`run.json`."""
    plan: EditPlan
    """The edit."""
    sketch: Sketch | None
    """Samples of the weights before the edit; runs of older versions have none."""
    folder: Path | None = None
    """Where it lies; None for a run of which nothing is on the disk."""

    @classmethod
    def load(cls, folder: Path) -> Run:
        """Read a run folder; raises `DataError` where there is none, or none with a plan."""
        if not (folder / RUN).is_file():
            what = "is not finished" if (folder / "state.json").is_file() else "is no run folder"
            raise DataError(
                f"{folder} {what}: it has no {RUN}.", "Give a folder that saber run wrote."
            )
        if not (folder / PLAN / artifacts.META).is_file():
            raise DataError(
                f"the run in {folder} has no plan, so there is nothing to export.",
                "Give a run that edited its model.",
            )
        record = read_record(folder)
        plan = read_plan(folder, record)
        if not plan.factors:
            raise DataError(f"the plan in {folder / PLAN} changes nothing.")
        sketch = Sketch.load(folder / PLAN / SKETCH)
        return cls(record, plan, sketch, folder)

    @property
    def model(self) -> Mapping[str, Any]:
        """What `run.json` says of the model: name, source, base, fingerprint, ..."""
        found: Mapping[str, Any] = self.record["model"]
        return found
