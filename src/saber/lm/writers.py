"""Find every parameter that writes to the residual stream, by substitution, and prove the list.

A *writer* is a weight whose output reaches a layer's output by addition, as it is or through norms
with gains. Its name says nothing; what it does to the stream says all (`lm/substitution.py`). The
search through a layer is in `lm/search.py`; here its finds become records.

Two laws prove the list complete: with all writers at zero a layer returns its input up to a scale
(`zeroed_law`), and after a full edit of a direction, a layer that gets a stream without it returns
one without it (`ablated_law`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saber.errors import ModelError, UnprovenWriter
from saber.lm.disk import disk_names
from saber.lm.layers import stream, with_stream
from saber.lm.model import LanguageModel
from saber.lm.search import LAW_LIMIT, Finding, Memory, search
from saber.lm.substitution import (
    TOKENS,
    Bench,
    Call,
    Fit,
    benched,
    by_token,
    held,
    layer_calls,
    random_tokens,
    zeros,
)

Kind = Literal["attention", "mlp", "expert", "mixer", "bias", "embedding", "other"]
UNIFORM = 1e-3
ROUNDED_LIMIT = 5e-2
"""Residual of a model in 16 bits up to which the second law counts as kept."""


@dataclass(frozen=True)
class Writer:
    """A weight that writes to the residual stream."""

    weight: str
    """Dotted name of the parameter in memory."""
    layer: int
    """Decoder layer, counted from 0 (the first one, where layers share the weight); -1: before them."""
    kind: Kind
    """A hint for reports, from the name and shape; nothing depends on it."""
    axis: int
    """Axis of the weight along which the d_model outputs lie."""
    bias: str | None
    """Dotted name of the bias that goes with it, if any."""
    gain: Float[Tensor, " d_model"] | None
    """Gain of the norms between the writer and the stream, up to scale; None where there is none."""
    convention: str = ""
    """How the gain comes from the layer's parameters, where that is known ("1 + post_norm.weight")."""
    centred: bool = False
    """Whether a norm takes the mean over the coordinates off on the way."""
    experts: int | None = None
    """Experts along axis 0 of a fused weight; None for a plain one."""
    scale: float = 1.0
    """What the layer multiplies the stream with as a whole (a layer scalar)."""
    carried: str = ""
    """Gain through which the layer passes the stream itself in place, so that an edit of writers
    cannot keep a direction out of it; empty where it passes on as it is."""
    disk: tuple[str, ...] = ()
    """Names of the weight in the checkpoint's files."""

    @property
    def name(self) -> str:
        """What the writer is called in edit plans: its module, or the parameter where it has no module."""
        return self.weight.removesuffix(".weight")

    def read(self, basis: Float[Tensor, "k d_model"]) -> Float[Tensor, "k d_model"]:
        """Return what reads, off the writer's own output, its share along a basis of the stream."""
        gained = basis if self.gain is None else basis * self.gain.to(basis)
        return gained - gained.mean(-1, keepdim=True) if self.centred else gained

    def write(self, basis: Float[Tensor, "k d_model"]) -> Float[Tensor, "d_model k"]:
        """Return how to write one unit of each basis vector to the stream, and little else.

        The L with read(basis) L = I that minimises tr(L^T D L). Without a gain D = I, the
        pseudo-inverse. Behind one, L reaches the stream as g * L, and through the norm's rms it scales
        all that is written, whose energy a coordinate is mean(g^2): to first order that is
        D = diag(g^2 + mean(g^2) / d). With D = I large gains would be written to most: with gains as
        uneven as a trained Gemma's, several times more beside the direction than along it.
        """
        reading = self.read(basis)
        if self.gain is None:
            return torch.linalg.pinv(reading)
        squared = self.gain.to(basis).square()
        scaled = reading / (squared + squared.mean() / len(squared))
        return scaled.T @ torch.linalg.pinv(reading @ scaled.T)


def find_writers(lm: LanguageModel) -> list[Writer]:
    """Return the writers of all layers, in order of depth and then of name.

    Of a model in 16 bits each layer is searched in float32, one at a time. Raises `UnprovenWriter` when
    the zeroed law fails with the writers found, unless the model was loaded with `allow_unproven`.
    """
    names = {id(p): name for name, p in lm.model.named_parameters(remove_duplicate=True)}
    writers: list[Writer] = []
    known: set[str] = set()
    memory = Memory()
    for index, (layer, call) in enumerate(zip(lm.layers, layer_calls(lm), strict=True)):
        with benched(layer, call) as bench:
            for writer in _layer_writers(lm, bench, index, names, memory):
                if writer.weight not in known:
                    known.add(writer.weight)
                    writers.append(writer)
    return [replace(w, disk=disk_names(lm.model, w.weight)) for w in writers]


def _layer_writers(
    lm: LanguageModel, bench: Bench, index: int, names: dict[int, str], memory: Memory
) -> list[Writer]:
    found, leftover = search(bench, lm.d_model, names, memory)
    carried = ""
    if leftover > LAW_LIMIT:
        residual, carried = bench.carried([c.parameter for c, _ in found], names)
        carried = carried if residual <= LAW_LIMIT else ""
    if leftover > LAW_LIMIT and not carried and not lm.allow_unproven:
        raise UnprovenWriter(
            "zeroed", index, leftover, LAW_LIMIT, lm.layers_path, bench.renormalises()
        )
    return _records(bench, index, found, names, carried)


def embedding_writer(lm: LanguageModel) -> Writer:
    """Return the token embedding as a writer of layer -1, for those who want it edited too.

    Raises `ModelError` when it is the output head as well, so that an edit would change what the
    model reads off the stream, or when what enters the first layer is not a token's row of it times
    a scale (a norm behind it, say).
    """
    module = lm.model.get_input_embeddings()
    weight = module.weight
    name = next(n for n, p in lm.model.named_parameters() if p is weight)
    if any(p is weight for p in lm.head.parameters()):
        raise ModelError(
            f"the token embedding ({name}) is the output head too, so an edit of it would change how "
            "the stream is read.",
            "Leave edit.embeddings off.",
        )
    ids = random_tokens(lm, TOKENS)
    with_rows = _first_stream(lm, ids)
    with held(zeros([weight])):
        rest = _first_stream(lm, ids)
    change = with_rows - rest
    rows = weight.detach()[ids[0].to(weight.device)].cpu().to(change)
    if rows.shape[-1] == change.shape[-1]:
        scale = float((change * rows[:, None]).sum() / (rows.pow(2).sum() * change.shape[1]))
        residual = float((change - scale * rows[:, None]).norm() / change.norm().clamp_min(1e-30))
        if residual <= law_limit(lm):
            disk = disk_names(lm.model, name)
            return Writer(name, -1, "embedding", 1, None, None, scale=scale, disk=disk)
    raise ModelError(
        f"what enters the first layer is not a scaled row of the token embedding ({name}).",
        "Leave edit.embeddings off.",
    )


def embedding_share(lm: LanguageModel, directions: Float[Tensor, "k d_model"]) -> list[float]:
    """Return |E r| for each unit vector r, E the token embedding, over that of a random direction.

    Tokens bring this much of a direction into the stream, which editing the layers does not take
    out: 1 means as much as of any direction, the root mean square over directions. NaN where rows of
    the embedding have another width than the stream.
    """
    weight = lm.model.get_input_embeddings().weight.detach()
    if weight.shape[-1] != directions.shape[-1]:
        return [math.nan] * len(directions)
    energy = sum(
        (part.float() @ directions.to(part.device).T).pow(2).sum(0) for part in weight.split(8192)
    )
    usual = sum(part.float().pow(2).sum() for part in weight.split(8192)) / weight.shape[-1]
    return [float(share) for share in (energy / usual).sqrt()]


def _first_stream(lm: LanguageModel, ids: Tensor) -> Float[Tensor, "tokens streams d_model"]:
    """Return what enters the first layer, in float64."""
    seen: list[Tensor] = []

    def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).clone())

    handle = lm.layers[0].register_forward_pre_hook(record, with_kwargs=True)
    with ExitStack() as stack, torch.no_grad():
        stack.callback(handle.remove)
        lm.model(input_ids=ids, use_cache=False)
    return by_token(seen[0])


def law_limit(lm: LanguageModel) -> float:
    """Return the residual that rounding may leave of a law, by the compute dtype."""
    return LAW_LIMIT if lm.dtype == torch.float32 else ROUNDED_LIMIT


def _records(
    bench: Bench,
    index: int,
    found: Sequence[Finding],
    names: dict[int, str],
    carried: str,
) -> list[Writer]:
    """Turn what was found in a layer into records, each bias with its weight, in order of name."""
    order = {names[id(p)]: i for i, p in enumerate(dict.fromkeys(bench.layer.parameters()))}
    biases: dict[str, str] = {}
    for weight, _ in found:
        for vector, _ in found:
            shape = weight.parameter.shape
            fitting = vector.parameter.shape == (
                *shape[: vector.parameter.ndim - 1],
                shape[weight.axis],
            )
            same = vector.name.rpartition(".")[0] == weight.name.rpartition(".")[0]
            if same and fitting and vector.parameter.ndim == weight.parameter.ndim - 1:
                biases[weight.name] = vector.name
    out, given = _passed(bench, found)
    scale = float((out * given).sum() / (given * given).sum())
    records = []
    for candidate, fit in found:
        if candidate.name in biases.values():
            continue
        gain, convention = _gain(bench, fit, names)
        fused = candidate.parameter.ndim == 3
        records.append(
            Writer(
                weight=candidate.name,
                layer=index,
                kind=_kind(candidate.name, fused, candidate.parameter.ndim),
                axis=candidate.axis,
                bias=biases.get(candidate.name),
                gain=gain,
                convention=convention,
                centred=fit.centred,
                experts=candidate.parameter.shape[0] if fused else None,
                scale=scale,
                carried=carried,
            )
        )
    return sorted(records, key=lambda w: order[w.weight])


def _passed(bench: Bench, found: Sequence[Finding]) -> tuple[Tensor, Tensor]:
    """Return output and input of a layer with its writers at zero."""
    with held(zeros(c.parameter for c, _ in found)):
        return bench.call.run(bench.layer), bench.call.rows


def _gain(bench: Bench, fit: Fit, names: dict[int, str]) -> tuple[Tensor | None, str]:
    """Return the gain with the layer's parameters that it comes from; the measured one if none fit."""
    gain = fit.gain
    if bool((gain / gain.mean() - 1).abs().max() < UNIFORM):
        return None, ""
    terms = {"": torch.ones_like(gain), **bench.gains(names)}
    best, off = (gain, ""), UNIFORM
    for a, b in combinations_with_replacement(terms, 2):
        product = terms[a] * terms[b]
        exact = product * (product @ gain).sign() / product.pow(2).mean().sqrt().clamp_min(1e-30)
        misfit = float((exact - gain).pow(2).mean().sqrt())
        # Of large gains "weight" is almost "one plus weight": the better wins, the simpler of equal ones.
        if misfit < off:
            best, off = (exact, " * ".join(n for n in (a, b) if n)), 0.5 * misfit
    return best[0].float().cpu(), best[1]


_KINDS: tuple[tuple[str, Kind], ...] = (
    (r"mamba|ssm|mixer|conv|recurrent|delta|linear_attn|time_mix", "mixer"),
    (r"attn|attention", "attention"),
    (r"mlp|ffn|feed|dense_4h|shared", "mlp"),
)


def _kind(name: str, fused: bool, ndim: int) -> Kind:
    """Guess what a writer belongs to, for tables alone."""
    if ndim == 1:
        return "bias"
    lowered = ".".join(name.lower().split(".")[-4:])
    if fused or re.search(r"experts?\.\d+\.|experts", lowered):
        return "expert" if "shared" not in lowered else "mlp"
    return next((kind for pattern, kind in _KINDS if re.search(pattern, lowered)), "other")


def zeroed_law(lm: LanguageModel, writers: Sequence[Writer]) -> float:
    """Return the worst layer's |out - s in| / |in| with all writers held at zero.

    Where a layer passes the stream through a gain in place (`Writer.carried`), that is allowed for.
    """
    names = {id(p): name for name, p in lm.model.named_parameters()}
    zero = {n for w in writers for n in (w.weight, w.bias) if n}
    parameters = [p for n, p in lm.model.named_parameters() if n in zero]
    gained = {w.layer for w in writers if w.carried}
    worst = 0.0
    for index, (layer, call) in enumerate(zip(lm.layers, layer_calls(lm), strict=True)):
        with benched(layer, call) as bench:
            residual = bench.leftover(parameters)
            if index in gained:
                residual = bench.carried(parameters, names)[0]
        worst = max(worst, residual)
    return worst


def ablated_law(lm: LanguageModel, direction: Float[Tensor, " d_model"]) -> list[float]:
    """Return, for each layer, the root mean square of r.out for a stream that goes in without r.

    Compare the values before and after a full-strength edit of r.
    """
    calls = zip(lm.layers, layer_calls(lm), strict=True)
    return [written_along(layer, call, direction) for layer, call in calls]


def written_along(layer: nn.Module, call: Call, direction: Float[Tensor, " d_model"]) -> float:
    """Return the root mean square of r.out for the stream of a call without r."""
    r = direction.to(call.hidden)
    without = call.hidden - (call.hidden @ r)[..., None] * r
    out = call.on(without).run(layer)
    return float((out @ direction.to(out)).pow(2).mean().sqrt())


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
