"""Greedy generation in batches that shrink as answers end."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saber.lm.cache import is_plain, make_room
from saber.lm.chat import common_prefix, encode
from saber.lm.forward import (
    Progress,
    cacheable,
    carried,
    carry,
    expanded,
    forward,
    gathered_head,
    prefix_cache,
    silent,
)
from saber.lm.model import LanguageModel

ROWS_PER_BATCH = 256
CACHED_PER_BATCH = 20_000
"""Tokens whose keys and values lie in memory at a time."""
CHECK_EVERY = 4
SHRINK_BELOW = 0.8


@dataclass(frozen=True)
class Completion:
    """What the model wrote after a prompt."""

    ids: tuple[int, ...]
    """Generated tokens, the end token included where there is one."""
    text: str
    """The same without special tokens."""
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
    it is settled; ended rows leave the batch.
    """
    rows = [_Row(a, list(a.start[: a.max_new_tokens]), [], []) for a in asked]
    open_ = [r for r in rows if not _ended(lm, r) and not (r.ids and _is_settled(lm, r))]
    if open_:
        _write(lm, open_, progress, label)
    return [Completion(tuple(r.ids), _decode(lm, r.ids), _seen(r)) for r in rows]


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
    for batch, _ in forward(lm, [e.ids for e in encoded], wanted, progress=progress, label=label):
        for row, piece in zip(batch.rows, batch.split(batch.logits.argmax(-1)), strict=True):
            starts[row] = agreed(drafts[row], piece.tolist())
    return starts


def agreed(draft: Sequence[int], chosen: Sequence[int]) -> tuple[int, ...]:
    """Return the tokens that the model chose along a draft, up to the first that is another."""
    same = 0
    while same < len(draft) and draft[same] == chosen[same]:
        same += 1
    return tuple(chosen[: same + 1])


def _ended(lm: LanguageModel, row: _Row) -> bool:
    full = len(row.ids) >= row.asked.max_new_tokens
    return full or bool(row.ids and row.ids[-1] in lm.eos_ids)


def _write(lm: LanguageModel, rows: Sequence[_Row], progress: Progress[Any], label: str) -> None:
    """Continue each answer behind what its row has already."""
    encoded = encode(lm, [row.asked.prompt for row in rows], [row.ids for row in rows])
    sequences = [e.ids for e in encoded]
    offset = min(common_prefix(sequences), min(map(len, sequences)) - 1)
    cache = prefix_cache(lm, sequences[0][:offset])
    offset = offset if cache is not None else 0
    left = [row.asked.max_new_tokens - len(row.ids) for row in rows]
    groups = _grouped([len(ids) + more for ids, more in zip(sequences, left, strict=True)])
    for group in progress(groups, label, len(groups)):
        tails = [list(sequences[i][offset:]) for i in group]
        _write_batch(lm, [rows[i] for i in group], tails, offset, cache)


def _grouped(lengths: Sequence[int]) -> list[list[int]]:
    """Group rows of like length in the end, into as few batches as memory allows, and as even ones."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))

    def filled(room: int) -> list[list[int]]:
        groups: list[list[int]] = [[]]
        for row in order:
            rows = len(groups[-1]) + 1
            if groups[-1] and (rows > ROWS_PER_BATCH or rows * lengths[row] > room):
                groups.append([])
            groups[-1].append(row)
        return groups

    fewest = len(filled(CACHED_PER_BATCH))
    rooms = range(lengths[order[-1]], CACHED_PER_BATCH)
    even = bisect_left(rooms, True, key=lambda room: len(filled(room)) <= fewest)
    return filled(rooms[even] if even < len(rooms) else CACHED_PER_BATCH)


def _write_batch(
    lm: LanguageModel, rows: list[_Row], tails: list[list[int]], offset: int, prefix: Any
) -> None:
    device, width, count = lm.device, max(map(len, tails)), len(tails)
    pad = lm.tokenizer.pad_token_id or 0
    ids = torch.tensor([[pad] * (width - len(t)) + t for t in tails], device=device)
    real = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in tails], device=device)
    mask = torch.cat([torch.ones(count, offset, dtype=torch.long, device=device), real], 1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)[:, offset:].contiguous()
    state: Any = expanded(prefix, count)
    active: list[_Row | None] = list(rows)
    steps = max(row.asked.max_new_tokens - len(row.ids) for row in rows)
    looking, piecewise = any(row.asked.look for row in rows), cacheable(lm)
    lm.work.tokens += int(real.sum())
    for step in range(steps):
        last = torch.arange(1, len(active) + 1, device=device) * ids.shape[1] - 1
        with gathered_head(lm, last) as seen, torch.no_grad():
            out = lm.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                use_cache=piecewise,
                **carry(lm, state),
            )
        state = carried(lm, out) if piecewise else None
        if step == 0:
            make_room(state)
        tokens = out.logits[0].argmax(-1)
        inputs = seen[0].float().cpu() if looking else None
        nll = _surprise(out.logits[0]) if looking else None
        keep = []
        for line, (row, token) in enumerate(zip(active, tokens.tolist(), strict=True)):
            if row is None:
                continue
            row.ids.append(token)
            if row.asked.look and inputs is not None and nll is not None:
                row.heads.append(inputs[line])
                row.nll.append(nll[line])
            due = len(row.ids) % CHECK_EVERY == 0
            if _ended(lm, row) or (due and _is_settled(lm, row)):
                active[line] = None
            else:
                keep.append(line)
        if not keep:
            return
        later = positions[:, -1:] + 1
        if state is None:
            # States of another kind are not carried over: the whole text runs again.
            ids, positions = torch.cat([ids, tokens[:, None]], 1), torch.cat([positions, later], 1)
        else:
            ids, positions = tokens[:, None], later
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        if state is not None and len(keep) < SHRINK_BELOW * len(active) and is_plain(state):
            chosen = torch.tensor(keep, device=device)
            state.batch_select_indices(chosen)
            ids, positions, mask = ids[chosen], positions[chosen], mask[chosen]
            active = [active[line] for line in keep]
        lm.work.tokens += len(keep)


def _surprise(logits: Tensor) -> Tensor:
    """Return the negative log-likelihood of each row's likeliest token, nats."""
    return (logits.float().logsumexp(-1) - logits.amax(-1).float()).cpu()


def _is_settled(lm: LanguageModel, row: _Row) -> bool:
    return row.asked.settled is not None and row.asked.settled(_decode(lm, row.ids))


def _decode(lm: LanguageModel, ids: Sequence[int]) -> str:
    return str(lm.tokenizer.decode(list(ids), skip_special_tokens=True))
