"""The prompts of a run: loaded, held apart, and split into those that select and those that report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from saber import prompts
from saber.config import DataSpec, RunConfig
from saber.errors import (
    DataError,
    UnknownName,
    UsageError,
)
from saber.evaluation.measure import (
    EvaluationSets,
)
from saber.passes import RefineData
from saber.prompts import (
    Prompt,
    PromptSet,
    Splits,
    Use,
    check_apart,
    check_disjoint,
    normalised,
    split,
)
from saber.prompts.splits import NAMES as SPLIT_NAMES


@dataclass(frozen=True)
class RunData:
    """All prompts of a run: those that select, and those that report."""

    selecting: RefineData
    """Fit and validation splits."""
    reporting: EvaluationSets
    """Held-out splits."""
    validation: EvaluationSets
    """The same kinds of sets from the validation splits: what a sweep chooses by."""


def gather(config: RunConfig) -> RunData:
    """Load, check and split all prompt sets; nothing is read twice, and `DataError` where uses overlap."""
    spec = config.data
    if bool(spec.target) != bool(spec.neutral):
        raise UsageError("--target and --neutral go together.", "Give both, or neither.")
    target = prompts.load(spec.target) if spec.target else prompts.target()
    neutral = prompts.load(spec.neutral) if spec.neutral else prompts.neutral()
    check_disjoint(target, neutral)
    targets, neutrals = split(target, seed=config.seed), split(neutral, seed=config.seed)
    held_target, held_neutral = targets.heldout, neutrals.heldout
    if spec.eval_target:
        held_target = _separate(prompts.load(spec.eval_target), target)
    if spec.eval_neutral:
        held_neutral = _separate(prompts.load(spec.eval_neutral), neutral)
    seen = frozenset(p.category for p in targets.fit)
    kept = [_keep_set(name, target, config.seed) for name in spec.keep]
    borderline: Splits | None = None
    if spec.borderline or not spec.target:
        loaded = prompts.load(spec.borderline) if spec.borderline else prompts.borderline()
        if spec.borderline and spec.mode == "removal":
            borderline = Splits(none_of(loaded), none_of(loaded), loaded)
        else:
            borderline = split(loaded, seed=config.seed)
    if spec.mode == "over-refusal":
        if borderline is None:
            raise UsageError(
                "--mode over-refusal needs prompts that are refused wrongly.", "Give --borderline."
            )
        if spec.retain:
            raise UsageError(
                "--mode over-refusal keeps all targets; --retain has no meaning there."
            )
        refused = targets
        if not spec.target:
            refused = _with_more(targets, prompts.harmful())
        wrong, kept = borderline, [refused, *kept]
    else:
        wrong, retained = _without(targets, spec.retain, config.seed)
        if retained is not None:
            kept.append(retained)
            held_target, _ = _parted(held_target, spec.retain)

    def some(chosen: PromptSet) -> PromptSet:
        if not spec.limit or len(chosen) <= spec.limit:
            return chosen
        step = len(chosen) / spec.limit
        return replace(
            chosen, prompts=tuple(chosen.prompts[int(i * step)] for i in range(spec.limit))
        )

    splits = [s for s in (borderline, *kept) if s]
    everyday = _everyday(
        spec.everyday,
        [target, neutral, held_target, held_neutral]
        + [part for s in splits for part in (s.fit, s.validation, s.heldout)],
        config.seed,
    )

    # What is kept in over-refusal mode is the reported target set itself.
    reported = kept[1:] if spec.mode == "over-refusal" else kept
    battery = prompts.battery()
    choosing, checking = halves(battery)
    between = borderline.validation if borderline and len(borderline.validation) else None
    data = RunData(
        RefineData(
            target=wrong.fit,
            neutral=neutrals.fit,
            target_validation=wrong.validation,
            neutral_validation=neutrals.validation,
            capability=prompts.capability(),
            # False refusals lie closer to true ones than to these, which only made the edit weaker.
            everyday=everyday.fit if spec.mode == "removal" else none_of(everyday.fit),
            keep=tuple(k.fit for k in kept),
            keep_validation=tuple(k.validation for k in kept),
        ),
        EvaluationSets(
            target=some(held_target),
            neutral=some(held_neutral),
            borderline=some(borderline.heldout) if borderline else None,
            battery=some(checking if spec.battery == "half" else battery),
            seen=seen,
            kept=tuple(some(k.heldout) for k in reported),
            everyday=some(everyday.heldout) if len(everyday.heldout) else None,
        ),
        EvaluationSets(
            target=some(targets.validation if spec.mode == "over-refusal" else wrong.validation),
            neutral=some(neutrals.validation),
            borderline=some(between) if between else None,
            battery=some(choosing),
            seen=seen,
            kept=tuple(some(k.validation) for k in reported),
        ),
    )
    _require_apart(data, spec)
    return data


def _require_apart(data: RunData, spec: DataSpec) -> None:
    """Raise `DataError` for a prompt that selects and is reported on, or is target and preserved.

    None is left out instead: that would change what the user asked for, or what runs are compared by.
    """
    chosen, held, between = data.selecting, data.reporting, data.validation.borderline
    target, neutral, borderline, everyday = (
        f"--{name}" if getattr(spec, name) else ""
        for name in ("target", "neutral", "borderline", "everyday")
    )
    narrow, files = spec.mode == "over-refusal", ["--keep"] * len(spec.keep)
    kept = [target, *files] if narrow else [*files, "--retain"]
    wrong = borderline if narrow else target
    targets = [Use(chosen.target, wrong), Use(chosen.target_validation, wrong)]
    preserved = [
        Use(chosen.neutral, neutral),
        Use(chosen.neutral_validation, neutral),
        Use(chosen.capability),
        Use(chosen.everyday, everyday),
        *map(Use, chosen.keep, kept),
        *map(Use, chosen.keep_validation, kept),
    ]
    reported = [
        Use(held.target, "--eval-target" if spec.eval_target else target),
        Use(held.neutral, "--eval-neutral" if spec.eval_neutral else neutral),
        Use(held.battery),
        *map(Use, held.kept, kept[1:] if narrow else kept),
    ]
    if held.borderline:
        reported.append(Use(held.borderline, borderline))
    if held.everyday:
        reported.append(Use(held.everyday, everyday))
    # A sweep chooses by half of the battery too, which is reported on unless `data.battery` is half.
    choosing = [Use(between, borderline)] if between else []
    check_apart(
        [*targets, *preserved, *choosing], reported, "what selects must not be reported on as well"
    )
    check_apart(targets, preserved, "what is to lose the behaviour cannot be preserved as well")


def _everyday(name: str, sets: Sequence[PromptSet], seed: int) -> Splits:
    """Split the ordinary requests in two; what other sets hold is left out of the bundled ones."""
    none = PromptSet("everyday", ())
    if name == "none":
        return Splits(none, none, none)
    if not name:
        taken = {normalised(text) for one in sets for text in one.texts}
        bundled = prompts.everyday()
        fit, heldout = (
            replace(part, prompts=tuple(p for p in part if normalised(p.text) not in taken))
            for part in (bundled.where(split="fit"), bundled.where(split="heldout"))
        )
        return Splits(fit, none, heldout)
    own = prompts.load(name)
    for one in sets:
        check_disjoint(own, one)
    parts = split(own, seed=seed)
    # Nothing is chosen by these.
    return replace(parts, fit=_joined([parts.fit, parts.validation]), validation=none)


def _keep_set(name: str, target: PromptSet, seed: int) -> Splits:
    loaded = prompts.load(name)
    check_disjoint(loaded, target)
    return split(loaded, seed=seed)


def _with_more(targets: Splits, more: PromptSet) -> Splits:
    """Add prompts to what is fitted and chosen on; what is reported stays."""
    stem = targets.fit.name.removesuffix("/fit")
    fit, validation = (
        replace(_joined([part, more.where(split=name)]), name=f"{stem} and {more.name}/{name}")
        for name, part in (("fit", targets.fit), ("validation", targets.validation))
    )
    return replace(targets, fit=fit, validation=validation)


def halves(battery: PromptSet) -> tuple[PromptSet, PromptSet]:
    """Return every second item of each category, to choose by, and the rest, to report on."""
    seen: Counter[str] = Counter()
    parts: tuple[list[Prompt], list[Prompt]] = ([], [])
    for item in battery:
        parts[seen[item.category] % 2].append(item)
        seen[item.category] += 1
    names = (f"{battery.name}/validation", f"{battery.name}/heldout")
    first, second = (PromptSet(n, tuple(p)) for n, p in zip(names, parts, strict=True))
    return first, second


def none_of(prompts_: PromptSet) -> PromptSet:
    """Return a set without its prompts."""
    return replace(prompts_, prompts=())


def _parted(chosen: PromptSet, categories: Sequence[str]) -> tuple[PromptSet, PromptSet]:
    """Return the prompts outside some categories, and those in them."""
    inside = tuple(p for p in chosen if p.category in categories)
    outside = tuple(p for p in chosen if p.category not in categories)
    name = chosen.name.replace("target", "retained", 1)
    return replace(chosen, prompts=outside), PromptSet(name, inside)


def _without(targets: Splits, categories: Sequence[str], seed: int) -> tuple[Splits, Splits | None]:
    """Take categories out of the targets; raises for unknown ones and when too little is left."""
    if not categories:
        return targets, None
    parts = (targets.fit, targets.validation, targets.heldout)
    known = {p.category for part in parts for p in part} - {""}
    if not known:
        raise UsageError(
            "--retain names categories, and these targets have none.",
            "Give them a column category: .jsonl, .csv or .parquet.",
        )
    for name in categories:
        if name not in known:
            raise UnknownName("category to retain", name, sorted(known))
    pairs = [_parted(part, categories) for part in parts]
    left, kept = Splits(*(p[0] for p in pairs)), [Splits(*(p[1] for p in pairs))]
    fitted = {p.category for p in targets.fit}
    for name in categories:
        if name not in fitted:
            # A category that was held out as a whole has to be divided now.
            mine = PromptSet(
                f"retained {name}", tuple(p for p in kept[0].heldout if p.category == name)
            )
            free = replace(mine, prompts=tuple(replace(p, split="") for p in mine))
            kept[0] = replace(kept[0], heldout=_parted(kept[0].heldout, [name])[0])
            kept.append(split(free, seed=seed))
    retained = Splits(*(_joined([getattr(k, part) for k in kept]) for part in SPLIT_NAMES))
    if len(left.fit) < 8 or len(left.validation) < 4 or not len(left.heldout):
        raise DataError(
            f"--retain leaves {len(left.fit)} targets to fit and {len(left.validation)} to choose on; "
            "8 and 4 are needed.",
            "Retain fewer categories.",
        )
    return left, retained


def _joined(sets: Sequence[PromptSet]) -> PromptSet:
    return replace(sets[0], prompts=tuple(p for one in sets for p in one))


def _separate(reporting: PromptSet, selecting: PromptSet) -> PromptSet:
    check_disjoint(reporting, selecting)
    if not len(reporting):
        raise DataError(f"{reporting.name} holds no prompts.")
    return reporting
