"""The configuration of a run: one frozen tree, defaults < preset < TOML file < flags."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from saber.ablation import EditSpec
from saber.entanglement import EntanglementSpec
from saber.errors import UnknownName, UsageError
from saber.evaluation.judging import REFUSAL, JudgeSpec
from saber.evaluation.measure import EvaluationSpec
from saber.lm.load import LoadSpec
from saber.lm.marks import THOUGHT_TOKENS
from saber.passes import RefineSpec
from saber.probing import ProbeSpec
from saber.spectral import SpectralSpec


@dataclass(frozen=True)
class DataSpec:
    """Which prompts; an empty name takes the bundled set. Files: .txt .jsonl .csv .parquet, or hub ids."""

    target: str = ""
    """Prompts that show the behaviour."""
    neutral: str = ""
    """Prompts that do not."""
    eval_target: str = ""
    """Targets to measure on; by default the held-out split of `target`."""
    eval_neutral: str = ""
    """Neutral prompts to measure on; by default the held-out split of `neutral`."""
    borderline: str = ""
    """Safe prompts that sound unsafe."""
    everyday: str = ""
    """Ordinary requests of many kinds, whose answers must stay as they are: preserved by a selective edit
    in removal mode, and reported on; `none` for none."""
    behaviour: str = REFUSAL
    """What targets show, in a word or two, for reports."""
    mode: Literal["removal", "over-refusal"] = "removal"
    """removal: targets lose the behaviour; over-refusal: borderline prompts that show it lose it, and
    targets keep it."""
    keep: tuple[str, ...] = ()
    """Files of prompts whose answers must not change."""
    retain: tuple[str, ...] = ()
    """Target categories that keep the behaviour."""
    limit: int = 0
    """Measure on at most this many prompts of each held-out set; 0 takes all."""
    battery: Literal["all", "half"] = "all"
    """Checkable questions to report on: all, or the half by which no sweep chooses."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's result."""

    preset: str = "default"
    """Name of the preset the other values started from."""
    seed: int = 0
    """Seed of splits, nulls and bootstraps."""
    minimum_rate: float = 0.2
    """Least rate of the behaviour on validation targets for which an edit makes sense, 0 to 1."""
    data: DataSpec = field(default_factory=DataSpec)
    """Prompts."""
    load: LoadSpec = field(default_factory=LoadSpec)
    """Device and dtype."""
    probe: ProbeSpec = field(default_factory=ProbeSpec)
    """Stage 1."""
    spectral: SpectralSpec = field(default_factory=SpectralSpec)
    """Stage 2."""
    entanglement: EntanglementSpec = field(default_factory=EntanglementSpec)
    """Stage 3."""
    edit: EditSpec = field(default_factory=EditSpec)
    """Stage 4."""
    refine: RefineSpec = field(default_factory=RefineSpec)
    """Stage 5."""
    evaluation: EvaluationSpec = field(default_factory=EvaluationSpec)
    """Measuring."""
    judging: JudgeSpec = field(default_factory=JudgeSpec)
    """Settings of the judge."""


_ORTHOGONAL = RunConfig(
    preset="orthogonal",
    spectral=SpectralSpec(
        method="covariance", components=3, depth_low=0.2, depth_high=0.8, resolve="energy"
    ),
    edit=EditSpec(kind="orthogonal"),
    refine=RefineSpec(passes=3, top_k=10, shortlist=20, stop_rate=0.05),
)
PRESETS: dict[str, RunConfig] = {
    "default": RunConfig(),
    "orthogonal": _ORTHOGONAL,
    "card": replace(
        _ORTHOGONAL,
        preset="card",
        spectral=replace(_ORTHOGONAL.spectral, method="svd"),
        edit=replace(_ORTHOGONAL.edit, alpha=0.85),
        refine=RefineSpec(
            passes=5, top_k=10, per_layer=0, decay=0.15, shortlist=0, stop="never", max_q=1.0
        ),
    ),
}

_LIMITS: dict[str, tuple[float, float]] = {
    "seed": (0, 2**31 - 1),
    "minimum_rate": (0, 1),
    "data.limit": (0, 1e9),
    "probe.positions": (1, 64),
    "probe.answer_tokens": (1, 256),
    "spectral.components": (1, 64),
    "spectral.depth_low": (0, 1),
    "spectral.depth_high": (0, 1),
    "spectral.capability_weight": (0, 1e6),
    "spectral.resolve_energy": (1e-6, 1e6),
    "spectral.folds": (2, 20),
    "spectral.permutations": (20, 100_000),
    "entanglement.components": (1, 512),
    "entanglement.weight": (0, 1e9),
    "entanglement.null_draws": (20, 100_000),
    "edit.alpha": (0, 1),
    "edit.lambda": (0, 1e9),
    "edit.ridge": (0, 1),
    "edit.sensitivity": (0, 4),
    "edit.memory": (0, 1e6),
    "edit.skip_below": (0, 1),
    "refine.passes": (1, 100),
    "refine.top_k": (0, 10_000),
    "refine.per_layer": (0, 10_000),
    "refine.shortlist": (0, 10_000),
    "refine.decay": (0, 1),
    "refine.max_q": (0, 1),
    "refine.stop_rate": (0, 1),
    "evaluation.max_new_tokens": (4, 4096),
    "evaluation.battery_new_tokens": (4, 4096),
    "judging.threshold": (0, 1),
    "judging.timeout": (0.01, 3600),
    "judging.retries": (0, 20),
    "judging.parallel": (1, 64),
}


def preset(name: str) -> RunConfig:
    """Return a preset by name; raises `UnknownName`."""
    if name not in PRESETS:
        raise UnknownName("preset", name, list(PRESETS))
    return PRESETS[name]


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML configuration into a nested mapping; raises `UsageError` that names the fault."""
    name = "tomllib" if sys.version_info >= (3, 11) else "tomli"
    toml = importlib.import_module(name)
    try:
        return dict(toml.loads(path.read_text(encoding="utf-8-sig")))
    except OSError as error:
        raise UsageError(f"cannot read the configuration {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}.") from error


def override(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """Return the configuration with nested values replaced; unknown names and bad values raise."""
    result: RunConfig = _merge(config, values, "")
    validate(result)
    return result


def require_behaviour(config: RunConfig, *given: Mapping[str, Any]) -> None:
    """Raise `UsageError` where what own targets show is not named, and the judge need not be of refusals.

    The default name is that of refusals, with their warnings and tags; `given` is what replaced defaults.
    """
    judge = config.evaluation.judge
    named = any("behaviour" in values.get("data", {}) for values in given)
    if config.data.target and judge != "phrases" and not named:
        raise UsageError(
            f"--target with --judge {judge} needs a name for what the targets show.",
            'Give --behaviour, such as --behaviour "numbered list"; --behaviour refusal if it is that.',
        )


def require_empty_thoughts(config: RunConfig) -> None:
    """Raise `UsageError` where the model is to think, for what finds edits or makes them."""
    if config.load.thinking:
        raise UsageError(
            "--thinking does not go with this command: edits are found at the first token of the answer, "
            "behind an empty thought.",
            "Leave it out; then measure what was edited: saber eval MODEL --thinking.",
        )


def with_room(config: RunConfig, *given: Mapping[str, Any]) -> RunConfig:
    """Return the configuration with room for thoughts in the answers, where the model is to think.

    That is `THOUGHT_TOKENS` for judged answers, and for those of the battery no less than for these; a
    length that is among the `given` values stays.
    """
    if not config.load.thinking:
        return config
    named = {name for values in given for name in values.get("evaluation", {})}
    spec = config.evaluation
    if "max_new_tokens" not in named:
        spec = replace(spec, max_new_tokens=THOUGHT_TOKENS)
    if "battery_new_tokens" not in named:
        most = max(spec.max_new_tokens, spec.battery_new_tokens)
        spec = replace(spec, battery_new_tokens=most)
    return replace(config, evaluation=spec)


def _merge(node: Any, values: Mapping[str, Any], path: str) -> Any:
    # A trailing underscore keeps a field off a word of the language; nobody else sees it.
    known = {f.name.rstrip("_"): f.name for f in dataclasses.fields(node)}
    types_of = typing.get_type_hints(type(node))
    changes: dict[str, Any] = {}
    for name, value in values.items():
        where = f"{path}{name}"
        if name not in known:
            raise UnknownName("setting", where, [f"{path}{k}" for k in known])
        field_name = known[name]
        current = getattr(node, field_name)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, Mapping):
                raise UsageError(f"setting {where} is a table, not {value!r}.")
            changes[field_name] = _merge(current, value, f"{where}.")
        else:
            changes[field_name] = _convert(value, types_of[field_name], where)
    return dataclasses.replace(node, **changes)


def _convert(value: Any, kind: Any, where: str) -> Any:
    """Check one value against the field's type; text from flags is converted."""
    if typing.get_origin(kind) is typing.Literal:
        options = typing.get_args(kind)
        if value not in options:
            raise UnknownName(f"value for {where}", str(value), [str(o) for o in options])
        return value
    if typing.get_origin(kind) is tuple:
        items = value.split(",") if isinstance(value, str) else value
        if typing.get_args(kind)[0] is int:
            return _counts(items, where)
        if not isinstance(items, list | tuple) or not all(isinstance(i, str) for i in items):
            raise UsageError(f"setting {where} needs a list of names, not {value!r}.")
        return tuple(item.strip() for item in items if item.strip())
    if isinstance(kind, types.UnionType):
        raise UsageError(f"setting {where} cannot be set from outside.")
    if kind is str and not isinstance(value, str):
        raise UsageError(f"setting {where} needs text, not {value!r}.")
    try:
        if kind is bool:
            if isinstance(value, bool):
                return value
            return {"true": True, "false": False}[str(value).lower()]
        if kind is int and isinstance(value, (bool, float)):
            raise ValueError
        if kind is float and isinstance(value, bool):
            raise ValueError
        return kind(value)
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise UsageError(f"setting {where} needs {kind.__name__}, not {value!r}.") from error


def _counts(items: Any, where: str) -> tuple[int, ...]:
    """Check a list of whole numbers above 0."""
    given = items if isinstance(items, list | tuple) else [items]
    found = [str(item).strip() for item in given if str(item).strip()]
    if not all(text.isdecimal() and len(text) < 10 and int(text) > 0 for text in found):
        raise UsageError(
            f"setting {where} needs whole numbers above 0 with commas between them, not {items!r}."
        )
    return tuple(int(text) for text in found)


def value_of(config: RunConfig, name: str) -> Any:
    """Return the value of a field by its dotted name."""
    node: Any = config
    for part in name.split("."):
        node = getattr(node, part) if hasattr(node, part) else getattr(node, f"{part}_")
    return node


def validate(config: RunConfig) -> None:
    """Check every bounded number; raises `UsageError` that gives the range."""
    for path, (low, high) in _LIMITS.items():
        value = value_of(config, path)
        if not low <= value <= high:
            raise UsageError(
                f"setting {path} is {value}; it must lie between {low:g} and {high:.10g}."
            )
    gated = config.data.keep or config.data.retain or config.data.mode != "removal"
    if gated and config.edit.kind != "selective":
        raise UsageError(
            "--keep, --retain and --mode over-refusal need an edit that can tell inputs apart.",
            "Use --edit selective.",
        )
    if config.edit.embeddings and config.edit.kind != "orthogonal":
        raise UsageError(
            "setting edit.embeddings has no effect on a selective edit.",
            "Use --edit orthogonal, or leave it off.",
        )
    if max(config.evaluation.lengths, default=1) > 4096:
        raise UsageError("setting evaluation.lengths goes beyond 4096 tokens.")
    if not config.data.behaviour.strip():
        raise UsageError("setting data.behaviour is empty.", "Say in a word what targets show.")
    if config.load.thinking and config.load.response_prefix:
        raise UsageError(
            "--response-prefix does not go with --thinking: it stands in place of the thought.",
            "Leave one of them out.",
        )
    if config.spectral.depth_low > config.spectral.depth_high:
        raise UsageError("setting spectral.depth_low lies above spectral.depth_high.")
    if config.load.offload and config.edit.kind == "selective" and config.edit.sensitivity:
        raise UsageError(
            "setting edit.sensitivity needs gradients, which layers in main memory do not have.",
            "Leave it at 0, or leave out --offload.",
        )


def resolved(config: RunConfig) -> dict[str, Any]:
    """Return the configuration as plain nested data, for artifacts."""

    def plain(node: Any) -> Any:
        if isinstance(node, tuple):
            # As it comes back from a file, so that what was saved compares equal.
            return list(node)
        if not isinstance(node, dict):
            return node
        return {name.rstrip("_"): plain(value) for name, value in node.items()}

    found: dict[str, Any] = plain(dataclasses.asdict(config))
    return found
