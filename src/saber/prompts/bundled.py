"""The prompt sets that come with the package."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files

from saber.prompts.model import Prompt, PromptSet


def target() -> PromptSet:
    """Return prompts that a safety-tuned model refuses, already split."""
    return _read("target")


def neutral() -> PromptSet:
    """Return harmless prompts, twins of the target prompts in form, already split."""
    return _read("neutral")


def borderline() -> PromptSet:
    """Return safe prompts that sound unsafe: refusing them is over-refusal."""
    return _read("borderline")


def harmful() -> PromptSet:
    """Return more requests in the target set's seen categories, to fit and to choose on, none held out.

    They are what must stay refused where only false refusals are to go.
    """
    return _read("harmful")


def everyday() -> PromptSet:
    """Return ordinary requests of many kinds, to preserve (fit) and to report on (heldout)."""
    return _read("everyday")


def battery() -> PromptSet:
    """Return the capability battery: checkable questions with reference answers."""
    return _read("battery")


def capability() -> PromptSet:
    """Return labelled capability prompts with reference answers: they span what must be kept.

    None of them is in the battery, which measures what was kept.
    """
    return _read("capability")


@cache
def _read(name: str) -> PromptSet:
    text = (files("saber.prompts") / "data" / f"{name}.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    prompts = (
        Prompt(
            id=row["id"],
            category=row["category"],
            text=row["prompt"],
            split=row.get("split") or "",
            reference=row.get("reference") or "",
            checker=row.get("checker"),
            twin=row.get("twin") or "",
        )
        for row in rows
    )
    return PromptSet(name, tuple(prompts))
