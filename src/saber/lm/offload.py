"""Layers that wait in main memory and come to the device for their calls alone, one after the other.

So a model may be larger than the device that computes: it holds the embeddings, the output head, the
layer that is computing, and keys and values. Between calls every parameter of a layer is its original in
main memory; there it is read, edited and saved like any other. Nothing is quantised, and what comes out is
what the same model gives on a device with room for all of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from saber.errors import ModelError, UsageError

_MARK = "_saber_waiting"


@dataclass
class _Waiting:
    """The tensors of one module: in main memory, or on the device while it is wanted there."""

    module: nn.Module
    """The module, with all that is inside it."""
    device: torch.device
    """Where it computes."""
    wanted: int = 0
    """How many calls and holders want it there."""
    called: bool = False
    """Whether a call of it is under way."""
    away: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Tensors that are there, and others that hold their originals meanwhile."""

    def come(self) -> None:
        """Bring it to the device; where that has no room, all is left as it was."""
        if not self.wanted:
            try:
                for tensor in (*self.module.parameters(), *self.module.buffers()):
                    self.away.append((tensor, _filled(tensor, _sent(tensor, self.device))))
            except BaseException:
                self._put_back()
                raise
        self.wanted += 1

    def begin(self) -> None:
        """Come for a call; one that was interrupted before, of which hooks do not hear, is over."""
        self.end()
        self.come()
        self.called = True

    def end(self) -> None:
        """Go after a call, if one is under way."""
        if self.called:
            self.called = False
            self.go()

    def go(self) -> None:
        """Put the originals back once nobody wants it any more."""
        self.wanted -= 1
        if not self.wanted:
            self._put_back()

    def _put_back(self) -> None:
        for tensor, original in self.away:
            _filled(tensor, original)
        self.away.clear()


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.detach().to(device)


def _filled(tensor: Tensor, other: Tensor) -> Tensor:
    """Let a tensor hold what another does, and stay the same object; return one that holds what it held.

    Assigned where torch can do that between the two devices, else exchanged, as `nn.Module.to` does.
    """
    if torch._has_compatible_shallow_copy_type(tensor, other):
        held, tensor.data = tensor.data, other
        return held
    same_kind = (
        nn.Parameter(other, requires_grad=False) if isinstance(tensor, nn.Parameter) else other
    )
    torch.utils.swap_tensors(tensor, same_kind)
    return same_kind


def keep_aside(model: nn.Module, device: torch.device) -> None:
    """Let the members of a model's outermost module lists wait in main memory; move the rest to a device.

    The model has to lie in main memory. A member comes with its first call and goes at its end, also one
    that fails. Raises `ModelError` where the model has no such list.
    """
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    nested = {id(inner) for one in lists for inner in one.modules() if inner is not one}
    outermost = [one for one in lists if id(one) not in nested]
    members = dict.fromkeys(member for one in outermost for member in one)
    if not members:
        raise ModelError(
            "this model keeps its layers in no module list, so they cannot wait in main memory.",
            "Leave out --offload.",
        )
    inside = {id(module) for member in members for module in member.modules()}
    for module in model.modules():
        if id(module) not in inside:
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                _filled(tensor, _sent(tensor, device))
    for member in members:
        waiting = _Waiting(member, device)
        setattr(member, _MARK, waiting)
        member.register_forward_pre_hook(lambda _m, _a, w=waiting: w.begin())
        member.register_forward_hook(lambda _m, _a, _o, w=waiting: w.end(), always_call=True)


def is_kept_aside(module: nn.Module) -> bool:
    """Whether a module waits in main memory between its calls."""
    return hasattr(module, _MARK)


def home(module: nn.Module) -> torch.device | None:
    """Return the device on which a module computes; None for one without parameters."""
    waiting: Any = getattr(module, _MARK, None)
    if waiting is not None:
        return waiting.device
    return next((p.device for p in module.parameters()), None)


@contextmanager
def at_home(module: nn.Module) -> Iterator[None]:
    """Keep a module that waits in main memory on its device meanwhile, for many calls in a row.

    What is done to its parameters meanwhile is gone at the end.
    """
    waiting: Any = getattr(module, _MARK, None)
    if waiting is None:
        yield
        return
    waiting.come()
    try:
        yield
    finally:
        waiting.go()


def require_sense(device: torch.device, device_map: str) -> None:
    """Raise `UsageError` where layers that wait in main memory gain nothing."""
    if device_map:
        raise UsageError(
            "--offload keeps layers in main memory for one device, and --device-map spreads them over "
            "several.",
            "Give one of the two.",
        )
    if device.type in ("cpu", "mps"):
        where = "The CPU has" if device.type == "cpu" else "Apple's GPUs have"
        raise UsageError(
            f"--offload keeps layers in main memory for a device with memory of its own. {where} none.",
            "Leave it out.",
        )
