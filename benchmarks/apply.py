"""Time, memory and interruptions of `saber apply` on generated checkpoints; prints Markdown.

    python benchmarks/apply.py --gigabytes 1 4 --kills 50

Generates Llama-like checkpoints (bfloat16, shards of 1 GB) in a temporary folder, which is deleted at
the end. Time is held against `cp -r` plus a SHA-256 of the same bytes, one after the other, with the
page cache warm; `saber apply` also brings its files to the disk, which `cp` does not: so it is timed with
`--no-sync` too, which leaves that to the system as well, and with a sync of what `cp` wrote beside it.
Memory is the peak of resident memory over what the process held after its imports. With `--kills N` a
process is killed N times at random moments, and the same call resumes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter, sleep

import torch

from saber.ablation import EditPlan, Factor
from saber.checkpoint.apply import ApplySpec, apply_to_files
from saber.checkpoint.plan_on_disk import FILE
from saber.checkpoint.shards import INDEX, fingerprint, read_source

WIDTH, INNER, VOCABULARY, SHARD = 2048, 8192, 32000, 10**9
LAYER = {
    "input_layernorm.weight": (WIDTH,),
    "self_attn.q_proj.weight": (WIDTH, WIDTH),
    "self_attn.k_proj.weight": (WIDTH, WIDTH),
    "self_attn.v_proj.weight": (WIDTH, WIDTH),
    "self_attn.o_proj.weight": (WIDTH, WIDTH),
    "mlp.gate_proj.weight": (INNER, WIDTH),
    "mlp.up_proj.weight": (INNER, WIDTH),
    "mlp.down_proj.weight": (WIDTH, INNER),
}
WRITERS = ("self_attn.o_proj", "mlp.down_proj")


def shapes(size: float) -> dict[str, tuple[int, ...]]:
    """Return tensors of about so many bytes in bfloat16."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    layer = 0
    while True:
        for name, shape in LAYER.items():
            found[f"model.layers.{layer}.{name}"] = shape
        layer += 1
        if 2 * sum(torch.Size(s).numel() for s in found.values()) >= 0.97 * size:
            return found


def generate(folder: Path, size: float) -> None:
    """Write a checkpoint, a shard at a time."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    groups: list[list[str]] = [[]]
    held, wanted = 0, shapes(size)
    for name, shape in wanted.items():
        count = 2 * torch.Size(shape).numel()
        if groups[-1] and held + count > SHARD:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += count
    placed = {}
    block = (0.02 * torch.randn(1 << 22)).bfloat16().view(torch.uint8).numpy().tobytes()
    for number, names in enumerate(groups, 1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        head: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name in names:
            end = at + 2 * torch.Size(wanted[name]).numel()
            head[name] = {"dtype": "BF16", "shape": wanted[name], "data_offsets": [at, end]}
            at, placed[name] = end, file
        text = json.dumps(head).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            while at:
                part = block[: min(at, len(block))]
                out.write(part)
                at -= len(part)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def plan_for(folder: Path, run: Path, rank: int) -> None:
    """Write a plan of random factors for every writer of a checkpoint."""
    source = read_source(folder)
    factors, rows = {}, {}
    generator = torch.Generator().manual_seed(0)
    for name in source.place:
        writer = name.removesuffix(".weight")
        if writer.endswith(WRITERS):
            stored = source.stored(name)
            left = 0.01 * torch.randn(stored.shape[0], rank, generator=generator)
            right = 0.01 * torch.randn(rank, stored.shape[1], generator=generator)
            factors[writer] = Factor(left, right, None, 0)
            piece = {"name": name, "shape": stored.shape, "start": (0, 0), "axes": (0, 1)}
            rows[writer] = {"weight": [[piece]]}
    (run / "plan").mkdir(parents=True)
    value = {"schema": 1, "checkpoint": fingerprint(source), "factors": rows}
    (run / "plan" / FILE).write_text(json.dumps(value))
    EditPlan(factors).save(run / "plan", {"config": {"seed": 0}})


def clean(out: Path) -> None:
    """Remove a folder, and let the disk catch up so that it does not slow what is timed next."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()


def timed(call) -> float:
    """Return wall seconds."""
    begun = perf_counter()
    call()
    return perf_counter() - begun


def hashed(folder: Path) -> None:
    """SHA-256 of all files, read with one buffer."""
    buffer = bytearray(1 << 22)
    for path in folder.iterdir():
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(memoryview(buffer)[:count])


def synced(folder: Path) -> None:
    """Bring a folder's files to the disk."""
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def memory(field: str, process: str = "self") -> int:
    """Return VmRSS or VmHWM of a process, bytes."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise RuntimeError(field)


def measure_peak(root: Path, name: str) -> int:
    """Return a child's peak over its base, bytes, with one worker in its own process."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import apply as a\n"
        f"a.peak({str(root)!r}, {name!r})"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return int(out.stdout.split()[-1])


def peak(root: str, name: str) -> None:
    """Print the peak of one call over the base (run in a process of its own)."""
    here, one = Path(root), ApplySpec(workers=1)
    Path("/proc/self/clear_refs").write_text("5")
    base = memory("VmRSS")
    apply_to_files(here / f"run-{name}", str(here / name), here / f"out-{name}", one)
    print(memory("VmHWM") - base)


def killed(root: Path, name: str, times: int) -> str:
    """Kill a process at random moments and resume, until the folder is there; compare every time."""
    run, base = root / f"run-{name}", str(root / name)
    one = ApplySpec(workers=1)
    whole = root / "whole"
    seconds = timed(lambda: apply_to_files(run, base, whole, one))
    wanted = {p.name: p.read_bytes() for p in whole.iterdir()}
    moments = random.Random(0)
    kills = resumed = 0
    while kills < times:
        out = root / "killed"
        while True:
            child = os.fork()
            if not child:
                apply_to_files(run, base, out, one)
                os._exit(0)
            sleep(moments.uniform(0, seconds))
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if out.exists():
                assert {p.name: p.read_bytes() for p in out.iterdir()} == wanted
            if not os.WIFSIGNALED(status):
                break
            kills += 1
            resumed += (root / ".killed.part" / "state.json").exists()
            if kills % 3 == 0:  # let some be killed several times in a row
                apply_to_files(run, base, out, one) if not out.exists() else None
                break
        assert {p.name: p.read_bytes() for p in out.iterdir()} == wanted
        shutil.rmtree(out)
        shutil.rmtree(root / ".killed.part", ignore_errors=True)
    return (
        f"{kills} kills at random moments of {seconds:.1f} s ({resumed} with work to resume): "
        "every resumed folder equal to an undisturbed one, byte for byte."
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, nargs="*", default=[1, 4])
    parser.add_argument("--rank", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--folder", help="where to work (default: the system's temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        root = Path(name)
        needed, free = 2.2e9 * max([*options.gigabytes, 1]), shutil.disk_usage(root).free
        if free < needed + 5e9:
            sys.exit(f"{needed / 1e9:.0f} GB are needed in {root}, {free / 1e9:.0f} GB are free")
        if options.kills:
            generate(root / "small", 4e8)
            plan_for(root / "small", root / "run-small", options.rank)
            print(killed(root, "small", options.kills))
        if options.gigabytes:
            print(
                "| checkpoint | cp | + sync | SHA-256 | `--no-sync` | `apply`, 1 worker | 2 workers | "
                "`--no-sync` / (cp + SHA-256) | best / (cp + SHA-256) | / (cp + sync + SHA-256) | "
                "peak over base | 2 x largest edited tensor, f32 |"
            )
            print("|" + "---:|" * 12)
        for size in options.gigabytes:
            row(root, size, options)


def row(root: Path, size: float, options: argparse.Namespace) -> None:
    """Print one row."""
    name = f"{size:g}"
    base, run, out = root / name, root / f"run-{name}", root / "out"
    generate(base, size * 1e9)
    plan_for(base, run, options.rank)
    hashed(base)
    ways = {"no sync": ApplySpec(1, sync=False), "1": ApplySpec(1), "2": ApplySpec(2)}
    times: dict[str, list[float]] = {key: [] for key in ("cp", "sync", "sha", *ways)}
    for _ in range(options.repeats):
        clean(out)
        times["cp"].append(timed(lambda: subprocess.run(["cp", "-r", base, out], check=True)))
        times["sync"].append(timed(lambda: synced(out)))
        times["sha"].append(timed(lambda: hashed(base)))
        for way, spec in ways.items():
            clean(out)
            times[way].append(timed(lambda spec=spec: apply_to_files(run, str(base), out, spec)))
    clean(out)
    mid = {key: statistics.median(value) for key, value in times.items()}
    over = measure_peak(root, name)
    clean(root / f"out-{name}")
    best = min(mid["1"], mid["2"])
    plain = mid["cp"] + mid["sha"]
    cells = [
        f"{sum(p.stat().st_size for p in base.iterdir()) / 1e9:.2f} GB",
        *(f"{mid[key]:.2f} s" for key in times),
        f"{mid['no sync'] / plain:.2f}",
        f"{best / plain:.2f}",
        f"{best / (plain + mid['sync']):.2f}",
        f"{over / 1e6:.0f} MB",
        f"{2 * 4 * WIDTH * INNER / 1e6:.0f} MB",
    ]
    print("| " + " | ".join(cells) + " |", flush=True)
    shutil.rmtree(base)


if __name__ == "__main__":
    main()
