"""Stage 4: edit plans, made from the original weights, applied in memory and undone bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
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

Scope = Literal["own", "nearest", "upstream", "all"]
KIND = "edit-plan"


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
    memory: float = 4.0
    """Memory that second moments may take, GiB; with less, the prompts are read more often."""
    scope: Scope = "nearest"
    """Writers that a direction is taken out of: those of its own layer; those to which its layer is
    the nearest selected one of its pass at or above them; those up to its layer; or all."""
    skip_below: float = 0.1
    """Skip floor: directions of lower purity are left alone, 0 to 1."""
    strength: Literal["purity", "constant", "lambda"] = "purity"
    """purity: alpha x purity; constant: alpha for every direction; lambda: alpha for every direction,
    but lambda / purity (selective only)."""
    embeddings: bool = False
    """Whether the token embedding is edited too, as a writer below the first layer. Not possible
    where it is the output head as well."""


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

    def delta(self, device: torch.device | None = None) -> Tensor:
        """Return the change in the layout of the stored weight, the same bits as a part of it alone.

        It is made on the `device`, with the same bits again, where that has float64.
        """
        where = device if device and has_float64(device) else self.left.device
        left, right = self.left.to(where), self.right.to(where)
        change = exact_product(left, right.reshape(right.shape[0], -1))
        return change.reshape(-1, *self.right.shape[1:]).movedim(0, self.axis)


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
        """Load a saved plan; raises `DataError` when the folder holds none."""
        tensors, meta = artifacts.load(folder, KIND)
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

    def digest(self) -> str:
        """Return the SHA-256 (hex) of all that the plan changes; equal plans have equal ones."""
        parts: list[Any] = []
        for name, f in sorted(self.factors.items()):
            parts += [name, f.weight, f.bias_name, f.axis, f.left, f.right, f.bias]
        return codec.digest(*parts)

    def changes(self, model: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each parameter that the plan changes, with its change, both as they are stored."""
        for name, factor in self.factors.items():
            weight = model.get_parameter(factor.weight or f"{name}.weight")
            yield weight, factor.delta(weight.device)
            if factor.bias is not None:
                yield model.get_parameter(factor.bias_name or f"{name}.bias"), factor.bias


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
    weight = lm.model.get_parameter(writer.weight).detach().float().movedim(writer.axis, 0)
    gained = writer.read(q)
    left = (-writer.write(q) @ s).to(weight)
    read = gained.to(weight)
    right = (read @ weight.reshape(weight.shape[0], -1)).reshape(-1, *weight.shape[1:])
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


@contextmanager
def applied(model: Any, plan: EditPlan) -> Iterator[None]:
    """Hold a plan in force: change the weights in place, and put the very same bits back at the end."""
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        for parameter, delta in plan.changes(model):
            kept.append((parameter, parameter.detach().to("cpu", copy=True)))
            add_in_place(parameter, delta)
        yield
    finally:
        with torch.no_grad():
            for parameter, original in reversed(kept):
                parameter.copy_(original)


def add_in_place(parameter: Tensor, delta: Tensor) -> None:
    """Add a float32 change to a weight, with one rounding to the weight's dtype."""
    with torch.no_grad():
        parameter.copy_((parameter.float() + delta.to(parameter.device)).to(parameter.dtype))


def apply(model: Any, plan: EditPlan) -> None:
    """Change the weights for good."""
    for parameter, delta in plan.changes(model):
        add_in_place(parameter, delta)
