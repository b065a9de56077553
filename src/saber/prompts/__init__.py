"""Prompt sets: the bundled ones, users' files, and disjoint splits of them."""

from saber.prompts.bundled import (
    battery,
    borderline,
    capability,
    everyday,
    harmful,
    neutral,
    target,
)
from saber.prompts.loaders import load
from saber.prompts.model import Prompt, PromptSet, normalised
from saber.prompts.splits import Splits, Use, check_apart, check_disjoint, split
from saber.prompts.twins import Pair, numbered, paired

__all__ = [
    "Pair",
    "Prompt",
    "PromptSet",
    "Splits",
    "Use",
    "battery",
    "borderline",
    "capability",
    "check_apart",
    "check_disjoint",
    "everyday",
    "harmful",
    "load",
    "neutral",
    "normalised",
    "numbered",
    "paired",
    "split",
    "target",
]
