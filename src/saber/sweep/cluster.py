"""Trials on a Ray cluster: each worker an actor with a model of its own, results by the object store."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Any

from saber.config import RunConfig
from saber.errors import MissingExtra, SaberError, UsageError
from saber.lm.forward import Share
from saber.sweep.crew import lost
from saber.sweep.grid import Setting
from saber.sweep.journal import Row
from saber.sweep.tree import Kept
from saber.sweep.trial import Bench, Job, Prune, Seed

LOCAL = "local"
"""The address that starts Ray on this machine alone."""


class Cluster:
    """Actors that Ray places, starts and watches; this hands out trials and takes rows back.

    All load the model at once and probe a large prompt set together, their parts going through the object
    store. The first actor then prepares what the untouched model gives (activations, directions, its
    baseline) and puts it there once; the others begin with it, on whatever node they are. An
    actor that dies, or whose node does, costs the trial that it was at, which goes to a new one.
    """

    def __init__(self, job: Job, workers: int, address: str = LOCAL, cpus: int = 1) -> None:
        """Join the cluster at `address`; raises `UsageError` where there is none."""
        self._ray = _import()
        self._size, self._cpus = workers, cpus
        self._begun = _join(self._ray, address)
        gpu = job.base.load.device in ("auto", "cuda") and self._resources("GPU") >= workers
        self._actor = self._ray.remote(num_cpus=cpus, num_gpus=int(gpu))(_Worker)
        self._job = self._ray.put(job)
        self._seed: Any = None
        self._actors: dict[int, Any] = {}
        self._running: dict[Any, tuple[int, Setting, Prune | None]] = {}
        self._deaths: dict[str, int] = {}
        if self._resources("CPU") < workers * cpus:
            self.close()
            raise UsageError(
                f"{workers} workers need {workers * cpus} CPUs, and the cluster has "
                f"{self._resources('CPU'):.0f}.",
                "Give fewer --workers, or add nodes.",
            )

    def _resources(self, kind: str) -> float:
        return (
            float(self._ray.cluster_resources().get(kind, 0)) if self._ray.is_initialized() else 0
        )

    @property
    def free(self) -> int:
        """Workers without a trial."""
        return self._size - len(self._running)

    def _worker(self, slot: int) -> Any:
        if slot not in self._actors:
            self._actors[slot] = self._actor.remote(self._job, self._seed, self._cpus)
        return self._actors[slot]

    def about(self) -> dict[str, Any]:
        """Return `Bench.about` of the first worker, and share what it prepared."""
        first, of = self._worker(0), self._size

        def part(slot: int) -> Any:
            asked = self._worker(slot).part.options(num_returns=2)
            return asked.remote(Share(slot, of))

        parts = [part(slot) for slot in range(of)] if of > 1 else []
        found: dict[str, Any] = self._asked(first.about.remote(of, *self._arrived(parts)))
        self._seed = first.seed.remote()
        for slot, actor in self._actors.items():
            if slot:
                actor.adopt.remote(self._seed)
        return found

    def _arrived(self, parts: Sequence[Any]) -> list[Any]:
        """Wait for the workers' parts; return those whose worker lived to make them."""
        errors, arrived = self._ray.exceptions, []
        for slot, (done, part) in enumerate(parts):
            try:
                self._ray.get(done)
                arrived.append(part)
            except errors.RayTaskError as error:
                raise _own(error) from error
            except (errors.RayActorError, errors.ObjectLostError):
                self._actors.pop(slot)
        return arrived

    def held_out(self, config: RunConfig) -> dict[str, Any]:
        """Return `Bench.held_out` of the first worker."""
        found: dict[str, Any] = self._asked(self._worker(0).held_out.remote(config))
        return found

    def _asked(self, reply: Any) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(reply)
        except errors.RayTaskError as error:
            raise _own(error) from error
        except errors.RayActorError as error:
            raise SaberError(
                "a worker died before its work was done.", "Look at its node."
            ) from error

    def start(self, setting: Setting, prune: Prune | None = None) -> None:
        """Give the trial to a free worker."""
        taken = {slot for slot, _, _ in self._running.values()}
        slot = next(s for s in range(self._size) if s not in taken)
        reply = self._worker(slot).trial.remote(setting, prune)
        self._running[reply] = (slot, setting, prune)

    def wait(self) -> Row:
        """Return the next trial that ends; those of workers that died start anew elsewhere."""
        errors = self._ray.exceptions
        while True:
            (reply,), _ = self._ray.wait(list(self._running), num_returns=1)
            slot, setting, prune = self._running.pop(reply)
            try:
                row: Row = self._ray.get(reply)
                return row
            except errors.RayTaskError as error:
                raise _own(error) from error
            except (errors.RayActorError, errors.ObjectLostError):
                self._actors.pop(slot)
                if row_ := lost(self._deaths, setting):
                    return row_
                self.start(setting, prune)

    def processes(self, slot: int) -> list[int]:
        """Return the process id of a worker on its node."""
        return [int(self._ray.get(self._worker(slot).process.remote()))]

    def nodes(self) -> set[str]:
        """Return the nodes that workers are on."""
        return set(self._ray.get([a.node.remote() for a in self._actors.values()]))

    def close(self) -> None:
        """End the workers, and Ray where it was begun for them."""
        for actor in self._actors.values():
            self._ray.kill(actor)
        self._actors.clear()
        if self._begun and self._ray.is_initialized():
            self._ray.shutdown()


class _Worker:
    """The actor: a bench in a process of its own."""

    def __init__(self, job: Job, seed: Seed | None, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._bench = Bench(job, seed=seed)

    def part(self, share: Share) -> tuple[bool, dict[str, Kept]]:
        return True, self._bench.part(share)

    def about(self, of: int, *parts: dict[str, Kept]) -> dict[str, Any]:
        return self._bench.about(of, {name: kept for part in parts for name, kept in part.items()})

    def adopt(self, seed: Seed) -> None:
        self._bench.adopt(seed)

    def seed(self) -> Seed:
        return self._bench.seed()

    def trial(self, setting: Setting, prune: Prune | None) -> Row:
        return self._bench.trial(setting, prune)

    def held_out(self, config: RunConfig) -> dict[str, Any]:
        return self._bench.held_out(config)

    def process(self) -> int:
        return os.getpid()

    def node(self) -> str:
        import ray

        return str(ray.get_runtime_context().get_node_id())


def _own(error: Any) -> Exception:
    """Return the error that a worker raised, where it is one of ours."""
    cause = getattr(error, "cause", None)
    return (
        cause if isinstance(cause, SaberError) else SaberError(f"a worker failed: {cause or error}")
    )


def _import() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise MissingExtra("ray", "ray") from error
    return ray


def _join(ray: Any, address: str) -> bool:
    """Connect to a cluster, or begin one here; return whether one was begun or joined by this."""
    if ray.is_initialized():
        return False
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    if address == LOCAL:
        ray.init(include_dashboard=False, **quiet)
        return True
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        # Ray itself would try for minutes.
        socket.create_connection((host, int(port)), timeout=5).close()
        ray.init(address=address, **quiet)
    except (OSError, ValueError, ConnectionError, RuntimeError) as error:
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"there is no Ray cluster at {address}: {said}.",
            "Start one with `ray start --head` and give its HOST:PORT, or leave --ray-address out.",
        ) from error
    return True
