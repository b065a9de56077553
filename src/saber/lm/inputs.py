"""What goes into weights when the model reads texts, in batches behind what all of them begin with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from saber.errors import ModelError
from saber.lm.cache import mask_of
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
    placed,
    prefix_cache,
    silent,
    within_reach,
)
from saber.lm.model import LanguageModel
from saber.lm.routing import Extent, Gate, Turn, find_gates, parted
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
    gates: tuple[Gate, ...] | None
    """What keeps padding from experts; None where nothing does, and rows of a batch have one length."""

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

    Where a router decides which rows an expert gets, and padding cannot be kept from it, sequences of
    equal length run together.
    """
    sequences = [e.ids for e in encoded]
    shortest = min(map(len, sequences), default=1)
    offset = max(0, min(common_prefix(sequences), shortest - max(last, 1)))
    cache = prefix_cache(lm, sequences[0][:offset]) if sequences else None
    offset = offset if cache is not None else 0
    gates = find_gates(lm, writers)
    tails = sorted((list(ids[offset:]) for ids in sequences), key=len)
    pad = lm.pad_id
    batches: list[tuple[Tensor, tuple[int, ...]]] = []
    most = tokens_per_batch or enlarged(lm.device) * TOKENS_PER_BATCH
    while tails:
        # From the longest on, so that the widest batch comes first.
        width = len(tails[-1])
        room = max(1, most // width)
        rows = [t for t in tails[-room:] if gates is not None or len(t) == width]
        del tails[-len(rows) :]
        ids = torch.tensor([t + [pad] * (width - len(t)) for t in rows])
        batches.append((ids, tuple(map(len, rows))))
    prefix = tuple(sequences[0][:offset]) if sequences else ()
    return Reading(tuple(batches), prefix, cache, last, gates)


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
            if reading.last and reading.gates is None:
                _steps(lm, tap, ids, reading.offset, state, reading.last)
                continue
            column = torch.arange(ids.shape[1], device=ids.device)
            end = torch.tensor(lengths, device=ids.device)[:, None]
            own, late = column < end, column >= end - (reading.last or ids.shape[1])
            wanted, others = ((own & some).flatten().nonzero()[:, 0] for some in (late, ~late))
            with parted(reading.gates or (), Extent(*ids.shape), wanted, others) as turn:
                of_all = wanted if reading.gates is not None else None
                with tap.to(_kept(receive, turn, of_all)):
                    _run(lm, ids, lengths, reading.offset, state, last)


def _kept(receive: Receive, turn: Turn, wanted: Tensor | None) -> Receive:
    """Return what passes on the rows of tokens that are read: in gates their own, outside those wanted."""

    def keep(key: Key, rows: Tensor) -> None:
        if turn.of == "all" and wanted is not None:
            rows = rows[wanted.to(rows.device)]
        if turn.of != "others":
            receive(key, rows)

    return keep


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
    width = ids.shape[1]
    starts = sorted({0, *range(width - last, width)})
    for begin, end in zip(starts, [*starts[1:], width], strict=True):
        if state is None and offset + begin:
            raise ModelError(
                "which rows experts get at the last tokens cannot be told: tokens depend on one another "
                "where they are routed, and the model hands on no state.",
                "Use --edit orthogonal.",
            )
        with tap if begin >= width - last else nullcontext():
            state = _run(lm, ids[:, begin:end], None, offset + begin, state)


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
    reach = within_reach(lm, offset + width)
    with gathered_head(lm, torch.zeros(0, dtype=torch.long)), _ended(lm, run), reach:
        out = lm.model(
            input_ids=ids,
            attention_mask=mask_of(state, mask, width),
            use_cache=cache_name(lm) is not None,
            **placed(lm, positions),
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
