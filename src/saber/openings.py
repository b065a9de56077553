"""Stage 5, late behaviour: answers that comply at first and show the behaviour some words later.

Where such an answer turns is a decision position of its own. Its start, forced onto every prompt, makes
that position measurable on all of them, whatever they would have answered by themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from saber.lm.chat import encode
from saber.lm.forward import forward
from saber.lm.marks import decoded
from saber.lm.model import LanguageModel

Opening = tuple[int, ...]
"""Token ids at the start of an answer; empty for the answer's own start."""


@dataclass(frozen=True)
class Fitted:
    """What answers to some of the targets that were fitted show."""

    late: Mapping[int, Opening]
    """Those that come to show the behaviour late, by number, and behind which start."""
    showing: int = 0
    """How many show it at all."""
    incoherent: int = 0
    """How many are incoherent."""
    validation: Mapping[int, Opening] | None = None
    """The same as `late` of validation targets, where these were asked as well."""


_ENDS = ".!?:\u2026\u3002\uff01\uff1f"


def late_opening(lm: LanguageModel, ids: Sequence[int], shows: Callable[[str], bool]) -> Opening:
    """Return what an answer says before the sentence in which it begins to show the behaviour.

    `shows(text)` tells whether a text shows it. Empty where the answer does not, or does at once.
    """
    texts = [decoded(lm.tokenizer, ids[:k]) for k in range(1, len(ids) + 1)]
    if not texts or not shows(texts[-1]):
        return ()
    closed = [bool(text.strip()) and _closed(text) for text in texts[:-1]]
    found: Opening = ()
    for k, text in enumerate(texts[:-1]):
        # What follows an end without a word of its own, such as a space, is left to the model.
        if closed[k] and not (k and closed[k - 1]):
            if shows(text):
                break
            found = tuple(ids[: k + 1])
    return found


def _closed(text: str) -> bool:
    return text.endswith("\n") or text.rstrip()[-1] in _ENDS


def late_openings(
    lm: LanguageModel, answers: Sequence[Sequence[int]], shows: Callable[[int, str], bool]
) -> dict[int, Opening]:
    """Return, for each prompt whose answer comes to show the behaviour late, behind which start.

    `shows(i, text)` tells whether a text, as an answer to the i-th prompt, shows it.
    """
    found = {i: late_opening(lm, ids, partial(shows, i)) for i, ids in enumerate(answers)}
    return {i: opening for i, opening in found.items() if opening}


def likeliest(
    lm: LanguageModel,
    prompts: Sequence[str],
    found: Mapping[int, Opening],
    limit: int = 3,
    sample: int = 32,
) -> Opening:
    """Return the start with which the model would open most answers; empty where there is none.

    Of the `limit` that occur most often (the shorter first), the one of greatest mean probability over
    `sample` evenly spaced prompts: a start that says nothing of its own prompt can come before any
    answer.
    """
    counts = Counter(found.values())
    starts = sorted(counts, key=lambda o: (-counts[o], len(o), o))[:limit]
    if len(starts) < 2:
        return starts[0] if starts else ()
    asked = prompts[:: max(1, -(-len(prompts) // sample))]
    return max(starts, key=lambda opening: _probability(lm, asked, opening))


def _probability(lm: LanguageModel, prompts: Sequence[str], opening: Opening) -> float:
    encoded = encode(lm, prompts, [opening] * len(prompts))
    wanted = torch.tensor(opening)[:, None]
    total = 0.0
    for batch, _ in forward(lm, [e.ids for e in encoded], [e.answer_positions for e in encoded]):
        for piece in batch.split(batch.logits.log_softmax(-1)):
            total += float(piece.gather(1, wanted.to(piece.device)).sum().exp())
    return total / len(prompts)
