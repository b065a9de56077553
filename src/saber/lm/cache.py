"""A cache of keys and values with room ahead, so that a step writes its own rows and copies no others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

ROOM = 16
"""Tokens for which memory is taken at a time."""


class RoomyLayer(DynamicLayer):
    """A layer's cache that grows by `ROOM` tokens at a time and writes new ones into what is there."""

    def __init__(self, space: tuple[Tensor, Tensor], used: int) -> None:
        """Take keys and values (batch, heads, room, d) of which the first `used` tokens are filled."""
        super().__init__()
        self.lazy_initialization(*space)
        self._space, self._used = space, used
        self._show()

    @classmethod
    def of(cls, filled: DynamicLayer) -> RoomyLayer:
        """Take over a filled layer."""
        keys, values = filled.keys, filled.values
        assert keys is not None
        assert values is not None
        return cls((_longer(keys, ROOM), _longer(values, ROOM)), keys.shape[-2])

    @classmethod
    def joined(
        cls, layers: Sequence[RoomyLayer], rows: Sequence[Tensor], prefix: int, own: int
    ) -> RoomyLayer:
        """Return a layer with rows of several: see `join`."""
        count = sum(map(len, rows))
        spaces = []
        for kind in (0, 1):
            like = layers[0]._space[kind]
            space = like.new_empty(count, like.shape[1], prefix + own + ROOM, like.shape[3])
            at = 0
            for layer, chosen in zip(layers, rows, strict=True):
                given = layer._space[kind]
                # Of a model spread over several devices a layer's may lie on another than the tokens.
                chosen = chosen.to(given.device)
                held = min(own, layer._used - prefix)
                mine = space[at : at + len(chosen)]
                mine[:, :, :prefix] = given[chosen, :, :prefix]
                # Masked, but what is no number would show through all the same.
                mine[:, :, prefix : prefix + own - held] = 0
                mine[:, :, prefix + own - held : prefix + own] = given[
                    chosen, :, layer._used - held : layer._used
                ]
                at += len(chosen)
            spaces.append(space)
        return cls((spaces[0], spaces[1]), prefix + own)

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

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        keys, values = (t.repeat_interleave(repeats, 0) for t in self._space)
        self._space = (keys, values)
        self._show()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        keys, values = (t[indices.to(t.device)] for t in self._space)
        self._space = (keys, values)
        self._show()

    def release(self) -> None:
        """Give the memory back."""
        keys, values = (t.new_empty(0, t.shape[1], 0, t.shape[3]) for t in self._space)
        self._space, self._used = (keys, values), 0
        self._show()


def is_plain(cache: Any) -> bool:
    """Whether all layers of a cache hold keys and values alone, so that rows and prefixes can be taken of it.

    Layers with further states, of a convolution for instance, offer the same methods and leave those whole.
    """
    plain = (DynamicLayer, DynamicSlidingWindowLayer, RoomyLayer)
    layers: list[Any] = getattr(cache, "layers", None) or []
    return bool(layers) and all(type(layer) in plain for layer in layers)


def narrowest(cache: Any, config: Any) -> float:
    """Return the least window, tokens, that a cache's layers or the configuration tell of; infinity for none.

    Not every cache knows the windows of its model, and the configuration calls some of them otherwise.
    """
    layers: list[Any] = getattr(cache, "layers", None) or []
    told = config.to_dict().items()
    windows = [n for key, n in told if key.endswith(("window", "window_size"))]
    windows += [getattr(layer, "sliding_window", None) for layer in layers]
    return min((float(n) for n in windows if type(n) is int and n > 0), default=math.inf)


def mask_of(cache: Any, mask: Int[Tensor, "rows width"], new: int) -> Int[Tensor, "rows _"]:
    """Return the mask that a model takes of its last `new` tokens behind a filled cache.

    It is that of all tokens where any layer attends to them. Where all hold states of a recurrence, some
    models multiply what goes in by the mask as it is, so it has to be that of the new tokens alone.
    """
    layers: list[Any] = getattr(cache, "layers", None) or []
    attends = not layers or any(getattr(layer, "keys", None) is not None for layer in layers)
    return mask if attends else mask[:, -new:]


def bytes_per_token(cache: Any) -> int:
    """Return what the keys and values of a token take in a filled cache of plain layers; 0 for others."""
    if not is_plain(cache):
        return 0
    return sum(
        t.numel() * t.element_size() // max(1, t.shape[0] * t.shape[-2])
        for layer in cache.layers
        for t in (layer.keys, layer.values)
        if t is not None
    )


def make_room(cache: Any, longest: int) -> None:
    """Let the plain layers of a filled cache take most new tokens without copying the old ones.

    Layers that see a window alone are plain while no more than `longest` tokens come to lie in them,
    all of them within it.
    """
    for index, layer in enumerate(getattr(cache, "layers", None) or []):
        window = getattr(layer, "sliding_window", None)
        wide = type(layer) is DynamicSlidingWindowLayer and window is not None and longest < window
        if (type(layer) is DynamicLayer or wide) and layer.get_seq_length():
            cache.layers[index] = RoomyLayer.of(layer)


def is_roomy(cache: Any) -> bool:
    """Whether rows can be taken of a cache and put beside those of others: see `join`."""
    layers: list[Any] = getattr(cache, "layers", None) or []
    return bool(layers) and all(type(layer) is RoomyLayer for layer in layers)


def join(
    caches: Sequence[Any], rows: Sequence[Int[Tensor, " _"]], prefix: int, own: int
) -> DynamicCache:
    """Put chosen rows of several roomy caches into one, and give the memory of these back.

    Each row has its first `prefix` tokens, and of what follows the last `own`: less is filled up with
    zeros in front, so that the last tokens lie below one another.
    """
    joined = DynamicCache()
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        joined.layers.append(RoomyLayer.joined(layers, rows, prefix, own))
        for layer in layers:
            layer.release()
    return joined


def _longer(states: Tensor, room: int) -> Tensor:
    shape = list(states.shape)
    shape[-2] += room
    longer = states.new_empty(shape)
    longer[..., : states.shape[-2], :] = states
    return longer
