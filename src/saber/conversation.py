"""Conversations with a model, or with a run's model before and after the edit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from saber.ablation import EditPlan, applied
from saber.checkpoint.plan_on_disk import cached_commit, commit_of
from saber.checkpoint.runs import RUN, base_of, read_plan, read_record
from saber.errors import UsageError
from saber.lm.chat import encode
from saber.lm.generate import generate
from saber.lm.load import LoadSpec, as_stored, load
from saber.lm.marks import THOUGHT_TOKENS, behind
from saber.lm.model import LanguageModel, is_of
from saber.report.reading import dig

Said = tuple[tuple[str, str], ...]
"""What was said in a conversation: (role, text), a user's message and its answer in turn."""
NOTHING: Mapping[str, Said] = MappingProxyType({})
OnText = Callable[[str, str], None]
"""Is told of an answer on its way: who gives it, and what there is of it."""
UNREADABLE = "\N{REPLACEMENT CHARACTER}"
UNSAID = "\u2026"
"""What is remembered of an answer that its thought left no room for; templates refuse empty ones."""


def usual_limit(spec: LoadSpec) -> int:
    """Return the most tokens of an answer where no number is given; thoughts take more."""
    return THOUGHT_TOKENS if spec.thinking else 256


@dataclass(frozen=True)
class Partner:
    """Whom to talk to, before it is loaded."""

    name: str
    """The model: hub id, folder, file, or demo."""
    plan: EditPlan | None = None
    """A run's edit of it."""
    mark: str | None = None
    """The fingerprint of the model that the run was made on."""
    system: str = ""
    """The run's system prompt."""
    dequantize: bool = False
    """Whether the run took quantised weights as plain ones."""
    commit: str = ""
    """The commit of a hub model that the run was made on."""
    revision: str = ""
    """The same where the cache has it, so that it is loaded."""

    @classmethod
    def of(cls, name: str, base: str = "") -> Partner:
        """Return the model of that name, or a run folder's with its edit.

        `base` is where a run's model lies, if not where the run says. Raises `DataError` where the run is
        damaged, `ModelError` where its model is not here.
        """
        folder = Path(name)
        if not (folder / RUN).is_file():
            return cls(name)
        record = read_record(folder)
        model = record["model"]
        system = dig(record, "config", "load", "system") or ""
        unpack = bool(dig(record, "config", "load", "dequantize"))
        plan, its = read_plan(folder, record), base or base_of(folder, model)
        return cls(
            its,
            plan,
            model["fingerprint"],
            system,
            unpack,
            commit_of(record, its) or "",
            cached_commit(record, its),
        )

    def loaded(self, spec: LoadSpec) -> LanguageModel:
        """Load the model, with the run's system prompt and revision where `spec` has none.

        Raises what `load` does, and `UsageError` where it is not the model that the run was made on.
        """
        spec = replace(
            spec,
            system=spec.system or self.system,
            dequantize=spec.dequantize or self.dequantize,
            revision=spec.revision or self.revision,
        )
        lm = load(self.name, spec)
        if self.mark is not None and not is_of(self.mark, as_stored(lm, spec)):
            raise UsageError(
                f"{self.name} is not the model that the run was made on (another fingerprint).",
                "Give the one that it was made on with "
                + (f"--revision {self.commit}." if self.commit else "--base."),
            )
        return lm


def answer(
    lm: LanguageModel,
    plan: EditPlan | None,
    prompt: str,
    limit: int,
    *,
    compare: bool,
    said: Mapping[str, Said] = NOTHING,
    on_text: OnText | None = None,
) -> dict[str, str]:
    """Return the answers by who gives them: `untouched`, `edited`, or `model` without a plan.

    `said` is what each of them has heard and answered before, by the same names. `on_text` hears every few
    tokens who is answering, and the answer so far; last of each the whole.
    """

    def ask(who: str) -> str:
        def tell(text: str) -> bool:
            if on_text is not None:
                # A character may still lack bytes.
                on_text(who, text.rstrip(UNREADABLE).strip())
            return False

        heard = remembered(lm, _thoughtless(said.get(who, ())), prompt, limit)
        asked = replace(lm, before=(*lm.before, *heard))
        settled = tell if on_text else None
        text = generate(asked, [prompt], limit, settled=settled)[0].text.strip()
        if on_text is not None:
            on_text(who, text)
        return text

    answers = {"untouched": ask("untouched")} if compare else {}
    with applied(lm.model, plan) if plan else nullcontext():
        who = "edited" if plan else "model"
        answers[who] = ask(who)
    return answers


def _thoughtless(said: Said) -> Said:
    """Return a conversation without thoughts in its answers, which chat templates drop or refuse."""
    return tuple((r, (behind(t) or UNSAID) if r == "assistant" else t) for r, t in said)


def remembered(lm: LanguageModel, said: Said, prompt: str, limit: int) -> Said:
    """Return the latest exchanges that leave room for the prompt and an answer of `limit` tokens."""
    room = getattr(lm.text_config, "max_position_embeddings", None)
    while said and isinstance(room, int):
        (whole,) = encode(replace(lm, before=(*lm.before, *said)), [prompt])
        if len(whole.ids) + limit <= room:
            break
        said = said[2:]
    return said
