"""The folder of a run: kept clear of what is not its own, and taken up again where a run was cut off."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saber import artifacts
from saber.ablation import EditPlan
from saber.checkpoint.export import PLACES
from saber.checkpoint.runs import PLAN, RUN
from saber.entanglement import Entanglement
from saber.errors import (
    DataError,
    OutputError,
    UsageError,
)
from saber.hydra import Compensation
from saber.passes import Candidate, Hydra, Pass
from saber.spectral import Direction
from saber.strength import Shown, Trial

STATE, PASSES = "state.json", "passes"


def prepare_folder(out: Path, model: str = "", *, overwrite: bool, resume: bool) -> None:
    """Make the run folder usable before any work is done; raises `OutputError` when it is not.

    Only a folder that a run has marked as its own is gone on with or replaced, and none with `model` in it.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"--out {out} is a file.", "Choose a folder.")
    if model:
        artifacts.require_apart(out, model)
    if out.is_dir() and any(not _is_part(p.name) for p in out.iterdir()):
        finished, begun = _is_marked(out / RUN), _is_marked(out / STATE)
        if not (finished or begun):
            raise OutputError(
                f"--out {out} is not empty and holds no run{' to resume' if resume else ''}.",
                "Choose another folder; --overwrite replaces runs alone.",
            )
        if resume and finished:
            raise OutputError(
                f"the run in {out} is finished.",
                "There is nothing to resume. What it lacks of exports, saber export writes.",
            )
        if not resume:
            if not overwrite:
                what, ways = (
                    ("a finished run", "--overwrite")
                    if finished
                    else ("an interrupted run", "--resume, or --overwrite")
                )
                raise OutputError(f"--out {out} holds {what}.", f"Choose another, or {ways}.")
            _remove_run(out)
    artifacts.require_writable(out)


def _is_part(name: str) -> bool:
    """Whether a name is that of a file that was being written."""
    return name.startswith(".") and name.endswith(".part")


def _is_marked(path: Path) -> bool:
    """Whether a file is a run's `run.json` or `state.json`, and not somebody else's."""
    if not path.is_file():
        return False
    try:
        found = artifacts.read_json(path)
    except DataError:
        return False
    return "config" in found and bool({"version", "saber_version"} & found.keys())


@contextmanager
def removed_if_empty(out: Path) -> Iterator[None]:
    """Take the folder away again when the block fails and nothing was written to it."""
    try:
        yield
    except BaseException:
        if not any(out.iterdir()):
            out.rmdir()
        raise


def abandon(out: Path) -> None:
    """Take away what a run has left that came to nothing, and the folder where it is empty then."""
    shutil.rmtree(out / PASSES, ignore_errors=True)
    (out / STATE).unlink(missing_ok=True)
    with suppress(OSError):  # of other files, which stay
        out.rmdir()


def _remove_run(out: Path) -> None:
    """Remove a former run's files; refuse a folder that holds anything that is not ours."""
    ours = {RUN, STATE, PLAN, PASSES, "plots", "report.html", "README.md", *PLACES.values()}
    foreign = sorted(
        p.name for p in out.iterdir() if p.name not in ours and not _is_part(p.name)
    ) + artifacts.foreign_plots(out)
    if foreign:
        raise OutputError(
            f"--out {out} holds files that are not a run's ({', '.join(foreign[:3])}).",
            "Choose another folder; --overwrite replaces runs alone.",
        )
    if (out / RUN).exists():
        # What is left when this is cut off is an unfinished run's, and still marked as such.
        os.replace(out / RUN, out / STATE)
    for path in sorted(out.iterdir(), key=lambda p: p.name == STATE):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def resume_state(out: Path, identity: dict[str, Any]) -> list[Pass]:
    """Return the finished passes of an interrupted run of the very same configuration."""
    if not (out / STATE).exists():
        return []
    state = artifacts.read_json(out / STATE)
    if state != identity:
        words = {"prompts": "set of prompts", "template": "chat template"}
        changed = [words.get(k, k) for k in identity if state.get(k) != identity[k]]
        raise UsageError(
            f"the run in {out} was made with another {' and '.join(changed)}.",
            "Give the same arguments, or start anew with --overwrite.",
        )
    done: list[Pass] = []
    while (folder := out / PASSES / str(len(done) + 1)).joinpath(artifacts.META).exists():
        done.append(load_pass(folder))
    return done


def save_pass(folder: Path, this: Pass) -> None:
    """Write a finished pass with its plan."""
    tensors = {
        "patterns": torch.stack([c.direction.pattern for c in this.candidates]),
        "detectors": torch.stack([c.direction.detector for c in this.candidates]),
    }
    plain = dataclasses.asdict(replace(this, plan=EditPlan()))
    del plain["plan"]
    for row in plain["candidates"]:
        del row["direction"]["pattern"], row["direction"]["detector"]
    this.plan.save(folder / PLAN, {"passes": this.index})
    artifacts.save(folder, "pass", tensors, plain)


def load_pass(folder: Path) -> Pass:
    """Read a finished pass; raises `DataError` for one that is damaged."""
    tensors, meta = artifacts.load(folder, "pass")
    try:
        return _pass(tensors, meta, EditPlan.load(folder / PLAN))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DataError(
            f"{folder / artifacts.META} does not hold a whole pass.",
            "Start anew with --overwrite.",
        ) from error


def _pass(tensors: Mapping[str, Tensor], meta: Mapping[str, Any], plan: EditPlan) -> Pass:
    candidates = []
    for i, row in enumerate(meta["candidates"]):
        direction = Direction(
            **row.pop("direction"), pattern=tensors["patterns"][i], detector=tensors["detectors"][i]
        )
        candidates.append(
            Candidate(
                direction=direction, entanglement=Entanglement(**row.pop("entanglement")), **row
            )
        )
    back = meta["hydra"].pop("compensation")
    hydra = Hydra(**meta["hydra"], compensation=Compensation(**back) if back else None)
    numbers = ("index", "log_odds_before", "log_odds_after", "rate_before", "rate_after")
    trials = [
        Trial(**{**row, "shown": Shown(**row["shown"]) if row["shown"] else None})
        for row in meta["trials"]
    ]
    return Pass(
        **{k: meta[k] for k in (*numbers, "incoherent_after", "lost_after", "opening", "late")},
        candidates=tuple(candidates),
        hydra=hydra,
        plan=plan,
        trials=tuple(trials),
        by_answers=meta.get("by_answers", False),
        in_vain=tuple(map(tuple, meta.get("in_vain", ()))),
    )
