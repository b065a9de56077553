"""Hold a GGUF file or an adapter against the base it was built on, and against the plan that made it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from saber import artifacts
from saber.ablation import EditPlan
from saber.checkpoint import gguf_fit
from saber.checkpoint.checks import Check, Held, none_of
from saber.checkpoint.export import demo_adapter
from saber.checkpoint.gguf_compare import adapter_differs, compare, misfits, resemblance
from saber.checkpoint.gguf_file import OWN, Change, GgufFile, open_gguf
from saber.checkpoint.gguf_lora import ALPHA, header, largest_rank
from saber.checkpoint.gguf_names import changes
from saber.checkpoint.lora import CONFIG, WEIGHTS, layout, placeless, write_lora
from saber.checkpoint.sketch import ALIKE, Sketch
from saber.errors import DataError, ModelError, SaberError
from saber.lm.demo import base_gguf
from saber.lm.load import skeleton
from saber.paths import expanded

_MAY_DIFFER = {
    "base_model_name_or_path",
    "auto_mapping",
    "peft_version",
    "revision",
    "inference_mode",
    "task_type",
}
"""What an adapter's settings say beside what it does."""


def gguf_model(file: Path, base: str, plan: EditPlan | None) -> Held:
    """Hold every tensor of a GGUF file against the base's, with the plan's change where it has one.

    Without a plan what differs from the base has to resemble it. Raises `ModelError` where the base cannot
    be read, or is another model than the plan's.
    """
    source, found = _base(base), open_gguf(file)
    difference = compare(source, found, _changes(source, base, plan) if plan else ())
    other = "others" if difference.metadata else ""
    checks = [
        Check("metadata are the base's", not difference.metadata, other),
        none_of("tensors are the base's", difference.tensors, "others:"),
    ]
    if plan is None:
        changed = difference.untouched
        alike = resemblance(source, found, changed)
        unlike = [name for name in changed if not alike[name] >= ALIKE]
        checks.append(
            none_of("tensors that differ from the base's resemble them", unlike, "unlike:")
        )
        count = f"{len(changed)} of {len(source.tensors)}"
        left = f"that the {count} tensors that differ do so by the plan: give --run RUN as well"
        return Held(tuple(checks), (left,))
    kept, edited = (
        "tensors without an edit have the base's bytes",
        "edited tensors are the base's with the plan's change, to rounding",
    )
    checks.append(none_of(kept, difference.untouched, "others in"))
    checks.append(none_of(edited, difference.edited, "others in"))
    return Held(tuple(checks))


def gguf_adapter(file: Path, base: str, plan: EditPlan | None, sketch: Sketch | None) -> Held:
    """Hold llama.cpp's adapter against the plan, laid out for the base; without a plan against the base.

    `sketch` are samples of the weights that the plan was made on, which the base has to resemble. Raises
    `ModelError` where the base cannot be read, or is another model than the plan's.
    """
    source, found = _base(base), open_gguf(file)
    if plan is None:
        fits = none_of("tensors fit the base's", misfits(source, found), "others:")
        left = "that its tensors are the plan's: give --run RUN as well"
        return Held((_header(found, header(source, 0), but=ALPHA), fits), (left,))
    edits = _changes(source, base, plan)
    kept = [change for change in edits if not change.bias]
    checks = [
        _header(found, header(source, largest_rank(kept))),
        none_of("tensors are the plan's, bit for bit", adapter_differs(found, kept), "others:"),
    ]
    unchecked = []
    if sketch is None:
        unchecked.append(
            "that the base is the run's model: the run keeps no samples of its weights"
        )
    else:
        checks.append(_alike(source, changes(source, plan), sketch))
    lost = [change.tensor.name for change in edits if change.bias]
    if lost:
        unchecked.append(f"the change of {', '.join(lost)}, which such an adapter has no place for")
    return Held(tuple(checks), tuple(unchecked))


def peft_adapter(folder: Path, base: str, plan: EditPlan) -> Held:
    """Hold an adapter of PEFT against the plan's, made again for the base's configuration.

    Raises `ModelError` where the base has no place for the plan.
    """
    what = "tensors are the plan's, bit for bit"
    try:
        model = skeleton(base)
        refused = placeless(model)
    except SaberError as error:
        return Held((), (f"that {what}: {error.problem.rstrip('.')}",))
    where = layout(model, plan, refused)
    with TemporaryDirectory() as made:
        write_lora(model, plan, where, Path(made), base, {})
        settings, wanted = _settings(Path(made)), _tensors(Path(made))
    try:
        own, found = _settings(folder), _tensors(folder)
    except DataError as error:
        return Held((Check(what, False, error.problem),))
    other = sorted(n for n in {**wanted, **found} if not _same(found.get(n), wanted.get(n)))
    # What is empty or off may be left out by another version.
    unlike = sorted(
        k for k in {**settings, **own} if (settings.get(k) or None) != (own.get(k) or None)
    )
    checks = none_of("settings are the plan's", unlike, "others:"), none_of(what, other, "others:")
    lost = (f"the change of {', '.join(where.lost)}, which PEFT has no place for",)
    return Held(checks, lost if where.lost else ())


def _base(name: str) -> GgufFile:
    return open_gguf(base_gguf() if name == "demo" else expanded(name))


def _changes(source: GgufFile, base: str, plan: EditPlan) -> list[Change]:
    """Return what an export of a plan adds to a base; to the demo's the adapter that its file lacks."""
    return changes(source, demo_adapter() + plan if base == "demo" else plan)


def _header(found: GgufFile, wanted: Mapping[str, str | float], but: str = "") -> Check:
    """Check all metadata of an adapter that are not ours, but for one."""
    fields = found.reader.fields
    own = {n: f.contents() for n, f in fields.items() if not n.startswith((OWN, "GGUF."))}
    unlike = [n for n in {**wanted, **own} if n != but and own.get(n) != wanted.get(n)]
    return none_of("metadata are those of an adapter of the base", unlike, "others:")


def _alike(source: GgufFile, edits: list[Change], sketch: Sketch) -> Check:
    what = "the base's weights are those that the plan was made on"
    try:
        gguf_fit.require_alike(source, edits, sketch)
    except ModelError as error:
        return Check(what, False, error.problem)
    return Check(what, True)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b)


def _settings(folder: Path) -> dict[str, Any]:
    """Return what the settings of PEFT say that an adapter does; raises `DataError`."""
    given = artifacts.read_json(folder / CONFIG)
    return {
        key: sorted(value) if isinstance(value, list) else value
        for key, value in given.items()
        if key not in _MAY_DIFFER
    }


def _tensors(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{WEIGHTS} cannot be read ({error})") from error
