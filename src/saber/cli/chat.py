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
        answers = answer(lm, partner.plan, prompt, limit, compare=arguments.compare, said=said)
        if talking:
            said = {
                who: (*said.get(who, ()), ("user", prompt), ("assistant", text))
                for who, text in answers.items()
            }
        if arguments.json:
            print(json.dumps({"prompt": prompt, **answers}))
            continue
        for who, text in answers.items():
            console.print(f"[bold]{who}[/]: ", end="")
            console.print(text, markup=False, highlight=False)
    return 0


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
