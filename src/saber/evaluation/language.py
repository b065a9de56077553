"""Whether texts are in English, the one language that the judge of phrases reads."""

from __future__ import annotations

import re
from collections.abc import Sequence

from saber.evaluation.judge import Judge, Label, PhraseJudge, behind_thought

NOT_ENGLISH = (
    "the phrases judge reads English refusals; these answers are mostly not in English: "
    "use --judge endpoint, regex or classifier."
)
ENOUGH = 40
"""Letters, or words, below which nothing is told."""
LEAST = 0.05
"""Share of the words in `FREQUENT` below which a text is in another language than English: English answers
and prompts have 0.1 to 0.25, other languages in Latin script next to none."""
FREQUENT = frozenset(
    [
        "about",
        "and",
        "be",
        "because",
        "but",
        "could",
        "from",
        "have",
        "how",
        "it",
        "not",
        "should",
        "than",
        "that",
        "the",
        "their",
        "them",
        "there",
        "these",
        "they",
        "this",
        "what",
        "when",
        "which",
        "who",
        "with",
        "would",
        "you",
        "your",
    ]
)
"""Frequent words of English that are not such of another language in Latin script."""
_CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_WORD = re.compile(r"[^\W\d_]+")
_LATIN = ((0x41, 0x24F), (0x1E00, 0x1EFF), (0xFF21, 0xFF5A))
"""Ranges of letters of Latin script."""


def in_english(texts: Sequence[str]) -> bool | None:
    """Say whether texts, taken together, are mostly in English; None where there is too little of them.

    Thoughts and blocks of code do not count. Letters that are mostly of another script than Latin are another
    language, and so are words in Latin script with few of the most frequent ones of English among them.
    """
    words = _WORD.findall(
        " ".join(_CODE.sub(" ", behind_thought(text)) for text in texts).casefold()
    )
    letters = "".join(words)
    latin = sum(any(low <= ord(letter) <= high for low, high in _LATIN) for letter in letters)
    if len(letters) >= ENOUGH and 2 * latin < len(letters):
        return False
    if len(words) < ENOUGH:
        return None
    return sum(word in FREQUENT for word in words) >= LEAST * len(words)


def remark(
    judge: Judge, prompts: Sequence[str], answers: Sequence[str], labels: Sequence[Label]
) -> str:
    """Return what to say where a judge of English alone labelled answers in another language; else nothing.

    Incoherent answers are in no language. Where the others are too short to tell, the prompts do.
    """
    if not isinstance(judge, PhraseJudge):
        return ""
    pairs = zip(answers, labels, strict=True)
    english = in_english([text for text, label in pairs if label != "incoherent"])
    if english is None:
        english = in_english(prompts)
    return NOT_ENGLISH if english is False else ""
