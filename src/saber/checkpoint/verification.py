"""Hold an edited artifact against what it carries, the run that made it, and its base."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from saber import artifacts
from saber.checkpoint import blocks
from saber.checkpoint.apply import model_folder, plan_folder
from saber.checkpoint.checks import Check, Held, none_of
from saber.checkpoint.plan_on_disk import DiskPlan, commit_of
from saber.checkpoint.provenance import FILE, Record, carried, run_record
from saber.checkpoint.shards import Source, fingerprint, read_source
from saber.checkpoint.stream import touched, write_shard
from saber.errors import DataError, SaberError

HUB = (".gitattributes", ".cache/")
"""What the hub and its client add to a folder that was pushed and downloaded again."""
Watch = Callable[[int, int], None]
"""Told how many bytes of how many are read."""


@dataclass(frozen=True)
class Verified:
    """What an artifact carries and what was checked of it."""

    path: Path
    """The artifact."""
    origin: Mapping[str, str]
    """What it carries (`provenance.KEYS`)."""
    checks: tuple[Check, ...]
    """In the order in which they were made."""
    unchecked: tuple[str, ...] = ()
    """What was not checked, with what is missing for it."""

    @property
    def passed(self) -> bool:
        """Whether all checks hold."""
        return all(check.passed for check in self.checks)


class _Artifact(NamedTuple):
    """What lies at a path."""

    path: Path
    """Where."""
    kind: Literal["checkpoint", "weights", "lora", "gguf", "gguf-lora"]
    """What it is; `weights` are those without a record of their files."""
    record: Record | None
    """The record of a checkpoint's files."""
    gguf: Path | None
    """The GGUF file that it is, or holds alone."""

    @classmethod
    def at(cls, path: Path, record: Record | None) -> _Artifact:
        """Tell what lies at a path."""
        if record is not None:
            return cls(path, "checkpoint", record, None)
        files = [path] if path.is_file() else sorted(path.glob("*.gguf"))
        if len(files) == 1 and files[0].suffix == ".gguf":
            return cls(path, "gguf-lora" if _is_adapter(files[0]) else "gguf", None, files[0])
        adapter = (path / "adapter_config.json").is_file()
        return cls(path, "lora" if adapter else "weights", None, None)


def _is_adapter(file: Path) -> bool:
    import gguf

    kind = gguf.GGUFReader(file).get_field("general.type")
    return kind is not None and kind.contents() == "adapter"


def verify(
    path: Path,
    run: Path | None = None,
    base: str = "",
    watch: Watch = lambda _done, _total: None,
) -> Verified:
    """Check a folder, a safetensors file or a GGUF file that SABER wrote.

    Always: every file that the record names has its SHA-256, none is missing or new, and all edited
    shards carry the same origin as the record. With `run`: plan and seed are that run's. With `base`:
    the files it was made from are those; what does not carry that, an adapter or a GGUF file, needs `run`
    for it. With both the edit is made again, in memory and block by block, and held against the shards
    bit for bit, and an adapter against the plan's, tensor by tensor. A GGUF file and llama.cpp's adapter
    are held against a base that is a GGUF file tensor by tensor, as far as that goes without `run`. What
    was not checked, for want of a run or a base, is told in `unchecked`.

    Raises `DataError` when the artifact carries nothing to check, or not what is asked about, `ModelError`
    for a single file that is damaged.
    """
    if path.is_file():
        record, parts = None, {path.name: carried(path)}
    elif not path.is_dir():
        raise DataError(f"no such folder or file: {path}.")
    else:
        record = Record.load(path) if (path / FILE).is_file() else None
        files = sorted(path.glob("*.safetensors")) + sorted(path.glob("*.gguf"))
        names = record.edited if record else [file.name for file in files]
        parts = {name: _carried(path / name) for name in names}
    origin = dict(record.origin) if record else next((p for p in parts.values() if p), {})
    if not origin:
        raise DataError(
            f"{path} carries no provenance, so there is nothing to check.",
            "SABER writes it into what saber run, apply and export save.",
        )
    checks = list(_own(path, record, parts, origin, watch))
    plan = DiskPlan.read(plan_folder(run)) if run is not None else None
    if plan is not None:
        checks += _against_run(plan, origin)
    artifact = _Artifact.at(path, record)
    held = _against_base(artifact, base, plan, origin) if base else Held(())
    unchecked = (*held.unchecked, *_left(artifact, plan is not None, base))
    return Verified(path, origin, (*checks, *held.checks), unchecked)


def _carried(path: Path) -> dict[str, str]:
    try:
        return carried(path)
    except SaberError:
        return {}  # a damaged file, which its SHA-256 shows


def _own(
    path: Path,
    record: Record | None,
    parts: Mapping[str, Mapping[str, str]],
    origin: Mapping[str, str],
    watch: Watch,
) -> Iterator[Check]:
    other = [name for name, part in parts.items() if dict(part) != dict(origin)]
    yield none_of("weights carry their origin", other, "other or none in")
    if record is None:
        return
    files = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()} - {FILE}
    missing = sorted(record.files.keys() - files)
    new = sorted(f for f in files - record.files.keys() if not f.startswith(HUB))
    yield none_of("no file is missing", missing, "missing:")
    yield none_of("no file was added", new, "added:")
    total, done, changed = sum(m.size for m in record.files.values()), 0, []
    for name, mark in record.files.items():
        if name in files:
            size = (path / name).stat().st_size
            if size != mark.size or blocks.sha256(path / name) != mark.sha256:
                changed.append(name)
        done += mark.size
        watch(done, total)
    yield none_of("every file has its SHA-256", changed, "changed:")


def _against_run(plan: DiskPlan, origin: Mapping[str, str]) -> Iterator[Check]:
    found = plan.hash()
    yield _same("the plan is the run's", found, origin.get("plan_hash"))
    seed = (plan.meta.get("config") or {}).get("seed")
    yield _same("the seed is the run's", None if seed is None else str(seed), origin.get("seed"))
    yield _same(
        "the model in memory is the run's",
        plan.meta.get("fingerprint"),
        origin.get("base_fingerprint"),
    )


def _against_base(
    artifact: _Artifact, base: str, plan: DiskPlan | None, origin: Mapping[str, str]
) -> Held:
    path, kind, record = artifact.path, artifact.kind, artifact.record
    if artifacts.names_gguf(base) or base == "demo":
        if kind.startswith("gguf") or (kind == "lora" and plan is not None):
            return _against_plan(artifact, base, plan)
        raise DataError(
            f"{path} carries no fingerprint that {base} could be held against: a base is known by its "
            "folder of safetensors files, or by the model in memory.",
            "Leave --base out; --run RUN holds plan, seed and model against the run's.",
        )
    made_on = commit_of(run_record(plan), base) if plan else None
    source = read_source(model_folder(base, made_on))
    # Adapters and GGUF files carry the fingerprint of the model in memory alone; its files' is the run's.
    wanted = origin.get("base_checkpoint") or (plan.checkpoint if plan else None)
    if wanted is None:
        raise DataError(
            f"{path} does not carry the fingerprint of its base's files"
            f"{', and its run does not know it' if plan else ''}.",
            "Give the .gguf file that it was built on."
            if kind.startswith("gguf")
            else "Leave --base out."
            if plan
            else "Give --run as well, which knows it, or leave --base out.",
        )
    same = _same("it was made from this base", fingerprint(source), wanted)
    if plan is not None and record is not None:
        return Held((same, _made_again(record, source, plan, origin)))
    if plan is not None and kind == "lora" and same.passed:
        held = _against_plan(artifact, str(source.folder), plan)
        return Held((same, *held.checks), held.unchecked)
    return Held((same,))


def _made_again(record: Record, source: Source, plan: DiskPlan, origin: Mapping[str, str]) -> Check:
    edits, factors = plan.edits(source), plan.open()
    edited = touched(source, edits)  # by the plan: a record may leave shards out
    other = []
    for file in source.shards:
        mark = record.files.get(file)
        if file in edited:
            found = write_shard(source, file, None, edits, factors, origin).sha256
        else:
            found = blocks.sha256(source.shards[file].path)
        if mark is None or found != mark.sha256:
            other.append(file)
    return none_of("base and plan give these very bits", other, "others in")


def _against_plan(artifact: _Artifact, base: str, plan: DiskPlan | None) -> Held:
    """Hold a GGUF file or an adapter against base and plan, tensor by tensor."""
    from saber.ablation import EditPlan
    from saber.checkpoint import export_checks
    from saber.checkpoint.runs import SKETCH
    from saber.checkpoint.sketch import Sketch

    edit = EditPlan.load(plan.folder) if plan else None
    if artifact.kind == "lora":
        assert edit is not None
        return export_checks.peft_adapter(artifact.path, base, edit)
    assert artifact.gguf is not None
    if artifact.kind == "gguf":
        return export_checks.gguf_model(artifact.gguf, base, edit)
    sketch = Sketch.load(plan.folder / SKETCH) if plan else None
    return export_checks.gguf_adapter(artifact.gguf, base, edit, sketch)


def _left(artifact: _Artifact, run: bool, base: str) -> Iterator[str]:
    """Yield what is not checked of an artifact for want of a run, or of a base to hold it against."""
    kind = artifact.kind
    listed = artifacts.names_gguf(base) or base == "demo"
    if kind == "weights":
        yield (
            "its weights against base and plan: they have no saber_provenance.json (saved from memory, or "
            "a file on its own), so they cannot be made again bit for bit"
        )
    elif kind == "lora" and listed:
        yield "that the base is the run's model: only a folder of safetensors files has a fingerprint"
    elif not (kind.startswith("gguf") and listed):  # else said where it was held against the base
        needed = [] if run else ["--run RUN"]
        if kind.startswith("gguf"):
            needed.append("--base FILE.gguf, which it was built on")
        elif not base:
            needed.append("--base MODEL")
        if needed:
            yield f"{_MADE[kind]}: give {' and '.join(needed)}"


_MADE = {
    "checkpoint": "that base and plan give these very bits",
    "lora": "that its tensors are the plan's",
    "gguf": "its tensors against base and plan",
    "gguf-lora": "that its tensors are the plan's",
}


def _same(what: str, found: str | None, carried_: str | None) -> Check:
    return Check(what, found == carried_, "" if found == carried_ else f"{found} is not {carried_}")
