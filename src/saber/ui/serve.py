"""The page on a port of this machine."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
import uvicorn
from fastapi import FastAPI

from saber.checkpoint.runs import PLAN
from saber.conversation import Partner
from saber.errors import UsageError
from saber.lm.load import LoadSpec
from saber.report import is_audit, is_sweep, read_run
from saber.ui.page import CSS, build_page, look
from saber.ui.talk import Talk, judge_of

DEFAULT = LoadSpec()
PORTS = range(7860, 7960)
"""What is tried where no port is asked for."""


@dataclass(frozen=True)
class Served:
    """A page that is being served."""

    url: str
    """Where."""
    page: gr.Blocks
    """What is served."""
    server: uvicorn.Server
    """What serves it."""
    thread: threading.Thread
    """Where it runs."""

    def close(self) -> None:
        """End it, and wait until it has ended."""
        self.server.should_exit = True
        self.thread.join()


def serve(
    folder: Path,
    spec: LoadSpec = DEFAULT,
    *,
    base: str = "",
    host: str = "127.0.0.1",
    port: int | None = None,
) -> Served:
    """Serve the page of a finished run, sweep or audit, and return at once.

    `spec` and `base` say how a run's model is loaded, and whence if not from where the run says. Raises
    `DataError` where the folder is none of them or damaged, `ModelError` where the run's model is not here,
    `UsageError` where the address cannot be had.
    """
    page = build_page(folder, _talk(folder, spec, base))
    bound = _bound(host, PORTS if port is None else (port,))
    app = gr.mount_gradio_app(
        FastAPI(),
        page,
        path="/",
        ssr_mode=False,
        enable_monitoring=False,
        footer_links=["settings"],
        theme=look(),
        css=CSS,
    )
    # Gradio's own server asks for its page through whatever proxy there is before it serves it to others.
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        thread.join(0.05)
    shown = f"[{host}]" if ":" in host else host
    return Served(f"http://{shown}:{bound.getsockname()[1]}/", page, server, thread)


def _talk(folder: Path, spec: LoadSpec, base: str) -> Talk | None:
    """Return a run's model to talk to; None where the folder is no run's, or nothing was edited."""
    if is_sweep(folder) or is_audit(folder):
        if base:
            raise UsageError("--base needs a run folder.", "Give the folder that saber run wrote.")
        return None
    run = read_run(folder)
    if not (folder / PLAN).is_dir():
        return None
    return Talk(Partner.of(str(folder), base), spec, judge_of(run))


def _bound(host: str, ports: Sequence[int]) -> socket.socket:
    """Return a socket at the first of the ports that is free; raises `UsageError` where none is."""
    why = ""
    for port in ports:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM
            )[0]
        except socket.gaierror as error:
            raise UsageError(f"there is no address {host!r}: {error.strerror}.") from error
        made = socket.socket(family, kind, protocol)
        try:
            if os.name == "posix":
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
        except OSError as error:
            made.close()
            why = error.strerror or str(error)
            continue
        return made
    where = f"port {ports[0]}" if len(ports) == 1 else f"any port from {ports[0]} to {ports[-1]}"
    raise UsageError(f"cannot serve at {where} of {host}: {why}.", "Give another with --port.")
