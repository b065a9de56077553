"""An edit plan against tensors in files: what each factor changes there, read a factor at a time."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from saber import artifacts
from saber.checkpoint import fp8
from saber.checkpoint.origin import factors_hash
from saber.checkpoint.shards import Source, fingerprint, read_source
from saber.errors import DataError, ModelError, SaberError
from saber.paths import expanded
from saber.saved_plan import KIND, require_factors, require_meta

if TYPE_CHECKING:
    from saber.ablation import EditPlan
    from saber.lm.disk import Piece
    from saber.lm.model import LanguageModel

FILE, SCHEMA = "disk.json", 1


@dataclass(frozen=True)
class TensorEdit:
    """What changes one tensor in the files."""

    factor: str
    """Name of the factor in the plan."""
    part: str
    """weight or bias."""
    axis: int
    """Axis of the parameter in memory along which d_model lies."""
    shape: tuple[int, ...]
    """Shape of the tensor in the files."""
    start: tuple[int, ...]
    """Where it begins in the parameter in memory, by axis of the parameter."""
    axes: tuple[int, ...]
    """Axis of the parameter that each of its own axes runs along; -1 for one of length 1 of its own."""

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The tensor as (rows, d_model, columns): its sizes before, along and behind the d_model axis."""
        own = self.axes.index(self.axis)
        before = after = 1
        for length in self.shape[:own]:
            before *= length
        for length in self.shape[own + 1 :]:
            after *= length
        return before, self.shape[own], after


def save(folder: Path, lm: LanguageModel, plan: EditPlan) -> None:
    """Write beside a plan where its factors lie in checkpoint files, and the base's fingerprint there.

    The fingerprint is that of the safetensors folder the model was loaded from; there is none for a
    GGUF file or the demo, which no plan can be applied to as files.
    """
    from saber.lm.disk import Layout

    layout = Layout(lm.model)

    def pieces(name: str) -> list[list[dict[str, Any]]]:
        return [[_plain(p) for p in alias] for alias in layout.pieces(name)]

    rows: dict[str, Any] = {}
    for name, factor in plan.factors.items():
        rows[name] = {"weight": pieces(factor.weight or f"{name}.weight")}
        if factor.bias is not None:
            rows[name]["bias"] = pieces(factor.bias_name or f"{name}.bias")
    value = {"schema": SCHEMA, "checkpoint": checkpoint_mark(lm), "factors": rows}
    artifacts.write_text(folder / FILE, json.dumps(value, separators=(",", ":")) + "\n")


def _plain(piece: Piece) -> dict[str, Any]:
    return dataclasses.asdict(piece)


def checkpoint_mark(lm: LanguageModel) -> str | None:
    """Return the fingerprint of the safetensors files that a model was loaded from, None without any."""
    folder = files_folder(lm.name, getattr(lm.model.config, "_commit_hash", None))
    if folder is None:
        return None
    try:
        return fingerprint(read_source(folder))
    except SaberError:
        return None  # other files than transformers' usual ones; apply says so


def files_folder(name: str, revision: str | None = None) -> Path | None:
    """Return the folder of a model's files, None where it has none (the demo, GGUF, not downloaded)."""
    if name == "demo" or artifacts.names_gguf(name):
        return None
    path = expanded(name)
    if path.is_dir():
        return path
    return None if path.exists() or name.count("/") != 1 else hub_folder(name, revision)


def commit_of(record: Mapping[str, Any], name: str) -> str | None:
    """Return the commit of a hub model that a run with this record was made on, None for another model."""
    model = record.get("model") or {}
    commit = model.get("revision") if model.get("name") == name else None
    return str(commit) if commit else None


def cached_commit(record: Mapping[str, Any], name: str) -> str:
    """Return the commit of a hub model that a run with this record was made on, empty where it is not in the
    cache, or the run was made on another model."""
    commit = commit_of(record, name)
    return commit if commit and files_folder(name, commit) else ""


def hub_folder(name: str, revision: str | None = None) -> Path | None:
    """Return the cached folder of a hub model, None when there is none."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


@dataclass(frozen=True)
class DiskPlan:
    """A saved plan with the places of its factors in checkpoint files; factors stay in their file."""

    folder: Path
    """Where the plan lies."""
    meta: Mapping[str, Any]
    """What was saved with it."""
    checkpoint: str | None
    """Fingerprint of the files that it was made from."""
    factors: Mapping[str, Any]
    """Name of the factor -> part -> its pieces under each of the parameter's names."""

    @classmethod
    def read(cls, folder: Path) -> DiskPlan:
        """Read a saved plan; raises `DataError` when the folder holds none that can be applied to files."""
        meta = artifacts.read_meta(folder, KIND)
        require_meta(folder, meta)
        if not (folder / FILE).is_file():
            raise DataError(
                f"the plan in {folder} was saved by an older version and does not say where its "
                "factors lie in a checkpoint's files.",
                "Make the run again, or use its merged model.",
            )
        disk = artifacts.read_json(folder / FILE)
        try:
            factors = {name: _places(parts) for name, parts in disk["factors"].items()}
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DataError(
                f"{folder / FILE} does not say where the factors lie.", artifacts.DAMAGED
            ) from error
        if disk.get("schema") != SCHEMA or factors.keys() != meta["axes"].keys():
            raise DataError(
                f"{folder / FILE} does not belong to the plan beside it.", artifacts.DAMAGED
            )
        return cls(folder, meta, disk.get("checkpoint"), factors)

    def edits(self, source: Source) -> dict[str, TensorEdit]:
        """Return what changes each tensor of a checkpoint, by its name there.

        Raises `ModelError` when a factor has no tensor of its own in the files, when tensors are
        missing, or when one has another shape than the plan's.
        """
        found: dict[str, TensorEdit] = {}
        names = source.place
        for factor, parts in self.factors.items():
            for part, aliases in parts.items():
                whole = [alias for alias in aliases if alias]
                if not whole:
                    raise ModelError(
                        f"{factor} ({part}) has no tensor of its own in the files: they weave it "
                        "together with others.",
                        "Use the run's merged model, or saber export RUN --format merged.",
                    )
                called = [*whole, *(in_bare(alias, names) for alias in whole)]
                present = [alias for alias in called if all(p["name"] in names for p in alias)]
                if not present:
                    missing = next(p["name"] for p in whole[0] if p["name"] not in names)
                    if fp8.method(source.config):
                        raise fp8.refusal(source, missing)
                    raise ModelError(
                        f"{source.folder} has no tensor {missing}, which the plan changes "
                        f"({factor}).",
                        "Apply the plan to the model that it was made from.",
                    )
                for piece in (p for alias in present for p in alias):
                    found[piece["name"]] = self._edit(source, factor, part, piece)
        fp8.check(source, found)
        return found

    def _edit(self, source: Source, factor: str, part: str, piece: Mapping[str, Any]) -> TensorEdit:
        stored = source.stored(piece["name"])
        assert stored is not None
        if list(stored.shape) != piece["shape"]:
            raise ModelError(
                f"{stored.name} has shape {list(stored.shape)} in {source.folder}, "
                f"but {piece['shape']} in the plan.",
                "Apply the plan to the model that it was made from.",
            )
        axis = self.meta["axes"][factor] if part == "weight" else len(piece["start"]) - 1
        return TensorEdit(
            factor, part, axis, stored.shape, tuple(piece["start"]), tuple(piece["axes"])
        )

    def open(self) -> Factors:
        """Return the factors, to be read one at a time; raises `DataError` where they cannot be."""
        factors = Factors(self.folder / artifacts.TENSORS)
        require_factors(self.folder, self.meta["axes"], factors.shapes())
        return factors

    def hash(self) -> str:
        """Return a SHA-256 over the names, layouts and float32 values of the factors."""
        names, factors = self.meta.get("names", {}), self.open()
        known = factors.shapes()

        def parts(name: str) -> Iterator[Tensor]:
            for part in ("left", "right", "bias"):
                if f"{name}.{part}" in known:
                    yield factors.read(f"{name}.{part}", (slice(None),))

        return factors_hash(
            ([name, axis, *(names.get(name) or ("", ""))], parts(name))
            for name, axis in sorted(self.meta["axes"].items())
        )


def in_bare(alias: Sequence[dict[str, Any]], names: Collection[str]) -> list[dict[str, Any]]:
    """Return pieces under their names in files of the decoder alone, as GPT-2's own on the hub are.

    There what holds the decoder in memory (`transformer.`, `model.`) is in no name, and transformers adds it.
    """
    holders = {piece["name"].partition(".")[0] + "." for piece in alias}
    if any(name.startswith(tuple(holders)) for name in names):
        return list(alias)
    return [{**piece, "name": piece["name"].partition(".")[2]} for piece in alias]


def _places(parts: Mapping[str, Any]) -> dict[str, list[list[dict[str, Any]]]]:
    """Return a factor's pieces by part and alias as they were saved; raises where they are damaged."""
    return {
        part: [[_piece(piece) for piece in alias] for alias in aliases]
        for part, aliases in parts.items()
    }


def _piece(piece: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {key: [int(n) for n in piece[key]] for key in ("shape", "start", "axes")}
    return {"name": str(piece["name"]), **numbers}


@dataclass(frozen=True)
class Factors:
    """A plan's factors in their file.

    It is opened anew for each read: what safetensors maps into memory stays there until it is closed.
    """

    path: Path
    """The file."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all parts of factors by their names."""
        with self._opened() as file:
            names = file.keys()
            return {name: tuple(file.get_slice(name).get_shape()) for name in names}

    def read(self, name: str, window: tuple[slice, ...]) -> Tensor:
        """Return some of a part of a factor."""
        with self._opened() as file:
            value: Tensor = file.get_slice(name)[window]
            return value

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        try:
            with safe_open(self.path, "pt") as file:
                yield file
        except (OSError, SafetensorError) as error:
            raise DataError(f"{self.path} cannot be read ({error}).", artifacts.DAMAGED) from error

    def left(self, edit: TensorEdit) -> Tensor:
        """Return the output side of a tensor's change, (d_model, k)."""
        begin = edit.start[edit.axis]
        return self.read(f"{edit.factor}.left", (slice(begin, begin + edit.sizes[1]),))

    def right(self, edit: TensorEdit) -> Tensor:
        """Return the input side of a tensor's change, (k, rows, columns) as in `TensorEdit.sizes`."""
        rest = [axis for axis in range(len(edit.start)) if axis != edit.axis]
        lengths = {axis: n for axis, n in zip(edit.axes, edit.shape, strict=True) if axis >= 0}
        begins = [edit.start[axis] for axis in rest]
        window = [slice(b, b + lengths.get(a, 1)) for a, b in zip(rest, begins, strict=True)]
        value = self.read(f"{edit.factor}.right", (slice(None), *window))
        order = [1 + rest.index(axis) for axis in edit.axes if axis not in (-1, edit.axis)]
        order += [1 + i for i in range(len(rest)) if 1 + i not in order]
        rows, _, columns = edit.sizes
        return value.permute(0, *order).reshape(len(value), rows, columns)

    def bias(self, edit: TensorEdit) -> Tensor:
        """Return the change of a bias in the layout of the files."""
        lengths = {axis: n for axis, n in zip(edit.axes, edit.shape, strict=True) if axis >= 0}
        window = tuple(slice(b, b + lengths.get(a, 1)) for a, b in enumerate(edit.start))
        value = self.read(f"{edit.factor}.bias", window)
        order = [axis for axis in edit.axes if axis >= 0]
        order += [axis for axis in range(value.ndim) if axis not in order]
        return value.permute(order).reshape(edit.shape)
