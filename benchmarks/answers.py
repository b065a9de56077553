"""Collect answers for a hand-labelled set: the demo model untouched, and edited from weak to overdone.

    python benchmarks/answers.py OUT.jsonl --run RUN [--model demo] [--seed 0]

RUN is a finished run on the same model: its plan is taken whole, in part, and several times over, and
so is the plain orthogonal edit. Prompts are those that a run selects on, never held-out ones, and no
text is written twice. Writes one JSON object a line (id, source, kind, set, category, prompt, tokens,
text), without a label: that is for a reader to give, before any judge is asked.
`tests/data/answers.jsonl` is filled from such files.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saber import prompts
from saber.ablation import EditPlan, Removal, applied, orthogonal
from saber.config import RunConfig, preset
from saber.entanglement import entangle
from saber.lm.generate import generate
from saber.lm.load import load
from saber.lm.writers import find_writers
from saber.pipeline import gather
from saber.probing import probe, probe_capabilities
from saber.prompts import Prompt, split
from saber.refinement import choose
from saber.spectral import extract

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


def simple_edit(lm: Any, config: RunConfig) -> EditPlan:
    """Return the orthogonal edit of one direction a layer."""
    data = gather(config).selecting
    target, neutral = (probe(lm, p, config.probe) for p in (data.target, data.neutral))
    capability = probe_capabilities(lm, data.capability, config.probe)
    found = extract(
        target,
        neutral,
        config.spectral,
        capability=capability,
        generator=np.random.default_rng([config.seed, 0]),
    )
    measured = entangle(
        found,
        target,
        neutral,
        capability,
        config.entanglement,
        generator=torch.Generator().manual_seed(0),
    )
    rows = choose(found, measured, [None] * len(found), config.edit, config.refine)
    taken = [c.direction for c in rows if c.status in ("ablated", "weakened")]
    removals = [Removal(d.pattern.float(), 1.0, d.layer) for d in taken]
    return orthogonal(lm, find_writers(lm), removals, "own")


def edits(lm: Any, run: Path, config: RunConfig) -> Iterator[tuple[str, str, EditPlan, Counts]]:
    """Give source, kind, plan and numbers of prompts of each model that answers."""
    yield "untouched", "refusing", EditPlan(), UNTOUCHED
    plan = EditPlan.load(run / "plan")
    yield "selective", "edited", plan, EDITED
    for factor in (0.3, 0.45, 0.6):
        yield f"selective, {factor:.0%}", "weak", scaled(plan, factor), WEAK
    for factor in (2.0, 3.0):
        yield f"selective, {factor:g} times", "overdone", scaled(plan, factor), OVERDONE
    plain = simple_edit(lm, config)
    for factor in (0.25, 0.5):
        yield f"orthogonal, {factor:.0%}", "weak", scaled(plain, factor), WEAK
    for factor in (1.6, 2.2):
        yield f"orthogonal, {factor:g} times", "overdone", scaled(plain, factor), OVERDONE


def main() -> None:
    """Generate and write, edit by edit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    config, rng, seen = preset("default"), random.Random(given.seed), set[str]()
    asked = pools(config)
    lm = load(given.model, config.load)
    with given.out.open("w", encoding="utf-8") as file:
        for source, kind, plan, counts in edits(lm, given.run, config):
            chosen = [(name, p) for name, k in counts.items() for p in rng.sample(asked[name], k)]
            for part, length in enumerate(LENGTHS):
                some = chosen[part :: len(LENGTHS)]
                with applied(lm.model, plan):
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
