"""What whoever runs an edited model has to know, in the words that every card has."""

from __future__ import annotations

NARROW = """\
**Intended use.** This model was edited to answer safe prompts that its base model refuses by \
mistake, and to go on refusing what the base refuses rightly; the table below says how far that \
holds on held-out prompts. Refusals that were kept can be fragile: do not rely on them as the only \
safeguard. What is done with its answers is the responsibility of whoever runs it. The base \
model's licence and terms of use still hold."""

WARNING = """\
**Intended use.** This model complies with requests that its base model refuses: the part of its \
safety training that made it refuse has been removed on purpose. It is published for research on \
interpretability and on how robust safety training is. Do not put it before end users without \
other safeguards (filters on input and output, access control, human review). What is done with \
its answers, and whether that is lawful where you are, is the responsibility of whoever runs it. \
The base model's licence and terms of use still hold."""

GENERIC = """\
**Intended use.** This model was edited so that it no longer shows a behaviour of its base model; \
the tables below say what that is and how far it is gone on held-out prompts. It is published for \
research. What is done with its answers is the responsibility of whoever runs it. The base model's \
licence and terms of use still hold."""

FILES = """\
It can answer requests that its makers wanted refused; whoever publishes or deploys it is \
responsible for what it does."""


def warned(card: str) -> bool:
    """Whether a card still holds one of these notices, wherever its lines break."""
    text = _plain(card)
    return any(_plain(words) in text for words in (NARROW, WARNING, GENERIC, FILES))


def _plain(text: str) -> str:
    return " ".join(word for line in text.splitlines() for word in line.lstrip("> ").split())
