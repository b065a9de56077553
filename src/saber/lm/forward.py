"""Teacher-forced forward passes: shared prefix computed once, length-sorted batches, few logits."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, get_args, get_origin

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from saber.errors import ModelError
from saber.lm.cache import is_plain
from saber.lm.chat import common_prefix
from saber.lm.device import is_out_of_memory
from saber.lm.model import LanguageModel, Work
from saber.lm.substitution import random_tokens

T = TypeVar("T")
Progress = Callable[[Iterable[T], str, int], Iterator[T]]
"""Wraps an iterable of `total` steps, under a label, to show how far it is."""

TOKENS_PER_BATCH = 1024
LOGITS_PER_BATCH = 12_500_000
"""What a batch of a forward pass holds at most on a CPU, where larger ones are no faster."""
ACCELERATED = 8
"""How many times that on anything else, which larger ones keep busy."""
HEAD_VALUES = 16_777_216
"""Weights of the output head that are held in float32 at a time."""
COUNTED = 8
"""Tokens by which it is found out how a model numbers them."""
ALIKE, ROUNDED = 1e-3, 2e-2
"""How far off logits may be where positions are the same, relative, and the same in 16 bits."""


@dataclass(frozen=True)
class Share:
    """Which of a reading's batches are one worker's: whole ones, so that no digit depends on it."""

    index: int
    """Which worker, from 0."""
    of: int
    """How many share the work."""

    def cut(self, batches: Sequence[T]) -> list[T]:
        """Return this share of them, in their order."""
        n = len(batches)
        return list(batches[n * self.index // self.of : n * (self.index + 1) // self.of])


WHOLE = Share(0, 1)
"""The share of who works alone."""


def silent(steps: Iterable[T], label: str, total: int) -> Iterator[T]:
    """Show nothing: the progress wrapper for library use."""
    del label, total
    return iter(steps)


@dataclass(frozen=True)
class Batch:
    """Some sequences of one forward pass, right-padded behind a shared prefix."""

    rows: list[int]
    """Which sequences, as indices into the caller's list."""
    offset: int
    """Length of the shared prefix, which is not among the tokens that run here."""
    lengths: list[int]
    """Tokens of each row behind the prefix."""
    logits: Float[Tensor, "wanted vocab"]
    """Logits at the wanted positions, rows one after the other."""
    wanted: list[list[int]]
    """Wanted positions of each row, counted from the start of the whole sequence."""

    def split(self, values: Tensor) -> list[Tensor]:
        """Cut a tensor over the wanted positions into one piece a row."""
        return list(values.split([len(w) for w in self.wanted]))


def cacheable(lm: LanguageModel) -> bool:
    """Whether a text can go through the model in pieces, by a cache of keys and values.

    Not where it keeps states in a way of its own, nor where the configuration counts other layers
    than the decoder has, as then transformers builds a cache that does not fit, nor where it numbers
    tokens itself: some count those behind a cache from another number on.
    """
    if not lm.told:
        return False
    counted = getattr(lm.text_config, "num_hidden_layers", len(lm.layers))
    return counted == len(lm.layers) and cache_name(lm) is not None


def cache_name(lm: LanguageModel) -> str | None:
    """Return the name under which the model takes and gives its cache, where it has one.

    transformers 5.24 renamed `past_key_values` to `cache`. A model that declares a cache of a class
    of its own has none that can be made here.
    """
    taken = inspect.signature(lm.model.forward).parameters
    name = next((name for name in ("cache", "past_key_values") if name in taken), None)
    return None if name is None or _foreign(taken[name].annotation) else name


def _foreign(annotation: Any) -> bool:
    """Whether an argument is declared as of classes that are no cache of transformers."""
    parts = get_args(annotation) or (annotation,)
    classes = [p for p in parts if isinstance(p, type) and get_origin(p) is None]
    classes = [c for c in classes if c not in (type(None), inspect.Parameter.empty)]
    return bool(classes) and not any(issubclass(c, Cache) for c in classes)


def carry(lm: LanguageModel, cache: Any) -> dict[str, Any]:
    """Return the keyword argument that hands a cache to the model; nothing without one."""
    name = cache_name(lm)
    return {} if cache is None or name is None else {name: cache}


def placed(lm: LanguageModel, positions: Int[Tensor, "rows tokens"]) -> dict[str, Any]:
    """Return the keyword argument that tells the model positions; nothing where it numbers them itself."""
    return {"position_ids": positions} if lm.told else {}


def counts_from_zero(lm: LanguageModel) -> bool:
    """Whether the positions that the model gives tokens by itself are 0, 1, 2, ...

    Some count from another number on, and are not to be told any.
    """
    ids = random_tokens(lm, COUNTED)
    positions = torch.arange(COUNTED, device=ids.device)[None]
    with torch.no_grad():
        own = lm.model(input_ids=ids, use_cache=False).logits.float()
        told = lm.model(input_ids=ids, position_ids=positions, use_cache=False).logits.float()
    limit = ALIKE if lm.dtype.itemsize > 2 else ROUNDED
    return not bool((told - own).norm() > limit * own.norm())


def carried(lm: LanguageModel, out: Any) -> Any:
    """Return the cache that came out of the model; None without one."""
    name = cache_name(lm)
    return None if name is None else getattr(out, name, None)


def prefix_cache(lm: LanguageModel, prefix: Sequence[int]) -> DynamicCache | None:
    """Run the shared prefix once; None where the model's cache cannot be shared that way."""
    if not prefix or not cacheable(lm):
        return None
    cache = DynamicCache(config=lm.text_config)
    if cache.layers and not is_plain(cache):
        return None
    if cache.layers and len(cache.layers) < len(lm.layers):
        return None
    window = getattr(lm.text_config, "sliding_window", None)
    if window is not None and len(prefix) >= window:
        return None
    ids = torch.tensor([list(prefix)], device=lm.device)
    with gathered_head(lm, torch.zeros(0, dtype=torch.long)), torch.no_grad():
        lm.model(input_ids=ids, use_cache=True, **carry(lm, cache))
    lm.work.tokens += len(prefix)
    # A model with states of a kind of its own does not look at this cache.
    return cache if cache.get_seq_length() == len(prefix) else None


def expanded(cache: DynamicCache | None, rows: int) -> DynamicCache | None:
    """Return a copy of a one-row cache for `rows` rows."""
    if cache is None:
        return None
    cache = copy.deepcopy(cache)
    cache.batch_repeat_interleave(rows)
    return cache


@contextmanager
def gathered_head(
    lm: LanguageModel,
    flat: Int[Tensor, " wanted"],
    extra: Tensor | None = None,
    head: nn.Linear | None = None,
) -> Iterator[list[Tensor]]:
    """Let the output head see the wanted positions only, as (1, wanted, d).

    `flat` indexes the flattened (batch x time) axis. Rows of `extra (n, d)` are put behind them, so
    that kept head inputs of another forward get logits by the same head, soft cap and scale, or by
    `head` instead of the same one. The list that is given out receives the head's inputs at the wanted
    positions.
    """
    seen: list[Tensor] = []
    handles = [lm.head.register_forward_pre_hook(partial(_gathered, lm.work, flat, extra, seen))]
    if head is not None and extra is not None:
        handles.append(lm.head.register_forward_hook(partial(_by_another, head, len(extra))))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _by_another(
    head: nn.Linear, rows: int, _module: nn.Module, args: tuple[Any, ...], output: Tensor
) -> Tensor:
    """Put the last rows through `head`, in float32."""
    theirs = _in_float32(head, (args[0][:, -rows:],), output)
    return torch.cat([output[:, :-rows], theirs.to(output)], 1)


def _gathered(
    work: Work,
    flat: Tensor,
    extra: Tensor | None,
    seen: list[Tensor],
    _module: nn.Module,
    args: tuple[Any, ...],
) -> tuple[Any, ...]:
    """Replace the output head's inputs by those at the wanted positions, and note them."""
    hidden = args[0]
    chosen = hidden.reshape(-1, hidden.shape[-1])[flat.to(hidden.device)]
    seen.append(chosen)
    if extra is not None:
        chosen = torch.cat([chosen, extra.to(chosen)])
    work.head_tokens += len(chosen)
    return (chosen[None], *args[1:])


@contextmanager
def unrounded_head(lm: LanguageModel) -> Iterator[None]:
    """Let the output head give float32 logits where the model computes in 16 bits.

    Rounded to bfloat16, a logit of 20 is off by up to 0.06, and the divergence of two models that are
    almost the same is made of that. A head other than a linear map is left as it is.
    """
    if lm.dtype == torch.float32 or type(lm.head) is not nn.Linear:
        yield
        return
    handle = lm.head.register_forward_hook(_in_float32)
    try:
        yield
    finally:
        handle.remove()


def _in_float32(module: nn.Linear, args: tuple[Any, ...], output: Any) -> Any:
    """Apply a linear map once more, in float32."""
    weight = module.weight
    # Of a model spread over several devices the input may lie on another.
    x = args[0].to(weight.device, torch.float32)
    step = max(1, HEAD_VALUES // weight.shape[1])
    logits = torch.cat([x @ rows.float().T for rows in weight.split(step)], -1)
    logits = logits if module.bias is None else logits + module.bias.float()
    return logits.to(output.device)


@contextmanager
def within_reach(lm: LanguageModel, longest: int) -> Iterator[None]:
    """Raise `ModelError` where a pass over texts of so many tokens fails as the model has fewer places."""
    try:
        yield
    except (IndexError, RuntimeError) as error:
        places = getattr(lm.text_config, "max_position_embeddings", None)
        if is_out_of_memory(error) or not places or longest <= places:
            raise
        raise ModelError(
            f"a prompt has {longest} tokens with its template and answer, and {lm.name!r} reads no more "
            f"than {places}.",
            "Give shorter prompts, or a smaller evaluation.max_new_tokens.",
        ) from error


def enlarged(device: torch.device) -> int:
    """Return how many times the tokens and logits of a CPU's batch go into one on this device."""
    return 1 if device.type == "cpu" else ACCELERATED


def plan_batches(
    lengths: Sequence[int],
    wanted: Sequence[int],
    vocab: int,
    tokens: int = TOKENS_PER_BATCH,
    logits: int = LOGITS_PER_BATCH,
) -> list[list[int]]:
    """Group rows of like length so that padded tokens and wanted logits stay within bounds."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    limit = max(1, logits // vocab)
    groups: list[list[int]] = []
    for row in order:
        group = groups[-1] if groups else None
        if (
            group is None
            or (len(group) + 1) * lengths[group[0]] > tokens
            or sum(wanted[i] for i in group) + wanted[row] > limit
        ):
            groups.append([row])
        else:
            group.append(row)
    return groups


def forward(
    lm: LanguageModel,
    sequences: Sequence[Sequence[int]],
    wanted: Sequence[Sequence[int]],
    *,
    progress: Progress[Any] = silent,
    label: str = "forward",
    extra: Callable[[list[int]], Tensor] | None = None,
    head: nn.Linear | None = None,
    heads: bool = False,
    earliest: int | None = None,
    ready: Callable[[list[int], int, int], None] | None = None,
    share: Share = WHOLE,
    exact: bool = True,
) -> Iterator[tuple[Batch, Tensor | None]]:
    """Run sequences through the model; yield each batch with its logits at the wanted positions.

    `extra(rows)` gives kept head inputs (n, d) whose logits come as the second item, by `head` where
    that is given; with `heads` the second item is instead this model's own head inputs at the wanted
    positions. Hooks that the caller has set see activations (batch, time, ...) where time starts behind
    `Batch.offset`, which is at most `earliest`. Logits are float32 ones, whatever the model computes in;
    unless `exact` they are rounded as the model rounds its own. Of the batches that all sequences make,
    those of `share` run.
    Raises ValueError for a wanted position below 0.
    """
    if not sequences:
        return
    first = min((w[0] for w in wanted if len(w)), default=1 << 30)
    if first < 0:
        raise ValueError(f"no position lies before a sequence, so none is {first}")
    shortest = min(len(s) for s in sequences)
    if earliest is not None:
        first = min(first, earliest)
    offset = min(common_prefix(sequences), shortest - 1, first)
    cache = prefix_cache(lm, sequences[0][:offset])
    offset = offset if cache is not None else 0
    lengths = [len(s) - offset for s in sequences]
    vocab = int(lm.text_config.vocab_size)
    times = enlarged(lm.device)
    limits = (times * TOKENS_PER_BATCH, times * LOGITS_PER_BATCH)
    groups = share.cut(plan_batches(lengths, [len(w) for w in wanted], vocab, *limits))
    pad = lm.pad_id
    for rows in progress(groups, label, len(groups)):
        width = lengths[rows[0]]
        ids = torch.full((len(rows), width), pad)
        mask = torch.zeros((len(rows), offset + width), dtype=torch.long)
        flat = []
        for line, row in enumerate(rows):
            ids[line, : lengths[row]] = torch.tensor(sequences[row][offset:])
            mask[line, : offset + lengths[row]] = 1
            flat += [line * width + p - offset for p in wanted[row]]
        kept = extra(rows) if extra is not None else None
        if ready is not None:
            ready(rows, offset, width)
        positions = torch.arange(offset, offset + width, device=lm.device)
        with (
            unrounded_head(lm) if exact else nullcontext(),
            gathered_head(lm, torch.tensor(flat, dtype=torch.long), kept, head) as seen,
            within_reach(lm, offset + width),
            torch.no_grad(),
        ):
            logits = (
                lm.model(
                    input_ids=ids.to(lm.device),
                    attention_mask=mask.to(lm.device),
                    use_cache=cache is not None,
                    **placed(lm, positions.repeat(len(rows), 1)),
                    **carry(lm, expanded(cache, len(rows))),
                )
                .logits[0]
                .float()
            )
        lm.work.tokens += sum(lengths[row] for row in rows)
        batch = Batch(
            rows,
            offset,
            [lengths[r] for r in rows],
            logits[: len(flat)],
            [list(wanted[r]) for r in rows],
        )
        yield (
            batch,
            seen[0].float() if heads else (logits[len(flat) :] if kept is not None else None),
        )
