"""Does padding change what a model answers? Then texts of one length alone are written together."""

from __future__ import annotations

from saber.lm.generate import generate
from saber.lm.model import LanguageModel

_SHORT = "Name a fruit."
_LONG = (
    "Name three rivers in Europe, the sea that each of them ends in, and a town that lies on it."
)
_TOKENS = 3
ALIKE, ROUNDED = 1e-3, 0.1
"""How far off what the output head sees may be beside a longer text, relative, and the same in 16 bits."""


def ignores_padding(lm: LanguageModel) -> bool:
    """Whether a short prompt is answered beside a longer one as it is alone.

    Not so where padding counts among the distances that attention sees, or goes into the states of a
    recurrence.
    """
    beside, alone = (generate(lm, p, _TOKENS, look=True)[0] for p in ([_SHORT, _LONG], [_SHORT]))
    assert beside.seen is not None
    assert alone.seen is not None
    limit = ALIKE if lm.dtype.itemsize > 2 else ROUNDED
    for step, (one, other) in enumerate(zip(beside.seen.heads, alone.seen.heads, strict=False)):
        if beside.ids[:step] != alone.ids[:step]:
            break  # rounding can tip a close call
        if not bool((one - other).norm() <= limit * other.norm()):
            return False
    return True
