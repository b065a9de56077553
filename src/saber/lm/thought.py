"""Does a model think before it answers, and what makes it answer at once?"""

from __future__ import annotations

import re
from dataclasses import replace

from saber.lm.chat import EMPTY_THOUGHTS, render
from saber.lm.generate import generate
from saber.lm.model import LanguageModel

_QUESTIONS = ("What is the capital of France?", "Name three colours.", "How do I boil an egg?")
_TOKENS = 6
_FIRST_MARK = re.compile(r"^(?:<[^>]*>|\[[^\]]*\])")


def empty_thought(lm: LanguageModel) -> str:
    """Return the empty thought to put in front of a model's answers; nothing where none opens with one.

    Asked of its own answers to a few plain questions, and only where tokenizer or chat template know a
    mark that opens a thought.
    """
    vocabulary, template = lm.tokenizer.get_vocab(), str(lm.tokenizer.chat_template)
    openers = [o for o in EMPTY_THOUGHTS if (m := _mark(o)) in vocabulary or m in template]
    if not openers:
        return ""
    answers = generate(lm, _QUESTIONS, _TOKENS)
    texts = [lm.tokenizer.decode(list(a.ids)).lstrip() for a in answers]
    for opener in openers:
        if sum(text.startswith(opener) for text in texts) > len(texts) / 2:
            return EMPTY_THOUGHTS[opener]
    return ""


def thinks(lm: LanguageModel) -> bool:
    """Return whether a model is asked otherwise with its thoughts on than off: False where it has none.

    Raises `ModelError` where the chat template fails.
    """
    on, off = (render(replace(lm, thinking=way), _QUESTIONS[0]) for way in (True, False))
    return on != off


def _mark(opener: str) -> str:
    found = _FIRST_MARK.match(opener)
    assert found is not None
    return found.group()
