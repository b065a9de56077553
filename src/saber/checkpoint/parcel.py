"""What of an edited model goes to the hub, and whether it may: nothing without card and provenance."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from saber.checkpoint.card import published
from saber.checkpoint.carry import PRIVATE
from saber.checkpoint.export import CARD, PLACES
from saber.checkpoint.provenance import FILE, Record, carried
from saber.checkpoint.runs import RUN
from saber.errors import DataError, SaberError
from saber.notices import warned

WEIGHTS = (".safetensors", ".gguf")
MARKS = ("plan_hash", "base_fingerprint", "base_checkpoint")
"""What a card names an edit by; one of them is enough."""


@dataclass(frozen=True)
class Parcel:
    """Files that go to the hub together."""

    source: Path
    """The folder or GGUF file that they are."""
    files: Mapping[str, Path]
    """By path in the repository."""
    origin: Mapping[str, str]
    """What the weights carry (`provenance.KEYS`)."""

    def card_for(self, repo: str) -> bytes:
        """Content of the card as it is pushed to a repository, which it then names."""
        return published(self.files[CARD].read_bytes(), repo)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.files.values())


def parcel(path: Path) -> Parcel:
    """Return what to push of a folder or GGUF file that SABER wrote.

    Of a run folder it is the edited model in it, never the run's own files. A GGUF file goes with the
    card beside it. Hidden files stay behind, unless the folder's record names them.

    Raises `DataError` for what SABER did not write, and for a card that has lost the warning or the
    provenance that an edited model is published with.
    """
    path = inside(path)
    if path.is_file():
        record, files = None, {path.name: path, CARD: path.with_suffix(".md")}
    else:
        record = Record.load(path) if (path / FILE).is_file() else None
        files = _files(path, record.files if record else {})
    origin = _origin(path, files, record)
    _check_card(files.get(CARD), origin)
    return Parcel(path, files, origin)


def inside(path: Path) -> Path:
    """Return the artifact that a path means; raises `DataError` when it is none or one of several."""
    if path.is_file():
        if path.suffix != ".gguf":
            raise DataError(f"{path} is no .gguf file.", "Give a folder or a .gguf file to push.")
        return path
    if not path.is_dir():
        raise DataError(f"no such folder or file: {path}.")
    if not (path / RUN).is_file():
        return path
    made = [path / place for place in PLACES.values() if (path / place).is_dir()]
    if len(made) == 1:
        return made[0]
    if not made:
        raise DataError(
            f"the run in {path} has no edited model in it.",
            "Make one with saber apply or saber export.",
        )
    raise DataError(
        f"{path} holds several edited models.", f"Give one: {', '.join(map(str, made))}."
    )


def _files(folder: Path, recorded: Mapping[str, object]) -> dict[str, Path]:
    found = {}
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if f not in PRIVATE)
        for file in sorted(files):
            path = Path(root) / file
            name = path.relative_to(folder).as_posix()
            hidden = any(part.startswith(".") for part in Path(name).parts)
            if not hidden or name in recorded or name == ".gitattributes":
                found[name] = path
    return found


def _origin(path: Path, files: Mapping[str, Path], record: Record | None) -> Mapping[str, str]:
    """Return what the weights carry; raises `DataError` when they carry nothing, or another's."""
    named = record.edited if record else [n for n in files if n.endswith(WEIGHTS)]
    parts = {name: _carried(files.get(name)) for name in named}
    if record is not None:
        other = [name for name, part in parts.items() if part != dict(record.origin)]
        if other or not parts:
            raise DataError(
                f"{path} is not what {FILE} says: {(other or ['no weights'])[0]} is another's or missing.",
                "Make it again, or see what changed with saber verify.",
            )
        return record.origin
    for part in parts.values():
        if "plan_hash" in part:
            return part
    raise DataError(
        f"{path} carries no provenance, so it is not pushed.",
        "Push what saber run, apply or export wrote.",
    )


def _carried(path: Path | None) -> dict[str, str]:
    try:
        return carried(path) if path is not None else {}
    except (SaberError, OSError, ValueError):
        return {}  # damaged, so it carries nothing


def _check_card(card: Path | None, origin: Mapping[str, str]) -> None:
    needed = "An edited model is published with its card: warning and provenance."
    if card is None or not card.is_file():
        raise DataError(
            f"there is no card{f' {card}' if card else ''}, so nothing is pushed.", needed
        )
    text = card.read_text("utf-8", "replace")
    if not warned(text):
        raise DataError(f"the card {card} has lost SABER's warning.", needed)
    if not any(origin[mark] in text for mark in MARKS if mark in origin):
        raise DataError(
            f"the card {card} names neither the plan nor the base of this edit.", needed
        )
