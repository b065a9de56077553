"""Collect answers for a hand-labelled set: the demo model untouched, and edited from weak to overdone.

    python benchmarks/answers.py OUT.jsonl [--model demo] [--seed 0]

Writes one JSON object a line (id, source, set, category, prompt, tokens, text), without a label: that
is for a reader to give, before any judge is asked. `tests/data/answers.jsonl` is to be
filled from such a file.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saber import prompts
from saber.ablation import EditPlan, Removal, applied, orthogonal
from saber.config import preset
from saber.entanglement import entangle
from saber.lm.chat import encode, encode_answers
from saber.lm.generate import generate
from saber.lm.load import load
from saber.lm.writers import find_writers
from saber.moments import Preserved, read_decisions
from saber.pipeline import gather
from saber.probing import probe, probe_capabilities
from saber.refinement import choose
from saber.selective import solve
from saber.spectral import extract

LENGTHS = (32, 64, 96)
COUNTS = {"target": 13, "borderline": 7, "neutral": 4, "battery": 3}


def scaled(plan: EditPlan, factor: float) -> EditPlan:
    """Return the plan with every change multiplied."""

    def one(f: Any) -> Any:
        return replace(f, left=factor * f.left, bias=None if f.bias is None else factor * f.bias)

    return EditPlan({name: one(f) for name, f in plan.factors.items()})


def edits(lm: Any) -> Iterator[tuple[str, EditPlan]]:
    """Name the models that answer; those overdone are there for their broken answers."""
    yield "untouched", EditPlan()
    yield "untouched", EditPlan()
    config = preset("default")
    data, writers = gather(config).selecting, find_writers(lm)
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
    full = orthogonal(lm, writers, removals, "own")
    for alpha in (0.3, 0.6, 1.0):
        yield f"orthogonal, alpha {alpha:g}", scaled(full, alpha)
    yield "orthogonal, 2.5 times", scaled(full, 2.5)
    references = encode_answers(lm, [p.reference for p in data.capability], end=False)
    kept = [encode(lm, data.neutral.texts), encode(lm, data.capability.texts, references)]
    wanted = (encode(lm, p.texts) for p in (data.target, data.neutral))
    solved = solve(
        lm,
        {d.layer: d.pattern[None].float() for d in taken},
        read_decisions(lm, writers, *wanted),
        Preserved(lm, writers, kept),
    )
    ones = {d.layer: [1.0] for d in taken}
    for lam in (1000.0, 300.0, 10.0):
        yield f"selective, lambda {lam:g}", solved.plan({d.layer: [lam] for d in taken}, ones)
    strong = solved.plan({d.layer: [1.0] for d in taken}, ones)
    yield "selective, lambda 1, 3 times", scaled(strong, 3.0)


def main() -> None:
    """Generate and write, edit by edit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng, number = random.Random(given.seed), 0
    pools = {name: list(getattr(prompts, name)()) for name in COUNTS}
    lm = load(given.model, preset("default").load)
    with given.out.open("w", encoding="utf-8") as file:
        for source, plan in edits(lm):
            asked = [(name, p) for name, k in COUNTS.items() for p in rng.sample(pools[name], k)]
            for part, length in enumerate(LENGTHS):
                some = asked[part :: len(LENGTHS)]
                with applied(lm.model, plan):
                    answers = generate(lm, [p.text for _, p in some], length)
                for (name, prompt), answer in zip(some, answers, strict=True):
                    number += 1
                    row = {
                        "id": f"answer-{number:03d}",
                        "source": source,
                        "set": name,
                        "category": prompt.category,
                        "prompt": prompt.text,
                        "tokens": len(answer.ids),
                        "text": answer.text,
                    }
                    print(json.dumps(row, ensure_ascii=False), file=file, flush=True)


if __name__ == "__main__":
    main()
