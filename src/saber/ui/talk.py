"""A run's model to talk to, with any share of its edit."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from queue import Queue
from typing import Any

from saber.ablation import EditPlan
from saber.config import RunConfig
from saber.conversation import NOTHING, OnText, Partner, Said, answer
from saber.errors import SaberError, UsageError
from saber.evaluation.judge import Judge, Label
from saber.evaluation.judging import JudgeSpec, label_all, make_judge
from saber.lm.load import LoadSpec
from saber.lm.model import LanguageModel
from saber.report.reading import Run, behaviour, dig

WHO = ("untouched", "edited")
"""Both sides of a conversation."""
AT_HAND = ("phrases", "regex")
"""Judges that need no other model and send nothing anywhere."""


@dataclass(frozen=True)
class Answer:
    """What one of both said."""

    text: str
    """The whole of it."""
    label: Label | None
    """What the run's judge says that it shows; None where that judge is not at hand."""


class Talk:
    """A run's model, loaded when it is first spoken to.

    It answers one message at a time, whoever asks, as edits are made in place.
    """

    def __init__(self, partner: Partner, spec: LoadSpec, judge: Judge | None = None) -> None:
        if partner.plan is None:
            raise UsageError(f"{partner.name} is no run folder.", "Give what saber run wrote.")
        self.partner, self.spec, self.judge = partner, spec, judge
        self._plan: EditPlan = partner.plan
        self._lm: LanguageModel | None = None
        self._turn = threading.Lock()
        self._untouched: tuple[tuple[Any, ...], str] | None = None

    def answers(
        self,
        prompt: str,
        share: float,
        limit: int,
        said: Mapping[str, Said] = NOTHING,
        on_text: OnText | None = None,
    ) -> dict[str, Answer]:
        """Return what both say to a message, the edited one with a share of the edit (1: as in the run).

        `said` is what each has heard and answered before, `limit` the most tokens of an answer. Raises what
        loading the model raises. What the untouched model said last is not asked for again. `on_text` hears
        of answers on their way.
        """
        with self._turn:
            if self._lm is None:
                self._lm = self.partner.loaded(self.spec)
            asked = (prompt, limit, said.get("untouched", ()))
            known = self._untouched if self._untouched and self._untouched[0] == asked else None
            if known is not None and on_text is not None:
                on_text("untouched", known[1])
            plan = self._plan if share == 1 else self._plan.scaled(share)
            texts = answer(
                self._lm, plan, prompt, limit, compare=known is None, said=said, on_text=on_text
            )
            if known is not None:
                texts["untouched"] = known[1]
            self._untouched = (asked, texts["untouched"])
        return {who: Answer(texts[who], self._label(prompt, texts[who])) for who in WHO}

    def _label(self, prompt: str, text: str) -> Label | None:
        return label_all(self.judge, [prompt], [text])[0] if self.judge else None


def judge_of(run: Run) -> Judge | None:
    """Return the judge of a run, where it is at hand."""
    name = str(dig(run, "config", "evaluation", "judge") or RunConfig().evaluation.judge)
    if name not in AT_HAND:
        return None
    try:
        pattern = str(dig(run, "config", "judging", "pattern") or "")
        return make_judge(name, JudgeSpec(pattern=pattern), behaviour(run))
    except SaberError:
        # Patterns may have been read off a file that is not here.
        return None


def coming(
    talk: Talk, prompt: str, share: float, limit: int, said: Mapping[str, Said] = NOTHING
) -> Iterator[dict[str, Answer]]:
    """Yield what there is of both answers every few tokens, without labels; last what `Talk.answers` returns.

    Raises what that raises.
    """
    parts: Queue[tuple[str, str] | dict[str, Answer] | Exception] = Queue()

    def work() -> None:
        try:
            answers = talk.answers(
                prompt, share, limit, said, lambda who, text: parts.put((who, text))
            )
            parts.put(answers)
        except Exception as error:  # noqa: BLE001 - raised again where it is waited for
            parts.put(error)

    threading.Thread(target=work, daemon=True).start()
    so_far: dict[str, Answer] = {}
    while isinstance(part := parts.get(), tuple):
        who, text = part
        so_far = {**so_far, who: Answer(text, None)}
        yield so_far
    if isinstance(part, Exception):
        raise part
    yield part
