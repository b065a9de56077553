"""Stage 4, the selective edit: directions are removed where inputs carry the behaviour, and only there.

For a writer W with inputs h, a direction r of the stream and R = r W, the change W' = W - r z is asked
to take off what targets write along r beyond neutral prompts, and to leave preserved inputs alone:

    minimise over z   E_target[(z h - R (h - mu_neutral))^2] + lambda E_preserve[(z h)^2]

with the solution z = R (T - mu_neutral mu_target^T) (T + lambda M)^-1, T = E_target[h h^T] and
M = C + e I, C the preserved inputs' second moment. In sample space, with target rows X (n, d_in):

    z = B (K + n lambda I)^-1 X M^-1,    B = R (X - mu_neutral)^T,    K = X M^-1 X^T,

so that one factorisation of M and one of K serve every lambda. See docs/method.md, section 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from saber.ablation import EditPlan, Factor, applied, read_off
from saber.errors import ModelError
from saber.lm.device import has_float64
from saber.lm.forward import Progress, silent
from saber.lm.model import LanguageModel
from saber.lm.offload import home
from saber.lm.tap import Key
from saber.lm.writers import Writer
from saber.moments import RIDGE, Decisions, Moment, Preserved, width


@dataclass(frozen=True)
class _Part:
    """The solution for one expert's inputs (or for all of a plain weight's)."""

    wanted: Float[Tensor, "k n"]
    """B: what each target row writes along each direction, beyond the neutral mean."""
    kernel: Float[Tensor, " n"]
    """Eigenvalues of K, at least zero."""
    coordinates: Float[Tensor, "k n"]
    """B in the eigenbasis V of K."""
    inputs: Float[Tensor, "n d_in"]
    """V^T X M^-1."""
    usual: Float[Tensor, " k"]
    """R C R^T: energy that preserved inputs write along each direction."""
    e: float
    """Ridge on C."""
    samples: int
    """n of the whole target set, which lambda refers to."""

    def weights(self, lambdas: Tensor) -> Tensor:
        """Return B V (diag(kernel) + n lambda_i)^-1 for each direction i."""
        return self.coordinates / (self.kernel + self.samples * lambdas[:, None]).clamp_min(1e-30)


@dataclass(frozen=True)
class Balance:
    """What a fit expects of an edit, in energies along its directions."""

    wanted: float
    """Energy that targets write beyond neutral prompts, before the edit."""
    left: float
    """The same after it."""
    usual: float
    """Energy that preserved inputs write, before the edit."""
    moved: float
    """Energy of the change that preserved inputs see."""

    def __add__(self, other: Balance) -> Balance:
        return Balance(
            self.wanted + other.wanted,
            self.left + other.left,
            self.usual + other.usual,
            self.moved + other.moved,
        )

    @property
    def removed(self) -> float:
        """Share of the behaviour's energy that goes, at most 1."""
        return 1 - self.left / self.wanted if self.wanted > 0 else 0.0

    @property
    def collateral(self) -> float:
        """Energy of the change on preserved inputs, as a share of what they write there."""
        return self.moved / self.usual if self.usual > 0 else 0.0


@dataclass(frozen=True)
class Solution:
    """The edit of one writer, for every lambda and alpha."""

    writer: Writer
    """The writer."""
    left: Float[Tensor, "d_model k"]
    """Output side: minus what writes the directions to the stream (`Writer.write`)."""
    parts: tuple[_Part | None, ...]
    """One for each expert, None where no target row came; a single one for a plain weight."""
    shape: tuple[int, ...]
    """Axes of the weight without that of d_model."""
    ridge: float
    """Largest relative ridge that was needed, see `Moment.solver`."""
    condition: float
    """Largest estimated condition number of M."""

    def factor(self, lambdas: Float[Tensor, " k"], alphas: Float[Tensor, " k"]) -> Factor:
        """Return the change of the weight, with a lambda and an alpha for each direction."""
        experts = len(self.parts)
        size = self.shape[-1] if experts == 1 else next(p for p in self.parts if p).inputs.shape[1]
        right = torch.zeros(len(self.left.T), experts, size)
        for index, part in enumerate(self.parts):
            if part is not None:
                right[:, index] = (alphas[:, None] * part.weights(lambdas) @ part.inputs).float()
        w = self.writer
        weight = "" if w.weight == f"{w.name}.weight" else w.weight
        return Factor(self.left, right.reshape(-1, *self.shape), None, w.axis, weight)

    def balance(self, lambdas: Float[Tensor, " k"], alphas: Float[Tensor, " k"]) -> Balance:
        """Return what the fit expects of the edit on its own rows."""
        total = Balance(0.0, 0.0, 0.0, 0.0)
        for part in self.parts:
            if part is None:
                continue
            weights = alphas[:, None] * part.weights(lambdas)
            left = part.coordinates - weights * part.kernel
            # z M z^T = z C z^T + e |z|^2.
            moved = (weights.pow(2) * part.kernel).sum()
            moved = moved - part.e * (weights @ part.inputs).pow(2).sum()
            total += Balance(
                float(part.coordinates.pow(2).sum()) / part.samples,
                float(left.pow(2).sum()) / part.samples,
                float(part.usual.sum()),
                float(moved.clamp_min(0)),
            )
        return total


@dataclass(frozen=True)
class Selective:
    """Solutions of all writers: an edit plan for every lambda and alpha."""

    solutions: tuple[Solution, ...]
    """In order of depth."""

    def plan(self, lambdas: Mapping[int, Any], alphas: Mapping[int, Any]) -> EditPlan:
        """Return the plan with, for each layer, a lambda and an alpha for each of its directions."""
        return EditPlan(
            {
                s.writer.name: s.factor(*_strengths(s, lambdas, alphas))
                for s in self.solutions
                if s.writer.layer in lambdas
            }
        )

    def balance(self, lambdas: Mapping[int, Any], alphas: Mapping[int, Any]) -> dict[int, Balance]:
        """Return what the fit expects, by layer."""
        found: dict[int, Balance] = {}
        for s in self.solutions:
            layer = s.writer.layer
            if layer in lambdas:
                one = s.balance(*_strengths(s, lambdas, alphas))
                found[layer] = found[layer] + one if layer in found else one
        return found


def _strengths(
    s: Solution, lambdas: Mapping[int, Any], alphas: Mapping[int, Any]
) -> tuple[Tensor, Tensor]:
    layer = s.writer.layer
    return (
        torch.as_tensor(lambdas[layer], dtype=torch.float64).reshape(-1),
        torch.as_tensor(alphas[layer], dtype=torch.float64).reshape(-1),
    )


def solve(
    lm: LanguageModel,
    directions: Mapping[int, Float[Tensor, "k d_model"]],
    decisions: Decisions,
    preserved: Preserved,
    *,
    plan: EditPlan | None = None,
    ridge: float = RIDGE,
    progress: Progress[Any] = silent,
) -> Selective:
    """Solve for the writers of every layer that has directions, from the weights as `plan` leaves them.

    Inputs to preserve are those of the model without it, whichever pass asks and however many groups
    there are. Raises `ModelError` where a writer's inputs could not be read, and `NonFinite`.
    """
    found: dict[str, Solution] = {}
    for group, moments in preserved.groups(directions.keys()):
        chosen = [w for w in group if w.layer in directions and width(lm, w)]
        with applied(lm.model, plan or EditPlan()):
            for writer in progress(chosen, "solving", len(chosen)):
                found[writer.name] = _solve(
                    lm, writer, directions[writer.layer], decisions, moments, ridge
                )
    return Selective(tuple(found[w.name] for w in preserved.writers if w.name in found))


def _solve(
    lm: LanguageModel,
    writer: Writer,
    directions: Tensor,
    decisions: Decisions,
    moments: Mapping[tuple[str, int], Moment],
    ridge: float,
) -> Solution:
    weight = lm.model.get_parameter(writer.weight).detach()
    where = (home(lm.layers[writer.layer]) if writer.layer >= 0 else None) or weight.device
    reading = writer.read(directions.double())
    # (k, experts, d_in); a plain weight has one expert.
    whole = read_off(reading.float().to(weight.device), weight, writer.axis)
    read = whole.reshape(len(reading), writer.experts or 1, -1).cpu().double()
    parts: list[_Part | None] = []
    worst, condition = ridge, 1.0
    for expert in range(read.shape[1]):
        key = (writer.name, expert)
        if key not in decisions.target:
            parts.append(None)
            continue
        moment = moments.get(key) or Moment(decisions.target[key].shape[1])
        fit = partial(_fit, key, moment, read[:, expert], decisions, ridge)
        part = fit(where) if has_float64(where) else None
        part = part or fit(torch.device("cpu"))
        assert part is not None
        parts.append(part.solved)
        worst, condition = max(worst, part.ridge), max(condition, part.condition)
    if not any(parts):
        raise ModelError(
            f"the inputs of {writer.weight} could not be read while the model ran.",
            "Use --edit orthogonal, which does not need them.",
        )
    left = -writer.write(directions.double())
    return Solution(writer, left.float(), tuple(parts), tuple(whole.shape[1:]), worst, condition)


class _Fitted(NamedTuple):
    solved: _Part
    ridge: float
    condition: float


def _fit(
    key: Key, moment: Moment, read: Tensor, decisions: Decisions, ridge: float, where: torch.device
) -> _Fitted | None:
    """Solve for one expert on a device that has float64; None where its memory is too short for that."""
    try:
        x, moment, read = decisions.target[key].to(where).double(), moment.on(where), read.to(where)
        usual = moment.energy(read)
        solver = moment.solver(ridge, float(x.pow(2).sum()) / decisions.rows, key[0])
        inputs = solver.solve(x.T).T
        kernel, vectors = torch.linalg.eigh((inputs @ x.T + x @ inputs.T) / 2)
        anchor = decisions.neutral.get(key)
        wanted = read @ (x if anchor is None else x - anchor.to(where).double()).T
        solved = _Part(
            wanted.cpu(),
            kernel.clamp_min(0).cpu(),
            (wanted @ vectors).cpu(),
            (vectors.T @ inputs).float().double().cpu(),
            usual.cpu(),
            solver.e,
            decisions.rows,
        )
    except torch.OutOfMemoryError:
        return None
    return _Fitted(solved, solver.ridge, solver.condition)
