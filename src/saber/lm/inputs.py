"""What goes into weights when the model reads texts, in batches behind what all of them begin with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from saber.lm.chat import Encoded, common_prefix
from saber.lm.forward import (
    TOKENS_PER_BATCH,
    Progress,
    cache_name,
    carried,
    carry,
    enlarged,
    expanded,
    gathered_head,
    prefix_cache,
    silent,
)
from saber.lm.model import LanguageModel
from saber.lm.substitution import random_tokens
from saber.lm.tap import Key, Receive, Tap, plain_experts
from saber.lm.writers import Writer


@dataclass(frozen=True)
class Reading:
    """Sequences in batches behind their shared prefix, ready to be read."""

    batches: tuple[tuple[Tensor, tuple[int, ...]], ...]
    """Token ids (rows, width) behind the prefix, padded on the right, and each row's length."""
    prefix: tuple[int, ...]
    """The tokens that all begin with, which `read_prefix` reads."""
    cache: DynamicCache | None
    """The model's state after the prefix."""
    last: int
    """How many last tokens of each sequence are read; 0: all behind the prefix."""
    padded: bool
    """Whether rows of a batch may differ in length."""

    @property
    def offset(self) -> int:
        """Length of the prefix."""
        return len(self.prefix)

    @property
    def tokens(self) -> int:
        """How many tokens are read."""
        return sum(min(n, self.last or n) for _, lengths in self.batches for n in lengths)


def plan_reading(
    lm: LanguageModel,
    writers: Sequence[Writer],
    encoded: Sequence[Encoded],
    *,
    last: int = 0,
    tokens_per_batch: int = 0,
) -> Reading:
    """Arrange sequences for reading and run their shared prefix; 0 tokens a batch: as many as usual.

    Where a router decides which rows an expert gets, padding would be routed too and could not be
    told from tokens: sequences of equal length run together then.
    """
    sequences = [e.ids for e in encoded]
    shortest = min(map(len, sequences), default=1)
    offset = max(0, min(common_prefix(sequences), shortest - max(last, 1)))
    cache = prefix_cache(lm, sequences[0][:offset]) if sequences else None
    offset = offset if cache is not None else 0
    padded = not routes(lm, writers)
    tails = sorted((list(ids[offset:]) for ids in sequences), key=len)
    pad = lm.tokenizer.pad_token_id or 0
    batches: list[tuple[Tensor, tuple[int, ...]]] = []
    most = tokens_per_batch or enlarged(lm.device) * TOKENS_PER_BATCH
    while tails:
        # From the longest on, so that the widest batch comes first.
        width = len(tails[-1])
        room = max(1, most // width)
        rows = [t for t in tails[-room:] if padded or len(t) == width]
        del tails[-len(rows) :]
        ids = torch.tensor([t + [pad] * (width - len(t)) for t in rows])
        batches.append((ids, tuple(map(len, rows))))
    prefix = tuple(sequences[0][:offset]) if sequences else ()
    return Reading(tuple(batches), prefix, cache, last, padded)


def routes(lm: LanguageModel, writers: Sequence[Writer]) -> bool:
    """Whether some writer sees other rows than all tokens, as a routed expert does."""
    if any(w.experts for w in writers):
        return True
    ids = random_tokens(lm, 5, 3)
    odd: list[int] = []

    def count(_key: Key, rows: Tensor) -> None:
        if len(rows) != ids.numel():
            odd.append(len(rows))

    with plain_experts(lm), torch.no_grad(), Tap(lm, writers, count):
        _run(lm, ids, (5, 5, 5), 0, None)
    return bool(odd)


def read_inputs(
    lm: LanguageModel,
    writers: Sequence[Writer],
    reading: Reading,
    receive: Receive,
    *,
    progress: Progress[Any] = silent,
    label: str = "inputs",
) -> None:
    """Give `receive` the rows that go into the writers when the model reads some sequences.

    An expert gets the rows that are routed to it, which may be none. A vector (a bias) has no rows,
    and a bias is no part of one. What lies behind the last layer with such a weight is not run, unless a
    state has to be handed on.
    """
    tap, last = Tap(lm, writers, receive), last_layer(lm, writers)
    with plain_experts(lm), torch.no_grad():
        for ids, lengths in progress(reading.batches, label, len(reading.batches)):
            ids, state = ids.to(lm.device), expanded(reading.cache, len(ids))
            if reading.last and not reading.padded:
                _steps(lm, tap, ids, reading.offset, state, reading.last)
                continue
            width = ids.shape[1]
            wanted = torch.tensor(
                [
                    line * width + column
                    for line, length in enumerate(lengths)
                    for column in range(max(0, length - (reading.last or length)), length)
                ],
                device=ids.device,
            )

            def keep(key: Key, rows: Tensor, wanted: Tensor = wanted) -> None:
                receive(key, rows[wanted.to(rows.device)] if reading.padded else rows)

            with tap.to(keep):
                _run(lm, ids, lengths, reading.offset, state, last)


def last_layer(lm: LanguageModel, writers: Sequence[Writer]) -> int:
    """Return the deepest layer that holds the weight of a writer; the last where one lies in none."""
    found = {lm.model.get_parameter(w.weight).untyped_storage().data_ptr(): -1 for w in writers}
    for index, layer in enumerate(lm.layers):
        for parameter in layer.parameters():
            pointer = parameter.untyped_storage().data_ptr()
            if pointer in found:
                found[pointer] = index
    end = len(lm.layers) - 1
    return end if -1 in found.values() else max(found.values(), default=end)


def read_prefix(
    lm: LanguageModel, writers: Sequence[Writer], prefix: Sequence[int], receive: Receive
) -> None:
    """Give `receive` the rows that go into the writers when the model reads how all texts begin."""
    ids = torch.tensor([list(prefix)], device=lm.device)
    with plain_experts(lm), torch.no_grad(), Tap(lm, writers, receive):
        _run(lm, ids, None, 0, None)


def _steps(lm: LanguageModel, tap: Tap, ids: Tensor, offset: int, state: Any, last: int) -> None:
    """Run all but the last tokens, then those one by one with the tap open."""
    start = ids.shape[1] - last
    if start:
        after = _run(lm, ids[:, :start], None, offset, state)
        if after is None:
            for row in ids:
                _added(lm, tap, row[None], last)
            return
        state = after
    for step in range(last):
        with tap:
            at = start + step
            state = _run(lm, ids[:, at : at + 1], None, offset + at, state)


def _added(lm: LanguageModel, tap: Tap, ids: Tensor, last: int) -> None:
    """Read the last tokens of one text in a model whose states cannot be handed on.

    A causal model meets the rows of the shorter text again, in their order, and then new ones.
    """
    counts: dict[Key, int] = {}
    for length in range(ids.shape[1] - last, ids.shape[1] + 1):
        found: dict[Key, list[Tensor]] = defaultdict(list)

        def keep(key: Key, rows: Tensor, found: dict[Key, list[Tensor]] = found) -> None:
            found[key].append(rows)

        with tap.to(keep):
            _run(lm, ids[:, :length], None, 0, None)
        for key, parts in found.items():
            rows = torch.cat(parts)
            new = rows[counts.get(key, 0) :]
            counts[key] = len(rows)
            if length > ids.shape[1] - last and len(new):
                tap.receive(key, new)


def _run(
    lm: LanguageModel,
    ids: Tensor,
    lengths: Sequence[int] | None,
    offset: int,
    state: Any,
    last: int | None = None,
) -> Any:
    """Run tokens behind a state without logits; return the state after them, if there is one.

    Behind a `last` layer that is not the model's nothing is run, and there is no such state.
    """
    rows, width = ids.shape
    positions = torch.arange(offset, offset + width, device=ids.device).expand(rows, -1)
    mask = torch.ones(rows, offset + width, dtype=torch.long, device=ids.device)
    for line, length in enumerate(lengths or ()):
        mask[line, offset + length :] = 0
    layers, out = len(lm.layers), None
    run = layers if last is None else last + 1
    with gathered_head(lm, torch.zeros(0, dtype=torch.long)), _ended(lm, run):
        out = lm.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=cache_name(lm) is not None,
            **carry(lm, state),
        )
    # A token that goes through some layers counts as their share of one.
    lm.work.tokens += (sum(lengths) if lengths else rows * width) * run // layers
    return carried(lm, out)


class _Enough(Exception):
    """Ends a forward pass."""


@contextmanager
def _ended(lm: LanguageModel, layers: int) -> Iterator[None]:
    """Let forward passes end behind so many layers, without what comes out; all of them end as ever."""

    def enough(_module: nn.Module, _args: Any, _output: Any) -> None:
        raise _Enough

    with ExitStack() as stack:
        if layers < len(lm.layers):
            stack.enter_context(suppress(_Enough))
            stack.callback(lm.layers[layers - 1].register_forward_hook(enough).remove)
        yield
