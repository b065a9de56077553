"""Load a model from the hub, a local folder, a GGUF file, or the bundled demo."""

from __future__ import annotations

import functools
import io
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers.models.auto import modeling_auto
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
)
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME, find_adapter_config_file

from saber.artifacts import names_gguf
from saber.errors import ModelError
from saber.lm import demo
from saber.lm.chat import encode
from saber.lm.device import (
    MORE_ROOM,
    DtypeName,
    choose_device,
    choose_dtype,
    holds,
    is_out_of_memory,
    share_keys_on_cpu,
)
from saber.lm.forward import counts_from_zero
from saber.lm.headers import cut_weight, gguf_dtype, main_dtype, processor_template
from saber.lm.layers import find_layers, layers_left_out
from saber.lm.model import LanguageModel, Source, Work
from saber.lm.offload import is_kept_aside, keep_aside, require_sense
from saber.lm.padding import ignores_padding
from saber.lm.thought import empty_thought
from saber.paths import expanded
from saber.weight_index import PICKLED, conversion, read_index


@dataclass(frozen=True)
class LoadSpec:
    """How to load a model."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:i or mps."""
    dtype: DtypeName = "auto"
    """Compute dtype; auto takes what the device is fast at."""
    device_map: str = ""
    """Passed to transformers (auto, balanced, ...) to spread a model over several devices."""
    offload: bool = False
    """Keep the layers in main memory and bring each to the device for its calls: for larger models."""
    chat_template: str = ""
    """A Jinja file that replaces the tokenizer's chat template."""
    system: str = ""
    """System prompt in front of every prompt; empty leaves it to the chat template."""
    response_prefix: str = ""
    """Text in front of every answer; empty takes an empty thought where the model would open one."""
    thinking: bool = False
    """Let the model think before it answers, as its chat template has it; saber eval, chat and ui alone."""
    layers_path: str = ""
    """Dotted path of the decoder's layer list; empty finds it by tracing."""
    revision: str = ""
    """Branch, tag or commit of a hub model; empty takes what its main branch has now."""
    trust_remote_code: bool = False
    """Run modelling code that comes with the checkpoint."""
    dequantize: bool = False
    """Take weights that are quantised (MXFP4, FP8) as the plain ones that they stand for."""
    allow_unproven: bool = False
    """Edit the writers that were found even where they cannot be proved to be all."""


def load(name: str, spec: LoadSpec = LoadSpec(), *, tokenizer: bool = True) -> LanguageModel:
    """Load `name`: `demo`, a `.gguf` file, a local folder, or a hub id; without its tokenizer if wanted.

    Raises `ModelError` when it cannot be found, lacks weights, tokenizer or chat template, or is
    not a causal language model.
    """
    gguf = name == "demo" or names_gguf(name)
    with quiet_transformers(gguf=gguf), _parsed_once() if gguf else nullcontext():
        return _load(name, spec, with_tokenizer=tokenizer)


def as_stored(lm: LanguageModel, spec: LoadSpec) -> LanguageModel:
    """Return a model with the weights of its checkpoint as exactly as float32 holds them.

    That is the model itself, unless it computes in 16 bits that round them: then they are read once more,
    to the CPU, in float32. `spec` is what it was loaded with.
    """
    if lm.dtype == torch.float32 or holds(lm.dtype, lm.stored_dtype):
        return lm
    there = replace(spec, device="cpu", device_map="", offload=False, dtype="float32")
    there = replace(there, revision=lm.revision or spec.revision)  # a branch may have moved on
    return load(lm.name, there, tokenizer=lm.tokenizer is not None)


def skeleton(name: str, spec: LoadSpec = LoadSpec()) -> Any:
    """Return the transformers model of `name` without its weights: modules, names and shapes alone.

    Everything lies on the meta device, so that it takes no memory to speak of. Raises `ModelError` as
    `load` does.
    """
    gguf_source = name == "demo" or names_gguf(name)
    with quiet_transformers(gguf=gguf_source), _parsed_once() if gguf_source else nullcontext():
        _, location, gguf = _locate(name, spec.revision, with_tokenizer=False)
        options: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
        at = {"revision": spec.revision} if spec.revision else {}
        files = {"gguf_file": gguf} if gguf else {}
        config = _read(
            f"the configuration of {name!r}",
            transformers.AutoConfig,
            location,
            **files,
            **options,
            **at,
        )
        auto_class = _auto_class(name, config)
        if at and spec.trust_remote_code and _has_own_code(auto_class, config):
            options["code_revision"] = spec.revision
        with torch.device("meta"):
            return auto_class.from_config(config, **options).eval()


def _has_own_code(auto_class: Any, config: Any) -> bool:
    """Whether a model's code comes with its checkpoint, and is not in memory already."""
    own = auto_class.__name__ in (getattr(config, "auto_map", None) or {})
    return own and type(config) not in auto_class._model_mapping


def _load(name: str, spec: LoadSpec, *, with_tokenizer: bool) -> LanguageModel:
    source, location, gguf = _locate(name, spec.revision, with_tokenizer=with_tokenizer)
    device = choose_device(spec.device)
    if spec.offload:
        require_sense(device, spec.device_map)
    share_keys_on_cpu(device)
    files: dict[str, Any] = {"gguf_file": gguf} if gguf else {}
    trusted: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
    if spec.revision:
        trusted["revision"] = spec.revision
    config = _read(
        f"the configuration of {name!r}", transformers.AutoConfig, location, **files, **trusted
    )
    auto_class = _auto_class(name, config)
    packed = _packing(name, config, dequantize=spec.dequantize)
    if block := getattr(packed, "weight_block_size", None):
        _refuse_cut_blocks(name, location, block, spec.revision)
    if gguf:
        stored = gguf_dtype(str(Path(location) / gguf))
    else:
        stored = _stored_dtype(config) or _main_dtype(name, location, spec.revision)
    dtype = choose_dtype(spec.dtype, device, stored)
    tokenizer = None
    if with_tokenizer:
        tokenizer = _tokenizer(name, location, spec, {**files, **trusted})
    placement = {"device_map": spec.device_map} if spec.device_map else {}
    if gguf:
        packed = transformers.GgufConfig(dequantize=True)
    if packed:
        files["quantization_config"] = packed
    model, told = _read(
        f"the weights of {name!r}",
        auto_class,
        location,
        dtype=dtype,
        output_loading_info=True,
        **files,
        **trusted,
        **placement,
    )
    _refuse_incomplete(name, model, told)
    if packed:
        _forget_quantization(model)
    if source == "hub":
        model.config._commit_hash = _commit(
            name, spec.revision
        )  # as transformers did up to version 5
    if source == "demo":
        demo.merge_adapter(model)
    model.eval().requires_grad_(False)
    if spec.offload:
        keep_aside(model, device)
    elif not spec.device_map:
        model.to(device)
    _refuse_left_off(name, model)
    layers_path = find_layers(model, spec.layers_path)
    if spec.offload and not all(map(is_kept_aside, model.get_submodule(layers_path))):
        raise ModelError(
            f"the layers of {name!r} lie inside other module lists, so they cannot wait in main memory.",
            "Leave out --offload.",
        )
    lm = LanguageModel(
        model=model,
        tokenizer=tokenizer,
        name=name,
        source=source,
        base=demo.BASE if source == "demo" else (name if source == "hub" else None),
        stored_dtype=stored,
        layers_path=layers_path,
        allow_unproven=spec.allow_unproven,
        before=(("system", spec.system),) if spec.system else (),
        response_prefix=spec.response_prefix,
        thinking=spec.thinking,
        notes=_notes(model, layers_path, told),
    )
    if with_tokenizer:
        _require_embeddings(lm)
        with _runs(lm):
            lm = replace(lm, told=counts_from_zero(lm))
            lm = replace(lm, pads=lm.told and ignores_padding(lm))
    if with_tokenizer and not spec.response_prefix:
        lm = replace(lm, response_prefix=empty_thought(replace(lm, thinking=False)))
    return replace(lm, work=Work())


def _require_embeddings(lm: LanguageModel) -> None:
    """Raise `ModelError` where the tokenizer writes a prompt in tokens that the model does not have."""
    rows = lm.model.get_input_embeddings().weight.shape[0]
    beyond = [token for token in encode(lm, ["Name a fruit."])[0].ids if token >= rows]
    if beyond:
        written = lm.tokenizer.convert_ids_to_tokens(beyond[0])
        raise ModelError(
            f"the tokenizer of {lm.name!r} writes {written!r} as token {beyond[0]}, and the model has "
            f"{rows}.",
            "Take the tokenizer of these very weights, or another --chat-template.",
        )


@contextmanager
def _runs(lm: LanguageModel) -> Iterator[None]:
    """Raise `ModelError` where a model's own code mixes dtypes: some of transformers run in float32 alone."""
    try:
        yield
    except RuntimeError as error:
        if lm.dtype.itemsize != 2 or is_out_of_memory(error):
            raise
        dtype = str(lm.dtype).removeprefix("torch.")
        first = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{lm.name!r} does not run in {dtype}: {first}.", "Use --dtype float32."
        ) from error


def _tokenizer(name: str, location: str, spec: LoadSpec, options: dict[str, Any]) -> Any:
    """Return the tokenizer, with a chat template and a padding token."""
    what, auto_class = f"the tokenizer of {name!r}", transformers.AutoTokenizer
    tokenizer = _read(what, auto_class, location, **options)
    if type(tokenizer).__name__ == _TEMPLATELESS:
        tokenizer = _read(what, auto_class, location, mistral_format=False, **options)
    if spec.chat_template:
        tokenizer.chat_template = read_template(Path(spec.chat_template))
    elif not tokenizer.chat_template and "gguf_file" not in options:
        tokenizer.chat_template = processor_template(location, spec.revision)
    if not tokenizer.chat_template:
        raise ModelError(
            f"{name!r} has no chat template, as is usual for a base model.",
            "Pass one with --chat-template FILE.jinja.",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _packing(name: str, config: Any, *, dequantize: bool) -> Any:
    """Return how transformers unpacks a model's weights, None where they are plain.

    Raises `ModelError` for packed ones that are not to be unpacked, or cannot be: an edit of rank k has
    no exact place in them.
    """
    for part in (config, config.get_text_config(decoder=True)):
        packed = getattr(part, "quantization_config", None)
        if packed:
            given = packed if isinstance(packed, dict) else packed.to_dict()
            method = given.get("quant_method", "an unnamed method")
            method = str(getattr(method, "value", method))
            if dequantize and method in _UNPACKED:
                return getattr(transformers, _UNPACKED[method]).from_dict(
                    {**given, "dequantize": True}
                )
            way = _DEQUANTIZE.get(method, "dequantisation")
            itself = "pass --dequantize, or " if method in _UNPACKED else ""
            raise ModelError(
                f"the weights of {name!r} are quantised ({method}); SABER edits plain ones.",
                f"Give the checkpoint it was quantised from, or {itself}load this one with "
                f"{way} and save it, edit that, and quantise again.",
            )
    return None


def _refuse_cut_blocks(name: str, location: str, block: Sequence[int], revision: str) -> None:
    """Refuse 8-bit weights that are no whole blocks: transformers gives other values for them, unasked."""
    try:
        cut = cut_weight(location, block, revision)
    except LOAD_ERRORS as error:
        raise _unreadable(f"the weights of {name!r}", error) from error
    if cut:
        rows, columns = block
        raise ModelError(
            f"{cut} of {name!r} is of no whole blocks of {rows} x {columns}, which transformers dequantises "
            "to other values.",
            "Give the checkpoint it was quantised from.",
        )


def _refuse_incomplete(name: str, model: Any, told: Mapping[str, Any]) -> None:
    """Refuse a model some of whose weights are not in its files: transformers makes up random ones."""
    lacking = sorted(set(told["missing_keys"]) & {n for n, _ in model.named_parameters()})
    if lacking:
        unknown = sorted(told["unexpected_keys"])
        remedy = f"They hold {len(unknown)} others, {unknown[0]} for one. " if unknown else ""
        raise ModelError(
            f"the files of {name!r} lack {len(lacking)} of its weights, {lacking[0]} for one.",
            remedy + "Download the checkpoint again, or give one that is whole and not quantised.",
        )


def _notes(model: Any, layers_path: str, told: Mapping[str, Any]) -> tuple[str, ...]:
    """Say where the configuration has fewer layers than the files: transformers loads it without a word."""
    beyond = layers_left_out(model, layers_path, told["unexpected_keys"])
    if not beyond:
        return ()
    count = len(model.get_submodule(layers_path))
    return (
        f"the files hold {count + beyond} layers, and the configuration takes {count}; the rest are left "
        "out, as they should be if they are extra prediction layers (MTP).",
    )


def _refuse_left_off(name: str, model: Any) -> None:
    """Refuse a model of which parts lie elsewhere between their calls, where nothing can be edited."""
    aside = sorted({n.rpartition(".")[0] for n, p in model.named_parameters() if p.is_meta})
    if aside:
        raise ModelError(
            f"{name!r} does not fit on the devices: {len(aside)} of its modules, {aside[0]} for one, "
            "were left off them.",
            "Use --dtype bfloat16 if it is not that already, --offload without --device-map, more or larger "
            "devices, or --device cpu.",
        )


_TEMPLATELESS = "MistralCommonBackend"
"""transformers' tokenizer over Mistral's own package, which takes no chat template."""
_UNPACKED = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}
"""Method of quantisation -> transformers' configuration of it, which can undo it."""
_DEQUANTIZE = {
    **{name: f"transformers' {config}(dequantize=True)" for name, config in _UNPACKED.items()},
    "bitsandbytes": "model.dequantize()",
}


def require_hub(name: str, revision: str) -> None:
    """Raise `ModelError` for a revision of what lies on this machine."""
    if revision and (name == "demo" or names_gguf(name) or expanded(name).exists()):
        raise ModelError(
            f"--revision {revision} is of a model on the hub, and {name} is none.",
            "Leave it out (a --base of saber eval has its own: --base OWNER/NAME@REVISION).",
        )


def at_revision(name: str, spec: LoadSpec) -> tuple[str, LoadSpec]:
    """Return the hub id in `OWNER/NAME@REVISION`, and how it is loaded: of that revision, or of main.

    A name without a revision, and that of a folder, stays as it is.
    """
    plain, _, revision = name.partition("@")
    if not revision or expanded(name).exists():
        return name, replace(spec, revision="")
    return plain, replace(spec, revision=revision)


def _locate(
    name: str, revision: str = "", *, with_tokenizer: bool = True
) -> tuple[Source, str, str]:
    """Return the source, the folder or hub id, and the GGUF file name (empty when none)."""
    require_hub(name, revision)
    if name == "demo":
        path = demo.base_gguf()
        return "demo", str(path.parent), path.name
    path = expanded(name)
    if names_gguf(name):
        if not path.is_file():
            raise ModelError(f"no such file: {name}.", "Check the path of the .gguf file.")
        return "gguf", str(path.parent), path.name
    if path.is_dir():
        _check_folder(path, with_tokenizer=with_tokenizer)
        return "folder", str(path), ""
    if path.is_file():
        raise ModelError(
            f"{name} is a file.", "Give the model's folder, or a file that ends in .gguf."
        )
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) is None or name.startswith((".", "/", "~")):
        raise ModelError(
            f"no such model: {name!r} is no folder here and no hub id.",
            "Give a folder, a .gguf file, a hub id like owner/name, or demo."
            + (" A revision of a model is given by --revision." if "@" in name else ""),
        )
    if _has_adapter(name, revision):
        raise ModelError(f"{name!r} is or holds a LoRA adapter, which is not edited.", _MERGE)
    return "hub", name, ""


def _has_adapter(name: str, revision: str) -> bool:
    at: dict[str, Any] = {"revision": revision} if revision else {}
    try:
        return find_adapter_config_file(name, **at) is not None
    except (OSError, ValueError):
        return False  # what is wrong is told when the configuration is read


_MERGE = (
    "Merge it into its base first: peft.PeftModel.from_pretrained(BASE_MODEL, ADAPTER_FOLDER)"
    ".merge_and_unload().save_pretrained(FOLDER), copy the tokenizer there, and give that folder."
)


def _check_folder(path: Path, *, with_tokenizer: bool) -> None:
    def has(*patterns: str) -> bool:
        return any(True for pattern in patterns for _ in path.glob(pattern))

    if has(ADAPTER_CONFIG_NAME) and not has("config.json"):
        raise ModelError(f"{path} is a LoRA adapter, no model.", _MERGE)
    if has(ADAPTER_CONFIG_NAME):
        raise ModelError(
            f"{path} holds a LoRA adapter ({ADAPTER_CONFIG_NAME}) beside its weights, which transformers "
            "lays over them unmerged.",
            f"Move adapter_* to a folder of its own. {_MERGE} If the weights are merged already, "
            "leave it there.",
        )
    if not has("config.json"):
        hint = "It holds a .gguf file: name that file itself." if has("*.gguf") else ""
        raise ModelError(f"{path} has no config.json, so it is no model folder.", hint)
    if not has("*.safetensors", "*.safetensors.index.json"):
        pickled = [file for pattern in PICKLED for file in path.glob(pattern)]
        if pickled:
            raise ModelError(
                f"{path} has pickle weights only ({pickled[0].name}).",
                conversion(path, tokenizer=with_tokenizer),
            )
        raise ModelError(f"{path} has no weights (*.safetensors).", "Download them first.")
    if has(SAFE_WEIGHTS_INDEX_NAME) and not has(SAFE_WEIGHTS_NAME):
        read_index(path / SAFE_WEIGHTS_INDEX_NAME, outside=True)  # as transformers allows
    if with_tokenizer and not has(
        "tokenizer.json", "tokenizer.model", "vocab.*", "tokenizer_config.json"
    ):
        raise ModelError(
            f"{path} has no tokenizer.", "Copy the tokenizer files of the model into it."
        )


def _auto_class(name: str, config: Any) -> Any:
    """Return the auto class for a decoder; raises `ModelError` for anything else."""
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    vision = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    claimed = set(getattr(config, "architectures", None) or [])
    if config.is_encoder_decoder:
        raise ModelError(f"{name!r} is an encoder-decoder model; SABER edits causal decoders.")
    kind = config.model_type
    if kind in causal and (not claimed or claimed & set(causal.values())):
        return transformers.AutoModelForCausalLM
    if kind in vision:
        return transformers.AutoModelForImageTextToText
    if claimed & set(causal.values()) or getattr(config, "auto_map", None):
        return transformers.AutoModelForCausalLM
    what = ", ".join(sorted(claimed)) or kind
    raise ModelError(f"{name!r} is not a causal language model ({what}).", "Give a chat model.")


def _stored_dtype(config: Any) -> torch.dtype | None:
    text = config.get_text_config(decoder=True)
    for value in (getattr(config, "dtype", None), getattr(text, "dtype", None)):
        if isinstance(value, torch.dtype):
            return value
    return None


def _commit(name: str, revision: str) -> str | None:
    """Return the commit of a hub model whose files were just read, None where they are not in a cache."""
    found = cached_file(
        name,
        CONFIG_NAME,
        revision=revision or None,
        _raise_exceptions_for_missing_entries=False,
    )
    folder = Path(found).parent if found else None
    return folder.name if folder and folder.parent.name == "snapshots" else None


def _main_dtype(name: str, location: str, revision: str) -> torch.dtype:
    """Return the dtype of most of the weights, for a configuration that names none."""
    try:
        return main_dtype(location, revision) or torch.float32
    except LOAD_ERRORS as error:
        raise _unreadable(f"the weights of {name!r}", error) from error


def read_template(path: Path) -> str:
    """Return the text of a chat template; raises `ModelError` when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ModelError(
            f"cannot read the chat template {path}: {said}.",
            "Give a Jinja file to --chat-template.",
        ) from error


LOAD_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    RuntimeError,
    ImportError,
    TypeError,
    AttributeError,
    IndexError,
    EOFError,
    OverflowError,
    struct.error,
    SafetensorError,
    StrictDataclassError,
)


def _read(what: str, cls: Any, location: str, **kwargs: Any) -> Any:
    """Call `cls.from_pretrained`; turn its many errors into one clear line."""
    try:
        return cls.from_pretrained(location, **kwargs)
    except LOAD_ERRORS as error:
        raise _unreadable(what, error) from error


_TOKEN = "run hf auth login, or set HF_TOKEN to a token that may read it"
GATED = f"Accept its terms on its page of the hub, then {_TOKEN}."
UNKNOWN = f"Check the name; if it is private, {_TOKEN}."
"""What to do where the hub keeps a model from one: it is gated, or not known by that name."""


def _unreadable(what: str, error: Exception) -> ModelError:
    said = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    first = " ".join(said[: 2 if said[0].endswith(":") else 1])
    remedy = "Check the name, the files, and the connection to the hub."
    if is_out_of_memory(error):
        remedy = MORE_ROOM
    elif "gated repo" in first:
        remedy = GATED
    elif "valid model identifier" in first:
        first += "."
        remedy = UNKNOWN
    elif "valid git identifier" in first:
        remedy = "Give a branch, tag or commit of it to --revision."
    elif "trust_remote_code" in str(error):
        remedy = "Pass --trust-remote-code to run it, if you trust where it comes from."
    return ModelError(f"cannot read {what}: {first.rstrip('.')}.", remedy)


def _forget_quantization(model: Any) -> None:
    """Make a dequantised model an ordinary one, so that it can be saved."""
    model.hf_quantizer = None
    model.is_quantized = False
    for config in (model.config, model.config.get_text_config(decoder=True)):
        if hasattr(config, "quantization_config"):
            del config.quantization_config


@contextmanager
def quiet_transformers(*, gguf: bool) -> Iterator[None]:
    """Silence transformers' own warnings and bars, which the caller's would run into."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        # The GGUF reader draws its bar whatever it is told.
        with redirect_stderr(io.StringIO()) if gguf else nullcontext():
            yield
    finally:
        transformers.logging.enable_progress_bar()
        transformers.logging.set_verbosity(before)


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Keep what `gguf` has parsed: transformers parses the file four times, and the names per module."""
    import gguf
    from transformers import modeling_gguf_pytorch_utils as reading

    class PlainReader(gguf.GGUFReader):
        """Cuts its many small fields from a plain array: a memory map is slow to slice."""

        def _get(self, *args: Any, **kwargs: Any) -> Any:
            if isinstance(self.data, np.memmap):
                self.__dict__["data"] = np.asarray(self.data)
            return super()._get(*args, **kwargs)

    parse, known = reading._gguf_parse_value, dict[tuple[int, int], Any]()

    def parsed(value: Any, kind: Any) -> Any:
        # Fields are told apart by where they lie: the kept reader keeps them all.
        key = (id(value), id(kind))
        if key not in known:
            known[key] = parse(value, kind)
        return known[key]

    names = gguf.get_tensor_name_map
    with (
        patch.object(gguf, "GGUFReader", functools.cache(PlainReader)),
        patch.object(gguf, "get_tensor_name_map", functools.cache(names)),
        patch.object(reading, "_gguf_parse_value", parsed),
    ):
        yield
