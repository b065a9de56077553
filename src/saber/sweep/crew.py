"""Who does the trials: this process, or several local ones that each load the model once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import get_all_start_methods, get_context, parent_process
from typing import Any, Protocol, runtime_checkable

from saber.config import RunConfig
from saber.errors import SaberError
from saber.lm.device import device_of_worker
from saber.lm.forward import Progress, Share, silent
from saber.sweep.grid import Setting
from saber.sweep.journal import Row
from saber.sweep.trial import Bench, Job, Prune

MOST_DEATHS = 3
"""Workers that one setting may cost before it counts as failed."""


@runtime_checkable
class Crew(Protocol):
    """Does trials; the driver hands them out and writes down what comes back."""

    @property
    def free(self) -> int:
        """Trials that can be started now."""
        ...

    def about(self) -> dict[str, Any]:
        """Return `Bench.about`; loads the model where it is not loaded yet."""
        ...

    def start(self, setting: Setting, prune: Prune | None = None) -> None:
        """Begin a trial."""
        ...

    def wait(self) -> Row:
        """Return the next trial that ends."""
        ...

    def held_out(self, config: RunConfig) -> dict[str, Any]:
        """Return `Bench.held_out`."""
        ...

    def close(self) -> None:
        """Let the workers go."""
        ...


class Alone:
    """This process does one trial at a time."""

    def __init__(self, job: Job, progress: Progress[Any] = silent) -> None:
        self._make: Callable[[], Bench] = lambda: Bench(job, progress)
        self._bench: Bench | None = None
        self._next: tuple[Setting, Prune | None] | None = None

    @property
    def free(self) -> int:
        """One, unless a trial waits."""
        return int(self._next is None)

    def _ready(self) -> Bench:
        if self._bench is None:
            self._bench = self._make()
        return self._bench

    def about(self) -> dict[str, Any]:
        """Return `Bench.about`."""
        return self._ready().about()

    def start(self, setting: Setting, prune: Prune | None = None) -> None:
        """Remember the trial; `wait` does it."""
        self._next = (setting, prune)

    def wait(self) -> Row:
        """Do the trial."""
        assert self._next is not None
        (setting, prune), self._next = self._next, None
        return self._ready().trial(setting, prune)

    def held_out(self, config: RunConfig) -> dict[str, Any]:
        """Return `Bench.held_out`."""
        return self._ready().held_out(config)

    def close(self) -> None:
        """Forget the model."""
        self._bench = None


class Local:
    """Several processes of this machine, each an executor of its own, so that a death is one trial's.

    All load the model at once and probe a large prompt set together. The first then prepares what the
    others find on disk: the baseline and the untouched model's activations. A trial whose worker dies
    goes to a new one, `MOST_DEATHS` times at most.
    """

    def __init__(self, job: Job, workers: int, threads: int | None = None) -> None:
        self._job, self._size = job, workers
        self._threads = threads or max(1, (os.cpu_count() or 1) // workers)
        self._executors: dict[int, ProcessPoolExecutor] = {}
        self._running: dict[Future[Row], tuple[int, Setting, Prune | None]] = {}
        self._deaths: dict[str, int] = {}

    @property
    def free(self) -> int:
        """Workers without a trial."""
        return self._size - len(self._running)

    def _executor(self, slot: int) -> ProcessPoolExecutor:
        if slot not in self._executors:
            given = (self._job, self._threads, self.device(slot))
            self._executors[slot] = ProcessPoolExecutor(1, _context(), _enter, given)
        return self._executors[slot]

    def device(self, slot: int) -> str:
        """Return the device of a worker's model: with several GPUs each worker has one to itself."""
        spec = self._job.base.load
        # A model that is spread over the devices is so in each worker.
        return spec.device if spec.device_map else device_of_worker(spec.device, slot)

    def about(self) -> dict[str, Any]:
        """Return `Bench.about` of the first worker, once all have probed their share."""
        shares = [Share(slot, self._size) for slot in range(self._size)] if self._size > 1 else []
        asked = [self._executor(share.index).submit(_part, share) for share in shares]
        for slot, future in enumerate(asked):
            try:
                future.result()
            except BrokenProcessPool:  # the first worker reads what is missing
                self._executors.pop(slot).shutdown(wait=False)
        return self._asked(_about, self._size)

    def held_out(self, config: RunConfig) -> dict[str, Any]:
        """Return `Bench.held_out` of the first worker."""
        return self._asked(_held_out, config)

    def _asked(self, task: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
        try:
            return self._executor(0).submit(task, *given).result()
        except BrokenProcessPool as error:
            raise SaberError(
                "a worker died before its work was done.",
                "Memory may be short: each worker holds a model of its own. Try fewer --workers.",
            ) from error

    def start(self, setting: Setting, prune: Prune | None = None) -> None:
        """Give the trial to a free worker."""
        taken = {slot for slot, _, _ in self._running.values()}
        slot = next(s for s in range(self._size) if s not in taken)
        try:
            future = self._executor(slot).submit(_trial, setting, prune)
        except BrokenProcessPool:  # it died while it had nothing to do
            self._executors.pop(slot).shutdown(wait=False)
            future = self._executor(slot).submit(_trial, setting, prune)
        self._running[future] = (slot, setting, prune)

    def wait(self) -> Row:
        """Return the next trial that ends; those of workers that died start anew elsewhere."""
        while True:
            ended, _ = wait(self._running, return_when=FIRST_COMPLETED)
            future = min(ended, key=lambda f: self._running[f][1].number)
            slot, setting, prune = self._running.pop(future)
            try:
                return future.result()
            except BrokenProcessPool:
                self._executors.pop(slot).shutdown(wait=False)
                if row := lost(self._deaths, setting):
                    return row
                self.start(setting, prune)

    def processes(self, slot: int) -> list[int]:
        """Return the process id of a worker, in a list that is empty before it has begun."""
        executor = self._executors.get(slot)
        return list(executor._processes or {}) if executor else []

    def close(self) -> None:
        """End the workers, whatever they do."""
        for slot, executor in self._executors.items():
            # Not by `shutdown` alone: it would wait for trials that nobody wants any more.
            pids = self.processes(slot)
            executor.shutdown(wait=False, cancel_futures=True)
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
        self._executors.clear()


def lost(deaths: dict[str, int], setting: Setting) -> Row | None:
    """Count a worker that died at a setting; return the setting's failure once it cost too many."""
    count = deaths[setting.key] = deaths.get(setting.key, 0) + 1
    if count < MOST_DEATHS:
        return None
    said = f"its worker died {count} times"
    return Row(setting.number, setting.key, setting.values, "failed", error=said)


def _context() -> Any:
    """Return how processes begin: from a clean one that has imported this, where there are such."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    from multiprocessing import forkserver, resource_tracker

    context = get_context("forkserver")
    context.set_forkserver_preload(["saber.sweep.quiet", __name__])
    # Until that is imported Ctrl-C waits, which would end it in a traceback.
    resource_tracker.ensure_running()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return context


_bench: Bench | None = None
"""In a worker process: its bench. An executor's tasks find it here, as they cannot be handed it."""
_job: Job | None = None
_device = ""


def _enter(job: Job, threads: int, device: str) -> None:
    """Prepare a worker process: it ends with its driver, and at once when interrupted."""
    import torch

    from saber.sweep import quiet  # in the driver, Ctrl-C is to be told of

    global _job, _device
    _job, _device = job, device
    quiet.end_without_a_word()
    torch.set_num_threads(threads)
    driver = parent_process()
    if driver is not None:

        def follow() -> None:
            driver.join()
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()


def _mine() -> Bench:
    global _bench
    if _bench is None:
        assert _job is not None
        _bench = Bench(_job, device=_device)
    return _bench


def _part(share: Share) -> None:
    _mine().part(share)


def _about(of: int) -> dict[str, Any]:
    return _mine().about(of)


def _held_out(config: RunConfig) -> dict[str, Any]:
    return _mine().held_out(config)


def _trial(setting: Setting, prune: Prune | None) -> Row:
    return _mine().trial(setting, prune)
