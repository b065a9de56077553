"""One ruler for all: what `saber eval MODEL --base BASE` measures, but the untouched model only once."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from saber.config import override, preset
from saber.evaluation.judge import named_judge
from saber.evaluation.measure import compare, measure, summarise
from saber.gathering import gather
from saber.lm.load import load

BASELINE = "baseline.json"


def measure_all(base: Path, models: Mapping[Path, Path], baseline: Path) -> None:
    """Measure each model against the base, on held-out prompts; write each result to its file."""
    if not models:
        return
    config = override(preset("default"), {"load": {"device": "cpu", "dtype": "float32"}})
    data, judge = gather(config).reporting, named_judge(config.evaluation.judge)
    before = measure(load(str(base), config.load), data, config.evaluation, judge)
    baseline.write_text(json.dumps(summarise(before)) + "\n", encoding="utf-8")
    for folder, result in models.items():
        lm = load(str(folder), config.load)
        after = measure(lm, data, config.evaluation, judge, untouched=before)
        compared = compare(before, after, seed=config.seed)
        record = {"edited": summarise(after), "comparison": compared}
        result.write_text(json.dumps(record) + "\n", encoding="utf-8")


COLUMNS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any] | None], str]] = {
    "refusals": lambda m, _c: count(m["refusal"]),
    "incoherent": lambda m, _c: count(m["incoherent"]),
    "over-refusals": lambda m, _c: count(m["over_refusal"]["borderline"]),
    "KL, first token": lambda m, _c: f"{m['kl']['first_token']:.4f}",
    "KL, sequence": lambda m, _c: f"{m['kl']['sequence']:.4f}",
    "perplexity ratio": lambda _m, c: ratio(c["perplexity_ratio"]) if c else "1",
    "accuracy": lambda m, _c: f"{100 * m['accuracy']['overall']:.0f}%",
}


def count(p: Mapping[str, Any]) -> str:
    """A rate as a count, with its interval in percent."""
    hits = round(p["rate"] * p["n"])
    return f"{hits}/{p['n']} ({100 * p['low']:.1f}-{100 * p['high']:.1f}%)"


def ratio(found: Mapping[str, float]) -> str:
    """An estimate with its interval."""
    return f"{found['estimate']:.3f} ({found['low']:.3f}-{found['high']:.3f})"


def table(baseline: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the Markdown table: the untouched model, then a row for each edited one."""
    head = ["tool", "settings", "processor seconds", "of it search and edit", *COLUMNS]
    lines = [row_of(head), "|---|---|" + "---:|" * (len(head) - 2)]
    untouched = [read(baseline, None) for read in COLUMNS.values()]
    lines.append(row_of(["untouched", "", "", "", *untouched]))
    for row in rows:
        search = row["cpu_seconds"] * row["search_share"]
        times = [f"{row['cpu_seconds']:.0f}", f"{search:.0f}"]
        measured = [read(row["edited"], row["comparison"]) for read in COLUMNS.values()]
        lines.append(row_of([row["tool"], row["settings"], *times, *measured]))
    return "\n".join(lines)


def row_of(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"
