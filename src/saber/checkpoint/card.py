"""The card that lies beside an exported artifact."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saber.checkpoint.gguf_rewrite import Rounding
from saber.checkpoint.origin import called

WORDS = {
    "lora": "a LoRA adapter for `peft`",
    "merged": "a `transformers` folder",
    "gguf": "a GGUF file for llama.cpp",
    "gguf-lora": "a LoRA adapter for llama.cpp",
}
_LIBRARY = {"lora": "peft", "merged": "transformers", "gguf": "gguf", "gguf-lora": "gguf"}
_RELATION = {"lora": "adapter", "merged": "finetune", "gguf": "quantized", "gguf-lora": "adapter"}
DROWNED = 0.9
"""Share of a change below which storing has lost too much of it."""


HERE = "THIS FOLDER"
"""Stands in a card where a push puts the repository."""
UNMEASURED = (
    "**Nothing was measured.** No `run.json` with results lay beside the plan: what this edit does, and what "
    "it costs, is not known."
)
FORCED = "These files are of another model than the run measured (--force)."


def export_card(
    kind: str,
    file: Path,
    record: Mapping[str, Any],
    origin: Mapping[str, str],
    notes: Sequence[str] = (),
    table: Sequence[Rounding] = (),
) -> str:
    """Return the Markdown of the card: what it is, what to know, how to use it, where it comes from.

    Results and limits are those of the run's own card, which does not go with an export.
    """
    from saber.report import card, reading  # late: the plots' library comes with it

    name = reading.model_name(record)
    base = card.base_model(record)
    head = card.metadata(record, library=_LIBRARY[kind], relation=_RELATION[kind])
    lead = (
        f"What SABER {origin['version']} took out of `{name}`"
        f"{f' ({base})' if base and base != name else ''}, as {WORDS[kind]}."
    )
    both = record.get("baseline") and record.get("edited")
    sections = [
        f"# {file.stem if file.suffix == '.gguf' else f'An edit of {name}'}",
        f"{lead} {reading.finding(record)}." if both else lead,
        f"> [!WARNING]\n> {card.warning(record)}",
        "\n".join(f"- {note}" for note in notes),
        f"## Use\n\n{_use(kind, file, record)}",
        *(_measured(record) if both else ()),
        _rounding(table),
        card.limits(record) if both else "",
        _origin(origin, record),
    ]
    return f"---\n{head.to_yaml()}\n---\n\n" + "\n\n".join(s for s in sections if s) + "\n"


def costs(record: Mapping[str, Any], forced: bool = False) -> str:
    """Return results and limits of the run that made a plan, or that there are none.

    `forced` says that the files at hand are another model's than the run's.
    """
    from saber.report import card

    if not (record.get("baseline") and record.get("edited")):
        return UNMEASURED
    return "\n\n".join((*_measured(record, FORCED if forced else ""), card.limits(record)))


def _measured(record: Mapping[str, Any], note: str = "") -> tuple[str, str]:
    from saber.report import card

    judge = card.judged_by(record)
    lead = "On held-out prompts, with the plan in memory and not on these files."
    lead += f" Judge: {card.cell(judge)}." if judge else ""
    lead += f"\n\n{note}" if note else ""
    return f"## Measured by the run\n\n{lead}", card.results(record, heading="", plots=False)


def published(content: bytes, repo: str) -> bytes:
    """Return a card with the repository where it names the folder that it lies in."""
    return content.replace(json.dumps(HERE).encode(), json.dumps(repo).encode())


def _use(kind: str, file: Path, record: Mapping[str, Any]) -> str:
    from saber.report import card, reading

    model = record["model"]

    if kind == "merged":
        return card.loading(HERE)
    if kind == "gguf":
        return f"```sh\nllama-cli -m {file.name}\n```"
    if kind == "gguf-lora":
        return (
            f"```sh\nllama-cli -m BASE.gguf --lora {file.name}\n"
            f"llama-cli -m BASE.gguf --lora-scaled {file.name}:0.5   # half of the edit\n```"
        )
    demo = model.get("source") == "demo"
    read = "import saber" if demo else "from transformers import AutoModelForCausalLM"
    name = called(model)
    where = f'"{name}"'
    if reading.dig(record, "config", "load", "revision") and model.get("revision"):
        where += f', revision="{model["revision"]}"'
    base = 'saber.load("demo").model' if demo else f"AutoModelForCausalLM.from_pretrained({where})"
    return (
        f"```python\n{read}\nfrom peft import PeftModel\n\n"
        f"model = {base}\n"
        f"model = PeftModel.from_pretrained(model, {json.dumps(HERE)})\n"
        "model = model.merge_and_unload()   # or keep it apart, and weight it\n```"
    )


def _rounding(table: Sequence[Rounding]) -> str:
    if not table:
        return ""
    lines = "\n".join(
        f"| `{r.name}` | {r.before} | {r.after} | {r.size:.2%} | {r.error:.3f} | {r.kept:.1%} |"
        for r in table
    )
    return (
        "## What storing did to the edit\n\n*edit*: norm of the change over that of the weight; *rounding*: "
        "norm of what storing adds, over that of the change; *kept*: the share of the change along itself "
        "that is there after storing.\n\n| tensor | was | is | edit | rounding | kept |\n"
        f"| :-- | :-- | :-- | --: | --: | --: |\n{lines}"
    )


def _origin(origin: Mapping[str, str], record: Mapping[str, Any]) -> str:
    rows = [(name, value) for name, value in origin.items() if name != "config"]
    rows.append(("command", str(record.get("command") or "-")))
    lines = "\n".join(f"| {name.replace('_', ' ')} | `{value}` |" for name, value in rows)
    return (
        f"## Provenance\n\n| what | value |\n| :-- | :-- |\n{lines}\n\n"
        "The same stands in the metadata of the weights, with the whole configuration."
    )
