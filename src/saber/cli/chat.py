"""Talk to a model; for a run, to the edited one, beside the untouched one if wanted."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from saber.cli.console import console, no_thoughts, note
from saber.config import RunConfig
from saber.conversation import NOTHING, Partner, answer
from saber.errors import UsageError
from saber.lm.thought import thinks

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
    out = console()
    told = console(stderr=True, quiet=arguments.json)
    with told.status(Text(f"loading {partner.name}")):
        lm = partner.loaded(config.load)
    if lm.thinking and not thinks(lm):
        console(stderr=True).print(no_thoughts(lm.name), soft_wrap=True)
    for text in lm.notes:
        told.print(note(text))
    talking = not arguments.prompt and sys.stdin is not None and sys.stdin.isatty()
    said = NOTHING
    for prompt in arguments.prompt or _typed(out, talking):
        if talking and prompt == AFRESH:
            said = NOTHING
            continue
        shown = _Shown(out)
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

    def __init__(self, out: Console) -> None:
        self.console, self.who, self.text = out, "", ""

    def __call__(self, who: str, text: str) -> None:
        """Show what is new of somebody's answer."""
        if who != self.who:
            self.end()
            self.who = who
            self.console.print(Text.assemble((who, "bold"), ": "), end="")
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


def _typed(out: Console, talking: bool) -> Iterator[str]:
    if talking:
        out.print(
            Text(f"One message a line. {AFRESH} forgets what was said, Ctrl-D ends.", style="dim")
        )
    while sys.stdin is not None:
        try:
            line = out.input(Text.assemble(("you", "bold cyan"), ": ") if talking else "")
            line.encode("utf-8")
        except EOFError:
            return
        except UnicodeError as error:
            raise UsageError("a message is not UTF-8.", "Write messages in UTF-8.") from error
        if line.strip():
            yield line.strip()
