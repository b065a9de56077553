"""Teacher-forced scores: perplexity of given answers, and KL from the untouched model's answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saber.errors import UsageError
from saber.lm.chat import encode, encode_answers, measure_template
from saber.lm.forward import Progress, cacheable, forward, silent
from saber.lm.generate import Completion, agreed, generate
from saber.lm.model import LanguageModel
from saber.prompts import PromptSet

KL_ROWS = 64
"""Rows of logits that are compared at a time, so that few copies of them lie in memory."""


@dataclass(frozen=True)
class TextScores:
    """Negative log-likelihoods of some tokens, one row a prompt."""

    nll: np.ndarray
    """Sum over the prompt's tokens, nats."""
    tokens: np.ndarray
    """How many tokens that is."""

    def perplexity(self, keep: np.ndarray | None = None) -> float:
        """Return exp(sum nll / sum tokens) over the kept prompts: token-weighted."""
        rows = slice(None) if keep is None else keep
        return float(np.exp(self.nll[rows].sum() / max(1, self.tokens[rows].sum())))


@dataclass(frozen=True)
class BatteryScores:
    """Perplexity of the battery's reference answers and of its prompt texts."""

    answers: TextScores
    """The reference answers, given their prompts."""
    prompts: TextScores
    """The users' texts inside the template: what the published card calls perplexity."""


def score_battery(
    lm: LanguageModel, battery: PromptSet, *, progress: Progress[Any] = silent
) -> BatteryScores:
    """Score prompts and reference answers in one teacher-forced pass."""
    template = measure_template(lm)
    encoded = encode(lm, battery.texts, encode_answers(lm, [p.reference for p in battery]))
    # Logits at position p predict token p + 1; of a text with nothing before it the first has none.
    first = max(template.prefix_length - 1, 0)
    spans = [range(first, e.prompt_length - template.suffix_length - 1) for e in encoded]
    wanted = [[*span, *e.answer_positions] for span, e in zip(spans, encoded, strict=True)]
    counts = [len(span) for span in spans]
    size = len(encoded)
    answers = TextScores(np.zeros(size), np.zeros(size, dtype=int))
    prompts = TextScores(np.zeros(size), np.zeros(size, dtype=int))
    for batch, _ in forward(
        lm, [e.ids for e in encoded], wanted, progress=progress, label="perplexity"
    ):
        targets = _next_tokens([e.ids for e in encoded], batch.rows, batch.wanted)
        losses = torch.nn.functional.cross_entropy(
            batch.logits, targets.to(batch.logits.device), reduction="none"
        )
        for row, loss in zip(batch.rows, batch.split(losses.cpu().double()), strict=True):
            cut = counts[row]
            prompts.nll[row], prompts.tokens[row] = loss[:cut].sum(), cut
            answers.nll[row], answers.tokens[row] = loss[cut:].sum(), len(loss) - cut
    return BatteryScores(answers, prompts)


def _next_tokens(
    sequences: Sequence[Sequence[int]], rows: Sequence[int], wanted: Sequence[Sequence[int]]
) -> Tensor:
    return torch.tensor(
        [sequences[r][p + 1] for r, ps in zip(rows, wanted, strict=True) for p in ps]
    )


@dataclass(frozen=True)
class Reference:
    """The untouched model's own answers, and what its output head saw while it gave them."""

    prompts: tuple[str, ...]
    """The prompts."""
    answers: tuple[tuple[int, ...], ...]
    """Its greedy answers, as tokens."""
    head_inputs: tuple[Tensor, ...]
    """For each prompt (answer tokens, d_model), float32: enough to get all its logits again."""
    scores: TextScores
    """Negative log-likelihood of the answers under the model itself."""


@dataclass(frozen=True)
class Divergence:
    """KL(untouched || edited) along the untouched model's answers, nats."""

    first_token: np.ndarray
    """At the first answer token, one value a prompt."""
    sequence: np.ndarray
    """Mean over the answer's tokens, one value a prompt."""
    per_token: np.ndarray
    """Every token of every answer."""
    scores: TextScores
    """Negative log-likelihood of the answers under the edited model."""
    starts: tuple[tuple[int, ...], ...] = ()
    """How the edited model's own greedy answers start, as far as this run tells: `generate` takes it."""


def own_answers(
    lm: LanguageModel,
    prompts: Sequence[str],
    tokens: int,
    *,
    progress: Progress[Any] = silent,
    label: str = "generate",
) -> Reference:
    """Let the untouched model answer, and keep what its output head saw."""
    found = generate(lm, prompts, tokens, look=exact(lm), progress=progress, label=label)
    return reference_of(lm, prompts, found, progress=progress)


def exact(lm: LanguageModel) -> bool:
    """Whether head inputs of generation, token by token, are those of one pass over the answer.

    So they are but for float32 rounding; half precision would show up as divergence.
    """
    return lm.dtype == torch.float32 and cacheable(lm)


def reference_of(
    lm: LanguageModel,
    prompts: Sequence[str],
    answers: Sequence[Completion],
    *,
    progress: Progress[Any] = silent,
) -> Reference:
    """Turn answers into a reference: by their head inputs where they have them, else by a pass over them."""
    ids = [a.ids for a in answers]
    seen = [a.seen for a in answers if a.seen is not None]
    if len(seen) < len(ids):
        return keep_reference(lm, prompts, ids, progress=progress)
    nll = np.array([float(s.nll.double().sum()) for s in seen])
    scores = TextScores(nll, np.array([len(s.nll) for s in seen]))
    return Reference(tuple(prompts), tuple(ids), tuple(s.heads for s in seen), scores)


def keep_reference(
    lm: LanguageModel,
    prompts: Sequence[str],
    answers: Sequence[Sequence[int]],
    *,
    progress: Progress[Any] = silent,
) -> Reference:
    """Run the untouched model once over its answers and keep the inputs of its output head."""
    encoded = encode(lm, prompts, answers)
    sequences = [e.ids for e in encoded]
    wanted = [e.answer_positions for e in encoded]
    kept: list[Tensor] = [torch.empty(0)] * len(encoded)
    scores = TextScores(np.zeros(len(encoded)), np.zeros(len(encoded), dtype=int))
    for batch, heads in forward(
        lm, sequences, wanted, progress=progress, label="reference answers", heads=True
    ):
        assert heads is not None
        _add_losses(scores, batch, sequences)
        for row, piece in zip(batch.rows, batch.split(heads), strict=True):
            kept[row] = piece.cpu()
    return Reference(tuple(prompts), tuple(tuple(a) for a in answers), tuple(kept), scores)


def diverge(
    lm: LanguageModel,
    reference: Reference,
    *,
    head: nn.Linear | None = None,
    progress: Progress[Any] = silent,
) -> Divergence:
    """Compare the model as it is now with the untouched one, along the untouched one's answers.

    The kept head inputs go through the same output head in the same pass, which is exact as long
    as the head itself is unedited, and needs no copy of the model and no stored logits. `head` is the
    untouched model's own, where it is another.
    """
    encoded = encode(lm, reference.prompts, reference.answers)
    sequences = [e.ids for e in encoded]
    wanted = [e.answer_positions for e in encoded]
    scores = TextScores(np.zeros(len(encoded)), np.zeros(len(encoded), dtype=int))
    divergences: list[np.ndarray] = [np.empty(0)] * len(encoded)
    starts: list[tuple[int, ...]] = [()] * len(encoded)
    for batch, untouched in forward(
        lm,
        sequences,
        wanted,
        progress=progress,
        label="divergence",
        extra=lambda rows: torch.cat([reference.head_inputs[r] for r in rows]),
        head=head,
    ):
        assert untouched is not None
        _add_losses(scores, batch, sequences)
        pairs = zip(untouched.split(KL_ROWS), batch.logits.split(KL_ROWS), strict=True)
        kl = torch.cat([kl_divergence(p, q) for p, q in pairs]).cpu().double()
        # Rounded as those are that answers are written by.
        chosen = batch.logits.to(lm.dtype).argmax(-1).cpu()
        pieces = zip(batch.rows, batch.split(kl), batch.split(chosen), strict=True)
        for row, piece, tokens in pieces:
            divergences[row] = piece.numpy()
            starts[row] = agreed(reference.answers[row], tokens.tolist())
    return Divergence(
        first_token=np.array([d[0] for d in divergences]),
        sequence=np.array([d.mean() for d in divergences]),
        per_token=np.concatenate(divergences),
        scores=scores,
        starts=tuple(starts),
    )


def own_head(base: nn.Module, edited: nn.Module) -> nn.Linear | None:
    """Return the untouched model's output head where it is another than the edited one's.

    Raises `UsageError` where the two are of different sizes, so that one model is no edit of the other, and
    where they differ and are no linear maps, which could not be put in each other's place.
    """
    first, second = (getattr(head, "weight", None) for head in (base, edited))
    if first is None or second is None:
        return None
    if first.shape != second.shape:
        raise UsageError(
            f"the model is no edit of --base: their output heads are of {tuple(second.shape)} and "
            f"{tuple(first.shape)}.",
            "Give the model that it was made from, or measure each without --base.",
        )
    mine, its = dict(edited.named_parameters()), dict(base.named_parameters())
    if mine.keys() == its.keys() and all(
        torch.equal(p.to(mine[n]), mine[n]) for n, p in its.items()
    ):
        return None
    if not isinstance(base, nn.Linear):
        raise UsageError(
            "the output heads of model and --base differ and are no linear maps: no divergence can be told.",
            "Measure each without --base.",
        )
    return base


def rounding(
    lm: LanguageModel,
    reference: Reference,
    *,
    dtype: torch.dtype | None = None,
    progress: Progress[Any] = silent,
) -> Divergence | None:
    """Return what rounding alone moves: the untouched model against itself, rounded in another way.

    Half of what enters the first layer is put one unit in the last place of `dtype` further off, which
    by itself is next to nothing, but from there on every result is rounded anew. No edit can be told
    from none below that. By default `dtype` is what the model computes in; None where that is
    float32, as it is nothing there.
    """
    if dtype is None and lm.dtype == torch.float32:
        return None
    unit, generator = torch.finfo(dtype or lm.dtype).eps, torch.Generator().manual_seed(0)

    def jitter(_module: Any, _args: Any, output: Tensor) -> Tensor:
        chosen = torch.randint(0, 2, output.shape, generator=generator).to(output.device)
        return (output.float() * (1 + unit * chosen)).to(output.dtype)

    handle = lm.model.get_input_embeddings().register_forward_hook(jitter)
    try:
        # How likely its answers are is told by the model as it is.
        return replace(diverge(lm, reference, progress=progress), scores=reference.scores)
    finally:
        handle.remove()


def kl_divergence(untouched: Tensor, edited: Tensor) -> Tensor:
    """Return KL(softmax(untouched) || softmax(edited)) over the last axis, nats, at least zero."""
    p = untouched.log_softmax(-1)
    return (p.exp() * (p - edited.log_softmax(-1))).sum(-1).clamp_min(0)


def _add_losses(scores: TextScores, batch: Any, sequences: Sequence[Sequence[int]]) -> None:
    targets = _next_tokens(sequences, batch.rows, batch.wanted).to(batch.logits.device)
    losses = torch.nn.functional.cross_entropy(batch.logits, targets, reduction="none")
    for row, loss in zip(batch.rows, batch.split(losses.cpu().double()), strict=True):
        scores.nll[row], scores.tokens[row] = loss.sum(), len(loss)
