"""A make-believe accelerator, `acc:0` and `acc:1`, and what is done on it in a process of its own.

The device has memory of its own kind and computes by the CPU's kernels, but refuses tensors that lie
elsewhere, as CUDA does, and float64, as Apple's GPUs do. It stays registered for as long as its process
runs, which other tests should not see.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import subprocess
import sys
import sysconfig
import tempfile
import types
import warnings
from pathlib import Path
from unittest.mock import patch

import torch

SOURCE = Path(__file__).parent / "accelerator.cpp"
LAYERS = 4


def build(folder: Path) -> Path:
    """Compile the device into a folder; return the library."""
    from torch.utils import cpp_extension

    library = folder / "accelerator.so"
    headers = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
    libraries = cpp_extension.library_paths()
    command = ["g++", "-O0", "-std=c++17", "-shared", "-fPIC", "-DTORCH_EXTENSION_NAME=accelerator"]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    command += [part for path in headers for part in ("-isystem", path)]
    command += [str(SOURCE), "-o", str(library)]
    command += [part for path in libraries for part in (f"-L{path}", f"-Wl,-rpath,{path}")]
    command += ["-ltorch", "-ltorch_cpu", "-lc10", "-ltorch_python"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return library


def register(library: Path) -> None:
    """Make torch know the device `acc` of a compiled library; called once a process."""
    spec = importlib.util.spec_from_file_location("accelerator", library)
    assert spec
    assert spec.loader
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    torch.utils.rename_privateuse1_backend("acc")
    module = types.ModuleType("torch.acc")
    module.__dict__.update(
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 2,
        current_device=lambda: 0,
        _is_in_bad_fork=lambda: False,
        manual_seed_all=lambda _seed: None,
        get_amp_supported_dtype=lambda: [torch.float16, torch.bfloat16],
    )
    torch._register_device_module("acc", module)
    torch.utils.generate_methods_for_privateuse1_backend()
    os.environ["SABER_CACHE"] = "off"
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def refusals() -> dict[str, str]:
    """Return what the device says where tensors meet that should not; it would be no test otherwise."""
    here, there = torch.ones(2, 2, device="acc:0"), torch.ones(2, 2, device="acc:1")
    tried = {
        "sum with the CPU": lambda: here + torch.ones(2, 2),
        "product of two devices": lambda: here @ there,
        "batched product of two devices": lambda: here[None] @ there[None],
        "cat": lambda: torch.cat([here, torch.ones(2, 2)]),
        "rows by a CPU index": lambda: here.index_select(0, torch.tensor([0])),
        "float64": lambda: here.double(),
        "float64 on the way to the CPU": lambda: here.to("cpu", torch.float64),
        "number of the CPU": lambda: here * torch.tensor(2.0),
        "CPU index in brackets": lambda: here[torch.tensor([1])],
    }
    said = {}
    for name, attempt in tried.items():
        try:
            attempt()
            said[name] = ""
        except (RuntimeError, TypeError) as error:
            said[name] = str(error)
    return said


def saved(family: str, folder: Path) -> Path:
    """Save a small random model with its tokenizer."""
    import tiny
    from conftest import FAMILIES, make_model, make_tokenizer

    model = make_model(family) if family in FAMILIES else tiny.tiny_model(family)
    model.save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    return folder / "model"


def spread(family: str) -> dict[str, str]:
    """Return a placement: the lower half of the layers on one device, the upper on the other."""
    gpt2 = family == "gpt2"
    layers = "transformer.h" if gpt2 else "model.layers"
    first = (
        ("transformer.wte", "transformer.wpe")
        if gpt2
        else ("model.embed_tokens", "model.rotary_emb")
    )
    last = "transformer.ln_f" if gpt2 else "model.norm"
    places = {f"{layers}.{i}": f"acc:{2 * i // LAYERS}" for i in range(LAYERS)}
    return {**places, **dict.fromkeys((*first, "lm_head"), "acc:0"), last: "acc:1"}


def _placed(placement: dict[str, str] | None):
    """Let models that are to be spread over devices lie as told."""
    from saber.lm import load

    read = load._read

    def placed(*args, **kwargs):
        if "device_map" in kwargs:
            kwargs["device_map"] = placement
        return read(*args, **kwargs)

    return patch.object(load, "_read", placed)


def proved(family: str, where: str, placement: dict[str, str] | None = None) -> list[str]:
    """Prove the writers of a model in bfloat16 whose layers write next to nothing; return their names."""
    from saber.inspection import require_ablated
    from saber.lm.load import LoadSpec, load
    from saber.lm.writers import find_writers

    with tempfile.TemporaryDirectory() as folder:
        path = saved(family, Path(folder))
        spec = LoadSpec(device=where, dtype="bfloat16", device_map="auto" if placement else "")
        with _placed(placement):
            lm = load(str(path), spec)
    writers = find_writers(lm)
    for writer in writers:
        lm.model.get_parameter(writer.weight).mul_(1e-4)
    found = find_writers(lm)
    require_ablated(lm, found)
    assert {p.device.index for p in lm.layers.parameters()} == ({0, 1} if placement else {None})
    return [w.weight for w in found]


def offloaded(family: str, dtype: str) -> dict:
    """Load a model whose layers wait in main memory; return where its tensors are, and when."""
    from saber.lm.load import LoadSpec, load

    with tempfile.TemporaryDirectory() as folder:
        path = saved(family, Path(folder))
        lm = load(str(path), LoadSpec(device="acc", dtype=dtype, offload=True))
        whole = load(str(path), LoadSpec(device="acc", dtype=dtype))
    inside = {id(p) for p in lm.layers.parameters()}
    during: list[set[str]] = []

    def look(_module, _args):
        during.append({p.device.type for p in lm.layers.parameters()})

    first = lm.layers[0]
    handle = first.register_forward_pre_hook(look)
    ids = torch.tensor([[1, 5, 6, 2]])
    logits = lm.model(input_ids=ids.to("acc")).logits
    handle.remove()
    return {
        "layers": {p.device.type for p in lm.layers.parameters()},
        "others": {p.device.type for p in lm.model.parameters() if id(p) not in inside},
        "during": during,
        "first": {p.device.type for p in first.parameters()},
        "logits": (logits.device.type, logits.float().cpu().tolist()),
        "whole": whole.model(input_ids=ids.to("acc")).logits.float().cpu().tolist(),
    }


def edited(
    family: str,
    preset: str,
    where: str,
    placement: dict[str, str] | None = None,
    offload: bool = False,
    sensitive: bool = True,
) -> dict:
    """Run the whole pipeline on a device, with a placement or offloaded; return what came out, in numbers.

    Edits that are `sensitive` follow what answers feel, which takes gradients.
    """
    from architectures import prompt_files
    from test_pipeline import small

    from saber import pipeline

    with tempfile.TemporaryDirectory() as folder, _placed(placement):
        path = Path(folder)
        model = saved(family, path)
        config = small(
            preset,
            load={
                "device": where,
                "device_map": "auto" if placement else "",
                "offload": offload,
            },
            data={**prompt_files(path), "limit": 4},
            edit={} if sensitive else {"sensitivity": 0.0},
        )
        record = pipeline.run(
            str(model), path / "run", config, force=True, export=("merged",)
        ).record
    return {
        "device": record["model"]["device"],
        "perplexity": record["edited"]["perplexity"]["overall"],
        "untouched": record["baseline"]["perplexity"]["overall"],
        "kl": record["edited"]["kl"]["sequence"],
        "writers": record["writers_edited"],
    }


@contextlib.contextmanager
def _inside(folder: str):
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def commands(calls: list[list[str]]) -> list[tuple[int, str]]:
    """Run commands one after the other in a folder with a model; return exit statuses and errors."""
    from saber.cli.main import main

    found = []
    with tempfile.TemporaryDirectory() as folder, _inside(folder):
        saved("llama", Path(folder))
        for call in calls:
            errors = io.StringIO()
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(errors),
                patch.object(sys, "stdin", io.StringIO("hello\n")),
            ):
                try:
                    status = main(call)
                except SystemExit as left:
                    status = left.code
            found.append((status or 0, errors.getvalue()[-600:]))
    return found
