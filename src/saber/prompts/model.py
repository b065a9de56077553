"""Prompts and sets of prompts, as immutable data."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any

from saber.prompts.twins import Pair

_DROPPED_MARKS = re.compile(
    r"['\u2018\u2019\u02bc"
    r"\u200b-\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]"  # no width, or a direction of writing
)
_SPACED_MARKS = re.compile(
    r"(?<!\d)[.,:-]|[.,:-](?!\d)|[;!?\"()\[\]{}\u00a1\u00bf\u00ab\u00bb\u2010-\u2015"
    r"\u201c-\u201e\u2026\u3001\u3002\u3008-\u3011\u30fb"
    r"\u0589\u060c\u061b\u061f\u06d4\u0964\u0965]"  # Armenian, Arabic, Urdu, Hindi
)


@lru_cache(1 << 16)
def normalised(text: str) -> str:
    """Return the key under which two prompts are the same: no case, spacing or punctuation.

    Operators (`+ * / =`) and marks between digits (`3.5`) stay, so that sums stay distinct.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    bare = _SPACED_MARKS.sub(" ", _DROPPED_MARKS.sub("", folded))
    return " ".join(bare.split()) or folded.strip()


@dataclass(frozen=True)
class Prompt:
    """One user message, and what is known about it."""

    id: str
    """Name, unique within its set."""
    category: str
    """Topic, used to stratify splits and to group results; empty when unknown."""
    text: str
    """The user's message, without a chat template."""
    split: str = ""
    """`fit`, `validation` or `heldout`; empty until it is split."""
    reference: str = ""
    """A right answer, for perplexity; empty when there is none."""
    checker: Mapping[str, Any] | None = field(default=None, hash=False)
    """How an answer is checked (battery only), as in the data file."""
    twin: str = ""
    """Id of the matched prompt in the opposite set; empty when there is none."""


@dataclass(frozen=True)
class PromptSet:
    """Prompts in a fixed order, under a name."""

    name: str
    """Name for reports, for example the file's stem."""
    prompts: tuple[Prompt, ...]
    """The prompts, in order."""
    dropped: int = 0
    """How many duplicates were left out when the set was made, at least 0."""
    places: tuple[int, ...] = ()
    """Number of each prompt before `only` left some out, from 0; empty where none was."""

    def __post_init__(self) -> None:
        assert len(self.places) in (0, len(self.prompts))

    @classmethod
    def unique(cls, name: str, prompts: Iterable[Prompt]) -> PromptSet:
        """Keep the first of prompts whose `normalised` texts agree, and count the others."""
        kept: dict[str, Prompt] = {}
        total = 0
        for prompt in prompts:
            total += 1
            kept.setdefault(normalised(prompt.text), prompt)
        return cls(name, tuple(kept.values()), total - len(kept))

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)

    @property
    def texts(self) -> list[str]:
        """The texts, in order."""
        return [prompt.text for prompt in self.prompts]

    @property
    def categories(self) -> list[str]:
        """The categories, one a prompt, in order."""
        return [prompt.category for prompt in self.prompts]

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """What each prompt shares with its twin in the opposite set alone, in order."""
        places = self.places or range(len(self))
        return tuple(
            " ".join(sorted((p.id, p.twin))) if p.twin else place
            for p, place in zip(self.prompts, places, strict=True)
        )

    def only(self, kept: Sequence[bool]) -> PromptSet:
        """Return the prompts that are marked, in order; each goes on to be paired as it was."""
        if all(kept):
            return self
        places = self.places or range(len(self))
        rows = [row for row, keep in enumerate(kept) if keep]
        return replace(
            self,
            prompts=tuple(self.prompts[row] for row in rows),
            places=tuple(places[row] for row in rows),
        )

    def where(self, *, split: str | None = None, category: str | None = None) -> PromptSet:
        """Return the prompts of this split and category (None: any), in order."""
        chosen = tuple(
            prompt
            for prompt in self.prompts
            if (split is None or prompt.split == split)
            and (category is None or prompt.category == category)
        )
        return PromptSet(self.name, chosen)

    def fingerprint(self) -> str:
        """Return the SHA-256 (64 hex digits) of all the fields of all the prompts, and their places."""
        rows: list[Any] = [asdict(prompt) for prompt in self.prompts]
        if self.places:
            rows.append(self.places)
        text = json.dumps(rows, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(text.encode("ascii")).hexdigest()
