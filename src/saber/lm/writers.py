"""Find every module that writes to the residual stream, by substitution, and prove the list.

A *writer* is a linear map whose output reaches a layer's output by addition, as it is or through a
norm with a gain. Its name says nothing; what it does to the stream says all:

* Candidates are the linear modules of a layer with `d_model` outputs, in the order in which they
  run. They are tested from the last to the first, with the writers already found held at zero.
* To test one, its output is replaced by noise z and the change f of the layer's output is watched.
  A writer gives `f[t, j] / z[t, j] = a[t] g[j]`: every token scales by itself (a norm's 1/rms, or
  one) and every coordinate by a fixed gain. Anything else mixes coordinates or tokens.
* `g` is the gain that follows the writer, read off numerically: nested norms multiply, and neither
  "the gain is the weight" nor "one plus the weight" needs to be known.

Two laws then prove the list complete (`prove`): with all writers at zero a layer returns its input
up to a scale, and after a full edit of a direction no layer changes the stream along it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from saber.errors import UnprovenWriter
from saber.lm.layers import stream, with_stream
from saber.lm.model import LanguageModel

Kind = Literal["attention", "mlp", "other"]
TOLERANCE = 1e-3
LAW_LIMIT, LOW_PRECISION_LIMIT = 1e-4, 5e-2


@dataclass(frozen=True)
class Writer:
    """A linear map that writes to the residual stream."""

    module: str
    """Dotted path of the module in memory."""
    layer: int
    """Decoder layer, counted from 0."""
    kind: Kind
    """A hint for reports, from the path; nothing depends on it."""
    axis: int
    """Axis of the weight along which the d_model outputs lie: 0 for Linear, 1 for Conv1D."""
    bias: bool
    """Whether the module adds a bias."""
    gain: Float[Tensor, " d_model"] | None
    """Gain of the norm between the writer and the stream, up to scale; None where there is none."""

    @property
    def weight(self) -> str:
        """Name of the weight."""
        return f"{self.module}.weight"


def find_writers(lm: LanguageModel) -> list[Writer]:
    """Return the writers of all layers, in order of depth and then of running.

    Raises `UnprovenWriter` when the zeroed law fails with the writers found.
    """
    paths = {id(m): name for name, m in lm.model.named_modules()}
    found: list[Writer] = []
    for index, (layer, call) in enumerate(zip(lm.layers, _layer_calls(lm), strict=True)):
        found += _layer_writers(lm, index, layer, call, paths)
    return found


@dataclass(frozen=True)
class _Call:
    """The arguments with which a layer was called."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, layer: nn.Module) -> Tensor:
        with torch.no_grad():
            return stream(layer(*self.args, **self.kwargs)).double()

    @property
    def hidden(self) -> Tensor:
        return self.args[0] if self.args else self.kwargs["hidden_states"]


def _layer_calls(lm: LanguageModel, tokens: int = 6) -> list[_Call]:
    """Record how each layer is called on random tokens."""
    calls: list[_Call] = []

    def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(_Call(args, kwargs))

    with ExitStack() as stack:
        for layer in lm.layers:
            handle = layer.register_forward_pre_hook(record, with_kwargs=True)
            stack.callback(handle.remove)
        with torch.no_grad():
            lm.model(input_ids=random_tokens(lm, tokens), use_cache=False)
    return calls


def random_tokens(lm: LanguageModel, tokens: int, rows: int = 1) -> Tensor:
    """Return reproducible random token ids (rows, tokens) on the model's device."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, int(lm.text_config.vocab_size), (rows, tokens), generator=generator)
    return ids.to(lm.device)


def _output_axis(module: nn.Module, d_model: int) -> int | None:
    """Return the output axis of a linear module with d_model outputs; None for other modules."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or isinstance(module, nn.Embedding):
        return None
    if isinstance(module, Conv1D):
        return 1 if weight.shape[1] == d_model else None
    return 0 if isinstance(module, nn.Linear) and weight.shape[0] == d_model else None


def _layer_writers(
    lm: LanguageModel, index: int, layer: nn.Module, call: _Call, paths: dict[int, str]
) -> list[Writer]:
    order: list[nn.Module] = []
    with ExitStack() as stack:
        for module in layer.modules():
            if _output_axis(module, lm.d_model) is not None:
                handle = module.register_forward_hook(lambda m, _i, _o: order.append(m))
                stack.callback(handle.remove)
        call.run(layer)
    # A shared module that runs twice is tested once, at its last run.
    candidates = list(dict.fromkeys(reversed(order)))
    found: list[Writer] = []
    with ExitStack() as stack:
        for module in candidates:
            gain = _substitution_gain(layer, module, call)
            if gain is None:
                continue
            stack.enter_context(replaced_output(module, None))
            path = paths[id(module)]
            axis = _output_axis(module, lm.d_model)
            assert axis is not None
            uniform = bool((gain / gain.mean() - 1).abs().max() < TOLERANCE)
            found.append(
                Writer(
                    module=path,
                    layer=index,
                    kind=_kind(path),
                    axis=axis,
                    bias=getattr(module, "bias", None) is not None,
                    gain=None if uniform else gain.float().cpu(),
                )
            )
        residual = _zeroed_residual(layer, call)
    limit = LAW_LIMIT if call.hidden.dtype == torch.float32 else LOW_PRECISION_LIMIT
    if residual > limit:
        raise UnprovenWriter("zeroed", index, residual, limit)
    return found[::-1]


def _substitution_gain(layer: nn.Module, module: nn.Module, call: _Call) -> Tensor | None:
    """Return the gain (d_model,) with which a module's output reaches the stream, or None."""
    generator = torch.Generator().manual_seed(1)
    hidden = call.hidden
    shape = tuple(hidden.shape)
    # Bounded away from zero, so that ratios are well conditioned.
    noise = torch.randn(shape, generator=generator)
    noise = (noise.sign() * (0.5 + noise.abs())).to(hidden)
    with replaced_output(module, None):
        base = call.run(layer)
    with replaced_output(module, noise):
        change = call.run(layer) - base
    ratio = (change / noise.double()).reshape(-1, shape[-1])
    if not bool(torch.isfinite(ratio).all()) or float(ratio.abs().max()) < 1e-9:
        return None
    per_token = ratio.norm(dim=1, keepdim=True)
    gain = (ratio / per_token.clamp_min(1e-30)).mean(0)
    if bool((per_token < 1e-9).any()):
        return None
    misfit = (ratio / per_token - gain).norm(dim=1).max()
    limit = TOLERANCE if hidden.dtype == torch.float32 else LOW_PRECISION_LIMIT
    return gain / gain.norm() * len(gain) ** 0.5 if float(misfit) < limit else None


def _zeroed_residual(layer: nn.Module, call: _Call) -> float:
    """With the writers held at zero: distance of a layer's output from its scaled input."""
    out, hidden = call.run(layer), call.hidden.double()
    scale = (out * hidden).sum() / (hidden * hidden).sum()
    return float((out - scale * hidden).norm() / hidden.norm())


def zeroed_law(lm: LanguageModel, writers: Sequence[Writer]) -> float:
    """Return the worst layer's |out - s in| / |in| with all its writers held at zero."""
    worst = 0.0
    for index, (layer, call) in enumerate(zip(lm.layers, _layer_calls(lm), strict=True)):
        with ExitStack() as stack:
            for writer in writers:
                if writer.layer == index:
                    module = lm.model.get_submodule(writer.module)
                    stack.enter_context(replaced_output(module, None))
            worst = max(worst, _zeroed_residual(layer, call))
    return worst


@contextmanager
def replaced_output(module: nn.Module, value: Tensor | None) -> Iterator[None]:
    """Hold a module's output at `value`, or at zero."""

    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        if value is None:
            return torch.zeros_like(output)
        return value.reshape(output.shape).to(output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _kind(path: str) -> Kind:
    """Guess what a writer belongs to, for tables alone."""
    parts = path.lower().split(".")[-2:]
    if any("attn" in part or "attention" in part for part in parts):
        return "attention"
    return (
        "mlp"
        if any("mlp" in part or "ffn" in part or "feed" in part for part in parts)
        else "other"
    )


def ablated_law(lm: LanguageModel, direction: Float[Tensor, " d_model"]) -> list[float]:
    """Return, for each layer, the root mean square of r.(out - s in) on random tokens.

    Compare the values before and after a full-strength edit of r.
    """
    values: list[float] = []
    inputs: list[Tensor] = []

    def before(_m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(args[0] if args else kwargs["hidden_states"])

    def after(_m: nn.Module, _a: Any, output: Any) -> None:
        out, hidden = stream(output).double(), inputs[-1].double()
        r = direction.to(out)
        values.append(float(((out - hidden) @ r).pow(2).mean().sqrt()))

    with ExitStack() as stack:
        for layer in lm.layers:
            stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(after).remove)
        with torch.no_grad():
            lm.model(input_ids=random_tokens(lm, 8, rows=2), use_cache=False)
    return values


@contextmanager
def ablated_stream(lm: LanguageModel, basis: Float[Tensor, "k d_model"]) -> Iterator[None]:
    """Project an orthonormal basis out of the embedding and of every layer's output, by hooks.

    What the *stream* looks like when nothing writes these directions: the causal test of a
    direction, with no weight touched (Arditi et al. 2024, directional ablation).
    """

    def project(hidden: Tensor) -> Tensor:
        b = basis.to(hidden)
        return hidden - (hidden @ b.T) @ b

    def first(_m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (project(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": project(kwargs["hidden_states"])}

    def each(_m: nn.Module, _a: Any, output: Any) -> Any:
        return with_stream(output, project(stream(output)))

    with ExitStack() as stack:
        stack.callback(lm.layers[0].register_forward_pre_hook(first, with_kwargs=True).remove)
        for layer in lm.layers:
            stack.callback(layer.register_forward_hook(each).remove)
        yield
