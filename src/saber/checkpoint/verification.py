"""Hold an edited artifact against what it carries, the run that made it, and its base."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from saber import artifacts
from saber.checkpoint import blocks
from saber.checkpoint.apply import model_folder, plan_folder
from saber.checkpoint.plan_on_disk import DiskPlan
from saber.checkpoint.provenance import FILE, Record, carried
from saber.checkpoint.shards import fingerprint, read_source
from saber.checkpoint.stream import touched, write_shard
from saber.errors import DataError, SaberError
from saber.paths import expanded

HUB = (".gitattributes", ".cache/")
"""What the hub and its client add to a folder that was pushed and downloaded again."""
Watch = Callable[[int, int], None]
"""Told how many bytes of how many are read."""


@dataclass(frozen=True)
class Check:
    """One thing that was checked."""

    what: str
    """In a few words."""
    passed: bool
    """Whether it holds."""
    detail: str = ""
    """What was found, where it does not."""


@dataclass(frozen=True)
class Verified:
    """What an artifact carries and what was checked of it."""

    path: Path
    """The artifact."""
    origin: Mapping[str, str]
    """What it carries (`provenance.KEYS`)."""
    checks: tuple[Check, ...]
    """In the order in which they were made."""

    @property
    def passed(self) -> bool:
        """Whether all checks hold."""
        return all(check.passed for check in self.checks)


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
    bit for bit. A GGUF file is held against a base that is one tensor by tensor, with `run`.

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
    if base:
        checks += _against_base(path, base, record, plan, origin)
    return Verified(path, origin, tuple(checks))


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
    yield Check("weights carry their origin", not other, _names(other, "other or none in"))
    if record is None:
        return
    files = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()} - {FILE}
    missing = sorted(record.files.keys() - files)
    new = sorted(f for f in files - record.files.keys() if not f.startswith(HUB))
    yield Check("no file is missing", not missing, _names(missing, "missing:"))
    yield Check("no file was added", not new, _names(new, "added:"))
    total, done, changed = sum(m.size for m in record.files.values()), 0, []
    for name, mark in record.files.items():
        if name in files:
            size = (path / name).stat().st_size
            if size != mark.size or blocks.sha256(path / name) != mark.sha256:
                changed.append(name)
        done += mark.size
        watch(done, total)
    yield Check("every file has its SHA-256", not changed, _names(changed, "changed:"))


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
    path: Path,
    base: str,
    record: Record | None,
    plan: DiskPlan | None,
    origin: Mapping[str, str],
) -> Iterator[Check]:
    if base == "demo" or artifacts.names_gguf(base):
        whole = _model_in(path)
        if plan is not None and whole is not None:
            yield from _against_gguf(whole, base, plan)
            return
        raise DataError(
            f"{path} carries no fingerprint that {base} could be held against: a base is known by its "
            "folder of safetensors files, or by the model in memory.",
            "Leave --base out; --run RUN holds plan, seed and model against the run's"
            + (", and with it a GGUF file against its base." if whole is not None else "."),
        )
    source = read_source(model_folder(base))
    # Adapters and GGUF files carry the fingerprint of the model in memory alone; its files' is the run's.
    wanted = origin.get("base_checkpoint") or (plan.checkpoint if plan else None)
    if wanted is None:
        raise DataError(
            f"{path} does not carry the fingerprint of its base's files"
            f"{', and its run does not know it' if plan else ''}.",
            "Leave --base out."
            if plan
            else "Give --run as well, which knows it, or leave --base out.",
        )
    yield _same("it was made from this base", fingerprint(source), wanted)
    if plan is None or record is None:
        return
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
    yield Check("base and plan give these very bits", not other, _names(other, "others in"))


def _model_in(path: Path) -> Path | None:
    """Return the GGUF file with a whole model that an artifact is, or holds alone; None for any other."""
    files = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    if len(files) != 1 or files[0].suffix != ".gguf":
        return None
    from saber.checkpoint.gguf_file import open_gguf

    kind = open_gguf(files[0]).reader.get_field("general.type")
    return None if kind is not None and kind.contents() == "adapter" else files[0]


def _against_gguf(file: Path, base: str, plan: DiskPlan) -> Iterator[Check]:
    """Hold every tensor of a GGUF file against the base's, with the plan's change where it has one."""
    from saber.ablation import EditPlan
    from saber.checkpoint.export import demo_adapter
    from saber.checkpoint.gguf_compare import compare
    from saber.checkpoint.gguf_file import open_gguf
    from saber.checkpoint.gguf_names import changes
    from saber.lm.demo import base_gguf

    edit = EditPlan.load(plan.folder)
    if base == "demo":
        source, edit = open_gguf(base_gguf()), demo_adapter() + edit
    else:
        source = open_gguf(expanded(base))
    found = compare(source, open_gguf(file), changes(source, edit))
    yield Check("metadata are the base's", not found.metadata, "others" if found.metadata else "")
    yield Check("tensors are the base's", not found.tensors, _names(found.tensors, "others:"))
    yield Check(
        "tensors without an edit have the base's bytes",
        not found.untouched,
        _names(found.untouched, "others in"),
    )
    yield Check(
        "edited tensors are the base's with the plan's change, to rounding",
        not found.edited,
        _names(found.edited, "others in"),
    )


def _same(what: str, found: str | None, carried_: str | None) -> Check:
    return Check(what, found == carried_, "" if found == carried_ else f"{found} is not {carried_}")


def _names(names: Sequence[str], lead: str) -> str:
    if not names:
        return ""
    return f"{lead} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
