"""Where an edited checkpoint comes from: in its shards' metadata, a record of its files, and its card."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saber import artifacts
from saber.checkpoint.origin import called, stated
from saber.checkpoint.plan_on_disk import DiskPlan
from saber.checkpoint.runs import RUN, read_record
from saber.checkpoint.shards import Source, fingerprint, read_shard
from saber.errors import DataError, ModelError
from saber.notices import FILES

FILE, SCHEMA, KIND = "saber_provenance.json", 1, "provenance"
KEYS = (
    "base",
    "base_fingerprint",
    "base_checkpoint",
    "plan_hash",
    "config_hash",
    "config",
    "seed",
    "version",
    "run_version",
)
"""What an artifact carries: name and fingerprints of the base (in memory and in its files), hashes of
the plan and the configuration, the configuration itself, and the versions that wrote it and the plan."""


def origin(
    plan: DiskPlan, plan_hash: str, source: Source, record: Mapping[str, Any]
) -> dict[str, str]:
    """Return what an artifact made from a plan and a checkpoint carries, all of it as text."""
    model = record.get("model") or {}
    return stated(
        plan.meta.get("config") or {},
        base=called(model) or source.folder.name,
        base_fingerprint=plan.meta.get("fingerprint"),
        base_checkpoint=fingerprint(source),
        plan_hash=plan_hash,
        run_version=plan.meta.get("saber_version"),
    )


@dataclass(frozen=True)
class FileMark:
    """A file of an edited checkpoint."""

    sha256: str
    """Of its content."""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Record:
    """What `saber apply` wrote: the marker of a whole folder, and what `saber verify` checks."""

    origin: Mapping[str, str]
    """See `KEYS`."""
    edited: Sequence[str]
    """Names of the shards that were edited."""
    files: Mapping[str, FileMark]
    """By path in the folder."""
    skipped: Sequence[str] = ()
    """Files of the base that hold weights in other forms and were left behind."""
    rounding: Mapping[str, float] = field(default_factory=dict)
    """By 8-bit tensor: norm of the rounding error as a share of the edit's."""

    def save(self, folder: Path, *, sync: bool = True) -> None:
        """Write the record."""
        artifacts.write_json(
            folder / FILE,
            {
                "kind": KIND,
                "schema": SCHEMA,
                "origin": dict(self.origin),
                "edited": list(self.edited),
                "files": {n: {"sha256": m.sha256, "size": m.size} for n, m in self.files.items()},
                "skipped": list(self.skipped),
                "rounding": dict(self.rounding),
            },
            sync=sync,
        )

    @classmethod
    def load(cls, folder: Path) -> Record:
        """Read the record; raises `DataError` when it is missing or another's."""
        value = artifacts.read_json(folder / FILE)
        if value.get("kind") != KIND or value.get("schema") != SCHEMA:
            raise DataError(f"{folder / FILE} is not a record of this version.")
        try:
            files = {n: FileMark(m["sha256"], m["size"]) for n, m in value["files"].items()}
            edited, skipped = tuple(value["edited"]), tuple(value["skipped"])
            return cls(dict(value["origin"]), edited, files, skipped, dict(value["rounding"]))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DataError(f"{folder / FILE} is damaged.") from error


def carried(path: Path) -> dict[str, str]:
    """Return what an artifact carries in its own metadata: a safetensors or a GGUF file.

    Raises `ModelError` for one that is damaged.
    """
    if path.suffix == ".gguf":
        import gguf

        try:
            fields = gguf.GGUFReader(path).fields
        except (ValueError, KeyError, IndexError, OSError) as error:
            raise ModelError(
                f"{path} is truncated, damaged or no GGUF file ({error}).",
                "Copy it again, or make it anew.",
            ) from error
        found = {
            name: str(fields[f"saber.{name}"].contents())
            for name in KEYS
            if f"saber.{name}" in fields
        }
    else:
        found = {n: v for n, v in read_shard(path).metadata.items() if n in KEYS}
    return found


def run_record(plan: DiskPlan) -> dict[str, Any]:
    """Return the record of the run that made a plan, empty where none lies beside it (a plan on its own).

    Raises `DataError` for one that is damaged.
    """
    for folder in (plan.folder.absolute().parent, plan.folder):
        if (folder / RUN).is_file():
            record = read_record(folder)
            made = {"fingerprint": record["model"]["fingerprint"], "config": record["config"]}
            return record if made.items() <= plan.meta.items() else {}
    return {}


_FRONT = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)


def card(
    base_card: str, origin: Mapping[str, str], rounding: Mapping[str, float], costs: str
) -> str:
    """Return a model card: the base's, if any, behind a section on what was done to it and its costs."""
    front = _FRONT.match(base_card)
    head = front.group() if front else "---\ntags:\n- saber\n---\n"
    rows = "\n".join(
        f"| {name} | `{origin[name]}` |" for name in KEYS if name in origin and name != "config"
    )
    worst = ""
    if rounding:
        name = max(rounding, key=lambda n: rounding[n])
        worst = (
            f"\n{len(rounding)} edited tensors are stored in 8 bits: storing them lost up to "
            f"{rounding[name]:.1%} of the edit's norm (`{name}`).\n"
        )
    section = (
        f"\n# {origin.get('base', 'A model')}, edited\n\n"
        f"SABER {origin['version']} changed some weights of this model with a low-rank edit. {FILES}\n\n"
        f"{costs}\n{worst}\n## Provenance\n\n| | |\n|---|---|\n{rows}\n\n"
        f"`saber verify` holds this folder against `{FILE}`, the run and the base.\n"
    )
    return head + section + behind(base_card)


def behind(base_card: str) -> str:
    """Return the base's card as it stands behind one of ours; empty where there is none."""
    rest = _FRONT.sub("", base_card, count=1).strip()
    return f"\n---\n\nThe card of the untouched model:\n\n{rest}\n" if rest else ""
