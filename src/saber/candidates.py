"""Stages 3 and 4: which directions a pass takes, by score or by what each does to answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from saber.ablation import EditSpec
from saber.entanglement import Entanglement
from saber.evaluation.divergence import kl_divergence
from saber.evaluation.readout import Readout
from saber.linalg import d_prime
from saber.lm.forward import Progress
from saber.lm.model import LanguageModel
from saber.lm.writers import ablated_stream
from saber.passes import Candidate, RefineData, RefineSpec, Status
from saber.probing import Activations, ProbeSpec, probe
from saber.spectral import Direction


def choose(
    directions: Sequence[Direction],
    measured: Sequence[Entanglement],
    causal: Sequence[tuple[float, float] | None],
    edit: EditSpec,
    spec: RefineSpec,
    scale: float = 1.0,
) -> list[Candidate]:
    """Rank the candidates and give the `top_k` best a strength of scale x alpha x purity.

    Without a shortlist the rank is by score, as on the card. With one it is by causal fall per
    cost, fall / (1 + kl), among those tested. Candidates below the skip floor are left alone and
    their place goes to the next, as it does beyond `per_layer`.
    """
    rows = list(zip(directions, measured, causal, strict=True))
    scored = [(d, e, c, d.d_prime**2 / 2 * e.purity) for d, e, c in rows]
    if spec.shortlist:
        ranked = sorted(scored, key=lambda row: (row[2] is None, -merit(row[2]), -row[3]))
    else:
        ranked = sorted(scored, key=lambda row: -row[3])
    result = []
    taken: Counter[int] = Counter()
    for d, e, c, score in ranked:
        status: Status = "not selected"
        strength = 0.0
        eligible = d.q_value <= spec.max_q and d.d_prime > 0
        if spec.shortlist and (c is None or c[0] <= 0):
            eligible = False
        if spec.per_layer and taken[d.layer] >= spec.per_layer:
            eligible = False
        if eligible and (not spec.top_k or taken.total() < spec.top_k):
            # Strength by a purity of nothing is no strength, or an infinite lambda.
            if e.purity < edit.skip_below or (e.purity <= 0 and edit.strength != "constant"):
                status = "skipped"
            else:
                strength = scale * edit.alpha * (e.purity if edit.strength == "purity" else 1.0)
                status = "ablated" if e.purity >= 0.5 else "weakened"
                taken[d.layer] += 1
        fall, kl = c if c is not None else (None, None)
        result.append(Candidate(d, e, score, fall, kl, strength, status))
    return result


def merit(causal: tuple[float, float] | None) -> float:
    """Return the causal fall per cost, fall / (1 + kl); 0 where it was not tested."""
    return 0.0 if causal is None else causal[0] / (1.0 + causal[1])


def causal_scores(
    lm: LanguageModel,
    found: Sequence[Direction],
    measured: Sequence[Entanglement],
    data: RefineData,
    probing: ProbeSpec,
    readout: Readout,
    untouched: Activations,
    current: float,
    spec: RefineSpec,
    progress: Progress[Any],
) -> list[tuple[float, float] | None]:
    """Project each shortlisted direction out of the stream; return (log-odds fall, neutral KL)."""
    scores = [d.d_prime**2 / 2 * e.purity for d, e in zip(found, measured, strict=True)]
    order = sorted(range(len(found)), key=lambda i: -scores[i])[: spec.shortlist]
    result: list[tuple[float, float] | None] = [None] * len(found)
    assert untouched.first_token is not None
    for index in progress(order, "causal scores", len(order)):
        with ablated_stream(lm, found[index].pattern[None]):
            target = probe(lm, data.target_validation, probing, first_token=True)
            neutral = probe(lm, data.neutral_validation, probing, first_token=True)
        assert neutral.first_token is not None
        kl = float(kl_divergence(untouched.first_token, neutral.first_token).mean())
        result[index] = (current - mean_log_odds(target, readout), kl)
    return result


def mean_log_odds(activations: Activations, readout: Readout) -> float:
    """Return the mean log-odds that answers open with the behaviour, nats."""
    assert activations.first_token is not None
    return float(readout.log_odds(activations.first_token).mean())


def dormant(chosen: Sequence[Candidate], original: tuple[Activations, Activations]) -> int:
    """Count directions that separate the sides more than twice as well now as in the `original` ones."""
    count = 0
    for candidate in chosen:
        d = candidate.direction
        x, y = (a.hidden[:, d.position, d.layer + 1] @ d.detector for a in original)
        count += abs(float(d_prime(x, y))) < 0.5 * d.d_prime
    return count
