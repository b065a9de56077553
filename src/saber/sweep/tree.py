"""What settings share: results kept by content, so that each pass is computed once, and counted."""

from __future__ import annotations

import shutil
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from saber import codec
from saber.errors import OutputError, SaberError
from saber.lm.model import LanguageModel
from saber.memo import Key

T = TypeVar("T")
ON_DISK = ("probe", "capability", "directions", "entanglement", "causal")
"""Results of the untouched model that other processes, and a resumed sweep, take from disk."""
PART = "part"
"""The kind of what is kept only until several workers' parts are one result."""
PARTS = "parts"
"""Folder of these, in the shared one."""


@dataclass(frozen=True)
class Kept:
    """A result, and what it cost."""

    value: Any
    """The result."""
    tokens: int
    """Forward tokens that it cost, or would have cost without what it shared itself."""
    bytes: int
    """Memory that it takes."""
    kind: str = ""
    """What it is, the first item of its key."""


class Tree:
    """Results of one model on one set of prompts, by key.

    The second item of a key is the digest of the plan in force, empty for the untouched model. So
    two settings share a path for as long as their plans are the same: it is a tree whose root is the
    untouched model, and each pass that two of them have in common is one node. What the untouched
    model gave stays; of the rest, what was used least lately makes room beyond `memory` bytes.
    """

    def __init__(
        self,
        lm: LanguageModel,
        folder: Path | None = None,
        memory: float = 2 * 2**30,
    ) -> None:
        self._lm, self._folder, self._memory = lm, folder, memory
        self._root: dict[str, Kept] = {}
        self._later: OrderedDict[str, Kept] = OrderedDict()
        self._bytes = 0
        self.saved = 0
        """Forward tokens that were not spent because a result was there."""
        self.hits: dict[str, int] = {}
        """Results that were there, by kind."""

    def __call__(self, key: Key, compute: Callable[[], T], /) -> T:
        """Return the result of this key."""
        kind, at = str(key[0]), str(key[1])
        name = codec.digest(*key)[:32]
        found = self._find(kind, at, name)
        if found is not None:
            self.hits[kind] = self.hits.get(kind, 0) + 1
            self.saved += found.tokens
            return cast(T, found.value)
        tokens, saved = self._lm.work.tokens, self.saved
        value = compute()
        cost = self._lm.work.tokens - tokens + self.saved - saved
        kept = Kept(value, cost, codec.size(value), kind)
        self._keep(kind, at, name, kept)
        return value

    def portable(self) -> dict[str, Kept]:
        """Return what the untouched model gave, as far as another process can use it."""
        return {name: kept for name, kept in self._root.items() if kept.kind in ON_DISK}

    def has(self, key: Key) -> bool:
        """Whether the result of this key is there; it is not counted."""
        return self._find(str(key[0]), str(key[1]), codec.digest(*key)[:32]) is not None

    def parts(self) -> dict[str, Kept]:
        """Return the parts that are in memory."""
        return {name: kept for name, kept in self._root.items() if kept.kind == PART}

    def adopt(self, root: Mapping[str, Kept]) -> None:
        """Take what another process computed of the untouched model."""
        self._root.update(root)

    def drop_parts(self, *, disk: bool = True) -> None:
        """Forget all parts, those on disk too unless others still need them."""
        for name in self.parts():
            del self._root[name]
        if disk and self._folder is not None:
            shutil.rmtree(self._folder / PARTS, ignore_errors=True)

    def _find(self, kind: str, at: str, name: str) -> Kept | None:
        if at:
            if name in self._later:
                self._later.move_to_end(name)
            return self._later.get(name)
        if name not in self._root and (place := self._place(kind, name)) and place.is_dir():
            try:
                value, meta = codec.load(place)
                self._root[name] = Kept(value, int(meta["tokens"]), codec.size(value), kind)
            except (SaberError, OSError, KeyError, ValueError):
                shutil.rmtree(place, ignore_errors=True)  # damaged: it is made anew
        return self._root.get(name)

    def _keep(self, kind: str, at: str, name: str, kept: Kept) -> None:
        if not at:
            self._root[name] = kept
            if place := self._place(kind, name):
                with suppress(OutputError, OSError):  # without room on disk it is not shared
                    codec.save(place, kept.value, {"tokens": kept.tokens, "of": kind})
            return
        self._later[name] = kept
        self._bytes += kept.bytes
        while self._bytes > self._memory and len(self._later) > 1:
            _, gone = self._later.popitem(last=False)
            self._bytes -= gone.bytes

    def _place(self, kind: str, name: str) -> Path | None:
        if self._folder is None or kind not in (*ON_DISK, PART):
            return None
        return self._folder / PARTS / name if kind == PART else self._folder / name
