"""Axes of a sweep, and the settings that they span."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saber import codec
from saber.config import RunConfig, override, resolved, value_of
from saber.errors import UnknownName, UsageError

MEASURED = ("load.", "data.", "evaluation.", "judging.", "preset", "minimum_rate")
"""Fields that say what is measured and on which model: settings of a sweep have these in common."""
SEED = "seed"


@dataclass(frozen=True)
class Axis:
    """A field of the configuration and the values that it takes."""

    field: str
    """Its name with that of its section, such as `edit.alpha`."""
    values: tuple[Any, ...]
    """Converted to the field's type, in the order given, each once."""


@dataclass(frozen=True)
class Range:
    """A field of the configuration and the bounds between which a search looks."""

    field: str
    """Its name with that of its section."""
    low: float
    """Least value."""
    high: float
    """Greatest value."""
    log: bool = False
    """Whether steps are even in the logarithm."""
    whole: bool = False
    """Whether the field takes whole numbers alone."""


@dataclass(frozen=True)
class Setting:
    """One point of a sweep."""

    number: int
    """From 1; it keeps it when the sweep is resumed."""
    values: Mapping[str, Any]
    """Value of each axis."""
    config: RunConfig
    """The whole configuration."""

    @property
    def key(self) -> str:
        """What tells it from other settings: a digest of its configuration."""
        return setting_key(self.config)


def setting_key(config: RunConfig) -> str:
    """Return the digest of a configuration."""
    return codec.digest(json.dumps(resolved(config), sort_keys=True))[:32]


def fields(config: RunConfig) -> list[str]:
    """Return the names of all fields, with those of their sections."""

    def walk(node: Any, path: str) -> Iterator[str]:
        for field in dataclasses.fields(node):
            name, value = f"{path}{field.name.rstrip('_')}", getattr(node, field.name)
            if dataclasses.is_dataclass(value):
                yield from walk(value, f"{name}.")
            else:
                yield name

    return list(walk(config, ""))


def read_axis(config: RunConfig, text: str) -> Axis | Range:
    """Read `FIELD=V1,V2,...`, or `FIELD=LOW..HIGH` (`:log` behind it) for a search.

    Raises `UnknownName` with the nearest field, and `UsageError` for a field that all settings of a
    sweep have in common, for no values, and for values that the field cannot take.
    """
    name, equals, given = text.partition("=")
    name = name.strip()
    if not equals:
        raise UsageError(f"--axis {text!r} is not of the form FIELD=V1,V2,...")
    known = fields(config)
    if name not in known:
        ends = [k for k in known if k.rpartition(".")[2] == name]
        if len(ends) == 1:
            raise UsageError(f"unknown axis {name!r}.", f"Did you mean {ends[0]!r}?")
        raise UnknownName("axis", name, known)
    if name.startswith(MEASURED):
        raise UsageError(
            f"{name} cannot be an axis: it decides what is measured, which all settings share.",
            "Make one sweep for each of its values.",
        )
    if ".." in given:
        return _range(config, name, given)
    parts = [part.strip() for part in given.split(",") if part.strip()]
    if not parts:
        raise UsageError(f"axis {name} has no values.", f"Give some: --axis {name}=V1,V2")
    values = [value_of(changed(config, {name: part}), name) for part in parts]
    return Axis(name, tuple(dict.fromkeys(values)))


def _range(config: RunConfig, name: str, given: str) -> Range:
    bounds, _, scale = given.partition(":")
    low, _, high = bounds.partition("..")
    if scale not in ("", "log"):
        raise UsageError(f"axis {name}: {scale!r} is no scale.", "The one known scale is log.")
    kind = type(value_of(config, name))
    if kind not in (int, float):
        raise UsageError(f"axis {name} takes no numbers, so it has no range.", "List its values.")
    ends = [value_of(changed(config, {name: end.strip()}), name) for end in (low, high)]
    if not ends[0] < ends[1]:
        raise UsageError(f"axis {name}: {low} is not below {high}.")
    if scale and ends[0] <= 0:
        raise UsageError(f"axis {name}: a range in logarithms begins above 0.")
    return Range(name, float(ends[0]), float(ends[1]), bool(scale), kind is int)


def changed(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """Return the configuration with some fields, by their dotted names, set."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *parents, leaf = name.split(".")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = value
    return override(config, tree)


def grid(config: RunConfig, axes: Sequence[Axis]) -> list[Setting]:
    """Return every combination, the last axis fastest; raises `UsageError` for an empty grid."""
    check_axes(axes)
    if not axes:
        raise UsageError(
            "the grid is empty: no axis was given.",
            "Give --top-k, --alpha or --axis FIELD=V1,V2, or search with --trials.",
        )
    names = [axis.field for axis in axes]
    found = []
    for number, values in enumerate(itertools.product(*(a.values for a in axes)), 1):
        chosen = dict(zip(names, values, strict=True))
        found.append(Setting(number, chosen, changed(config, chosen)))
    return found


def check_axes(axes: Sequence[Axis | Range]) -> None:
    """Raise `UsageError` where two axes are of one field."""
    names = [axis.field for axis in axes]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"axis {name} is given twice.", "Put all its values into one.")
