"""Greedy generation in batches that answers leave as they end, and others join."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saber.lm.cache import (
    bytes_per_token,
    is_plain,
    is_roomy,
    join,
    make_room,
    mask_of,
    narrowest,
)
from saber.lm.chat import common_prefix, encode, opened
from saber.lm.device import memory_for_caches
from saber.lm.forward import (
    TOKENS_PER_BATCH,
    Progress,
    cacheable,
    carried,
    carry,
    enlarged,
    expanded,
    forward,
    gathered_head,
    placed,
    prefix_cache,
    silent,
    within_reach,
)
from saber.lm.marks import decoded
from saber.lm.model import LanguageModel
from saber.lm.offload import is_kept_aside

ROWS_PER_BATCH = 256
CACHED_PER_BATCH = 20_000
"""Tokens whose keys and values lie in memory at a time, where no device says how much it has."""
CHECK_EVERY = 4
SHRINK_BELOW = 0.8


@dataclass(frozen=True)
class Completion:
    """What the model wrote after a prompt."""

    ids: tuple[int, ...]
    """Generated tokens, the end token included where there is one."""
    text: str
    """The same without special tokens, but for those that mark a thought.

    A thought that the prompt opened begins there: with its mark.
    """
    seen: Seen | None = None
    """What went on at each token, where asked for."""


@dataclass(frozen=True)
class Seen:
    """What the output head saw and gave while it wrote an answer."""

    heads: Float[Tensor, "tokens d_model"]
    """Its inputs, float32 on the CPU."""
    nll: Float[Tensor, " tokens"]
    """Negative log-likelihood of each token that was written, nats."""


@dataclass(frozen=True)
class Request:
    """An answer that is wanted."""

    prompt: str
    """The user's text."""
    max_new_tokens: int
    """Most tokens."""
    settled: Callable[[str], bool] | None = None
    """Whether more text could not change what becomes of the answer: it ends there."""
    start: Sequence[int] = ()
    """Greedy tokens that are known already (see `greedy_starts`), which are not written again."""
    look: bool = False
    """Whether to keep what is `seen` of what is written."""


@dataclass
class _Row:
    """An answer on its way."""

    asked: Request
    """What is wanted."""
    ids: list[int]
    """What is written so far."""
    heads: list[Tensor]
    """Head inputs of what was written here, where kept."""
    nll: list[Tensor]
    """Its negative log-likelihoods, where kept."""
    text: Sequence[int] = ()
    """What comes behind the shared prefix: the rest of the prompt, and what was written before."""
    new: int = 0
    """Tokens written here."""
    opened: str = ""
    """The thought that the prompt opened, from its mark on."""

    @property
    def left(self) -> int:
        """Most tokens that can still come."""
        return self.asked.max_new_tokens - len(self.ids)

    @property
    def length(self) -> int:
        """Tokens behind the shared prefix so far."""
        return len(self.text) + self.new


def generate(
    lm: LanguageModel,
    prompts: Sequence[str],
    max_new_tokens: int,
    *,
    settled: Callable[[str], bool] | None = None,
    starts: Sequence[Sequence[int]] | None = None,
    look: bool = False,
    progress: Progress[Any] = silent,
    label: str = "generate",
) -> list[Completion]:
    """Write up to `max_new_tokens` greedy tokens after each prompt: `answer` with like requests."""
    asked = [
        Request(prompt, max_new_tokens, settled, start, look)
        for prompt, start in zip(prompts, starts or [()] * len(prompts), strict=True)
    ]
    return answer(lm, asked, progress=progress, label=label)


def answer(
    lm: LanguageModel,
    asked: Sequence[Request],
    *,
    progress: Progress[Any] = silent,
    label: str = "generate",
) -> list[Completion]:
    """Write the greedy answers that are asked for, together.

    Prompts are left-padded behind their shared prefix. A row ends at an end token, at its limit, or once
    it is settled; ended rows leave the batch, and others that wait come in for them.
    """
    rows = [
        _Row(a, list(a.start[: a.max_new_tokens]), [], [], opened=opened(lm, a.prompt))
        for a in asked
    ]
    ends = lm.eos_ids
    open_ = [r for r in rows if not _ended(r, ends) and not (r.ids and _is_settled(lm, r))]
    if open_:
        _write(lm, open_, progress, label)
    return [Completion(tuple(r.ids), _text(lm, r), _seen(r)) for r in rows]


def reading(lm: LanguageModel, prompt: str, ids: Sequence[int]) -> str:
    """Return the text of an answer's tokens, as it stands in a `Completion`; raises what `render` does."""
    return opened(lm, prompt) + decoded(lm.tokenizer, ids)


def _text(lm: LanguageModel, row: _Row) -> str:
    return row.opened + decoded(lm.tokenizer, row.ids)


def _seen(row: _Row) -> Seen | None:
    return Seen(torch.stack(row.heads), torch.stack(row.nll)) if row.heads else None


def greedy_starts(
    lm: LanguageModel,
    prompts: Sequence[str],
    drafts: Sequence[Sequence[int]],
    *,
    progress: Progress[Any] = silent,
    label: str = "generate",
) -> list[tuple[int, ...]]:
    """Return how the model's own greedy answers start, by one parallel pass over drafts of them.

    A start is the draft as far as the model agrees, and the first token of its own after that: what
    speculative decoding (Leviathan et al., 2023, arXiv:2211.17192) accepts.
    """
    encoded = encode(lm, prompts, drafts)
    starts: list[tuple[int, ...]] = [()] * len(encoded)
    wanted = [e.answer_positions for e in encoded]
    # By the logits that answers are written by: in 16 bits rounded ones, where close calls are ties.
    passes = forward(
        lm, [e.ids for e in encoded], wanted, progress=progress, label=label, exact=False
    )
    for batch, _ in passes:
        for row, piece in zip(batch.rows, batch.split(batch.logits.argmax(-1)), strict=True):
            starts[row] = agreed(drafts[row], piece.tolist())
    return starts


def agreed(draft: Sequence[int], chosen: Sequence[int]) -> tuple[int, ...]:
    """Return the tokens that the model chose along a draft, up to the first that is another."""
    same = 0
    while same < len(draft) and draft[same] == chosen[same]:
        same += 1
    return tuple(chosen[: same + 1])


def _ended(row: _Row, ends: frozenset[int]) -> bool:
    full = len(row.ids) >= row.asked.max_new_tokens
    return full or bool(row.ids and row.ids[-1] in ends)


def _write(lm: LanguageModel, rows: Sequence[_Row], progress: Progress[Any], label: str) -> None:
    """Continue each answer behind what its row has already."""
    encoded = encode(lm, [row.asked.prompt for row in rows], [row.ids for row in rows])
    sequences = [e.ids for e in encoded]
    if not lm.pads:
        for row, ids in zip(rows, sequences, strict=True):
            row.text = ids
        for _ in progress(_by_length(lm, rows), label, len(rows)):
            pass
        return
    offset = min(common_prefix(sequences), min(map(len, sequences)) - 1)
    prefix = prefix_cache(lm, sequences[0][:offset])
    left = max(row.left for row in rows)
    # A row that comes in late adds its tokens to the length of the longest that was there.
    longest = max(len(ids) + row.left for ids, row in zip(sequences, rows, strict=True)) + left
    most = cached_tokens(lm, prefix)
    # Padding lies behind the prefix, which would thus leave a short text's window too early.
    prefix = prefix if longest < narrowest(prefix, lm.text_config) else None
    offset = offset if prefix is not None else 0
    for row, ids in zip(rows, sequences, strict=True):
        row.text = ids[offset:]
    make_room(prefix, longest)
    for _ in progress(_finished(lm, rows, offset, prefix, longest, most), label, len(rows)):
        pass


def _finished(
    lm: LanguageModel, rows: Sequence[_Row], offset: int, prefix: Any, longest: int, most: int
) -> Iterator[_Row]:
    """Write all answers, in up to `most` tokens at a time; yield each as it ends.

    Whenever enough of a batch have ended, others that wait take their places, so that every step is
    of many rows. Those with most tokens to write come first: none is left to be written alone.
    """
    waiting = sorted(rows, key=lambda row: (-row.left, -len(row.text)))
    read = enlarged(lm.device) * TOKENS_PER_BATCH
    batch: _Batch | None = None
    while waiting or batch is not None:
        if batch is not None and not batch.wasteful:
            yield from batch.step(lm)
        else:
            parts = [] if batch is None else [batch]
            fresh: list[_Row] = []
            if batch is None or is_roomy(batch.state):
                fresh = _admitted(waiting, [] if batch is None else batch.open, offset, most)
                del waiting[: len(fresh)]
            # What cannot be joined afterwards is read together at once.
            whole = [fresh] if fresh else []
            for some in _chunks(fresh, read) if is_roomy(prefix) else whole:
                parts.append(_Batch.started(lm, some, offset, prefix, longest))
                yield from parts[-1].step(lm)
            batch = _joined([part for part in parts if part.open], offset)
        batch = batch if batch is not None and batch.open else None


def _by_length(lm: LanguageModel, rows: Sequence[_Row]) -> Iterator[_Row]:
    """Write the answers behind texts of one length together, without padding; yield each as it ends."""
    for width, some in groupby(sorted(rows, key=_width), key=_width):
        group = list(some)
        longest = width + max(row.left for row in group)
        room = max(1, min(ROWS_PER_BATCH, CACHED_PER_BATCH // longest))
        for start in range(0, len(group), room):
            batch: _Batch | None = _Batch.started(lm, group[start : start + room], 0, None, longest)
            while batch is not None and batch.open:
                yield from batch.step(lm)
                if batch.open and batch.wasteful:
                    batch = _joined([batch], 0)


def _width(row: _Row) -> int:
    return len(row.text)


def cached_tokens(lm: LanguageModel, prefix: Any) -> int:
    """Return for how many tokens there is room for keys and values, by those of the shared prefix.

    On the device that has least room; `CACHED_PER_BATCH` where nothing of that is known.
    """
    held: Counter[torch.device] = Counter()
    for parameter in lm.model.parameters():
        held[parameter.device] += parameter.numel() * parameter.element_size()
    # Of layers that wait in main memory one at a time is on the device.
    aside = (layer.parameters() for layer in lm.layers if is_kept_aside(layer))
    held[lm.device] += max(
        (sum(p.numel() * p.element_size() for p in ps) for ps in aside), default=0
    )
    rooms = [memory_for_caches(device, weights) for device, weights in held.items()]
    known, each = [room for room in rooms if room is not None], bytes_per_token(prefix)
    return max(1, min(known) // each) if known and each else CACHED_PER_BATCH


def _admitted(
    waiting: Sequence[_Row], beside: Sequence[_Row], offset: int, most: int
) -> list[_Row]:
    """Return those that wait, from the first on, that have room beside others in `most` tokens."""
    count, length, left = len(beside), 0, 0
    for row in beside:
        length, left = max(length, row.length), max(left, row.left)
    taken: list[_Row] = []
    for row in waiting:
        count, length, left = count + 1, max(length, row.length), max(left, row.left)
        full = count > ROWS_PER_BATCH or count * (offset + length + left) > most
        if full and (taken or beside):
            break
        taken.append(row)
    return taken


def _chunks(rows: Sequence[_Row], most: int) -> list[list[_Row]]:
    """Group rows of like length in up to `most` tokens, so that little is padded as they are read."""
    order = sorted(rows, key=lambda row: -len(row.text))
    groups: list[list[_Row]] = []
    for row in order:
        if not groups or (len(groups[-1]) + 1) * len(groups[-1][0].text) > most:
            groups.append([])
        groups[-1].append(row)
    return groups


@dataclass
class _Batch:
    """Answers that are written together, each of which gets a token a step."""

    rows: list[_Row | None]
    """One for each line, None once it has ended."""
    ids: Int[Tensor, "rows new"]
    """Tokens that the model has not read yet; the whole text where it keeps no states."""
    positions: Int[Tensor, "rows new"]
    """Their positions."""
    mask: Int[Tensor, "rows width"]
    """Which tokens are no padding. The prefix comes first, then padding, then what is the row's own."""
    state: Any
    """The model's keys and values so far; None where it keeps none that could be carried over."""
    longest: int
    """Most tokens that come to lie in them."""
    fresh: bool = False
    """Whether nothing of it was read yet."""

    @classmethod
    def started(
        cls, lm: LanguageModel, rows: Sequence[_Row], offset: int, prefix: Any, longest: int
    ) -> _Batch:
        """Line up texts that were not read yet behind their shared prefix."""
        device, count = lm.device, len(rows)
        width = max(len(row.text) for row in rows)
        pad = lm.pad_id
        gaps = [width - len(row.text) for row in rows]
        ids = torch.tensor([[pad] * n + [*row.text] for n, row in zip(gaps, rows, strict=True)])
        real = torch.tensor([[0] * n + [1] * (width - n) for n in gaps])
        mask = torch.cat([torch.ones(count, offset, dtype=torch.long), real], 1).to(device)
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, offset:].contiguous()
        state = expanded(prefix, count)
        return cls(list(rows), ids.to(device), positions, mask, state, longest, fresh=True)

    @property
    def open(self) -> list[_Row]:
        """The rows that go on."""
        return [row for row in self.rows if row is not None]

    @property
    def wasteful(self) -> bool:
        """Whether enough rows have ended, and can be taken out, for that to pay."""
        few = len(self.open) < SHRINK_BELOW * len(self.rows)
        return few and (self.state is None or is_plain(self.state))

    def step(self, lm: LanguageModel) -> list[_Row]:
        """Let the model read what it has not read, and write a token to each row; return those that end."""
        count, new = self.ids.shape
        piecewise, looking = cacheable(lm), any(row.asked.look for row in self.open)
        lm.work.tokens += int(self.mask[:, -new:].sum()) if self.fresh else len(self.open)
        last = torch.arange(1, count + 1, device=lm.device) * new - 1
        # Of rows that have ended too, as all of them are read.
        reach = within_reach(lm, int(self.positions.max()) + 1)
        with gathered_head(lm, last) as seen, reach, torch.no_grad():
            out = lm.model(
                input_ids=self.ids,
                attention_mask=mask_of(self.state, self.mask, new),
                use_cache=piecewise,
                **placed(lm, self.positions),
                **carry(lm, self.state),
            )
        self.state = carried(lm, out) if piecewise else None
        if self.fresh:
            make_room(self.state, self.longest)
        self.fresh = False
        tokens = out.logits[0].argmax(-1)
        inputs = seen[0].float().cpu() if looking else None
        nll = _surprise(out.logits[0]) if looking else None
        ended, ends = [], lm.eos_ids
        for line, (row, token) in enumerate(zip(self.rows, tokens.tolist(), strict=True)):
            if row is None:
                continue
            row.ids.append(token)
            row.new += 1
            if row.asked.look and inputs is not None and nll is not None:
                row.heads.append(inputs[line])
                row.nll.append(nll[line])
            due = len(row.ids) % CHECK_EVERY == 0
            if _ended(row, ends) or (due and _is_settled(lm, row)):
                self.rows[line] = None
                ended.append(row)
        later = self.positions[:, -1:] + 1
        if self.state is None:
            # States of another kind are not carried over: the whole text runs again.
            self.ids = torch.cat([self.ids, tokens[:, None]], 1)
            self.positions = torch.cat([self.positions, later], 1)
        else:
            self.ids, self.positions = tokens[:, None], later
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
        return ended


def _joined(parts: Sequence[_Batch], offset: int) -> _Batch | None:
    """Make one batch of the rows of others that go on; where its states allow, without the rest."""
    if not parts:
        return None
    one = parts[0]
    lines = [[i for i, row in enumerate(part.rows) if row is not None] for part in parts]
    if not is_roomy(one.state):
        # Nothing was put beside it, and what was just started has all its rows.
        if one.wasteful:
            kept = torch.tensor(lines[0], device=one.ids.device)
            if one.state is not None:
                one.state.batch_select_indices(kept)
            one.ids, one.positions, one.mask = one.ids[kept], one.positions[kept], one.mask[kept]
            one.rows = list(one.open)
        return one
    chosen = [torch.tensor(some, device=one.ids.device) for some in lines]
    # The token that was just written is in the mask, but not among the states yet.
    masks = [part.mask[some, offset:] for part, some in zip(parts, chosen, strict=True)]
    own = max(int(mask.sum(1).max()) for mask in masks)
    masks = [nn.functional.pad(mask, (max(own - mask.shape[1], 0), 0))[:, -own:] for mask in masks]
    mask = torch.cat(masks)
    mask = torch.cat([mask.new_ones(len(mask), offset), mask], 1)
    state = join([part.state for part in parts], chosen, offset, own - 1)
    ids, positions = (
        torch.cat([t[some] for t, some in zip(tensors, chosen, strict=True)])
        for tensors in ([part.ids for part in parts], [part.positions for part in parts])
    )
    rows = [row for part in parts for row in part.open]
    return _Batch(list(rows), ids, positions, mask, state, one.longest)


def _surprise(logits: Tensor) -> Tensor:
    """Return the negative log-likelihood of each row's likeliest token, nats."""
    return (logits.float().logsumexp(-1) - logits.amax(-1).float()).cpu()


def _is_settled(lm: LanguageModel, row: _Row) -> bool:
    return row.asked.settled is not None and row.asked.settled(_text(lm, row))
