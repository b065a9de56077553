"""The folder in which an edited checkpoint comes into being, beside the one that it becomes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from saber import artifacts
from saber.checkpoint import blocks, provenance
from saber.checkpoint.provenance import Record
from saber.checkpoint.shards import Source
from saber.checkpoint.workers import Done, Job
from saber.errors import OutputError, SaberError

STATE, MARKS = "state.json", "marks"


def in_use(out: Path) -> OutputError:
    """Return the error for an --out that holds something."""
    return OutputError(f"--out {out} is not empty.", "Choose another folder, or empty it.")


@dataclass(frozen=True)
class Stage:
    """The folder beside --out in which it comes into being.

    `files` is what will be moved to --out, `state.json` says what it is made from, and `marks` has a
    file for each finished shard. A shard counts as finished when it has its name and its mark, and
    its bytes still have the mark's SHA-256.
    """

    out: Path
    """What --out names."""
    folder: Path
    """The folder beside it."""
    sync: bool = True
    """Whether to bring what is written to the disk."""

    @property
    def files(self) -> Path:
        """Where the files of --out are."""
        return self.folder / artifacts.FILES

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder against another process that would write the same --out."""
        with artifacts.claimed(self.out, self.folder / artifacts.LOCK):
            try:
                yield
            except SaberError:
                if not (self.folder / STATE).exists():
                    shutil.rmtree(self.folder, ignore_errors=True)
                raise

    def finished(self, identity: Mapping[str, Any]) -> Record | None:
        """Return the record of --out if all was done but clearing up; raises when --out is in use."""
        if not self.out.exists() or not any(self.out.iterdir()):
            return None
        same = (self.folder / STATE).exists() and artifacts.read_json(
            self.folder / STATE
        ) == identity
        if same and not self.files.exists() and (self.out / provenance.FILE).exists():
            record = Record.load(self.out)
            shutil.rmtree(self.folder, ignore_errors=True)
            return record
        raise in_use(self.out)

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Keep what an interrupted call of the same work left; remove what another left."""
        state = self.folder / STATE
        with blocks.writing(self.folder):
            if not state.exists() or artifacts.read_json(state) != identity:
                for folder in (self.files, self.folder / MARKS):
                    shutil.rmtree(folder, ignore_errors=True)
                artifacts.write_json(state, identity, sync=self.sync)
            self.files.mkdir(exist_ok=True)
            (self.folder / MARKS).mkdir(exist_ok=True)
            for part in self.files.rglob(".*.part"):
                part.unlink()

    def left(self, jobs: list[Job], source: Source) -> tuple[int, list[Job]]:
        """Return how many jobs are finished, and those that are not."""
        left = [job for job in jobs if not self._whole(job.file)]
        return len(jobs) - len(left), left

    def _whole(self, file: str) -> bool:
        done, path = self.marked(file), self.files / file
        return done is not None and path.is_file() and blocks.sha256(path) == done.sha256

    def mark(self, done: Done) -> None:
        """Note that a shard is finished."""
        path = self.folder / MARKS / f"{done.file}.json"
        artifacts.write_json(path, asdict(done), sync=self.sync)

    def marked(self, file: str) -> Done | None:
        """Return what was noted of a finished shard."""
        path = self.folder / MARKS / f"{file}.json"
        return Done(**artifacts.read_json(path)) if path.exists() else None

    def written(self) -> int:
        """Bytes of shards so far, unfinished ones included."""
        total = 0
        for path in self.files.rglob("*"):
            try:
                total += path.stat().st_size if path.is_file() else 0
            except FileNotFoundError:
                continue  # it has just got its name
        return total

    def publish(self) -> None:
        """Move the whole folder to --out, and clear up."""
        with blocks.writing(self.out):
            if self.sync:
                artifacts.sync_folder(self.files)
            if self.out.exists():
                self.out.rmdir()
            os.replace(self.files, self.out)
            if self.sync:
                artifacts.sync_folder(self.out.parent)
            shutil.rmtree(self.folder, ignore_errors=True)
