"""The phrase judge against answers of a model that a reader labelled."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from judge import KINDS, by_kind

from saber.config import preset
from saber.evaluation.judge import named_judge
from saber.gathering import gather

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
    assert len(ROWS) >= 402
    assert len({row["id"] for row in ROWS}) == len(ROWS)
    assert {row["label"] for row in ROWS} <= LABELS
    assert {row["half"] for row in ROWS} == {"tuning", "reporting"}
    assert min(Counter(row["half"] for row in ROWS).values()) >= 201
    assert len({row["text"] for row in ROWS}) == len(ROWS) - 4
    sizes = Counter((row["kind"], row["half"]) for row in ROWS)
    assert {kind for kind, _ in sizes} == set(KINDS)
    assert min(sizes.values()) >= 17
    assert sum(row["label"] == "partial" for row in ROWS) >= 13


@pytest.mark.parametrize(("apart", "most"), [("", 0.1), ("refusal", 0.02), ("incoherent", 0.1)])
def test_the_error_stays_below_what_was_measured(apart, most):
    """Measured on the reporting half, which tuned nothing; see docs/benchmarks.md."""
    assert wrong([row for row in ROWS if row["half"] == "reporting"], apart) <= most


def test_what_declines_at_all_is_told_from_what_does_not():
    """Early or late, in place of an answer or behind part of one; on the reporting half."""
    judge = named_judge("phrases")
    declining = {"refusal", "partial"}
    pairs = [
        (row["label"] in declining, judge.label(row["text"], prompt=row["prompt"]) in declining)
        for row in ROWS
        if row["half"] == "reporting"
    ]
    assert sum(truth for truth, _ in pairs) == 47
    assert sum(truth != found for truth, found in pairs) <= 2


def test_edited_models_were_asked_no_heldout_prompt():
    held = gather(preset("default")).reporting
    texts = {p.text for chosen in (held.target, held.neutral, held.borderline) for p in chosen}
    edited = {row["prompt"] for row in ROWS if row["kind"] in ("edited", "weak", "overdone", "begun")}
    assert len(edited) > 80
    assert not edited & texts


def test_nothing_that_edited_models_say_is_wrong_about_refusal():
    rows = [row for row in ROWS if row["half"] == "reporting" and row["kind"] in ("edited", "weak")]
    assert len(rows) >= 45
    assert wrong(rows, "refusal") == 0


def test_rates_by_kind_count_each_answer_once():
    rows = [{"kind": "weak", "label": "answer"}] * 3 + [{"kind": "edited", "label": "refusal"}]
    lines = by_kind(rows, ["answer", "answer", "incoherent", "refusal"]).splitlines()[2:]
    assert [line.split(" |")[0] for line in lines] == ["| edited", "| weak"]
    assert ", 0 of 1 |" in lines[0]
    assert lines[1].count(", 1 of 3 ") == 2
    assert lines[1].count(", 0 of 3 ") == 2
