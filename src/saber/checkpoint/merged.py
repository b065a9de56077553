"""Write the edited model as a plain transformers folder, in the checkpoint's own dtype."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers.utils import logging

from saber import artifacts
from saber.ablation import EditPlan, apply
from saber.errors import OutputError
from saber.lm.model import LanguageModel


def save_merged(
    lm: LanguageModel, plan: EditPlan, folder: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Apply the plan for good, and save model, tokenizer and generation config to `folder`.

    The edit is made in float32 and rounded once, to the compute dtype, before the cast to the
    checkpoint's own. `metadata` goes into the `__metadata__` of the weights. The folder appears whole
    or not at all. The model in memory stays edited.
    """
    apply(lm.model, plan)
    # A dispatched model cannot be cast as a whole; it was loaded in its own dtype anyway.
    if lm.dtype != lm.stored_dtype and getattr(lm.model, "hf_device_map", None) is None:
        lm.model.to(lm.stored_dtype)
    try:
        with artifacts.staged_folder(folder) as part, _without_bars():
            lm.model.save_pretrained(part)
            lm.tokenizer.save_pretrained(part)
            for file in sorted(part.glob("*.safetensors")) if metadata else []:
                stamp(file, metadata or {})
    except (SafetensorError, RuntimeError) as error:
        raise OutputError(f"cannot save the model to {folder}: {error}.") from error


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep transformers from drawing bars, which the caller's own would run into."""
    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            logging.enable_progress_bar()


def stamp(file: Path, metadata: Mapping[str, str]) -> None:
    """Add to the `__metadata__` of a safetensors file; the weights stay as they are."""
    part = file.with_name(f".{file.name}.part")
    with file.open("rb") as source, part.open("wb") as target:
        head = json.loads(source.read(int.from_bytes(source.read(8), "little")))
        head["__metadata__"] = {**head.get("__metadata__", {}), **metadata}
        text = json.dumps(head, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        target.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(source, target, 1 << 24)
    os.replace(part, file)
