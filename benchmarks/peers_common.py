"""What all tools of `peers.py` share: the model folder, the prompt files, environments, runs with times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SETTING = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    # Nothing is taken from an earlier run.
    "SABER_CACHE": "off",
    # One thread each: processor time is then what a tool takes, whatever else the machine does. The limit
    # holds for tools that set the number of threads themselves.
    "OMP_NUM_THREADS": "1",
    "OMP_THREAD_LIMIT": "1",
    "MKL_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Workplace:
    """Where the comparison's files lie."""

    out: Path
    """Folder of everything."""

    @property
    def model(self) -> Path:
        """The untouched model, a float32 transformers folder."""
        return self.out / "base"

    def prompts(self, name: str) -> Path:
        """A text file, one prompt a line."""
        return self.out / "prompts" / f"{name}.txt"


@dataclass(frozen=True)
class Outcome:
    """One edited model and what it cost."""

    tool: str
    """Name and version."""
    settings: str
    """What was set, in a line."""
    budget: float
    """Processor time that was aimed at, seconds; 0 where the tool was not given one."""
    seconds: float
    """Wall time from the start of the tool to its saved model; other work on the machine adds to it."""
    cpu_seconds: float
    """Processor time of the same, one thread."""
    search_share: float
    """The share of it that went into finding and making the edit, 0 to 1."""
    model: str
    """The edited model's folder, relative to the folder of everything."""
    own: dict[str, Any] = field(default_factory=dict)
    """What the tool says of the result itself."""

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Outcome:
        """Read it back."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def prepare(place: Workplace, model: str) -> None:
    """Write the model folder and the prompt files that are not there yet."""
    from saber import artifacts
    from saber.config import preset
    from saber.gathering import gather
    from saber.lm.load import LoadSpec, load

    place.prompts("x").parent.mkdir(parents=True, exist_ok=True)
    chosen = gather(preset("default")).selecting
    sets = {
        "target_fit": chosen.target,
        "target_validation": chosen.target_validation,
        "neutral_fit": chosen.neutral,
        "neutral_validation": chosen.neutral_validation,
    }
    for name, prompts in sets.items():
        # Fit prompts stand sorted by category; a tool that reads only the first ones would see few.
        texts = interleaved(prompts.texts, prompts.categories)
        place.prompts(name).write_text("".join(f"{one_line(t)}\n" for t in texts), encoding="utf-8")
    for kind in ("target", "neutral"):
        both = (place.prompts(f"{kind}_{part}").read_text("utf-8") for part in ("fit", "validation"))
        place.prompts(kind).write_text("".join(both), encoding="utf-8")
    if not place.model.exists():
        lm = load(model, LoadSpec(device="cpu", dtype="float32"))
        with artifacts.staged_folder(place.model) as part:
            lm.model.save_pretrained(part)
            lm.tokenizer.save_pretrained(part)


def interleaved(texts: Sequence[str], categories: Sequence[str]) -> list[str]:
    """Return the texts so that every stretch of them holds all categories alike."""
    queues: dict[str, list[str]] = {}
    for text, category in zip(texts, categories, strict=True):
        queues.setdefault(category, []).append(text)
    ranked = [
        ((i + 0.5) / len(queue), text) for queue in queues.values() for i, text in enumerate(queue)
    ]
    return [text for _, text in sorted(ranked, key=lambda pair: pair[0])]


def one_line(text: str) -> str:
    """Return the text without line breaks, which would make two prompts of it."""
    return " ".join(text.split())


def system_prompt(place: Workplace) -> str:
    """Return the system text that the chat template puts in by itself, so that all tools see the same tokens.

    Both peers put in one of their own otherwise, and would be measured on other prompts than they were
    tuned on. Raises `SystemExit` when the template has none that can be told.
    """
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(place.model)

    def rendered(*messages: tuple[str, str]) -> str:
        listed = [{"role": role, "content": text} for role, text in messages]
        return str(tokenizer.apply_chat_template(listed, tokenize=False))

    marked, alone = rendered(("system", "\0"), ("user", "\1")), rendered(("user", "\1"))
    before, _, after = marked.partition("\0")
    if alone.startswith(before) and alone.endswith(after) and len(alone) >= len(before + after):
        found = alone[len(before) : len(alone) - len(after)]
        if rendered(("system", found), ("user", "x")) == rendered(("user", "x")):
            return found
    raise SystemExit("peers: the chat template's own system text cannot be told from its output.")


def environment(place: Workplace, name: str, torch: str, package: str) -> Path:
    """Make a virtual environment with torch and a peer, once; return its folder."""
    folder = place.out / "environments" / name
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet"]
        for wanted in (torch, package):
            subprocess.run([*pip, "--disable-pip-version-check", wanted], check=True)
        (folder / "ready").touch()
    return folder


def version_of(folder: Path, package: str) -> str:
    """Return the version of an installed package of an environment."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    command = [str(folder / "bin/python"), "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@dataclass(frozen=True)
class Cost:
    """What a program took."""

    seconds: float
    """Wall time."""
    cpu_seconds: float
    """Processor time of all threads."""


def timed(command: Sequence[str], cwd: Path, log: Path) -> Cost:
    """Run a command to its end, its output into a log; raises `SystemExit` on failure."""
    start = time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, **SETTING},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        # Others may run at the same time, so this one's processor time is asked for with its end.
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"peers: {command[0]} failed with {process.returncode}; see {log}.")
    return Cost(time.perf_counter() - start, used.ru_utime + used.ru_stime)
