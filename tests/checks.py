"""Checks of types as the tests run: jaxtyping's own where arrays are spoken of, elsewhere beartype's alone.

What jaxtyping adds is that the axes of all of a call's arrays agree. It binds the arguments of every call
for that, which takes longer than most of the functions do.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import is_dataclass
from functools import partial
from typing import Any

import jaxtyping
from beartype import BeartypeConf

whole = jaxtyping.jaxtyped
_WORD = re.compile(r"\w+")
_AS_WHOLE = BeartypeConf(violation_type=jaxtyping.TypeCheckError)


def of_arrays(function: Any) -> bool:
    """Whether a hint of a function names what jaxtyping made."""
    names = _WORD.findall(" ".join(map(str, function.__annotations__.values())))
    found = (function.__globals__.get(name) for name in names)
    return any(str(getattr(one, "__module__", "")).startswith("jaxtyping") for one in found)


def meant(hint: Any, names: dict[str, Any]) -> Any:
    """Evaluate a hint; anything where it names what only a type checker imports, as jaxtyping has it."""
    try:
        return eval(hint, names) if isinstance(hint, str) else hint
    except NameError:
        return Any


def checked(given: Any, typechecker: Callable[..., Any]) -> Any:
    """Let a function, or a dataclass as it is made, check its hints."""
    if isinstance(given, type):
        if is_dataclass(given) and "__init__" in vars(given):
            setattr(given, "__init__", checked(given.__init__, typechecker))  # noqa: B010
        return given
    if of_arrays(given):
        return whole(given, typechecker=typechecker)
    meanings = {k: meant(h, given.__globals__) for k, h in given.__annotations__.items()}
    given.__annotations__ = meanings
    return typechecker(given, conf=_AS_WHOLE)


def install() -> None:
    """Let the hook behind `--jaxtyping-packages` decorate with this, in what is not imported yet."""
    jaxtyping.jaxtyped = lambda *, typechecker: partial(checked, typechecker=typechecker)


install()
