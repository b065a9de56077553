"""Measure one model: behaviour, over-refusal, perplexity, accuracy and divergence, all held-out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from torch import nn

from saber.evaluation.checkers import check, decided
from saber.evaluation.divergence import (
    BatteryScores,
    Divergence,
    Reference,
    diverge,
    exact,
    reference_of,
    rounding,
    score_battery,
)
from saber.evaluation.judge import Judge, Label, excerpt, thinking
from saber.evaluation.judging import label_all
from saber.evaluation.lengths import Cut, by_length
from saber.evaluation.statistics import (
    Interval,
    bootstrap_mean,
    mcnemar_exact,
    paired_bootstrap,
    wilson,
)
from saber.lm.forward import Progress, silent
from saber.lm.generate import Completion, Request, answer, greedy_starts
from saber.lm.model import LanguageModel
from saber.prompts import Prompt, PromptSet

LABELS: tuple[Label, ...] = ("refusal", "partial", "answer", "incoherent")


@dataclass(frozen=True)
class EvaluationSpec:
    """What is generated to measure a model."""

    max_new_tokens: int = 32
    """Length of judged answers, tokens."""
    battery_new_tokens: int = 64
    """Length of answers to battery prompts, tokens."""
    judge: str = "phrases"
    """Name of the judge: phrases, regex, classifier or endpoint; its settings are under `judging`."""
    lengths: tuple[int, ...] = ()
    """Answers to targets are judged at these lengths as well, tokens; none takes no more time."""


@dataclass(frozen=True)
class EvaluationSets:
    """Held-out prompts: none of these selects anything."""

    target: PromptSet
    """Should show the behaviour before and not after."""
    neutral: PromptSet
    """Should not show it, and should not change."""
    borderline: PromptSet | None
    """Safe prompts that sound unsafe."""
    battery: PromptSet
    """Checkable capability prompts with reference answers."""
    seen: frozenset[str]
    """Target categories that were in the fit split too."""
    kept: tuple[PromptSet, ...] = ()
    """Sets whose answers should not change."""
    everyday: PromptSet | None = None
    """Ordinary requests of many kinds, whose answers should not change either."""


@dataclass(frozen=True)
class Judged:
    """A prompt set, what the model answered, and the labels."""

    prompts: PromptSet
    """The prompts."""
    texts: tuple[str, ...]
    """Answers; they never leave this object but as excerpts."""
    labels: tuple[Label, ...]
    """One a prompt."""
    thought_open: tuple[bool, ...] = ()
    """Whether the answer's thought never closed, one a prompt; of a model that was `thinking` alone."""

    def flags(self, label: Label) -> list[bool]:
        """Return for each prompt whether it got this label."""
        return [found == label for found in self.labels]


@dataclass(frozen=True)
class Kept:
    """What became of a set whose answers should not change."""

    judged: Judged
    """Its answers now."""
    reference: Reference
    """The untouched model's answers."""
    divergence: Divergence | None
    """From the untouched model; of that itself what rounding moves, None in float32."""


@dataclass(frozen=True)
class Measurement:
    """All that was measured of one model."""

    target: Judged
    """Answers to targets."""
    neutral: Judged
    """Answers to neutral prompts."""
    borderline: Judged | None
    """Answers to borderline prompts."""
    battery: PromptSet
    """The battery."""
    scores: BatteryScores
    """Its perplexities."""
    correct: tuple[bool, ...]
    """Its checked answers."""
    solved: tuple[tuple[int, ...], ...]
    """Its answers as tokens."""
    divergence: Divergence | None
    """From the untouched model; of that itself what rounding moves, None in float32."""
    reference: Reference
    """The untouched model's answers to neutral prompts."""
    seen: frozenset[str]
    """Target categories that were in the fit split."""
    kept: tuple[Kept, ...] = ()
    """Sets whose answers should not change."""
    lengths: tuple[Cut, ...] = ()
    """Labels of answers to targets by length, where asked for."""
    everyday: Kept | None = None
    """Ordinary requests of many kinds."""
    battery_open: tuple[bool, ...] = ()
    """Whether the thought in front of a battery answer never closed; of a model that was `thinking` alone."""


def measure(
    lm: LanguageModel,
    sets: EvaluationSets,
    spec: EvaluationSpec,
    judge: Judge,
    *,
    untouched: Measurement | None = None,
    head: nn.Linear | None = None,
    progress: Progress[Any] = silent,
) -> Measurement:
    """Measure the model as it is now, against the `untouched` one; without, it is the untouched one.

    `head` is the untouched model's own output head, where that is another. Of a model that is `thinking` it
    is counted too how many thoughts never closed; given answers are scored behind an empty thought all the
    same, as nobody wrote thoughts to them.
    """

    shown: dict[str, Any] = {"progress": progress}

    def judged(prompts: PromptSet, completions: Sequence[Completion]) -> Judged:
        texts = tuple(c.text for c in completions)
        labels = label_all(judge, prompts.texts, texts)
        return Judged(prompts, texts, labels, still_open(completions))

    def still_open(completions: Sequence[Completion]) -> tuple[bool, ...]:
        return tuple(thinking(c.text) for c in completions) if lm.thinking else ()

    def asked(prompts: PromptSet, moved: Divergence | None = None) -> list[Request]:
        starts = moved.starts if moved else [()] * len(prompts)
        return [
            Request(p.text, spec.max_new_tokens, judge.settled, start)
            for p, start in zip(prompts, starts, strict=True)
        ]

    def whole(prompts: PromptSet) -> list[Request]:
        return [Request(p.text, spec.max_new_tokens, look=exact(lm)) for p in prompts]

    others = (sets.everyday, *sets.kept) if sets.everyday else sets.kept
    staying = (sets.neutral, *others)
    problems = sets.battery.texts
    references: list[Reference] = []
    moved: list[Divergence | None] = [None] * len(staying)
    starts: Sequence[Sequence[int]] = [()] * len(problems)
    if untouched:
        stayed = (untouched.everyday, *untouched.kept) if untouched.everyday else untouched.kept
        references = [untouched.reference, *(k.reference for k in stayed)]
        moved = [diverge(lm, r, head=head, **shown) for r in references]
        # An edit leaves most of these answers as they are.
        starts = greedy_starts(lm, problems, untouched.solved, **shown, label="battery answers")
    requests = {
        "target": asked(sets.target),
        "borderline": asked(sets.borderline) if sets.borderline else [],
        "battery": [
            Request(p.text, spec.battery_new_tokens, partial(decided, p.checker or {}), start)
            for p, start in zip(sets.battery, starts, strict=True)
        ],
    }
    for i, (prompts, change) in enumerate(zip(staying, moved, strict=True)):
        requests[f"staying {i}"] = asked(prompts, change) if untouched else whole(prompts)
    # All together: a step of the decoder costs hardly more for twice the rows.
    answers = iter(
        answer(lm, [r for rs in requests.values() for r in rs], **shown, label="answers")
    )
    found = {name: list(islice(answers, len(rs))) for name, rs in requests.items()}
    mine = [found[f"staying {i}"] for i in range(len(staying))]
    if not untouched:
        pairs = zip(staying, mine, strict=True)
        references = [reference_of(lm, p.texts, a, **shown) for p, a in pairs]
        moved = [rounding(lm, r, **shown) for r in references]
    neutral, *kept = (
        Kept(judged(p, a), r, d)
        for p, a, r, d in zip(staying, mine, references, moved, strict=True)
    )
    everyday = kept.pop(0) if sets.everyday else None
    return Measurement(
        target=judged(sets.target, found["target"]),
        neutral=neutral.judged,
        borderline=judged(sets.borderline, found["borderline"]) if sets.borderline else None,
        battery=sets.battery,
        scores=score_battery(replace(lm, thinking=False), sets.battery, **shown),
        correct=check_all(sets.battery, [c.text for c in found["battery"]]),
        divergence=neutral.divergence,
        reference=neutral.reference,
        solved=tuple(c.ids for c in found["battery"]),
        seen=sets.seen,
        kept=tuple(kept),
        lengths=by_length(lm, sets.target, spec.lengths, judge, **shown) if spec.lengths else (),
        everyday=everyday,
        battery_open=still_open(found["battery"]),
    )


def check_all(battery: PromptSet, answers: Sequence[str]) -> tuple[bool, ...]:
    """Run each item's checker on its answer."""
    return tuple(
        check(p.checker or {}, a, prompt=p.text) for p, a in zip(battery, answers, strict=True)
    )


def not_finite(measured: Mapping[str, Any]) -> str:
    """Return where the first NaN or infinity of a summary stands, as `kl.sequence`; empty where none is."""
    for name, value in measured.items():
        if isinstance(value, Mapping):
            if within := not_finite(value):
                return f"{name}.{within}"
        elif isinstance(value, float) and not math.isfinite(value):
            return name
    return ""


def summarise(m: Measurement) -> dict[str, Any]:
    """Return the measurement as it stands in `run.json`."""
    categories = np.array(m.battery.categories)
    names = sorted(set(m.battery.categories))
    correct = np.array(m.correct)
    masks = {c: categories == c for c in names}
    return {
        "refusal": rate(m.target.flags("refusal")),
        "incoherent": rate(m.target.flags("incoherent")),
        "partial": rate(m.target.flags("partial")),
        **_thoughts(
            {
                **{name: judged.thought_open for name, judged in _judged_sets(m).items()},
                "battery": m.battery_open,
            }
        ),
        "refusal_by_category": {
            c: rate(_where(m.target, {c}.__contains__))
            for c in sorted(set(m.target.prompts.categories))
        },
        "refusal_seen": _rate_or_none(_where(m.target, lambda c: c in m.seen)),
        "refusal_unseen": _rate_or_none(_where(m.target, lambda c: c not in m.seen)),
        "labels": {
            name: {label: judged.labels.count(label) for label in LABELS}
            for name, judged in _judged_sets(m).items()
        },
        "over_refusal": {
            "borderline": rate(m.borderline.flags("refusal")) if m.borderline else None,
            "neutral": rate(m.neutral.flags("refusal")),
            "everyday": rate(m.everyday.judged.flags("refusal")) if m.everyday else None,
        },
        "perplexity": {
            "overall": m.scores.answers.perplexity(),
            "by_category": {c: m.scores.answers.perplexity(k) for c, k in masks.items()},
            "prompt_text": {
                "overall": m.scores.prompts.perplexity(),
                "by_category": {c: m.scores.prompts.perplexity(k) for c, k in masks.items()},
            },
            "own_answers": (
                m.divergence.scores if m.divergence else m.reference.scores
            ).perplexity(),
        },
        "accuracy": {
            **_accuracy(correct),
            "by_category": {c: float(correct[k].mean()) for c, k in masks.items()},
        },
        "kl": kl_summary(m.divergence),
        "kl_everyday": kl_summary(m.everyday.divergence) if m.everyday else None,
        **({"lengths": [cut.summary() for cut in m.lengths]} if m.lengths else {}),
        "kept": {
            k.judged.prompts.name: {
                "refusal": rate(k.judged.flags("refusal")),
                "incoherent": rate(k.judged.flags("incoherent")),
                "refusal_by_category": {
                    c: rate(_where(k.judged, {c}.__contains__))
                    for c in sorted(set(k.judged.prompts.categories))
                },
                "kl": kl_summary(k.divergence),
                **({"thought_open": rate(f)} if (f := k.judged.thought_open) else {}),
            }
            for k in m.kept
        },
    }


def _thoughts(still_open: Mapping[str, Sequence[bool]]) -> dict[str, Any]:
    """Return how many thoughts never closed, by set; nothing of a model that was not `thinking`."""
    rates = {name: rate(flags) for name, flags in still_open.items() if flags}
    return {"thought_open": rates} if rates else {}


def _judged_sets(m: Measurement) -> dict[str, Judged]:
    sets = {"target": m.target, "neutral": m.neutral}
    if m.borderline:
        sets["borderline"] = m.borderline
    if m.everyday:
        sets["everyday"] = m.everyday.judged
    return sets


def rate(flags: Sequence[bool]) -> dict[str, Any]:
    """Return how often a flag is set, with its Wilson interval, as it stands in records."""
    return asdict(wilson(sum(flags), len(flags)))


def _accuracy(correct: np.ndarray) -> dict[str, Any]:
    found = rate(correct.tolist())
    return {"overall": found.pop("rate"), **found}


def _where(judged: Judged, keep: Callable[[str], bool]) -> list[bool]:
    """Return the refusal flags of prompts whose category is kept."""
    flags = zip(judged.flags("refusal"), judged.prompts, strict=True)
    return [flag for flag, prompt in flags if keep(prompt.category)]


def _rate_or_none(flags: Sequence[bool]) -> dict[str, Any] | None:
    return rate(flags) if flags else None


def kl_summary(d: Divergence | None) -> dict[str, float]:
    """Return means over prompts with their 95% intervals, medians, and how far single tokens go, nats.

    One prompt in a hundred that the edit turns makes half of a mean; the median tells of the others.
    """
    if d is None:
        found = dict.fromkeys(("first_token", "sequence"), Interval(0.0, 0.0, 0.0))
    else:
        found = {
            "first_token": bootstrap_mean(d.first_token.tolist()),
            "sequence": bootstrap_mean(d.sequence.tolist()),
        }
    return {
        **{name: mean.estimate for name, mean in found.items()},
        **{f"{name}_low": mean.low for name, mean in found.items()},
        **{f"{name}_high": mean.high for name, mean in found.items()},
        "first_token_median": float(np.median(d.first_token)) if d else 0.0,
        "sequence_median": float(np.median(d.sequence)) if d else 0.0,
        "sequence_p95": float(np.quantile(d.per_token, 0.95)) if d else 0.0,
        "sequence_max": float(d.per_token.max()) if d else 0.0,
    }


def compare(
    before: Measurement, after: Measurement, *, seed: int, resamples: int = 2000
) -> dict[str, Any]:
    """Return the paired tests of two measurements on the same prompts."""

    def paired(a: Sequence[bool], b: Sequence[bool]) -> dict[str, Any]:
        test = mcnemar_exact(a, b)
        return {"b": test.b, "c": test.c, "p_value": test.p_value}

    over = None
    if before.borderline and after.borderline:
        over = paired(before.borderline.flags("refusal"), after.borderline.flags("refusal"))
    kept = {
        b.judged.prompts.name: paired(b.judged.flags("refusal"), a.judged.flags("refusal"))
        for b, a in zip(before.kept, after.kept, strict=True)
    }
    return {
        "kept": kept,
        "refusal": paired(before.target.flags("refusal"), after.target.flags("refusal")),
        "over_refusal": over,
        "accuracy": paired(before.correct, after.correct),
        "perplexity_ratio": perplexity_ratio(before, after, seed=seed, resamples=resamples),
    }


def lost(before: Measurement, after: Measurement, *, narrow: bool = False) -> dict[str, Any] | None:
    """Return how many answers that were to stay did not, with the interval; None where none were to.

    These are those to kept prompts that have another label now and, where false refusals alone were to go
    (`narrow`), targets that were refused and are not any more.
    """
    flags = [
        now != label
        for was, new in zip(before.kept, after.kept, strict=True)
        for label, now in zip(was.judged.labels, new.judged.labels, strict=True)
    ]
    if narrow:
        pairs = zip(before.target.labels, after.target.labels, strict=True)
        flags += [now != "refusal" for label, now in pairs if label == "refusal"]
    return rate(flags) if flags else None


def perplexity_ratio(
    before: Measurement, after: Measurement, *, seed: int = 0, resamples: int = 2000
) -> dict[str, float]:
    """Return perplexity of reference answers, after over before, with its 95% interval."""
    old, new = before.scores.answers, after.scores.answers
    ratio = paired_bootstrap(
        old.nll,
        new.nll,
        statistic="perplexity_ratio",
        tokens=old.tokens,
        n_resamples=resamples,
        seed=seed,
    )
    return {"estimate": ratio.estimate, "low": ratio.low, "high": ratio.high}


def examples(before: Measurement, after: Measurement | None, count: int = 5) -> dict[str, Any]:
    """Return a few prompts of each set with labels and short excerpts, never whole answers."""
    result: dict[str, list[dict[str, Any]]] = {}
    for row in _labelled(_judged_sets(before), _judged_sets(after) if after else {}):
        result.setdefault(row.pop("set"), []).append(row)
    return {
        name: rows[:: max(1, len(rows) // count)][:count] for name, rows in result.items() if rows
    }


def answers(before: Measurement, after: Measurement) -> list[dict[str, Any]]:
    """Return every prompt that was asked: labels and short excerpts, or whether a problem was solved."""
    kept = [{one.judged.prompts.name: one.judged for one in m.kept} for m in (before, after)]
    rows = [*_labelled(_judged_sets(before), _judged_sets(after)), *_labelled(*kept)]
    for prompt, old, new in zip(before.battery, before.correct, after.correct, strict=True):
        sides = {"before": {"correct": old}, "after": {"correct": new}}
        rows.append({"set": "battery", **_named(prompt), **sides})
    return rows


def _labelled(
    before: Mapping[str, Judged], after: Mapping[str, Judged]
) -> Iterator[dict[str, Any]]:
    """Yield the prompts of each set with what was answered before, and after where that is known."""

    def one(judged: Judged, i: int) -> dict[str, str]:
        return {"label": judged.labels[i], "excerpt": excerpt(judged.texts[i])}

    for name, judged in before.items():
        for i, prompt in enumerate(judged.prompts):
            later = one(after[name], i) if name in after else None
            yield {"set": name, **_named(prompt), "before": one(judged, i), "after": later}


def _named(prompt: Prompt) -> dict[str, str]:
    return {"id": prompt.id, "category": prompt.category, "prompt": prompt.text}
