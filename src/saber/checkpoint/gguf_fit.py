"""Whether a GGUF file holds the weights a plan was made on, and in which types its changes are stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import IO

import torch
from jaxtyping import Float
from torch import Tensor

from saber.checkpoint.card import DROWNED
from saber.checkpoint.gguf_file import (
    ALSO,
    Change,
    GgufFile,
    fits,
    known_types,
    read_rows,
    writable,
)
from saber.checkpoint.gguf_rewrite import blocks, changed_rows, rounding
from saber.checkpoint.sketch import ALIKE, Sketch, likeness, positions
from saber.errors import ModelError, UnknownName, UsageError

RAISED = ("Q8_0", "F16")
"""Types that changed tensors are raised to: the first that the edit outlives."""
PIECES, PIECE = 8, 1 << 16
"""Pieces of a tensor, and values in each, that are tried to see whether the edit outlives its type."""


def require_alike(file: GgufFile, changes: Sequence[Change], sketch: Sketch) -> None:
    """Raise `ModelError` unless the file's weights are those of the sketch, seen through rounding."""
    with file.path.open("rb") as source:
        for change in changes:
            if change.bias or change.factor not in sketch.samples:
                continue
            found = likeness(_samples(source, change), sketch.samples[change.factor])
            if not found >= ALIKE:
                raise ModelError(
                    f"{file.path.name} does not hold the weights that the plan was made for: "
                    f"{change.tensor.name} resembles them by {found:.2f}, where 1 is alike.",
                    "Give the GGUF file of the very model that the run was made on, or --force.",
                )


def _samples(source: IO[bytes], change: Change) -> Float[Tensor, " samples"]:
    """Return the file's values at the positions of a sketch, (experts, d_model, d_in) flattened."""
    tensor, columns = change.tensor, change.tensor.shape[-1]
    values = []
    for at in positions(tensor.experts * tensor.rows * columns).tolist():
        row, column = divmod(at, columns)
        if change.embedding:
            column, row = divmod(at, tensor.rows)
        values.append(float(read_rows(source, tensor, row, row + 1)[0, column]))
    return torch.tensor(values)


def require_architecture(file: GgufFile, model_type: str) -> None:
    """Raise `ModelError` when a model type of transformers is another architecture than the file's.

    Types that llama.cpp keeps under another name (mistral, cohere), or kept (`gguf_file.ALSO`), are left to
    shapes and weights.
    """
    import gguf

    def plain(name: str) -> str:
        return name.lower().removesuffix("_text").replace("-", "").replace("_", "")

    known = {plain(name) for name in gguf.MODEL_ARCH_NAMES.values()}
    ours, theirs = plain(model_type), plain(file.architecture)
    if ours in known and theirs not in (ours, ALSO.get(ours)):
        raise ModelError(
            f"{file.path.name} is a {file.architecture!r} model, and the run was made on a "
            f"{model_type!r} one.",
            "Give the GGUF file of the model that the run was made on.",
        )


def choose(
    file: GgufFile, changes: Sequence[Change], wanted: str
) -> Mapping[str, tuple[Change, str]]:
    """Return the type to store each changed tensor in.

    auto: the file's own, where it can be written and most of the edit outlives it, otherwise Q8_0, or
    F16 for the smallest edits.
    keep: the file's own; raises `UsageError` where it cannot be written. Otherwise one type for all.
    """
    if wanted not in ("auto", "keep", *known_types()):
        raise UnknownName("tensor type", wanted, ["auto", "keep", *known_types()])
    if wanted == "keep":
        closed = [c.tensor for c in changes if not writable(c.tensor.type)]
        if closed:
            types = ", ".join(sorted({t.type for t in closed}))
            raise UsageError(
                f"the gguf package cannot write {types}, the type of {len(closed)} tensors that the plan "
                f"changes ({closed[0].name} the first).",
                "Use --type auto or --type q8_0: those tensors become Q8_0, all others stay.",
            )
    with file.path.open("rb") as source:
        return {c.tensor.name: (c, _type_for(source, c, wanted)) for c in changes}


def _type_for(source: IO[bytes], change: Change, wanted: str) -> str:
    own, columns = change.tensor.type, change.tensor.shape[-1]
    if wanted == "keep" or change.bias:
        return own
    if wanted != "auto":
        if not fits(wanted, columns):
            raise UsageError(
                f"rows of {change.tensor.name} have {columns} values, which {wanted} cannot store.",
                "Use --type f16.",
            )
        return wanted.upper()
    for kind in (own, *RAISED):
        if writable(kind) and fits(kind, columns) and _outlives(source, change, kind):
            return kind
    return own if own in ("F32", "BF16") else RAISED[-1]


def _outlives(source: IO[bytes], change: Change, kind: str) -> bool:
    """Whether most of an edit is there after storing, told from a few pieces of the tensor."""
    pieces = list(blocks(change.tensor, PIECE))
    step = max(1, len(pieces) // PIECES)
    sums = torch.zeros(4, dtype=torch.float64)
    for piece in pieces[step // 2 :: step][:PIECES]:
        sums += changed_rows(source, change, kind, piece)[1]
    return rounding(change, kind, sums).kept >= DROWNED
