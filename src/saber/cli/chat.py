"""Talk to a model; for a run, to the edited one, beside the untouched one if wanted."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from saber import artifacts
from saber.ablation import EditPlan, applied
from saber.config import RunConfig
from saber.errors import UsageError
from saber.lm.generate import generate
from saber.lm.load import load
from saber.lm.model import LanguageModel, fingerprint
from saber.pipeline import PLAN, RUN


def chat_command(arguments: argparse.Namespace, config: RunConfig, limit: int) -> int:
    """`saber chat`: each message is answered on its own."""
    name, plan, mark, system = _resolve(arguments.model)
    if arguments.compare and plan is None:
        raise UsageError("--compare needs a run folder.", "Give the folder that saber run wrote.")
    console = Console()
    with Console(stderr=True, quiet=arguments.json).status(f"loading {name}"):
        lm = load(name, replace(config.load, system=config.load.system or system))
    if mark is not None and fingerprint(lm.model) != mark:
        raise UsageError(f"{name} is not the model that the run was made on (another fingerprint).")
    for prompt in arguments.prompt or _typed(console):
        answers = answer(lm, plan, prompt, limit, compare=arguments.compare)
        if arguments.json:
            print(json.dumps({"prompt": prompt, **answers}))
            continue
        for who, text in answers.items():
            console.print(f"[bold]{who}[/]: ", end="")
            console.print(text, markup=False, highlight=False)
    return 0


def answer(
    lm: LanguageModel, plan: EditPlan | None, prompt: str, limit: int, *, compare: bool
) -> dict[str, str]:
    """Return the answers by who gives them: `untouched`, `edited`, or `model` without a plan."""

    def ask() -> str:
        return generate(lm, [prompt], limit)[0].text.strip()

    answers = {"untouched": ask()} if compare else {}
    with applied(lm.model, plan) if plan else nullcontext():
        answers["edited" if plan else "model"] = ask()
    return answers


def _resolve(name: str) -> tuple[str, EditPlan | None, str | None, str]:
    """Return the model to load, and a run's plan, the fingerprint it was made on and its system prompt."""
    folder = Path(name)
    if not (folder / RUN).is_file():
        return name, None, None, ""
    record = artifacts.read_json(folder / RUN)
    model = record["model"]
    system = record["config"].get("load", {}).get("system", "")
    return model["name"], EditPlan.load(folder / PLAN), model["fingerprint"], system


def _typed(console: Console) -> Any:
    interactive = sys.stdin.isatty()
    if interactive:
        console.print(
            "[dim]One message a line; every message is answered on its own. Ctrl-D ends.[/]"
        )
    while True:
        try:
            line = console.input("[bold cyan]you[/]: " if interactive else "")
        except EOFError:
            return
        if line.strip():
            yield line.strip()
