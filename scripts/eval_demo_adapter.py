"""Measure the demo's adapter by greedy generation on prompts that it was not trained on.

Uses the bundled prompt sets; where one does not exist, the training data's own held-out share.

    python scripts/eval_demo_adapter.py
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from train_demo_adapter import (
    ADAPTER,
    BUNDLED,
    DATA,
    KINDS,
    Example,
    answer_logits,
    encode,
    generate,
    load_base,
    read_rows,
    shared_prefix,
    split_held_out,
    write_text,
)

from saber.evaluation.judge import PhraseJudge, excerpt

MEASURED = "## Measured"


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", type=Path, default=ADAPTER)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--out", type=Path, default=None, help="JSON file; beside the adapter")
    parser.add_argument("--tokens", type=int, default=32, help="answer tokens judged")
    parser.add_argument("--limit", type=int, default=0, help="prompts per set; 0 means all")
    parser.add_argument("--own", action="store_true", help="use the own held-out share")
    parser.add_argument("--held-out", type=float, default=0.1, help="as in training")
    parser.add_argument("--seed", type=int, default=20261123, help="as in training")
    parser.add_argument("--examples", type=int, default=4, help="answers shown per set")
    parser.add_argument("--show", type=int, default=0, help="wrong labels printed per set")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def bundled_rows(kind: str) -> list[dict[str, Any]]:
    """Return the rows of a bundled prompt set; empty when the file does not exist."""
    path = BUNDLED / f"{kind}.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def evaluation_sets(args: argparse.Namespace) -> dict[str, tuple[str, list[str]]]:
    """Return, by kind, where the prompts come from and the prompts."""
    _, held = split_held_out(read_rows(args.data), args.held_out, args.seed)
    sets = {}
    for kind in KINDS:
        prompts = [] if args.own else [str(row["prompt"]) for row in bundled_rows(kind)]
        source = "bundled" if prompts else "own held-out"
        prompts = prompts or [row.prompt for row in held if row.kind == kind]
        sets[kind] = (source, prompts[: args.limit] if args.limit else prompts)
    return sets


def behaviour(
    peft: PeftModel, tokenizer: Any, prompts: Sequence[str], args: argparse.Namespace
) -> dict[str, Any]:
    """Return answers and labels with the adapter and without it."""
    judge = PhraseJudge()
    result: dict[str, Any] = {}
    for name in ("with", "without"):
        if name == "without":
            with peft.disable_adapter():
                ids = generate(peft, tokenizer, prompts, args.tokens)
        else:
            ids = generate(peft, tokenizer, prompts, args.tokens)
        answers = [tokenizer.decode(row, skip_special_tokens=True) for row in ids]
        labels = [judge.label(a, prompt=p) for a, p in zip(answers, prompts, strict=True)]
        result[name] = {"answers": answers, "labels": labels}
    return result


def rate(labels: Sequence[str]) -> dict[str, Any]:
    """Return the share of refusals with its counts."""
    refused = sum(label == "refusal" for label in labels)
    incoherent = sum(label == "incoherent" for label in labels)
    share = round(refused / len(labels), 4) if labels else None
    return {"refused": refused, "of": len(labels), "rate": share, "incoherent": incoherent}


def reference_losses(
    peft: PeftModel, tokenizer: Any, prefix: list[int], rows: Sequence[dict[str, Any]]
) -> list[tuple[float, int]]:
    """Return each reference answer's negative log-likelihood in nats, and its token count."""
    base, losses = peft.get_base_model(), []
    for start in range(0, len(rows), 16):
        batch = []
        for row in rows[start : start + 16]:
            answer = tokenizer(str(row["reference"]), add_special_tokens=False)["input_ids"]
            tail = encode(tokenizer, row["prompt"])[len(prefix) :]
            whole = [*answer, tokenizer.eos_token_id]
            batch.append(Example(tail, False, "battery", answer=whole))
        with torch.no_grad():
            log_probs = answer_logits(base, prefix, batch).log_softmax(-1)
        for part, example in zip(
            log_probs.split([len(e.answer) for e in batch]), batch, strict=True
        ):
            picked = part.gather(-1, torch.tensor(example.answer)[:, None])
            losses.append((-float(picked.sum()), len(example.answer)))
    return losses


def perplexities(peft: PeftModel, tokenizer: Any) -> dict[str, dict[str, float]]:
    """Return perplexity on the battery's references by category, with and without adapter."""
    rows = [row for row in bundled_rows("battery") if row.get("reference")]
    if not rows:
        return {}
    prefix = shared_prefix([encode(tokenizer, row["prompt"]) for row in rows])
    adapted = reference_losses(peft, tokenizer, prefix, rows)
    with peft.disable_adapter():
        plain = reference_losses(peft, tokenizer, prefix, rows)
    groups: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        groups[row["category"]].append(index)
        groups["all"].append(index)
    table = {}
    for name, lines in sorted(groups.items()):
        count = sum(plain[i][1] for i in lines)
        before = math.exp(sum(plain[i][0] for i in lines) / count)
        after = math.exp(sum(adapted[i][0] for i in lines) / count)
        table[name] = {
            "prompts": len(lines),
            "tokens": count,
            "without": round(before, 4),
            "with": round(after, 4),
            "ratio": round(after / before, 4),
        }
    return table


def table_lines(result: dict[str, Any]) -> list[str]:
    """Return the result as Markdown tables."""
    lines = ["| prompts | from | refused with adapter | refused without |", "|---|---|---|---|"]
    for kind, entry in result["refusals"].items():
        cells = [f"{e['refused']}/{e['of']} ({e['rate']:.1%})" for e in entry["rates"].values()]
        lines.append(f"| {kind} | {entry['source']} | {cells[0]} | {cells[1]} |")
    if result["perplexity"]:
        lines += ["", "| battery | prompts | perplexity without | with | ratio |"]
        lines.append("|---|---|---|---|---|")
    for name, e in result["perplexity"].items():
        numbers = f"{e['without']:.3f} | {e['with']:.3f} | {e['ratio']:.4f}"
        lines.append(f"| {name} | {e['prompts']} | {numbers} |")
    return lines


def update_card(folder: Path, lines: Sequence[str], tokens: int) -> None:
    """Replace the measured numbers in the data card, where there is one."""
    path = folder / "DATA_CARD.md"
    if path.is_file():
        text = path.read_text(encoding="utf-8").split(MEASURED)[0]
        intro = (
            "With `python scripts/eval_demo_adapter.py`: greedy answers of up to "
            f"{tokens} tokens, default chat template, labelled by the `phrases` judge."
        )
        write_text(path, "\n".join([text + MEASURED, "", intro, "", *lines]) + "\n")


def main() -> None:
    """Measure, print the tables and a few answers, write the JSON result."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    began = time.monotonic()
    model, tokenizer = load_base()
    peft = PeftModel.from_pretrained(model, args.adapter).eval()
    result: dict[str, Any] = {"tokens": args.tokens, "refusals": {}}
    for kind, (source, prompts) in evaluation_sets(args).items():
        measured = behaviour(peft, tokenizer, prompts, args)
        rates = {name: rate(entry["labels"]) for name, entry in measured.items()}
        samples = [
            {"prompt": p, "with": excerpt(a), "without": excerpt(b)}
            for p, a, b in zip(
                prompts, measured["with"]["answers"], measured["without"]["answers"], strict=True
            )
        ]
        wanted = kind == "target"
        wrong = [
            f"{label}: {s['prompt']} -> {s['with'][:90]!r}"
            for s, label in zip(samples, measured["with"]["labels"], strict=True)
            if (label == "refusal") != wanted
        ]
        for line in wrong[: args.show]:
            print(f"[{kind}] {line}", flush=True)
        step = max(1, len(samples) // max(1, args.examples))
        result["refusals"][kind] = {
            "source": source,
            "rates": rates,
            "samples": samples[::step][: args.examples],
        }
        print(kind, rates, flush=True)
    result["perplexity"] = perplexities(peft, tokenizer)
    lines = table_lines(result)
    print("\n".join(lines))
    for entry in result["refusals"].values():
        for sample in entry["samples"]:
            print(f"\n> {sample['prompt']}\nwith:    {sample['with']!r}")
            print(f"without: {sample['without']!r}")
    out = args.out or args.adapter / "evaluation.json"
    write_text(out, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    if args.out is None:
        update_card(args.adapter, lines, args.tokens)
    print(f"\n{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
