"""Collect answers for a hand-labelled set: the demo model untouched, and edited from weak to overdone.

    python benchmarks/answers.py OUT.jsonl [--model demo] [--seed 0]

Writes one JSON object a line (id, source, set, category, prompt, tokens, text), without a label: that
is for a reader to give, before any judge is asked. `src/saber/evaluation/data/answers.jsonl` was
read and labelled from such a file.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from selective import Bench, each, removal

from saber import prompts
from saber.ablation import EditPlan, applied, orthogonal
from saber.lm.generate import generate

LENGTHS = (32, 64, 100)
COUNTS = {"target": 14, "borderline": 8, "neutral": 5, "battery": 3}


def scaled(plan: EditPlan, factor: float) -> EditPlan:
    """Return the plan with every change multiplied."""
    return EditPlan(
        {
            name: replace(
                f, left=factor * f.left, bias=None if f.bias is None else factor * f.bias
            )
            for name, f in plan.factors.items()
        }
    )


def edits(bench: Bench) -> Iterator[tuple[str, EditPlan]]:
    """Name the models that answer; those overdone are there for their broken answers."""
    yield "untouched", EditPlan()
    yield "untouched", EditPlan()
    chosen = bench.candidates(bench.config)
    solved, ones = bench.solved(chosen), each(chosen, lambda _c: 1.0)
    gates = {lam: solved.plan(each(chosen, lambda _c, x=lam: x), ones) for lam in (1e3, 300, 10, 1)}
    for lam in (1e3, 300, 10):
        yield f"selective, lambda {lam:g}", gates[lam]
    full = orthogonal(bench.lm, bench.writers, [removal(c) for c in chosen], "own")
    for alpha in (0.3, 0.6, 1.0):
        yield f"orthogonal, alpha {alpha:g}", scaled(full, alpha)
    yield "selective, lambda 1, 3 times", scaled(gates[1], 3.0)
    yield "orthogonal, 2.5 times", scaled(full, 2.5)


def main() -> None:
    """Generate and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng = random.Random(given.seed)
    pools = {name: list(getattr(prompts, name)()) for name in COUNTS}
    bench = Bench.build(given.model)
    rows = []
    for source, plan in edits(bench):
        asked = [(name, p) for name, k in COUNTS.items() for p in rng.sample(pools[name], k)]
        lengths = [LENGTHS[i % len(LENGTHS)] for i in range(len(asked))]
        with applied(bench.lm.model, plan):
            answers = generate(bench.lm, [p.text for _, p in asked], max(LENGTHS))
        for (name, prompt), length, answer in zip(asked, lengths, answers, strict=True):
            ids = list(answer.ids[:length])
            rows.append(
                {
                    "id": f"answer-{len(rows) + 1:03d}",
                    "source": source,
                    "set": name,
                    "category": prompt.category,
                    "prompt": prompt.text,
                    "tokens": len(ids),
                    "text": bench.lm.tokenizer.decode(ids, skip_special_tokens=True),
                }
            )
    given.out.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
