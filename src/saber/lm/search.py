"""Search one layer for the parameters that write to the residual stream.

* Candidates are all parameters of a layer with an axis of length `d_model`, along each such axis.
  Those found are held at zero while the rest is tried, until the layer passes its input on.
* Where several writers share one norm, none of them can be tried beside the others. Then each
  candidate is tried alone, with everything at zero that its own path to the stream does not need;
  at last on a stream close to zero, so that what the layer does to the stream itself (mixing several
  streams by what they hold) is not taken for what the candidate writes.
* Experts that the router left out while testing are found by their siblings.

Layers of one class mostly have the same writers. So what was found in one is tried first in the next
ones, parameter by parameter with the same test; only where this does not account for all that a layer
adds does the full search follow. What counts as proof is the same either way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from saber.lm.substitution import Bench, Fit

LAW_LIMIT = 1e-4
"""The residual up to which a law counts as kept."""


@dataclass(frozen=True)
class Candidate:
    """A parameter that may write to the stream, along one of its axes."""

    name: str
    """Dotted name in the model."""
    local: str
    """Dotted name in its layer."""
    parameter: nn.Parameter
    """The parameter itself."""
    axis: int
    """The axis of length d_model."""


class Finding(NamedTuple):
    """A writer that was found, and how it reaches the stream."""

    candidate: Candidate
    fit: Fit


@dataclass(frozen=True)
class Trial:
    """How a writer was found, by the names in its layer."""

    local: str
    """Dotted name in the layer."""
    axis: int
    """Axis of its outputs."""
    quiet: bool = False
    """Whether the stream had to be close to zero."""
    beside: tuple[str, ...] = ()
    """What was held at zero beside the writers found before it."""


@dataclass
class Memory:
    """How writers were found in earlier layers, by the class of the layer."""

    trials: dict[type, list[list[Trial]]] = field(default_factory=dict)
    """A layer's class, and for each layer that was searched the trials that found its writers."""


def search(
    bench: Bench, d_model: int, names: Mapping[int, str], memory: Memory
) -> tuple[list[Finding], float]:
    """Return the writers among a layer's parameters, and what is left of the output without them."""
    candidates = _candidates(bench.layer, d_model, names)
    known = memory.trials.setdefault(type(bench.layer), [])
    for trials in known[::-1]:
        found = _repeated(bench, candidates, trials)
        if not found:
            continue
        zeroed = [f.candidate.parameter for f in found]
        leftover = bench.leftover(zeroed)
        if leftover <= 0.1 * LAW_LIMIT or bench.carried(zeroed, names)[0] <= LAW_LIMIT:
            return found + _siblings(found, candidates), leftover
    found, trials, leftover = _searched(bench, candidates, names)
    known.append(trials)
    return found + _siblings(found, candidates), leftover


def _candidates(layer: nn.Module, d_model: int, names: Mapping[int, str]) -> list[Candidate]:
    """Return the layer's parameters with an axis of length d_model, weights before vectors."""
    found = [
        Candidate(names[id(p)], local, p, axis)
        for local, p in layer.named_parameters()
        if p.dtype.is_floating_point
        for axis, size in enumerate(p.shape)
        if size == d_model
    ]
    # Later modules first: what they do to an earlier one's output would hide it.
    later = found[::-1]
    return [c for c in later if c.parameter.ndim > 1] + [c for c in later if c.parameter.ndim < 2]


def _repeated(
    bench: Bench, candidates: Sequence[Candidate], trials: Sequence[Trial]
) -> list[Finding]:
    """Return which of another layer's writers are writers here, by the same trials; none if it differs."""
    parameters = dict(bench.layer.named_parameters())
    by_local = {(c.local, c.axis): c for c in candidates}
    found: list[Finding] = []
    for trial in trials:
        candidate = by_local.get((trial.local, trial.axis))
        if candidate is None:
            return []
        zero = [f.candidate.parameter for f in found]
        zero += [parameters[name] for name in trial.beside if name in parameters]
        on = bench.quiet() if trial.quiet else bench
        fit = on.fit(candidate.parameter, candidate.axis, zero)
        if fit is not None:
            found.append(Finding(candidate, fit))
    return found


def _searched(
    bench: Bench, candidates: Sequence[Candidate], names: Mapping[int, str]
) -> tuple[list[Finding], list[Trial], float]:
    """Try all candidates; return the writers, how they were found, and what is left without them."""
    rest = list(candidates)
    local = {id(p): name for name, p in bench.layer.named_parameters()}
    found: list[Finding] = []
    trials: list[Trial] = []
    leftover = bench.leftover([])
    for on, alone, quiet in ((bench, False, False), (bench, True, False), (bench.quiet(), True, True)):
        # What is left may be no writer's doing.
        zeroed = [f.candidate.parameter for f in found]
        if alone and (bench.renormalises() or bench.carried(zeroed, names)[0] <= LAW_LIMIT):
            break
        own_path: dict[tuple[str, int], list[nn.Parameter]] = {}
        again = True
        while again and leftover > 0.1 * LAW_LIMIT:
            again = False
            for candidate in list(rest):
                beside = _vectors_beside(candidate, rest)
                if alone:
                    key = (candidate.name, candidate.axis)
                    if key not in own_path:
                        others = list(dict.fromkeys(c.parameter for c in rest))
                        own_path[key] = on.isolated(candidate.parameter, candidate.axis, others)
                    beside += own_path[key]
                zero = [f.candidate.parameter for f in found] + beside
                fit = on.fit(candidate.parameter, candidate.axis, zero)
                if fit is None:
                    continue
                if alone:
                    fit, beside = _with_gains(on, candidate, zero[: len(found)], beside, fit)
                found.append(Finding(candidate, fit))
                kept_at_zero = tuple(dict.fromkeys(local[id(p)] for p in beside))
                trials.append(Trial(candidate.local, candidate.axis, quiet, kept_at_zero))
                rest = [c for c in rest if c.parameter is not candidate.parameter]
                again = True
                leftover = bench.leftover([f.candidate.parameter for f in found])
                if leftover <= 0.1 * LAW_LIMIT:
                    break
    return found, trials, leftover


def _with_gains(
    bench: Bench,
    candidate: Candidate,
    found: list[nn.Parameter],
    beside: list[nn.Parameter],
    fit: Fit,
) -> tuple[Fit, list[nn.Parameter]]:
    """Let go of vectors that were held at zero, as long as the candidate fits; return what is held then.

    A norm that applies "one plus weight" lets everything pass with its weight at zero, but by no gain.
    """
    for vector in [p for p in beside if p.ndim == 1]:
        fewer = [p for p in beside if p is not vector]
        other = bench.fit(candidate.parameter, candidate.axis, found + fewer)
        if other is not None:
            fit, beside = other, fewer
    return fit, beside


def _vectors_beside(candidate: Candidate, rest: Sequence[Candidate]) -> list[nn.Parameter]:
    """Return the vectors of a weight's own module, among them its bias."""
    module = candidate.name.rpartition(".")[0]
    return [
        c.parameter
        for c in rest
        if c.name.rpartition(".")[0] == module
        and c.parameter.ndim < candidate.parameter.ndim
        and c.axis == c.parameter.ndim - 1
    ]


def _siblings(found: Sequence[Finding], candidates: Sequence[Candidate]) -> list[Finding]:
    """Return candidates that differ from a writer by their place in a list of modules alone.

    Members of a list of experts that no token was routed to have no effect that could be tested.
    """

    def pattern(c: Candidate) -> tuple[str, tuple[int, ...], int]:
        # A place is a whole part of the name: w1 and w2 are no siblings.
        name = ".".join("#" if part.isdigit() else part for part in c.name.split("."))
        return name, tuple(c.parameter.shape), c.axis

    fits = {pattern(f.candidate): f.fit for f in found}
    taken = {id(f.candidate.parameter) for f in found}
    rest = [c for c in candidates if id(c.parameter) not in taken]
    return [Finding(c, fits[pattern(c)]) for c in rest if pattern(c) in fits]
