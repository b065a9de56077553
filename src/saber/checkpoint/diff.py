"""What changed between two checkpoints: one pair of tensors at a time, off the files.

The verdict and what it rests on are in `checkpoint/verdict.py`, the mathematics of one matrix in
`checkpoint/delta.py`; docs/diff.md explains both and gives their error rates.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saber.checkpoint.delta import Change, compare_matrices, compare_vectors
from saber.checkpoint.naming import Layout, aligned, gain_behind, kind_of, layer_of
from saber.checkpoint.reading import Checkpoint
from saber.checkpoint.sharing import Piece, Sharing, sharing
from saber.checkpoint.verdict import Verdict, judge
from saber.errors import ModelError
from saber.linalg import finite
from saber.lm.forward import Progress, silent

SCHEMA = 1
NARROW = 8
"""Matrices with a side below this are looked at as vectors."""


@dataclass(frozen=True)
class Difference:
    """What changed between two checkpoints."""

    base: Checkpoint
    """The checkpoint that was edited."""
    edited: Checkpoint
    """What came out."""
    layout: Layout
    """Width and axis of the stream in the base's files."""
    common: int
    """Tensors that both have."""
    unchanged: int
    """Tensors that are equal."""
    added: tuple[str, ...]
    """Tensors that only the edited one has."""
    removed: tuple[str, ...]
    """Tensors that only the base has."""
    reshaped: tuple[str, ...]
    """Tensors of another shape, which were not compared."""
    retyped: tuple[str, ...]
    """Tensors of another dtype; compared unless one holds codes."""
    unmeasured: tuple[str, ...]
    """Changed tensors that hold codes of a quantised format, so that no difference can be taken."""
    pieces: tuple[Piece, ...]
    """Every changed matrix and vector; a fused tensor has one for each expert."""
    shared: Sharing
    """Overlaps of output directions."""
    verdict: Verdict
    """What was done."""
    seconds: float
    """Wall time."""
    size: int
    """Bytes of the tensors that were compared, both sides."""


def compare(
    base: Checkpoint, edited: Checkpoint, *, seed: int = 0, progress: Progress[Any] = silent
) -> Difference:
    """Compare two checkpoints tensor by tensor; nothing but the pair at hand is in memory.

    Raises `ModelError` where the two have no tensor in common, or none of the same shape.
    """
    start = time.perf_counter()
    names = aligned(base, edited)
    if not names:
        raise ModelError(
            f"{base.name} and {edited.name} have no tensor in common "
            f"({next(iter(base.tensors))!r} against {next(iter(edited.tensors))!r}).",
            "They are different architectures; give a model and what was made of it.",
        )
    alike = {a: b for a, b in names.items() if base.tensors[a].shape == edited.tensors[b].shape}
    if not any(len(base.tensors[a].shape) > 1 for a in alike):
        some = next(iter(names))
        raise ModelError(
            f"no matrix of {base.name} and {edited.name} has the same shape "
            f"({some}: {base.tensors[some].shape} against {edited.tensors[names[some]].shape}).",
            "They are models of different sizes; give a model and what was made of it.",
        )
    layout = Layout.of(base)
    generator = torch.Generator().manual_seed(seed)
    pieces: list[Piece] = []
    unmeasured: list[str] = []
    unchanged = size = 0
    for a in progress(sorted(alike, key=_depth), "comparing tensors", len(alike)):
        b = alike[a]
        ours, theirs = base.tensors[a], edited.tensors[b]
        found = list(_changed(base, edited, a, b, layout, generator))
        if found and not (ours.numeric and theirs.numeric):
            unmeasured.append(a)
        else:
            pieces += found
        unchanged += not found
        size += math.prod(ours.shape) * (_width(ours.dtype) + _width(theirs.dtype))
    removed = tuple(n for n in base.tensors if n not in names)
    taken = set(names.values())
    added = tuple(n for n in edited.tensors if n not in taken)
    reshaped = tuple(a for a in names if a not in alike)
    shared = sharing(pieces)
    damaged = sum(not p.change.finite for p in pieces)
    skipped = len(removed) + len(added) + len(reshaped) + damaged
    return Difference(
        base=base,
        edited=edited,
        layout=layout,
        common=len(names),
        unchanged=unchanged,
        added=added,
        removed=removed,
        reshaped=reshaped,
        retyped=tuple(
            a for a, b in alike.items() if base.tensors[a].dtype != edited.tensors[b].dtype
        ),
        unmeasured=tuple(unmeasured),
        pieces=tuple(pieces),
        shared=shared,
        verdict=judge(pieces, shared, skipped, len(unmeasured)),
        seconds=time.perf_counter() - start,
        size=size,
    )


def _depth(name: str) -> tuple[int, str]:
    layer = layer_of(name)
    return (-1 if layer is None else layer, name)


_BITS = {"4": 4, "6": 6, "8": 8, "16": 16, "32": 32, "64": 64}


def _width(dtype: str) -> int:
    """Return the bytes of an element, from the dtype's name (BF16, F8_E4M3, I32, BOOL, ...)."""
    digits = dtype.partition("_")[0].lstrip("BFIUfloatin")
    return max(1, _BITS.get(digits, 8) // 8)


def _changed(
    base: Checkpoint,
    edited: Checkpoint,
    a: str,
    b: str,
    layout: Layout,
    generator: torch.Generator,
) -> Iterator[Piece]:
    """Yield what changed in a tensor: nothing where it is equal, one piece for each expert of a fused one."""
    stored = base.tensors[a]
    shape = stored.shape
    kind = kind_of(a, stored)
    fused = len(shape) == 3 and min(shape[1:]) >= NARROW and stored.numeric
    layer, gain = layer_of(a), None
    for index in range(shape[0]) if fused else (None,):
        x, y = base.read(a, index), edited.read(b, index)
        if _equal(x, y):
            continue
        name = a if index is None else f"{a}[{index}]"
        if not (stored.numeric and edited.tensors[b].numeric):
            yield Piece(name, kind, layer, False, Change(math.nan, 1.0, stored.dtype, False, True))
        elif x.ndim == 2 and min(x.shape) >= NARROW:
            gain = gain_behind(base, a, kind) if gain is None else gain
            sides = layout.sides(kind, tuple(x.shape), fused)
            change = compare_matrices(x, y, sides, gain, generator=generator)
            yield Piece(name, kind, layer, True, change, gain)
        else:
            yield Piece(name, kind, layer, False, compare_vectors(x, y))


def _equal(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors hold the same numbers, bit for bit where the dtype is the same."""
    if x.dtype != y.dtype:
        return x.is_floating_point() and y.is_floating_point() and torch.equal(x.float(), y.float())
    return torch.equal(x, y) or torch.equal(_bytes(x), _bytes(y))


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8)


def record(found: Difference) -> dict[str, Any]:
    """Return the comparison as what `--json` prints."""
    v, shared = found.verdict, found.shared
    return {
        "schema": SCHEMA,
        "base": found.base.name,
        "edited": found.edited.name,
        "d_model": found.layout.d_model,
        "verdict": {
            "name": v.name,
            "text": v.text,
            "rank": v.rank,
            "strength": v.strength,
            "law": v.law,
            "pure": v.pure,
            "kinds": v.kinds,
            "evidence": list(v.evidence),
        },
        "tensors": {
            "common": found.common,
            "unchanged": found.unchanged,
            "changed": found.common - found.unchanged - len(found.reshaped),
            "added": list(found.added),
            "removed": list(found.removed),
            "reshaped": list(found.reshaped),
            "retyped": list(found.retyped),
            "unmeasured": list(found.unmeasured),
        },
        "kinds": kinds(found),
        "shared_directions": {
            "overlap": shared.shared,
            "directions": shared.directions,
            "behind_gain": shared.behind_gain,
            "groups": [{"layer": layer, "kind": kind} for layer, kind in shared.labels],
            "matrix": [[round(float(x), 4) for x in row] for row in shared.overlap],
        },
        "changes": [_row(p) for p in found.pieces],
        "seconds": found.seconds,
        "bytes": found.size,
    }


def _row(p: Piece) -> dict[str, Any]:
    c = p.change
    law = c.law
    return {
        "name": p.name,
        "kind": p.kind,
        "layer": p.layer,
        "relative": finite(c.relative),
        "changed": c.share_changed,
        "grid": c.grid,
        "within_rounding": c.within_rounding,
        "finite": c.finite,
        "rank": c.rank,
        "captured": c.captured,
        "values": list(c.values),
        "floor": c.floor,
        "norms_kept": c.norms_kept,
        "law": None
        if law is None
        else {
            "axis": law.axis,
            "share": law.share,
            "within": law.within,
            "holds": law.holds,
            "strengths": list(law.strengths),
            "elsewhere": law.elsewhere,
            "gain": law.gain,
        },
    }


def kinds(found: Difference) -> list[dict[str, Any]]:
    """Return one summary for each kind of tensor that changed, writers first."""
    groups: dict[str, list[Piece]] = {}
    for piece in sorted(found.pieces, key=lambda p: (not p.writes, not p.matrix, p.kind)):
        groups.setdefault(piece.kind, []).append(piece)
    rows = []
    for kind, pieces in groups.items():
        sizes = [p.change.relative for p in pieces if math.isfinite(p.change.relative)]
        beyond = [p for p in pieces if p.beyond]
        ranks = [p.change.rank for p in beyond if p.matrix]
        laws = [p.change.law for p in beyond if p.change.law is not None]
        held = [p for p in beyond if p.ablated]
        rows.append(
            {
                "kind": kind,
                "changed": len(pieces),
                "beyond_rounding": len(beyond),
                "layers": sorted({p.layer for p in pieces if p.layer is not None}),
                "relative_median": _median(sizes),
                "relative_max": max(sizes, default=None),
                "rank_median": _median([float(r) for r in ranks if r is not None]),
                "matrices": len(ranks),
                "low_rank": sum(r is not None for r in ranks),
                "law_median": _median([law.share for law in laws]),
                "ablated": len(held),
                "strength_median": _median(
                    [s for p in held if p.change.law is not None for s in p.change.law.strengths]
                ),
            }
        )
    return rows


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None
