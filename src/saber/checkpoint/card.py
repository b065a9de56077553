"""The card that lies beside an exported artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from saber.checkpoint.gguf_file import Rounding
from saber.notices import notice

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


def export_card(
    kind: str,
    file: Path,
    record: Mapping[str, Any],
    origin: Mapping[str, str],
    notes: Sequence[str] = (),
    table: Sequence[Rounding] = (),
) -> str:
    """Return the Markdown of the card: what it is, what to know, how to use it, where it comes from."""
    model = record["model"]
    base = model.get("base") or (model["name"] if model.get("source") == "hub" else None)
    head = ModelCardData(
        base_model=base,
        base_model_relation=_RELATION[kind] if base else None,
        library_name=_LIBRARY[kind],
        pipeline_tag="text-generation",
        license="apache-2.0" if model.get("source") == "demo" else None,
        tags=["saber", "interpretability"],
    )
    data = (record.get("config") or {}).get("data") or {}
    warned = notice(data.get("behaviour", "refusal"), data.get("mode", "removal"))
    lead = (
        f"What SABER {origin['version']} took out of `{model['name']}`"
        f"{f' ({base})' if base and base != model['name'] else ''}, as {WORDS[kind]}."
    )
    sections = [
        f"# {file.stem if file.suffix == '.gguf' else 'An edit of ' + str(model['name'])}",
        lead,
        f"> [!WARNING]\n> {warned}",
        "\n".join(f"- {note}" for note in notes),
        f"## Use\n\n{_use(kind, file, model)}",
        _measured(record),
        _rounding(table),
        _origin(origin, record),
    ]
    return f"---\n{head.to_yaml()}\n---\n\n" + "\n\n".join(s for s in sections if s) + "\n"


def _use(kind: str, file: Path, model: Mapping[str, Any]) -> str:
    if kind == "gguf":
        return f"```sh\nllama-cli -m {file.name}\n```"
    if kind == "gguf-lora":
        return (
            f"```sh\nllama-cli -m BASE.gguf --lora {file.name}\n"
            f"llama-cli -m BASE.gguf --lora-scaled {file.name}:0.5   # half of the edit\n```"
        )
    if kind == "lora":
        demo = model.get("source") == "demo"
        read = "import saber" if demo else "from transformers import AutoModelForCausalLM"
        base = model.get("base") or model["name"]
        base = (
            'saber.load("demo").model'
            if demo
            else f'AutoModelForCausalLM.from_pretrained("{base}")'
        )
        return (
            f"```python\n{read}\nfrom peft import PeftModel\n\n"
            f"model = {base}\n"
            'model = PeftModel.from_pretrained(model, "THIS FOLDER")\n'
            "model = model.merge_and_unload()   # or keep it apart, and weight it\n```"
        )
    return (
        "```python\nfrom transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")\n```'
    )


def _measured(record: Mapping[str, Any]) -> str:
    before, after = record.get("baseline"), record.get("edited")
    if not before or not after:
        return ""
    behaviour = ((record.get("config") or {}).get("data") or {}).get("behaviour", "refusal")
    rows = [
        (f"{behaviour}, target prompts", *(_rate(m["refusal"]) for m in (before, after))),
        ("perplexity, reference answers", *(f"{m['perplexity']['overall']:.2f}" for m in (before, after))),
        ("KL, sequence (nats)", *(f"{m['kl']['sequence']:.4f}" for m in (before, after))),
    ]  # fmt: skip
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return (
        "## Measured by the run\n\nOn held-out prompts, with the plan in memory and not on this file; the "
        f"run's own card has the rest.\n\n| | untouched | edited |\n| :-- | --: | --: |\n{lines}"
    )


def _rate(p: Mapping[str, Any]) -> str:
    return f"{100 * p['rate']:.1f}% ({100 * p['low']:.1f}-{100 * p['high']:.1f})"


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
