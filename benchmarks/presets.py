"""Run presets on a model and print one table of what each did and cost (Markdown).

    python benchmarks/presets.py [--model demo] [--presets default card] [--runs DIR] [OPTIONS]

OPTIONS go to `saber run` as they are: other prompts, another judge, the name of another behaviour.
Every number is read from the runs' own run.json: held-out prompts, 95% intervals. Finished runs
in --runs are used again; delete the folder to start anew.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--presets", nargs="+", default=["default", "card"])
    parser.add_argument("--runs", type=Path, default=Path("runs/presets"))
    given, options = parser.parse_known_args()
    records = {}
    for name in given.presets:
        folder = given.runs / name
        if not (folder / "run.json").exists():
            command = [sys.executable, "-m", "saber.cli.main", "run", given.model, "--preset", name]
            command += ["--out", str(folder), "--overwrite", *options]
            subprocess.run(command, check=True)
        records[name] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    print(table(records))


def rate(p: Mapping[str, Any] | None) -> str:
    """A rate with its interval; empty where it was not measured."""
    if p is None:
        return ""
    return f"{100 * p['rate']:.1f}% ({100 * p['low']:.1f}-{100 * p['high']:.1f})"


def everyday(m: Mapping[str, Any], name: str, digits: int) -> str:
    """A divergence on everyday requests; empty where it was not measured."""
    found = m.get("kl_everyday")
    return f"{found[name]:.{digits}f}" if found else ""


ROWS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "refusal, target": lambda m: rate(m["refusal"]),
    "refusal, seen categories": lambda m: rate(m["refusal_seen"]),
    "refusal, unseen categories": lambda m: rate(m["refusal_unseen"]),
    "incoherent, target": lambda m: rate(m["incoherent"]),
    "over-refusal, borderline": lambda m: rate(m["over_refusal"]["borderline"]),
    "over-refusal, neutral": lambda m: rate(m["over_refusal"]["neutral"]),
    "perplexity, reference answers": lambda m: f"{m['perplexity']['overall']:.2f}",
    "perplexity, prompt text": lambda m: f"{m['perplexity']['prompt_text']['overall']:.1f}",
    "battery accuracy": lambda m: f"{100 * m['accuracy']['overall']:.0f}%",
    "KL, first token": lambda m: f"{m['kl']['first_token']:.3f}",
    "KL, first token, everyday": lambda m: everyday(m, "first_token", 3),
    "KL, sequence": lambda m: f"{m['kl']['sequence']:.4f}",
    "KL, sequence, median prompt": lambda m: (
        # Runs of an earlier version lack it.
        f"{m['kl']['sequence_median']:.4f}" if "sequence_median" in m["kl"] else ""
    ),
    "KL, sequence, everyday": lambda m: everyday(m, "sequence", 4),
    "KL, sequence, everyday, median prompt": lambda m: everyday(m, "sequence_median", 4),
}


def table(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the Markdown table: the untouched model, then each preset."""
    first = next(iter(records.values()))
    lines = [
        f"| held-out prompts ({first['baseline']['refusal']['n']} targets) | untouched | "
        + " | ".join(f"`{name}`" for name in records)
        + " |",
        "|---|" + "---:|" * (len(records) + 1),
    ]
    name = first["config"]["data"].get("behaviour", "refusal")
    if name != "refusal":
        lines[0] = lines[0].replace("| held-out", f"| {name}, held-out", 1)
    for label, read in ROWS.items():
        cells = [read(first["baseline"]), *(read(r["edited"]) for r in records.values())]
        if not any(cells):
            continue
        if name != "refusal":
            label = label.replace("over-refusal", name).replace("refusal", name)
        lines.append(f"| {label} | " + " | ".join(cells) + " |")

    def extra(label: str, of: Callable[[Mapping[str, Any]], str]) -> None:
        lines.append(f"| {label} | | " + " | ".join(of(r) for r in records.values()) + " |")

    def ratio(r: Mapping[str, Any]) -> str:
        found = r["comparison"]["perplexity_ratio"]
        return f"{found['estimate']:.3f} ({found['low']:.3f}-{found['high']:.3f})"

    extra("perplexity ratio", ratio)
    extra("accuracy, exact McNemar p", lambda r: f"{r['comparison']['accuracy']['p_value']:.2f}")
    extra("directions / passes", lambda r: f"{r['directions_ablated']} / {len(r['passes'])}")
    extra("seconds", lambda r: f"{r['seconds']['total']:.0f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
