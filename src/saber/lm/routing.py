"""Keep the tokens that are read apart from all others where a router hands them to experts.

An expert gets some rows, and nothing about a row says whose it is. So what holds the experts of a layer
(a *gate*) takes the tokens that are read and those that are not in two calls, and padding in neither: no
matter how tokens are routed, what meets an expert's weight in the first call is read. That is the same
as one call where every token is treated alone; whether it is, and which module takes all tokens, a
trial tells.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from saber.lm.model import LanguageModel
from saber.lm.substitution import random_tokens
from saber.lm.tap import Tap, plain_experts
from saber.lm.writers import Writer

SOME = (1, 4, 7, 8, 13)
"""Tokens of a trial that a module is given alone."""
ALIKE, ROUNDED = 1e-4, 5e-2
"""How far off its output may be then, relative, and the same in 16 bits."""
_MISFITS = (RuntimeError, ValueError, IndexError, TypeError, KeyError, AssertionError)
"""What a module raises that cannot be given some tokens alone."""

Form = Literal["flat", "batched", ""]
"""How a tensor holds tokens: (rows x width, ...), (rows, width, ...), or not at all."""
Tokens = Int[Tensor, "_"]
"""Some tokens of a batch, as indices into the flattened (rows x width) axis."""


@dataclass(frozen=True)
class Extent:
    """The token axes of a batch, padding included."""

    rows: int
    """Texts."""
    width: int
    """Tokens of each."""

    def form(self, value: Any) -> Form:
        """Return how a value holds the tokens of the batch."""
        if not isinstance(value, Tensor):
            return ""
        if value.shape[:2] == (self.rows, self.width):
            return "batched"
        return "flat" if value.shape[:1] == (self.rows * self.width,) else ""


TRIAL = Extent(3, 5)
"""Numbers that no other axis of a module's arguments has."""


@dataclass(frozen=True)
class Gate:
    """A module that takes all tokens of a layer to its experts, and treats each alone."""

    module: nn.Module
    """The module."""
    args: tuple[Form, ...]
    """Form of each positional argument."""
    kwargs: Mapping[str, Form]
    """Form of each keyword argument."""
    out: tuple[Form, ...]
    """Form of each part of the output."""

    def some(
        self,
        forward: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        at: Tokens,
    ) -> Any:
        """Return what the module, called by `forward`, makes of some tokens alone."""
        given = [_taken(v, form, at) for v, form in zip(args, self.args, strict=True)]
        return forward(
            *given, **{name: _taken(v, self.kwargs.get(name, ""), at) for name, v in kwargs.items()}
        )

    def joined(self, batch: Extent, parts: Sequence[tuple[Tokens, Any]]) -> Any:
        """Return the output over a whole batch of what came out for parts of it; 0 for no part's tokens."""
        found = []
        for index, form in enumerate(self.out):
            values = [(at, _parts(out)[index]) for at, out in parts]
            found.append(_spread(batch, values, form) if form else values[0][1])
        return tuple(found) if isinstance(parts[0][1], (tuple, list)) else found[0]


@dataclass
class Turn:
    """Which tokens a weight is meeting (mutable)."""

    of: Literal["all", "read", "others"] = "all"
    """All of a batch, as everywhere outside of gates, or within one those that are read or the others."""


@contextmanager
def parted(gates: Sequence[Gate], batch: Extent, read: Tokens, others: Tokens) -> Iterator[Turn]:
    """Let gates take tokens that are read and others apart, and none that are neither (padding)."""
    turn = Turn()
    with ExitStack() as stack:
        for gate in gates:
            stack.enter_context(_in_turns(gate, batch, read, others, turn))
        yield turn


@contextmanager
def _in_turns(
    gate: Gate, batch: Extent, read: Tokens, others: Tokens, turn: Turn
) -> Iterator[None]:
    module = gate.module
    # A model that lies on several devices has hooks of accelerate's there.
    hooked, whole = "forward" in vars(module), module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        try:
            turn.of = "read"
            parts = [(read, gate.some(whole, args, kwargs, read))]
            turn.of = "others"
            if len(others):
                parts.append((others, gate.some(whole, args, kwargs, others)))
        finally:
            turn.of = "all"
        return gate.joined(batch, parts)

    module.forward = forward
    try:
        yield
    finally:
        if hooked:
            module.forward = whole
        else:
            del module.forward


def _parts(out: Any) -> tuple[Any, ...]:
    return tuple(out) if isinstance(out, (tuple, list)) else (out,)


def _taken(value: Any, form: Form, at: Tokens) -> Any:
    """Return some tokens of a value, in the form that it has."""
    if not form:
        return value
    flat = value.flatten(0, 1) if form == "batched" else value
    part = flat[at.to(flat.device)]
    return part[None] if form == "batched" else part


def _spread(batch: Extent, values: Sequence[tuple[Tokens, Tensor]], form: Form) -> Tensor:
    """Return tokens at their places among all."""
    rows = [(at, v[0] if form == "batched" else v) for at, v in values]
    flat = rows[0][1].new_zeros(batch.rows * batch.width, *rows[0][1].shape[1:])
    for at, value in rows:
        flat[at.to(flat.device)] = value
    return flat.unflatten(0, (batch.rows, batch.width)) if form == "batched" else flat


def routes(lm: LanguageModel, writers: Sequence[Writer]) -> bool:
    """Whether some writer sees other rows than all tokens, as a routed expert does."""
    return bool(any(w.experts for w in writers) or _routed(lm, writers))


def find_gates(lm: LanguageModel, writers: Sequence[Writer]) -> tuple[Gate, ...] | None:
    """Return the gates of all writers that are routed to; None where one has none.

    A gate is the innermost module around the experts of a kind that passes the trial.
    """
    chains = [
        _around(lm, layer, names) for (layer, _), names in _kinds(_routed(lm, writers)).items()
    ]
    if not chains or not all(chains):
        return None if chains else ()
    tried = _tried(lm, {path for chain in chains for path in chain})
    found: set[str] = set()
    for chain in chains:
        inmost = next((path for path in chain if path in tried), None)
        if inmost is None:
            return None
        found.add(inmost)
    within = {p for p in found if any(p.startswith(f"{other}.") for other in found)}
    return tuple(tried[path] for path in sorted(found - within))


def one_call(lm: LanguageModel, writers: Sequence[Writer]) -> list[Writer]:
    """Return the writers whose module is called once and shows inputs and outputs of all tokens.

    Not those of layers that share a module, those that are routed to, nor weights that code of the model's
    uses without their module.
    """
    calls: dict[str, list[tuple[Form, ...]]] = defaultdict(list)
    routed = {w.weight for w in _routed(lm, writers)}
    ids = random_tokens(lm, TRIAL.width, TRIAL.rows)
    whole = [w for w in writers if w.weight == f"{w.name}.weight" and w.weight not in routed]

    def record(name: str) -> Any:
        return lambda _m, args, out: calls[name].append(tuple(map(TRIAL.form, (*args[:1], out))))

    with ExitStack() as stack, torch.no_grad():
        for w in whole:
            hook = lm.model.get_submodule(w.name).register_forward_hook(record(w.name))
            stack.callback(hook.remove)
        lm.model(input_ids=ids, use_cache=False)
    lm.work.tokens += ids.numel()
    return [w for w in whole if calls[w.name] in ([("batched",) * 2], [("flat",) * 2])]


def _routed(lm: LanguageModel, writers: Sequence[Writer]) -> list[Writer]:
    """Return the writers that see other rows than all tokens, and those of their kind that see none."""
    counts: dict[str, set[int]] = defaultdict(set)
    ids = random_tokens(lm, TRIAL.width, TRIAL.rows)
    tap = Tap(lm, writers, lambda key, rows: counts[key[0]].add(len(rows)))
    with plain_experts(lm), torch.no_grad(), tap:
        lm.model(input_ids=ids, use_cache=False)
    lm.work.tokens += ids.numel()
    odd = {_kind(w) for w in writers if w.experts or not counts[w.name] <= {ids.numel()}}
    return [w for w in writers if _kind(w) in odd and lm.model.get_parameter(w.weight).ndim > 1]


def _kind(writer: Writer) -> tuple[int, str]:
    """Return the layer and the name without places in lists, which experts of a kind share."""
    return writer.layer, re.sub(r"\.\d+(?=\.)", ".#", writer.weight)


def _kinds(writers: Sequence[Writer]) -> dict[tuple[int, str], list[str]]:
    kinds: dict[tuple[int, str], list[str]] = defaultdict(list)
    for writer in writers:
        kinds[_kind(writer)].append(writer.weight)
    return kinds


def _around(lm: LanguageModel, layer: int, names: Sequence[str]) -> list[str]:
    """Return the modules of a layer that hold all of these weights, from the innermost on."""
    parts = [name.split(".")[:-1] for name in names]
    shared = [p[0] for p in takewhile(lambda p: len(set(p)) == 1, zip(*parts, strict=False))]
    start = [*lm.layers_path.split("."), str(layer)]
    if shared[: len(start)] != start:
        return []
    return [".".join(shared[:end]) for end in range(len(shared), len(start), -1)]


def _tried(lm: LanguageModel, paths: set[str]) -> dict[str, Gate]:
    """Return those of some modules that take each token alone, tried with two texts that are the same."""
    given: dict[str, list[Any]] = defaultdict(list)
    made: dict[str, list[Any]] = defaultdict(list)

    def copied(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) else value

    def before(path: str) -> Any:
        return lambda _m, args, kwargs: given[path].append(
            ([*map(copied, args)], {k: copied(v) for k, v in kwargs.items()})
        )

    def after(path: str) -> Any:
        return lambda _m, _a, out: made[path].append(tuple(map(copied, _parts(out))))

    ids = random_tokens(lm, TRIAL.width, TRIAL.rows)
    ids[-1] = ids[0]
    mask = torch.ones_like(ids)
    mask[1, -1] = 0
    modules = {path: lm.model.get_submodule(path) for path in paths}
    found: dict[str, Gate] = {}
    with ExitStack() as stack:
        stack.enter_context(plain_experts(lm))
        stack.enter_context(torch.no_grad())
        with ExitStack() as hooks:
            for path, module in modules.items():
                handle = module.register_forward_pre_hook(before(path), with_kwargs=True)
                hooks.callback(handle.remove)
                hooks.callback(module.register_forward_hook(after(path)).remove)
            positions = torch.arange(TRIAL.width, device=ids.device).expand(TRIAL.rows, -1)
            lm.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        lm.work.tokens += ids.numel()
        for path, module in modules.items():
            if len(given[path]) == 1:
                args, kwargs = given[path][0]
                gate = _gate(module, args, kwargs, made[path][0])
                if gate is not None:
                    found[path] = gate
    return found


def _gate(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], out: Sequence[Any]
) -> Gate | None:
    """Return a module as a gate if it makes of some tokens what it makes of them among all."""
    gate = Gate(
        module,
        tuple(map(TRIAL.form, args)),
        {name: TRIAL.form(v) for name, v in kwargs.items()},
        tuple(map(TRIAL.form, out)),
    )
    tokens = [v for v in (*args, *kwargs.values()) if TRIAL.form(v) and v.is_floating_point()]
    if not tokens or not gate.out[0]:
        return None
    first = torch.arange(TRIAL.width)
    last = first + TRIAL.width * (TRIAL.rows - 1)
    # In any other order than that of the texts these are not the tokens of two that are the same.
    if not all(_alike(*(_taken(v, TRIAL.form(v), at) for at in (first, last))) for v in tokens):
        return None
    at = torch.tensor(SOME)
    try:
        alone = _parts(gate.some(module.forward, args, kwargs, at))
    except _MISFITS:
        return None
    pairs = zip(alone, out, gate.out, strict=True)
    alike = all(_alike(part, _taken(whole, form, at)) for part, whole, form in pairs if form)
    return gate if alike else None


def _alike(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    limit = ALIKE if one.dtype.itemsize > 2 else ROUNDED
    one, other = (x.cpu().double() for x in (one, other))
    return bool((one - other).norm() <= limit * other.norm())
