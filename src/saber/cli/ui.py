"""`saber ui`: a finished run, sweep or audit in the browser."""

from __future__ import annotations

import argparse
import json
import time
import webbrowser
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from saber.cli.console import console, note
from saber.errors import UsageError

HOST = "127.0.0.1"


def add_parser(commands: Any, load_options: Any) -> argparse.ArgumentParser:
    """Add the command and return its parser; `load_options` adds what says how a model is loaded."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "ui", help="look through a run, sweep or audit in the browser, and talk to a run's model"
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run, sweep or audit")
    parser.add_argument(
        "--base", metavar="MODEL", help="the untouched model, if not where the run says"
    )
    parser.add_argument(
        "--host", metavar="NAME", default=HOST, help=f"address to serve at (default: {HOST})"
    )
    parser.add_argument(
        "--port", metavar="N", type=int, help="default: the first free one from 7860"
    )
    parser.add_argument("--open", action="store_true", help="open the browser")
    load_options(parser, edits=False, thoughts=True)
    return parser


def ui_command(arguments: argparse.Namespace, config: Any) -> int:
    """Serve the page until Ctrl-C."""
    if arguments.port is not None and not 1 <= arguments.port <= 65535:
        raise UsageError("--port must lie between 1 and 65535.")
    out, told = console(), console(stderr=True)
    with told.status("building the page"):
        from saber.ui import serve

        page = serve(
            arguments.run,
            config.load,
            base=arguments.base or "",
            host=arguments.host,
            port=arguments.port,
        )
    if not _is_this_machine(arguments.host):
        told.print(
            note(
                "whoever reaches this address can read the run and talk to its model, "
                "without a password."
            )
        )
    if arguments.json:
        print(json.dumps({"url": page.url}), flush=True)
    else:
        out.print(f"{page.url} (Ctrl-C ends)", highlight=False)
    if arguments.open:
        webbrowser.open(page.url)
    try:
        with suppress(KeyboardInterrupt):
            wait()
    finally:
        page.close()
    return 0


def wait() -> None:
    """Do nothing until Ctrl-C."""
    while True:
        time.sleep(3600)


def _is_this_machine(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
