"""Pico models, built from configurations, and a tokenizer of words: no network, no weights."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["SABER_CACHE"] = tempfile.mkdtemp(prefix="saber-tests-")

import checks  # noqa: F401, saber is decorated as it is imported
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from saber import prompts
from saber.lm.layers import find_layers
from saber.lm.model import LanguageModel

SHARED_CACHE = os.environ["SABER_CACHE"]
"""Where runs that several tests look at keep what they measured; each test has a folder of its own."""


def pytest_collection_modifyitems(items):
    """Slow tests come first, the demo model's before all, so that no process is left with one at the end."""
    items.sort(
        key=lambda item: (
            item.get_closest_marker("slow") is None,
            item.path.name != "test_demo.py",
            not item.name.startswith("test_the_main_job_takes_the_refusals_out"),
        )
    )


def pytest_unconfigure():
    shutil.rmtree(SHARED_CACHE, ignore_errors=True)


def thinned(folder: Path, step: int) -> dict[str, str]:
    """Settings of `data` for every `step`-th of the bundled prompts, written to files: runs are quicker.

    Twins stay together and splits as they are; everyday requests have none of their own there.
    """
    bundled = {
        "target": prompts.target(),
        "neutral": prompts.neutral(),
        "borderline": prompts.borderline().where(split="heldout"),
        "everyday": prompts.everyday(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: str(folder / f"{name}.jsonl") for name in bundled}
    for name, every in bundled.items():
        parts = [
            every.where(split=part).prompts[::step] for part in ("fit", "validation", "heldout")
        ]
        rows = [
            {"id": p.id, "category": p.category, "twin": p.twin, "prompt": p.text}
            | ({"split": p.split} if name in ("target", "neutral") else {})
            for part in parts
            for p in part
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        Path(files[name]).write_text(text, encoding="utf-8")
    return files


@contextmanager
def fewer_capabilities(step: int = 4):
    """Let runs read every `step`-th of the bundled capability prompts alone."""
    every = prompts.capability()
    some = replace(every, prompts=every.prompts[::step])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts, "capability", lambda: some)
        yield


CHAT_TEMPLATE = (
    "{% for m in messages %}<s><user> {{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %} <end> <bot>{% endif %}"
)
VOCABULARY = 400


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A byte-level tokenizer with a chat template of its own tokens."""
    special = ["<pad>", "<s>", "</s>", "<user>", "<end>", "<bot>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {t: i for i, t in enumerate([*special, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=special[3:],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def configuration(family: str, layers: int = 4, d_model: int = 32):
    """A configuration of a few thousand parameters."""
    common = {
        "hidden_size": d_model,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if family == "llama":
        return transformers.LlamaConfig(**common)
    if family == "gemma2":
        return transformers.Gemma2Config(**common, sliding_window=256, query_pre_attn_scalar=8)
    if family == "gemma3":
        return transformers.Gemma3TextConfig(**common, sliding_window=256, query_pre_attn_scalar=8)
    if family == "gpt2":
        return transformers.GPT2Config(
            n_embd=d_model,
            n_layer=layers,
            n_head=4,
            n_positions=512,
            vocab_size=VOCABULARY,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    raise ValueError(family)


def make_model(family: str = "llama", seed: int = 0, **size):
    """A random model whose norm gains and biases are far from their starting values."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(configuration(family, **size))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                noise = torch.randn_like(parameter)
                parameter.add_(0.1 * noise if "bias" in name else 0.5 * noise)
            else:
                parameter.mul_(4.0)
    return model.eval().requires_grad_(False)


def make_lm(family: str = "llama", **kwargs) -> LanguageModel:
    """A `LanguageModel` around a random model."""
    model = make_model(family, **kwargs)
    return LanguageModel(
        model=model,
        tokenizer=make_tokenizer(),
        name=f"pico-{family}",
        source="folder",
        base=None,
        stored_dtype=torch.float32,
        layers_path=find_layers(model),
    )


FAMILIES = ("llama", "gemma2", "gemma3", "gpt2")


@pytest.fixture(params=FAMILIES)
def lm(request) -> LanguageModel:
    """A pico model of each family."""
    return make_lm(request.param)


@pytest.fixture
def llama() -> LanguageModel:
    """A pico Llama."""
    return make_lm("llama")


@pytest.fixture(scope="session")
def pico(tmp_path_factory):
    """A pico Llama saved as a checkpoint, to be read alone."""
    folder = tmp_path_factory.mktemp("checkpoint") / "pico"
    make_model("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def model_folder(pico, tmp_path):
    """A copy of it that a test may change."""
    return Path(shutil.copytree(pico, tmp_path / "pico"))


@pytest.fixture(scope="session")
def few_files(tmp_path_factory):
    """Every fourth of the bundled prompts, for what depends on no prompt."""
    return thinned(tmp_path_factory.mktemp("few"), 4)


@pytest.fixture
def few(few_files):
    """The same, and as few of the capability prompts, which have no setting."""
    with fewer_capabilities():
        yield few_files


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Keep baselines out of the user's cache."""
    monkeypatch.setenv("SABER_CACHE", str(tmp_path_factory.mktemp("cache")))
