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
    prompts that are refused. In both, answers that were to stay and did not (`measure.lost`).
    """
    kinds = _kinds(measured, mode)
    return wilson(sum(p["successes"] for p in kinds), sum(p["n"] for p in kinds))


def reached(measured: Mapping[str, Any], aim: float, mode: str = "removal") -> bool:
    """Whether at most this share of each kind of prompts is amiss: many of one make up for no other."""
    return all(p["successes"] / max(p["n"], 1) <= aim for p in _kinds(measured, mode))


def _kinds(measured: Mapping[str, Any], mode: str) -> list[Mapping[str, Any]]:
    """Return how many prompts are amiss of those to be changed, and of those whose answers were to stay."""
    lost = measured.get("lost") or {"successes": 0, "n": 0}
    if mode == "over-refusal":
        return [measured["over_refusal"]["borderline"], lost]
    shown, broken = measured["refusal"], measured["incoherent"]
    return [{"successes": shown["successes"] + broken["successes"], "n": shown["n"]}, lost]


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
    fine = [row for row in order if row.measured and reached(row.measured, aim, mode)]
    if fine:
        return min(fine, key=lambda row: (scores(row, mode)[1], row.number))
    return order[0] if order else None


def faults(mode: str = "removal", *, keeps: bool = False) -> str:
    """Return in words what counts as amiss; `keeps`: whether there are prompts whose answers are to stay."""
    if mode == "over-refusal":
        return "refused wrongly, or no longer refused rightly"
    return (
        "amiss (shown, incoherent, or changed where kept)"
        if keeps
        else "amiss (shown or incoherent)"
    )


def rule(aim: float = AIM, mode: str = "removal", *, keeps: bool = False) -> str:
    """Return the rule in words."""
    kinds = " of each kind" if keeps or mode == "over-refusal" else ""
    return (
        f"of the settings that leave at most {100 * aim:g}% of validation prompts{kinds} "
        f"{faults(mode, keeps=keeps)}, the one with the least KL along the untouched model's answers; "
        "if there is none, the one that leaves fewest"
    )
