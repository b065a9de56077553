"""Where a model's parameters lie in its checkpoint files.

transformers 5 renames, splits, fuses and turns tensors between files and memory. This module is the
only one that touches that mapping, so that a change of it there is a change in one place here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor
from transformers import core_model_loading
from transformers.modeling_utils import PreTrainedModel

_FAILED = (ValueError, RuntimeError, KeyError, IndexError, TypeError, AttributeError)


@dataclass(frozen=True)
class Piece:
    """A tensor of the files as a part of one parameter: a slice of it, with its axes in some order."""

    name: str
    """Name of the tensor in the files."""
    shape: tuple[int, ...]
    """Its shape there."""
    start: tuple[int, ...]
    """Where it begins in the parameter, by axis of the parameter."""
    axes: tuple[int, ...]
    """Axis of the parameter that each of its own axes runs along; -1 for one of length 1 of its own."""


def disk_names(model: PreTrainedModel, name: str) -> tuple[str, ...]:
    """Return the names of the tensors that hold a parameter when the model is saved.

    A fused weight of E experts has E names where the files keep experts apart. Empty where the files
    weave it together with other parameters, so that no name is its own.
    """
    shape = model.get_parameter(name).shape
    return tuple(_reverted(model, name, torch.empty(shape, device="meta")))


@dataclass
class Layout:
    """Finds the pieces of parameters; those that are alike but for numbers in their names cost one search."""

    model: PreTrainedModel
    """The model in memory, as it was loaded."""
    _known: dict[tuple[object, ...], tuple[Piece, ...]] = field(default_factory=dict)
    _names: dict[int, list[str]] = field(default_factory=dict)
    _held: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parameters = self.model.named_parameters(remove_duplicate=False)
        self._held = dict(chain(parameters, self.model.named_buffers(remove_duplicate=False)))
        for name, parameter in self._held.items():
            self._names.setdefault(id(parameter), []).append(name)

    def pieces(self, name: str) -> tuple[tuple[Piece, ...], ...]:
        """Return the pieces of a parameter or buffer under each of its names; several where weights are tied.

        A name under which the files weave the parameter together with others, or cut it in no plain
        way, has no pieces.
        """
        parameter = self._held[name]
        shape = tuple(parameter.shape)
        return tuple(self._pieces(alias, shape) for alias in self._names[id(parameter)])

    def _pieces(self, name: str, shape: tuple[int, ...]) -> tuple[Piece, ...]:
        stand_in = torch.empty(shape, device="meta")
        found = _reverted(self.model, name, stand_in)
        if len(found) == 1 and next(iter(found.values())) is stand_in:
            whole = tuple(range(len(shape)))
            return (Piece(next(iter(found)), shape, (0,) * len(shape), whole),)
        shapes = tuple((re.sub(r"\d+", "#", n), tuple(t.shape)) for n, t in found.items())
        key = (re.sub(r"\d+", "#", name), shape, shapes)
        if key not in self._known:
            self._known[key] = self._search(name, shape)
        like = self._known[key]
        if len(like) != len(found):
            return ()
        return tuple(Piece(n, p.shape, p.start, p.axes) for n, p in zip(found, like, strict=True))

    def _search(self, name: str, shape: tuple[int, ...]) -> tuple[Piece, ...]:
        """Send a stand-in whose every value is its own index through the mapping, and read it off."""
        count = math.prod(shape)
        kind = torch.int32 if count < 2**31 else torch.int64
        index = torch.arange(count, dtype=kind).reshape(shape)
        pieces = [piece(n, t, shape) for n, t in _reverted(self.model, name, index).items()]
        whole = tuple(p for p in pieces if p is not None)
        return whole if len(whole) == len(pieces) else ()


def piece(name: str, index: Tensor, shape: Sequence[int]) -> Piece | None:
    """Return what part of a parameter of this shape a tensor of flat indices into it is.

    None where it is not a slice with its axes in some order.
    """
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    first = int(index.reshape(-1)[0])
    start = tuple(first // s % n for s, n in zip(strides, shape, strict=True))
    axes: list[int] = []
    for own, length in enumerate(index.shape):
        if length == 1:
            axes.append(-1)
            continue
        stride = int(index.select(own, 1).reshape(-1)[0]) - first
        fits = [
            axis
            for axis, s in enumerate(strides)
            if s == stride and axis not in axes and start[axis] + length <= shape[axis]
        ]
        if len(fits) != 1:
            return None
        axes.append(fits[0])
    expected = torch.full((), first, dtype=index.dtype)
    for own, axis in enumerate(axes):
        if axis >= 0:
            steps = torch.arange(index.shape[own], dtype=index.dtype) * strides[axis]
            expected = expected + steps.reshape(-1, *[1] * (index.ndim - own - 1))
    if not torch.equal(expected.expand(index.shape), index):
        return None
    return Piece(name, tuple(index.shape), start, tuple(axes))


def _reverted(model: PreTrainedModel, name: str, stand_in: Tensor) -> dict[str, Tensor]:
    """Return what a parameter alone becomes in the files; nothing where it needs others for that."""
    try:
        return dict(core_model_loading.revert_weight_conversion(model, {name: stand_in}))
    except _FAILED:
        return {}
