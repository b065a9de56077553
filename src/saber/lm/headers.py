"""What the headers of a checkpoint's files say, before any weight is read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from saber import artifacts

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Dtypes of plain weights, by their name in the files."""
PROCESSOR_FILES = ("chat_template.json", "processor_config.json")
"""Where a processor keeps a chat template, in files that are no tokenizer's."""


def weight_files(location: str, revision: str = "") -> list[str]:
    """Return the weights of a folder, or of a hub id at a revision (empty: main), fetched where they are
    not there yet."""
    whole = _file(location, SAFE_WEIGHTS_NAME, revision)
    if whole is not None:
        return [whole]  # what transformers reads, whatever an index beside it says
    index = _file(location, SAFE_WEIGHTS_INDEX_NAME, revision)
    if index is None:
        return []
    return list(get_checkpoint_shard_files(location, index, revision=revision or None)[0])


def gguf_dtype(path: str) -> torch.dtype:
    """Return the dtype that most entries of a GGUF file are stored in, float16 where these are quantised."""
    import gguf

    entries: Counter[str] = Counter()
    for tensor in gguf.GGUFReader(path).tensors:
        entries[tensor.tensor_type.name] += int(tensor.n_elements)
    return FLOATS.get(max(entries, key=lambda code: entries[code]), torch.float16)


def _file(location: str, name: str, revision: str) -> str | None:
    return cached_file(
        location, name, revision=revision or None, _raise_exceptions_for_missing_entries=False
    )


def main_dtype(location: str, revision: str = "") -> torch.dtype | None:
    """Return the dtype that most entries of the weights are stored in, None where none are plain floats.

    Raises `OSError` and `SafetensorError` for files that cannot be read.
    """
    entries: Counter[str] = Counter()
    for path in weight_files(location, revision):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_slice(name)
                entries[tensor.get_dtype()] += math.prod(tensor.get_shape())
    most = max(FLOATS, key=lambda code: entries[code])
    return FLOATS[most] if entries[most] else None


def cut_weight(location: str, block: Sequence[int], revision: str = "") -> str | None:
    """Return an 8-bit weight of several blocks of which the last is cut off, None where there is none.

    Raises `OSError` and `SafetensorError` for files that cannot be read.
    """
    for path in weight_files(location, revision):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_slice(name)
                sides = zip(tensor.get_shape()[-2:], block, strict=False)
                if tensor.get_dtype() == "F8_E4M3" and any(n > b and n % b for n, b in sides):
                    return str(name)
    return None


def processor_template(location: str, revision: str = "") -> str | None:
    """Return the chat template that lies with a model's processor, None where there is none.

    Models with images of some years have theirs there alone, where tokenizers do not look. Raises
    `DataError` for a file that is no JSON.
    """
    for name in PROCESSOR_FILES:
        path = cached_file(
            location,
            name,
            revision=revision or None,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        text = artifacts.read_json(Path(path)).get("chat_template") if path else None
        if isinstance(text, str) and text:
            return text
    return None
