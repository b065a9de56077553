"""Where a plan's writers lie in a GGUF file, and its changes in the layout of that file.

Names come from the `gguf` library's own table. A GGUF matrix has its inputs along the last axis, a
stack of experts the experts first; token embeddings have a row for each token.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from saber.ablation import EditPlan, Factor
from saber.checkpoint.gguf_file import Change, GgufFile, GgufTensor
from saber.errors import ModelError

PREFIXES = ("language_model.", "model.language_model.", "text_model.")
ALIKE = (
    (re.compile(r"\.\w+\.experts\.down_proj$"), ".mlp.experts.down_proj"),
    (re.compile(r"^model\.layers\."), "backbone.layers."),
)
"""What transformers calls otherwise than the library, which has names of older checkpoints."""


def changes(file: GgufFile, plan: EditPlan) -> list[Change]:
    """Return the changes of a plan as changes of the file's tensors, in the order of the plan.

    Raises `ModelError` that names the first writer that the file does not hold, or holds in another
    shape: a file of another architecture, another size, or with experts kept apart.
    """
    return [change for name, factor in plan.factors.items() for change in _one(file, name, factor)]


def _one(file: GgufFile, name: str, factor: Factor) -> Iterator[Change]:
    parameter = factor.weight or f"{name}.weight"
    stem = _stem(file, parameter)
    tensor = _tensor(file, stem, "weight", parameter)
    left, right = factor.left.float(), factor.right.float()
    width = left.shape[0]
    if right.ndim == 1:
        # A vector in the stream: one value an output, one row in the file.
        rows = (left @ right).reshape(1, 1, width)
        yield _checked(Change(tensor, name, torch.ones(1, 1), rows, bias=True), parameter)
        return
    experts = right.reshape(right.shape[0], -1, right.shape[-1])
    if tensor.name.startswith("token_embd"):
        yield _checked(Change(tensor, name, right.T, left.T[:, None], embedding=True), parameter)
    else:
        if tensor.name.endswith((".attn_q.weight", ".attn_k.weight")) and file.paired_rows:
            left = _paired(left, file.heads(tensor.name))
        yield _checked(Change(tensor, name, left, experts), parameter)
    if factor.bias is not None:
        where = factor.bias_name or f"{name}.bias"
        rows = factor.bias.float().reshape(-1, 1, width)
        bias = _tensor(file, stem, "bias", where)
        yield _checked(Change(bias, name, torch.eye(len(rows)), rows, bias=True), where)


def _stem(file: GgufFile, parameter: str) -> str:
    """Return the GGUF name of a parameter, without its ending."""
    plain = parameter.removesuffix(".weight")
    names = [plain]
    for prefix in PREFIXES:
        if prefix in plain:
            rest = plain.partition(prefix)[2]
            names += [rest, f"model.{rest}"]
    for written, known in ALIKE:
        names += [written.sub(known, name) for name in names]
    for candidate in names:
        found = file.names.get_name(candidate)
        if found is not None:
            return found
    raise ModelError(
        f"{file.path.name} is a {file.architecture!r} model, which has no place for {parameter}.",
        "Give the GGUF file of the model that the run was made on.",
    )


def _tensor(file: GgufFile, stem: str, ending: str, parameter: str) -> GgufTensor:
    name = f"{stem}.{ending}"
    if name in file.tensors:
        return file.tensors[name]
    raise ModelError(
        f"{file.path.name} has no tensor {name}, where {parameter} would lie.",
        "Give the GGUF file of the model that the run was made on, converted by a recent llama.cpp.",
    )


def _checked(change: Change, parameter: str) -> Change:
    """Hold the shapes against one another."""
    experts, columns = change.right.shape[1:]
    wanted = (experts, change.left.shape[0], columns)
    found = (change.tensor.experts, change.tensor.rows, change.tensor.shape[-1])
    if found != wanted:
        raise ModelError(
            f"{change.tensor.name} has the shape {_by(found)}, where the plan's {parameter} has "
            f"{_by(wanted)} (experts x rows x columns).",
            "Give the GGUF file of the model that the run was made on.",
        )
    return change


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _paired(left: Float[Tensor, "rows k"], heads: int) -> Float[Tensor, "rows k"]:
    """Return rows in the order of llama.cpp's rotary pairs: within a head, halves interleaved."""
    size = left.shape[0] // heads // 2
    return left.reshape(heads, 2, size, -1).swapaxes(1, 2).reshape(left.shape)
