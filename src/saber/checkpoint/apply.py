"""`saber apply`: a plan made on a checkpoint's files, shard by shard; the model is never loaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from saber import __version__, artifacts
from saber.checkpoint import blocks, pickled, provenance
from saber.checkpoint.carry import Cargo, cargo
from saber.checkpoint.plan_on_disk import DiskPlan, TensorEdit, hub_folder
from saber.checkpoint.provenance import FileMark, Record
from saber.checkpoint.shards import Source, read_source
from saber.checkpoint.stage import Stage, in_use
from saber.checkpoint.stream import touched
from saber.checkpoint.workers import Job, do_all
from saber.errors import DataError, ModelError, OutputError

CARD = "README.md"
MARGIN, WORTH = 1 << 24, 4 * 10**9
"""Bytes that must stay free beside what is written; bytes of work that a worker is started for."""

Watch = Callable[[int, int], None]
"""Told how many bytes of how many are written."""


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


def apply_to_files(
    run: Path,
    model: str,
    out: Path,
    spec: ApplySpec = ApplySpec(),
    watch: Watch = lambda _done, _total: None,
) -> Applied:
    """Write to `out` the checkpoint folder `model` with the plan of `run` made on it.

    Shards, their names and the index stay as they are; other files are carried over. The work is
    done in a folder beside `out`, which is moved there when all of it is whole. The same call goes on
    where an interrupted one stopped.

    Raises `DataError` for a run without a plan for files, `ModelError` for a checkpoint that does not
    fit it or is damaged, `OutputError` for a place that cannot be written.
    """
    begun = perf_counter()
    plan = DiskPlan.read(plan_folder(run))
    folder = model_folder(model)
    stage = Stage(out, out.with_name(f".{out.name}.part"), spec.sync)
    _check_places(folder, out, stage)
    with stage.locked():
        source_folder = folder
        if pickled.needed(folder):
            source_folder = pickled.convert(folder, stage.folder / "converted", spec.allow_pickle)
        source = read_source(source_folder)
        edits = plan.edits(source)
        origin = provenance.origin(plan, plan.hash(), source, provenance.run_record(run))
        forced = _check_base(plan, origin, spec.force)
        identity = {"version": __version__, "origin": origin, "source": str(folder.resolve())}
        finished = stage.finished(identity)
        if finished is not None:
            return Applied(out, finished, len(edits), len(source.shards), forced, 0.0)
        stage.begin(identity)
        cards = cargo(source if source_folder == folder else _beside(source, folder), _OWN)
        jobs = _jobs(plan, source, edits, origin, stage, spec, converted=source_folder != folder)
        resumed, left = stage.left(jobs, source)
        _check_space(stage, source, left)
        workers = spec.workers or _usual(source)
        do_all(left, workers, stage.mark, lambda: watch(stage.written(), source.size))
        record = _finish(stage, folder, source, edits, origin, cards)
        stage.publish()
    return Applied(out, record, len(edits), resumed, forced, perf_counter() - begun)


_OWN = (CARD, provenance.FILE)


def plan_folder(run: Path) -> Path:
    """Return where a run's plan lies; raises `DataError` when there is none."""
    if not run.is_dir():
        raise DataError(f"no such run folder: {run}.")
    for folder in (run / "plan", run):
        if (folder / artifacts.META).is_file():
            return folder
    raise DataError(f"{run} holds no edit plan.", "Give the folder of a finished saber run.")


def model_folder(model: str) -> Path:
    """Return the folder of a model's files; raises `ModelError` for what has none."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if model == "demo" or model.endswith(".gguf"):
        raise ModelError(
            f"{model} is no folder of safetensors files.",
            "For the demo and GGUF files, model/ in the run folder already is the edited model.",
        )
    cached = None if path.exists() or model.count("/") != 1 else hub_folder(model)
    if cached is None:
        raise ModelError(
            f"no such model folder: {model}.",
            "Give a folder of safetensors files, or the hub id of a model that was downloaded.",
        )
    return cached


def _check_places(folder: Path, out: Path, stage: Stage) -> None:
    source, target = folder.resolve(), out.resolve()
    if target == source or target.is_relative_to(source):
        raise OutputError(
            f"--out {out} is {'the' if target == source else 'inside the'} source folder.",
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


def _beside(source: Source, folder: Path) -> Source:
    """Return the source with the folder that its other files lie in."""
    return Source(folder, source.shards, source.config)


def _usual(source: Source) -> int:
    """Return how many workers pay: one takes seconds to start."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return max(1, min(cores, source.size // WORTH))


def _jobs(
    plan: DiskPlan,
    source: Source,
    edits: Mapping[str, TensorEdit],
    origin: Mapping[str, str],
    stage: Stage,
    spec: ApplySpec,
    *,
    converted: bool,
) -> list[Job]:
    """Return one job a shard, the largest first."""
    changed = set(touched(source, edits))
    order = sorted(source.shards.values(), key=lambda s: (-s.size, s.path.name))
    return [
        Job(
            source=str(source.folder),
            plan=str(plan.folder),
            file=shard.path.name,
            target=str(stage.files / shard.path.name),
            edit=shard.path.name in changed,
            added=dict(origin),
            link=not spec.copy or converted,
            sync=spec.sync,
        )
        for shard in order
    ]


def _check_space(stage: Stage, source: Source, left: list[Job]) -> None:
    """Raise `OutputError` when what is left to write does not fit the disk."""
    linked = stage.files.stat().st_dev == source.folder.stat().st_dev
    needed = sum(source.shards[j.file].size for j in left if j.edit or not (j.link and linked))
    free = shutil.disk_usage(stage.files).free
    if needed + MARGIN > free:
        raise OutputError(
            f"the disk of {stage.out.parent} is full: {needed / 1e9:.2f} GB are to be written and "
            f"{free / 1e9:.2f} GB are free.",
            "Free space or choose another --out.",
        )


def _finish(
    stage: Stage,
    folder: Path,
    source: Source,
    edits: Mapping[str, TensorEdit],
    origin: Mapping[str, str],
    cards: Cargo,
) -> Record:
    """Carry the other files over, write the card and, last, the record."""
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
    text = provenance.card(old, origin, rounding)
    artifacts.write_text(stage.files / CARD, text, sync=stage.sync)
    marks[CARD] = FileMark(blocks.sha256(stage.files / CARD), (stage.files / CARD).stat().st_size)
    files = dict(sorted(marks.items()))
    record = Record(origin, touched(source, edits), files, cards.skipped, rounding)
    record.save(stage.files, sync=stage.sync)
    return record
