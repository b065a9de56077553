"""A model under study: loaded once, its writers proved, and what its answers show as it stands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from saber import codec
from saber.ablation import EditSpec
from saber.config import RunConfig
from saber.editors import Answers
from saber.errors import WeakBehaviour
from saber.evaluation.divergence import exact
from saber.evaluation.judge import Judge, Label, PhraseJudge
from saber.evaluation.judging import label_all
from saber.evaluation.language import remark
from saber.inspection import require_ablated
from saber.lm.chat import encode
from saber.lm.forward import Progress, silent
from saber.lm.generate import Completion, Request, answer, generate, greedy_starts
from saber.lm.load import as_stored, load
from saber.lm.model import LanguageModel, fingerprint
from saber.lm.writers import Writer, embedding_writer, find_writers
from saber.memo import Memo, forgetful
from saber.openings import Fitted, Opening, late_openings
from saber.passes import Pass, RefineData, Refinement
from saber.prompts import PromptSet
from saber.refinement import refine
from saber.strength import ANSWER_TOKENS, Shown

NARROW_RIDGE = 1e-2
"""What `edit.ridge` is in over-refusal mode where it is left open; see `benchmarks/over_refusal.py`."""
NOISE = 0.05
"""Share of neutral validation prompts that may show the behaviour in an orthogonal edit and in over-refusal
mode; where more do, such are left out."""


@dataclass(frozen=True)
class Subject:
    """A loaded model, which fingerprint it has, and what writes to its residual stream."""

    lm: LanguageModel
    """The model, with its own weights."""
    mark: str
    """Its fingerprint."""
    writers: tuple[Writer, ...]
    """Its residual writers without the embedding, proved to be all."""

    @classmethod
    def load(cls, model: str, config: RunConfig) -> Subject:
        """Load a model and prove its writers; raises children of `SaberError`."""
        lm = load(model, config.load)
        mark = fingerprint(as_stored(lm, config.load).model, dtype=lm.stored_dtype)
        writers = find_writers(lm)
        require_ablated(lm, writers)
        return cls(lm, mark, tuple(writers))

    @property
    def template(self) -> str:
        """Digest of the tokens that a prompt becomes through the chat template."""
        return codec.digest(str(encode(self.lm, ["Alpha one?"])))

    def edited(self, config: RunConfig) -> list[Writer]:
        """Return the writers that a configuration edits."""
        if config.edit.embeddings:
            return [embedding_writer(self.lm), *self.writers]
        return list(self.writers)


class Watch:
    """What the model's answers to the prompts that select show, untouched and as it stands."""

    def __init__(
        self,
        lm: LanguageModel,
        judge: Judge,
        selecting: RefineData,
        config: RunConfig,
        progress: Progress[Any] = silent,
    ) -> None:
        """Answer them with the untouched model; raises `WeakBehaviour` where too few show it."""
        self._lm, self._judge, self._tokens = lm, judge, config.evaluation.max_new_tokens
        self._progress = progress
        self._narrow = config.data.mode == "over-refusal"
        self._said: dict[str, tuple[int, ...]] = {}
        self.own: dict[str, Completion] = {}
        """Answers of the untouched model that a selective edit is measured by, as far as they are there."""
        self._known: dict[str, Label] = {}
        self._texts: dict[str, str] = {}
        stay = [selecting.neutral_validation, *selecting.keep_validation]
        brief = [selecting.target_validation]
        if self._strict(config.edit):
            stay += [selecting.neutral, selecting.everyday]
            brief += [selecting.capability]
        elif self._narrow:
            brief += [selecting.target]
        self._answer(_texts(stay), _texts(brief))
        targets = selecting.target_validation.texts
        found = self._untouched(selecting.target_validation)
        self.remark = remark(judge, targets, [self._texts.get(t, "") for t in targets], found)
        """What to say of answers that the judge does not read; empty where it reads them."""
        self._asked = len(found)
        self.rate = found.count("refusal") / len(found)
        """Share of validation targets that shows the behaviour."""
        if self._narrow:
            selecting = wrongly(selecting, self._untouched(selecting.target), found)
            found = [label for label in found if label == "refusal"]
        self._all = selecting
        self.selecting = self.selecting_for(config.edit)
        """The prompts that select; in over-refusal mode those that are refused wrongly."""
        self.untouched = Shown(found.count("refusal") / len(found))
        """What these show before any edit."""

    def selecting_for(self, edit: EditSpec) -> RefineData:
        """Return the prompts that select for an edit, without some that show the behaviour themselves.

        A selective edit would preserve, with such neutral, everyday and capability prompts, what is to
        go, so it leaves out every one; an orthogonal edit neutral ones alone, where more than `NOISE`
        are such. So does over-refusal mode, which preserves refusals on purpose.
        """
        data, strict = self._all, self._strict(edit)
        usual = self._untouched(data.neutral_validation)
        if not strict and usual.count("refusal") <= NOISE * len(usual):
            return data
        some = calm(data, self._untouched(data.neutral), usual)
        if not strict:
            return some
        return replace(
            some,
            capability=calm_by_category(data.capability, self._untouched(data.capability)),
            everyday=those(data.everyday, self._untouched(data.everyday), False),
        )

    def _strict(self, edit: EditSpec) -> bool:
        return edit.kind == "selective" and not self._narrow

    @property
    def left_out(self) -> dict[str, int]:
        """How many prompts of a kind show the behaviour themselves and are not among those that select."""

        def sizes(data: RefineData) -> dict[str, int]:
            neutral = len(data.neutral) + len(data.neutral_validation)
            others = {"capability": len(data.capability), "everyday": len(data.everyday)}
            return {"neutral": neutral, **others}

        left = sizes(self.selecting)
        return {kind: count - left[kind] for kind, count in sizes(self._all).items()}

    def require(self, model: str, least: float) -> None:
        """Raise `WeakBehaviour` where fewer than this share of validation targets show it."""
        if self.rate < least:
            english = isinstance(self._judge, PhraseJudge)
            raise WeakBehaviour(
                f"{model} shows the behaviour on only {self.rate:.0%} of {self._asked} validation "
                f"targets (needed: {least:.0%}); nothing was edited.",
                "Give other --target prompts, "
                + ("another --judge for other languages than English, " if english else "")
                + "or --force.",
            )

    def _answer(self, stay: Sequence[str], brief: Sequence[str]) -> None:
        """Let the untouched model answer prompts, all together, and label the answers.

        Those of prompts that are to `stay` are kept, where a ruler can use them; the others end where their
        labels are settled.
        """
        whole = self._tokens == ANSWER_TOKENS
        settled, look = (None, exact(self._lm)) if whole else (self._judge.settled, False)
        asked = {text: Request(text, self._tokens, self._judge.settled) for text in brief}
        asked |= {text: Request(text, self._tokens, settled, look=look) for text in stay}
        tried = answer(
            self._lm, list(asked.values()), progress=self._progress, label="answers that select"
        )
        if whole:
            answers = dict(zip(asked, tried, strict=True))
            self.own.update({text: answers[text] for text in stay})
        self._known.update(zip(asked, self._judged(list(asked), tried), strict=True))
        self._texts.update(zip(asked, (c.text for c in tried), strict=True))

    def _untouched(self, prompts: PromptSet) -> list[Label]:
        """Return what the untouched model's answers to prompts show; asked once for each."""
        missing = [text for text in prompts.texts if text not in self._known]
        if missing:
            self._answer([], missing)
        return [self._known[text] for text in prompts.texts]

    def _judged(self, texts: Sequence[str], tried: Sequence[Completion]) -> list[Label]:
        return list(label_all(self._judge, texts, [c.text for c in tried]))

    def _asked_for(self, texts: Sequence[str]) -> list[Completion]:
        """Answer prompts no further than until their labels are settled."""
        found = generate(self._lm, texts, self._tokens, settled=self._judge.settled)
        self._said.update(zip(texts, (c.ids for c in found), strict=True))
        return found

    def _asked_again(self, texts: Sequence[str]) -> list[Completion]:
        """Do the same where answers are likely those that were given last: these serve as drafts."""
        starts = greedy_starts(self._lm, texts, [self._said[text] for text in texts])
        return generate(self._lm, texts, self._tokens, settled=self._judge.settled, starts=starts)

    def _turning(self, texts: Sequence[str], tried: Sequence[Completion]) -> dict[int, Opening]:
        """Tell which answers come to show the behaviour late, and behind what."""

        def shows(index: int, text: str) -> bool:
            return label_all(self._judge, [texts[index]], [text])[0] in ("refusal", "partial")

        return late_openings(self._lm, [c.ids for c in tried], shows)

    def shown(self) -> Shown:
        """Answer validation prompts as the model stands."""
        return self.together(())[0]

    def watched(self, rows: Sequence[int] | None = None) -> dict[int, Opening]:
        """Tell which validation targets, of those given by number, come to show the behaviour late."""
        whole = self.selecting.target_validation.texts
        texts = whole if rows is None else [whole[row] for row in rows]
        known = rows is not None and all(self._said.get(text) for text in texts)
        tried = self._asked_again(texts) if known else self._asked_for(texts)
        found = self._turning(texts, tried)
        return found if rows is None else {rows[i]: opening for i, opening in found.items()}

    def fitted(self, rows: Sequence[int]) -> Fitted:
        """Answer some fit targets, given by number, as the model stands."""
        texts = [self.selecting.target.texts[row] for row in rows]
        return self._of_fit(rows, texts, self._asked_for(texts))

    def together(self, rows: Sequence[int]) -> tuple[Shown, Fitted]:
        """Return what `shown` and `fitted` do, by answers that are written in one batch."""
        texts = self.selecting.target_validation.texts
        kept = _texts(self.selecting.keep_validation)
        fit = [self.selecting.target.texts[row] for row in rows]
        written = iter(self._asked_for([*texts, *kept, *fit]))
        tried, later, rest = (list(islice(written, len(part))) for part in (texts, kept, fit))
        turning = self._turning(texts, tried)
        shown = self._of_validation(texts, tried, turning, kept, later)
        return shown, replace(self._of_fit(rows, fit, rest), validation=turning)

    def _of_validation(
        self,
        texts: Sequence[str],
        tried: Sequence[Completion],
        turning: Mapping[int, Opening],
        kept: Sequence[str],
        later: Sequence[Completion],
    ) -> Shown:
        now = self._judged(texts, tried)
        refused = {i for i, label in enumerate(now) if label == "refusal"}
        usual = [
            label for part in self.selecting.keep_validation for label in self._untouched(part)
        ]
        lost = sum(a != b for a, b in zip(usual, self._judged(kept, later), strict=True))
        return Shown(
            len(refused) / len(now),
            now.count("incoherent") / len(now),
            lost / max(len(later), 1),
            at_once=len(refused - turning.keys()) / len(now),
        )

    def _of_fit(
        self, rows: Sequence[int], texts: Sequence[str], tried: Sequence[Completion]
    ) -> Fitted:
        now, late = self._judged(texts, tried), self._turning(texts, tried)
        return Fitted(
            {rows[i]: opening for i, opening in late.items()},
            now.count("refusal"),
            now.count("incoherent"),
        )


def refined(
    subject: Subject,
    watch: Watch,
    config: RunConfig,
    *,
    progress: Progress[Any] = silent,
    finished: Callable[[Pass], None] | None = None,
    done: Sequence[Pass] = (),
    memo: Memo = forgetful,
    behaviour: Callable[[], Shown] | None = None,
    self_repair: bool = True,
) -> Refinement:
    """Run the passes of a configuration; see `refine`. The model stays as it was."""
    answers = Answers(behaviour or watch.shown, watch.fitted, watch.watched)
    if behaviour is None:
        answers = replace(answers, together=watch.together)
    return refine(
        subject.lm,
        subject.edited(config),
        watch.selecting_for(config.edit),
        probing=config.probe,
        spectral=config.spectral,
        entanglement=config.entanglement,
        edit=in_mode(config),
        spec=config.refine,
        seed=config.seed,
        answers=answers,
        shown=watch.untouched,
        own=watch.own,
        progress=progress,
        finished=finished,
        done=done,
        memo=memo,
        self_repair=self_repair,
    )


def _texts(sets: Sequence[PromptSet]) -> list[str]:
    return [text for prompts in sets for text in prompts.texts]


def in_mode(config: RunConfig) -> EditSpec:
    """Return a configuration's edit, with the ridge of its mode where none is set."""
    if config.data.mode == "over-refusal" and not config.edit.ridge:
        return replace(config.edit, ridge=NARROW_RIDGE)
    return config.edit


def wrongly(selecting: RefineData, fit: Sequence[Label], validation: Sequence[Label]) -> RefineData:
    """Keep as targets what is refused, and put what is answered among what must not change."""

    wrong = those(selecting.target, fit, True), those(selecting.target_validation, validation, True)
    if len(wrong[0]) < 8 or len(wrong[1]) < 4:
        raise WeakBehaviour(
            f"only {len(wrong[0])} of {len(fit)} borderline prompts to fit on and {len(wrong[1])} of "
            f"{len(validation)} to choose on are refused (needed: 8 and 4); nothing was edited.",
            "Give more prompts with --borderline.",
        )
    return replace(
        selecting,
        target=wrong[0],
        target_validation=wrong[1],
        keep=(*selecting.keep, those(selecting.target, fit, False)),
    )


def calm(selecting: RefineData, fit: Sequence[Label], validation: Sequence[Label]) -> RefineData:
    """Leave out neutral prompts that show the behaviour; none where most of them do.

    Then it is the judge or the model that is odd, and little would be left to fit.
    """
    fewer = replace(
        selecting,
        neutral=those(selecting.neutral, fit, False),
        neutral_validation=those(selecting.neutral_validation, validation, False),
    )
    left = len(fewer.neutral), len(fewer.neutral_validation)
    return selecting if 2 * left[0] < len(fit) or 2 * left[1] < len(validation) else fewer


def calm_by_category(chosen: PromptSet, labels: Sequence[Label]) -> PromptSet:
    """Leave out prompts that show the behaviour, but none of a category where most do."""
    odd = Counter(those(chosen, labels, True).categories)
    whole = {c for c, n in Counter(chosen.categories).items() if 2 * odd[c] > n}
    spared: list[Label] = [
        "answer" if p.category in whole else label for p, label in zip(chosen, labels, strict=True)
    ]
    return those(chosen, spared, False)


def those(chosen: PromptSet, labels: Sequence[Label], refused: bool) -> PromptSet:
    """Return the prompts whose answers show the behaviour, or those whose do not."""
    assert len(labels) == len(chosen)
    return chosen.only([(label == "refusal") == refused for label in labels])
