"""Stage 5, what it works with and leaves: its settings, prompts, candidates and passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from saber.ablation import EditPlan, Removal
from saber.entanglement import Entanglement
from saber.hydra import Compensation
from saber.prompts import PromptSet
from saber.spectral import Direction
from saber.strength import Trial

Status = Literal["ablated", "weakened", "skipped", "not selected"]


@dataclass(frozen=True)
class RefineSpec:
    """How many passes there are, and what each takes."""

    passes: int = 4
    """Most passes, 1 or more."""
    top_k: int = 0
    """global_top_k: directions ablated in a pass, over all layers; 0 sets no limit."""
    per_layer: int = 1
    """Most directions a pass takes from one layer; 0 sets no limit."""
    decay: float = 1.0
    """Factor on the strength for each pass after the first, 0 to 1."""
    shortlist: int = 0
    """Candidates with the best score that are tested causally, by a hook; 0 ranks by score alone."""
    stop: Literal["behaviour", "never"] = "behaviour"
    """behaviour: end once hardly any validation target shows it; never: do all passes."""
    stop_rate: float = 0.03
    """Share of validation targets that may still show the behaviour at the end, and of fit targets that
    may come to it late, 0 to 1."""
    max_q: float = 0.05
    """Candidates whose separability has a larger false-discovery rate are dropped, 0 to 1."""


@dataclass(frozen=True)
class RefineData:
    """The prompts that select: fit and validation only, never held-out ones."""

    target: PromptSet
    """Fit targets."""
    neutral: PromptSet
    """Fit neutral prompts."""
    target_validation: PromptSet
    """Targets on which causal scores and the stop are measured."""
    neutral_validation: PromptSet
    """Neutral prompts on which the cost of a direction is measured."""
    capability: PromptSet
    """Labelled capability prompts with reference answers."""
    everyday: PromptSet = field(default_factory=lambda: PromptSet("everyday", ()))
    """Ordinary requests of many kinds, which a selective edit preserves as well."""
    keep: tuple[PromptSet, ...] = ()
    """Further fit prompts, the answers to which must stay as they are."""
    keep_validation: tuple[PromptSet, ...] = ()
    """Validation prompts of the same kinds."""


@dataclass(frozen=True)
class Candidate:
    """A direction with all that was measured of it, and what became of it."""

    direction: Direction
    """Where it was found, and how well it separates."""
    entanglement: Entanglement
    """How capabilities use it."""
    score: float
    """Fisher ratio d'^2 / 2 times purity."""
    causal: float | None
    """Fall of the mean refusal log-odds on validation targets when it is projected out, nats."""
    causal_kl: float | None
    """First-token KL on validation neutral prompts of that projection, nats."""
    strength: float
    """Removed share; above 1 where a search took off more than was written."""
    status: Status
    """What became of it."""
    lambda_: float | None = None
    """Weight of preserved inputs (selective edit)."""
    sensitivity: float | None = None
    """Fisher information of the answers' tokens along it, nats per squared unit of the stream; None where
    lambda does not follow it."""
    removed: float | None = None
    """Share of what its layer's writers write of it on targets that the fit expects to go."""
    collateral: float | None = None
    """Energy of the change on preserved inputs that the fit expects, per what they write of it."""


@dataclass(frozen=True)
class Hydra:
    """What was left, or came up, when a pass began, and what other writers put back."""

    top_auroc: float
    """AUROC of the best separating candidate at the start of the pass."""
    top_d_prime: float
    """Its d'."""
    top_layer: int
    """Its layer."""
    dormant: int | None
    """Ablated directions that separate more than twice as well now as in the untouched model; None behind
    a forced start, where the untouched model was not probed."""
    compensation: Compensation | None
    """Of the pass's first direction; None where no writer is unedited, or behind a forced start."""


@dataclass(frozen=True)
class Pass:
    """One round of stages 1 to 4."""

    index: int
    """From 1."""
    candidates: tuple[Candidate, ...]
    """All candidates, best first."""
    log_odds_before: float
    """Mean refusal log-odds on validation targets at its start, nats."""
    log_odds_after: float
    """The same at its end."""
    rate_before: float
    """Share of validation targets that showed the behaviour at its start, by judged answers."""
    rate_after: float
    """The same at its end."""
    hydra: Hydra
    """Hydra statistics."""
    plan: EditPlan
    """The edit from the original weights, this pass and all before it."""
    incoherent_after: float = 0.0
    """Share of incoherent answers to validation targets at its end."""
    lost_after: float = 0.0
    """Share of answers to keep sets' validation prompts with another label than before."""
    trials: tuple[Trial, ...] = ()
    """Strengths that were tried (selective edit)."""
    opening: str = ""
    """Start of the answer behind which it looked; empty for the answer's own start."""
    late: int | None = None
    """Fit targets whose answers show the behaviour late at its end (of those that did before it, where
    validation targets are clean); None where not looked for."""
    by_answers: bool = False
    """Whether answers were asked for at each strength, as first tokens tell nothing of the behaviour."""
    in_vain: tuple[tuple[int, ...], ...] = ()
    """Starts of answers behind which a pass did not help since the one before, as tokens."""

    @property
    def ablated(self) -> tuple[Candidate, ...]:
        """The candidates that were taken out."""
        return tuple(c for c in self.candidates if c.status in ("ablated", "weakened"))

    @property
    def removals(self) -> list[Removal]:
        """The same as removals for a plan."""
        return removals(self.ablated, self.index)


@dataclass(frozen=True)
class Refinement:
    """The outcome of all passes."""

    passes: tuple[Pass, ...]
    """In order."""
    plan: EditPlan
    """The one edit, from the original weights, that they add up to."""
    stop_reason: str
    """Why no further pass was made."""
    seconds: dict[str, float]
    """Wall time by stage."""

    @property
    def removals(self) -> list[Removal]:
        """Everything taken out, in order."""
        return [r for p in self.passes for r in p.removals]


def removals(chosen: Sequence[Candidate], step: int) -> list[Removal]:
    """Return what a pass takes out as removals for a plan."""
    return [Removal(c.direction.pattern, c.strength, c.direction.layer, step) for c in chosen]
