"""Rates at several lengths: the same answers, generated once, cut and judged at each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from saber.evaluation.judge import Judge, Label, thinking
from saber.evaluation.judging import label_all
from saber.evaluation.statistics import wilson
from saber.lm.forward import Progress, silent
from saber.lm.generate import generate, reading
from saber.lm.model import LanguageModel
from saber.prompts import PromptSet


@dataclass(frozen=True)
class Cut:
    """Labels of answers of at most so many tokens."""

    tokens: int
    """Where answers are cut."""
    labels: tuple[Label, ...]
    """One a prompt."""
    thought_open: tuple[bool, ...] = ()
    """Whether no more than a thought was written until there, one a prompt; of a `thinking` model alone."""

    def summary(self) -> dict[str, Any]:
        """Return the rates with 95% intervals, as they stand in `run.json`."""
        counts = Counter(self.labels)
        names: tuple[Label, ...] = ("refusal", "partial", "incoherent")
        rates: dict[str, Any] = {
            name: asdict(wilson(counts[name], len(self.labels))) for name in names
        }
        if self.thought_open:
            rates["thought_open"] = asdict(wilson(sum(self.thought_open), len(self.thought_open)))
        return {"tokens": self.tokens, **rates}


def by_length(
    lm: LanguageModel,
    prompts: PromptSet,
    lengths: Sequence[int],
    judge: Judge,
    *,
    progress: Progress[Any] = silent,
) -> tuple[Cut, ...]:
    """Answer once at the greatest length; label what each shorter limit would have let through.

    Greedy answers do not depend on the limit, so cutting is the same as generating anew.
    """
    answers = generate(
        lm,
        prompts.texts,
        max(lengths),
        progress=progress,
        label=f"answers of {max(lengths)} tokens to {prompts.name}",
    )

    def cut(n: int) -> Cut:
        pairs = zip(prompts, answers, strict=True)
        texts = [reading(lm, p.text, a.ids[:n]) for p, a in pairs]
        open_ = tuple(map(thinking, texts)) if lm.thinking else ()
        return Cut(n, label_all(judge, prompts.texts, texts), open_)

    return tuple(map(cut, sorted(set(lengths))))
