"""A finished run's edit in the formats people use: PEFT LoRA, merged folder, GGUF, GGUF LoRA."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import as_file, files
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch

from saber import artifacts
from saber.ablation import EditPlan
from saber.checkpoint import gguf_fit
from saber.checkpoint.card import DROWNED, export_card
from saber.checkpoint.carry import cargo, fetch_rest, lies_in
from saber.checkpoint.gguf_file import Change, GgufFile, GgufTensor, open_gguf
from saber.checkpoint.gguf_lora import write_gguf_lora
from saber.checkpoint.gguf_names import changes
from saber.checkpoint.gguf_rewrite import Rounding, rewrite
from saber.checkpoint.lora import layout, placeless, read_lora, require_peft, write_lora
from saber.checkpoint.merged import Files, files_of, save_merged, write_merged
from saber.checkpoint.origin import origin
from saber.checkpoint.plan_on_disk import cached_commit, commit_of, files_folder
from saber.checkpoint.provenance import behind
from saber.checkpoint.runs import Run, place_of
from saber.checkpoint.sketch import take
from saber.errors import (
    ExportInterrupted,
    ModelError,
    OutputError,
    SaberError,
    UnknownName,
    UsageError,
    few,
)
from saber.lm import demo
from saber.lm.forward import Progress, silent
from saber.lm.load import LoadSpec, as_stored, load, read_template, require_hub, skeleton
from saber.lm.model import LanguageModel, is_of
from saber.lm.writers import Writer
from saber.paths import expanded

Format = Literal["lora", "merged", "gguf", "gguf-lora"]
FORMATS: tuple[Format, ...] = ("lora", "merged", "gguf", "gguf-lora")
CARD, TEMPLATE = "README.md", "chat_template.jinja"
PLACES: Mapping[str, str] = {
    "merged": "model", "lora": "adapter", "gguf": "gguf", "gguf-lora": "gguf-adapter",
}  # fmt: skip
"""Where `saber run --export` puts them inside a run folder."""


@dataclass(frozen=True)
class ExportSpec:
    """How to export."""

    base: str = ""
    """The model or `.gguf` file to build on; empty takes the run's own."""
    type: str = "auto"
    """GGUF: type of changed tensors. auto: the file's own where it can be written and the edit outlives
    it, otherwise Q8_0; keep: the file's own; or a type such as q8_0 or f16."""
    partial: bool = False
    """Leave out, by name, what the format cannot hold."""
    force: bool = False
    """Build on a model that does not match the one of the run."""
    load: LoadSpec = field(default_factory=LoadSpec)
    """How to load the base, where it has to be loaded."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    format: Format
    """Its format."""
    path: Path
    """The file or folder."""
    card: Path
    """The card beside it or in it."""
    bytes: int
    """Size of everything written."""
    seconds: float
    """Wall time."""
    notes: tuple[str, ...]
    """What a user has to know of it."""
    tensors: tuple[Rounding, ...] = ()
    """GGUF: what storing did to the edit, tensor by tensor."""

    def row(self, folder: Path) -> dict[str, Any]:
        """Return what the `run.json` of a run folder says of it."""
        return {
            "format": self.format,
            "path": place_of(self.path, folder),
            "bytes": self.bytes,
            "notes": list(self.notes),
        }


def check_formats(names: Sequence[str], model: str = "") -> None:
    """Refuse, before any work, formats that are unknown or that this model or machine cannot give."""
    for name in names:
        if name not in FORMATS:
            raise UnknownName("format", name, list(FORMATS))
    if "lora" in names:
        require_peft()
    if (
        model
        and set(names) & {"gguf", "gguf-lora"}
        and model != "demo"
        and not artifacts.names_gguf(model)
    ):
        raise UsageError(
            f"--export gguf builds on a .gguf file, and {model} is none.",
            "Export it after the run: saber export RUN --format gguf --base FILE.gguf --out OUT.gguf",
        )


def check_places(names: Sequence[str], lm: LanguageModel, writers: Sequence[Writer]) -> None:
    """Refuse, before more work, a LoRA adapter of a model of whose writers PEFT adapts none."""
    if "lora" in names and writers and all(map(placeless(lm.model), (w.weight for w in writers))):
        raise UsageError(
            f"PEFT adapts none of the residual writers of {lm.name} ({writers[0].weight} for one).",
            "Use --export merged.",
        )


def export(
    run: Run,
    kind: Format,
    out: Path,
    spec: ExportSpec = ExportSpec(),
    *,
    lm: LanguageModel | None = None,
    progress: Progress[Any] = silent,
) -> Exported:
    """Write a run's edit to `out` in a format, with its card and provenance.

    `out` must be new or an empty folder, and appears whole or not at all: a folder; for GGUF a folder,
    or a file when it ends in `.gguf` and is no folder, with the card in `NAME.md` beside it. `lm` is the
    run's model where it is in memory; for `merged` it stays edited. Raises children of `SaberError`.
    """
    check_formats([kind])
    started = perf_counter()
    # Nothing is computed with what is loaded here, so it is in a dtype that holds it.
    unpack = spec.load.dequantize or bool(_loading(run).get("dequantize"))
    spec = replace(spec, load=replace(spec.load, dtype="auto", dequantize=unpack))
    if lm is None:
        _require_sense(run, kind, spec)
    else:
        spec = replace(spec, load=replace(spec.load, revision=lm.revision or ""))
    single = out.suffix == ".gguf" and not out.is_dir()
    if single and not kind.startswith("gguf"):
        raise UsageError(f"--format {kind} writes a folder, and {out} names a file.")
    card = out.with_suffix(".md") if single else out / CARD
    _require_free(out, card, single)
    if single:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot create {out.parent}: {error.strerror}.") from error
        with artifacts.claimed(out):
            _require_free(out, card, single)
            try:
                written = _gguf(run, kind, out, spec, progress)
                artifacts.write_text(card, written.card)
            except BaseException:  # a file and its card are there together, or neither is
                for path in (out, card):
                    path.unlink(missing_ok=True)
                raise
    elif kind == "merged":
        written = _merged(run, out, spec, lm)
    else:
        with artifacts.staged_folder(out) as part:
            write = _lora if kind == "lora" else _gguf
            file = part if kind == "lora" else part / _file_name(run, kind, spec)
            written = write(run, kind, file, spec, progress)
            artifacts.write_text(part / CARD, written.card)
    inside = [out, card] if single else [p for p in out.rglob("*") if p.is_file()]
    return Exported(
        kind,
        out,
        card,
        sum(p.stat().st_size for p in inside),
        perf_counter() - started,
        written.notes,
        written.tensors,
    )


def _require_sense(run: Run, kind: Format, spec: ExportSpec) -> None:
    """Raise children of `UsageError` for a revision of what is no hub model."""
    if spec.load.revision and kind.startswith("gguf"):
        raise UsageError(
            f"--revision does nothing with --format {kind}, which builds on a file.",
            "Leave it out.",
        )
    require_hub(spec.base or str(run.model["name"]), spec.load.revision)


def _at_commit(run: Run, name: str, spec: LoadSpec) -> LoadSpec:
    """Return how to load a model: the run's own as it was for the run, where the cache has that commit."""
    return replace(spec, revision=spec.revision or cached_commit(run.record, name))


def _require_free(out: Path, card: Path, single: bool) -> None:
    """Raise `OutputError` where the folder, or the file and its card, would take another's place."""
    for path in (out, card) if single else (out,):
        artifacts.require_free(path, file=single)


def export_all(
    run: Run,
    kinds: Sequence[str],
    folder: Path,
    *,
    lm: LanguageModel,
    spec: LoadSpec,
    progress: Progress[Any] = silent,
) -> Iterator[dict[str, Any]]:
    """Write several formats into a finished run's folder, the merged one last; yield what to record of each.

    Files of an interrupted run are replaced. `spec` is what the model was loaded with. The model in
    memory stays edited if one is `merged`, unless that is written off files or its weights are read again.
    Raises `OutputError` for whatever goes wrong, which says how to write what is missing.
    """
    order = sorted((k for k in FORMATS if k in kinds), key=lambda k: k == "merged")
    for index, kind in enumerate(order):
        out = folder / PLACES[kind]
        later = " && ".join(commands(order[index:], folder, spec))
        try:
            shutil.rmtree(out, ignore_errors=True)
            done = export(
                run, kind, out, ExportSpec(partial=True, load=spec), lm=lm, progress=progress
            )
        except Exception as error:  # the run is finished, and this says how to go on
            raise OutputError(
                f"the run in {folder} is finished, but not its export as {kind}: {_told(error)}",
                f"Go on with: {later}" if run.plan.factors else "Its plan changes nothing.",
            ) from error
        except KeyboardInterrupt:
            raise ExportInterrupted(folder, left_of(out), later) from None
        yield done.row(folder)


def left_of(out: Path) -> Path | None:
    """Return what an export that was stopped twice has left of `out`; None after any other."""
    part = out.with_name(f".{out.name}.part")
    return part if part.exists() else None


def _told(error: Exception) -> str:
    """Return an error as one sentence."""
    if isinstance(error, SaberError):
        return error.problem
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}{f': {first}' if first else ''}".rstrip(".") + "."


def commands(kinds: Sequence[str], folder: Path, spec: LoadSpec) -> list[str]:
    """Return the commands that write formats into a run folder, as the run would have."""
    return [_command(kind, folder, spec) for kind in kinds]


def _command(kind: str, folder: Path, spec: LoadSpec) -> str:
    """Return the command that writes a format into a run folder, as the run would have."""
    out = str(folder / PLACES[kind])
    words = ["saber", "export", str(folder), "--format", kind, "--out", out]
    words += [] if kind == "merged" else ["--partial"]
    words += ["--chat-template", spec.chat_template] if spec.chat_template else []
    words += ["--trust-remote-code"] if spec.trust_remote_code else []
    words += ["--offload"] if spec.offload else []
    return shlex.join(words)


@dataclass(frozen=True)
class _Written:
    """What a writer hands back."""

    card: str
    notes: tuple[str, ...]
    tensors: tuple[Rounding, ...] = ()


def _file_name(run: Run, kind: str, spec: ExportSpec) -> str:
    stem = _gguf_path(run, spec)[0].stem
    return f"{stem}-saber{'-lora' if kind == 'gguf-lora' else ''}.gguf"


def _same_model(run: Run, lm: LanguageModel, force: bool) -> tuple[str, ...]:
    """Hold the base against the run's fingerprint; return what to note."""
    if is_of(run.model["fingerprint"], lm):
        return ()
    if not force:
        commit = commit_of(run.record, lm.name)
        way = f"--revision {commit}" if commit else "--base"
        raise ModelError(
            f"{lm.name} is not the model that the run was made on (another fingerprint).",
            f"Give that model with {way}, or --force to build on this one all the same.",
        )
    note = f"Built on {lm.name}, which is NOT the model of the run (another fingerprint)."
    return (_placeless(note, Path(lm.name)),)


def _merged(run: Run, out: Path, spec: ExportSpec, lm: LanguageModel | None) -> _Written:
    name = spec.base or str(run.model["name"])
    notes: tuple[str, ...] = ()
    files, reason = (None, "") if spec.load.revision and lm is None else _files(run, name, out, lm)
    if lm is None and not (files and files.same):
        lm = load(name, _at_commit(run, name, spec.load))
        notes = _same_model(run, lm, spec.force)
        files, reason = _files(run, name, out, lm)  # they may be there only now
    elif files and not files.same:
        reason = _placeless(f"the files of {name} were changed since they were read.", Path(name))
        files = None
    where = origin(run.record, run.plan)
    if files is not None:
        where["base_checkpoint"] = files.mark
        notes += fetch_rest(name, files.source.folder)
        skipped = cargo(files.source, ()).skipped
        if skipped:
            shown = f"{', '.join(skipped[:5])}{' ...' if skipped[5:] else ''}"
            notes += (f"Left behind, as they hold unedited weights in another form: {shown}",)
        text = export_card("merged", out, run.record, where, notes)
        write_merged(files, out, where, lambda old: text + behind(old), _template(run, spec, lm))
        return _Written(text, notes)
    assert lm is not None
    if reason:
        notes += (f"Weights, tokenizer and configuration as transformers saves them: {reason}",)
    others = files_folder(name, getattr(lm.model.config, "_commit_hash", None))
    if others is not None and lies_in(out, others):
        others = None  # the run is one of its folders
    if others is not None:
        notes += fetch_rest(name, others)
    lm = as_stored(lm, spec.load)
    _weights_of(lm.model, run.plan)
    text = export_card("merged", out, run.record, where, notes)
    save_merged(lm, run.plan, out, where, {CARD: text}, others)
    return _Written(text, notes)


def _files(run: Run, name: str, out: Path, lm: LanguageModel | None) -> tuple[Files | None, str]:
    """Return the files that a merged model can be written off, or why it has to be from memory."""
    revision = getattr(lm.model.config, "_commit_hash", None) if lm else commit_of(run.record, name)
    stated = str(run.model.get("storage_dtype", "float32"))
    dtype = lm.stored_dtype if lm else getattr(torch, stated, torch.float32)
    try:
        return files_of(run.folder, name, revision, out, dtype), ""
    except SaberError as error:
        folder = files_folder(name, revision)  # of a hub model somewhere in the cache
        text = error.problem.replace(str(folder), name) if folder else error.problem
        return None, _placeless(text, run.folder, out, Path(name))


def _placeless(text: str, *paths: Path | None) -> str:
    """Return text for a card, which may be published: of paths on this machine the last part alone."""
    for path in paths:
        if path is not None and path.is_absolute():
            text = text.replace(str(path), path.name)
    return text


def _loading(run: Run) -> Mapping[str, Any]:
    """Return how a run loaded its model, as it says; empty where it does not."""
    return (run.record.get("config") or {}).get("load") or {}


def _template(run: Run, spec: ExportSpec, lm: LanguageModel | None) -> dict[str, str]:
    """Return the chat template that stood in for the checkpoint's own, as the file that holds it."""
    given = spec.load.chat_template or str(_loading(run).get("chat_template") or "")
    if not given:
        return {}
    return {TEMPLATE: lm.tokenizer.chat_template if lm else read_template(Path(given))}


def _weights_of(model: Any, plan: EditPlan) -> None:
    """Refuse a model that has no such weights, before anything of it is changed."""
    layout(model, plan)


def _lora(run: Run, _kind: str, folder: Path, spec: ExportSpec, _progress: Any) -> _Written:
    name = spec.base or run.model["name"]
    notes: tuple[str, ...] = ()
    at = _at_commit(run, name, spec.load)
    named = spec.base or at.revision not in ("", run.model.get("revision"))
    if named and not spec.force:
        # A base that the user names is held against the run; its own is taken at its word.
        notes = _same_model(run, load(name, at, tokenizer=False), spec.force)
    elif named:
        note = f"{name} was not held against the model of the run (--force)."
        notes = (_placeless(note, Path(name)),)
    model = skeleton(name, at)
    where = layout(model, run.plan, placeless(model))
    if where.lost:
        notes += (_lost("a PEFT LoRA adapter", where.lost, spec.partial),)
    if run.model.get("source") == "demo":
        notes += (
            "The base is the demo model: SmolLM2 with the adapter that makes it refuse merged in.",
        )
    meta = origin(run.record, run.plan)
    base = str(name if run.model.get("source") == "demo" else run.model.get("base") or name)
    commit = str(run.model.get("revision") or "") if _loading(run).get("revision") else ""
    write_lora(model, run.plan, where, folder, base, meta, commit)
    return _Written(export_card("lora", folder, run.record, meta, notes), notes)


def _lost(what: str, names: Sequence[str], partial: bool) -> str:
    if not partial:
        raise UsageError(
            f"{what} cannot hold the change of {few(names)}.",
            "Use --format merged, or --partial to write all the rest.",
        )
    return f"NOT in it, as the format has no place for them: {', '.join(names)}."


def _gguf_path(run: Run, spec: ExportSpec) -> tuple[Path, bool]:
    """Return the GGUF file to build on, and whether it lacks the demo's adapter."""
    own = run.model.get("source")
    if spec.base == "demo" or (not spec.base and own == "demo"):
        return demo.base_gguf(), True
    if spec.base:
        if not artifacts.names_gguf(spec.base):
            raise UsageError(f"--base {spec.base} is no .gguf file.", "Give one to build on.")
        return expanded(spec.base), False
    if own == "gguf":
        return expanded(run.model["name"]), False
    raise UsageError(
        f"this run was made on {run.model['name']}, which is no .gguf file.",
        "Give the model as GGUF with --base FILE.gguf.",
    )


def _gguf(run: Run, kind: str, out: Path, spec: ExportSpec, progress: Progress[Any]) -> _Written:
    path, lacks_adapter = _gguf_path(run, spec)
    file = open_gguf(path)
    gguf_fit.require_architecture(file, str(run.model.get("model_type", "")))
    edits = changes(file, run.plan)
    notes = _matches(run, file, edits, spec)
    if lacks_adapter:
        edits = changes(file, demo_adapter() + run.plan)
        notes += (
            "The base file is plain SmolLM2: the adapter that makes the demo model refuse is part of "
            "what is added to it, together with the edit.",
        )
    meta = origin(run.record, run.plan)
    if kind == "gguf-lora":
        lost = [c.tensor.name for c in edits if c.bias]
        if lost:
            notes += (_lost("a GGUF LoRA", lost, spec.partial),)
        rank = write_gguf_lora(file, [c for c in edits if not c.bias], out, meta)
        notes += (
            f"Rank {rank} at most, in float32; for {path.name} and other types of that model.",
        )
        return _Written(export_card(kind, out, run.record, meta, notes), notes)
    typed = gguf_fit.choose(file, edits, spec.type)
    report = rewrite(file, out, typed, meta, _counting(progress, len(file.tensors)))
    notes += _said(report)
    return _Written(export_card(kind, out, run.record, meta, notes, report), notes, tuple(report))


def _counting(progress: Progress[Any], total: int) -> Callable[[GgufTensor], None]:
    """Return what moves a progress bar on by one tensor."""
    steps = iter(progress(range(total), "tensors", total))
    return lambda _tensor: next(steps, None)


def _said(report: Sequence[Rounding]) -> tuple[str, ...]:
    """Say which tensors were raised to another type, and where storing drowned the edit."""
    notes: list[str] = []
    raised = [r for r in report if r.after != r.before]
    if raised:
        types = ", ".join(sorted({f"{r.before} to {r.after}" for r in raised}))
        notes.append(
            f"{len(raised)} of {len(report)} changed tensors are stored in another type ({types})."
        )
    drowned = [r for r in report if r.kept < DROWNED]
    if drowned:
        worst = min(drowned, key=lambda r: r.kept)
        notes.append(
            f"Storing drowned the edit in {len(drowned)} of {len(report)} tensors: of {worst.name} "
            f"({worst.after}) {max(worst.kept, 0):.0%} is left. Use --type auto or q8_0."
        )
    return tuple(notes)


def _matches(
    run: Run, file: GgufFile, edits: Sequence[Change], spec: ExportSpec
) -> tuple[str, ...]:
    """Hold the file's weights against samples of the run's; return what to note."""
    if spec.force:
        return ("The base file was not held against the model of the run (--force).",)
    sketch = run.sketch
    if sketch is None:
        # A run of an older version kept no samples: its model is asked.
        name, there = run.model["name"], replace(spec.load, device="cpu")
        lm = load(name, _at_commit(run, name, there), tokenizer=False)
        _same_model(run, lm, False)
        sketch = take(lm.model, run.plan)
    gguf_fit.require_alike(file, edits, sketch)
    return ()


def demo_adapter() -> EditPlan:
    """Return the adapter that makes the demo refuse, as a plan: its GGUF file lacks it."""
    with as_file(files("saber.lm") / "data" / "demo_adapter") as folder:
        return read_lora(folder)
