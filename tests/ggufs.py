"""Pico models as GGUF files, and llama.cpp to run them: what tests of exports are held against."""

from __future__ import annotations

import re

import gguf
import numpy as np
import torch
import transformers
from gguf import quants

ARCHITECTURES = {
    "llama": "llama",
    "gpt2": "gpt2",
    "gemma2": "gemma2",
    "qwen3_moe": "qwen3moe",
    "mixtral": "llama",
}


def moe_model(family: str, seed: int = 0, hidden: int = 64, inner: int = 32):
    """A pico mixture of experts with fused experts; sizes are multiples of a quantisation block."""
    common = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 300,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    if family == "qwen3_moe":
        config = transformers.Qwen3MoeConfig(
            **common,
            moe_intermediate_size=inner,
            num_experts=4,
            num_experts_per_tok=2,
            norm_topk_prob=True,
        )
    else:
        config = transformers.MixtralConfig(**common, num_local_experts=4, num_experts_per_tok=2)
    return _spread(transformers.AutoModelForCausalLM.from_config(config), seed)


def dense_model(family: str, seed: int = 0, hidden: int = 64):
    """A pico dense model whose sizes are multiples of a quantisation block."""
    common = {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if family == "gpt2":
        config = transformers.GPT2Config(
            n_embd=hidden, n_layer=2, n_head=4, n_positions=128, **common
        )
    else:
        cls = {"llama": transformers.LlamaConfig, "gemma2": transformers.Gemma2Config}[family]
        more = {"query_pre_attn_scalar": 16} if family == "gemma2" else {}
        config = cls(
            hidden_size=hidden,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=hidden // 4,
            max_position_embeddings=128,
            **common,
            **more,
        )
    return _spread(transformers.AutoModelForCausalLM.from_config(config), seed)


def _spread(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(noise * (0.1 if "bias" in name else 0.2))
            else:
                parameter.copy_(noise * 0.08)
    return model.eval().requires_grad_(False)


def _permuted(weight, heads):
    size = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, size, -1).swapaxes(1, 2).reshape(weight.shape)


def tensors_of(model) -> dict[str, np.ndarray]:
    """The model's weights under their GGUF names and in llama.cpp's layout, float32."""
    family = model.config.model_type
    arch = ARCHITECTURES[family]
    key = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch)
    names = gguf.get_tensor_name_map(key, 2)
    config, found = model.config, {}
    for name, value in model.state_dict().items():
        array = value.float().numpy()
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name.endswith("experts.gate_up_proj"):
            gate, up = np.split(array, 2, axis=1)
            block = re.search(r"layers\.(\d+)", name)[1]
            found[f"blk.{block}.ffn_gate_exps.weight"] = gate
            found[f"blk.{block}.ffn_up_exps.weight"] = up
            continue
        stem, dot, ending = name.rpartition(".")
        if ending not in ("weight", "bias"):
            stem, dot, ending = name, ".", "weight"
        target = names.get_name(stem)
        if target is None and family == "gpt2":
            target = names.get_name(stem.removeprefix("transformer."))
        if target is None and name.endswith("mlp.gate.weight"):
            block = re.search(r"layers\.(\d+)", name)[1]
            target = f"blk.{block}.ffn_gate_inp"
        assert target, name
        if family == "gpt2" and array.ndim == 2 and "wte" not in name and "wpe" not in name:
            array = array.T
        if arch == "llama" and re.search(r"[qk]_proj\.weight", name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            array = _permuted(array, heads)
        if family == "gemma2" and name.endswith("norm.weight"):
            array = array + 1
        found[f"{target}{dot}{ending}"] = np.ascontiguousarray(array)
    return found


def write(model, path, kind="F32", extra=None):
    """Write a model as GGUF: matrices in `kind` (or as `kind(name)` says), vectors in float32."""
    config = model.config
    arch = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("pico")
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(2)
    writer.add_head_count(config.num_attention_heads)
    writer.add_file_type(0)
    if arch == "gpt2":
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_vocab_size(300)
        writer.add_rope_dimension_count(config.head_dim)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
        writer.add_sliding_window(config.sliding_window)
    if "moe" in arch or config.model_type == "mixtral":
        writer.add_expert_count(4)
        writer.add_expert_used_count(2)
        if arch == "qwen3moe":
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    # Tests put token ids in; every token is whole text, so that the server holds none back.
    tokens = ["<pad>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(128))]
    tokens += [f"w{i}" for i in range(300 - len(tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 300)
    writer.add_token_types([3, 3, 3, *[6] * 128, *[1] * 169])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    for name, value in (extra or {}).items():
        writer.add_key_value(name, *value)
    for name, array in tensors_of(model).items():
        wanted = kind(name) if callable(kind) else kind
        if array.ndim < 2 or "token_embd" in name or "position" in name or "gate_inp" in name:
            wanted = "F32"
        enum = gguf.GGMLQuantizationType[wanted]
        writer.add_tensor(name, quants.quantize(array, enum), raw_dtype=enum)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def weights(path) -> dict[str, np.ndarray]:
    """All tensors of a file, decoded."""
    reader = gguf.GGUFReader(path)
    return {t.name: quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}


def llama_server(path, lora=None, scale=1.0, context=256):
    """A server of a real llama.cpp on one thread."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.port = context, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.warmup, params.verbosity = False, 0
    params.fit_params = False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if lora is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), scale)]
    return xllamacpp.Server(params)


def llama_logprobs(server, ids, vocabulary=300):
    """Log-probabilities of the token that follows `ids`."""
    answer = server.handle_completions(
        {
            "prompt": ids,
            "n_predict": 1,
            "temperature": 0,
            "n_probs": vocabulary,
            "cache_prompt": False,
        }
    )
    found = torch.full((vocabulary,), float("nan"))
    for row in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        found[row["id"]] = row["logprob"]
    return found


def llama_greedy(server, ids, count):
    """The tokens that greedy decoding adds."""
    answer = server.handle_completions(
        {"prompt": ids, "n_predict": count, "temperature": 0, "n_probs": 1, "cache_prompt": False}
    )
    return [row["id"] for row in answer["choices"][0]["logprobs"]["content"]]
