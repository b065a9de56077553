"""Shards in parallel: jobs that this process does itself, or hands to worker processes.

A worker is `python -m saber.checkpoint.workers`. It reads jobs as lines of JSON and answers each with
one line; when its parent is gone, whatever the reason, its input ends and so does it, and a block
that it is writing is the last.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from saber import artifacts, errors
from saber.checkpoint import blocks
from saber.checkpoint.carry import link_or_copy
from saber.checkpoint.plan_on_disk import DiskPlan, Factors, TensorEdit
from saber.checkpoint.shards import Source, read_source
from saber.checkpoint.stream import write_shard
from saber.errors import SaberError

POLL = 0.2
"""Seconds between two looks at how far the work is."""


class Stopped(Exception):
    """The work is to end between two blocks."""


@dataclass(frozen=True)
class Job:
    """What to do with one shard."""

    source: str
    """Folder of the checkpoint."""
    plan: str
    """Folder of the plan."""
    file: str
    """The shard, by its path in the folder."""
    target: str
    """Where to write it; empty to hash what would be written."""
    edit: bool
    """Whether edits touch it; otherwise it is linked or copied."""
    added: dict[str, str]
    """What goes into its metadata."""
    link: bool = True
    """Whether an untouched shard may be a hard link."""
    sync: bool = True
    """Whether to bring what is written to the disk."""


@dataclass(frozen=True)
class Done:
    """A shard that is finished."""

    file: str
    """Its path in the folder."""
    sha256: str
    """Of the whole file."""
    size: int
    """Bytes."""
    rounding: dict[str, float] = field(default_factory=dict)
    """By 8-bit tensor: norm of the rounding error as a share of the edit's."""


_OPENING = threading.Lock()


def _shared(job: Job) -> tuple[Source, dict[str, TensorEdit], Factors]:
    with _OPENING:
        return _opened(job.source, job.plan)


@lru_cache(maxsize=1)
def _opened(source: str, plan: str) -> tuple[Source, dict[str, TensorEdit], Factors]:
    checkpoint, disk = read_source(Path(source)), DiskPlan.read(Path(plan))
    return checkpoint, disk.edits(checkpoint), disk.open()


def forget() -> None:
    """Close what jobs have opened."""
    _opened.cache_clear()


def do(job: Job, check: Callable[[], None] = lambda: None) -> Done:
    """Do one job: write under a temporary name, bring it to the disk, and move it to its place."""
    source = Path(job.source) / job.file
    target = Path(job.target) if job.target else None
    if target is not None:
        with blocks.writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
    if not job.edit:
        assert target is not None
        digest = link_or_copy(source, target, link=job.link, check=check, sync=job.sync)
        return Done(job.file, digest, target.stat().st_size)
    checkpoint, edits, factors = _shared(job)
    part = target.with_name(f".{target.name}.{os.getpid()}.part") if target else None
    made = write_shard(checkpoint, job.file, part, edits, factors, job.added, check, sync=job.sync)
    if part is not None and target is not None:
        with blocks.writing(target):
            if part.stat().st_size != made.size:
                raise errors.OutputError(f"{part} has another size than what was written to it.")
            check()
            os.replace(part, target)
            if job.sync:
                artifacts.sync_folder(target.parent)
    # A factor of zeros, as of an expert that no prompt reached, has nothing to lose.
    lost = {name: r.lost for name, r in made.rounding.items() if r.edit}
    return Done(job.file, made.sha256, made.size, lost)


class _Here:
    """Does jobs in this process."""

    def __init__(self) -> None:
        self.stopped = threading.Event()

    def do(self, job: Job) -> Done:
        return do(job, self._check)

    def _check(self) -> None:
        if self.stopped.is_set():
            raise Stopped

    def stop(self) -> None:
        self.stopped.set()

    def close(self) -> None:
        forget()


class _There:
    """Has jobs done by a worker process, one at a time."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "saber.checkpoint.workers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for this process, which then ends them
        )

    def do(self, job: Job) -> Done:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(dataclasses.asdict(job)) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise SaberError(
                f"a worker process ended while it wrote {job.file} (exit code {self.process.wait()}).",
                "Give the same command again, with a smaller --workers.",
            )
        value = json.loads(answer)
        if "error" in value:
            raise _error(value)
        return Done(**value)

    def stop(self) -> None:
        self.process.kill()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()


def _error(value: dict[str, str]) -> SaberError:
    if value["kind"] == "OutputError":
        return errors.OutputError(value["error"], value["remedy"])
    error = SaberError(value["error"], value["remedy"])
    error.exit_code = getattr(errors, value["kind"], SaberError).exit_code
    return error


def do_all(
    jobs: Sequence[Job], workers: int, mark: Callable[[Done], None], tick: Callable[[], None]
) -> None:
    """Do all jobs; `mark` is told of each that is done, `tick` is called now and then.

    With one worker two threads of this process do the jobs, so that one shard is made while another
    reaches the disk. Raises what a job raises, after the others have stopped.
    """
    count = max(1, min(workers, len(jobs)))
    hands: list[_Here | _There] = [_Here()] * 2 if count == 1 else [_There() for _ in range(count)]
    free: SimpleQueue[_Here | _There] = SimpleQueue()
    for hand in hands:
        free.put(hand)

    def one(job: Job) -> None:
        hand = free.get()
        try:
            mark(hand.do(job))
        finally:
            free.put(hand)

    pool = ThreadPoolExecutor(len(hands))
    threads = torch.get_num_threads()
    # Blocks are small: more threads for one would wait for each other while others hash and write.
    torch.set_num_threads(1)
    pending: set[Future[None]] = set()
    try:
        pending.update(pool.submit(one, job) for job in jobs)
        while pending:
            done, pending = wait(pending, POLL, FIRST_COMPLETED)
            tick()
            for future in done:
                future.result()
    finally:
        torch.set_num_threads(threads)
        pool.shutdown(wait=False, cancel_futures=True)
        for hand in hands:
            hand.stop()
        pool.shutdown()
        for hand in hands:
            hand.close()


def _answer(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Do the jobs that come in, until the input ends or the parent is gone."""
    torch.set_num_threads(1)
    parent = os.getppid()

    def check() -> None:
        if os.getppid() != parent:
            raise Stopped

    for line in sys.stdin:
        try:
            done = do(Job(**json.loads(line)), check)
            _answer(dataclasses.asdict(done))
        except SaberError as error:
            value = {"error": error.problem, "remedy": error.remedy, "kind": type(error).__name__}
            _answer(value)
        except (Stopped, KeyboardInterrupt):
            return


if __name__ == "__main__":
    main()
