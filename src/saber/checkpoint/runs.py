"""A finished run as exports read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saber import artifacts
from saber.ablation import EditPlan
from saber.checkpoint.sketch import Sketch
from saber.errors import DataError

RUN, PLAN, SKETCH = "run.json", "plan", "sketch"


@dataclass(frozen=True)
class Run:
    """A finished run: what was found, and on which model."""

    record: Mapping[str, Any]
    """`run.json`."""
    plan: EditPlan
    """The edit."""
    sketch: Sketch | None
    """Samples of the weights before the edit; runs of older versions have none."""
    folder: Path | None = None
    """Where it lies; None for a run of which nothing is on the disk."""

    @classmethod
    def load(cls, folder: Path) -> Run:
        """Read a run folder; raises `DataError` where there is none, or none with a plan."""
        if not (folder / RUN).is_file():
            what = "is not finished" if (folder / "state.json").is_file() else "is no run folder"
            raise DataError(
                f"{folder} {what}: it has no {RUN}.", "Give a folder that saber run wrote."
            )
        if not (folder / PLAN / artifacts.META).is_file():
            raise DataError(
                f"the run in {folder} has no plan, so there is nothing to export.",
                "Give a run that edited its model.",
            )
        plan = EditPlan.load(folder / PLAN)
        if not plan.factors:
            raise DataError(f"the plan in {folder / PLAN} changes nothing.")
        sketch = Sketch.load(folder / PLAN / SKETCH)
        return cls(artifacts.read_json(folder / RUN), plan, sketch, folder)

    @property
    def model(self) -> Mapping[str, Any]:
        """What `run.json` says of the model: name, source, base, fingerprint, ..."""
        found: Mapping[str, Any] = self.record["model"]
        return found
