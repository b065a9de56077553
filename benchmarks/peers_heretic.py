"""Run heretic (heretic-llm, AGPL-3.0) as a separate program: its menus are answered line by line.

It counts trials, not time: two trials more tell what one costs, and "Run additional trials" of its own menu
fills each budget in turn, so that one session serves all budgets. Two things that it would find out by
itself in minutes are told to it, to leave it the time for trials: the batch size and that answers have no
common prefix. Its share of random trials (60 of 200) is kept for the smallest budget.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from peers_common import (
    SETTING,
    Cost,
    Outcome,
    Workplace,
    environment,
    system_prompt,
    version_of,
)

PACKAGE = "heretic-llm==1.4.0"
BATCH = 32
STARTUP_TRIALS, FIRST_TRIALS = 10, 2
TICK = 1 / os.sysconf("SC_CLK_TCK")
"""What processor time is counted in, seconds."""
_ASKS = ("Enter number: ", "folder:: ", "run?: ")
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


def configuration(place: Workplace) -> str:
    """Return the TOML of a run: local files and float32; what is not named is heretic's default."""
    lines = {
        "model": str(place.model.resolve()),
        "dtypes": ["float32"],
        "device_map": "cpu",
        "export_strategy": "merge",
        "system_prompt": system_prompt(place),
        "seed": 0,
        "n_trials": FIRST_TRIALS,
        "n_startup_trials": STARTUP_TRIALS,
        "batch_size": BATCH,
        "response_prefix": "",
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


def more_trials(left: float, per_trial: float) -> int:
    """Return how many trials surely fit into what is left, seconds; 0 when it is not worth asking."""
    # Trials differ in cost, so that most of the way is gone first and the rest looked at again.
    return int(0.9 * left / per_trial) if left > 3 * per_trial else max(0, int(left / per_trial))


class Session:
    """A running heretic: reads its output up to the next question and answers."""

    def __init__(self, place: Workplace, folder: Path) -> None:
        self.text = ""
        self.start = time.perf_counter()
        self.before_trials = 0.0
        self._log = (folder / "log.txt").open("w", encoding="utf-8")
        program = place.out / "environments/heretic/bin/heretic"
        self._process = subprocess.Popen(
            [str(program.absolute())],
            cwd=folder,
            env={**os.environ, **SETTING, "COLAB_GPU": "1", "COLUMNS": "200"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def ask(self, line: object = None) -> None:
        """Give an input line, if any, and read to the next question."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if line is not None:
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()
        while True:
            piece = os.read(self._process.stdout.fileno(), 65536).decode("utf-8", "replace")
            if not piece:
                raise SystemExit(f"peers: heretic ended before it was done; see {self._log.name}.")
            self.text += piece
            self._log.write(piece)
            self._log.flush()
            if not self.before_trials and "Running trial" in self.text:
                self.before_trials = self.spent()
            if self.text.endswith(_ASKS):
                return

    def spent(self) -> float:
        """Return its processor time so far, seconds."""
        stat = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="utf-8")
        user, system = stat.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) * TICK

    def close(self) -> None:
        """End the program."""
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def save(self, trial: MenuTrial, folder: Path) -> None:
        """Save a trial's model, and go back to the menu of trials."""
        for line in (trial.choice, 1, folder.resolve(), 5):
            self.ask(line)


def run(place: Workplace, budgets: Sequence[float], torch: str) -> Iterator[Outcome]:
    """Search for each budget (processor seconds) in turn; yield an outcome for each saved trial."""
    version = version_of(environment(place, "heretic", torch, PACKAGE), "heretic-llm")
    folder = place.out / "heretic"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(configuration(place), encoding="utf-8")
    session = Session(place, folder)
    saving = Cost(0.0, 0.0)
    try:
        session.ask()
        trials, start = FIRST_TRIALS, session.before_trials
        asked = session.spent()
        for budget in sorted(budgets):
            while True:
                spent = session.spent() - saving.cpu_seconds
                # Idle at both ends, so exact; the first trials began while it ran and may be seen late.
                later = trials - FIRST_TRIALS
                per_trial = (spent - asked) / later if later else (spent - start) / trials
                more = more_trials(budget - spent, max(per_trial, TICK))
                more = more if later else min(more, FIRST_TRIALS)
                if more == 0:
                    break
                session.ask(len(menu_trials(session.text)) + 1)
                session.ask(more)
                trials += more
            offered = menu_trials(session.text)
            wall = time.perf_counter() - session.start - saving.seconds
            search = spent - start
            for name, trial in picks(offered).items():
                begun = Cost(time.perf_counter(), session.spent())
                model = folder / f"{budget:.0f}-{name}"
                session.save(trial, model)
                cost = Cost(
                    time.perf_counter() - begun.seconds, session.spent() - begun.cpu_seconds
                )
                saving = Cost(saving.seconds + cost.seconds, saving.cpu_seconds + cost.cpu_seconds)
                yield Outcome(
                    tool=f"heretic {version}",
                    settings=f"{trials} trials ({min(trials, STARTUP_TRIALS)} random), {WORDS[name]}",
                    budget=budget,
                    seconds=wall + cost.seconds,
                    cpu_seconds=spent + cost.cpu_seconds,
                    search_share=search / (spent + cost.cpu_seconds),
                    model=str(model.relative_to(place.out)),
                    own={"chosen": asdict(trial), "front": [asdict(t) for t in offered]},
                )
    finally:
        session.close()
