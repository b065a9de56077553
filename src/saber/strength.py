"""Stage 4, how strong: a line search over lambda on validation prompts, confirmed by answers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from saber.ablation import EditPlan, applied
from saber.errors import NonFinite
from saber.evaluation.divergence import Reference, diverge, own_answers
from saber.evaluation.readout import Readout
from saber.lm.forward import Progress, silent
from saber.lm.model import LanguageModel
from saber.probing import ProbeSpec, probe
from saber.prompts import PromptSet

LAMBDAS = (1000.0, 300.0, 100.0, 30.0, 10.0, 3.0, 1.0)
"""What is tried where lambda is left open, from the weakest edit to the strongest."""
ANSWER_TOKENS = 32
"""Length of the untouched model's answers along which divergence is measured, tokens."""
MARGIN = 0.01
"""How much more likely than a neutral prompt's answer a target's may be to open with the behaviour."""
CLEAR = 0.1
"""How much more likely that has to be before an edit for openings to tell anything of it."""
LATE_LAMBDAS = (300.0, 100.0, 30.0)
"""The same for an edit of late behaviour, each confirmed by answers: a late turn has no one token."""
WORTH = 0.06
"""What share of all answers a stronger edit has to set right for a still stronger one to be tried: eight
of the usual 128, two of 32 in late passes. Less is no reason to move preserved inputs more."""
GAIN = 0.5
"""What share of the answers amiss before it an edit has to set right for that rule to hold: up to there edits
may simply be too weak."""
BOOSTS = (1.5, 2.0, 3.0)
"""How much more than the fit asks for is taken off, in turn, where behaviour is left that shows at once."""


@dataclass(frozen=True)
class Shown:
    """What answers to validation targets show, by judged generation."""

    rate: float
    """Share that shows the behaviour, 0 to 1."""
    incoherent: float = 0.0
    """Share that is incoherent."""
    lost: float = 0.0
    """Share of answers to prompts of keep sets that have another label than before."""

    late: float = 0.0
    """Share of fit targets whose answers show it late, where these were asked."""
    at_once: float | None = None
    """Share that shows it before any sentence that does not; the rest of `rate` comes late. None where these
    were not told apart."""

    pooled: float | None = None
    """Share of all targets that select, to validate and to fit, that shows it; None where the latter were not
    asked."""
    pooled_incoherent: float | None = None
    """Share of the same that is incoherent."""

    def with_fit(self, asked: int, showing: int, incoherent: int, more: int) -> Shown:
        """Return the same of `asked` validation targets with `more` fit targets, of which so many show it.

        These are fitted at the first token alone: what comes late, and what is incoherent, is not.
        """
        total = asked + more
        return replace(
            self,
            pooled=(round(self.rate * asked) + showing) / total,
            pooled_incoherent=(round(self.incoherent * asked) + incoherent) / total,
        )

    def on_validation(self) -> Shown:
        """Return the same without fit targets."""
        return replace(self, pooled=None, pooled_incoherent=None)

    @property
    def left(self) -> float:
        """What an edit is to bring down to the aim: the behaviour, and changed kept answers."""
        return (self.rate + self.late if self.pooled is None else self.pooled) + self.lost

    @property
    def amiss(self) -> float:
        """By what edits are compared: all answers that are not coherent ones, and changed kept ones."""
        incoherent = self.pooled_incoherent
        return round(self.left + (self.incoherent if incoherent is None else incoherent), 9)


@dataclass(frozen=True)
class Trial:
    """One strength, as validation prompts see it."""

    lambda_: float
    """Weight of preserved inputs, before what each layer makes of it."""
    opening: float | None = None
    """Mean probability that an answer to a target opens with the behaviour; None where not measured."""
    log_odds: float | None = None
    """Mean log-odds of the same, nats."""
    kl_first: float | None = None
    """KL from the untouched model at the first answer token of neutral and kept prompts, nats; None where
    it was not measured: nothing is chosen by it."""
    kl_sequence: float | None = None
    """The same as a mean along its own answers."""
    shown: Shown | None = None
    """What judged answers to targets show, where they were generated."""
    chosen: bool = False
    """Whether the pass ended with it."""
    boost: float = 1.0
    """Factor on what the fit takes off (on every alpha)."""
    failed: str = ""
    """Why it could not be measured, such as an overflow; empty where it was."""


class Ruler:
    """Measures plans on validation prompts against the model as it was when the ruler was made."""

    def __init__(
        self,
        lm: LanguageModel,
        target: PromptSet,
        neutral: PromptSet,
        unchanged: Sequence[PromptSet],
        readout: Readout,
        progress: Progress[Any] = silent,
        reference: Reference | None = None,
        first: Tensor | None = None,
    ) -> None:
        """Let the model answer `neutral` and `unchanged`, unless its `reference` answers are there.

        `first` holds log-probabilities of the first tokens that it would give to neutral prompts, where these
        were probed already.
        """
        self._lm, self._target, self._readout, self._progress = lm, target, readout, progress
        texts = [t for p in (neutral, *unchanged) for t in p.texts]
        self._reference = reference or own_answers(lm, texts, ANSWER_TOKENS, progress=progress)
        self._opening: Sequence[int] = ()
        first = self._first(neutral) if first is None else first
        self.usual = float(readout.log_odds(first).sigmoid().mean())
        """Mean probability that an answer to a neutral prompt opens with the behaviour."""

    def _first(self, prompts: PromptSet) -> Tensor:
        found = probe(self._lm, prompts, ProbeSpec(), first_token=True, opening=self._opening)
        assert found.first_token is not None
        return found.first_token

    def behind(self, opening: Sequence[int], readout: Readout) -> Ruler:
        """Return a ruler that looks at what follows a forced start of the answer.

        Divergence stays that from the model as it was when this ruler was made. There is no `usual` behind
        a start: searches there are direct.
        """
        other = copy.copy(self)
        other._opening, other._readout, other.usual = opening, readout, math.nan
        return other

    def openings(self, lambda_: float = 0.0, first: Tensor | None = None) -> Trial:
        """Measure, of the model as it stands, how answers to targets open (`lambda_` is taken down).

        `first` holds log-probabilities of their first tokens, where it was probed already.
        """
        odds = self._readout.log_odds(self._first(self._target) if first is None else first)
        return Trial(lambda_, float(odds.sigmoid().mean()), float(odds.mean()))

    def tells(self, first: Tensor | None = None) -> bool:
        """Whether, as the model stands, targets' answers open with the behaviour clearly more often."""
        opening = self.openings(first=first).opening
        return opening is not None and opening > self.usual + CLEAR

    def cost(self, trial: Trial) -> Trial:
        """Measure how far answers that should stay have moved, as the model stands; raises `NonFinite`."""
        found = diverge(self._lm, self._reference)
        first, sequence = float(found.first_token.mean()), float(found.sequence.mean())
        if not math.isfinite(first + sequence):
            raise NonFinite("the edited model's divergence")
        return replace(trial, kl_first=first, kl_sequence=sequence)

    def __call__(self, plan: EditPlan, lambda_: float = 0.0) -> Trial:
        """Measure both of a plan, by forward passes alone."""
        with applied(self._lm.model, plan):
            return self.cost(self.openings(lambda_))


def search(
    lm: LanguageModel,
    make: Callable[[float, float], EditPlan],
    ruler: Ruler,
    behaviour: Callable[[], Shown],
    *,
    lambdas: Sequence[float] = LAMBDAS,
    aim: float = 0.1,
    direct: bool = False,
    before: float | None = None,
    boosts: Sequence[float] = (),
    mended: Callable[[], int] | None = None,
    progress: Progress[Any] = silent,
) -> tuple[EditPlan, tuple[Trial, ...]] | None:
    """Return the weakest edit `make(lambda, boost)` that does, and what was tried.

    From the weakest on, the first lambda at which answers to targets open with the behaviour as
    rarely as those to neutral prompts do (within `MARGIN`) is confirmed by judged answers, or the first of
    all where the search is `direct`. If more than `aim` of these are left as they should not be, a
    stronger edit is tried, and then another as long as each sets some right (`WORTH`): where both kinds of
    answers open with like words, openings tell little. Where the share amiss `before` is given, that rule
    holds only once an edit has set much of it right (`GAIN`). Of those confirmed, the one with fewest answers
    amiss is taken, the weaker of equals. Where more than `aim` shows at once with it, its lambda is kept and
    more is taken off than the fit asks for, by one of the `boosts` after the other as long as each sets an
    answer to a validation target right and changes no more kept ones: what other writers make up for is gone
    then too.

    Where `mended` tells how many of a few answers an edit sets right, one that sets no more right than those
    before it is not confirmed, and divergence is measured of what is taken alone; None is returned where no
    edit sets any right, or the model overflows with that one.

    A strength at which the model overflows is noted and ends the search; raises `NonFinite` where none was
    confirmed before it.
    """
    trials: list[Trial] = []
    confirmed: list[int] = []
    right = 0

    def amiss(index: int) -> float:
        shown = trials[index].shown
        assert shown is not None
        return shown.amiss

    def weak() -> bool:
        """Whether no edit has done much so far, for better or worse."""
        if before is None:
            return False
        return (1 - GAIN) * before < min(map(amiss, confirmed)) < before + WORTH

    def tried(lambda_: float, boost: float = 1.0, *, sure: bool = False) -> Shown | None:
        """Try an edit; ask for answers where `sure`, or where openings are rare enough."""
        nonlocal right
        trial = Trial(lambda_, boost=boost)
        try:
            with applied(lm.model, make(lambda_, boost)):
                now = right + 1 if mended is None else mended()
                if now > right:
                    right = now
                    trial = replace(ruler.openings(lambda_), boost=boost)
                    assert trial.opening is not None
                    if sure or trial.opening <= ruler.usual + MARGIN:
                        trial = trial if mended else ruler.cost(trial)
                        trial = replace(trial, shown=behaviour())
                        confirmed.append(len(trials))
        except NonFinite as error:
            if not confirmed and mended is None:
                raise
            trial = Trial(lambda_, boost=boost, failed=error.problem)
        trials.append(trial)
        return trial.shown

    for lambda_ in progress(lambdas, "line search", len(lambdas)):
        shown = tried(lambda_, sure=direct or bool(confirmed) or lambda_ == lambdas[-1])
        if trials[-1].failed or (shown is not None and shown.left <= aim):
            break
        stalls = (
            len(confirmed) > 1 and amiss(confirmed[-1]) > min(map(amiss, confirmed[:-1])) - WORTH
        )
        if stalls and not weak():
            break
    if not confirmed:
        return None
    best = min(confirmed, key=amiss)
    for boost in progress(boosts, "taking more off", len(boosts)):
        left = trials[best].shown
        if trials[-1].failed or left is None or (left.at_once or 0) <= aim:
            break
        found = tried(trials[best].lambda_, boost, sure=True)
        # Fit targets are fitted where this shows: those that were not tell. Kept answers are not for sale.
        if found is None or found.lost > left.lost:
            break
        if found.on_validation().amiss >= left.on_validation().amiss:
            break
        best = confirmed[-1]
    chosen, plan = trials[best], make(trials[best].lambda_, trials[best].boost)
    if mended:
        try:
            with applied(lm.model, plan):
                chosen = ruler.cost(chosen)
        except NonFinite:
            return None
    trials[best] = replace(chosen, chosen=True)
    return plan, tuple(trials)
