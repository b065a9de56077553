"""What goes into a weight: the rows that forward passes multiply it with, whatever module holds it.

Weights are recognised by their storage in the matrix products that a model makes, so that dense
layers, `Conv1D`, fused experts and code that calls a weight directly are all read alike.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from saber.lm.chat import Encoded, common_prefix
from saber.lm.forward import Progress, expanded, gathered_head, prefix_cache, silent
from saber.lm.model import LanguageModel
from saber.lm.writers import Writer

Key = tuple[str, int]
"""Name of a writer, and the expert of a fused one (0 for a plain weight)."""
Receive = Callable[[Key, Float[Tensor, "rows d_in"]], None]
"""Gets rows as they come, on the model's device and in its dtype."""

_aten = torch.ops.aten
# Which two arguments each product multiplies.
_PRODUCTS: dict[Any, tuple[int, int]] = {
    _aten.mm.default: (0, 1),
    _aten.bmm.default: (0, 1),
    _aten.mv.default: (0, 1),
    _aten.linear.default: (0, 1),
    _aten.addmm.default: (1, 2),
    _aten.baddbmm.default: (1, 2),
}


@dataclass(frozen=True)
class Reading:
    """Sequences in batches of equal length behind their shared prefix: every row is a token."""

    batches: tuple[Tensor, ...]
    """Token ids (rows, width) behind the prefix, short sequences first."""
    offset: int
    """Length of the prefix, which is read by nobody."""
    cache: DynamicCache | None
    """The model's state after the prefix."""

    @property
    def tokens(self) -> int:
        """How many tokens are read when all of them count."""
        return sum(ids.numel() for ids in self.batches)

    @property
    def sequences(self) -> int:
        """How many sequences there are."""
        return sum(len(ids) for ids in self.batches)


def plan_reading(
    lm: LanguageModel, encoded: Sequence[Encoded], *, last: int = 0, tokens_per_batch: int = 2048
) -> Reading:
    """Arrange sequences for reading and run their shared prefix; `last` keeps that many out of it."""
    sequences = [e.ids for e in encoded]
    offset = min(common_prefix(sequences), min(map(len, sequences), default=1) - max(last, 1))
    cache = prefix_cache(lm, sequences[0][:offset]) if sequences else None
    offset = offset if cache is not None else 0
    groups: dict[int, list[list[int]]] = defaultdict(list)
    for ids in sequences:
        groups[len(ids)].append(list(ids[offset:]))
    batches: list[Tensor] = []
    for length, rows in sorted(groups.items()):
        batches += torch.tensor(rows).split(max(1, tokens_per_batch // (length - offset)))
    return Reading(tuple(batches), offset, cache)


def read_inputs(
    lm: LanguageModel,
    writers: Sequence[Writer],
    reading: Reading,
    receive: Receive,
    *,
    last: int = 0,
    progress: Progress[Any] = silent,
    label: str = "inputs",
) -> None:
    """Give `receive` the rows that go into the writers when the model reads some sequences.

    All tokens behind the shared prefix count or, with `last`, the last ones alone, one by one (oldest
    first). An expert gets the rows that are routed to it, which may be none. A vector (a bias) has
    no rows, and a bias is no part of one.
    """
    tap = _Tap(lm, writers, receive)
    with _plain_experts(lm), torch.no_grad():
        for ids in progress(reading.batches, label, len(reading.batches)):
            ids, state = ids.to(lm.device), expanded(reading.cache, len(ids))
            if last:
                _steps(lm, tap, ids, reading.offset, state, last)
            else:
                with tap:
                    _run(lm, ids, reading.offset, state)


def _steps(lm: LanguageModel, tap: _Tap, ids: Tensor, offset: int, state: Any, last: int) -> None:
    """Run all but the last tokens, then those one by one with the tap open."""
    start = ids.shape[1] - last
    if start:
        after = _run(lm, ids[:, :start], offset, state)
        if after is None:
            for row in ids:
                _added(lm, tap, row[None], last)
            return
        state = after
    for step in range(last):
        with tap:
            at = start + step
            state = _run(lm, ids[:, at : at + 1], offset + at, state)


def _added(lm: LanguageModel, tap: _Tap, ids: Tensor, last: int) -> None:
    """Read the last tokens of one text in a model whose states cannot be handed on.

    A causal model meets the rows of the shorter text again, in their order, and then new ones.
    """
    counts: dict[Key, int] = {}
    for length in range(ids.shape[1] - last, ids.shape[1] + 1):
        found: dict[Key, list[Tensor]] = defaultdict(list)

        def keep(key: Key, rows: Tensor, found: dict[Key, list[Tensor]] = found) -> None:
            found[key].append(rows)

        with tap.to(keep):
            _run(lm, ids[:, :length], 0, None)
        for key, parts in found.items():
            rows = torch.cat(parts)
            new = rows[counts.get(key, 0) :]
            counts[key] = len(rows)
            if length > ids.shape[1] - last and len(new):
                tap.receive(key, new)


def _run(lm: LanguageModel, ids: Tensor, offset: int, state: Any) -> Any:
    """Run tokens behind a state without logits; return the state after them, if there is one."""
    rows, width = ids.shape
    positions = torch.arange(offset, offset + width, device=ids.device).expand(rows, -1)
    mask = torch.ones(rows, offset + width, dtype=torch.long, device=ids.device)
    given = {} if state is None else {"past_key_values": state}
    with gathered_head(lm, torch.zeros(0, dtype=torch.long)):
        out = lm.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **given
        )
    lm.work.tokens += rows * width
    return getattr(out, "past_key_values", None)


class _Tap(TorchDispatchMode):
    """Sees every product below autograd, and passes on the rows that meet a writer's weight."""

    def __init__(self, lm: LanguageModel, writers: Sequence[Writer], receive: Receive) -> None:
        super().__init__()
        self.receive = receive
        self.weights: dict[int, list[tuple[Writer, Tensor]]] = defaultdict(list)
        for writer in writers:
            weight = lm.model.get_parameter(writer.weight)
            if weight.ndim > 1:
                self.weights[weight.untyped_storage().data_ptr()].append((writer, weight))

    @contextmanager
    def to(self, receive: Receive) -> Iterator[None]:
        """Open the tap with another receiver."""
        before, self.receive = self.receive, receive
        try:
            with self:
                yield
        finally:
            self.receive = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        if func in _PRODUCTS:
            left, right = (args[i] for i in _PRODUCTS[func])
            for one, other, flipped in ((right, left, False), (left, right, True)):
                self._look(one, other, flipped)
        return func(*args, **(kwargs or {}))

    def _look(self, weight: Tensor, rows: Tensor, flipped: bool) -> None:
        for writer, parameter in self.weights.get(weight.untyped_storage().data_ptr(), ()):
            start = weight.storage_offset() - parameter.storage_offset()
            if not 0 <= start < parameter.numel():
                continue
            # W @ x has its inputs in columns.
            given = rows.mT if flipped and rows.ndim > 1 else rows
            width = parameter.numel() // parameter.shape[writer.axis] // (writer.experts or 1)
            if given.shape[-1] != width:
                continue
            if writer.experts and weight.ndim == 3:
                for expert in range(writer.experts):
                    self.receive((writer.name, expert), given[expert])
            else:
                expert = start // parameter.stride(0) if writer.experts else 0
                self.receive((writer.name, expert), given.reshape(-1, width))


@contextmanager
def _plain_experts(lm: LanguageModel) -> Iterator[None]:
    """Let each expert meet its own rows in a product of its own, where transformers offers that."""
    before = getattr(lm.model.config, "_experts_implementation", None)
    if before in (None, "eager") or not hasattr(lm.model, "set_experts_implementation"):
        yield
        return
    lm.model.set_experts_implementation("eager")
    try:
        yield
    finally:
        lm.model.set_experts_implementation(before)
