"""The rows that forward passes multiply a weight with, whatever module holds it.

Weights are recognised by their storage in the matrix products that a model makes, so that dense
layers, `Conv1D`, fused experts and code that calls a weight directly are all read alike.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from saber.lm.model import LanguageModel
from saber.lm.offload import is_kept_aside
from saber.lm.writers import Writer

Key = tuple[str, int]
"""Name of a writer, and the expert of a fused one (0 for a plain weight)."""
Receive = Callable[[Key, Float[Tensor, "rows d_in"]], None]
"""Gets rows as they come, on the model's device and in its dtype."""

_EXPERTS = "_experts_implementation"
"""Where a configuration (of the whole model, or of a part) says how fused experts run."""

_aten = torch.ops.aten
# Which two arguments each product multiplies.
_PRODUCTS: dict[Any, tuple[int, int]] = {
    _aten.mm.default: (0, 1),
    _aten.bmm.default: (0, 1),
    _aten.mv.default: (0, 1),
    _aten.linear.default: (0, 1),
    _aten.addmm.default: (1, 2),
    _aten.baddbmm.default: (1, 2),
}


class Tap(TorchDispatchMode):
    """Sees every product below autograd, and passes on the rows that meet a writer's weight.

    Fused experts show their own rows only where they run one by one, as `read_inputs` has them do.
    """

    def __init__(self, lm: LanguageModel, writers: Sequence[Writer], receive: Receive) -> None:
        super().__init__()
        self.receive = receive
        self._here: list[tuple[Writer, Tensor]] = []
        self._aside: dict[nn.Module, list[tuple[Writer, Tensor]]] = defaultdict(list)
        """Those in layers that wait in main memory, and lie elsewhere in each call."""
        holders: dict[int, list[nn.Module]] = defaultdict(list)
        for layer in filter(is_kept_aside, lm.layers):
            for parameter in layer.parameters():
                holders[id(parameter)].append(layer)
        for writer in writers:
            weight = lm.model.get_parameter(writer.weight)
            if weight.ndim < 2:
                continue
            if id(weight) not in holders:
                self._here.append((writer, weight))
            for layer in holders.get(id(weight), ()):  # several, where layers share it
                self._aside[layer].append((writer, weight))
        self.weights = _by_storage(self._here)
        self._watches = ExitStack()

    def __enter__(self) -> Tap:
        """Open the tap."""
        for layer in self._aside:
            came = layer.register_forward_pre_hook(self._came)
            gone = layer.register_forward_hook(self._gone, always_call=True)
            self._watches.callback(came.remove)
            self._watches.callback(gone.remove)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """Close it."""
        self._watches.close()
        super().__exit__(*error)

    def _came(self, layer: nn.Module, _args: Any) -> None:
        self.weights = _by_storage([*self._here, *self._aside[layer]])

    def _gone(self, *_call: Any) -> None:
        # What comes next, be it another layer's weights, may lie where these did.
        self.weights = _by_storage(self._here)

    @contextmanager
    def to(self, receive: Receive) -> Iterator[None]:
        """Open the tap with another receiver."""
        before, self.receive = self.receive, receive
        try:
            with self:
                yield
        finally:
            self.receive = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        if func in _PRODUCTS:
            left, right = (args[i] for i in _PRODUCTS[func])
            for one, other, flipped in ((right, left, False), (left, right, True)):
                self._look(one, other, flipped)
        return func(*args, **(kwargs or {}))

    def _look(self, weight: Tensor, rows: Tensor, flipped: bool) -> None:
        for writer, parameter in self.weights.get(weight.untyped_storage().data_ptr(), ()):
            start = weight.storage_offset() - parameter.storage_offset()
            if not 0 <= start < parameter.numel():
                continue
            # W @ x has its inputs in columns.
            given = rows.mT if flipped and rows.ndim > 1 else rows
            width = parameter.numel() // parameter.shape[writer.axis] // (writer.experts or 1)
            if given.shape[-1] != width:
                continue
            if writer.experts and weight.ndim == 3:
                for expert in range(writer.experts):
                    self.receive((writer.name, expert), given[expert])
            else:
                expert = start // parameter.stride(0) if writer.experts else 0
                self.receive((writer.name, expert), given.reshape(-1, width))


def _by_storage(
    weights: Sequence[tuple[Writer, Tensor]],
) -> dict[int, list[tuple[Writer, Tensor]]]:
    found: dict[int, list[tuple[Writer, Tensor]]] = defaultdict(list)
    for writer, weight in weights:
        found[weight.untyped_storage().data_ptr()].append((writer, weight))
    return found


@contextmanager
def plain_experts(lm: LanguageModel) -> Iterator[None]:
    """Let each expert meet its own rows in a product of its own, where transformers offers that."""
    configs = {
        id(c): c for m in lm.model.modules() if (c := getattr(m, "config", None)) is not None
    }
    fused = [
        (config, name)
        for config in configs.values()
        if (name := getattr(config, _EXPERTS, None)) not in (None, "eager")
    ]
    try:
        for config, _ in fused:
            setattr(config, _EXPERTS, "eager")
        yield
    finally:
        for config, name in fused:
            setattr(config, _EXPERTS, name)
