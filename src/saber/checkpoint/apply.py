"""`saber apply`: a plan made on a checkpoint's files, shard by shard; the model is never loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from saber import __version__, artifacts
from saber.checkpoint import blocks, pickled, provenance
from saber.checkpoint.card import costs
from saber.checkpoint.carry import Cargo, cargo, fetch_rest, lies_in
from saber.checkpoint.plan_on_disk import DiskPlan, TensorEdit, commit_of, files_folder
from saber.checkpoint.provenance import FileMark, Record
from saber.checkpoint.shards import Source, read_source
from saber.checkpoint.stage import Stage, in_use
from saber.checkpoint.stream import touched
from saber.checkpoint.workers import Job, do_all
from saber.errors import DataError, ModelError, OutputError

CARD = "README.md"
WORTH = 4 * 10**9
"""Bytes of work that a worker is started for."""

Watch = Callable[[int, int], None]
"""Told how many bytes of how many are written."""


def unwatched(_done: int, _total: int) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class ApplySpec:
    """How to apply a plan to files."""

    workers: int = 0
    """Processes that write shards; 0 takes one a core, but none for less than 4 GB of work."""
    force: bool = False
    """Whether to apply it to another model than the plan was made from."""
    copy: bool = False
    """Whether to copy untouched shards instead of linking them."""
    allow_pickle: bool = False
    """Whether to convert pickled weights first."""
    sync: bool = True
    """Whether to bring what is written to the disk, so that a power cut cannot take it back."""


@dataclass(frozen=True)
class Work:
    """An edit to make on a checkpoint's files."""

    plan: DiskPlan
    """The edit."""
    source: Source
    """The files with the weights."""
    folder: Path
    """Where the other files lie: beside the weights, unless those were converted."""
    edits: Mapping[str, TensorEdit]
    """What changes each tensor, by its name in the files."""
    origin: Mapping[str, str]
    """What the result carries (`provenance.KEYS`)."""
    card: Callable[[str, Mapping[str, float]], str]
    """Makes its card, from the base's and what storing in 8 bits lost of the edit, by tensor."""
    added: Mapping[str, str] = field(default_factory=dict)
    """Text of further files of ours, by name; the base's of that name are not carried over."""

    @property
    def cargo(self) -> Cargo:
        """Files to carry over, and to leave."""
        other = Source(self.folder, self.source.shards, self.source.config)
        return cargo(other, (CARD, provenance.FILE, *self.added))

    @property
    def identity(self) -> dict[str, Any]:
        """What an interrupted call must have had in common to be gone on with."""
        source = str(self.folder.resolve())
        return {"version": __version__, "origin": dict(self.origin), "source": source}


@dataclass(frozen=True)
class Applied:
    """A checkpoint that was written."""

    folder: Path
    """Where it lies."""
    record: Record
    """What was written there, with where it comes from."""
    tensors: int
    """Tensors that were edited."""
    resumed: int
    """Shards that an interrupted command had finished."""
    forced: bool
    """Whether the base is another one than the plan's."""
    seconds: float
    """Wall time."""
    notes: tuple[str, ...] = ()
    """What a user has to know of it."""


def apply_to_files(
    run: Path,
    model: str,
    out: Path,
    spec: ApplySpec = ApplySpec(),
    watch: Watch = unwatched,
) -> Applied:
    """Write to `out` the checkpoint folder `model` with the plan of `run` made on it.

    Shards, their names and the index stay as they are; other files are carried over. The work is
    done in a folder beside `out`, which is moved there when all of it is whole. The same call goes on
    where an interrupted one stopped.

    Raises `DataError` for a run without a plan for files, `ModelError` for a checkpoint that does not
    fit it or is damaged, `OutputError` for a place that cannot be written.
    """
    begun = perf_counter()
    if not out.name:  # . or /, beside which nothing can be prepared
        raise OutputError(f"--out {out} has no name of its own.", "Choose a folder in it.")
    plan = DiskPlan.read(plan_folder(run))
    record = provenance.run_record(plan)
    folder = model_folder(model, commit_of(record, model))
    stage = Stage(out, out.with_name(f".{out.name}.part"), spec.sync)
    _check_places(folder, out, stage)
    with stage.locked():
        source_folder = folder
        if pickled.needed(folder):
            source_folder = pickled.convert(folder, stage.folder / "converted", spec.allow_pickle)
        source = read_source(source_folder)
        edits = plan.edits(source)
        origin = provenance.origin(plan, plan.hash(), source, record)
        forced = _check_base(plan, origin, spec.force)
        told = costs(record, forced)
        work = Work(
            plan,
            source,
            folder,
            edits,
            origin,
            lambda old, lost: provenance.card(old, origin, lost, told),
        )
        finished = stage.finished(work.identity)
        if finished is not None:
            return Applied(out, finished, len(edits), len(source.shards), forced, 0.0)
        notes = fetch_rest(model, folder)
        made, resumed = write_files(work, stage, spec, watch)
    return Applied(out, made, len(edits), resumed, forced, perf_counter() - begun, notes)


def write_files(
    work: Work, stage: Stage, spec: ApplySpec, watch: Watch = unwatched
) -> tuple[Record, int]:
    """Write the edited files to the stage and move them to their place.

    Returns the record of what was written, and how many shards were there already. Raises `ModelError`
    for a source that cannot be read, `NonFinite` for weights that are none, `OutputError` when the
    disk is or would be full.
    """
    source = work.source
    stage.begin(work.identity)
    cards = work.cargo
    resumed, left = stage.left(_jobs(work, stage, spec), source)
    _check_space(stage, source, left)
    workers = spec.workers or _usual(source)
    do_all(left, workers, stage.mark, lambda: watch(stage.written(), source.size))
    record = _finish(work, stage, cards)
    stage.publish()
    return record, resumed


def plan_folder(run: Path) -> Path:
    """Return where a run's plan lies; raises `DataError` when there is none."""
    if not run.is_dir():
        raise DataError(f"no such run folder: {run}.")
    for folder in (run / "plan", run):
        if (folder / artifacts.META).is_file():
            return folder
    raise DataError(f"{run} holds no edit plan.", "Give the folder of a finished saber run.")


def model_folder(model: str, revision: str | None = None) -> Path:
    """Return the folder of a model's files, of that commit if the hub's cache has it.

    Raises `ModelError` for what has none.
    """
    folder = files_folder(model, revision) or files_folder(model)
    if folder is not None:
        return folder
    if model == "demo" or artifacts.names_gguf(model):
        raise ModelError(
            f"{model} is no folder of safetensors files.",
            "For the demo and GGUF files, model/ in the run folder already is the edited model.",
        )
    raise ModelError(
        f"no such model folder: {model}.",
        "Give a folder of safetensors files, or the hub id of a model that was downloaded.",
    )


def _check_places(folder: Path, out: Path, stage: Stage) -> None:
    if lies_in(out, folder):
        same = out.resolve() == folder.resolve()
        raise OutputError(
            f"--out {out} is {'the' if same else 'inside the'} source folder.",
            "Choose another.",
        )
    if out.exists() and not out.is_dir():
        raise OutputError(f"--out {out} is a file.", "Choose a folder.")
    if out.exists() and any(out.iterdir()) and not stage.folder.exists():
        raise in_use(out)


def _check_base(plan: DiskPlan, origin: Mapping[str, str], force: bool) -> bool:
    """Return whether the base is another one; raises `ModelError` then unless that was asked for."""
    if plan.checkpoint == origin["base_checkpoint"]:
        return False
    if not force:
        known = "was made from a model without safetensors files"
        if plan.checkpoint is not None:
            known = f"was made from {plan.checkpoint[:19]}..."
        raise ModelError(
            f"the plan {known}, but these files are {origin['base_checkpoint'][:19]}....",
            "Apply it to the model that it was made from, or pass --force to apply it to this one.",
        )
    return True


def _usual(source: Source) -> int:
    """Return how many workers pay: one takes seconds to start."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return max(1, min(cores, source.size // WORTH))


def _jobs(work: Work, stage: Stage, spec: ApplySpec) -> list[Job]:
    """Return one job a shard, the largest first."""
    source = work.source
    changed = set(touched(source, work.edits))
    order = sorted(source.shards, key=lambda file: (-source.shards[file].size, file))
    return [
        Job(
            source=str(source.folder),
            plan=str(work.plan.folder),
            file=file,
            target=str(stage.files / file),
            edit=file in changed,
            added=dict(work.origin),
            link=not spec.copy and source.folder == work.folder,
            sync=spec.sync,
        )
        for file in order
    ]


def _check_space(stage: Stage, source: Source, left: list[Job]) -> None:
    """Raise `OutputError` when what is left to write does not fit the disk."""
    linked = stage.files.stat().st_dev == source.folder.stat().st_dev
    needed = sum(source.shards[j.file].size for j in left if j.edit or not (j.link and linked))
    blocks.require_room(stage.out, needed)


def _finish(work: Work, stage: Stage, cards: Cargo) -> Record:
    """Carry the other files over, write the card and, last, the record."""
    source, folder = work.source, work.folder
    marks: dict[str, FileMark] = {}
    for name in cards.carried:
        target = stage.files / name
        with blocks.writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        digest = blocks.copy(folder / name, target, sync=stage.sync)
        marks[name] = FileMark(digest, target.stat().st_size)
    if source.folder != folder:
        for name in pickled.indexes(source.folder):
            digest = blocks.copy(source.folder / name, stage.files / name, sync=stage.sync)
            marks[name] = FileMark(digest, (stage.files / name).stat().st_size)
    rounding: dict[str, float] = {}
    for file in source.shards:
        done = stage.marked(file)
        assert done is not None
        marks[file] = FileMark(done.sha256, done.size)
        rounding |= done.rounding
    base_card = folder / CARD
    old = base_card.read_text("utf-8", "replace") if base_card.is_file() else ""
    for name, text in {**work.added, CARD: work.card(old, rounding)}.items():
        artifacts.write_text(stage.files / name, text, sync=stage.sync)
        marks[name] = FileMark(
            blocks.sha256(stage.files / name), (stage.files / name).stat().st_size
        )
    files = dict(sorted(marks.items()))
    record = Record(work.origin, touched(source, work.edits), files, cards.skipped, rounding)
    record.save(stage.files, sync=stage.sync)
    for path in [p for p in stage.files.rglob("*") if p.is_file()]:
        name = path.relative_to(stage.files).as_posix()
        if name not in files and name != provenance.FILE:
            path.unlink()  # of an interrupted call, and no longer in the source
    return record
