"""Run Tema_Q-Abliterated (temaq-abliterated, MIT) as a separate program; it takes a time budget itself.

Its budget is wall time and covers the search alone. The smallest budget is split by a guess; that run tells
what the rest costs (loading, directions, and answers to verify its candidates), and how much wall time a
second of processor time takes just now. A larger budget goes on from the checkpoint of the one before, as
the tool does by itself when it is started again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from peers_common import Cost, Outcome, Workplace, environment, system_prompt, timed, version_of

PACKAGE = "temaq-abliterated==1.1.1"
FIRST_SHARE, LEAST_SEARCH = 0.4, 20.0


def command(place: Workplace, folder: Path, model: Path, search_seconds: float) -> list[str]:
    """Return the command line: local files, float32, no question asked, as many trials as time allows."""
    options = {
        "--config": folder / "settings.toml",
        "--workdir": folder / "work",
        "--output": model,
        "--device": "cpu",
        "--eval-dtype": "float32",
        "--harmful-file": place.prompts("target"),
        "--harmless-file": place.prompts("neutral"),
        "--select": "auto",
        "--seed": 0,
        "--trials": 10_000,
        "--time-budget-min": f"{search_seconds / 60:.3f}",
    }
    program = place.out / "environments/abliterated/bin/temaq-abliterated"
    line = [program.absolute(), place.model.resolve()]
    for name, value in options.items():
        line += [name, value.resolve() if isinstance(value, Path) else value]
    return [str(item) for item in line]


def run(place: Workplace, budgets: Sequence[float], torch: str) -> Iterator[Outcome]:
    """Search within each budget in turn; yield an outcome for each."""
    version = version_of(environment(place, "abliterated", torch, PACKAGE), "temaq-abliterated")
    folder = place.out / "abliterated"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    text = f"system_prompt = {json.dumps(system_prompt(place))}\n"
    (folder / "settings.toml").write_text(text, encoding="utf-8")
    spent, searched, rest, slowness = Cost(0.0, 0.0), 0.0, 0.0, 1.0
    for budget in sorted(budgets):
        left = budget - spent.cpu_seconds - rest if searched else FIRST_SHARE * budget
        wanted = slowness * left
        model, log = folder / f"model-{budget:.0f}", folder / f"log-{budget:.0f}.txt"
        cost = timed(command(place, folder, model, max(LEAST_SEARCH, wanted)), folder, log)
        if not (model / "config.json").exists():
            raise SystemExit(f"peers: temaq-abliterated saved no model; see {log}.")
        record = json.loads((folder / "work/report/run_summary.json").read_text("utf-8"))
        spent = Cost(spent.seconds + cost.seconds, spent.cpu_seconds + cost.cpu_seconds)
        searched += record["search_seconds"]
        slowness = cost.seconds / cost.cpu_seconds
        rest = (cost.seconds - record["search_seconds"]) / slowness
        yield outcome(version, budget, spent, searched, record, str(model.relative_to(place.out)))


def pick(record: dict[str, Any]) -> str:
    """Say what the exported trial is to the tool."""
    if verified := len(record["candidates"]):
        return f"its own pick of {verified} that it verified"
    return "its own pick, unverified: none passed its gate"


def outcome(
    version: str, budget: float, cost: Cost, searched: float, record: dict[str, Any], model: str
) -> Outcome:
    """Return the outcome that the tool's own record tells of."""
    return Outcome(
        tool=f"temaq-abliterated {version}",
        settings=f"{record['attempts']} trials, {pick(record)}",
        budget=budget,
        seconds=cost.seconds,
        cpu_seconds=cost.cpu_seconds,
        search_share=searched / cost.seconds,
        model=model,
        own={
            name: record[name]
            for name in ("best_metrics", "final_refusal_full_generation", "kl_final", "candidates")
        },
    )
