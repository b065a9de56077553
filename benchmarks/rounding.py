"""What does rounding alone move? The divergence of the untouched model from itself, by compute dtype.

    python benchmarks/rounding.py [MODEL] [--prompts N]

In 16 bits every result is rounded, so two models that differ by next to nothing give other logits, and
no divergence below that tells of an edit. For each dtype, along the model's own answers to everyday requests:
what `saber run` reports as the divergence of the base from itself (`saber.evaluation.divergence.rounding`),
and the same with logits rounded as well, as the model itself gives them. The last row runs in float32 what
makes the others round anew, the jitter of one bfloat16 unit: what it moves by itself.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from unittest.mock import patch

import torch

from saber import prompts
from saber.evaluation import divergence
from saber.evaluation.divergence import Divergence, own_answers
from saber.lm import forward
from saber.lm.load import LoadSpec, load

TOKENS = 32


def told(name: str, found: Divergence | None) -> None:
    """Print a row of the table."""
    if found is not None:
        print(
            f"| {name} | {found.sequence.mean():.1e} | {found.first_token.mean():.1e} |", flush=True
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--prompts", type=int, default=48)
    given = parser.parse_args()
    texts = prompts.everyday().texts[: given.prompts]
    print(f"{given.model}, {len(texts)} everyday requests, {TOKENS} tokens")
    print("| computed in | KL, sequence | KL, first token |\n|---|---|---|")
    for dtype in ("bfloat16", "float16", "float32"):
        lm = load(given.model, LoadSpec(dtype=dtype))
        reference = own_answers(lm, texts, TOKENS)
        told(dtype, divergence.rounding(lm, reference))
        if dtype == "float32":
            found = divergence.rounding(lm, reference, dtype=torch.bfloat16)
            told("float32, a jitter of one bfloat16 unit", found)
            continue
        with patch.object(forward, "unrounded_head", lambda _: nullcontext()):
            told(f"{dtype}, logits too", divergence.rounding(lm, reference))


if __name__ == "__main__":
    main()
