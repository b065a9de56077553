"""Time a whole `saber run`, and hold its work against this machine's own matmul rate.

    python benchmarks/throughput.py [--out FILE] [saber run arguments, default: demo]

Work is tokens x 2 x parameters of what they pass through (layers; output head only where logits
are taken), and the products that make second moments, counted by the library itself. The rate is the
best of several float32 products of 2048^3 before and after the run. Peak memory is that of the run's
process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from saber.lm.device import choose_device, matmul_rate


def main() -> None:
    """Run once and print a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="append the JSON line to this file")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what follows 'saber run'")
    given = parser.parse_args()
    arguments = given.arguments or ["demo"]
    device = choose_device("auto")
    rates = [matmul_rate(device, torch.float32, 2048, 5)]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        command = [sys.executable, "-m", "saber.cli.main", "run", *arguments]
        subprocess.run([*command, "--out", f"{folder}/run", "--overwrite"], check=True)
        wall = time.perf_counter() - start
        record = json.loads(Path(folder, "run", "run.json").read_text(encoding="utf-8"))
    rates.append(matmul_rate(device, torch.float32, 2048, 5))
    tflop = record["work"]["tflop"]
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()}-core {platform.machine()} {device.type}",
        "arguments": arguments,
        "wall_seconds": round(wall, 1),
        "seconds": {k: round(v, 1) for k, v in record["seconds"].items()},
        "peak_gib": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20, 2),
        "tokens": record["work"]["tokens"],
        "tflop": round(tflop, 2),
        "gflops": round(tflop * 1e3 / wall, 1),
        "matmul_gflops": [round(r, 1) for r in rates],
        "share_of_matmul_rate": round(tflop * 1e3 / wall / max(rates), 3),
    }
    line = json.dumps(result)
    print(line)
    if given.out:
        with given.out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
