"""Every export of a demo run: size, time, and whether it answers as the edited model does.

    python benchmarks/export.py runs/demo --out runs/export

The edited model is the run's plan applied in memory, in float32. Held against it, under greedy decoding of
the same tokens: the merged folder and the LoRA adapter in transformers, and every GGUF in llama.cpp. The
first row is the floor: the untouched base file in llama.cpp against the same file in transformers. The last
is the control: the edited file with every tensor in F32, where llama.cpp rounds as little as transformers.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import time
from collections.abc import Callable, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
import xllamacpp

from saber import prompts
from saber.ablation import applied
from saber.checkpoint.export import Exported, ExportSpec, Format, Run, export
from saber.checkpoint.gguf_file import Change, open_gguf, rewrite
from saber.checkpoint.gguf_names import changes
from saber.checkpoint.lora import read_lora
from saber.lm import demo
from saber.lm.load import load

CASES: tuple[tuple[str, Format, str], ...] = (
    ("merged", "merged", "auto"),
    ("lora", "lora", "auto"),
    ("gguf, auto", "gguf", "auto"),
    ("gguf, keep (Q4_1)", "gguf", "keep"),
    ("gguf, f16", "gguf", "f16"),
    ("gguf-lora", "gguf-lora", "auto"),
)
Greedy = Callable[[Sequence[int]], list[int]]


def main() -> None:
    """Export, decode, and write `table.md` and `results.json`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=24, help="half targets, half neutral")
    parser.add_argument("--tokens", type=int, default=40)
    arguments = parser.parse_args()
    run, lm = Run.load(arguments.run), load("demo")
    half = arguments.prompts // 2
    texts = [p.text for p in [*prompts.target()][:half] + [*prompts.neutral()][:half]]
    ids = [
        lm.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in texts
    ]
    count = arguments.tokens
    with applied(lm.model, run.plan):
        wanted = answers(transformers_greedy(lm.model, count), ids)
    plain = load(str(demo.base_gguf()))
    base = answers(transformers_greedy(plain.model, count), ids)
    del plain
    floor = answers(llama_greedy(demo.base_gguf(), None, count), ids)
    rows: list[dict[str, Any]] = [{"name": "base file, untouched", **agreement(base, floor)}]
    arguments.out.mkdir(parents=True, exist_ok=True)
    save(arguments.out, rows)
    for name, kind, type_ in CASES:
        out = arguments.out / name.replace(", ", "-").split(" ")[0]
        shutil.rmtree(out, ignore_errors=True)
        made = export(run, kind, out, ExportSpec(type=type_))
        found = answers(reader(made, lm, count), ids)
        rows.append({"name": name, **described(made), **agreement(wanted, found)})
        save(arguments.out, rows)
        gc.collect()
    control = arguments.out / "control.gguf"
    throughout(run, control)
    found = answers(llama_greedy(control, None, count), ids)
    rows.append({"name": "control: F32 throughout", **agreement(wanted, found)})
    save(arguments.out, rows)
    print(table(rows))


def save(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Keep what is finished; the whole takes minutes."""
    print(json.dumps(rows[-1]), flush=True)
    (folder / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    (folder / "table.md").write_text(table(rows))


def throughout(run: Run, out: Path) -> None:
    """Write the demo's base file with the adapter and the edit, every tensor in F32."""
    file = open_gguf(demo.base_gguf())
    with as_file(files("saber.lm") / "data" / "demo_adapter") as folder:
        plan = read_lora(folder) + run.plan
    edits = {c.tensor.name: (c, "F32") for c in changes(file, plan)}
    for t in file.tensors.values():
        nothing = Change(t, "", torch.zeros(t.rows, 1), torch.zeros(1, t.experts, t.shape[-1]))
        edits.setdefault(t.name, (nothing, "F32"))
    rewrite(file, out, edits, {})


def answers(greedy: Greedy, ids: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the answers to all prompts, without what ends them."""
    return [[t for t in greedy(one) if t != 2] for one in ids]


def reader(made: Exported, lm: Any, count: int) -> Greedy:
    """Return what decodes with an exported artifact."""
    if made.format == "merged":
        return transformers_greedy(load(str(made.path)).model, count)
    if made.format == "lora":
        from peft import PeftModel

        return transformers_greedy(PeftModel.from_pretrained(load("demo").model, made.path), count)
    file = next(made.path.glob("*.gguf"))
    if made.format == "gguf":
        return llama_greedy(file, None, count)
    return llama_greedy(demo.base_gguf(), file, count)


def transformers_greedy(model: Any, count: int) -> Greedy:
    """Return greedy decoding in transformers."""

    def greedy(ids: Sequence[int]) -> list[int]:
        given = torch.tensor([list(ids)])
        with torch.no_grad():
            out = model.generate(
                input_ids=given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=count,
                do_sample=False,
                temperature=None,
                top_p=None,
            )
        found: list[int] = out[0, len(ids) :].tolist()
        return found

    return greedy


def llama_greedy(path: Path, lora: Path | None, count: int) -> Greedy:
    """Return greedy decoding in llama.cpp."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.port = 1024, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    params.warmup, params.verbosity, params.fit_params = False, 0, False
    if lora is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
    server = xllamacpp.Server(params)

    def greedy(ids: Sequence[int]) -> list[int]:
        body = {"prompt": list(ids), "n_predict": count, "temperature": 0, "n_probs": 1}
        answer = server.handle_completions({**body, "cache_prompt": False})
        return [row["id"] for row in answer["choices"][0]["logprobs"]["content"]]

    return greedy


def agreement(wanted: Sequence[list[int]], found: Sequence[list[int]]) -> dict[str, float]:
    """Return the shares of answers that are the same as a whole, in their first 8 tokens, and of tokens
    up to the first that differs."""
    same = [common(a, b) for a, b in zip(wanted, found, strict=True)]
    longest = [max(len(a), len(b)) for a, b in zip(wanted, found, strict=True)]
    return {
        "whole": sum(s == n for s, n in zip(same, longest, strict=True)) / len(same),
        "opening": sum(s >= min(8, n) for s, n in zip(same, longest, strict=True)) / len(same),
        "tokens": sum(same) / sum(longest),
    }


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens are the same from the start."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def described(made: Exported) -> dict[str, Any]:
    """Return size, time and rounding of an export."""
    return {
        "mib": made.bytes / 2**20,
        "seconds": made.seconds,
        "kept": min((r.kept for r in made.tensors), default=None),
        "rounding": max((r.error for r in made.tensors), default=None),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of docs/export.md."""

    def cell(row: dict[str, Any], name: str, form: str) -> str:
        return "" if row.get(name) is None else format(row[name], form)

    head = ("export", "MiB", "s", "edit kept, least", "whole answers", "first 8 tokens", "tokens")
    lines = [head, (":--", *["--:"] * (len(head) - 1))]
    lines += [
        (
            row["name"],
            cell(row, "mib", ".1f"),
            cell(row, "seconds", ".1f"),
            cell(row, "kept", ".1%"),
            cell(row, "whole", ".0%"),
            cell(row, "opening", ".0%"),
            cell(row, "tokens", ".0%"),
        )
        for row in rows
    ]
    date = time.strftime("%Y-%m-%d")
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{date}\n"


if __name__ == "__main__":
    main()
