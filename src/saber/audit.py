"""How fragile a behaviour is: how small a change of the weights, or how short a start of the answer, ends it.

Nothing that could be applied is kept: neither an edited model, nor a plan, nor a direction.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from saber import __version__, artifacts
from saber.ablation import EditPlan, Removal, applied, originals_kept, orthogonal
from saber.candidates import causal_scores, mean_log_odds, merit
from saber.config import RunConfig, resolved
from saber.errors import NonFinite, UsageError
from saber.evaluation.divergence import Divergence, Reference, diverge, own_answers
from saber.evaluation.judge import Judge, Label
from saber.evaluation.judging import label_all
from saber.evaluation.measure import kl_summary, not_finite, rate
from saber.evaluation.readout import derive_readout
from saber.evaluation.statistics import wilson
from saber.gathering import RunData
from saber.lm.forward import Progress, silent
from saber.lm.generate import Completion, Request, answer
from saber.lm.model import LanguageModel
from saber.passes import Candidate, Refinement
from saber.pipeline import Listener, begin, one_at_a_time
from saber.probing import probe
from saber.prompts import PromptSet
from saber.record import describe_data, describe_model, describe_passes, environment
from saber.run_folder import AUDITS, abandon
from saber.stopwatch import Stopwatch
from saber.subject import Subject, Watch

DOSES = (0.125, 0.25, 0.5, 0.75, 1.0)
"""Shares of the edit that are tried."""
STARTS = (1, 2, 4, 8, 16)
"""Tokens that answers are made to start with."""
SILENT = Listener()
SHORTLIST = 8
"""Directions, each of another layer, among which the one that does most is looked for."""
Kind = Literal["untouched", "edit", "random", "direction"]


@dataclass(frozen=True)
class Rung:
    """One change of the weights, and what became of the behaviour."""

    kind: Kind
    """untouched: none; edit: a share of the edit that was found; random: the whole edit turned into random
    directions of the stream; direction: the one that does most is taken out of all writers."""
    dose: float
    """Share of the change, 0 to 1."""
    labels: tuple[Label, ...]
    """Of the answers to held-out targets."""
    divergence: Divergence | None
    """From the untouched model on held-out neutral prompts."""
    edited: float
    """Norm of the change over that of the weights that it changes."""
    overall: float
    """The same over the norm of all weights."""
    writers: int
    """Weights that it changes."""


@dataclass(frozen=True)
class Start:
    """What becomes of refusals where the answer is made to start as the edited model's does."""

    tokens: int
    """Length of that start."""
    shown: int
    """Answers that show the behaviour none the less, be it late."""
    asked: int
    """Targets that were asked: those that showed it before, and are answered after the edit."""


@one_at_a_time
def audit(
    model: str,
    out: Path,
    config: RunConfig,
    *,
    overwrite: bool = False,
    resume: bool = False,
    force: bool = False,
    command: str = "",
    listener: Listener = SILENT,
) -> dict[str, Any]:
    """Find how little ends the behaviour; write `audit.json` in `out` and return what it holds.

    Raises children of `SaberError`; `WeakBehaviour` when the model hardly shows the behaviour and `force`
    is not set. A behaviour that no edit takes out is a finding and no error.
    """
    started, clock = datetime.datetime.now(datetime.timezone.utc), Stopwatch()
    if config.data.mode != "removal":
        raise UsageError(
            f"--mode {config.data.mode} has no meaning in an audit.", "It goes with saber run."
        )
    begun = begin(
        model,
        out,
        config,
        clock,
        AUDITS,
        overwrite=overwrite,
        resume=resume,
        force=force,
        listener=listener,
    )
    lm, data = begun.subject.lm, begun.data
    listener.on_stage("finding the edit")
    outcome = begun.refined(out, config, clock, listener)
    with clock("audit"):
        ladder = _Ladder(lm, data, begun.judge, config, listener.progress, listener.on_stage)
        found = ladder.climb(begun.subject, begun.watch, outcome)
    record = {
        "schema": artifacts.SCHEMA,
        "saber_version": __version__,
        "command": command,
        "model": describe_model(lm, begun.subject.mark),
        "environment": environment(started),
        "config": resolved(config),
        "judge": begun.judged_by,
        "prompts": describe_data(data, begun.watch.left_out),
        "seconds": {**clock.seconds, "total": clock.total()},
        **found,
        **describe_passes(lm, outcome, config),
    }
    artifacts.write_json(out / AUDITS.record, record)
    abandon(out, AUDITS)
    return record


@dataclass(frozen=True)
class _Ladder:
    """Measures one change after another on the same held-out prompts."""

    lm: LanguageModel
    data: RunData
    judge: Judge
    config: RunConfig
    progress: Progress[Any] = silent
    on_stage: Callable[[str], None] = lambda _text: None

    def climb(self, subject: Subject, watch: Watch, outcome: Refinement) -> dict[str, Any]:
        """Return all rungs and starts as they stand in `audit.json`."""
        self.on_stage("asking the untouched model")
        first = self._answered(self.target.texts)
        reference = own_answers(
            self.lm, self.neutral.texts, self.tokens, progress=self.progress, label="answers"
        )
        labels = self._labels(self.target.texts, first)
        rungs = [Rung("untouched", 0.0, labels, None, 0.0, 0.0, 0)]
        starts: list[Start] = []
        chosen: Candidate | None = None
        with originals_kept(self.lm.model):
            if outcome.plan.factors:
                for dose in DOSES:
                    self.on_stage(f"making {100 * dose:g}% of the edit")
                    plan = outcome.plan.scaled(dose)
                    rung, written = self._rung("edit", dose, plan, reference)
                    rungs.append(rung)
                self.on_stage("turning the edit into random directions")
                turned = at_random(outcome.plan, self.config.seed)
                rungs.append(self._rung("random", 1.0, turned, reference)[0])
                starts = self._starts(labels, rungs[len(DOSES)].labels, written)
            if outcome.passes:
                self.on_stage("looking for the one direction that does most")
                chosen = self._best(watch, outcome.passes[0].candidates)
                one = [Removal(chosen.direction.pattern, 1.0, chosen.direction.layer)]
                plan = orthogonal(self.lm, subject.writers, one, "all")
                rungs.append(self._rung("direction", 1.0, plan, reference)[0])
        described = [_described(rung, self.target) for rung in rungs]
        for row in described:
            if name := not_finite(row):
                raise NonFinite(
                    f"{name} under {100 * row['dose']:g}% of the change ({row['kind']})"
                )
        return {
            "rungs": described,
            "starts": [
                {"tokens": s.tokens, "shown": asdict(wilson(s.shown, s.asked))} for s in starts
            ],
            "direction": None if chosen is None else {"layer": chosen.direction.layer},
        }

    @property
    def target(self) -> PromptSet:
        """Held-out targets."""
        return self.data.reporting.target

    @property
    def neutral(self) -> PromptSet:
        """Held-out neutral prompts."""
        return self.data.reporting.neutral

    @property
    def tokens(self) -> int:
        """Length of answers."""
        return self.config.evaluation.max_new_tokens

    def _answered(
        self, texts: Sequence[str], starts: Sequence[Sequence[int]] | None = None
    ) -> list[Completion]:
        asked = [
            Request(text, self.tokens + len(start), self.judge.settled, start)
            for text, start in zip(texts, starts or [()] * len(texts), strict=True)
        ]
        return answer(self.lm, asked, progress=self.progress, label="answers")

    def _labels(self, texts: Sequence[str], written: Sequence[Completion]) -> tuple[Label, ...]:
        return label_all(self.judge, texts, [c.text for c in written])

    def _rung(
        self, kind: Kind, dose: float, plan: EditPlan, reference: Reference
    ) -> tuple[Rung, list[Completion]]:
        edited, overall = sizes(self.lm.model, plan)
        with applied(self.lm.model, plan):
            written = self._answered(self.target.texts)
            moved = diverge(self.lm, reference, progress=self.progress)
        labels, writers = self._labels(self.target.texts, written), len(plan.factors)
        return Rung(kind, dose, labels, moved, edited, overall, writers), written

    def _starts(
        self, before: Sequence[Label], after: Sequence[Label], written: Sequence[Completion]
    ) -> list[Start]:
        """Let the untouched model go on behind the first tokens of the edited one's answers."""
        found = []
        pairs = list(zip(self.target.texts, before, after, written, strict=True))
        for tokens in STARTS:
            some = [
                (text, c.ids[:tokens])
                for text, was, now, c in pairs
                if was == "refusal" and now == "answer" and len(c.ids) > tokens
            ]
            if not some:
                break
            self.on_stage(f"making answers start with {tokens} tokens of the edited model's")
            texts, starts = zip(*some, strict=True)
            labels = self._labels(texts, self._answered(texts, starts))
            counts = Counter(labels)
            found.append(Start(tokens, counts["refusal"] + counts["partial"], len(some)))
        return found

    def _best(self, watch: Watch, candidates: Sequence[Candidate]) -> Candidate:
        """Return the candidate whose projection takes most off the log-odds, per its cost.

        Among the best separating ones, each of another layer, on validation prompts, as Arditi et al.
        (2024, arXiv 2406.11717) choose theirs; where no opening tells of the behaviour, it is the best
        separating one.
        """
        by_layer: dict[int, Candidate] = {}
        for candidate in candidates:  # best first
            by_layer.setdefault(candidate.direction.layer, candidate)
        some, data = list(by_layer.values())[:SHORTLIST], watch.selecting
        target, neutral = (
            probe(self.lm, prompts, self.config.probe, first_token=True)
            for prompts in (data.target_validation, data.neutral_validation)
        )
        assert target.first_token is not None
        assert neutral.first_token is not None
        readout = derive_readout(target.first_token, neutral.first_token)
        if not readout.tokens:
            return some[0]
        scores = causal_scores(
            self.lm,
            [c.direction for c in some],
            [c.entanglement for c in some],
            data,
            self.config.probe,
            readout,
            neutral,
            mean_log_odds(target, readout),
            replace(self.config.refine, shortlist=len(some)),
            self.progress,
        )
        return some[max(range(len(some)), key=lambda i: merit(scores[i]))]


def at_random(plan: EditPlan, seed: int) -> EditPlan:
    """Return the plan that reads what this one reads and writes it along random directions instead.

    All output directions are turned together, so that each change keeps its norm, and the angles between
    those of different writers stay as they are.
    """
    whole = torch.cat([f.left for f in plan.factors.values()], 1).double()
    basis, values, _ = torch.linalg.svd(whole, full_matrices=False)
    basis = basis[:, values > 1e-12 * values[:1]]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(basis.shape, generator=generator, dtype=torch.float64)
    other, _ = torch.linalg.qr(drawn)

    def turned(values: Tensor) -> Tensor:
        """Turn columns."""
        return (other @ (basis.T @ values.double())).to(values.dtype)

    return EditPlan(
        {
            name: replace(
                f, left=turned(f.left), bias=None if f.bias is None else turned(f.bias.T).T
            )
            for name, f in plan.factors.items()
        }
    )


def sizes(model: Any, plan: EditPlan) -> tuple[float, float]:
    """Return the norm of a plan's changes over that of the weights it changes, and over that of all."""
    changes = [_norm(f.left, f.right.flatten(1)) for f in plan.factors.values()]
    names = [f.weight or f"{name}.weight" for name, f in plan.factors.items()]
    changed = [float(_length(model.get_parameter(name))) for name in dict.fromkeys(names)]
    whole = [float(_length(p)) for p in model.parameters()]
    size = _joint(changes)
    return size / max(_joint(changed), 1e-30), size / max(_joint(whole), 1e-30)


def _length(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight.detach(), dtype=torch.float32)


def _norm(left: Tensor, right: Tensor) -> float:
    """Return the Frobenius norm of a product."""
    gram = (left.double().T @ left.double()) * (right.double() @ right.double().T)
    return sqrt(max(float(gram.sum()), 0.0))


def _joint(norms: Sequence[float]) -> float:
    return sqrt(sum(norm * norm for norm in norms))


def _described(rung: Rung, target: PromptSet) -> dict[str, Any]:
    def share(label: Label, category: str | None = None) -> dict[str, Any]:
        return rate(
            [
                one == label
                for one, prompt in zip(rung.labels, target, strict=True)
                if category in (None, prompt.category)
            ]
        )

    return {
        "kind": rung.kind,
        "dose": rung.dose,
        "change": {"edited": rung.edited, "overall": rung.overall},
        "writers": rung.writers,
        "refusal": share("refusal"),
        "partial": share("partial"),
        "incoherent": share("incoherent"),
        "refusal_by_category": {c: share("refusal", c) for c in sorted(set(target.categories))},
        "kl": kl_summary(rung.divergence) if rung.divergence else None,
    }
