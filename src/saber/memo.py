"""A seam for keeping intermediate results: whoever runs many settings of one model hands one in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

T = TypeVar("T")
Key = tuple[Any, ...]
"""All that a result depends on besides the model as it was loaded; its `repr` tells keys apart."""


@runtime_checkable
class Memo(Protocol):
    """Gives the result of this key, computed now or kept from before."""

    def __call__(self, key: Key, compute: Callable[[], T], /) -> T:
        """Return what `compute()` returns; it is called only where the key is new."""
        ...


def forgetful(key: Key, compute: Callable[[], T], /) -> T:
    """Keep nothing: compute each time."""
    del key
    return compute()
