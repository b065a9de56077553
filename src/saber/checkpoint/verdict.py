"""From what changed in each tensor to what was done to the model, with the evidence.

The order of the questions matters: nothing changed; rounding alone; vectors alone; does the law of a
directional ablation hold for the writers that changed; are all changes of low rank, and if so, of
writers alone that share directions; none of these.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from saber.checkpoint.sharing import Piece, Sharing

Name = Literal[
    "identical",
    "rounding",
    "vectors",
    "directional_ablation",
    "directional_amplification",
    "low_rank_writers",
    "low_rank",
    "full_rank",
    "not_measured",
]
SHARED = 0.7
"""Least overlap of output directions that counts as shared."""
MOST = 0.8
"""Share of changed matrices of which something must be true to be said of the edit."""
PARTLY = 0.5
"""Share that the law explains from which an edit is said to be an ablation in part."""
PURE = 0.8
"""Least share of a writer's change that the law explains in an ablation without other changes."""


@dataclass(frozen=True)
class Verdict:
    """What was done, as far as the files show."""

    name: Name
    """The verdict in a word, for programs."""
    text: str
    """The verdict in a sentence."""
    rank: int | None
    """Directions taken out of (or added to) a writer, the median; None where that is no low rank."""
    strength: float | None
    """Median removed share of a direction: 1 is all of it; None unless the law holds."""
    law: float | None
    """Median share of a changed writer's difference that U (U^T W) explains."""
    pure: bool
    """Whether nothing beside the edit that is named changed."""
    kinds: dict[str, int]
    """Changed matrices by kind, rounding apart."""
    evidence: tuple[str, ...]
    """What speaks for it, one sentence each."""


@dataclass(frozen=True)
class _Facts:
    """What the verdicts are read off."""

    pieces: Sequence[Piece]
    sharing: Sharing
    whole: bool
    """Whether every tensor was compared."""

    @property
    def beyond(self) -> list[Piece]:
        """What changed by more than rounding."""
        return [p for p in self.pieces if p.beyond]

    @property
    def matrices(self) -> list[Piece]:
        """Matrices that changed."""
        return [p for p in self.beyond if p.matrix]

    @property
    def writers(self) -> list[Piece]:
        """Residual writers that changed."""
        return [p for p in self.matrices if p.writes]

    @property
    def readers(self) -> list[Piece]:
        """Changed matrices that do not write to the stream, but for those ablated on their own side."""
        return [p for p in self.matrices if not p.writes]

    @property
    def ablated(self) -> list[Piece]:
        """Writers whose change obeys the law, of low rank or along shared directions."""
        shared = self.sharing.shared
        return [
            p
            for p in self.writers
            if p.ablated
            and (p.change.rank is not None or (shared is not None and shared >= SHARED))
        ]

    @property
    def law(self) -> float | None:
        """Median share that the law explains."""
        shares = [p.change.law.share for p in self.writers if p.change.law is not None]
        return statistics.median(shares) if shares else None

    def verdict(
        self,
        name: Name,
        text: str,
        evidence: Sequence[str] = (),
        *,
        rank: int | None = None,
        strength: float | None = None,
        pure: bool | None = None,
    ) -> Verdict:
        """Return a verdict with the numbers that all have."""
        kinds = {str(k): n for k, n in Counter(p.kind for p in self.matrices).most_common()}
        pure = self.whole if pure is None else pure and self.whole
        return Verdict(name, text, rank, strength, self.law, pure, kinds, tuple(evidence))


def judge(pieces: Sequence[Piece], sharing: Sharing, skipped: int, unmeasured: int) -> Verdict:
    """Say what was done to the model.

    `skipped` counts tensors that were added, removed, damaged or have another shape; `unmeasured` those that
    changed but hold codes of a quantised format.
    """
    facts = _Facts(pieces, sharing, not (skipped or unmeasured))
    if not pieces and unmeasured:
        return facts.verdict(
            "not_measured",
            "Quantised weights changed; their codes cannot be held against one another. Compare "
            "dequantised checkpoints.",
            [f"{unmeasured} changed tensors hold codes, not numbers"],
        )
    if not pieces:
        return facts.verdict("identical", "The tensors in common are equal, bit for bit.")
    damaged = sum(not p.change.finite for p in pieces)
    if not facts.beyond and damaged:
        return facts.verdict(
            "not_measured",
            f"NaN or infinity in {damaged} changed tensors, so that no difference can be taken there; no "
            "other tensor differs by more than rounding.",
        )
    if not facts.beyond:
        grid = Counter(p.change.grid for p in pieces).most_common(1)[0][0]
        said = (
            f"no difference in {len(pieces)} changed tensors stands out of the rounding of {grid}"
        )
        return facts.verdict("rounding", f"The same weights, up to rounding to {grid}.", [said])
    if not facts.matrices:
        text = f"Only vectors changed ({_counted(facts.beyond)}); every matrix is as it was."
        return facts.verdict("vectors", text)
    if facts.ablated and len(facts.ablated) >= MOST * len(facts.writers):
        return _ablation(facts)
    if sum(p.change.rank is not None for p in facts.matrices) >= MOST * len(facts.matrices):
        return _low_rank(facts)
    high = [p for p in facts.matrices if p.change.rank is None]
    return facts.verdict(
        "full_rank",
        "A change of high rank: a full fine-tune, a merge, another quantisation, or a large LoRA.",
        [
            f"{len(high)} of {len(facts.matrices)} changed matrices have no low rank",
            *_against(facts),
        ],
    )


def _ablation(facts: _Facts) -> Verdict:
    ablated = facts.ablated
    laws = [p.change.law for p in ablated if p.change.law is not None]
    rank = round(statistics.median(law.rank for law in laws))
    strength = statistics.median(s for law in laws for s in law.strengths)
    share = statistics.median(law.share for law in laws)
    beside = [p for p in facts.readers if not p.ablated]
    pure = share >= PURE and not beside and len(ablated) == len(facts.writers)
    said = [
        f"in {len(ablated)} of {len(facts.writers)} changed writers the change lies along U (U^T W), "
        f"which explains {share:.0%} of it (median); chance explains a few percent",
        *_shared(facts),
    ]
    kept, count = Counter(p.change.norms_kept for p in ablated).most_common(1)[0]
    if kept and count >= MOST * len(ablated):
        said.append(f"norms were put back afterwards ({kept})")
    reads = [p for p in facts.readers if p.ablated]
    if reads:
        said.append(f"ablated on their input side: {_counted(reads)}")
    if beside:
        said.append(f"matrices that do not write to the stream changed too: {_counted(beside)}")
    name: Name = "directional_ablation" if strength > 0 else "directional_amplification"
    what = "A directional ablation" if strength > 0 else "An amplification of directions"
    text = (
        f"{what} of rank {rank}, strength {abs(strength):.2f}, in {_counted(ablated)}"
        f"{'' if pure else '; with other changes around it'}."
    )
    return facts.verdict(name, text, said, rank=rank, strength=strength, pure=pure)


def _low_rank(facts: _Facts) -> Verdict:
    ranks = [p.change.rank for p in facts.matrices if p.change.rank is not None]
    rank = round(statistics.median(ranks))
    said = [
        f"{len(ranks)} of {len(facts.matrices)} changed matrices have a low numerical rank "
        f"({min(ranks)} to {max(ranks)}, median {rank}) above the rounding of their dtype",
        *_shared(facts),
        *_against(facts),
    ]
    shared = facts.sharing.shared
    if not facts.readers and shared is not None and shared >= SHARED:
        said.append("only matrices that write to the residual stream changed")
        partly = facts.law is not None and facts.law >= PARTLY
        follows = (
            "follows from the weights only in part"
            if partly
            else "does not follow from the weights"
        )
        return facts.verdict(
            "low_rank_writers",
            f"A low-rank edit (rank {rank}) of residual writers with shared output directions, in "
            f"{_counted(facts.writers)}; no directional ablation, as its input side {follows}.",
            said,
            rank=rank,
        )
    text = f"A low-rank update (rank {rank}) of {_counted(facts.matrices)}, as a merged LoRA leaves it."
    return facts.verdict("low_rank", text, said, rank=rank)


def _shared(facts: _Facts) -> list[str]:
    shared, n = facts.sharing.shared, facts.sharing.directions
    if shared is None:
        return []
    where = ", behind the norms' gains" if facts.sharing.behind_gain else ""
    return [
        f"output directions of changed writers overlap by {shared:.2f} (median of the best partner"
        f"{where}); together they span about {n} dimensions"
    ]


def _against(facts: _Facts) -> list[str]:
    said = []
    if facts.law is not None:
        said.append(f"U (U^T W) explains {facts.law:.0%} of a writer's change (median)")
    if facts.readers:
        listed = _counted(facts.readers)
        said.append(f"matrices that do not write to the stream changed too: {listed}")
    return said


def _counted(pieces: Sequence[Piece]) -> str:
    found = Counter(p.kind for p in pieces).most_common()
    return ", ".join(f"{n} {kind}" for kind, n in found)
