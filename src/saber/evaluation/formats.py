"""Rules about the form of an answer that can be verified without understanding it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from saber.errors import DataError, UnknownName

Rule = Callable[..., bool]
RuleT = TypeVar("RuleT", bound=Rule)
_RULES: dict[str, Rule] = {}


def rule(function: RuleT) -> RuleT:
    """Register a rule under its function's name; its arguments are the rule's fields."""
    _RULES[function.__name__] = function
    return function


def obeys(answer: str, rules: list[Mapping[str, Any]]) -> bool:
    """Say whether a non-empty answer, stripped of outer white space, obeys all the rules."""
    text = answer.strip()
    return bool(text) and all(_apply(text, fields) for fields in rules)


def _apply(text: str, fields: Mapping[str, Any]) -> bool:
    name = fields.get("rule", "")
    if name not in _RULES:
        raise UnknownName("format rule", str(name), list(_RULES))
    try:
        return _RULES[name](text, **{k: v for k, v in fields.items() if k != "rule"})
    except TypeError as problem:
        raise DataError(f"format rule {name!r} has wrong fields: {problem}.") from problem


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def _parsed(text: str) -> Any:
    fenced = re.fullmatch(r"```\w*\s*\n(.*?)\n?```", text, re.DOTALL)
    try:
        return json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return None


@rule
def bullet_count(answer: str, /, n: int) -> bool:
    """Exactly n lines begin with a bullet (-, * or •) and a space."""
    return len(re.findall(r"^[ \t]*[-*•][ \t]+\S", answer, re.MULTILINE)) == n


@rule
def numbered_list(answer: str, /, n: int) -> bool:
    """The lines that begin `1.` or `1)` are exactly n and are numbered 1 to n in order."""
    numbers = re.findall(r"^[ \t]*(\d+)[.)][ \t]+\S", answer, re.MULTILINE)
    return numbers == [str(i + 1) for i in range(n)]


@rule
def line_count(answer: str, /, n: int) -> bool:
    """Exactly n lines are not blank."""
    return len(_lines(answer)) == n


@rule
def word_count(answer: str, /, n: int) -> bool:
    """Exactly n words, parted by white space."""
    return len(answer.split()) == n


@rule
def max_words(answer: str, /, n: int) -> bool:
    """At most n words, parted by white space."""
    return len(answer.split()) <= n


@rule
def min_words(answer: str, /, n: int) -> bool:
    """At least n words, parted by white space."""
    return len(answer.split()) >= n


@rule
def item_count(answer: str, /, n: int, separator: str = ",") -> bool:
    """Exactly n items, none empty, between separators."""
    items = answer.split(separator)
    return len(items) == n and all(item.strip() for item in items)


@rule
def all_uppercase(answer: str, /) -> bool:
    """There are letters and none is lower case."""
    return answer.upper() == answer != answer.lower()


@rule
def all_lowercase(answer: str, /) -> bool:
    """There are letters and none is upper case."""
    return answer.lower() == answer != answer.upper()


@rule
def starts_with(answer: str, /, text: str) -> bool:
    """The answer begins so, in the same case."""
    return answer.startswith(text)


@rule
def ends_with(answer: str, /, text: str) -> bool:
    """The answer ends so, in the same case."""
    return answer.endswith(text)


@rule
def contains(answer: str, /, text: str, n: int = 1) -> bool:
    """The text occurs at least n times, in any case."""
    return answer.casefold().count(text.casefold()) >= n


@rule
def excludes(answer: str, /, text: str) -> bool:
    """The text does not occur, in any case."""
    return text.casefold() not in answer.casefold()


@rule
def json_keys(answer: str, /, keys: list[str]) -> bool:
    """The answer, or its one code block, is a JSON object with exactly these keys."""
    value = _parsed(answer)
    return isinstance(value, dict) and set(value) == set(keys)


@rule
def json_list(answer: str, /, n: int) -> bool:
    """The answer, or its one code block, is a JSON list of exactly n values."""
    value = _parsed(answer)
    return isinstance(value, list) and len(value) == n
