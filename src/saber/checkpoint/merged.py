"""Write the edited model as a plain transformers folder: off its checkpoint's files, or from memory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers.utils import logging

from saber import artifacts
from saber.ablation import EditPlan, apply
from saber.checkpoint import blocks
from saber.checkpoint.apply import ApplySpec, Work, plan_folder, write_files
from saber.checkpoint.carry import carry_others, lies_in
from saber.checkpoint.plan_on_disk import DiskPlan, TensorEdit, files_folder
from saber.checkpoint.shards import CONFIG, DTYPES, Source, fingerprint, read_source
from saber.checkpoint.stage import Stage
from saber.checkpoint.wider import as_in_files
from saber.errors import ModelError, OutputError
from saber.lm.device import holds
from saber.lm.model import LanguageModel

STANDS_ALONE = ApplySpec(copy=True)
"""Untouched shards are copied: nobody expects a run's own model to share files with its base."""


@dataclass(frozen=True)
class Files:
    """A checkpoint's files that a saved plan can be made on."""

    plan: DiskPlan
    """The edit."""
    source: Source
    """The files."""
    edits: Mapping[str, TensorEdit]
    """What changes each tensor, by its name in the files."""
    mark: str
    """Fingerprint of the files."""

    @property
    def same(self) -> bool:
        """Whether they are those that the plan was made from."""
        return self.mark == self.plan.checkpoint


def files_of(
    run: Path | None, name: str, revision: str | None, out: Path, dtype: torch.dtype
) -> Files | None:
    """Return the files of a model that the plan of `run` can be made on; None for one without any.

    `dtype` is what the model would be saved in from memory. Raises `DataError` and `ModelError` where the
    edit has to be made in memory: an older plan, weights that the files weave together, an `out`
    inside the model's folder, or a tensor of which its file would round more away than `dtype`.
    """
    folder = files_folder(name, revision)
    if run is None or folder is None:
        return None
    if lies_in(out, folder):
        raise ModelError(f"{out} is inside the model's own folder.")
    plan = DiskPlan.read(plan_folder(run))
    source = read_source(folder)
    edits = plan.edits(source)
    for edited in edits:
        stored = source.stored(edited)
        assert stored is not None
        if DTYPES[stored.dtype].itemsize < 2:
            raise ModelError(
                f"{edited} is stored in {stored.dtype}, and the edit was made and measured on plain weights."
            )
        if not holds(DTYPES[stored.dtype], dtype):
            wanted = str(dtype).removeprefix("torch.")
            raise ModelError(
                f"{edited} is stored in {stored.dtype}, and the configuration says {wanted}."
            )
    return Files(plan, source, edits, fingerprint(source))


def write_merged(
    files: Files,
    out: Path,
    origin: Mapping[str, str],
    card: Callable[[str], str],
    added: Mapping[str, str],
) -> tuple[str, ...]:
    """Write the edited files to `out`, everything else as it is; return what was left behind.

    `card` makes the card from the base's; `added` are further text files of ours by name. The folder
    appears whole or not at all. Raises what `apply.write_files` does.
    """
    stage = Stage(out, out.with_name(f".{out.name}.part"))
    work = Work(
        files.plan,
        files.source,
        files.source.folder,
        files.edits,
        origin,
        lambda old, _: card(old),
        added,
    )
    with stage.locked():
        try:
            artifacts.require_free(out)
            record, _ = write_files(work, stage, STANDS_ALONE)
        except OutputError as error:
            raise OutputError(error.problem, "Free space or choose another --out.") from error
        finally:
            shutil.rmtree(stage.folder, ignore_errors=True)
    return tuple(record.skipped)


def save_merged(
    lm: LanguageModel,
    plan: EditPlan,
    folder: Path,
    metadata: Mapping[str, str] | None = None,
    added: Mapping[str, str] | None = None,
    others: Path | None = None,
) -> None:
    """Apply the plan for good, and save model, tokenizer and generation config to `folder`.

    The edit is made in float32 and rounded once, to the compute dtype, before the cast to the
    checkpoint's own; tensors that the files hold in a wider one stay in it (`wider`). `metadata` goes into
    the `__metadata__` of the weights; `added` are further text files by name, such as a card; `others`
    is the model's own folder, whose other files (a processor's, code, a licence) are copied. The folder
    appears whole or not at all. The model in memory stays edited. Raises `OutputError` when the disk is
    or would be full.
    """
    _require_room(lm, folder)
    apply(lm.model, plan)
    try:
        with artifacts.staged_folder(folder) as part, _without_bars():
            with as_in_files(lm, plan):
                lm.model.save_pretrained(part)
            _name_dtype(part, lm.stored_dtype)
            lm.tokenizer.save_pretrained(part)
            for file in sorted(part.glob("*.safetensors")) if metadata else []:
                stamp(file, metadata or {})
            for name, text in (added or {}).items():
                artifacts.write_text(part / name, text)
            if others is not None:
                carry_others(others, part)
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


def _require_room(lm: LanguageModel, folder: Path) -> None:
    """Raise `OutputError` when the weights do not fit the disk."""
    size = lm.stored_dtype.itemsize
    weights = lm.model.parameters()
    needed = sum(p.numel() * (size if p.is_floating_point() else p.itemsize) for p in weights)
    blocks.require_room(folder, needed)


def _name_dtype(folder: Path, dtype: torch.dtype) -> None:
    """Let a saved configuration name the dtype of most weights: transformers takes that of the first."""
    config = artifacts.read_json(folder / CONFIG)
    name = str(dtype).removeprefix("torch.")
    if config.get("dtype", name) != name:
        artifacts.write_json(folder / CONFIG, {**config, "dtype": name})


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
