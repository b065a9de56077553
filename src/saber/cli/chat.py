"""Talk to a model; for a run, to the edited one, beside the untouched one if wanted."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from rich.console import Console

from saber.ablation import EditPlan, applied
from saber.checkpoint.runs import PLAN, RUN, base_of, read_record
from saber.config import RunConfig
from saber.errors import UsageError
from saber.lm.chat import encode
from saber.lm.generate import generate
from saber.lm.load import as_stored, load
from saber.lm.model import LanguageModel, is_of
from saber.report.reading import dig

Said = tuple[tuple[str, str], ...]
"""What was said in a conversation: (role, text), a user's message and its answer in turn."""
NOTHING: Mapping[str, Said] = MappingProxyType({})
AFRESH = "/new"
"""What is typed to start another conversation."""


def chat_command(arguments: argparse.Namespace, config: RunConfig, limit: int) -> int:
    """`saber chat`: what is typed in a terminal is a conversation; other messages stand on their own."""
    base = (arguments.base,) if arguments.base else ()
    name, plan, mark, system = _resolve(arguments.model, *base)
    if base and plan is None:
        raise UsageError("--base needs a run folder.", "Give the folder that saber run wrote.")
    if arguments.compare and plan is None:
        raise UsageError("--compare needs a run folder.", "Give the folder that saber run wrote.")
    console = Console()
    with Console(stderr=True, quiet=arguments.json).status(f"loading {name}"):
        spec = replace(config.load, system=config.load.system or system)
        lm = load(name, spec)
    if mark is not None and not is_of(mark, as_stored(lm, spec)):
        raise UsageError(
            f"{name} is not the model that the run was made on (another fingerprint).",
            "Give the one that it was made on with --base.",
        )
    talking = not arguments.prompt and sys.stdin.isatty()
    said = NOTHING
    for prompt in arguments.prompt or _typed(console, talking):
        if talking and prompt == AFRESH:
            said = NOTHING
            continue
        answers = answer(lm, plan, prompt, limit, compare=arguments.compare, said=said)
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


def answer(
    lm: LanguageModel,
    plan: EditPlan | None,
    prompt: str,
    limit: int,
    *,
    compare: bool,
    said: Mapping[str, Said] = NOTHING,
) -> dict[str, str]:
    """Return the answers by who gives them: `untouched`, `edited`, or `model` without a plan.

    `said` is what each of them has heard and answered before, by the same names.
    """

    def ask(who: str) -> str:
        heard = remembered(lm, said.get(who, ()), prompt, limit)
        asked = replace(lm, before=(*lm.before, *heard))
        return generate(asked, [prompt], limit)[0].text.strip()

    answers = {"untouched": ask("untouched")} if compare else {}
    with applied(lm.model, plan) if plan else nullcontext():
        who = "edited" if plan else "model"
        answers[who] = ask(who)
    return answers


def remembered(lm: LanguageModel, said: Said, prompt: str, limit: int) -> Said:
    """Return the latest exchanges that leave room for the prompt and an answer of `limit` tokens."""
    room = getattr(lm.text_config, "max_position_embeddings", None)
    while said and isinstance(room, int):
        (whole,) = encode(replace(lm, before=(*lm.before, *said)), [prompt])
        if len(whole.ids) + limit <= room:
            break
        said = said[2:]
    return said


def _resolve(name: str, base: str = "") -> tuple[str, EditPlan | None, str | None, str]:
    """Return the model to load, and a run's plan, the fingerprint it was made on and its system prompt.

    `base` is where a run's model lies, if not where the run says.
    """
    folder = Path(name)
    if not (folder / RUN).is_file():
        return name, None, None, ""
    record = read_record(folder)
    model = record["model"]
    system = dig(record, "config", "load", "system") or ""
    plan = EditPlan.load(folder / PLAN)
    return base or base_of(folder, model), plan, model["fingerprint"], system


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
