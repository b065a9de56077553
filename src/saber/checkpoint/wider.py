"""Tensors that a checkpoint's files hold in a wider dtype than most, such as float32 norms beside 16 bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saber.ablation import EditPlan
from saber.checkpoint.plan_on_disk import files_folder, in_bare
from saber.checkpoint.shards import DTYPES, Source, Stored, read_source
from saber.errors import SaberError
from saber.lm.device import holds
from saber.lm.disk import Layout
from saber.lm.model import LanguageModel


@contextmanager
def as_in_files(lm: LanguageModel, plan: EditPlan) -> Iterator[None]:
    """Bring an edited model to its checkpoint's dtype, and tensors that its files hold wider to theirs.

    Those that the plan leaves alone get the very bits of the files, where these are what the model was
    loaded from. One that its dtype has no place for stays as it is. Afterwards all the others are in the
    checkpoint's dtype. Each is cast where it lies: a spread model is not cast whole.
    """
    wide = {}
    if source := _source(lm):
        edited = set(map(id, _edited(lm, plan)))
        for tensor, held in _wider(lm, source):
            if id(tensor) not in edited and torch.equal(held.to(tensor), tensor):
                wide[id(tensor)] = held.to(tensor.device)
            elif holds(tensor.dtype, held.dtype):
                wide[id(tensor)] = tensor.data.to(held.dtype)
    saved = lm.model.state_dict(keep_vars=True).values()
    kept = {id(t): t for t in saved if t.is_floating_point()}
    usual = {
        key: t.dtype if lm.dtype == lm.stored_dtype else lm.stored_dtype for key, t in kept.items()
    }
    try:
        for key, tensor in kept.items():
            tensor.data = wide[key] if key in wide else _narrowed(tensor.data, usual[key])
        yield
    finally:
        for key, tensor in kept.items():
            tensor.data = _narrowed(tensor.data, usual[key])


def _narrowed(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values in a dtype, or as they are where it has no place for the largest."""
    cast = value.to(dtype)
    if holds(dtype, value.dtype) or torch.equal(cast.isfinite(), value.isfinite()):
        return cast
    return value


def _source(lm: LanguageModel) -> Source | None:
    """Return the files that a model was loaded from, None where it has none of the usual ones."""
    folder = files_folder(lm.name, getattr(lm.model.config, "_commit_hash", None))
    try:
        return read_source(folder) if folder else None
    except SaberError:
        return None


def _edited(lm: LanguageModel, plan: EditPlan) -> Iterator[Tensor]:
    """Yield the parameters that a plan changes."""
    for name, factor in plan.factors.items():
        yield lm.model.get_parameter(factor.weight or f"{name}.weight")
        if factor.bias is not None:
            yield lm.model.get_parameter(factor.bias_name or f"{name}.bias")


def _wider(lm: LanguageModel, source: Source) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each tensor of a model that its files hold in a wider dtype than the checkpoint's, and theirs."""
    files = {
        t.name: (shard.path, t) for shard in source.shards.values() for t in shard.tensors.values()
    }
    wide = {
        name
        for name, (_, t) in files.items()
        if t.dtype in DTYPES and not holds(lm.stored_dtype, DTYPES[t.dtype])
    }
    if not wide:
        return
    layout = Layout(lm.model)
    tensors = {id(t): (n, t) for n, t in lm.model.state_dict(keep_vars=True).items()}
    for name, tensor in tensors.values():
        for whole in layout.pieces(name) if tensor.is_floating_point() else ():
            plain = [asdict(piece) for piece in whole]
            bare = in_bare(plain, files)
            pieces = next((p for p in (plain, bare) if all(i["name"] in files for i in p)), [])
            if wide.isdisjoint(piece["name"] for piece in pieces):
                continue
            held = _read(files, pieces, tensor.shape)
            if held is not None:
                yield tensor, held
                break


def _read(
    files: Mapping[str, tuple[Path, Stored]],
    pieces: Sequence[Mapping[str, Any]],
    shape: Sequence[int],
) -> Tensor | None:
    """Return a tensor of the model as its pieces in the files are; None where they do not make it up."""
    found = [files[piece["name"]] for piece in pieces]
    if any(stored.dtype not in DTYPES for _, stored in found):
        return None
    if [list(stored.shape) for _, stored in found] != [list(piece["shape"]) for piece in pieces]:
        return None
    dtype = reduce(torch.promote_types, (DTYPES[stored.dtype] for _, stored in found))
    held, filled = torch.empty(*shape, dtype=dtype), 0
    for piece, (path, stored) in zip(pieces, found, strict=True):
        try:
            with safe_open(path, "pt") as file:
                part = file.get_tensor(stored.name)
        except (OSError, SafetensorError):
            return None
        axes = piece["axes"]
        lengths = {axis: n for axis, n in zip(axes, stored.shape, strict=True) if axis >= 0}
        window = held[tuple(slice(b, b + lengths.get(a, 1)) for a, b in enumerate(piece["start"]))]
        order = sorted(range(len(axes)), key=axes.__getitem__)
        window.copy_(part.permute(order).reshape(window.shape))
        filled += part.numel()
    return held if filled == held.numel() else None
