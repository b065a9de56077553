"""Talk to a model; for a run, to the edited one, beside the untouched one if wanted."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator

from rich.console import Console

from saber.config import RunConfig
from saber.conversation import NOTHING, Partner, answer
from saber.errors import UsageError

AFRESH = "/new"
"""What is typed to start another conversation."""


def chat_command(arguments: argparse.Namespace, config: RunConfig, limit: int) -> int:
    """`saber chat`: what is typed in a terminal is a conversation; other messages stand on their own."""
    partner = Partner.of(arguments.model, arguments.base or "")
    for option in ("base", "compare"):
        if getattr(arguments, option) and partner.plan is None:
            raise UsageError(
                f"--{option} needs a run folder.", "Give the folder that saber run wrote."
            )
    console = Console()
    with Console(stderr=True, quiet=arguments.json).status(f"loading {partner.name}"):
        lm = partner.loaded(config.load)
    talking = not arguments.prompt and sys.stdin.isatty()
    said = NOTHING
    for prompt in arguments.prompt or _typed(console, talking):
        if talking and prompt == AFRESH:
            said = NOTHING
            continue
        shown = _Shown(console)
        answers = answer(
            lm,
            partner.plan,
            prompt,
            limit,
            compare=arguments.compare,
            said=said,
            on_text=None if arguments.json else shown,
        )
        if talking:
            said = {
                who: (*said.get(who, ()), ("user", prompt), ("assistant", text))
                for who, text in answers.items()
            }
        if arguments.json:
            print(json.dumps({"prompt": prompt, **answers}))
            continue
        shown.end()
    return 0


class _Shown:
    """Answers as they come, one below the other."""

    def __init__(self, console: Console) -> None:
        self.console, self.who, self.text = console, "", ""

    def __call__(self, who: str, text: str) -> None:
        """Show what is new of somebody's answer."""
        if who != self.who:
            self.end()
            self.who = who
            self.console.print(f"[bold]{who}[/]: ", end="")
        if not text.startswith(self.text):  # what was decoded before reads otherwise now
            self.console.print()
            self.text = ""
        new, self.text = text[len(self.text) :], text
        self.console.print(new, end="", markup=False, highlight=False, soft_wrap=True)

    def end(self) -> None:
        """End the line of whoever answered last."""
        if self.who:
            self.console.print()
        self.who = self.text = ""


def _typed(console: Console, talking: bool) -> Iterator[str]:
    if talking:
        console.print(
            f"[dim]One message a line. {AFRESH} forgets what was said, Ctrl-D ends.[/]",
            highlight=False,
        )
    while True:
        try:
            line = console.input("[bold cyan]you[/]: " if talking else "")
        except EOFError:
            return
        if line.strip():
            yield line.strip()
