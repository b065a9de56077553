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
from saber.lm.writers import Writer

Key = tuple[str, int]
"""Name of a writer, and the expert of a fused one (0 for a plain weight)."""
Receive = Callable[[Key, Float[Tensor, "rows d_in"]], None]
"""Gets rows as they come, on the model's device and in its dtype."""

_EXPERTS = "_experts_implementation"
"""Where a configuration (of the whole model, or of a part) says how fused experts run."""

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
    and a bias is no part of one.
    """
    tap = Tap(lm, writers, receive)
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
                _run(lm, ids, lengths, reading.offset, state)


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
    lm: LanguageModel, ids: Tensor, lengths: Sequence[int] | None, offset: int, state: Any
) -> Any:
    """Run tokens behind a state without logits; return the state after them, if there is one."""
    rows, width = ids.shape
    positions = torch.arange(offset, offset + width, device=ids.device).expand(rows, -1)
    mask = torch.ones(rows, offset + width, dtype=torch.long, device=ids.device)
    for line, length in enumerate(lengths or ()):
        mask[line, offset + length :] = 0
    with gathered_head(lm, torch.zeros(0, dtype=torch.long)):
        out = lm.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=cache_name(lm) is not None,
            **carry(lm, state),
        )
    lm.work.tokens += sum(lengths) if lengths else rows * width
    return carried(lm, out)


class Tap(TorchDispatchMode):
    """Sees every product below autograd, and passes on the rows that meet a writer's weight.

    Fused experts show their own rows only where they run one by one, as `read_inputs` has them do.
    """

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
def plain_experts(lm: LanguageModel) -> Iterator[None]:
    """Let each expert meet its own rows in a product of its own, where transformers offers that."""
    configs = {id(c): c for m in lm.model.modules() if (c := getattr(m, "config", None)) is not None}
    fused = [
        (config, name)
        for config in configs.values()
        if (name := getattr(config, _EXPERTS, None)) not in (None, "eager")
    ]
    try:
        for config, _ in fused:
            setattr(config, _EXPERTS, "eager")
        yield
    finally:
        for config, name in fused:
            setattr(config, _EXPERTS, name)
