"""A cache of keys and values with room ahead, so that a step writes its own rows and copies no others."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

ROOM = 16
"""Tokens for which memory is taken at a time."""


class RoomyLayer(DynamicLayer):
    """A layer's cache that grows by `ROOM` tokens at a time and writes new ones into what is there."""

    def __init__(self, filled: DynamicLayer) -> None:
        """Take over a filled layer."""
        super().__init__()
        keys, values = filled.keys, filled.values
        assert keys is not None
        assert values is not None
        self.lazy_initialization(keys, values)
        self._used = keys.shape[-2]
        self._space = (_longer(keys, ROOM), _longer(values, ROOM))
        self._show()

    def _show(self) -> tuple[Tensor, Tensor]:
        keys, values = (t[..., : self._used, :] for t in self._space)
        self.keys, self.values = keys, values
        return keys, values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new states (batch, heads, new, d) behind the old ones; return all."""
        del args, kwargs
        start, self._used = self._used, self._used + key_states.shape[-2]
        lacking = self._used - self._space[0].shape[-2]
        if lacking > 0:
            keys, values = self._space
            more = max(lacking, ROOM)
            self._space = (_longer(keys, more), _longer(values, more))
        for space, new in zip(self._space, (key_states, value_states), strict=True):
            space[..., start : self._used, :] = new
        return self._show()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        keys, values = self._space
        self._space = (keys[indices], values[indices])
        self._show()


def is_plain(cache: Any) -> bool:
    """Whether all layers of a cache hold keys and values alone, so that rows and prefixes can be taken of it.

    Layers with further states, of a convolution for instance, offer the same methods and leave those whole.
    """
    plain = (DynamicLayer, DynamicSlidingWindowLayer, RoomyLayer)
    layers: list[Any] = getattr(cache, "layers", None) or []
    return bool(layers) and all(type(layer) in plain for layer in layers)


def make_room(cache: Any) -> None:
    """Let the plain layers of a filled cache take most new tokens without copying the old ones."""
    for index, layer in enumerate(getattr(cache, "layers", None) or []):
        if type(layer) is DynamicLayer and layer.get_seq_length():
            cache.layers[index] = RoomyLayer(layer)


def _longer(states: Tensor, room: int) -> Tensor:
    shape = list(states.shape)
    shape[-2] += room
    longer = states.new_empty(shape)
    longer[..., : states.shape[-2], :] = states
    return longer
