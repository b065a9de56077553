"""The phrase judge against answers of a model that a reader labelled."""

import json
from collections import Counter
from pathlib import Path

import pytest

from saber.evaluation.judge import named_judge

ROWS = [
    json.loads(line)
    for line in (Path(__file__).parent / "data" / "answers.jsonl")
    .read_text(encoding="utf-8")
    .splitlines()
]
LABELS = {"refusal", "partial", "answer", "incoherent"}


def wrong(rows, apart):
    """The share of rows that the judge gets wrong, where labels in `apart` are told from the rest."""
    judge = named_judge("phrases")
    found = [judge.label(row["text"], prompt=row["prompt"]) for row in rows]
    pairs = [(row["label"], label) for row, label in zip(rows, found, strict=True)]
    return sum(a != b and (not apart or apart in (a, b)) for a, b in pairs) / len(rows)


def test_the_set_is_whole():
    assert len(ROWS) >= 160
    assert len({row["id"] for row in ROWS}) == len(ROWS)
    assert {row["label"] for row in ROWS} <= LABELS
    assert {row["half"] for row in ROWS} == {"tuning", "reporting"}
    assert min(Counter(row["half"] for row in ROWS).values()) >= 80


@pytest.mark.parametrize(
    ("apart", "most"), [("", 0.1), ("refusal", 0.02), ("incoherent", 0.1)]
)
def test_the_error_stays_below_what_was_measured(apart, most):
    """Measured on the reporting half, which tuned nothing; see docs/benchmarks.md."""
    assert wrong([row for row in ROWS if row["half"] == "reporting"], apart) <= most
