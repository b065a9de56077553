"""The folder of a run: kept clear of what is not its own, and taken up again where a run was cut off."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
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
from saber.report import ANSWERS
from saber.spectral import Direction
from saber.strength import Shown, Trial

STATE, PASSES = "state.json", "passes"


@dataclass(frozen=True)
class Files:
    """What a kind of work writes to its folder."""

    one: str
    """What it is called, with its article."""
    record: str
    """The file that marks it as finished."""
    state: str
    """The file that marks it as begun."""
    others: frozenset[str]
    """All else, but for passes and plots."""

    @property
    def what(self) -> str:
        """What it is called."""
        return self.one.split()[1]

    @property
    def ours(self) -> frozenset[str]:
        """Return the names of all of it."""
        return self.others | {self.record, self.state, PASSES, "plots"}


RUNS = Files(
    "a run",
    RUN,
    STATE,
    frozenset({PLAN, ANSWERS, "report.html", "README.md", *PLACES.values()}),
)
AUDITS = Files("an audit", "audit.json", "audit-state.json", frozenset({"audit.md"}))


def prepare_folder(
    out: Path, model: str = "", *, overwrite: bool, resume: bool, files: Files = RUNS
) -> None:
    """Make the folder of a run, or of an audit, usable before any work is done; raises `OutputError`.

    Only a folder that one has marked as its own is gone on with or replaced, and none with `model` in it.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"--out {out} is a file.", "Choose a folder.")
    if model:
        artifacts.require_apart(out, model)
    if out.is_dir() and any(not _is_part(p.name) for p in out.iterdir()):
        finished, begun = _is_marked(out / files.record), _is_marked(out / files.state)
        if not (finished or begun):
            raise OutputError(
                f"--out {out} is not empty and holds no {files.what}{' to resume' if resume else ''}.",
                f"Choose another folder; --overwrite replaces {files.what}s alone.",
            )
        if resume and finished:
            more = " What it lacks of exports, saber export writes." if files is RUNS else ""
            raise OutputError(
                f"the {files.what} in {out} is finished.", f"There is nothing to resume.{more}"
            )
        if not resume:
            if not overwrite:
                what, ways = (
                    (f"a finished {files.what}", "--overwrite")
                    if finished
                    else (f"an interrupted {files.what}", "--resume, or --overwrite")
                )
                raise OutputError(f"--out {out} holds {what}.", f"Choose another, or {ways}.")
            _remove(out, files)
    artifacts.require_writable(out)


def _is_part(name: str) -> bool:
    """Whether a name is that of a file that was being written."""
    return name.startswith(".") and name.endswith(".part")


def _is_marked(path: Path) -> bool:
    """Whether a file is one that marks a folder, such as `run.json`, and not somebody else's."""
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


def abandon(out: Path, files: Files = RUNS) -> None:
    """Take away what was needed to resume, and the folder where it is empty then."""
    shutil.rmtree(out / PASSES, ignore_errors=True)
    (out / files.state).unlink(missing_ok=True)
    with suppress(OSError):  # of other files, which stay
        out.rmdir()


def _remove(out: Path, files: Files) -> None:
    """Remove a former run's or audit's files; refuse a folder that holds anything that is not ours."""
    foreign = sorted(
        p.name for p in out.iterdir() if p.name not in files.ours and not _is_part(p.name)
    ) + artifacts.foreign_plots(out)
    if foreign:
        raise OutputError(
            f"--out {out} holds files that are not {files.one}'s ({', '.join(foreign[:3])}).",
            f"Choose another folder; --overwrite replaces {files.what}s alone.",
        )
    if (out / files.record).exists():
        # What is left when this is cut off is an unfinished one's, and still marked as such.
        os.replace(out / files.record, out / files.state)
    for path in sorted(out.iterdir(), key=lambda p: p.name == files.state):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def resume_state(out: Path, identity: dict[str, Any], files: Files = RUNS) -> list[Pass]:
    """Return the finished passes of an interrupted run or audit of the very same configuration."""
    if not (out / files.state).exists():
        return []
    state = artifacts.read_json(out / files.state)
    if state != identity:
        words = {"prompts": "set of prompts", "template": "chat template"}
        changed = [words.get(k, k) for k in identity if state.get(k) != identity[k]]
        raise UsageError(
            f"the {files.what} in {out} was made with another {' and '.join(changed)}.",
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
