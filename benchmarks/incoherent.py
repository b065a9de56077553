"""Are answers of the edited demo model incoherent more often than those of the model that never refused?

    python benchmarks/incoherent.py RUN [--tokens N]

RUN is the folder of a finished `saber run demo`. A refusal is always coherent, so the refusing model is no
measure of how often such a small model loops once it answers: the same model without the adapter that makes
it refuse is. Targets are the held-out ones and the bundled harmful requests, which a plain removal neither
fits nor chooses on. Greedy answers, `phrases` judge; the table is Markdown, the test exact McNemar's.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from peers_ruler import count

from saber import prompts
from saber.config import RunConfig, override, preset
from saber.evaluation.judge import Label, named_judge
from saber.evaluation.judging import label_all
from saber.evaluation.statistics import mcnemar_exact, wilson
from saber.gathering import gather
from saber.lm.demo import base_gguf
from saber.lm.generate import generate
from saber.lm.load import load


def main() -> None:
    """Let three models answer and print what became of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--tokens", type=int, help="longest answer (default: as in a run)")
    given = parser.parse_args()
    config = preset("default")
    if given.tokens is not None:
        config = override(config, {"evaluation": {"max_new_tokens": given.tokens}})
    held_out, harmful = gather(config).reporting.target.texts, prompts.harmful().texts
    both = (*held_out, *harmful)
    models = {
        "refusing": "demo",
        "edited": str(given.run / "model"),
        "without its adapter": str(base_gguf()),
    }
    found = {name: labels(model, both, config) for name, model in models.items()}

    def flags(name: str, label: Label, texts: Sequence[str]) -> list[bool]:
        return [found[name][text] == label for text in texts]

    print("| prompts | label | " + " | ".join(models) + " |")
    print("|---|---|" + "---:|" * len(models))
    sets = {"held-out targets": held_out, "bundled harmful requests": harmful, "both": both}
    for title, texts in sets.items():
        for label in ("refusal", "incoherent"):
            shares = [flags(name, label, texts) for name in models]
            cells = [count(asdict(wilson(sum(share), len(share)))) for share in shares]
            print(f"| {title} | {label} | " + " | ".join(cells) + " |")
    usual, now = (flags(name, "incoherent", both) for name in ("without its adapter", "edited"))
    test = mcnemar_exact(usual, now)
    print(
        f"\nincoherent, edited against without its adapter: {test.c} new, {test.b} gone, "
        f"p = {test.p_value:.2f}"
    )


def labels(model: str, texts: Sequence[str], config: RunConfig) -> dict[str, Label]:
    """Label a model's answers to each text."""
    judge = named_judge(config.evaluation.judge)
    lm = load(model, config.load)
    answers = generate(lm, texts, config.evaluation.max_new_tokens, settled=judge.settled)
    return dict(zip(texts, label_all(judge, texts, [c.text for c in answers]), strict=True))


if __name__ == "__main__":
    main()
