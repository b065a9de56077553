"""A plan as llama.cpp's LoRA adapter: a small GGUF file beside the base model's.

A plain matrix has `lora_a (k, d_in)` and `lora_b (d_out, k)`, a stack of experts the experts before
them, the token embedding `lora_a (tokens, k)`. llama.cpp scales by alpha / k of each tensor, so that
`lora_b` is stored times k / alpha.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from saber import artifacts
from saber.checkpoint.gguf_file import OWN, Change, GgufFile

ALPHA = "adapter.lora.alpha"
"""The one number in an adapter's metadata."""


def pairs(change: Change, alpha: float) -> Iterator[tuple[str, Float32[np.ndarray, ...]]]:
    """Yield the two tensors of a change with their names."""
    rank = change.right.shape[0]
    down, up = change.right, change.left * (rank / alpha)
    if change.embedding:
        down, up = change.left, change.right[:, 0].T * (rank / alpha)
    elif len(change.tensor.shape) > 2:
        down = down.movedim(1, 0)
        up = up.expand(change.tensor.experts, -1, -1)
    else:
        down = down[:, 0]
    yield f"{change.tensor.name}.lora_a", np.ascontiguousarray(down.numpy(), np.float32)
    yield f"{change.tensor.name}.lora_b", np.ascontiguousarray(up.numpy(), np.float32)


def header(file: GgufFile, alpha: int) -> dict[str, str | float]:
    """Return the metadata of an adapter of that file's model, without ours."""
    return {
        "general.architecture": file.architecture,
        "general.type": "adapter",
        "adapter.type": "lora",
        ALPHA: float(alpha),
    }


def largest_rank(changes: Sequence[Change]) -> int:
    """Return the largest rank of some changes, which is the adapter's alpha; 0 of none."""
    return max((change.right.shape[0] for change in changes), default=0)


def write_gguf_lora(
    file: GgufFile, changes: Sequence[Change], out: Path, metadata: Mapping[str, str]
) -> int:
    """Write the adapter in float32, whole or not at all; return its largest rank.

    `changes` holds matrices alone: the format has no place for biases. Raises `OutputError`.
    """
    import gguf

    alpha = largest_rank(changes)
    with (
        artifacts.staged_file(out) as part,
        closing(gguf.GGUFWriter(part, file.architecture)) as writer,
    ):
        for name, said in header(file, alpha).items():
            if isinstance(said, float):
                writer.add_float32(name, said)
            elif name != "general.architecture":  # which the writer has added
                writer.add_string(name, said)
        for name, value in metadata.items():
            writer.add_string(OWN + name, value)
        for change in changes:
            for name, values in pairs(change, float(alpha)):
                writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return alpha
