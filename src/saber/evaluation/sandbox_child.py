"""The other side of `sandbox`: a script that runs one answer's code under limits.

It is started by path with `python -I -S -B`, so it imports nothing but the standard library.
It reads a job (JSON) from standard input and writes a verdict (JSON) to what was its standard
output; the answer's code sees neither.
"""

from __future__ import annotations

import json
import math
import os
import sys
import types
from typing import Any

_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_DENIED = ("socket.", "subprocess.", "ctypes.", "shutil.", "resource.", "os.", "pty.", "fcntl.")
_ALLOWED = frozenset({"os.listdir", "os.scandir", "os.walk", "os.fwalk"})
_MEBIBYTE = 1 << 20
_FILE_BYTES = _MEBIBYTE
_SUPERUSER = hasattr(os, "geteuid") and os.geteuid() == 0
_CLONE_NEWUSER, _CLONE_NEWNET = 0x1000_0000, 0x4000_0000


def set_limits(seconds: float, memory_mb: int) -> list[str]:
    """Set the limits that this system has; return the names of those that it has not."""
    try:
        import resource
    except ImportError:  # Windows
        return ["memory", "cpu", "processes", "file size"]
    cpu = math.ceil(seconds) + 2  # later than the parent, which tells the reason
    wanted = [
        ("memory", "RLIMIT_AS", memory_mb * _MEBIBYTE),
        ("cpu", "RLIMIT_CPU", cpu),
        ("processes", "RLIMIT_NPROC", 0),
        ("file size", "RLIMIT_FSIZE", _FILE_BYTES),
        ("core files", "RLIMIT_CORE", 0),
    ]
    missing = []
    for name, constant, value in wanted:
        try:
            which = getattr(resource, constant)
            _, hard = resource.getrlimit(which)
            if hard != resource.RLIM_INFINITY:
                value = min(value, hard)
            resource.setrlimit(which, (value, value))
        except (AttributeError, ValueError, OSError):  # macOS refuses some of them
            missing.append(name)
    if sys.platform == "darwin" and "memory" not in missing:
        missing.append("memory")  # accepted there, but not enforced
    if _SUPERUSER and "processes" not in missing:
        missing.append("processes")  # does not bind the superuser; the audit hook still does
    return missing


def leave_network() -> bool:
    """Move into an empty network namespace where Linux allows it; the audit hook acts anyway."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        import ctypes

        return bool(ctypes.CDLL(None).unshare(_CLONE_NEWUSER | _CLONE_NEWNET) == 0)
    except (ImportError, OSError, AttributeError):
        return False


def forbid(folder: str) -> None:
    """Refuse sockets, new processes, file system changes, and writing outside `folder`."""
    inside = folder + os.sep

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if isinstance(flags, int) and flags & _WRITE_FLAGS:
                if isinstance(path, int):
                    raise PermissionError("the sandbox forbids opening descriptors for writing")
                if not os.path.realpath(os.fsdecode(path)).startswith(inside):
                    raise PermissionError("the sandbox forbids writing outside its folder")
        elif event.startswith(_DENIED) and event not in _ALLOWED:
            raise PermissionError(f"the sandbox forbids {event}")

    sys.addaudithook(hook)


def judge(code: str, entry_point: str, asserts: list[str]) -> tuple[bool, str]:
    """Run the code and then each assertion on what it defined."""
    module = types.ModuleType("answer")
    sys.modules["answer"] = module  # where dataclasses and pickle look up what a class names
    names: dict[str, Any] = module.__dict__
    step = "the code"
    spare = bytearray(_MEBIBYTE)  # so that there is room to report that memory ran out
    try:
        # Annotations are not evaluated, as this module's are not: in Python 3.14 they are not either.
        exec(compile(code, "<answer>", "exec"), names)
        if not callable(names.get(entry_point)):
            return False, f"the code defines no function {entry_point!r}"
        for statement in asserts:
            step = statement
            exec(compile(statement, "<assert>", "exec"), names)
    except BaseException as problem:  # noqa: BLE001 - SystemExit and all else are failures too
        del spare
        names.clear()
        return False, f"{type(problem).__name__} in {step}: {str(problem)[:200]}".rstrip(": ")
    return True, "all assertions hold"


def main() -> None:
    """Read the job, take precautions, run the code, report, and leave at once."""
    verdict_fd = os.dup(1)
    with open(os.devnull, "r+b", buffering=0) as nothing:
        job = json.loads(sys.stdin.buffer.read())
        for standard in (0, 1, 2):
            os.dup2(nothing.fileno(), standard)
    folder = os.path.realpath(os.getcwd())
    apart = leave_network()  # needs a new process slot, so it comes before the limits
    missing = set_limits(job["seconds"], job["memory_mb"])
    if not apart:
        missing.append("network namespace")
    forbid(folder)
    passed, reason = judge(job["code"], job["entry_point"], job["asserts"])
    verdict = {"token": job["token"], "passed": passed, "reason": reason, "missing": missing}
    os.write(verdict_fd, json.dumps(verdict).encode())
    os._exit(0)  # threads that the code left must not delay the end


if __name__ == "__main__":
    main()
