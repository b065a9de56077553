"""How far an edit moves the stream beside its direction, behind norms with gains (Markdown).

    python benchmarks/gains.py runs/gemma/base.gguf

For each writer behind a gain: the gain's spread, and by how much the stream moves when one unit along
a random direction is taken out (1 is the least there can be), for the change of least weight and for
the one that SABER makes (`Writer.write`); means over 20 directions.
"""

from __future__ import annotations

import argparse

import torch

from saber.linalg import unit
from saber.lm.load import LoadSpec, load
from saber.lm.writers import find_writers

DIRECTIONS = 20


def main() -> None:
    """Print a row for each writer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    lm = load(parser.parse_args().model, LoadSpec(), tokenizer=False)
    generator = torch.Generator().manual_seed(0)
    basis = unit(torch.randn(DIRECTIONS, lm.d_model, generator=generator)).double()
    print("| writer | gain, median / rms | largest / rms | least weight | `Writer.write` |")
    print("|---|---:|---:|---:|---:|")
    for writer in find_writers(lm):
        if writer.gain is None:
            continue
        gain = writer.gain.double()[:, None]
        plain, ours = (
            torch.stack([(gain * of(r[None])).norm() for r in basis]).mean()
            for of in (lambda r, w=writer: torch.linalg.pinv(w.read(r)), writer.write)
        )
        size = gain.abs() / gain.square().mean().sqrt()
        print(
            f"| `{writer.name}` | {size.median():.2f} | {size.max():.1f} | {plain:.2f} | {ours:.2f} |"
        )


if __name__ == "__main__":
    main()
