"""Stage 4: edit plans, made from the original weights, applied in memory and undone bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from saber import artifacts, codec
from saber.linalg import accumulated_removal
from saber.lm.device import has_float64
from saber.lm.model import LanguageModel
from saber.lm.writers import Writer
from saber.products import exact_product
from saber.saved_plan import KIND, require_factors, require_meta

Scope = Literal["own", "nearest", "upstream", "all"]
BLOCK = 1 << 24
"""Entries of a weight that are changed at once."""
READ = 1 << 26
"""Entries of a weight that are read in float32 at once."""


@dataclass(frozen=True)
class EditSpec:
    """How selected directions are taken out of the weights."""

    kind: Literal["selective", "orthogonal"] = "selective"
    """selective: directions go where inputs carry the behaviour, preserved inputs are left alone;
    orthogonal: W' = (I - U A U^T) W, for all inputs alike."""
    alpha: float = 1.0
    """alpha_base: removed share of a direction of purity one, 0 to 1."""
    lambda_: float = 0.0
    """lambda: weight of preserved inputs against targets, above 0; 0 lets validation prompts choose
    (selective only)."""
    ridge: float = 0.0
    """Least shrinkage of the preserved moments, as a share of their mean eigenvalue; 0 takes 0.001, and
    0.01 where false refusals alone go (selective only)."""
    sensitivity: float = 0.0
    """How far lambda follows what answers feel of a layer's direction, its Fisher information: it is
    multiplied by this power of it, per its mean over layers; 0 takes one lambda for all (selective only)."""
    memory: float = 0.0
    """Memory that second moments may take, GiB; with less, the prompts are read more often, and no result
    depends on it. 0 takes half of what the machine has free, and at least 4 where it has that."""
    scope: Scope = "nearest"
    """Writers that a direction is taken out of: those of its own layer; those to which its layer is
    the nearest selected one of its pass at or above them; those up to its layer; or all."""
    skip_below: float = 0.1
    """Skip floor: directions of lower purity are left alone, 0 to 1."""
    strength: Literal["purity", "constant", "lambda"] = "purity"
    """purity: alpha x purity; constant: alpha for every direction; lambda: alpha for every direction,
    but lambda / purity (selective only)."""
    embeddings: bool = False
    """Whether the token embedding is edited too, as a writer below the first layer (orthogonal only).
    Not possible where it is the output head as well."""


@dataclass(frozen=True)
class Removal:
    """One direction to take out."""

    direction: Float[Tensor, " d_model"]
    """Unit vector in the residual stream."""
    strength: float
    """Removed share, 0 to 1."""
    layer: int
    """Decoder layer that it was found in."""
    step: int = 1
    """Pass that selected it, from 1."""


@dataclass(frozen=True)
class Factor:
    """A low-rank change of one writer: its map (d_in -> d_model) gains left @ right.

    A fused weight of experts has one map an expert; all share the output side.
    """

    left: Float[Tensor, "d_model k"]
    """Output side."""
    right: Float[Tensor, k * d_in]
    """Input side: the axes of the weight without that of d_model, in their order."""
    bias: Float[Tensor, "*experts d_model"] | None
    """Change of the bias, where the writer has one."""
    axis: int
    """Axis of the stored weight along which d_model lies."""
    weight: str = ""
    """Name of the weight's parameter; empty for `<factor's name>.weight`."""
    bias_name: str = ""
    """Name of the bias's parameter; empty for `<factor's name>.bias`."""

    def plus(self, other: Factor) -> Factor:
        """Return the change that does both."""
        biases = [b for b in (self.bias, other.bias) if b is not None]
        return replace(
            self,
            left=torch.cat([self.left, other.left], 1),
            right=torch.cat([self.right, other.right]),
            bias=sum(biases[1:], biases[0]) if biases else None,
        )

    def scaled(self, share: float) -> Factor:
        """Return this share of the change."""
        bias = None if self.bias is None else self.bias * share
        return replace(self, left=self.left * share, bias=bias)

    def delta(self, device: torch.device | None = None) -> Tensor:
        """Return the change in the layout of the stored weight, the same bits as a part of it alone.

        It is made on the `device`, with the same bits again, where that has float64.
        """
        where = device if device and has_float64(device) else self.left.device
        left, right = self.left.to(where), self.right.to(where)
        change = exact_product(left, right.reshape(right.shape[0], -1))
        return change.reshape(-1, *self.right.shape[1:]).movedim(0, self.axis)

    def add_to(self, weight: Tensor, entries: int = BLOCK) -> None:
        """Add the change to the stored weight, by blocks along its first axis of about so many entries.

        The same bits as the sum with `delta` rounded once, without its memory.
        """
        step = max(1, entries * weight.shape[0] // weight.numel())
        for rows in range(0, weight.shape[0], step):
            some = slice(rows, rows + step)
            part = (
                replace(self, left=self.left[some])
                if self.axis == 0
                else replace(self, right=self.right[:, some])
            )
            add_in_place(weight.detach()[some], part.delta(weight.device))


@dataclass(frozen=True)
class EditPlan:
    """Low-rank changes by the writer's name: all that an edit is."""

    factors: Mapping[str, Factor] = field(default_factory=dict)
    """Name of the writer in memory -> its change."""

    def save(self, folder: Path, meta: Mapping[str, Any]) -> None:
        """Save the factors in float32 with some meta data."""
        tensors: dict[str, Tensor] = {}
        for name, factor in self.factors.items():
            tensors[f"{name}.left"], tensors[f"{name}.right"] = factor.left, factor.right
            if factor.bias is not None:
                tensors[f"{name}.bias"] = factor.bias
        axes = {name: factor.axis for name, factor in self.factors.items()}
        names = {
            name: [factor.weight, factor.bias_name]
            for name, factor in self.factors.items()
            if factor.weight or factor.bias_name
        }
        artifacts.save(folder, KIND, tensors, {**meta, "axes": axes, "names": names})

    @classmethod
    def load(cls, folder: Path) -> EditPlan:
        """Load a saved plan; raises `DataError` when the folder holds none, or one that is damaged."""
        tensors, meta = artifacts.load(folder, KIND)
        require_meta(folder, meta)
        require_factors(folder, meta["axes"], {key: v.shape for key, v in tensors.items()})
        names = meta.get("names", {})
        return cls(
            {
                name: Factor(
                    tensors[f"{name}.left"],
                    tensors[f"{name}.right"],
                    tensors.get(f"{name}.bias"),
                    axis,
                    *names.get(name, ()),
                )
                for name, axis in meta["axes"].items()
            }
        )

    def __add__(self, other: EditPlan) -> EditPlan:
        """Return the one plan that does both; factors of the same writer become one of higher rank."""
        factors = dict(self.factors)
        for name, more in other.factors.items():
            if name in factors:
                more = factors[name].plus(more)
            factors[name] = more
        return EditPlan(factors)

    def scaled(self, share: float) -> EditPlan:
        """Return the plan that makes this share of each change."""
        return EditPlan({name: factor.scaled(share) for name, factor in self.factors.items()})

    def digest(self) -> str:
        """Return the SHA-256 (hex) of all that the plan changes; equal plans have equal ones."""
        parts: list[Any] = []
        for name, f in sorted(self.factors.items()):
            parts += [name, f.weight, f.bias_name, f.axis, f.left, f.right, f.bias]
        return codec.digest(*parts)

    def changes(self, model: Any) -> Iterator[tuple[Tensor, Callable[[Tensor], None]]]:
        """Yield each parameter that the plan changes, with what makes the change in place."""
        for name, factor in self.factors.items():
            yield model.get_parameter(factor.weight or f"{name}.weight"), factor.add_to
            if factor.bias is not None:
                parameter = model.get_parameter(factor.bias_name or f"{name}.bias")
                yield parameter, partial(add_in_place, delta=factor.bias)


def orthogonal(
    lm: LanguageModel, writers: Sequence[Writer], removals: Sequence[Removal], scope: Scope
) -> EditPlan:
    """Return the plan that takes `removals` out of the writers in scope, from the weights as they are.

    The removals of a writer add up to I - Q^T S Q on the residual stream (`accumulated_removal`).
    Behind a gain g the stream receives g * (W h), so with Q_g = Q diag(g) the weight changes by
    -L S Q_g W, Q_g L = I: Q (g * W h) becomes (I - S) Q (g * W h), and the rest of the stream changes
    as little as can be (`Writer.write`). Without a gain this is W' = (I - Q^T S Q) W.
    """
    factors: dict[str, Factor] = {}
    products: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
    for writer in writers:
        chosen = in_scope(writer.layer, removals, scope)
        if not chosen:
            continue
        if chosen not in products:
            stacked = torch.stack([removals[i].direction.double() for i in chosen])
            strengths = torch.tensor([removals[i].strength for i in chosen], dtype=torch.float64)
            products[chosen] = accumulated_removal(stacked, strengths)
        factors[writer.name] = _factor(lm, writer, *products[chosen])
    return EditPlan(factors)


def in_scope(writer_layer: int, removals: Sequence[Removal], scope: Scope) -> tuple[int, ...]:
    """Return which removals act on the writers of a layer.

    nearest: the directions of a behaviour turn from layer to layer, so of each pass a writer loses
    those found at the lowest selected layer that is not below it. What writes above all of them is
    left alone.
    """
    if scope == "all":
        return tuple(range(len(removals)))
    found = []
    for index, removal in enumerate(removals):
        layers = {r.layer for r in removals if r.step == removal.step}
        nearest = min((k for k in layers if k >= writer_layer), default=None)
        wanted = {
            "own": removal.layer == writer_layer,
            "nearest": removal.layer == nearest,
            "upstream": removal.layer >= writer_layer,
        }
        if wanted[scope]:
            found.append(index)
    return tuple(found)


def _factor(lm: LanguageModel, writer: Writer, q: Tensor, s: Tensor) -> Factor:
    weight = lm.model.get_parameter(writer.weight).detach()
    read = writer.read(q).to(weight.device, torch.float32)
    left = (-writer.write(q) @ s).to(read)
    right = read_off(read, weight, writer.axis)
    bias = None
    if writer.bias is not None:
        bias = lm.model.get_parameter(writer.bias).detach().float() @ read.T @ left.T
    return Factor(
        left.cpu(),
        right.cpu(),
        None if bias is None else bias.cpu(),
        writer.axis,
        "" if writer.weight == f"{writer.name}.weight" else writer.weight,
        "" if writer.bias in (None, f"{writer.name}.bias") else writer.bias,
    )


def read_off(
    basis: Float[Tensor, "k d_model"], weight: Tensor, axis: int, entries: int = READ
) -> Float[Tensor, "k ..."]:
    """Return what a basis reads off a weight in float32, its axes without that of d_model.

    A weight of more than so many entries goes through in blocks, as it would take twice its memory.
    """
    stored = weight.movedim(axis, 0)
    if stored.ndim == 1:
        return basis @ stored.float()
    step = max(1, entries * stored.shape[1] // stored.numel())
    parts = [
        (basis @ part.float().reshape(len(part), -1)).reshape(-1, *part.shape[1:])
        for part in stored.split(step, 1)
    ]
    return torch.cat(parts, 1)


class Originals:
    """Copies on the CPU of the weights that a plan changes, as they are without it."""

    def __init__(self) -> None:
        self.in_use = False
        """Whether a plan is in force."""
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, parameter: Tensor) -> Tensor:
        """Return the copy of a parameter, which is made now if there is none."""
        if id(parameter) not in self._kept:
            self._kept[id(parameter)] = parameter, parameter.detach().to("cpu", copy=True)
        return self._kept[id(parameter)][1]

    def keep(self, parameters: Iterable[Tensor]) -> None:
        """Drop the copies of all other parameters."""
        wanted = {id(parameter) for parameter in parameters}
        self._kept = {key: kept for key, kept in self._kept.items() if key in wanted}


_ORIGINALS = "_saber_originals"
"""Where a model carries the copies that plans share."""


@contextmanager
def originals_kept(model: Any) -> Iterator[None]:
    """Let plans that are held in force one after another share one copy of what they change.

    Meanwhile nothing else may change these weights. What the next plan leaves alone is dropped.
    """
    setattr(model, _ORIGINALS, Originals())
    try:
        yield
    finally:
        delattr(model, _ORIGINALS)


@contextmanager
def applied(model: Any, plan: EditPlan) -> Iterator[None]:
    """Hold a plan in force: change the weights in place, and put the very same bits back at the end."""
    shared = getattr(model, _ORIGINALS, None)
    originals = Originals() if shared is None or shared.in_use else shared
    changed: list[tuple[Tensor, Tensor]] = []
    try:
        originals.in_use = True
        originals.keep(parameter for parameter, _ in plan.changes(model))
        for parameter, change in plan.changes(model):
            changed.append((parameter, originals.of(parameter)))
            change(parameter)
        yield
    finally:
        with torch.no_grad():
            for parameter, original in reversed(changed):
                parameter.copy_(original)
        originals.in_use = False


def add_in_place(parameter: Tensor, delta: Tensor) -> None:
    """Add a float32 change to a weight, with one rounding to the weight's dtype."""
    with torch.no_grad():
        parameter.copy_(delta.to(parameter.device) + parameter.float())


def apply(model: Any, plan: EditPlan) -> None:
    """Change the weights for good."""
    for parameter, change in plan.changes(model):
        change(parameter)
