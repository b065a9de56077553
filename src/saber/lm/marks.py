"""Where a model's thought ends and its answer begins, by the marks that models were trained to write."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

THOUGHT_TOKENS = 1024
"""Most tokens of an answer with a thought in front of it, unless a number is given."""


class Thought(NamedTuple):
    """How some models mark a thought."""

    opens: re.Pattern[str]
    """What a text begins with that opens with one."""
    closes: re.Pattern[str]
    """What stands between it and the answer."""


_TAGS = ("think", "thinking", "thought", "reasoning", "seed:think")
_PAIRS = (
    *((f"<{tag}>", f"</{tag}>") for tag in _TAGS),
    ("[THINK]", "[/THINK]"),
    ("<|channel>", "<channel|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
)
TOKENS = (*(mark for pair in _PAIRS for mark in pair), "<|channel|>", "<|message|>")
"""Marks that can be tokens of their own: special ones, which decoding drops, in some models."""


def _thought(opens: str, closes: str) -> Thought:
    return Thought(re.compile(rf"\s*(?:{opens})", re.DOTALL), re.compile(closes, re.DOTALL))


_THOUGHTS = (
    *(_thought(re.escape(opening), re.escape(closing)) for opening, closing in _PAIRS),
    # Channels, of which the last is the answer; the same where special tokens were dropped, which leaves
    # the channels' names without a space behind them.
    _thought(
        r"(?:<\|start\|>assistant)?<\|channel\|>", r"<\|channel\|>\s*final\b[^\n]*?<\|message\|>"
    ),
    _thought(r"analysis(?=[A-Z\"'(*]|.*assistantfinal)", "assistantfinal"),
    # In words: some models have no other marks.
    _thought(r"Here(?: i|')s my thought process:", r"Here(?: i|')s my response:"),
)
_OPENING = "|".join(re.escape(opening) for opening, _ in _PAIRS)
_LAST = re.compile(rf"(?:{_OPENING}|<\|channel\|>\w+<\|message\|>)(?:thought)?\s*$")
"""What a prompt ends with that opens a thought; some name it behind the mark."""
_WRAPPED = re.compile(
    r"\s*<(?P<bar>\|?)(?P<tag>answer|response|output|begin_of_solution|START_RESPONSE)(?P=bar)>"
)
"""What an answer behind a thought may stand in."""


def behind(text: str) -> str | None:
    """Return the answer behind the thoughts that a text opens with; None where one is still open.

    Without a thought that is the text. One that the prompt opened is known by what closes it.
    """
    answer = text
    while found := next((t for t in _THOUGHTS if t.opens.match(answer)), None):
        end = found.closes.search(answer)
        if end is None:
            return None
        answer = answer[end.end() :]
    if answer == text:
        answer = _opened_before(text)
    return answer if answer == text else _unwrapped(answer)


def left_open(prompt: str) -> str:
    """Return the thought that a prompt ends in, from the mark that opens it; empty where it opens none."""
    found = _LAST.search(prompt)
    return found.group() if found and behind(found.group()) is None else ""


def _opened_before(text: str) -> str:
    """Return what comes behind a mark that closes a thought which nothing in the text opens.

    Of the commonest pair, whatever comes before it.
    """
    for opening, closing in _PAIRS:
        before, found, answer = text.partition(closing)
        if found and (opening not in before or opening == _PAIRS[0][0]):
            return answer
    return text


def _unwrapped(answer: str) -> str:
    found = _WRAPPED.match(answer)
    if found is None:
        return answer
    answer = answer[found.end() :]
    closing = found["tag"].replace("begin", "end").replace("START", "END")
    return answer.rstrip().removesuffix(f"</{closing}>").removesuffix(f"<|{closing}|>")


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return tokens as text without special ones, but for those that mark a thought."""
    written = set(ids)
    marks = {i: mark for i, mark in _dropped(tokenizer, len(tokenizer)).items() if i in written}
    text, start = "", 0
    for at, token in enumerate(ids):
        if token in marks:
            text += _plain(tokenizer, ids[start:at]) + marks[token]
            start = at + 1
    return text + _plain(tokenizer, ids[start:])


@lru_cache(maxsize=1)
def _dropped(tokenizer: Any, _size: int) -> dict[int, str]:
    """Return the marks that are special tokens of a tokenizer (of that many tokens), by their ids."""
    known = zip(tokenizer.convert_tokens_to_ids(list(TOKENS)), TOKENS, strict=True)
    marks = {i: mark for i, mark in known if i not in (None, tokenizer.unk_token_id)}
    return {i: mark for i, mark in marks.items() if not _plain(tokenizer, [i])}


def _plain(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))
