"""Choose the device, and the compute dtype by what that device is fast at."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import psutil
import torch

from saber.errors import UsageError

DtypeName = Literal["auto", "float32", "float16", "bfloat16"]
_CONTAINERS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)
"""Where Linux tells a container's bound, its use, and what of that it gives back when asked."""


def choose_device(name: str) -> torch.device:
    """Return the device for `auto`, `cpu`, `cuda[:i]` or `mps`; raises `UsageError` when absent."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(
            f"unknown device {name!r}.", "Use auto, cpu, cuda, cuda:0 or mps."
        ) from error
    if not _is_present(device):
        raise UsageError(f"device {name!r} is not available here.", "Use --device auto.")
    return device


def _is_present(device: torch.device) -> bool:
    """Return whether torch has such a device here, and as many of them as its number asks for."""
    if device.type == "cpu":
        return True
    try:
        module = torch.get_device_module(device)
    except RuntimeError:
        return False  # torch was not built for it
    return bool(module.is_available()) and (device.index or 0) < module.device_count()


def device_of_worker(name: str, worker: int) -> str:
    """Return the device of one of several processes that each load the model: GPUs take turns.

    A device that is named with its number, or that is no CUDA device, is everybody's.
    """
    gpus = torch.cuda.device_count() if name in ("auto", "cuda") else 0
    return f"cuda:{worker % gpus}" if gpus > 1 else name


def keep_freed_memory() -> None:
    """Let the C library keep what is freed, where it is GNU's; elsewhere do nothing.

    It gives large blocks back at once and gets them anew, zeroed page by page, for every intermediate
    tensor of a forward pass on the CPU.
    """
    if set_option := _of_glibc("mallopt"):
        trim_threshold, mmap_threshold = -1, -3
        set_option(mmap_threshold, 1 << 30)
        set_option(trim_threshold, (1 << 31) - 1)


def give_back_memory() -> None:
    """Give what was kept by `keep_freed_memory` back to the system, so that peaks do not add up."""
    if trim := _of_glibc("malloc_trim"):
        trim(0)


def free_memory(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return how much memory can still be taken, bytes: the system's, or less where a container bounds it."""
    free = int(psutil.virtual_memory().available)
    for limit, used, reclaimed in _CONTAINERS:
        try:
            most, now = (int((groups / name).read_text(encoding="ascii")) for name in (limit, used))
            told = (groups / Path(used).parent / "memory.stat").read_text(encoding="ascii")
        except (OSError, ValueError):  # no container, or one without a bound
            continue
        cached = dict(line.split() for line in told.splitlines()).get(reclaimed, 0)
        free = min(free, max(0, most - now + int(cached)))
    return free


def _of_glibc(name: str) -> Callable[..., int] | None:
    """Return a function of GNU's C library; None where that is another one."""
    try:
        return getattr(ctypes.CDLL("libc.so.6"), name)
    except (OSError, AttributeError):
        return None


def share_keys_on_cpu(device: torch.device) -> None:
    """Let attention on the CPU read grouped keys and values where they lie, unless the user has chosen.

    transformers copies them for each group of queries when there is a mask, as it must on CUDA; of a
    decoding step of small models that copy is a twentieth.
    """
    if device.type == "cpu":
        os.environ.setdefault("TRANSFORMERS_SDPA_FORCE_GQA", "1")


def matmul_rate(
    device: torch.device, dtype: torch.dtype, size: int = 512, repeats: int = 3
) -> float:
    """Return the measured matmul rate in GFLOP/s: the best of `repeats` products of size^3."""
    a = torch.ones(size, size, device=device, dtype=dtype)

    def product() -> float:
        start = time.perf_counter()
        (a @ a).sum().item()
        return time.perf_counter() - start

    product()
    return 2e-9 * size**3 / min(product() for _ in range(repeats))


def memory_for_caches(device: torch.device, weights: int) -> int | None:
    """Return the bytes that keys and values may take on a device beside so many of weights, if known.

    Two fifths of what the weights leave: by the device's size, so that batches and digits are the same in
    every run, unless others hold so much of it that less than that is free.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    elif device.type == "mps":
        total = torch.mps.recommended_max_memory()
        free = total - torch.mps.current_allocated_memory()
    else:
        return None
    return int(min(0.4 * (total - weights), 0.8 * free))


MORE_ROOM = (
    "Use --dtype bfloat16, --offload (layers wait in main memory), --device-map auto over several devices, "
    "or --device cpu."
)
"""What helps where a device has too little memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a device has no memory left."""
    named = type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and "out of memory" in str(error).lower())


def has_float64(device: torch.device) -> bool:
    """Return whether a device is known to compute in float64; Apple's GPUs do not."""
    return device.type in ("cpu", "cuda")


def holds(dtype: torch.dtype, stored: torch.dtype) -> bool:
    """Return whether every value of a stored dtype is one of a compute dtype."""
    if dtype == stored:
        return True
    if not stored.is_floating_point:
        return False
    mine, its = torch.finfo(dtype), torch.finfo(stored)
    return mine.eps <= its.eps and mine.max >= its.max and mine.tiny <= its.tiny


def choose_dtype(name: DtypeName, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """Return the compute dtype: the stored one unless the device is slow at it.

    A checkpoint in 16 bits runs in float32 where a small measured product is more than twice as
    fast there (many CPUs do bfloat16 in emulation), and float16 never runs on a CPU.
    """
    if name != "auto":
        return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[
            name
        ]
    if stored == torch.float32 or not stored.is_floating_point or stored.itemsize != 2:
        return torch.float32
    if device.type == "cpu" and stored == torch.float16:
        return torch.float32
    size = 192 if device.type == "cpu" else 2048
    slow = matmul_rate(device, stored, size) < 0.5 * matmul_rate(device, torch.float32, size)
    return torch.float32 if slow else stored
