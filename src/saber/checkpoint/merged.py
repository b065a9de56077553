"""Write the edited model as a plain transformers folder, in the checkpoint's own dtype."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError

from saber import artifacts
from saber.ablation import EditPlan, apply
from saber.errors import OutputError
from saber.lm.model import LanguageModel


def save_merged(lm: LanguageModel, plan: EditPlan, folder: Path) -> None:
    """Apply the plan for good, and save model, tokenizer and generation config to `folder`.

    The edit is made in float32 and rounded once, to the compute dtype, before the cast to the
    checkpoint's own. The folder appears whole or not at all. The model in memory stays edited.
    """
    apply(lm.model, plan)
    # A dispatched model cannot be cast as a whole; it was loaded in its own dtype anyway.
    if lm.dtype != lm.stored_dtype and getattr(lm.model, "hf_device_map", None) is None:
        lm.model.to(lm.stored_dtype)
    try:
        with artifacts.staged_folder(folder) as part:
            lm.model.save_pretrained(part)
            lm.tokenizer.save_pretrained(part)
    except (SafetensorError, RuntimeError) as error:
        raise OutputError(f"cannot save the model to {folder}: {error}.") from error
