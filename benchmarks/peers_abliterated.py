"""Run Tema_Q-Abliterated (temaq-abliterated, MIT) as a separate program; it takes a time budget itself.

Its budget covers the search alone. A first short run tells what the rest costs (loading, directions, and
generating answers to verify its candidates), and is not charged.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from peers_common import Cost, Outcome, Workplace, environment, system_prompt, timed, version_of

PACKAGE = "temaq-abliterated==1.1.1"
LEAST_SEARCH = 30.0


def command(place: Workplace, program: Path, folder: Path, search_seconds: float) -> list[str]:
    """Return the command line: local files, float32, no question asked."""
    fixed = {
        "--config": folder / "settings.toml",
        "--workdir": folder / "work",
        "--output": folder / "model",
        "--device": "cpu",
        "--eval-dtype": "float32",
        "--harmful-file": place.prompts("target"),
        "--harmless-file": place.prompts("neutral"),
        "--select": "auto",
        "--seed": "0",
        "--time-budget-min": f"{search_seconds / 60:.3f}",
    }
    paths = [str(v.resolve()) if isinstance(v, Path) else str(v) for v in fixed.values()]
    options = [item for pair in zip(fixed, paths, strict=True) for item in pair]
    return [str(program.absolute()), str(place.model.resolve()), *options, "--restart"]


def searched(place: Workplace, folder: Path, search_seconds: float) -> tuple[Cost, dict[str, Any]]:
    """Run it; return its cost and the tool's own record."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    text = f"system_prompt = {json.dumps(system_prompt(place))}\n"
    (folder / "settings.toml").write_text(text, encoding="utf-8")
    program = place.out / "environments/abliterated/bin/temaq-abliterated"
    line = command(place, program, folder, search_seconds)
    cost = timed(line, folder, folder / "log.txt")
    if not (folder / "model/config.json").exists():
        raise SystemExit(f"peers: temaq-abliterated saved no model; see {folder / 'log.txt'}.")
    return cost, json.loads((folder / "work/report/run_summary.json").read_text("utf-8"))


def rest_seconds(place: Workplace) -> float:
    """Return what it takes beside the search, from one short run."""
    path = place.out / "abliterated-calibration.json"
    if not path.exists():
        folder = place.out / "abliterated-calibration"
        cost, record = searched(place, folder, LEAST_SEARCH)
        path.write_text(json.dumps(cost.seconds - record["search_seconds"]) + "\n", encoding="utf-8")
    return float(json.loads(path.read_text(encoding="utf-8")))


def run(place: Workplace, budget: float, torch: str) -> list[Outcome]:
    """Search for what the budget leaves beside the rest; return the one outcome."""
    version = version_of(environment(place, "abliterated", torch, PACKAGE), "temaq-abliterated")
    wanted = max(LEAST_SEARCH, budget - rest_seconds(place))
    folder = place.out / f"abliterated-{budget:.0f}"
    cost, record = searched(place, folder, wanted)
    return [outcome(version, budget, wanted, cost, record, folder.name)]


def outcome(
    version: str, budget: float, wanted: float, cost: Cost, record: dict[str, Any], folder: str
) -> Outcome:
    """Return the outcome that its record tells of."""
    ended = "stopped by its time budget" if record["budget_stopped"] else "ended by itself"
    return Outcome(
        tool=f"temaq-abliterated {version}",
        settings=f"{record['attempts']} trials, {wanted:.0f} s for the search ({ended}), its own pick",
        budget=budget,
        seconds=cost.seconds,
        search_seconds=record["search_seconds"],
        cpu_seconds=cost.cpu_seconds,
        model=f"{folder}/model",
        own={
            name: record[name]
            for name in ("best_metrics", "final_refusal_full_generation", "kl_final", "candidates")
        },
    )
