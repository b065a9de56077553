"""Run SABER itself on the same folder, as a user would: defaults, evaluation and report included."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence

from peers_common import Outcome, Workplace, timed

from saber import __version__


def run(place: Workplace, budgets: Sequence[float], torch: str) -> Iterator[Outcome]:
    """Run the default preset; its time is what it takes, so budgets and torch are not read."""
    folder = place.out / "saber"
    options = ["run", str(place.model.resolve()), "--device", "cpu", "--overwrite"]
    line = [sys.executable, "-m", "saber.cli.main", *options, "--out", str(folder.resolve())]
    cost = timed(line, place.out, place.out / "saber.txt")
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    stages = record["seconds"]
    yield Outcome(
        tool=f"SABER {__version__}",
        settings=f"defaults, {record['directions_ablated']} directions",
        budget=0.0,
        seconds=cost.seconds,
        cpu_seconds=cost.cpu_seconds,
        search_share=(stages["total"] - stages["evaluate"]) / cost.seconds,
        model=f"{folder.name}/model",
        own={"seconds": stages},
    )
