"""The error family: each error says what is wrong and how to mend it."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path


class SaberError(Exception):
    """A failure that has one clear line for the user and, where there is one, a remedy."""

    exit_code = 1

    def __init__(self, problem: str, remedy: str = "") -> None:
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{problem} {remedy}".strip())


class UsageError(SaberError):
    """The command, configuration or file that the user gave cannot be used."""

    exit_code = 2


class UnknownName(UsageError):
    """A name that is not one of the known ones; suggests the nearest."""

    def __init__(self, what: str, name: str, known: Sequence[str]) -> None:
        near = get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(sorted(known))}."
        super().__init__(f"unknown {what} {name!r}.", hint)


class DataError(UsageError):
    """A prompt set that is missing, malformed, too small or contradictory."""


class ModelError(UsageError):
    """A model that cannot be found, read, or used for this work."""


class OutputError(UsageError):
    """An output folder that cannot or must not be written."""


class UnprovenWriter(SaberError):
    """The residual writers found in a model fail one of the two completeness laws."""

    def __init__(
        self,
        law: str,
        layer: int,
        residual: float,
        limit: float,
        module: str = "",
        renormalised: bool = False,
    ) -> None:
        self.law, self.layer, self.residual, self.by_design = law, layer, residual, renormalised
        reason = "the residual writers found are not all of them"
        if law == "ablated":
            reason = (
                "what the writers write is changed on its way to the stream by more than a gain"
            )
        if renormalised:
            reason = (
                "a norm stands on the residual stream itself, so no edit of writers can keep a "
                "direction out of it"
            )
        super().__init__(
            f"{reason}: the {law} law fails at layer {layer}"
            f"{f' ({module}.{layer})' if module else ''} (residual {residual:.2e}, limit {limit:.0e}).",
            "SABER does not edit what it cannot prove. Pass --allow-unproven to edit the writers that "
            "were found, or --layers-path if these are not the decoder's layers.",
        )


class NonFinite(SaberError):
    """Activations or weights hold NaN or infinity."""

    def __init__(self, where: str) -> None:
        super().__init__(
            f"NaN or infinity in {where}.",
            "Try --dtype float32; if it stays, the checkpoint itself is damaged.",
        )


class WeakBehaviour(SaberError):
    """The model hardly shows the behaviour, so there is nothing to remove."""

    exit_code = 3


class NoGain(SaberError):
    """The edit did not bring the behaviour down on validation targets."""

    exit_code = 3

    def __init__(self, before: float, after: float, count: int, selective: bool = True) -> None:
        ways = "a smaller --lambda" if selective else "a larger --top-k or --alpha"
        super().__init__(
            f"the edit did not help: {before:.0%} of {count} validation targets showed the behaviour "
            f"before and {after:.0%} after it; the model is left as it was.",
            f"Give more or other --target and --neutral prompts, or {ways}.",
        )


class NoEdit(SaberError):
    """No direction was taken out, though the behaviour is there."""

    exit_code = 3

    def __init__(self, reason: str, rate: float, count: int) -> None:
        super().__init__(
            f"nothing was edited: {reason}; {rate:.0%} of {count} validation targets show the behaviour, and "
            "the model is left as it was.",
            "Give more or other --target and --neutral prompts, or look at what leaves directions out: "
            "refine.max_q, edit.skip_below, spectral.depth_low and spectral.depth_high.",
        )


class JudgeFailed(SaberError):
    """A judge outside this program could not be asked, or gave no usable reply."""


class HubError(SaberError):
    """The hub could not be reached, refused what was asked, or does not hold what was sent."""


class PushInterrupted(SaberError):
    """A push was interrupted by the user."""

    exit_code = 130


class ExportInterrupted(KeyboardInterrupt):
    """An export was interrupted by the user; an interrupt as any other, which says what there is now."""

    def __init__(self, run: Path, left: Path | None, command: str) -> None:
        kept = f"{left} is left of it, to be removed" if left else "Nothing half-written was left"
        super().__init__(
            f"interrupted. {kept}, and the run in {run} is finished and safe there. "
            f"Export it again with: {command}"
        )


class MissingExtra(UsageError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"this needs the package {package!r}, which is not installed.",
            f"In a checkout run: pip install '.[{extra}]' (elsewhere: pip install 'saber-llm[{extra}]').",
        )


def few(names: Sequence[str]) -> str:
    """Return the first three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"
