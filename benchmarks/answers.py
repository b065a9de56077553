"""Collect answers for a hand-labelled set: the demo model untouched, and edited from weak to overdone.

    python benchmarks/answers.py OUT.jsonl --run RUN [--only SOURCE ...] [--model demo] [--seed 0]

RUN is a finished run on the same model: its plan is taken whole, in part, and several times over, and
so is the plain orthogonal edit. Prompts are those that a run selects on, never held-out ones, and no
text is written twice; what OUT holds already stays. Writes one JSON object a line (id, source, kind,
set, category, prompt, tokens, text), without a label: that is for a reader to give, before any judge is
asked. `tests/data/answers.jsonl` is filled from such files.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from saber import artifacts, prompts
from saber.ablation import EditPlan, Removal, applied, orthogonal
from saber.config import RunConfig, preset
from saber.lm.generate import generate
from saber.lm.load import load
from saber.lm.writers import find_writers
from saber.pipeline import gather
from saber.prompts import Prompt, split

LENGTHS = (32, 48, 64)
Counts = Mapping[str, int]
UNTOUCHED: Counts = {"target": 60, "borderline": 40}
EDITED: Counts = {"target": 26, "borderline": 8, "neutral": 4}
WEAK: Counts = {"target": 10, "borderline": 4}
OVERDONE: Counts = {"target": 7, "borderline": 2, "neutral": 2, "battery": 1}


def scaled(plan: EditPlan, factor: float) -> EditPlan:
    """Return the plan with every change multiplied."""

    def one(f: Any) -> Any:
        return replace(f, left=factor * f.left, bias=None if f.bias is None else factor * f.bias)

    return EditPlan({name: one(f) for name, f in plan.factors.items()})


def pools(config: RunConfig) -> dict[str, list[Prompt]]:
    """Return the prompts that a run may select on."""
    selecting = gather(config).selecting
    border = split(prompts.borderline(), seed=config.seed)
    return {
        "target": [*selecting.target, *selecting.target_validation],
        "borderline": [*border.fit, *border.validation],
        "neutral": [*selecting.neutral, *selecting.neutral_validation],
        "battery": list(prompts.battery()),
    }


def simple_edit(lm: Any, run: Path) -> EditPlan:
    """Return the orthogonal edit along the directions of a run's first pass."""
    tensors, meta = artifacts.load(run / "passes" / "1", "pass")
    layers = [row["direction"]["layer"] for row in meta["candidates"]]
    pairs = zip(tensors["patterns"], layers, strict=True)
    removals = [Removal(pattern.float(), 1.0, layer) for pattern, layer in pairs]
    return orthogonal(lm, find_writers(lm), removals, "own")


def edits(lm: Any, run: Path) -> Iterator[tuple[str, str, Callable[[], EditPlan], Counts]]:
    """Give source, kind, plan and numbers of prompts of each model that answers."""
    yield "untouched", "refusing", EditPlan, UNTOUCHED
    plan = EditPlan.load(run / "plan")
    plain = cache(lambda: simple_edit(lm, run))
    yield "selective", "edited", lambda: plan, EDITED
    for factor in (0.3, 0.45, 0.6, 0.75):
        yield f"selective, {factor:.0%}", "weak", partial(scaled, plan, factor), WEAK
    first = EditPlan.load(run / "passes" / "1" / "plan")
    yield "selective, first pass", "weak", lambda: first, WEAK
    for factor in (2.0, 3.0, 8.0):
        yield f"selective, {factor:g} times", "overdone", partial(scaled, plan, factor), OVERDONE
    for factor in (0.5, 0.75):
        part = partial(_of, plain, factor)
        yield f"orthogonal, {factor:.0%}", "weak", part, WEAK
    for factor in (1.6, 2.2):
        part = partial(_of, plain, factor)
        yield f"orthogonal, {factor:g} times", "overdone", part, OVERDONE


def _of(plan: Callable[[], EditPlan], factor: float) -> EditPlan:
    return scaled(plan(), factor)


def main() -> None:
    """Generate and write, edit by edit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--only", action="append", metavar="SOURCE")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    config, seen = preset("default"), set[str]()
    if given.out.exists():
        lines = given.out.read_text(encoding="utf-8").splitlines()
        seen = {json.loads(line)["text"] for line in lines}
    asked, lm = pools(config), load(given.model, config.load)
    with given.out.open("a", encoding="utf-8") as file:
        for source, kind, plan, counts in edits(lm, given.run):
            if given.only and source not in given.only:
                continue
            edit = plan()
            rng = random.Random(f"{given.seed} {source}")
            chosen = [(name, p) for name, k in counts.items() for p in rng.sample(asked[name], k)]
            for part, length in enumerate(LENGTHS):
                some = chosen[part :: len(LENGTHS)]
                with applied(lm.model, edit):
                    answers = generate(lm, [p.text for _, p in some], length)
                for (name, prompt), answer in zip(some, answers, strict=True):
                    if answer.text in seen:
                        continue
                    seen.add(answer.text)
                    row = {
                        "id": f"{given.seed}-{len(seen):03d}",
                        "source": source,
                        "kind": kind,
                        "set": name,
                        "category": prompt.category,
                        "prompt": prompt.text,
                        "tokens": len(answer.ids),
                        "text": answer.text,
                    }
                    print(json.dumps(row, ensure_ascii=False), file=file, flush=True)


if __name__ == "__main__":
    main()
