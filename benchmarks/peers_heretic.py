"""Run heretic (heretic-llm, AGPL-3.0) as a separate program: its menus are answered line by line.

It tunes by trials, not by time, so a run of two trials first tells what one costs; the batch size and
the answers' common prefix that it finds there are given to the real run, which then spends its time on
trials. That first run is not charged.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from peers_common import (
    OFFLINE,
    Outcome,
    Workplace,
    environment,
    processor_seconds,
    system_prompt,
    version_of,
)

PACKAGE = "heretic-llm==1.4.0"
DEFAULT_TRIALS, DEFAULT_STARTUP = 200, 60
_ASKS = ("Enter number: ", "folder:: ")
_MARKS = (
    "Determining optimal batch size",
    "Loading good evaluation prompts",
    "Running trial",
    "Optimization finished",
)
WORDS = {"fewest": "fewest refusals", "balanced": "the least sum of refusal rate and KL"}
_TRIAL = re.compile(
    r"\[(\d+)\] \[Trial +(\d+)\] Refusals: +(\d+)/(\d+), KL divergence: +([\d.]+)"
)


@dataclass(frozen=True)
class MenuTrial:
    """A trial that heretic offers."""

    choice: int
    """Its number in the menu."""
    trial: int
    """Its number in the search."""
    refusals: int
    """Answers to validation targets that heretic calls refusals."""
    prompts: int
    """Out of so many."""
    kl: float
    """Its divergence, first token of answers to validation neutral prompts, nats."""


@dataclass(frozen=True)
class Calibration:
    """What a first short run tells."""

    batch_size: int
    """The batch size that heretic found fastest."""
    prefix: str
    """What all answers open with."""
    around: float
    """Seconds before the first trial and after the last."""
    per_trial: float
    """Seconds a trial."""

    def trials(self, budget: float) -> int:
        """Return how many trials fill the budget."""
        return max(4, round((budget - self.around) / self.per_trial))


def menu_trials(text: str) -> list[MenuTrial]:
    """Return the trials of the last menu in the output, in its order: fewest refusals first."""
    tail = text[text.rindex("Which trial do you want to use?") :]
    return [
        MenuTrial(int(c), int(t), int(r), int(n), float(kl)) for c, t, r, n, kl in _TRIAL.findall(tail)
    ]


def picks(offered: Sequence[MenuTrial]) -> dict[str, MenuTrial]:
    """Return the trials to save, by name.

    heretic leaves the choice to its user. Saved are the one with fewest refusals and, where it is
    another, the one with the least sum of the two scores that heretic minimises.
    """
    fewest = offered[0]
    balanced = min(offered, key=lambda t: t.refusals / t.prompts + t.kl)
    return {"fewest": fewest} if balanced == fewest else {"fewest": fewest, "balanced": balanced}


def configuration(place: Workplace, values: dict[str, object]) -> str:
    """Return the TOML of a run: local files, float32, and the given values."""
    lines = {
        "model": str(place.model.resolve()),
        "dtypes": ["float32"],
        "device_map": "cpu",
        "export_strategy": "merge",
        "system_prompt": system_prompt(place),
        "seed": 0,
        **values,
    }
    # A JSON string, number or list of strings is a TOML one too.
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in lines.items())
    for name, part in (
        ("good_prompts", "neutral_fit"),
        ("bad_prompts", "target_fit"),
        ("good_evaluation_prompts", "neutral_validation"),
        ("bad_evaluation_prompts", "target_validation"),
    ):
        text += f"\n[{name}]\ndataset = {json.dumps(str(place.prompts(part).resolve()))}\n"
    return text


class Session:
    """A running heretic: reads its output up to the next question and answers."""

    def __init__(self, program: Path, folder: Path) -> None:
        self.start = time.perf_counter()
        self.text = ""
        self.seen: dict[str, float] = {}
        self._log = (folder / "log.txt").open("w", encoding="utf-8")
        self._process = subprocess.Popen(
            [str(program.absolute())],
            cwd=folder,
            env={**os.environ, **OFFLINE, "COLAB_GPU": "1", "COLUMNS": "200"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def until_asked(self) -> None:
        """Read to the next question; note when the phases of the search began."""
        assert self._process.stdout is not None
        while True:
            piece = os.read(self._process.stdout.fileno(), 65536).decode("utf-8", "replace")
            if not piece:
                raise SystemExit(f"peers: heretic ended before it was done; see {self._log.name}.")
            self.text += piece
            self._log.write(piece)
            self._log.flush()
            for mark in _MARKS:
                if mark in self.text:
                    self.seen.setdefault(mark, time.perf_counter() - self.start)
            if self.text.endswith(_ASKS):
                return

    def answer(self, line: object) -> None:
        """Give an input line."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())
        self._process.stdin.flush()

    def close(self) -> None:
        """End the program."""
        self._process.kill()
        self._process.wait()
        self._log.close()


def search(place: Workplace, folder: Path, values: dict[str, object]) -> tuple[Session, dict[str, float]]:
    """Run a search and save the picks to `folder`/NAME; return the session and when each was saved."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(configuration(place, values), encoding="utf-8")
    session = Session(place.out / "environments/heretic/bin/heretic", folder)
    try:
        session.until_asked()
        saved: dict[str, float] = {}
        leave = 0
        for name, trial in picks(menu_trials(session.text)).items():
            if leave:
                session.answer(leave)
                session.until_asked()
            session.answer(trial.choice)
            session.until_asked()
            session.answer(1)
            session.until_asked()
            session.answer((folder / name).resolve())
            session.until_asked()
            saved[name] = time.perf_counter() - session.start
            leave = 5
    finally:
        session.close()
    return session, saved


def calibrate(place: Workplace) -> Calibration:
    """Run two trials, once, and read what they cost."""
    path = place.out / "heretic-calibration.json"
    if path.exists():
        return Calibration(**json.loads(path.read_text(encoding="utf-8")))
    folder = place.out / "heretic-calibration"
    session, saved = search(place, folder, {"n_trials": 2, "n_startup_trials": 2})
    batch = re.search(r"Chosen batch size: (\d+)", session.text)
    prefix = re.search(r"Prefix found: '(.*)'", session.text)
    sizing, measured, begun, ended = (session.seen[mark] for mark in _MARKS)
    # Finding batch size and prefix is not paid again; loading and the rest is.
    found = Calibration(
        int(batch.group(1)) if batch else 0,
        prefix.group(1) if prefix else "",
        begun - (measured - sizing) + saved["fewest"] - ended,
        (ended - begun) / 2,
    )
    path.write_text(json.dumps(asdict(found)) + "\n", encoding="utf-8")
    return found


def run(place: Workplace, budget: float, torch: str) -> list[Outcome]:
    """Search for about `budget` seconds; return an outcome for each saved trial."""
    version = version_of(environment(place, "heretic", torch, PACKAGE), "heretic-llm")
    known = calibrate(place)
    trials = known.trials(budget)
    # The share of random trials is heretic's own.
    startup = max(2, round(trials * DEFAULT_STARTUP / DEFAULT_TRIALS))
    folder = place.out / f"heretic-{budget:.0f}"
    values: dict[str, object] = {
        "n_trials": trials,
        "n_startup_trials": startup,
        "batch_size": known.batch_size,
        "response_prefix": known.prefix,
    }
    used = processor_seconds()
    session, saved = search(place, folder, values)
    used = processor_seconds() - used
    begun, ended = session.seen["Running trial"], session.seen["Optimization finished"]
    offered = menu_trials(session.text[: session.text.index("Restoring model from trial")])
    return [
        Outcome(
            tool=f"heretic {version}",
            settings=f"{trials} trials ({startup} random), the one with {WORDS[name]}",
            budget=budget,
            # What was saved after the first is there for the table alone.
            seconds=saved["fewest"],
            search_seconds=ended - begun,
            cpu_seconds=used,
            model=str((folder / name).relative_to(place.out)),
            own={"chosen": asdict(trial), "front": [asdict(t) for t in offered]},
        )
        for name, trial in picks(offered).items()
    ]
