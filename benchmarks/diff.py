"""Error rates and speed of `saber diff` (Markdown, for docs/diff.md).

python benchmarks/diff.py --seeds 4 --results FILE        # verdicts on edits of a known nature
python benchmarks/diff.py --strengths --seeds 1           # how weak an ablation is still seen
python benchmarks/diff.py --model DIR --layers 12,20,27   # edits of a real checkpoint's layers
python benchmarks/diff.py --size 0.2 --d-model 2048       # throughput and memory, GB a side
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import tempfile
import threading
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from diff_cases import (
    CASES,
    DTYPES,
    FAMILIES,
    ON_FILES,
    Case,
    ablation,
    differing,
    of_files,
    situation,
)
from safetensors.torch import save_file

from saber.checkpoint.diff import compare
from saber.checkpoint.reading import open_checkpoint
from saber.evaluation.statistics import wilson


def measure(seeds: int, families: list[str], results: Path) -> None:
    """Add the verdicts that are not in `results` (JSON lines) yet; may be stopped at any time."""
    done = {(r["family"], r["dtype"], r["seed"], r["case"]) for r in _read(results)}
    for seed in range(seeds):
        for family in families:
            for title, dtype in DTYPES.items():
                left = [name for name in CASES if (family, title, seed, name) not in done]
                base = situation(family, seed, dtype) if left else None
                for name in left:
                    with tempfile.TemporaryDirectory() as folder:
                        v = differing(base, CASES[name].edit(base), Path(folder)).verdict
                    row = {"family": family, "dtype": title, "seed": seed, "case": name}
                    row |= {"verdict": v.name, "rank": v.rank, "law": v.law, "pure": v.pure}
                    with results.open("a") as file:
                        print(json.dumps(row), file=file)


def _read(results: Path) -> list[dict[str, Any]]:
    return (
        [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    )


def table(results: Path) -> None:
    """Print a row for each case: how often the verdict was right, and how often an ablation."""
    rows = _read(results)
    seeds = len({r["seed"] for r in rows})
    print(
        f"{len(rows)} comparisons: {len({r['family'] for r in rows})} families, 2 dtypes, {seeds} seeds\n"
    )
    print("| edit | n | right verdict | right rank | called an ablation | law, median (range) |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, case in CASES.items():
        found = [r for r in rows if r["case"] == name]
        laws = [r["law"] for r in found if r["law"] is not None]
        spread = f"{statistics.median(laws):.0%} ({min(laws):.0%}-{max(laws):.0%})" if laws else ""
        rank = "" if case.rank is None else str(sum(r["rank"] == case.rank for r in found))
        right = sum(r["verdict"] in case.right for r in found)
        called = sum(r["verdict"] == "directional_ablation" for r in found)
        print(f"| {case.title} | {len(found)} | {right} | {rank} | {called} | {spread} |")
    print()
    for positive, title in ((True, "missed ablations"), (False, "false ablations")):
        found = [r for r in rows if CASES[r["case"]].ablation == positive]
        wrong = sum((r["verdict"] == "directional_ablation") != positive for r in found)
        p = wilson(wrong, len(found))
        print(f"{title}: {wrong} of {len(found)}, at most {p.high:.1%} (95% Wilson)")
    for name, case in CASES.items():
        said = Counter(r["verdict"] for r in rows if r["case"] == name)
        if wrong := {k: n for k, n in said.items() if k not in case.right}:
            print(f"{case.title}: {wrong}")


def on_real(folder: Path, layers: set[int]) -> None:
    """Print the verdicts on edits of some layers of a real checkpoint."""
    print("| edit | " + " | ".join(f"{d}: verdict | rank | law" for d in DTYPES) + " |")
    print("|---|" + "---|---:|---:|" * len(DTYPES))
    bases = [of_files(folder, layers, dtype) for dtype in DTYPES.values()]
    for name in ON_FILES:
        cells = []
        for base in bases:
            with tempfile.TemporaryDirectory() as where:
                v = differing(base, CASES[name].edit(base), Path(where)).verdict
            rank = "" if v.rank is None else str(v.rank)
            law = "" if v.law is None else f"{v.law:.0%}"
            wrong = "" if v.name in CASES[name].right else " (wrong)"
            cells.append(f"`{v.name}`{wrong} | {rank} | {law}")
        print(f"| {CASES[name].title} | {' | '.join(cells)} |")


def strengths(seeds: int, families: list[str]) -> None:
    """Print how often a rank-1 ablation of a given strength is called one, by dtype."""
    print("| strength | " + " | ".join(DTYPES) + " |\n|---:|" + "---:|" * len(DTYPES))
    for strength in (0.3, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002):
        case = Case("", ablation(1, strength), ("directional_ablation",))
        cells = []
        for dtype in DTYPES.values():
            hits = n = 0
            for family in families:
                for seed in range(seeds):
                    base = situation(family, seed, dtype)
                    with tempfile.TemporaryDirectory() as folder:
                        v = differing(base, case.edit(base), Path(folder)).verdict
                    hits, n = hits + (v.name in case.right), n + 1
            cells.append(f"{hits}/{n}")
        print(f"| {strength} | " + " | ".join(cells) + " |")


def generate(folder: Path, size: float, d: int) -> None:
    """Write a sharded bfloat16 checkpoint of about `size` GB like a Llama's, and an ablated copy."""
    generator = torch.Generator().manual_seed(0)
    inter, layer = 11 * d // 4, 0
    shapes = {
        "self_attn.q_proj": (d, d),
        "self_attn.k_proj": (d // 4, d),
        "self_attn.v_proj": (d // 4, d),
        "self_attn.o_proj": (d, d),
        "mlp.gate_proj": (inter, d),
        "mlp.up_proj": (inter, d),
        "mlp.down_proj": (d, inter),
    }
    r = torch.nn.functional.normalize(torch.randn(d, generator=generator), dim=0)
    written = 0
    while written < size * 1e9:
        base, edited = {}, {}
        for part, shape in shapes.items():
            name = f"model.layers.{layer}.{part}.weight"
            weight = (0.02 * torch.randn(shape, generator=generator)).bfloat16()
            base[name] = edited[name] = weight
            if part.endswith(("o_proj", "down_proj")):
                w = weight.float()
                edited[name] = (w - torch.outer(r, r @ w)).bfloat16()
            written += 2 * weight.numel()
        for side, tensors in (("base", base), ("edited", edited)):
            (folder / side).mkdir(parents=True, exist_ok=True)
            save_file(tensors, folder / side / f"model-{layer:05d}.safetensors")
        layer += 1


class Watch:
    """Largest anonymous memory of this process, looked at every 5 ms (files in memory do not count)."""

    def __enter__(self) -> Watch:
        self.base = self.peak = anonymous()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._look)
        self.thread.start()
        return self

    def _look(self) -> None:
        while not self.done.wait(0.005):
            self.peak = max(self.peak, anonymous())

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()


def anonymous() -> int:
    """Return this process's anonymous resident memory in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("no RssAnon in /proc/self/status")


def throughput(size: float, d: int, full: bool) -> None:
    """Print time, rate and memory of one comparison, the files being in the page cache."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder), size, d)
        if full:
            _disturb(Path(folder) / "edited")
        paths = [os.path.join(folder, side) for side in ("base", "edited")]
        for file in Path(folder).rglob("*.safetensors"):
            file.read_bytes()
        sides = [open_checkpoint(p) for p in paths]
        largest = 4 * max(torch.tensor(t.shape).prod().item() for t in sides[0].tensors.values())
        ctypes.CDLL(None).malloc_trim(0)  # what was freed would hide what is taken
        with Watch() as watch:
            start, busy = time.perf_counter(), time.process_time()
            found = compare(*sides)
            seconds, busy = time.perf_counter() - start, time.process_time() - busy
        start = time.perf_counter()
        for side in sides:
            for name in side.tensors:
                side.read(name).view(torch.int16).sum()
        reading = time.perf_counter() - start
    changed = sum(p.change.relative > 0 for p in found.pieces)
    print(
        f"| {found.size / 2e9:.2f} GB | {d} | {changed} of {found.common} | {seconds:.1f} s | {busy:.1f} s "
        f"| {found.size / seconds / 1e6:.0f} MB/s | {seconds / reading:.1f} "
        f"| {(watch.peak - watch.base) / largest:.1f} | {found.verdict.name} |"
    )


def _disturb(folder: Path) -> None:
    """Change every tensor a little, as a full fine-tune does."""
    from safetensors.torch import load_file

    for file in folder.glob("*.safetensors"):
        tensors = {
            n: t * (1 + 0.02 * torch.randn(t.shape)).bfloat16() for n, t in load_file(file).items()
        }
        save_file(tensors, file)


def main() -> None:
    """Print the table that was asked for."""
    warnings.simplefilter("ignore")
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument(
        "--results", type=Path, default=Path("runs/diff.jsonl"), help="kept as it goes"
    )
    parser.add_argument("--strengths", action="store_true")
    parser.add_argument("--model", type=Path, help="folder of a real Llama-like checkpoint")
    parser.add_argument("--layers", default="12,20,27")
    parser.add_argument("--size", type=float, default=0.0)
    parser.add_argument("--d-model", type=int, default=2048)
    given = parser.parse_args()
    if given.size:
        print(
            "| a side | d_model | changed | time | CPU | both sides | x reading | peak / largest | verdict |"
        )
        print("|---:|---:|---:|---:|---:|---:|---:|---:|---|")
        for full in (False, True):
            throughput(given.size, given.d_model, full)
    elif given.model:
        on_real(given.model, {int(n) for n in given.layers.split(",")})
    elif given.strengths:
        strengths(given.seeds, given.families.split(","))
    else:
        measure(given.seeds, given.families.split(","), given.results)
        table(given.results)


if __name__ == "__main__":
    main()
