"""Which trials no other beats, and which one is taken: by validation prompts alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from saber.evaluation.statistics import Proportion, wilson
from saber.sweep.journal import Row

AIM = 0.05
"""Share of validation prompts that a setting may leave amiss, unless told otherwise."""


def amiss(measured: Mapping[str, Any], mode: str = "removal") -> Proportion:
    """Return the share of prompts not answered as they should be, with its 95% interval.

    Removal: targets that show the behaviour or are answered incoherently. Over-refusal: borderline
    prompts that are refused.
    """
    if mode == "over-refusal":
        found = measured["over_refusal"]["borderline"]
        return wilson(found["successes"], found["n"])
    refused, lost = measured["refusal"], measured["incoherent"]
    return wilson(refused["successes"] + lost["successes"], refused["n"])


def divergence(measured: Mapping[str, Any]) -> float:
    """Return the mean KL from the untouched model along its answers to neutral prompts, nats."""
    return float(measured["kl"]["sequence"])


def scores(row: Row, mode: str = "removal") -> tuple[float, float]:
    """Return what a trial is judged by: answers amiss, and divergence; less is better."""
    assert row.measured is not None
    return amiss(row.measured, mode).rate, divergence(row.measured)


def finished(rows: Sequence[Row]) -> list[Row]:
    """Return the trials that were measured."""
    return [row for row in rows if row.state == "done" and row.measured is not None]


def pareto(rows: Sequence[Row], mode: str = "removal") -> list[int]:
    """Return the numbers of the trials that no other equals in all scores and beats in one."""
    points = {row.number: scores(row, mode) for row in finished(rows)}

    def beaten(mine: tuple[float, float]) -> bool:
        return any(
            all(o <= m for o, m in zip(other, mine, strict=True)) and other != mine
            for other in points.values()
        )

    return sorted(number for number, mine in points.items() if not beaten(mine))


def ranked(rows: Sequence[Row], mode: str = "removal") -> list[Row]:
    """Return the measured trials, fewest answers amiss first, then least divergence."""
    return sorted(finished(rows), key=lambda row: (*scores(row, mode), row.number))


def choose(rows: Sequence[Row], aim: float = AIM, mode: str = "removal") -> Row | None:
    """Return the trial that the rule takes, see `rule`; None where none was measured."""
    order = ranked(rows, mode)
    fine = [row for row in order if scores(row, mode)[0] <= aim]
    if fine:
        return min(fine, key=lambda row: (scores(row, mode)[1], row.number))
    return order[0] if order else None


def rule(aim: float = AIM, mode: str = "removal") -> str:
    """Return the rule in words."""
    what = "amiss (shown or incoherent)" if mode == "removal" else "refused wrongly"
    return (
        f"of the settings that leave at most {100 * aim:g}% of validation prompts {what}, the one with the "
        f"least KL along the untouched model's answers; if there is none, the one that leaves fewest"
    )
