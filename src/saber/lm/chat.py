"""Prompts to token ids through the model's own chat template."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from unittest.mock import patch

from transformers.utils import chat_template_utils

from saber.errors import ModelError
from saber.lm.marks import left_open
from saber.lm.model import LanguageModel

_DUMMIES = ("Alpha one?", "Zebra two.", "middle three")
EMPTY_THOUGHTS = {
    "<think>": "<think>\n\n</think>\n\n",
    "[THINK]": "[THINK][/THINK]",
    "<|channel>thought": "<|channel>thought\n<channel|>",
    "<|channel|>analysis": "<|channel|>analysis<|message|><|end|><|start|>assistant"
    "<|channel|>final<|message|>",
}
"""What opens a thought -> a thought without words, and the way out to the answer."""
TODAY = datetime.datetime(2026, 1, 1)
"""The day that chat templates are told, so that a prompt is the same tokens whenever it is read."""


class _Calendar(datetime.datetime):
    """What transformers asks for the date that a template writes."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:  # type: ignore[override]
        """Return `TODAY`."""
        return TODAY.replace(tzinfo=tz)


@dataclass(frozen=True)
class Encoded:
    """A templated prompt, with or without an answer after it, as token ids."""

    ids: tuple[int, ...]
    """All tokens: template, user text, template, answer."""
    prompt_length: int
    """How many of them come before the answer."""

    @property
    def answer_positions(self) -> list[int]:
        """Positions whose logits predict the answer's tokens."""
        return list(range(self.prompt_length - 1, len(self.ids) - 1))


@dataclass(frozen=True)
class Template:
    """The token counts of the chat template around the user's text."""

    prefix_length: int
    """Tokens before the user's text that are the same for every prompt."""
    suffix_length: int
    """Tokens after the user's text, up to where the answer starts: the decision positions."""


def render(lm: LanguageModel, prompt: str) -> str:
    """Return the templated text behind the messages that come `before`, ready for the answer.

    A model that could think gets an empty thought, unless it is `thinking`, and a template that writes the
    date is told `TODAY`. One that takes no plain texts gets them as parts of messages, as those of models
    with images do. Raises `ModelError` where the template fails, or leaves out a system prompt or the prompt
    itself.
    """
    try:
        text = _templated(lm, prompt, in_parts=False)
    except ModelError:
        try:
            text = _templated(lm, prompt, in_parts=True)
        except ModelError:
            text = ""
        # One that writes a list as it is does not take it.
        if not text or "{'type':'text'" in _spaceless(text).replace('"', "'"):
            raise
    if lm.thinking:
        return text
    for opener, empty in EMPTY_THOUGHTS.items():
        if text.rstrip().endswith(opener):
            text = text.rstrip().removesuffix(opener) + empty
    return text + lm.response_prefix


def opened(lm: LanguageModel, prompt: str) -> str:
    """Return the thought that a prompt leaves open for a `thinking` model, from its mark on; else nothing.

    Raises what `render` does.
    """
    return left_open(render(lm, prompt)) if lm.thinking else ""


def _templated(lm: LanguageModel, prompt: str, *, in_parts: bool) -> str:
    """Return what the template makes of all messages; raises `ModelError` where it leaves one out."""
    messages = [*lm.before, ("user", prompt)]
    # Templates call the switch by either name; what they do without the second is left to them.
    switch = {"enable_thinking": lm.thinking, **({"thinking": True} if lm.thinking else {})}
    try:
        with patch.object(chat_template_utils, "datetime", _Calendar, create=True):
            text: str = lm.tokenizer.apply_chat_template(
                [
                    {"role": role, "content": [{"type": "text", "text": t}] if in_parts else t}
                    for role, t in messages
                ],
                add_generation_prompt=True,
                tokenize=False,
                **switch,
            )
    except Exception as error:  # jinja raises its own family, and templates may raise anything
        raise ModelError(
            f"the chat template of {lm.name!r} fails: {error}",
            "Pass another with --chat-template"
            + (", or leave --system out." if lm.before else "."),
        ) from error
    written = _spaceless(text)
    for role, content in lm.before:
        # Of earlier answers templates drop thoughts.
        if role != "assistant" and _spaceless(content) not in written:
            raise ModelError(
                f"the chat template of {lm.name!r} leaves out the {role} message.",
                "Pass another with --chat-template, or leave --system out.",
            )
    if _spaceless(prompt) not in written:
        raise ModelError(
            f"the chat template of {lm.name!r} leaves out the user message.",
            "Pass another with --chat-template.",
        )
    return text


def _spaceless(text: str) -> str:
    """Return a text without its white space, which templates strip and fold."""
    return "".join(text.split())


def encode(
    lm: LanguageModel, prompts: Sequence[str], answers: Sequence[Sequence[int]] | None = None
) -> list[Encoded]:
    """Encode prompts, each followed by the answer's token ids where given.

    The templated text is tokenised without special tokens; a BOS that the tokenizer would put in
    front and the template does not write is added, and never a second one.
    """
    bos = lm.tokenizer.bos_token_id
    adds_bos = bos is not None and lm.tokenizer("a").input_ids[:1] == [bos]
    encoded = []
    texts = [render(lm, prompt) for prompt in prompts]
    tokens = lm.tokenizer(texts, add_special_tokens=False).input_ids if texts else []
    for index, ids in enumerate(tokens):
        if adds_bos and ids[0] != bos:
            ids = [bos, *ids]
        if bos is not None and ids[:2] == [bos, bos]:
            raise ModelError(f"the chat template of {lm.name!r} writes the BOS token twice.")
        answer = answers[index] if answers is not None else ()
        encoded.append(Encoded((*ids, *answer), len(ids)))
    return encoded


def encode_answers(
    lm: LanguageModel, answers: Sequence[str], *, end: bool = True
) -> list[list[int]]:
    """Tokenise answers without special tokens, with the end-of-answer token behind when `end`."""
    ids = lm.tokenizer(list(answers), add_special_tokens=False).input_ids if answers else []
    closing = [lm.tokenizer.eos_token_id] if end and lm.tokenizer.eos_token_id is not None else []
    return [[*row, *closing] for row in ids]


def measure_template(lm: LanguageModel) -> Template:
    """Find what the template puts before and after the user's text, by encoding unlike prompts."""
    rows = [e.ids for e in encode(lm, _DUMMIES)]
    prefix = common_prefix(rows)
    suffix = common_prefix([row[::-1] for row in rows])
    if suffix == 0:
        raise ModelError(f"the chat template of {lm.name!r} puts nothing after the user's text.")
    return Template(prefix, suffix)


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Return how many leading tokens all rows share."""
    shared = 0
    for column in zip(*rows, strict=False):
        if len(set(column)) > 1:
            break
        shared += 1
    return shared
