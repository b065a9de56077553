"""Read ranges of a file and write a file once, with clear lines for what can go wrong on a disk."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from saber.errors import ModelError, OutputError

CHUNK, SYNC = 1 << 22, 1 << 26
"""Bytes copied at once; bytes after which the disk is set to work on what is there already."""
MARGIN = 1 << 24
"""Bytes that must stay free beside what is written."""
FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def writing(path: Path | None) -> Iterator[None]:
    """Turn what the system says while something is written into one clear line."""
    try:
        yield
    except OSError as error:
        remedy = "Choose another --out."
        if error.errno in FULL:
            remedy = "Free space; the same command then goes on where this one stopped."
        raise OutputError(f"cannot write {path}: {error.strerror or error}.", remedy) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the system says while something is read into one clear line."""
    try:
        yield
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}.") from error


def require_room(out: Path, needed: int) -> None:
    """Raise `OutputError` when so many bytes do not fit the disk that `out` will lie on."""
    parent = next(p for p in out.absolute().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if needed + MARGIN > free:
        raise OutputError(
            f"the disk of {out.parent} is full: {needed / 1e9:.2f} GB are to be written and "
            f"{free / 1e9:.2f} GB are free.",
            "Free space or choose another --out.",
        )


@dataclass
class Sink:
    """A file that is written once, from front to back.

    Threads of its own hash it on the way and bring it to the disk, so that little is left to wait for.
    """

    path: Path | None
    """Where to write; None to hash alone."""
    check: Callable[[], None] = lambda: None
    """Called before each block; raises to stop."""
    sync: bool = True
    """Whether to bring it to the disk; otherwise the system does, when it sees fit."""
    size: int = 0
    """Bytes written so far."""
    _digest: Any = field(default_factory=hashlib.sha256)
    _handle: int = -1
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2))
    _hashing: Future[None] | None = None
    _syncing: Future[None] | None = None
    _synced: int = 0

    def __enter__(self) -> Sink:
        if self.path is not None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)
            with writing(self.path):
                self._handle = os.open(self.path, flags, 0o644)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def write(self, data: Any) -> None:
        """Append a buffer; the one before it is free to be filled anew once this returns."""
        self.check()
        view = memoryview(data).cast("B")
        self._settle()
        self._hashing = self._pool.submit(self._digest.update, view)
        if self._handle >= 0:
            done = 0
            with writing(self.path):
                while done < len(view):
                    done += os.write(self._handle, view[done:])
        self.size += len(view)
        idle = self._syncing is None or self._syncing.done()
        if self._handle >= 0 and self.sync and idle and self.size - self._synced >= SYNC:
            self._synced = self.size
            self._syncing = self._pool.submit(os.fsync, self._handle)

    def _settle(self) -> None:
        if self._hashing is not None:
            self._hashing.result()

    def finish(self) -> str:
        """Bring everything to the disk, where that is asked for, and return the SHA-256 of it."""
        self._settle()
        if self._handle >= 0 and self.sync:
            with writing(self.path):
                if self._syncing is not None:
                    self._syncing.result()
                os.fsync(self._handle)
        return str(self._digest.hexdigest())


@dataclass
class Reader:
    """Reads ranges of bytes of one file into two buffers by turns."""

    path: Path
    """The file."""
    file: IO[bytes]
    """Open and without a buffer of its own."""
    _buffers: list[bytearray] = field(default_factory=lambda: [bytearray(0), bytearray(0)])

    def chunks(self, begin: int, end: int, step: int = CHUNK) -> Iterator[memoryview]:
        """Yield a range in parts of at most `step` bytes, each good until the next but one is read."""
        while begin < end:
            count = min(step, end - begin)
            yield self.read(begin, count)
            begin += count

    def read(self, begin: int, count: int) -> memoryview:
        """Return some bytes, good until the next call but one. Raises `ModelError` if the file ends."""
        self._buffers.reverse()
        if len(self._buffers[0]) < count:
            self._buffers[0] = bytearray(count)
        view = memoryview(self._buffers[0])[:count]
        done = 0
        with reading(self.path):
            self.file.seek(begin)
            while done < count:
                got: int = self.file.readinto(view[done:])  # type: ignore[attr-defined]
                if not got:
                    raise ModelError(f"{self.path} ended early: it was changed while it was read.")
                done += got
        return view


@contextmanager
def opened(path: Path) -> Iterator[Reader]:
    """Give a reader of a file."""
    with reading(path):
        file = path.open("rb", buffering=0)
    with file:
        yield Reader(path, file)


def sha256(path: Path, check: Callable[[], None] = lambda: None) -> str:
    """Return the SHA-256 of a file."""
    with opened(path) as reader, Sink(None, check) as sink:
        for chunk in reader.chunks(0, os.fstat(reader.file.fileno()).st_size):
            sink.write(chunk)
        return sink.finish()


def copy(
    source: Path, target: Path, check: Callable[[], None] = lambda: None, *, sync: bool = True
) -> str:
    """Copy a file, bring it to the disk and return its SHA-256."""
    with opened(source) as reader, Sink(target, check, sync) as sink:
        for chunk in reader.chunks(0, os.fstat(reader.file.fileno()).st_size):
            sink.write(chunk)
        return sink.finish()
