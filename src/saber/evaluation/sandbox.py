"""Run code from a model's answer against assertions, in a limited process of its own.

It guards against accidents: endless loops, huge allocations, stray files, network calls.
It is not a wall against code that sets out to break it; use a virtual machine for that.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_CHILD = Path(__file__).with_name("sandbox_child.py")
_START_SECONDS = 1.0
"""Added to the time limit, for the start of the interpreter."""


@dataclass(frozen=True)
class SandboxResult:
    """Whether the code did what was asserted, and why not."""

    passed: bool
    """True when every assertion held within the limits."""
    reason: str
    """One line: what went wrong, or that all assertions hold."""
    missing: tuple[str, ...] = ()
    """Limits that this system could not set; on Windows all but time, empty if unknown."""


def run_asserts(
    code: str,
    entry_point: str,
    asserts: Sequence[str],
    *,
    seconds: float = 5.0,
    memory_mb: int = 512,
) -> SandboxResult:
    """Run `code`, then each of `asserts` on what it defined.

    The child has an empty environment, an empty working folder of its own, no site packages,
    no standard streams, no sockets, no new processes, `seconds` of time, and where the system
    can limit them `memory_mb` MiB of address space and 1 MiB a file. Windows has no such limits:
    there only time is limited, and `missing` says so.
    """
    token = secrets.token_hex(16)  # so that a forged verdict needs more than printing "passed"
    job = {
        "code": code,
        "entry_point": entry_point,
        "asserts": list(asserts),
        "seconds": seconds,
        "memory_mb": memory_mb,
        "token": token,
    }
    with tempfile.TemporaryDirectory(prefix="saber-", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=_environment(),
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(json.dumps(job).encode(), seconds + _START_SECONDS)
        except subprocess.TimeoutExpired:
            return SandboxResult(False, f"stopped after {seconds:g} seconds")
        finally:
            _end(process)
    return _verdict(output, token, process.returncode)


def _environment() -> dict[str, str]:
    # Python on Windows does not start without SYSTEMROOT.
    return {k: os.environ[k] for k in ("SYSTEMROOT",) if k in os.environ}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the child, with its whole group where there are groups, and reap it."""
    if process.returncode is not None:
        return
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (AttributeError, ProcessLookupError, PermissionError):  # Windows; or ended just now
        process.kill()
    process.communicate()


def _verdict(output: bytes, token: str, returncode: int) -> SandboxResult:
    try:
        verdict = json.loads(output)
    except ValueError:
        verdict = None
    if isinstance(verdict, dict) and verdict.get("token") == token:
        return SandboxResult(verdict["passed"], verdict["reason"], tuple(verdict["missing"]))
    how = f"killed by signal {-returncode}" if returncode < 0 else f"exit status {returncode}"
    return SandboxResult(False, f"the code ended its process before the verdict ({how})")
