"""Watch what a layer does to the stream while some of its parameters are held at other values.

A parameter *writes* to the residual stream when, held at `z v^T` (z over its d_model axis, v over
all others), it changes the layer's output by

    change[t, j] = a[t] g[j] z[j]

for every z: each token by a number of its own (what v meets there, a routing weight, a norm's
1/rms), each coordinate by a fixed gain g. Anything that comes before another matrix mixes
coordinates, and anything that is no factor of a sum (a norm's own gain, a convolution over tokens)
lets t and j depend on one another; neither fits with one g for two different z. So the test finds
the parameter, proves which of its axes the outputs lie along, and reads off the gain, whatever
the module is called and however its experts are stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saber.lm.layers import stream
from saber.lm.model import LanguageModel
from saber.lm.offload import at_home, home

TOKENS = 7
"""Tokens of a recorded call: a number that no other axis of a stream has."""
MEASURED = "a gain of its own for every coordinate"
BLOCK = 1 << 24
"""Entries of a substitute that are made at once."""
FIT_LIMIT = 1e-3
_HALF = (torch.bfloat16, torch.float16)
_COMPUTED = (torch.float32, torch.float64, *_HALF)


@dataclass(frozen=True)
class Call:
    """The arguments with which a layer was called, its stream replaced by random tokens."""

    args: tuple[Any, ...]
    """Positional arguments."""
    kwargs: dict[str, Any]
    """Keyword arguments."""

    @property
    def hidden(self) -> Tensor:
        """The stream that goes in."""
        return self.args[0] if self.args else self.kwargs["hidden_states"]

    def on(self, hidden: Tensor) -> Call:
        """Return the same call on another stream."""
        if self.args:
            return replace(self, args=(hidden, *self.args[1:]))
        return replace(self, kwargs={**self.kwargs, "hidden_states": hidden})

    def wide(self) -> Call:
        """Return the same call with all it is given in 16 bits in float32."""
        return replace(self, args=_widened(self.args), kwargs=_widened(self.kwargs))

    def run(self, layer: nn.Module) -> Float[Tensor, "tokens streams d_model"]:
        """Return the layer's output in float64, one row of streams a token."""
        # A layer may add to its input in place, or leave states behind for later layers.
        fresh = self.on(self.hidden.clone())
        kwargs = {k: dict(v) if type(v) is dict else v for k, v in fresh.kwargs.items()}
        with torch.no_grad():
            return by_token(stream(layer(*fresh.args, **kwargs)))

    @property
    def rows(self) -> Float[Tensor, "tokens streams d_model"]:
        """The stream that goes in, in float64, one row of streams a token."""
        return by_token(self.hidden)


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.dtype in _HALF else value
    if type(value) in (tuple, list):
        return type(value)(map(_widened, value))
    return {k: _widened(v) for k, v in value.items()} if type(value) is dict else value


@contextmanager
def widened(layer: nn.Module) -> Iterator[None]:
    """Hold what a layer has in 16 bits in float32; the very same storage comes back at the end."""
    kept = [(t, t.data) for t in (*layer.parameters(), *layer.buffers())]
    try:
        for tensor, data in kept:
            tensor.data = _widened(data)
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data


def by_token(hidden: Tensor) -> Float[Tensor, "tokens streams d_model"]:
    """Bring a stream of any shape into rows by token; several streams of a token are kept apart.

    In float64 on the CPU: Apple's GPUs have none, and layers may lie on several devices.
    """
    axis = list(hidden.shape[:-1]).index(TOKENS)
    return hidden.movedim(axis, 0).reshape(TOKENS, -1, hidden.shape[-1]).cpu().double()


def random_tokens(lm: LanguageModel, tokens: int, rows: int = 1) -> Tensor:
    """Return reproducible random token ids (rows, tokens) on the model's device."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, int(lm.text_config.vocab_size), (rows, tokens), generator=generator)
    return ids.to(lm.device)


def layer_calls(lm: LanguageModel) -> list[Call]:
    """Record how each layer is called, and put random streams of unit variance into the calls."""
    calls: list[Call] = []

    def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(Call(args, {k: dict(v) if type(v) is dict else v for k, v in kwargs.items()}))

    with ExitStack() as stack:
        for layer in lm.layers:
            handle = layer.register_forward_pre_hook(record, with_kwargs=True)
            stack.callback(handle.remove)
        with torch.no_grad():
            lm.model(input_ids=random_tokens(lm, TOKENS), use_cache=False)
    generator = torch.Generator().manual_seed(2)
    streams = [torch.randn(c.hidden.shape, generator=generator).to(c.hidden) for c in calls]
    # Of a model spread over several devices the stream may come from another than the layer's own.
    triples = zip(calls, streams, lm.layers, strict=True)
    return [c.on(s.to(home(layer))) for c, s, layer in triples]


def streams_axis(lm: LanguageModel) -> int | None:
    """Return the axis of a layer's output along which the streams of a token lie; None for one stream."""
    shapes: list[list[int]] = []
    handle = lm.layers[0].register_forward_hook(lambda _m, _a, o: shapes.append([*stream(o).shape]))
    with ExitStack() as stack, torch.no_grad():
        stack.callback(handle.remove)
        lm.model(input_ids=random_tokens(lm, TOKENS, TOKENS - 2), use_cache=False)
    axes = list(range(len(shapes[0]) - 1))
    for size in (TOKENS - 2, TOKENS):
        axes.remove(next(i for i in axes if shapes[0][i] == size))
    return axes[0] if axes else None


@contextmanager
def held(values: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Hold parameters at other values; the very same storage comes back at the end."""
    kept = [(parameter, parameter.data) for parameter in values]
    try:
        for parameter, value in values.items():
            parameter.data = value.to(parameter.data).contiguous()
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


def zeros(parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    """Return zeros for parameters, to hold them at; they share memory, so leave them as they are."""
    listed = list(parameters)
    sizes: dict[tuple[torch.dtype, torch.device], int] = {}
    for p in listed:
        kind = (p.dtype, p.device)
        sizes[kind] = max(sizes.get(kind, 0), p.numel())
    blank = {kind: torch.zeros(n, dtype=kind[0], device=kind[1]) for kind, n in sizes.items()}
    return {p: blank[p.dtype, p.device][: p.numel()].view(p.shape) for p in listed}


@dataclass(frozen=True)
class Fit:
    """How a parameter reaches the stream."""

    gain: Float[Tensor, " d_model"]
    """Gain behind it, of mean square one."""
    centred: bool
    """Whether its mean over the coordinates is taken off on the way."""


class Change(NamedTuple):
    """A vector that a parameter was made to write, what that changed, and how much it was enlarged."""

    z: Float[Tensor, " d_model"]
    change: Float[Tensor, "tokens streams d_model"]
    factor: float


class Substitute(NamedTuple):
    """The z v^T that a parameter is held at, as its factors: whole it is made for a forward pass alone."""

    parameter: nn.Parameter
    axis: int
    z: Float[Tensor, " d_model"]
    v: Float[Tensor, "*d_in"]

    def times(self, factor: float) -> Tensor:
        """Return a multiple of z v^T as the parameter is stored, rounded once, made in blocks."""
        value = torch.empty_like(self.parameter, memory_format=torch.contiguous_format)
        rows = value.movedim(self.axis, 0)
        z, v = self.z.to(value.device), self.v.to(value.device)
        step = max(1, BLOCK // v.numel())
        for begin in range(0, len(z), step):
            part = factor * torch.outer(z[begin : begin + step], v.reshape(-1))
            rows[begin : begin + step] = part.reshape(-1, *v.shape)
        return value


@dataclass(frozen=True)
class Bench:
    """A layer with one recorded call, on which parameters are tried."""

    layer: nn.Module
    """The decoder layer."""
    call: Call
    """How it is called."""

    @property
    def dtype(self) -> torch.dtype:
        """What the layer rounds to at its coarsest; some keep a float32 stream beside 16-bit weights."""
        used = {self.call.hidden.dtype, *(p.dtype for p in self.layer.parameters())}
        return max((d for d in used if d in _COMPUTED), key=lambda d: torch.finfo(d).eps)

    @property
    def floor(self) -> float:
        """The least change of the output, relative to it, that is no rounding error."""
        return 16 * float(torch.finfo(self.dtype).eps)

    def quiet(self) -> Bench:
        """Return the same bench with a stream so weak that whatever is written drowns it."""
        return replace(self, call=self.call.on(self.call.hidden * 1e-4))

    def base(self, parameter: nn.Parameter, zero: Sequence[nn.Parameter]) -> Tensor:
        """Return the output with a parameter and others held at zero."""
        with held(zeros([*zero, parameter])):
            return self.call.run(self.layer)

    def change(
        self,
        parameter: nn.Parameter,
        axis: int,
        zero: Sequence[nn.Parameter],
        base: Tensor,
        seed: int,
    ) -> Change | None:
        """Return what a parameter held at a multiple of z v^T changes; None where it has no effect."""
        # What other writers add may drown the stream that goes in, and the change with its rounding.
        size = max(float(self.call.rows.norm()), float(base.norm()))
        factor = 1.0
        written = _substitute(parameter, axis, seed)
        for attempt in range(3):
            change = self._written(parameter, written.times(factor), zero) - base
            share = float(change.norm()) / size
            if attempt == 2 or not share < 0.5:
                break
            # Too small to be read off precisely, or at all, beside the stream.
            factor *= 2.0 ** round(-math.log2(share)) if share > self.floor else 128.0
        if not bool(torch.isfinite(change).all()) or share <= self.floor:
            return None
        return Change(written.z.double(), change, factor)

    def _written(
        self, parameter: nn.Parameter, value: Tensor, zero: Sequence[nn.Parameter]
    ) -> Tensor:
        with held({**zeros(zero), parameter: value}):
            return self.call.run(self.layer)

    def fit(self, parameter: nn.Parameter, axis: int, zero: Sequence[nn.Parameter]) -> Fit | None:
        """Return how a parameter writes to the stream, with others held at zero; None if it does not."""
        base = self.base(parameter, zero)
        tried: list[Change] = []
        for seed in (11, 12):
            change = self.change(parameter, axis, zero, base, seed)
            if change is None:
                return None
            tried.append(change)
            ratio = torch.cat([c.change / c.z for c in tried]).flatten(0, -2)
            _, values, right = torch.linalg.svd(ratio, full_matrices=False)
            misfit = float((values[1:].pow(2).sum() / values.pow(2).sum()).sqrt())
            # Most that are no writers show it with the first z.
            if not misfit < FIT_LIMIT:
                return None
        gain = right[0] * right[0].sum().sign() * parameter.shape[axis] ** 0.5
        value = _substitute(parameter, axis, -1).times(tried[0].factor)
        # As large as what it is compared with: a weak writer would else be taken for a centred one.
        ones = self._written(parameter, value, zero) - base
        return Fit(gain, bool(ones.norm() < 0.02 * tried[0].change.norm()))

    def isolated(
        self, parameter: nn.Parameter, axis: int, others: Sequence[nn.Parameter]
    ) -> list[nn.Parameter]:
        """Return those of the others that can all be zero while the parameter still has an effect.

        What is left is the parameter's own path to the stream, without the summands beside it.
        """
        value = _substitute(parameter, axis, 11)
        zero: list[nn.Parameter] = []
        for other in others:
            if other is not parameter and self._matters(parameter, value, [*zero, other]):
                zero.append(other)
        return zero

    def _matters(
        self, parameter: nn.Parameter, value: Substitute, zero: Sequence[nn.Parameter]
    ) -> bool:
        """Return whether a parameter has an effect on the output while others are zero."""
        base = self.base(parameter, zero)
        size = max(float(self.call.rows.norm()), float(base.norm()))
        for factor in (1.0, 1e2, 1e4):
            change = float((self._written(parameter, value.times(factor), zero) - base).norm())
            if change > self.floor * size:
                return math.isfinite(change)
        return False

    def leftover(self, zero: Sequence[nn.Parameter]) -> float:
        """With parameters held at zero: the share of the output that is no multiple of the input.

        The output of a token is compared with the span of its input streams, of which most
        architectures have one.
        """
        with held(zeros(zero)):
            out = self.call.run(self.layer)
        return _outside(out, self.call.rows, self.call.rows)

    def gains(self, names: Mapping[int, str]) -> dict[str, Float[Tensor, " d_model"]]:
        """Return the gains that norms of this layer can apply, by what they are made of."""
        width = self.call.hidden.shape[-1]
        found: dict[str, Tensor] = {}
        for parameter in dict.fromkeys(self.layer.parameters()):
            if tuple(parameter.shape) == (width,):
                name = names[id(parameter)]
                found[name] = parameter.detach().cpu().double()
                found[f"(1 + {name})"] = 1 + found[name]
        return found

    def carried(self, zero: Sequence[nn.Parameter], names: Mapping[int, str]) -> tuple[float, str]:
        """Return what is left when the stream may pass through a gain in place, and that gain's name.

        Some layers add their normed input back to the stream, or norm the stream itself. No writer
        does that, and no edit of writers undoes it; but it accounts for what they do not.
        """
        with held(zeros(zero)):
            out = self.call.run(self.layer)
        given = self.call.rows
        best = (_outside(out, given, given), "")
        measured = (out * given).sum((0, 1)) / given.pow(2).sum((0, 1))
        residual = float((out - given * measured).norm() / given.norm())
        if residual < 0.1 * best[0]:
            best = (residual, MEASURED)
        gains = self.gains(names)
        for a, b in [(a, "") for a in gains] + [(a, b) for a in gains for b in gains if a < b]:
            product = gains[a] * gains[b] if b else gains[a]
            # A norm's mean leaves the gains themselves behind.
            fixed = torch.stack([product, gains[a], gains[b or a], torch.ones_like(product)])
            spread = fixed.expand(given.shape[0], -1, -1)
            residual = _outside(out, torch.cat([given, given * product, spread], 1), given)
            if residual < 0.1 * best[0]:
                best = (residual, f"{a} * {b}" if b else a)
        return best

    def renormalises(self) -> bool:
        """Whether the output hardly grows with the input, because a norm stands on the stream itself."""
        large = self.call.on(self.call.hidden * 100).run(self.layer).norm()
        return bool(large < 10 * self.call.run(self.layer).norm())


@contextmanager
def benched(layer: nn.Module, call: Call) -> Iterator[Bench]:
    """Give the bench of a layer: of one that computes in 16 bits, the same layer held in float32.

    Beside the stream, what a layer writes that is smaller than the stream's rounding would not be there
    at all. One layer is held so at a time.
    """
    with at_home(layer):
        bench = Bench(layer, call)
        if bench.dtype not in _HALF:
            yield bench
            return
        with widened(layer):
            yield Bench(layer, call.wide())


def _outside(out: Tensor, span: Tensor, given: Tensor) -> float:
    """Return how much of the rows of `out` lies outside `span`, token by token, relative to `given`."""
    carried = out @ torch.linalg.pinv(span) @ span
    return float((out - carried).norm() / given.norm())


def _substitute(parameter: nn.Parameter, axis: int, seed: int) -> Substitute:
    """Return z and v for a parameter; z has mean zero and no small entries.

    Both have few bits, so that weights hold z v^T exactly and all its rows are one row times a number:
    what is left of a token after cancellation is then no rounding error that a norm would enlarge.
    """
    generator = torch.Generator().manual_seed(abs(seed))
    d_model = parameter.shape[axis]
    rest = [n for i, n in enumerate(parameter.shape) if i != axis]
    half = _few_bits(0.5 + torch.randn(d_model // 2, generator=generator).abs())
    z = torch.cat([half, -half])[torch.randperm(d_model // 2 * 2, generator=generator)]
    if d_model % 2:
        z = torch.cat([z[:-2], torch.tensor([1.0, 1.0, -2.0])])
        z = z - z.mean()
    if seed == -1:
        z = torch.ones(d_model)
        generator.manual_seed(11)
    v = torch.randn(rest, generator=generator) / rest[-1] ** 0.5 if rest else torch.ones(())
    return Substitute(parameter, axis, z, _few_bits(v))


def _few_bits(x: Tensor) -> Tensor:
    """Round to four significant bits: a product of two such numbers is exact in bfloat16 and float16."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 16).round() / 16, exponent)
