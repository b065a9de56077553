"""Checkers: is an answer to a battery item right? Each is a pure rule, without a model."""

from __future__ import annotations

import re
import textwrap
import unicodedata
from collections.abc import Callable, Mapping, Set
from fractions import Fraction
from typing import Any

from saber.errors import DataError, UnknownName
from saber.evaluation.formats import obeys
from saber.evaluation.judge import behind_thought, thinking
from saber.evaluation.sandbox import run_asserts

Spec = Mapping[str, Any]
Checker = Callable[[Spec, str], bool]
_CHECKERS: dict[str, Checker] = {}


def checker(kind: str) -> Callable[[Checker], Checker]:
    """Register a checker under the `kind` that battery items name."""

    def register(function: Checker) -> Checker:
        _CHECKERS[kind] = function
        return function

    return register


def check(item_checker: Mapping[str, Any], answer: str, *, prompt: str = "") -> bool:
    """Say whether the answer is right; raise UnknownName or DataError for a bad item.

    `prompt` is what was asked, where it is known: numbers that it states are rarely the answer. A thought
    in front of the answer is not looked at.
    """
    kind = str(item_checker.get("kind", ""))
    if kind not in _CHECKERS:
        raise UnknownName("checker kind", kind, list(_CHECKERS))
    try:
        return _CHECKERS[kind]({"prompt": prompt, **item_checker}, behind_thought(answer))
    except KeyError as problem:
        raise DataError(f"the {kind!r} checker of a battery item lacks {problem}.") from problem


def decided(item_checker: Mapping[str, Any], answer: str) -> bool:
    """Say whether no more text could change what `check` says of an answer; False where unknown."""
    if thinking(answer):
        return False
    kind, answer = item_checker.get("kind"), behind_thought(answer)
    if kind == "fact":
        # More text could still name what must not be there, or lengthen the last word.
        head = re.sub(r"\w*$", "", answer)
        return check(item_checker, head) and not item_checker.get("not")
    if kind == "code":
        # The first block that defines the function is the one that is run.
        name = re.escape(str(item_checker.get("entry_point", "")))
        return any(re.search(rf"\bdef\s+{name}\b", block) for block in _CLOSED.findall(answer))
    return False


_NUMBER = re.compile(
    r"(?:(?P<minus>(?<![\w)])[-−])[$€£]?|[$€£](?P<inner_minus>[-−]))?"  # in 10-5 it is no sign
    r"(?<![\w^])"  # not within a word (H2O) and no exponent (cm^2)
    r"(?:(?:(?P<units>\d+)\s)?(?P<top>\d+)\s?/\s?(?P<bottom>0*[1-9]\d*)(?!\d|\.\d)"
    r"|(?P<plain>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+))"
)
_ANSWER_IS = re.compile(r"answer(?:\s+is|\s*:)", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
_SUM_FOLLOWS = re.compile(r"[\s$€£]*[-−]?[\d.,]+\s*(?:[-−+*×·÷^x]|\\times|\\cdot)\s*\d")
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_BOLD = re.compile(r"\*\*([^\w*]{0,3}\.?\d(?:[^*:)]*[^*:).])?)\*\*")
_REASON = re.compile(r"\b(?:because|since|after|when|if)\b|, as\b", re.IGNORECASE)
_ASIDE = re.compile(r"\([^()]*\)?")
_LONGEST = 100  # digits; more are a model that lost its thread, and slow to parse
_NEGATIVE = re.compile(
    r"(?:\bnegative|(?:(?<=\bis )|(?<=\bequals )|(?<== )|^)minus) (?=[$€£]?[\d.]|[a-z])",
    re.IGNORECASE | re.MULTILINE,
)
_WORDS = re.findall(
    r"\w+",
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen",
)
_TENS = re.findall(r"\w+", "twenty thirty forty fifty sixty seventy eighty ninety")
_IN_WORDS = re.compile(
    rf"(?P<minus>(?<![\w-])-)?\b(?:(?P<tens>{'|'.join(_TENS)})(?:[-\s](?P<ones>{'|'.join(_WORDS[1:10])}))?"
    rf"|(?P<small>{'|'.join(_WORDS)}))\b"
)


def find_number(answer: str, *, prompt: str = "") -> Fraction | None:
    """Return the number that an answer gives, or None.

    It is what stands in the last \\boxed{}; else the first number after the last "answer is" or
    "answer:"; else it comes from the last sentence (or line) with numbers. In a sentence a number
    after the last "=" goes first, unless an operator follows it, and otherwise the last number does.
    Where the prompt is known, numbers that it states are passed over if there are others, and of these
    go first what is bold, and what comes before a reason: "48 eggs in 4 boxes", "$51 after $9 off".
    Read are thousands commas, decimals, a leading minus or currency sign, fractions (3/4,
    \\frac{3}{4}) and mixed numbers (1 3/4); units and percent signs are ignored, and "negative" is a
    minus, as "minus" is where it is not taken off something. An answer without digits may use words,
    zero to ninety-nine.
    """
    text = re.sub(r"\\d?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", answer)
    text = _NEGATIVE.sub("-", text)
    asked = {*_numbers(prompt), *_worded(prompt)} if prompt else None
    for boxed in reversed(_BOXED.findall(text)):
        if numbers := _after_equals(boxed)[:1] or _numbers(boxed):
            return numbers[-1]
    marked = _ANSWER_IS.split(text)
    if len(marked) > 1:
        first = _SENTENCE_END.split(marked[-1].lstrip(" \n\t:*$"))[0]
        numbers = _after_equals(first) or _numbers(first)
        if numbers:
            return numbers[0] if _NUMBER.match(first) else (_others(numbers, asked) or numbers)[0]
    for sentence in reversed(_SENTENCE_END.split(text)):
        numbers = _after_equals(sentence)[:1] or _telling(sentence, asked)
        if numbers:
            return numbers[-1]
    words = _worded(text)
    return (_others(words, asked) or words)[-1] if words else None


def _telling(sentence: str, asked: Set[Fraction] | None) -> list[Fraction]:
    """Return a sentence's numbers, or those among them that rather are what was asked for."""
    numbers = _numbers(sentence)
    if asked is None:
        return numbers
    bold = [n for part in _BOLD.findall(sentence) for n in _numbers(part)[:1]]
    stated = _numbers(_REASON.split(_ASIDE.sub(" ", sentence))[0])
    return next(
        (some for some in (_others(n, asked) for n in (bold, stated, numbers)) if some), numbers
    )


def _others(numbers: list[Fraction], asked: Set[Fraction] | None) -> list[Fraction]:
    return [n for n in numbers if n not in (asked or ())]


def _worded(text: str) -> list[Fraction]:
    return [_in_words(match) for match in _IN_WORDS.finditer(text.lower())]


def _in_words(match: re.Match[str]) -> Fraction:
    tens, ones = match["tens"], match["small"] or match["ones"]
    size = (10 * (_TENS.index(tens) + 2) if tens else 0) + (_WORDS.index(ones) if ones else 0)
    return Fraction(-size if match["minus"] else size)


def _after_equals(sentence: str) -> list[Fraction]:
    _, equals, after = sentence.rpartition("=")
    return _numbers(after) if equals and not _SUM_FOLLOWS.match(after) else []


def _numbers(text: str) -> list[Fraction]:
    found = []
    for match in _NUMBER.finditer(text):
        if len(match[0]) > _LONGEST:
            continue
        if match["plain"]:
            size = Fraction(match["plain"].replace(",", ""))
        else:
            size = int(match["units"] or 0) + Fraction(int(match["top"]), int(match["bottom"]))
        found.append(-size if match["minus"] or match["inner_minus"] else size)
    return found


@checker("number")
def check_number(spec: Spec, answer: str) -> bool:
    """`find_number` gives `value`, within `tolerance` (0 if absent)."""
    number = find_number(answer, prompt=spec.get("prompt", ""))
    wanted, tolerance = Fraction(str(spec["value"])), Fraction(str(spec.get("tolerance", 0)))
    return number is not None and abs(number - wanted) <= tolerance


def find_choice(answer: str, options: list[str]) -> str | None:
    """Return the option that an answer clearly chooses first, or None.

    After "answer is" or "answer:" if that is there and an option follows, else from the start.
    Longer options are matched by whole words in any case. One-letter options must be capitals
    (or all of the answer), and A and I must not be words of a sentence ("A cat"). An option
    after "not" is no choice, nor are options joined by "or", which repeat the question.
    """
    for part in [*reversed(_ANSWER_IS.split(answer)[1:]), answer]:
        found = _first_option(part, options)
        if found is not None:
            return found
    return None


def _first_option(text: str, options: list[str]) -> str | None:
    alone = re.sub(r"[\W_]+", "", text)
    for option in options:
        if len(option) == 1 and alone.casefold() == option.casefold():
            return option
    alternatives = "|".join(_option_pattern(o) for o in sorted(options, key=len, reverse=True))
    one = rf"(?<![\w'’])(?:{alternatives})(?![\w'’])"
    offered = rf"(?P<offered>{one}\W+or\W+{one})"
    denied = rf"(?P<denied>\b(?i:not)\W+{one})"
    for match in re.finditer(rf"{offered}|{denied}|{one}", text):
        if match["offered"] is None and match["denied"] is None:
            return next(o for o in options if o.casefold() == match[0].casefold())
    return None


def _option_pattern(option: str) -> str:
    if len(option) > 1:
        return rf"(?i:{re.escape(option)})"
    article = r"(?![ \t]+(?!is\b|because\b|since\b|as\b)[a-z])" if option in "AI" else ""
    return re.escape(option) + article


@checker("choice")
def check_choice(spec: Spec, answer: str) -> bool:
    """`find_choice` among `options` (yes and no if absent) gives `answer`."""
    options = list(spec.get("options", ("yes", "no")))
    if spec["answer"] not in options:
        raise DataError(f"the answer {spec['answer']!r} is none of the options {options}.")
    return find_choice(answer, options) == spec["answer"]


_BLOCK = re.compile(r"^[ \t]*```[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_CLOSED = re.compile(r"^[ \t]*```[^\n]*\n(.*?)^[ \t]*```[^\n]*\n", re.DOTALL | re.MULTILINE)
_CODE_START = re.compile(r"(?:async )?def \w|class \w|import [\w.]+\s*$|from [\w.]+ import|@\w")
_CODE_GOES_ON = re.compile(
    r"[\s#)\]}@]|$|(?:async )?def |class |import |from [\w.]+ import|(?:if|elif|for|while|with) .*:"
    r"|(?:else|try|finally)\s*:|except\b.*:|[\w.\[\], ]+[-+*/]?= |[\w.]+\("
)


def find_code(answer: str, entry_point: str) -> str:
    """Return the code in an answer: a fenced block, else bare lines of code; empty if none.

    Of several blocks it is the first that defines `entry_point`, else the first. A last block
    may lack its closing fence. Bare code runs from the first line that begins a definition or
    an import to the first line as little indented that looks like prose.
    """
    blocks = _BLOCK.findall(answer)
    defining = [b for b in blocks if re.search(rf"\bdef\s+{re.escape(entry_point)}\b", b)]
    if blocks:
        return textwrap.dedent((defining or blocks)[0])
    lines = answer.splitlines()
    start = next(
        (i for i, line in enumerate(lines) if _CODE_START.match(line.lstrip())), len(lines)
    )
    first = "".join(lines[start : start + 1])
    margin = first[: len(first) - len(first.lstrip())]
    code = [line.removeprefix(margin) for line in lines[start:]]
    end = next((i for i, line in enumerate(code) if not _CODE_GOES_ON.match(line)), len(code))
    return "\n".join(code[:end])


@checker("code")
def check_code(spec: Spec, answer: str) -> bool:
    """The code defines `entry_point` and all `asserts` hold, within `seconds` (5 if absent)."""
    code = find_code(answer, spec["entry_point"])
    seconds = float(spec.get("seconds", 5.0))
    return bool(code) and (
        run_asserts(code, spec["entry_point"], spec["asserts"], seconds=seconds).passed
    )


@checker("format")
def check_format(spec: Spec, answer: str) -> bool:
    """The answer obeys all `rules`."""
    return obeys(answer, spec["rules"])


def _folded(text: str) -> str:
    text = re.sub(r"(?<=[^\W_])_(?:(\d+)|\{(\d+)\})", r"\1\2", text)  # H_2O as H₂O
    marked = unicodedata.normalize("NFKD", text.casefold())
    bare = "".join(c for c in marked if not unicodedata.combining(c))
    return " ".join(re.sub(r"[^\w\s.]|_", " ", bare).split())


@checker("fact")
def check_fact(spec: Spec, answer: str) -> bool:
    """One of `aliases` occurs in whole words, and none of `not`; case and accents are ignored."""
    text = _folded(answer)

    def occurs(name: str) -> bool:
        return re.search(rf"(?<!\w){re.escape(_folded(name))}(?!\w)", text) is not None

    return any(map(occurs, spec["aliases"])) and not any(map(occurs, spec.get("not", ())))
