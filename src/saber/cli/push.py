"""`saber push`, and `--push` of the commands that write a model: to the hub, when the user agrees."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saber.errors import PushInterrupted, UsageError

if TYPE_CHECKING:
    from saber.checkpoint.parcel import Parcel
    from saber.checkpoint.push import Target

DECLINED = 1
"""Exit code when the user says no."""


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "push", help="publish an edited model on the hub, private by default"
    )
    parser.add_argument(
        "path",
        metavar="PATH",
        type=Path,
        help="folder or .gguf file that SABER wrote, or a run folder",
    )
    parser.add_argument("push", metavar="REPO", help="OWNER/NAME; a name alone is your own")
    _consent(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(handler=push_command)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add --push and what goes with it to a command that writes a model."""
    parser.add_argument(
        "--push",
        metavar="REPO",
        help="then publish it on the hub as OWNER/NAME, private by default",
    )
    _consent(parser)


def _consent(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--public", action="store_true", help="let everybody read the repository")
    parser.add_argument("--yes", action="store_true", help="push without asking")


def push_command(arguments: argparse.Namespace) -> int:
    """Push a folder or file that is there already."""
    if not arguments.path.exists():
        raise UsageError(f"no such folder or file: {arguments.path}.")
    return finish(arguments, destination(arguments), arguments.path, {})


def destination(arguments: argparse.Namespace) -> Target | None:
    """Return where to push, None without --push; raises before any work for what would stop a push.

    Raises `UsageError` for options that do not fit and where nobody can be asked, and what
    `saber.checkpoint.push.check` does.
    """
    if arguments.push is None:
        for option in ("public", "yes"):
            if getattr(arguments, option):
                raise UsageError(f"--{option} goes with --push.")
        return None
    if not arguments.yes and (sys.stdin is None or not sys.stdin.isatty()):
        raise UsageError(
            "a push is asked about first, and standard input is no terminal.",
            "Pass --yes to push without asking.",
        )
    from saber.checkpoint.push import check

    return check(arguments.push, public=arguments.public)


def finish(
    arguments: argparse.Namespace, target: Target | None, made: Path, record: Mapping[str, Any]
) -> int:
    """End a command that made a model: push it where that was asked for, and print `record` as JSON.

    Return 0, or `DECLINED` when the user says no; what was made stays. Raises what
    `saber.checkpoint.push.send` does.
    """
    pushed = None
    if target is not None:
        from saber.checkpoint.parcel import parcel
        from saber.checkpoint.push import again, send

        later = again(made, target)
        try:
            files = parcel(made)
            _say(summary(files, target))
            if arguments.yes or _agreed():
                pushed = send(files, target, quiet=arguments.json)
            else:
                _say(f"Not pushed. {later}")
        except KeyboardInterrupt:
            raise PushInterrupted("interrupted.", later) from None
    if arguments.json:
        row = {"pushed": dataclasses.asdict(pushed) if pushed else None} if target else {}
        print(json.dumps({**record, **row}))
    elif pushed is not None:
        print(f"pushed: {pushed.url}\ncommit: {pushed.commit}")
    return DECLINED if target is not None and pushed is None else 0


def summary(files: Parcel, target: Target) -> str:
    """Return what the user is asked about: where to, who can see it, as whom, and how much."""
    state = "new"
    if target.held is not None:
        replaced = len(target.held & files.files.keys())
        state = (
            f"exists, {replaced} of its {len(target.held)} files are replaced and the others stay"
        )
    seen = "PUBLIC: everybody can read it" if target.public else "private"
    return (
        f"to:     {target.repo} ({state})\n"
        f"seen:   {seen}\n"
        f"hub:    {target.endpoint}, as {target.user}\n"
        f"files:  {len(files.files)}, {_size(files.size)}, from {files.source}"
    )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _agreed() -> bool:
    """Ask on standard error, so that standard output holds the result alone; no answer is a no."""
    print("Push? [y/N] ", end="", file=sys.stderr, flush=True)
    typed = ""
    try:
        typed = sys.stdin.readline()
    finally:
        if not typed.endswith("\n"):
            _say("")
    return typed.strip().lower() in ("y", "yes")


def _say(text: str) -> None:
    print(text, file=sys.stderr)
