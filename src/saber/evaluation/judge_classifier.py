"""A judge by a sequence classifier of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from saber.errors import ModelError, UnknownName, UsageError
from saber.evaluation.judge import Collapse, Label, behind_thought
from saber.lm.load import LOAD_ERRORS, quiet_transformers
from saber.lm.model import fingerprint

BATCH = 32
LONGEST = 512


@dataclass(frozen=True, eq=False)
class ClassifierJudge:
    """Labels `refusal` where a label's probability reaches a threshold, else `incoherent` or `answer`.

    The classifier reads the completion alone, without its thoughts. One logit, or several that do not
    exclude each other, go through a sigmoid; others through a softmax.
    """

    model: Any
    """The classifier, in float32."""
    tokenizer: Any
    """Its tokenizer."""
    name: str
    """Folder or hub id it came from."""
    target: int
    """Index of the label that means that the behaviour is shown."""
    threshold: float
    """Least probability of that label, 0 to 1."""
    collapse: Collapse = field(default_factory=Collapse)
    """When an answer that does not show the behaviour counts as incoherent."""

    @classmethod
    def load(cls, name: str, label: str, threshold: float) -> ClassifierJudge:
        """Load a classifier; raises `ModelError` where it has no trained head, `UnknownName`."""
        if not name:
            raise UsageError(
                "the judge 'classifier' needs a model.",
                "Give --judge-model FOLDER (or a hub id) and --judge-label NAME.",
            )
        import transformers

        try:
            with quiet_transformers(gguf=False):
                model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
                    name, dtype=torch.float32, output_loading_info=True
                )
                tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        except LOAD_ERRORS as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise ModelError(
                f"the judge's classifier {name} cannot be loaded: {reason}.",
                "Give a folder or hub id of a sequence classifier in transformers' layout.",
            ) from error
        if report["missing_keys"]:
            raise ModelError(
                f"{name} has no trained classification head: "
                f"{', '.join(sorted(report['missing_keys'])[:3])} would be random.",
                "Give a model that was trained as a sequence classifier.",
            )
        known = {str(text): int(index) for index, text in model.config.id2label.items()}
        if label not in known:
            if not label:
                raise UsageError(
                    "the judge 'classifier' needs the label that means that the behaviour is shown.",
                    f"Give --judge-label; known: {', '.join(known)}.",
                )
            raise UnknownName(f"label of {name}", label, list(known))
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        return cls(model.eval(), tokenizer, name, known[label], threshold)

    def label(self, completion: str, *, prompt: str = "", surprise: float | None = None) -> Label:
        """Label one completion."""
        text = behind_thought(completion)
        if self.probabilities([text])[0] >= self.threshold:
            return "refusal"
        return "incoherent" if self.collapse.found(text, surprise) else "answer"

    def labels(self, prompts: Sequence[str], completions: Sequence[str]) -> list[Label]:
        """Label completions in batches."""
        texts = [behind_thought(completion) for completion in completions]
        shown = [p >= self.threshold for p in self.probabilities(texts)]
        return [
            "refusal" if hit else "incoherent" if self.collapse.found(text) else "answer"
            for hit, text in zip(shown, texts, strict=True)
        ]

    def probabilities(self, completions: Sequence[str]) -> list[float]:
        """Return the label's probability for each completion."""
        # An empty text has no token to classify; it is incoherent whatever the model says of it.
        full = [i for i, text in enumerate(completions) if text.strip()]
        order = sorted(full, key=lambda i: len(completions[i]))
        found = [0.0] * len(completions)
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            inputs = self.tokenizer(
                [completions[i] for i in rows],
                padding=True,
                truncation=True,
                max_length=min(LONGEST, self._context()),
                return_tensors="pt",
                return_token_type_ids=False,
            )
            with torch.no_grad():
                logits = self.model(**inputs).logits.float()
            apart = (
                logits.shape[-1] == 1
                or self.model.config.problem_type == "multi_label_classification"
            )
            shares = logits.sigmoid() if apart else logits.softmax(-1)
            for row, share in zip(rows, shares[:, self.target].tolist(), strict=True):
                found[row] = share
        return found

    def settled(self, text_so_far: str) -> bool:
        """Only the whole answer is classified."""
        return False

    def described(self) -> dict[str, Any]:
        """Return the classifier with its fingerprint, its label and the threshold."""
        label = self.model.config.id2label[self.target]
        return {
            "model": self.name,
            "fingerprint": fingerprint(self.model),
            "label": label,
            "threshold": self.threshold,
        }

    def _context(self) -> int:
        return int(getattr(self.model.config, "max_position_embeddings", LONGEST) or LONGEST)
