"""What a grid costs with shared work, without it, and as single runs (Markdown).

    python benchmarks/sweep.py [--model demo] [--out runs/sweep] [--minutes 7] [--singles 10:0.85] [OPTIONS]

Makes the card's grid (4 x 3 settings, 5 passes each) with `saber sweep`, in pieces of --minutes
until it is done, and `saber run` for each of --singles; what is there already is used again. OPTIONS go
to both as they are. Tokens
are those that went through the model, counted by the library itself. "Without sharing" is the same
trials, each alone: what every one spent and what another's results spared it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

TOP_K, ALPHA = "10,25,50,75", "0.7,0.85,1.0"


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--preset", default="card")
    parser.add_argument("--top-k", default=TOP_K)
    parser.add_argument("--alpha", default=ALPHA)
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--singles", nargs="*", default=["10:0.85"], metavar="TOP_K:ALPHA")
    parser.add_argument("--minutes", default="0")
    given, options = parser.parse_known_args()
    common = [given.model, "--preset", given.preset, *options]
    done = read(given.out / "sweep.json")
    while not done or done["left"]:
        axes = ["--top-k", given.top_k, "--alpha", given.alpha]
        saber("sweep", *common, *axes, "--out", given.out, "--resume", "--minutes", given.minutes)
        done = read(given.out / "sweep.json")
    singles = []
    for text in given.singles:
        top_k, _, alpha = text.partition(":")
        folder = given.out.with_name(f"{given.out.name}-single-{top_k}-{alpha}")
        if not (folder / "run.json").exists():
            some = ["--top-k", top_k, "--alpha", alpha, "--out", folder, "--overwrite"]
            saber("run", *common, *some, "--export", "none")
        singles.append(read(folder / "run.json"))
    print(table(done, [s for s in singles if s]))


def saber(*arguments: Any) -> None:
    """Run a command of this installation."""
    command = [sys.executable, "-m", "saber.cli.main", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def read(path: Path) -> dict[str, Any] | None:
    """Return a record, or None where there is none yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def table(sweep: dict[str, Any], singles: list[dict[str, Any]]) -> str:
    """Return the table: tokens and seconds of the three ways to make the grid."""
    work, n = sweep["work"], len(sweep["trials"])
    around = work["preparing"] + work["heldout"]
    rows = [("sweep, shared work", work["tokens"] + around, work["seconds"])]
    alone = work["tokens"] + work["shared"] + around - work["prepared"]
    rows.append(("the same trials, nothing shared", alone, None))
    if singles:
        tokens = n * sum(s["work"]["tokens"] for s in singles) / len(singles)
        seconds = n * sum(s["seconds"]["total"] for s in singles) / len(singles)
        rows.append((f"{n} single runs (mean of {len(singles)} x {n})", tokens, seconds))
    last = rows[-1]
    lines = ["| way | tokens | share | seconds | share |", "|---|---:|---:|---:|---:|"]
    for name, tokens, seconds in rows:
        time = ["", ""]
        if seconds is not None and last[2]:
            time = [f"{seconds:,.0f}", f"{seconds / last[2]:.0%}"]
        lines.append(f"| {name} | {tokens:,.0f} | {tokens / last[1]:.0%} | {' | '.join(time)} |")
    lines.append("")
    lines.append(
        f"Of the sweep: {work['tokens']:,} tokens for {n} settings, {work['preparing']:,} before the "
        f"first (baseline included, once), {work['heldout']:,} to report the chosen one on held-out prompts."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
