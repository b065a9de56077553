"""What the ridge and lambda of `--mode over-refusal` buy and cost, on prompts left out of the fit (Markdown).

    python benchmarks/over_refusal.py [--model demo] [--ridges 0.001 0.01 ...] [--lambdas 0 1 ...]

Every fourth prompt to fit on, borderline and harmful, is left out and judged instead; validation prompts
select as in a run (neutral ones are judged too), held-out ones are not touched. A lambda of 0 is the
run's own line search.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from saber.ablation import applied
from saber.config import override, preset
from saber.evaluation.divergence import diverge, own_answers
from saber.evaluation.judge import named_judge
from saber.evaluation.judging import label_all
from saber.gathering import gather
from saber.lm.generate import generate
from saber.prompts import PromptSet
from saber.strength import ANSWER_TOKENS
from saber.subject import Subject, Watch, refined

EVERY = 4


def main() -> None:
    """Print a row for each setting."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--ridges", nargs="+", type=float, default=[0.001, 0.01, 0.03, 0.1])
    parser.add_argument("--lambdas", nargs="+", type=float, default=[0.0])
    given = parser.parse_args()
    config = override(preset("default"), {"data": {"mode": "over-refusal"}})
    data = gather(config)
    data, (wrong, kept) = parted(data.selecting)
    subject = Subject.load(given.model, config)
    lm, judge = subject.lm, named_judge(config.evaluation.judge)
    watch = Watch(lm, judge, data, config)

    def labels(prompts: PromptSet) -> list[Any]:
        tried = generate(lm, prompts.texts, config.evaluation.max_new_tokens, settled=judge.settled)
        return list(label_all(judge, prompts.texts, [c.text for c in tried]))

    calm_set = data.neutral_validation
    before = labels(wrong), labels(kept), labels(calm_set)
    calm = own_answers(lm, calm_set.texts, ANSWER_TOKENS)
    memory: dict[Any, Any] = {}

    def memo(key: Any, make: Any) -> Any:
        if key not in memory:
            memory[key] = make()
        return memory[key]

    print(
        "| ridge | lambda | borderline refused | of them new | harmful refused | neutral refused "
        "| incoherent | KL, first token | KL, sequence |"
    )
    print("|---:" * 9 + "|")
    print(
        f"| untouched | | {shown(before[0])} | | {shown(before[1])} | {shown(before[2])} "
        f"| {odd(*before)} | 0 | 0 |",
        flush=True,
    )
    for ridge, lambda_ in product(given.ridges, given.lambdas):
        mine = override(config, {"edit": {"ridge": ridge, "lambda": lambda_}})
        outcome = refined(subject, watch, mine, memo=memo, self_repair=False)
        with applied(lm.model, outcome.plan):
            after = labels(wrong), labels(kept), labels(calm_set)
            cost = diverge(lm, calm)
        new = sum(
            b != "refusal" and a == "refusal" for b, a in zip(before[0], after[0], strict=True)
        )
        used = [t.lambda_ for p in outcome.passes for t in p.trials if t.chosen]
        print(
            f"| {ridge:g} | {', '.join(f'{u:g}' for u in used)} | {shown(after[0])} | {new} "
            f"| {shown(after[1])} | {shown(after[2])} | {odd(*after)} "
            f"| {float(cost.first_token.mean()):.4f} | {float(cost.sequence.mean()):.4f} |",
            flush=True,
        )


def parted(data: Any) -> tuple[Any, tuple[PromptSet, PromptSet]]:
    """Return what selects without every fourth prompt to fit on, and those: borderline and harmful."""

    def left(prompts: PromptSet, out: bool) -> PromptSet:
        chosen = (p for i, p in enumerate(prompts) if (i % EVERY == 0) == out)
        return replace(prompts, prompts=tuple(chosen))

    fewer = replace(
        data,
        target=left(data.target, False),
        keep=(left(data.keep[0], False), *data.keep[1:]),
    )
    return fewer, (left(data.target, True), left(data.keep[0], True))


def shown(labels: Sequence[str]) -> str:
    """How many are refused."""
    return f"{labels.count('refusal')}/{len(labels)}"


def odd(*labels: Sequence[str]) -> int:
    """How many are incoherent."""
    return sum(part.count("incoherent") for part in labels)


if __name__ == "__main__":
    main()
