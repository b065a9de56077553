"""Hold a judge against answers that a person has read and labelled (Markdown).

    python benchmarks/judge.py [--data tests/data/answers.jsonl] [--half all|tuning|reporting]
                               [--judge phrases] [--judge-pattern ... and the like] [--errors]

Prints the confusion matrix, and with 95% intervals (Wilson) how often the label is another than the
reader's, how often it is wrong about `refusal` or not, about `refusal` or `partial` or neither, and
about `incoherent`; then the same by the kind of model that answered. The tuning half may mend a judge;
what is reported of it is the other half. `--errors` shows the items of the tuning half that it gets wrong.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saber.cli.main import build_parser, read_config
from saber.evaluation.judge import excerpt
from saber.evaluation.judging import label_all, make_judge
from saber.evaluation.statistics import wilson

DATA = Path(__file__).parents[1] / "tests" / "data" / "answers.jsonl"
LABELS = ("refusal", "partial", "answer", "incoherent")
KINDS = ("untouched", "refusing", "edited", "weak", "overdone", "begun")
WRONG = ("wrong about refusal", "wrong about declining at all", "wrong about incoherent")
Counts = Counter[tuple[str, str]]


def rows_of(path: Path, half: str = "all") -> list[dict[str, Any]]:
    """Read the labelled answers, or the half of them that may tune a judge, or the other."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if half in ("all", row["half"])]


def confusion(rows: Sequence[dict[str, Any]], found: Sequence[str]) -> Counts:
    """Count pairs of the reader's label and the judge's."""
    return Counter((row["label"], label) for row, label in zip(rows, found, strict=True))


def rate(wrong: int, n: int) -> str:
    """A rate with its interval and counts."""
    p = wilson(wrong, n)
    return f"{100 * p.rate:.1f}% ({100 * p.low:.1f}-{100 * p.high:.1f}), {wrong} of {n}"


def errors(counts: Counts) -> list[str]:
    """Return four error rates: any other label, refusal or not, declines at all or not, incoherent or not."""
    n = sum(counts.values())

    def wrong(*apart: str) -> int:
        return sum(
            k
            for (a, b), k in counts.items()
            if a != b and (not apart or (a in apart) != (b in apart))
        )

    return [
        rate(wrong(*apart), n)
        for apart in ((), ("refusal",), ("refusal", "partial"), ("incoherent",))
    ]


def table(counts: Counts) -> str:
    """Return the confusion matrix and the error rates."""
    lines = [
        "| reader \\ judge | " + " | ".join(LABELS) + " | all |",
        "|---|" + "---:|" * (len(LABELS) + 1),
    ]
    for truth in LABELS:
        row = [counts[truth, label] for label in LABELS]
        lines.append(f"| {truth} | " + " | ".join(map(str, [*row, sum(row)])) + " |")
    lines += ["", "| error | rate, 95% interval |", "|---|---|"]
    names = ("another label", *WRONG)
    lines += [f"| {name} | {value} |" for name, value in zip(names, errors(counts), strict=True)]
    return "\n".join(lines)


def by_kind(rows: Sequence[dict[str, Any]], found: Sequence[str]) -> str:
    """Return the error rates by the kind of model that answered."""
    lines = [
        f"| model | another label | {' | '.join(WRONG)} |",
        "|---|" + "---|" * (len(WRONG) + 1),
    ]
    for kind in KINDS:
        pairs = [
            (row, label) for row, label in zip(rows, found, strict=True) if row["kind"] == kind
        ]
        if pairs:
            some = errors(confusion([row for row, _ in pairs], [label for _, label in pairs]))
            lines.append(f"| {kind} | " + " | ".join(some) + " |")
    return "\n".join(lines)


def main() -> None:
    """Judge and print."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--half", choices=("all", "tuning", "reporting"), default="all")
    parser.add_argument("--errors", action="store_true")
    given, rest = parser.parse_known_args()
    config = read_config(build_parser().parse_args(["run", "none", *rest]))
    judge = make_judge(config.evaluation.judge, config.judging, config.data.behaviour)
    rows = rows_of(given.data, given.half)
    found = label_all(judge, [r["prompt"] for r in rows], [r["text"] for r in rows])
    print(table(confusion(rows, found)), by_kind(rows, found), sep="\n\n")
    if given.errors:
        for row, label in zip(rows, found, strict=True):
            if row["half"] == "tuning" and label != row["label"]:
                print(f"{row['id']}: {row['label']}, judged {label}: {excerpt(row['text'], 300)}")


if __name__ == "__main__":
    main()
