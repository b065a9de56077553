"""Stage 1: the residual stream of prompts at every layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saber.errors import NonFinite
from saber.lm.chat import Encoded, encode, encode_answers, measure_template
from saber.lm.forward import WHOLE, Progress, Share, forward, silent
from saber.lm.layers import stream
from saber.lm.model import LanguageModel
from saber.lm.substitution import streams_axis
from saber.lm.tap import Key, Tap
from saber.lm.writers import Writer
from saber.memo import Key as MemoKey
from saber.prompts import Pair, PromptSet


@dataclass(frozen=True)
class ProbeSpec:
    """What of the residual stream is read."""

    positions: int = 1
    """How many template tokens behind the user's text are read, from the last one back (1 or more)."""
    answer_tokens: int = 4
    """Answer tokens read for each capability prompt, evenly spaced, besides the last prompt token."""


@dataclass(frozen=True)
class Activations:
    """The residual stream of a prompt set. Depth 0 is the embedding, depth i + 1 layer i's output."""

    hidden: Float[Tensor, "prompts positions depth d_model"]
    """Float32 on the CPU; position -1 is the last token before the answer."""
    categories: tuple[str, ...]
    """Category of each prompt (of each sample, for capability activations)."""
    first_token: Float[Tensor, "prompts vocab"] | None = None
    """Log-probabilities of the token behind the last position, where asked for."""
    inputs: Mapping[Key, Float[Tensor, "samples d_in"]] | None = None
    """What went into writers at the same positions, in no order of prompts, where asked for."""
    pairs: tuple[Pair, ...] = ()
    """What each prompt shares with its twin in the opposite set alone; empty: its row number."""


@dataclass(frozen=True)
class Part:
    """What one worker read of a prompt set that several share."""

    rows: tuple[int, ...]
    """Which prompts, ascending."""
    read: Activations | None
    """Of these prompts; None where there are none."""


@dataclass(frozen=True)
class Look:
    """What is read of which prompts: a call of `probe` that can be kept by its key, or shared out."""

    prompts: PromptSet
    """Whose stream."""
    spec: ProbeSpec
    """Where."""
    opening: tuple[int, ...] = ()
    """Tokens that every answer is made to start with."""
    writers: tuple[Writer, ...] = ()
    """Writers whose inputs are read too."""

    def key(self, at: str = "") -> MemoKey:
        """Return what tells the reading from others, of a model edited by the plan of this digest."""
        names = tuple(w.name for w in self.writers)
        return ("probe", at, self.prompts.fingerprint(), self.spec, self.opening, names)

    def read(self, lm: LanguageModel, progress: Progress[Any] = silent) -> Activations:
        """Return `probe` with the first token's log-probabilities."""
        return join([self.part(lm, WHOLE, progress)])

    def part(self, lm: LanguageModel, share: Share, progress: Progress[Any] = silent) -> Part:
        """Read the prompts of one worker's share of the batches."""
        return _probe(
            lm, self.prompts, self.spec, True, self.opening, self.writers, progress, share
        )


def probe(
    lm: LanguageModel,
    prompts: PromptSet,
    spec: ProbeSpec,
    *,
    first_token: bool = False,
    opening: Sequence[int] = (),
    writers: Sequence[Writer] = (),
    progress: Progress[Any] = silent,
) -> Activations:
    """Read the stream at the decision positions: the template tokens behind the user's text.

    With an `opening` every answer is made to start with these tokens, and the last of them is the one
    position read; `first_token` is then of the token behind it. What goes into `writers`, of which none
    may be routed to, is read in the same pass. Raises `NonFinite`, which names the layer, when an
    activation is NaN or infinite.
    """
    return join([_probe(lm, prompts, spec, first_token, opening, writers, progress, WHOLE)])


def join(parts: Sequence[Part]) -> Activations:
    """Return the activations of a prompt set from the parts, in the order of their shares.

    They are to the last digit what one worker reads. Raises `ValueError` when prompts are missing.
    """
    rows = [row for p in parts for row in p.rows]
    if not rows or sorted(rows) != list(range(len(rows))):
        raise ValueError("these parts are not of one prompt set, or some are missing")
    reads = [p.read for p in parts if p.read is not None]
    if len(reads) == 1:
        return reads[0]
    place = torch.tensor(rows).argsort()
    categories = [c for r in reads for c in r.categories]
    pairs = [p for r in reads for p in r.pairs]
    first = [r.first_token for r in reads if r.first_token is not None]
    inputs = [r.inputs for r in reads if r.inputs is not None]
    return Activations(
        torch.cat([r.hidden for r in reads])[place],
        tuple(categories[i] for i in place.tolist()),
        torch.cat(first)[place] if first else None,
        {key: torch.cat([i[key] for i in inputs]) for key in inputs[0]} if inputs else None,
        tuple(pairs[i] for i in place.tolist()),
    )


def decision_count(lm: LanguageModel, spec: ProbeSpec) -> int:
    """Return how many tokens decide: those asked for, as far as the template puts them behind the text."""
    return min(spec.positions, measure_template(lm).suffix_length)


def _probe(
    lm: LanguageModel,
    prompts: PromptSet,
    spec: ProbeSpec,
    first_token: bool,
    opening: Sequence[int],
    writers: Sequence[Writer],
    progress: Progress[Any],
    share: Share,
) -> Part:
    encoded = encode(lm, prompts.texts, [opening] * len(prompts))
    count = 1 if opening else decision_count(lm, spec)
    where = [list(range(len(e.ids) - count, len(e.ids))) for e in encoded]
    inputs = _Inputs(where)
    label = f"probe {prompts.name}"
    with Tap(lm, writers, inputs) if writers else nullcontext():
        hidden, logits = _read(
            lm, encoded, where, first_token, label, progress, inputs.ready, share
        )
    if not hidden:
        return Part((), None)
    categories, pairs = prompts.categories, prompts.pairs
    read = Activations(
        torch.stack(list(hidden.values())),
        tuple(categories[row] for row in hidden),
        logits,
        {key: torch.cat(parts) for key, parts in inputs.found.items()} if writers else None,
        tuple(pairs[row] for row in hidden),
    )
    return Part(tuple(hidden), read)


def _flat(where: Sequence[Sequence[int]], rows: Sequence[int], offset: int, width: int) -> Tensor:
    """Return where the positions of some sequences lie in a batch (rows x width) behind a prefix."""
    return torch.tensor([i * width + p - offset for i, row in enumerate(rows) for p in where[row]])


class _Inputs:
    """Receives what goes into writers, and keeps the rows at some positions of each sequence."""

    def __init__(self, where: Sequence[Sequence[int]]) -> None:
        self._where = where
        self._rows: Tensor | None = None
        self.found: dict[Key, list[Tensor]] = defaultdict(list)

    def ready(self, rows: list[int], offset: int, width: int) -> None:
        """Hear which sequences come next, each of so many tokens behind the shared prefix."""
        self._rows = _flat(self._where, rows, offset, width)

    def __call__(self, key: Key, rows: Tensor) -> None:
        """Receive rows; those of the shared prefix come first and are left out."""
        if self._rows is not None:
            self.found[key].append(rows[self._rows.to(rows.device)].float().cpu())


def probe_capabilities(
    lm: LanguageModel, prompts: PromptSet, spec: ProbeSpec, *, progress: Progress[Any] = silent
) -> Activations:
    """Read the stream at the last prompt token and at answer tokens of prompts with references.

    Every read token is a sample of its own: `positions` is 1.
    """
    answers = encode_answers(lm, [p.reference for p in prompts], end=False)
    encoded = encode(lm, prompts.texts, answers)
    where = []
    for e in encoded:
        length = len(e.ids) - e.prompt_length
        picks = (
            torch.linspace(0, length - 1, min(spec.answer_tokens, length)).round().long().tolist()
        )
        where.append([e.prompt_length - 1, *(e.prompt_length + p for p in dict.fromkeys(picks))])
    read, _ = _read(lm, encoded, where, False, "probe capabilities", progress)
    hidden = list(read.values())
    categories = [p.category for p, h in zip(prompts, hidden, strict=True) for _ in range(len(h))]
    return Activations(torch.cat(hidden)[:, None], tuple(categories))


def _read(
    lm: LanguageModel,
    encoded: Sequence[Encoded],
    where: Sequence[Sequence[int]],
    first_token: bool,
    label: str,
    progress: Progress[Any],
    ready: Callable[[list[int], int, int], None] | None = None,
    share: Share = WHOLE,
) -> tuple[dict[int, Tensor], Tensor | None]:
    """Return for each sequence (positions, depth, d) and, if asked, first-token log-probabilities.

    Both in the order of the sequences, of those that are in the share.
    """
    rows: dict[int, Tensor] = {}
    logprobs: dict[int, Tensor] = {}
    wanted = [[w[-1]] if first_token else [] for w in where]
    earliest = min(min(w) for w in where)
    streams = _Streams(where, streams_axis(lm))

    def next_batch(rows: list[int], offset: int, width: int) -> None:
        streams.ready(rows, offset, width)
        if ready is not None:
            ready(rows, offset, width)

    with streams.of(lm):
        for batch, _ in forward(
            lm,
            [e.ids for e in encoded],
            wanted,
            progress=progress,
            label=label,
            earliest=earliest,
            ready=next_batch,
            share=share,
        ):
            rows.update(zip(batch.rows, streams.taken(batch.lengths), strict=True))
            if first_token:
                chances = [piece[0].log_softmax(-1).cpu() for piece in batch.split(batch.logits)]
                logprobs.update(zip(batch.rows, chances, strict=True))
    order = sorted(rows)
    first = torch.stack([logprobs[r] for r in order]) if logprobs else None
    return {row: rows[row] for row in order}, first


def _one(hidden: Tensor, axis: int | None) -> Tensor:
    """Return (batch, time, d_model): the mean where a token has several streams."""
    return hidden.mean(axis) if axis is not None and hidden.ndim > 3 else hidden


class _Streams:
    """Takes the residual stream of a forward pass at some positions of each sequence, at every depth."""

    def __init__(self, where: Sequence[Sequence[int]], axis: int | None) -> None:
        self._where, self._axis = where, axis
        self._flat = torch.zeros(0, dtype=torch.long)
        self._counts: list[int] = []
        self._taken: list[Tensor] = []
        self._sums: list[Tensor] = []

    def ready(self, rows: list[int], offset: int, width: int) -> None:
        """Hear which sequences come next, each of so many tokens behind the shared prefix."""
        self._flat = _flat(self._where, rows, offset, width)
        self._counts = [len(self._where[row]) for row in rows]

    def _take(self, hidden: Tensor) -> None:
        hidden = _one(hidden, self._axis)
        if len(self._flat):  # not of the shared prefix's own pass
            chosen = hidden.reshape(-1, hidden.shape[-1])[self._flat.to(hidden.device)]
            self._taken.append(chosen.float().cpu())
            # NaN and infinities, of any coordinate, are in the sum.
            self._sums.append(hidden.sum(-1, dtype=torch.float32))

    def taken(self, lengths: Sequence[int]) -> list[Tensor]:
        """Return (positions, depth, d) of each sequence of the pass that ended; raises `NonFinite`."""
        found, sums = torch.stack(self._taken, 1), [s.cpu() for s in self._sums]
        self._taken, self._sums = [], []
        real = torch.arange(sums[0].shape[1]) < torch.tensor(lengths)[:, None]
        for depth, total in enumerate(sums):
            if not bool(torch.isfinite(total[real]).all()):
                raise NonFinite("the embeddings" if depth == 0 else f"the output of layer {depth - 1}")
        return list(found.split(self._counts))

    @contextmanager
    def of(self, lm: LanguageModel) -> Iterator[None]:
        """Look at the first layer's input and at every layer's output."""

        def first(_m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._take(args[0] if args else kwargs["hidden_states"])

        def each(_m: nn.Module, _a: Any, output: Any) -> None:
            self._take(stream(output))

        with ExitStack() as stack:
            stack.callback(lm.layers[0].register_forward_pre_hook(first, with_kwargs=True).remove)
            for layer in lm.layers:
                stack.callback(layer.register_forward_hook(each).remove)
            yield
