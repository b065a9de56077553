"""What the files of a saved edit plan have to hold, so that none that is damaged is taken for a whole one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saber.artifacts import DAMAGED, META, TENSORS
from saber.errors import DataError

KIND = "edit-plan"
PARTS = ("left", "right", "bias")
"""What a factor is made of; `bias` only where its writer has one."""


def require_meta(folder: Path, meta: Mapping[str, Any]) -> None:
    """Raise `DataError` where a plan's meta data lack the axes of its factors, or are damaged otherwise."""
    axes, names = meta.get("axes"), meta.get("names", {})
    wrong = None
    if not isinstance(axes, dict) or not all(type(axis) is int for axis in axes.values()):
        wrong = "axes"
    elif not isinstance(names, dict) or not all(map(_pair, names.values())):
        wrong = "names"
    elif not isinstance(meta.get("config", {}), dict):
        wrong = "config"
    if wrong:
        raise DataError(f"{folder / META} holds no usable {wrong!r} of an edit plan.", DAMAGED)


def _pair(value: Any) -> bool:
    """Whether a value is the names of a weight and of a bias."""
    return isinstance(value, list) and [type(name) for name in value] == [str, str]


def require_factors(
    folder: Path, axes: Mapping[str, int], shapes: Mapping[str, Sequence[int]]
) -> None:
    """Raise `DataError` where the tensors of a plan are not those of the factors in its meta data.

    `axes` is what the meta data say of each factor, `shapes` has each tensor of the file.
    """
    strange = {key.rpartition(".")[0] for key in shapes} ^ axes.keys()
    strange |= {name for name, axis in axes.items() if not _fit(name, axis, shapes)}
    if strange:
        raise DataError(
            f"{folder / META} and {TENSORS} beside it do not agree on {min(strange)}.", DAMAGED
        )


def _fit(name: str, axis: int, shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether a factor is a product left @ right, and its axis one of what that changes."""
    left, right, bias = (shapes.get(f"{name}.{part}") for part in PARTS)
    if left is None or right is None or len(left) != 2 or not right or left[1] != right[0]:
        return False
    return 0 <= axis < len(right) and (bias is None or list(bias[-1:]) == [left[0]])
