"""SABER beside the tools of its kind that install from a package index: same model, prompts and ruler.

    python benchmarks/peers.py [--tools saber heretic abliterated] [--budget-seconds 300] [--out runs/peers]

Each peer gets an environment of its own and runs as a program of its own, offline, on the CPU, in float32,
one thread, at its own defaults, for about the processor time of SABER's whole run and for four times as long.
All tools see the same fit and validation prompts and none sees the held-out ones, on which all models are
measured alike.
What is finished in --out is not run again unless --again is given; so one tool's rows can be made anew:

    python benchmarks/peers.py --tools saber --again
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peers_abliterated
import peers_common
import peers_heretic
import peers_ruler
import peers_saber
from peers_common import Outcome, Workplace

TOOLS: Mapping[str, Callable[[Workplace, Sequence[float], str], Iterator[Outcome]]] = {
    "heretic": peers_heretic.run,
    "abliterated": peers_abliterated.run,
    "saber": peers_saber.run,
}
OUTCOME, MEASURED, RESULT = ".outcome.json", ".measured.json", "peers.json"


def main() -> None:
    """Run what is missing, measure what is not measured, print the table."""
    given = arguments()
    place = Workplace(given.out)
    place.out.mkdir(parents=True, exist_ok=True)
    peers_common.prepare(place, given.model)
    budgets = [factor * given.budget_seconds for factor in given.factors]
    waiting = [n for n in given.tools if given.again or not any(place.out.glob(f"{n}.*{OUTCOME}"))]

    def run(name: str) -> None:
        forget(place, name)
        for i, outcome in enumerate(TOOLS[name](place, budgets, given.torch)):
            outcome.save(place.out / f"{name}.{i}{OUTCOME}")

    # Each has one thread and is a process of its own, so they need not wait for each other.
    with ThreadPoolExecutor(max(1, given.jobs)) as pool:
        list(pool.map(run, waiting))
    outcomes = {path: Outcome.load(path) for path in sorted(place.out.glob(f"*{OUTCOME}"), key=rank)}
    measured = {path: path.with_name(path.name.replace(OUTCOME, MEASURED)) for path in outcomes}
    if given.measure:
        unmeasured = {
            place.out / outcomes[path].model: result
            for path, result in measured.items()
            if given.measure_again or not result.exists()
        }
        peers_ruler.measure_all(place.model, unmeasured, place.out / peers_ruler.BASELINE)
        report(place, outcomes, measured)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tools", nargs="+", choices=list(TOOLS), default=list(TOOLS))
    parser.add_argument("--budget-seconds", type=float, default=300.0)
    parser.add_argument("--factors", nargs="+", type=float, default=[1.0, 4.0])
    parser.add_argument("--jobs", type=int, default=2, help="tools that run at once (default: 2)")
    parser.add_argument("--model", default="demo", help="what is edited (default: demo)")
    parser.add_argument("--torch", default="torch==2.13.0", help="which torch the peers get")
    parser.add_argument("--out", type=Path, default=Path("runs/peers"))
    parser.add_argument("--again", action="store_true", help="run --tools even where finished")
    parser.add_argument("--measure-again", action="store_true", help="measure all models anew")
    parser.add_argument(
        "--no-measure", dest="measure", action="store_false", help="run only; measure another time"
    )
    return parser.parse_args()


def rank(path: Path) -> tuple[bool, str]:
    """SABER first, then by name."""
    return not path.name.startswith("saber"), path.name


def forget(place: Workplace, name: str) -> None:
    """Remove a tool's rows."""
    for path in [*place.out.glob(f"{name}.*{OUTCOME}"), *place.out.glob(f"{name}.*{MEASURED}")]:
        path.unlink()


def report(place: Workplace, outcomes: Mapping[Path, Outcome], measured: Mapping[Path, Path]) -> None:
    """Write everything as JSON and print the table."""

    def read(path: Path) -> Any:
        return json.loads(path.read_text(encoding="utf-8"))

    baseline = read(place.out / peers_ruler.BASELINE)
    rows = [{**asdict(o), **read(measured[path])} for path, o in outcomes.items()]
    result = {"baseline": baseline, "rows": rows}
    (place.out / RESULT).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(peers_ruler.table(baseline, rows))


if __name__ == "__main__":
    main()
