"""What a sweep gains by more workers: measured with two, planned for as many as are wanted (Markdown).

    python benchmarks/scaling.py measure [--model demo] [--workers 1 2] [--ray] [OPTIONS]
    python benchmarks/scaling.py probe [--model demo] [--workers 1 2] [--openings 8]
    python benchmarks/scaling.py plan SWEEP [--trials 12 640] [--gpus 1 2 4 8 16 32 64]
    python benchmarks/scaling.py readings [--memory 4 16 64 256]

`measure` makes the same small grid with each number of workers, one thread each, in new folders and with
nothing kept from before; OPTIONS go to `saber sweep`. `probe` times what workers that have loaded the
model take to read a large prompt set together: the bundled prompts, each behind several openings. `plan`
takes a finished sweep's own times, measures what a worker costs before its first trial and how many
bytes go through the object store, and replays the driver's rule (the next setting to the next free
worker) on a clock: no trial is made.
With --start and --trial seconds of one's own machine take the place of the measured ones. `readings`
counts, from the shapes of published models, how often a selective pass reads what it must preserve.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import SimpleQueue, get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path

import torch
import transformers

from saber import preset, prompts
from saber.config import override
from saber.lm.forward import Share
from saber.lm.model import LanguageModel
from saber.lm.writers import Writer
from saber.moments import packed, width
from saber.prompts.splits import NAMES, split
from saber.sweep.journal import TRIALS, Journal
from saber.sweep.trial import Bench, Job


@dataclass(frozen=True)
class Costs:
    """What the parts of a sweep take, seconds and bytes."""

    first: float
    """From the start until the first worker has the model, its baseline and what trials share."""
    start: float
    """From its start until a further worker can begin with a trial."""
    trials: Sequence[float]
    """Each trial alone, with nothing of another's but what the first worker prepared."""
    driver: float
    """The driver's own work for one trial: to hand it out and to write it down."""
    last: float
    """The chosen setting on held-out prompts."""
    seed: int
    """What goes to each node once, bytes."""
    row: int
    """What comes back from a trial, bytes."""


def makespan(costs: Costs, trials: int, workers: int) -> float:
    """Return how long a sweep takes, seconds: the driver gives each setting to the worker free first."""
    free = [costs.first + (costs.start if i else 0.0) for i in range(workers)]
    heapq.heapify(free)
    driver, end = costs.first, costs.first
    for number in range(trials):
        begin = max(heapq.heappop(free), driver)
        driver = begin + costs.driver
        done = driver + costs.trials[number % len(costs.trials)]
        end = max(end, done)
        heapq.heappush(free, done)
    return end + costs.last


def table(costs: Costs, trials: int, counts: Sequence[int], per_node: int) -> str:
    """Return the plan for each number of workers: time, speed-up, share of a perfect one, traffic."""
    alone = makespan(costs, trials, 1)
    lines = [
        f"| workers | hours, {trials} trials | times as fast | of perfect | object store, MB |",
        "|---:|---:|---:|---:|---:|",
    ]
    for count in counts:
        took = makespan(costs, trials, count)
        nodes = -(-count // per_node)
        moved = nodes * costs.seed + trials * costs.row
        speed = alone / took
        lines.append(
            f"| {count} | {took / 3600:.2f} | {speed:.1f} | {speed / count:.0%} | {moved / 1e6:.1f} |"
        )
    return "\n".join(lines)


def costs_of(folder: Path, given: argparse.Namespace) -> Costs:
    """Measure what the sweep's own record does not hold: a worker's start, and bytes."""
    record = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    work = record["work"]
    rows = Journal(folder / TRIALS).rows
    # On other workers nothing is shared but what the first one prepared.
    spared = work["shared"] - work["prepared"] * len(rows)
    alone = 1 + max(0, spared) / max(1, work["tokens"])
    seconds = [row.seconds * alone for row in rows]
    base = override(preset(record["config"]["preset"]), record["config"])
    begin = time.perf_counter()
    bench = Bench(Job(given.model, base, None))
    bench.about()
    first = time.perf_counter() - begin
    seed = bench.seed()
    begin = time.perf_counter()
    Bench(Job(given.model, base, None), seed=seed)
    start = time.perf_counter() - begin
    with tempfile.TemporaryDirectory() as scratch:
        book = Journal(Path(scratch) / TRIALS)
        begin = time.perf_counter()
        for row in rows:
            book.append(row)
        driver = (time.perf_counter() - begin) / len(rows)
    if given.start:
        start, first = given.start, given.start + (first - start)
    if given.trial:
        seconds = [s * given.trial * len(seconds) / sum(seconds) for s in seconds]
    row_size = max(len(pickle.dumps(row)) for row in rows)
    held = record["best"]["heldout"]
    # A sweep of an older version did not time this: at the trials' own rate, then.
    pace = sum(row.seconds for row in rows) / work["tokens"]
    last = held.get("seconds", held["tokens"] * pace)
    return Costs(first, start, seconds, driver, last, len(pickle.dumps(seed)), row_size)


def plan(given: argparse.Namespace) -> None:
    """Print the measured costs and the plan."""
    costs = costs_of(given.sweep, given)
    mean = sum(costs.trials) / len(costs.trials)
    total = costs.first + sum(costs.trials) + costs.last
    serial = costs.first + costs.last + len(costs.trials) * costs.driver
    print(
        f"first worker ready {costs.first:.0f} s, a further one {costs.start:.0f} s, a trial {mean:.0f} s "
        f"({min(costs.trials):.0f}-{max(costs.trials):.0f}), driver {1e3 * costs.driver:.1f} ms a trial, "
        f"held-out report {costs.last:.0f} s; serial {serial / total:.1%} of {len(costs.trials)} trials on "
        f"one worker; seed {costs.seed / 1e6:.1f} MB, row {costs.row / 1e3:.1f} kB\n"
    )
    for trials in given.trials:
        print(table(costs, trials, given.gpus, given.per_node) + "\n")


def measure(given: argparse.Namespace, options: Sequence[str]) -> None:
    """Make the same grid with each number of workers and print trials an hour, while there are trials.

    What comes before them and behind them, on one worker, is told beside it.
    """
    print(
        "| workers | trials | before, s | trials, s | held out, s | all, s | trials an hour | ratio |\n"
        "|---:|---:|---:|---:|---:|---:|---:|---:|"
    )
    base = None
    for workers in given.workers:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "sweep")
            command = [
                sys.executable,
                "-m",
                "saber.cli.main",
                "sweep",
                given.model,
                "--out",
                str(out),
            ]
            command += ["--workers", str(workers), *options]
            if given.ray:
                command += ["--ray"]
            variables = {
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "SABER_CACHE": str(Path(folder, "c")),
            }
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=variables)
            book = json.loads((out / "sweep.json").read_text(encoding="utf-8"))
        count, work = len(book["trials"]), book["work"]
        rate = 3600 * count / work["trials_seconds"]
        base = base or rate
        parts = ("preparing_seconds", "trials_seconds", "heldout_seconds", "seconds")
        times = " | ".join(f"{work[part]:.0f}" for part in parts)
        print(f"| {workers} | {count} | {times} | {rate:.0f} | {rate / base:.2f} |", flush=True)


OPENINGS = ("", "Tell me: ", "Please answer. ", "A question. ", "Be brief. ", "Hello! ", "One more: ", "So, ")


def probe(given: argparse.Namespace) -> None:
    """Print how long each number of workers, of one thread each, reads a large prompt set."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["SABER_CACHE"] = str(folder / "cache")
        base = override(preset("card"), {"data": _many(folder, given.openings)})
        print("| workers | prompts | tokens | seconds | ratio |\n|---:|---:|---:|---:|---:|", flush=True)
        alone, context = None, get_context("spawn")
        for workers in given.workers:
            job = Job(given.model, base, folder / f"shared{workers}")
            together, told = context.Barrier(workers), context.SimpleQueue()
            hands = [
                context.Process(target=_read, args=(job, Share(i, workers), together, told))
                for i in range(workers)
            ]
            for hand in hands:
                hand.start()
            for hand in hands:
                hand.join()
                if hand.exitcode:
                    raise SystemExit(f"a worker ended with {hand.exitcode}")
            count, tokens, seconds = told.get()
            alone = alone or seconds
            print(f"| {workers} | {count} | {tokens} | {seconds:.1f} | {alone / seconds:.2f} |", flush=True)


def _read(job: Job, share: Share, together: Barrier, told: SimpleQueue[tuple[int, int, float]]) -> None:
    """Load the model, wait for the others, read a share; the first joins the parts and tells the time."""
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    bench = Bench(job)
    before = bench.subject.lm.work.tokens
    together.wait()
    begin = time.perf_counter()
    bench.part(share)
    together.wait()
    if share.index == 0:
        elsewhere = bench._join(share.of)
        seconds = time.perf_counter() - begin
        selecting = bench.watch.selecting
        count = len(selecting.target) + len(selecting.neutral)
        told.put((count, bench.subject.lm.work.tokens - before + elsewhere, seconds))


def _many(folder: Path, openings: int) -> dict[str, str]:
    """Write the bundled prompts behind so many openings, the fit split alone made larger."""
    files = {}
    for kind, bundled in (("target", prompts.target()), ("neutral", prompts.neutral())):
        lines = []
        parts = split(bundled, seed=0)
        for part in NAMES:
            for opening in OPENINGS[: openings if part == "fit" else 1]:
                lines += [{"prompt": opening + p.text, "split": part} for p in getattr(parts, part)]
        files[kind] = str(folder / f"{kind}.jsonl")
        Path(files[kind]).write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return files


SHAPES: dict[str, dict[str, object]] = {
    "Qwen3-8B": {
        "model_type": "qwen3", "num_hidden_layers": 36, "hidden_size": 4096, "intermediate_size": 12288,
        "num_attention_heads": 32, "head_dim": 128,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss", "num_hidden_layers": 24, "hidden_size": 2880, "intermediate_size": 2880,
        "num_attention_heads": 64, "head_dim": 64, "num_local_experts": 32,
    },
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe", "num_hidden_layers": 48, "hidden_size": 2048, "moe_intermediate_size": 768,
        "num_attention_heads": 32, "head_dim": 128, "num_experts": 128,
    },
    "Llama-3.3-70B": {
        "model_type": "llama", "num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672,
        "num_attention_heads": 64, "head_dim": 128,
    },
}  # fmt: skip
"""What of a published model's configuration sizes its writers."""


def readings(given: argparse.Namespace) -> None:
    """Print how many readings each bound on memory asks for, and how many layers they run."""
    print(
        "| model | all moments, GiB | bound, GiB | readings | as whole forward passes |\n"
        "|---|---:|---:|---:|---:|"
    )
    for name, sizes in SHAPES.items():
        config = transformers.AutoConfig.for_model(**sizes)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        lm = LanguageModel(model, None, name, "hub", None, torch.bfloat16, "model.layers")
        writers = [
            Writer(n, int(n.split(".")[2]), "other", axis, None, None, experts=fused)
            for n, p in model.named_parameters()
            for fused in [len(p) if p.ndim == 3 else None]
            for axis in [2 if fused and config.model_type == "gpt_oss" else 1 if fused else 0]
            if n.removesuffix(".weight").endswith(("o_proj", "down_proj"))
        ]
        whole = sum(8 * width(lm, w) ** 2 * (w.experts or 1) for w in writers) / 2**30
        for bound in given.memory:
            groups = packed(lm, writers, bound * 2**30)
            run = sum(group[-1].layer + 1 for group in groups) / config.num_hidden_layers
            print(f"| {name} | {whole:.0f} | {bound:g} | {len(groups)} | {run:.1f} |")


def main() -> None:
    """Measure, or plan."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("measure", allow_abbrev=False)
    one.add_argument("--model", default="demo")
    one.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    one.add_argument("--ray", action="store_true")
    three = commands.add_parser("probe")
    three.add_argument("--model", default="demo")
    three.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    three.add_argument("--openings", type=int, default=8, choices=range(1, len(OPENINGS) + 1))
    two = commands.add_parser("plan")
    two.add_argument("sweep", type=Path)
    two.add_argument("--model", default="demo")
    two.add_argument("--trials", type=int, nargs="+", default=[12, 640])
    two.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    two.add_argument("--per-node", type=int, default=8)
    two.add_argument("--start", type=float, default=0.0, help="seconds a worker takes to load")
    two.add_argument("--trial", type=float, default=0.0, help="mean seconds of a trial")
    four = commands.add_parser("readings")
    four.add_argument("--memory", type=float, nargs="+", default=[4, 16, 64, 256])
    given, options = parser.parse_known_args()
    torch.set_grad_enabled(False)
    if options and given.command != "measure":
        parser.error(f"unknown: {' '.join(options)}")
    if given.command == "plan":
        plan(given)
    elif given.command == "probe":
        probe(given)
    elif given.command == "readings":
        readings(given)
    else:
        measure(given, options)


if __name__ == "__main__":
    main()
