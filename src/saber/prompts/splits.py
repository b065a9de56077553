"""Seeded, disjoint, stratified splits: what selects never reports."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from saber.errors import DataError, UsageError
from saber.prompts.model import Prompt, PromptSet, normalised

NAMES = ("fit", "validation", "heldout")
ALIASES = {
    "train": "fit",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "test": "heldout",
    "held-out": "heldout",
}


@dataclass(frozen=True)
class Splits:
    """Three sets that share no prompt."""

    fit: PromptSet
    """Prompts that directions and moments are estimated on."""
    validation: PromptSet
    """Prompts that choices (layers, strengths, when to stop) are made on."""
    heldout: PromptSet
    """Prompts that results are reported on, and nothing else."""


def split(
    prompts: PromptSet,
    *,
    seed: int,
    fractions: tuple[float, float, float] = (0.5, 0.15, 0.35),
    minimum: tuple[int, int, int] = (8, 4, 8),
) -> Splits:
    """Split by the prompts' own split field or, where there is none, by seed.

    The seeded split sorts each category by SHA-256 of seed and text, so the order of the file
    does not matter, and keeps each category's share of each split (largest remainders). Sizes
    are `fractions` of the total, raised to `minimum` (prompts). DataError: too few prompts,
    some but not all of them carry a split, or two splits share a prompt.
    """
    if min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise UsageError(f"split fractions must be above 0 and sum to 1, not {fractions}.")
    marked = sum(bool(prompt.split) for prompt in prompts)
    if 0 < marked < len(prompts):
        raise DataError(
            f"{prompts.name}: {len(prompts) - marked} of {len(prompts)} prompts have no split.",
            "Give every prompt a split (fit, validation or heldout), or none of them.",
        )
    parts = _own(prompts) if marked else _seeded(prompts, seed, fractions, minimum)
    for name, part, least in zip(NAMES, parts, minimum, strict=True):
        if len(part) < least:
            raise DataError(
                f"{prompts.name}: the {name} split has {len(part)} prompts and needs {least}.",
                "Add prompts to it, or remove the split field to have the set split by seed.",
            )
    return Splits(
        *(
            PromptSet(f"{prompts.name}/{name}", tuple(replace(p, split=name) for p in part))
            for name, part in zip(NAMES, parts, strict=True)
        )
    )


def check_disjoint(a: PromptSet, b: PromptSet) -> None:
    """Raise DataError naming a prompt that both sets hold, up to case, spacing and punctuation."""
    seen = {normalised(prompt.text): prompt for prompt in a}
    shared = [p for p in b if normalised(p.text) in seen]
    if shared:
        first, twin = shared[0], seen[normalised(shared[0].text)]
        others = f", and {len(shared) - 1} more" if len(shared) > 1 else ""
        where = f"{a.name} ({twin.id}) and in {b.name} ({first.id})"
        if a.name == b.name:
            where = f"two sets named {a.name} ({twin.id}, {first.id})"
        raise DataError(
            f"the same prompt is in {where}: {first.text[:80]!r}{others}.",
            "Remove it from one of the two.",
        )


@dataclass(frozen=True)
class Use:
    """A set of prompts, as a run uses it."""

    prompts: PromptSet
    """The set."""
    option: str = ""
    """The option that gave it; empty for a bundled set."""


def check_apart(some: Sequence[Use], others: Sequence[Use], why: str) -> None:
    """Raise DataError naming a prompt of both sides, its two sets, and the options that gave them.

    Prompts are the same as in `check_disjoint`; `why` says why they must not be.
    """
    seen: dict[str, Use] = {}
    for use in some:
        for prompt in use.prompts:
            seen.setdefault(normalised(prompt.text), use)
    for use in others:
        shared = [p for p in use.prompts if normalised(p.text) in seen]
        if shared:
            other = seen[normalised(shared[0].text)]
            more = f", and {len(shared) - 1} more" if len(shared) > 1 else ""
            named = dict.fromkeys(option for option in (other.option, use.option) if option)
            raise DataError(
                f"the same prompt is in {other.prompts.name} and in {use.prompts.name}: "
                f"{shared[0].text[:80]!r}{more}; {why}.",
                f"Take it out of what {' or '.join(named)} gives." if named else "",
            )


def _own(prompts: PromptSet) -> list[list[Prompt]]:
    parts: dict[str, list[Prompt]] = {name: [] for name in NAMES}
    for prompt in prompts:
        name = prompt.split.strip().lower()
        name = ALIASES.get(name, name)
        if name not in parts:
            raise DataError(
                f"{prompts.name}: prompt {prompt.id} has the unknown split {prompt.split!r}.",
                "Use fit, validation or heldout, or remove the split field.",
            )
        parts[name].append(prompt)
    sets = [PromptSet(f"{prompts.name}/{name}", tuple(part)) for name, part in parts.items()]
    for i, part in enumerate(sets):
        for other in sets[i + 1 :]:
            check_disjoint(part, other)
    return list(parts.values())


def _seeded(
    prompts: PromptSet, seed: int, fractions: Sequence[float], minimum: Sequence[int]
) -> list[list[Prompt]]:
    in_order = sorted(prompts, key=lambda p: (p.text, p.category, p.id))
    pool = PromptSet.unique(prompts.name, in_order)
    if len(pool) < sum(minimum):
        needs = " + ".join(f"{m} {name}" for m, name in zip(minimum, NAMES, strict=True))
        raise DataError(
            f"{prompts.name} has {len(pool)} different prompts; the splits need "
            f"{sum(minimum)} ({needs}).",
            f"Add at least {sum(minimum) - len(pool)}.",
        )
    queues: dict[str, list[Prompt]] = defaultdict(list)
    for prompt in sorted(pool, key=lambda p: _rank(seed, "prompt", normalised(p.text))):
        queues[prompt.category].append(prompt)
    parts: list[list[Prompt]] = []
    for total in _sizes(len(pool), fractions, minimum):
        left = {category: len(queue) for category, queue in queues.items()}
        part: list[Prompt] = []
        for category, count in _apportion(left, total, f"{seed} {len(parts)}").items():
            part += queues[category][:count]
            del queues[category][:count]
        parts.append(sorted(part, key=lambda p: _rank(seed, "prompt", normalised(p.text))))
    return parts


def _rank(*key: object) -> bytes:
    return hashlib.sha256("\0".join(map(str, key)).encode("utf-8", "surrogatepass")).digest()


def _sizes(n: int, fractions: Sequence[float], minimum: Sequence[int]) -> list[int]:
    """Return sizes that sum to n: the fractions of n, each raised to its minimum."""
    names = {str(i): round(f * 1_000_000) for i, f in enumerate(fractions)}
    sizes = list(_apportion(names, n, "sizes").values())
    while short := [i for i, m in enumerate(minimum) if sizes[i] < m]:
        richest = max(range(len(sizes)), key=lambda i: sizes[i] - minimum[i])
        sizes[short[0]] += 1
        sizes[richest] -= 1
    return sizes


def _apportion(weights: Mapping[str, int], total: int, salt: str) -> Counter[str]:
    """Share out `total` in proportion to the weights by largest remainders, ties by hash."""
    whole = sum(weights.values())
    quotas = {key: Fraction(total * weight, whole) for key, weight in weights.items()}
    shares = Counter({key: int(quota) for key, quota in quotas.items()})
    by_remainder = sorted(
        quotas, key=lambda key: (int(quotas[key]) - quotas[key], _rank(salt, key))
    )
    for key in by_remainder[: total - sum(shares.values())]:
        shares[key] += 1
    return shares
