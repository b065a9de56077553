"""Write docs/settings.md from the dataclasses that hold the settings."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from saber.cli.main import FLAGS
from saber.config import _LIMITS, PRESETS, RunConfig, value_of

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
HEAD = """\
# Settings

Written by `python scripts/settings_page.py` from the source; do not edit.

Every setting can be given as `--set NAME=VALUE`, in a TOML file (`--config FILE`) whose tables are the
sections below, or by its option where it has one. Flags go before the file, the file before the preset
(`--preset`), the preset before the defaults. Lists are written with commas between their items, in TOML as
arrays. The resolved settings are in `run.json`, under `config`.

```toml
preset = "card"
seed = 1

[edit]
alpha = 0.9
```
"""


def page() -> str:
    """Return the page."""
    return HEAD + "".join(_section("", RunConfig))


def _section(path: str, kind: type) -> Iterator[str]:
    """Yield the table of a dataclass, and then those of the dataclasses in it."""
    meanings, types = _meanings(kind), typing.get_type_hints(kind)
    title, about = (path, inspect.getdoc(kind) or "") if path else ("top level", "")
    rows, inner = [], []
    for field in dataclasses.fields(kind):
        name = ".".join(part for part in (path, field.name.rstrip("_")) if part)
        if dataclasses.is_dataclass(types[field.name]):
            inner.append((name, types[field.name]))
            continue
        cells = (_named(name), _default(name), _values(name, types[field.name]))
        rows.append(f"| {' | '.join((*cells, meanings[field.name]))} |\n")
    yield f"\n## {title}\n\n{f'{about}{chr(10) * 2}' if about else ''}"
    yield "| setting | default | values | meaning |\n|---|---|---|---|\n"
    yield from rows
    for name, part in inner:
        yield from _section(name, part)


def _meanings(kind: type) -> Mapping[str, str]:
    """Return what stands under each field in the source."""
    (made,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(made, ast.ClassDef)
    found = {}
    for field, below in zip(made.body, made.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
            assert isinstance(field.target, ast.Name)
            found[field.target.id] = " ".join(ast.literal_eval(below.value).split()).replace(
                "|", "\\|"
            )
    return found


def _named(name: str) -> str:
    flag = next(
        (f for f, path in FLAGS.items() if path == name), "preset" if name == "preset" else ""
    )
    option = f" (`--{flag.rstrip('_').replace('_', '-')}`)" if flag else ""
    return f"`{name}`{option}"


def _default(name: str) -> str:
    """Return the default, and what other presets have in its place."""
    usual = value_of(RunConfig(), name)
    others = {k: value_of(c, name) for k, c in PRESETS.items() if value_of(c, name) != usual}
    told = "" if name == "preset" else ", ".join(f"{k}: {_plain(v)}" for k, v in others.items())
    return _plain(usual) + (f" ({told})" if told else "")


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return str(value) if value != "" else "empty"


def _values(name: str, kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        return "whole numbers" if typing.get_args(kind)[0] is int else "names"
    if name == "preset":
        return ", ".join(PRESETS)
    if name in _LIMITS:
        low, high = _LIMITS[name]
        return f"{low:,.10g} to {high:,.10g}"
    return {bool: "true, false", str: "text"}.get(kind, "a number")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
