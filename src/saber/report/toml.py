"""Write a resolved configuration as TOML, so that it can be pasted into `--config FILE.toml`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def dumps(config: Mapping[str, Any]) -> str:
    """`config` as TOML text; keys without a value (None) are left out, TOML has no null."""
    return "\n".join(_section(config, ())).strip() + "\n"


def _section(config: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    flat = {k: v for k, v in config.items() if v is not None and not isinstance(v, Mapping)}
    nested = {k: v for k, v in config.items() if isinstance(v, Mapping)}
    lines = ["", f"[{'.'.join(_key(k) for k in path)}]"] if path and (flat or not nested) else []
    lines += [f"{_key(k)} = {_value(v)}" for k, v in flat.items()]
    for key, inner in nested.items():
        lines += _section(inner, (*path, key))
    return lines


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else _text(key)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(_value(v) for v in value if v is not None)}]"
    if isinstance(value, Mapping):
        inside = ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items() if v is not None)
        return f"{{{inside}}}"
    return _text(str(value))


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
