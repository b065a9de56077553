"""The files of a checkpoint's weights: which of them holds which tensor, and what to do with pickled ones."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from saber import artifacts
from saber.errors import ModelError

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
"""What files of pickled weights are called."""


def conversion(folder: Path, *, tokenizer: bool = False) -> str:
    """Return how to convert a folder of pickled weights to safetensors, with its tokenizer if wanted."""
    to = f"'{folder}-safetensors'"
    more, also = (
        (", AutoTokenizer as T", f"; T.from_pretrained('{folder}').save_pretrained({to})")
        if tokenizer
        else ("", "")
    )
    return (
        "Pickle files can run code when they are read. Convert them first: python -c "
        f'"from transformers import AutoModelForCausalLM as M{more}; '
        f"M.from_pretrained('{folder}', dtype='auto').save_pretrained({to}){also}\""
    )


def read_index(path: Path, *, outside: bool = False) -> dict[str, str]:
    """Return an index's file for each tensor, by its path in the folder, which may be in a subfolder.

    Raises `ModelError` where a file is not there, or lies outside and `outside` does not allow it.
    """
    listed = artifacts.read_json(path).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ModelError(f"{path} has no weight_map.", "Download it again.")
    files = sorted({str(file) for file in listed.values()})
    missing = [f for f in files if not ((outside or _inside(f)) and (path.parent / f).is_file())]
    if missing:
        more = f" (nor are {len(missing) - 1} more)" if missing[1:] else ""
        remedy = "Download what is missing."
        if not outside and not _inside(missing[0]):
            remedy = f"Move it into the folder, and name it in {path.name} by its plain path there."
        raise ModelError(
            f"{path.name} names {missing[0]}, which is not in {path.parent}{more}.", remedy
        )
    return {str(name): str(file) for name, file in listed.items()}


def _inside(file: str) -> bool:
    """Whether a name is a plain path in the folder: another would be written outside --out as well."""
    path = PurePosixPath(file)
    plain = path.as_posix() == file and "\\" not in file and ":" not in file
    return plain and not path.is_absolute() and ".." not in path.parts
