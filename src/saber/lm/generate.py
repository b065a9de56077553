"""Greedy generation in batches that shrink as answers end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from saber.lm.cache import make_room
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

ROWS_PER_BATCH = 128
CHECK_EVERY = 4
SHRINK_BELOW = 0.8


@dataclass(frozen=True)
class Completion:
    """What the model wrote after a prompt."""

    ids: tuple[int, ...]
    """Generated tokens, the end token included where there is one."""
    text: str
    """The same without special tokens."""


def generate(
    lm: LanguageModel,
    prompts: Sequence[str],
    max_new_tokens: int,
    *,
    settled: Callable[[str], bool] | None = None,
    starts: Sequence[Sequence[int]] | None = None,
    progress: Progress[Any] = silent,
    label: str = "generate",
) -> list[Completion]:
    """Write up to `max_new_tokens` greedy tokens after each prompt.

    Prompts are left-padded behind their shared prefix. A row ends at an end token, or once
    `settled(text)` says that more text cannot change its label; ended rows leave the batch. `starts`
    holds greedy tokens that are known already (see `greedy_starts`), which are not written again.
    """
    written = [list(start[:max_new_tokens]) for start in starts or [()] * len(prompts)]
    open_ = [i for i, ids in enumerate(written) if not _ended(lm, ids, max_new_tokens)]
    texts, begun = [prompts[i] for i in open_], [written[i] for i in open_]
    sequences = [e.ids for e in encode(lm, texts, begun)]
    if sequences:
        _write(lm, sequences, begun, max_new_tokens, settled, progress, label)
    return [Completion(tuple(ids), _decode(lm, ids)) for ids in written]


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


def _ended(lm: LanguageModel, ids: Sequence[int], limit: int) -> bool:
    return len(ids) >= limit or bool(ids and ids[-1] in lm.eos_ids)


def _write(
    lm: LanguageModel,
    sequences: Sequence[Sequence[int]],
    written: list[list[int]],
    max_new_tokens: int,
    settled: Callable[[str], bool] | None,
    progress: Progress[Any],
    label: str,
) -> None:
    """Continue each sequence; what comes is put behind what is `written` of it already."""
    offset = min(common_prefix(sequences), min(map(len, sequences)) - 1)
    cache = prefix_cache(lm, sequences[0][:offset])
    offset = offset if cache is not None else 0
    order = sorted(range(len(sequences)), key=lambda i: (len(sequences[i]), i))
    groups = [order[i : i + ROWS_PER_BATCH] for i in range(0, len(order), ROWS_PER_BATCH)]
    for rows in progress(groups, label, len(groups)):
        tails = [list(sequences[row][offset:]) for row in rows]
        _generate_batch(lm, rows, tails, offset, cache, max_new_tokens, settled, written)


def _generate_batch(
    lm: LanguageModel,
    rows: list[int],
    tails: list[list[int]],
    offset: int,
    prefix: Any,
    max_new_tokens: int,
    settled: Callable[[str], bool] | None,
    written: list[list[int]],
) -> None:
    device, width, count = lm.device, max(map(len, tails)), len(tails)
    pad = lm.tokenizer.pad_token_id or 0
    ids = torch.tensor([[pad] * (width - len(t)) + t for t in tails], device=device)
    real = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in tails], device=device)
    mask = torch.cat([torch.ones(count, offset, dtype=torch.long, device=device), real], 1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)[:, offset:].contiguous()
    state: Any = expanded(prefix, count)
    active, piecewise = list(rows), cacheable(lm)
    lm.work.tokens += int(real.sum())
    for step in range(max_new_tokens):
        last = torch.arange(1, len(active) + 1, device=device) * ids.shape[1] - 1
        with gathered_head(lm, last), torch.no_grad():
            out = lm.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                use_cache=piecewise,
                **carry(lm, state),
            )
        state = carried(lm, out) if piecewise else None
        if step == 0:
            make_room(state, max_new_tokens - min(len(written[row]) for row in rows))
        tokens = out.logits[0].argmax(-1)
        keep = []
        for line, (row, token) in enumerate(zip(active, tokens.tolist(), strict=True)):
            if row < 0:
                continue
            written[row].append(token)
            if _ended(lm, written[row], max_new_tokens) or _is_settled(lm, settled, written[row]):
                active[line] = -1
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
        if state is not None and len(keep) < SHRINK_BELOW * len(active) and _selectable(state):
            chosen = torch.tensor(keep, device=device)
            state.batch_select_indices(chosen)
            ids, positions, mask = ids[chosen], positions[chosen], mask[chosen]
            active = [active[line] for line in keep]
        lm.work.tokens += len(keep)


def _selectable(cache: Any) -> bool:
    """Whether rows can be taken out of a cache: not every kind of layer state allows it."""
    layers: list[Any] = getattr(cache, "layers", None) or []
    return bool(layers) and all(hasattr(layer, "batch_select_indices") for layer in layers)


def _is_settled(
    lm: LanguageModel, settled: Callable[[str], bool] | None, ids: list[int]
) -> bool:
    return settled is not None and len(ids) % CHECK_EVERY == 0 and settled(_decode(lm, ids))


def _decode(lm: LanguageModel, ids: Sequence[int]) -> str:
    return str(lm.tokenizer.decode(list(ids), skip_special_tokens=True))
