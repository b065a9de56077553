"""Are answers of the edited demo model incoherent more often than those of the model that never refused?

    python benchmarks/incoherent.py RUN

RUN is the folder of a finished `saber run demo`. A refusal is always coherent, so the refusing model is no
measure of how often such a small model loops once it answers: the same model without the adapter that makes
it refuse is. Targets are the held-out ones and the bundled harmful requests, which a plain removal neither
fits nor chooses on. Greedy answers, `phrases` judge; the table is Markdown, the test exact McNemar's.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from saber import prompts
from saber.config import preset
from saber.evaluation.judge import Label, named_judge
from saber.evaluation.judging import label_all
from saber.evaluation.statistics import mcnemar_exact, wilson
from saber.lm.demo import base_gguf
from saber.lm.generate import generate
from saber.lm.load import load
from saber.pipeline import gather


def main() -> None:
    """Let three models answer and print what became of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    given = parser.parse_args()
    config = preset("default")
    sets = {
        "held-out targets": gather(config).reporting.target.texts,
        "bundled harmful requests": prompts.harmful().texts,
    }
    models = {
        "refusing": "demo",
        "edited": str(given.run / "model"),
        "without its adapter": str(base_gguf()),
    }
    found = {
        name: labels(model, [text for texts in sets.values() for text in texts])
        for name, model in models.items()
    }
    print("| prompts | label | " + " | ".join(models) + " |")
    print("|---|---|" + "---:|" * len(models))
    start, total = 0, sum(map(len, sets.values()))
    for name, end in (*_ends(sets), ("both", total)):
        start = 0 if name == "both" else start
        for label in ("refusal", "incoherent"):
            cells = [_share([x == label for x in found[model][start:end]]) for model in models]
            print(f"| {name} ({end - start}) | {label} | " + " | ".join(cells) + " |")
        start = end
    now, usual = (
        [x == "incoherent" for x in found[name]] for name in ("edited", "without its adapter")
    )
    test = mcnemar_exact(usual, now)
    print(
        f"\nincoherent, edited against without its adapter: {test.c} new, {test.b} gone, "
        f"p = {test.p_value:.2f}"
    )


def labels(model: str, texts: Sequence[str]) -> Sequence[Label]:
    """Label a model's answers as long as a run judges them."""
    config = preset("default")
    judge = named_judge(config.evaluation.judge)
    lm = load(model, config.load)
    answers = generate(lm, texts, config.evaluation.max_new_tokens, settled=judge.settled)
    return label_all(judge, texts, [c.text for c in answers])


def _ends(sets: Mapping[str, Sequence[str]]) -> list[tuple[str, int]]:
    ends, end = [], 0
    for name, texts in sets.items():
        end += len(texts)
        ends.append((name, end))
    return ends


def _share(flags: Sequence[bool]) -> str:
    found = wilson(sum(flags), len(flags))
    return f"{sum(flags)} ({100 * found.low:.1f}-{100 * found.high:.1f}%)"


if __name__ == "__main__":
    main()
