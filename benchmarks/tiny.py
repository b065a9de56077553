"""Build a small random model of any decoder family that transformers knows, from its config class.

No family is described here. Sizes are shrunk by what a setting's name says it is (a width, a count
of layers, heads, experts, ...); per-layer lists keep one layer of every kind that occurs in them.
The few families that this cannot serve are in `OVERRIDES`, each with the reason.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import is_timm_available

WIDTH, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 64, 4, 2, 16, 320
LAYERS = 4

#: Settings by what their name says; the first pattern that fits decides, -1 leaves a setting as it
#: is. Vision and audio parts of a model go by the same rules.
RULES: tuple[tuple[str, int], ...] = (
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r"mamba_d_head|mamba_head_dim", 16),
    (r"mamba_d_ssm", 2 * WIDTH),
    (r"^(mamba_)?chunk_size$", 32),
    (r"(patch|temporal|spatial|pool|merge|conv|kernel|stride|downsample|shuffle)", -1),
    (r"^(num_channels|in_channels|in_chans|out_channels|num_mel_bins|type_vocab_size)$", -1),
    (r"(image_size|img_size)$", -1),
    (r"sliding_window$|window_size$", 128),
    (r"(first_k_dense|num_dense_layers|moe_layer_start|num_hash_layers)", 1),
    (r"layer_period$|layers_period$|_step$|_interval$|_frequency$|every_n|_pattern$", 2),
    (r"layer_offset$", 1),
    (r"n_group$|topk_group$|n_groups$|num_nextn", 1),
    (r"(kv|key_value)_heads$|num_kv_heads|multi_query_group_num|num_query_groups", KV_HEADS),
    (r"(n_head|num_heads|attention_heads|n_heads|_heads)$", HEADS),
    (r"(num_)?experts_per_tok|moe_top_?k|top_k_experts|num_selected_experts|moe_topk|^moe_k$", 2),
    (r"n_shared_experts|num_shared_experts|shared_expert_count|moe_num_shared", 1),
    (r"(num_|n_)?(local_|routed_|total_)?experts$|moe_num_experts|zero_expert_num", 4),
    (r"num_key_value_shared|num_kv_shared_layers", 2),
    (r"qk_rope_head_dim$|rotary_dim$", 8),
    (r"qk_nope_head_dim$", 16),
    (r"qk_head_dim$", 24),
    (r"(head_dim|head_size|d_kv|v_head_dim|head_dim_.*|d_head)$", HEAD_DIM),
    (r"rank$|lora_dim", 16),
    (r"vocab_size.*|n_vocab", VOCAB),
    (r"state_size$|d_state$|ssm_state", 16),
    (r"(inter|intermediate|ffn|ffw|mlp|feed).*(size|dim|hidden)$|n_inner|d_ff$|ffn_dim$", 96),
    (r"(hidden_size|d_model|n_embd|^dim$|embed_dim|embedding_size|hidden_dim|lru_width)$", WIDTH),
    (r"(hidden_size|hidden_dim|embed_dim|_dim|_width)$", WIDTH),
    (r"(num_|n_)?(hidden_|decoder_|encoder_|text_|transformer_)?(layers?|blocks)$|depth$", LAYERS),
    (r"max_position|n_positions|n_ctx|max_seq|max_sequence", 256),
)


def _rope(sections: list[int] | None = None, partial: float = 1.0) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
    if sections:
        rope |= {"mrope_section": sections, "partial_rotary_factor": partial}
    return rope


DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")

_SLIDING = {
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), HEADS),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"), 16),
    "qk_rope_head_dim": 8,
    "head_dim": 24,
}
_DOTS3: dict[str, Any] = {"per_layer_config": {2: _SLIDING, 3: _SLIDING}}
_QWEN4: dict[str, Any] = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}

#: What the rules cannot know, by model type: settings without a usable default, and those that
#: depend on one another in a way of their own. `~name` removes a setting.
OVERRIDES: dict[str, dict[str, Any]] = {
    # Defaults that are no model: a count or a list that every checkpoint sets.
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "mamba"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    # Fewer positions than a prompt has tokens, and a cache of as many layers as the encoder has.
    "blenderbot": {"max_position_embeddings": 256, "encoder_layers": LAYERS},
    "perception_lm": {"vision_config.model_args": {"embed_dim": WIDTH}},
    "deepseek_ocr2": {
        "text_config.mlp_layer_types": ["dense", "sparse"] * 2,
        "text_config.num_experts_per_tok": 2,
    },
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "emu3": {"vocabulary_map": {"<image>": 5, "<|extra_200|>": 6}},
    "granite4_vision": {"deepstack_layer_map": [], "downsample_rate": "4/8"},
    "step3p7": {"text_config.sliding_window": 128},
    # Sections of the rotary embedding, where the default lies in the code.
    **{
        name: {"text_config.rope_parameters": _rope(sections, partial)}
        for name, sections, partial in (
            ("glm4v", [2, 1, 1], 0.5),
            ("glm46v", [2, 1, 1], 0.5),
            ("glmga", [2, 1, 1], 0.5),
            ("glm_ocr", [2, 3, 3], 1.0),
            ("qwen2_vl", [2, 3, 3], 1.0),
            ("qwen2_5_vl", [2, 3, 3], 1.0),
            ("qwen2_5_omni_thinker", [2, 3, 3], 1.0),
            ("paddleocr_vl", [2, 3, 3], 1.0),
            ("glm4v_moe", [1, 1, 0], 0.25),
            ("ernie4_5_vl_moe", [3, 3, 2], 1.0),
        )
    },
    # Rotary settings by layer type.
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": _rope(), "sliding_attention": _rope()}
    },
    "cohere_compass": {
        "text_config.rope_parameters": {
            "full_attention": _rope([2, 3, 3]),
            "sliding_attention": _rope([2, 3, 3]),
        }
    },
    # Head sizes that must fit one another.
    "falcon_h1": {"mamba_d_head": 16, "mamba_n_heads": 8, "mamba_d_ssm": 128},
    "dots3_note": {
        **{f"text_config.{k}": v for k, v in _DOTS3.items()},
        "audio_config.adapter_input_size": WIDTH,
    },
    "dots3_note_text": _DOTS3,
    # Two layers that share their attention, and head sizes that follow from the rest.
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        **dict.fromkeys(("~attention_head_dim", "~attention_hidden_size")),
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        **dict.fromkeys(("~mamba_headdim", "~attention_head_dim", "~attention_hidden_size")),
        **dict.fromkeys(("~kv_channels", "~num_query_groups", "~hybrid_layer_ids")),
    },
    # The rules give heads to an indexer that is off unless all of its settings are there.
    "qwen4_exp": {f"text_config.{k}": v for k, v in _QWEN4.items()},
    "qwen4_exp_text": _QWEN4,
    "bailing_hybrid": {"num_expert_group": 2, "topk_group": 2, "num_experts": 8},
    "molmo2": {"adapter_config.vision_feature_layer": [3, 2]},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "mistral4": {
        "rope_parameters": {
            **_rope(),
            "partial_rotary_factor": 8 / 24,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 256,
        }
    },
}


def _stand_ins() -> None:
    """Put an empty module in place of vision towers from timm, which do not run on text anyway."""
    for name, tower in modeling_auto.MODEL_MAPPING_NAMES.items():
        if tower == "TimmWrapperModel":
            config = CONFIG_MAPPING[name]
            stand_in = type("StandIn", (PreTrainedModel,), {"config_class": config})
            transformers.AutoModel.register(config, stand_in, exist_ok=True)


if not is_timm_available():
    _stand_ins()


def families() -> dict[str, Any]:
    """Return model type -> auto class for every causal-LM and image-text-to-text family, by name."""
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    vision = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    found = dict.fromkeys(vision, transformers.AutoModelForImageTextToText)
    found.update({name: transformers.AutoModelForCausalLM for name in causal if name not in vision})
    return dict(sorted(found.items()))


def _kept_layers(settings: Mapping[str, Any], count: int) -> list[int]:
    """Return which layers to keep so that every combination of per-layer settings stays."""
    lists = [v for v in settings.values() if isinstance(v, (list, tuple)) and len(v) == count]
    seen: dict[str, int] = {}
    for index in range(count):
        seen.setdefault(repr([v[index] for v in lists]), index)
    kept = set(list(seen.values())[:8])
    for index in range(count):
        if len(kept) >= min(LAYERS, count):
            break
        kept.add(index)
    return sorted(kept)


def shrunk(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of one config made small."""
    small = dict(settings)
    for depth_name in DEPTHS:
        count = settings.get(depth_name)
        if isinstance(count, int) and count > 1:
            kept = _kept_layers(settings, count)
            for name, value in settings.items():
                if isinstance(value, (list, tuple)) and len(value) == count:
                    small[name] = [value[i] for i in kept]
                elif name.startswith("per_layer") and isinstance(value, dict):
                    small[name] = {
                        kept.index(int(k)): v for k, v in value.items() if int(k) in kept
                    }
            small[depth_name] = len(kept)
            break
    for name, value in settings.items():
        if isinstance(value, dict):
            small[name] = (
                shrunk(value)
                if name.endswith("config") and "per_layer" not in name
                else small[name]
            )
        elif name == "intermediate_size" and isinstance(value, list):
            # A width for each layer.
            small[name] = [min(width, _size(name) or width) for width in small[name]]
        elif (
            isinstance(value, int)
            and not isinstance(value, bool)
            and value > 0
            and name not in DEPTHS
        ):
            size = _size(name)
            small[name] = value if size is None or size < 0 else min(value, size)
        elif (
            value is None
            and (_size(name) or 0) > 0
            and re.search(r"head_dim$|kv_heads$|key_value_heads$", name)
        ):
            small[name] = _size(name)
        if re.fullmatch(
            r"\w*(bos|eos|pad|image|audio|video|boi|eoi|boa|eoa|token)_?\w*(id|index)", name
        ):
            if isinstance(value, int) and value >= VOCAB:
                small[name] = VOCAB - 1 - (sum(map(ord, name)) % 20)
            elif isinstance(value, list):
                small[name] = [VOCAB - 1 - i for i in range(len(value))] if value else value
    _reconcile(small)
    return small


def _size(name: str) -> int | None:
    return next((size for pattern, size in RULES if re.search(pattern, name)), None)


def _reconcile(small: dict[str, Any]) -> None:
    """Make settings agree that are bound to one another by what they mean."""
    if small.get("kv_lora_rank"):
        # Latent attention has a key for every query head; its head_dim is that of the rotary part.
        for name in ("num_key_value_heads", "head_dim"):
            if name in small:
                small[name] = HEADS if name.startswith("num") else small.get("qk_rope_head_dim", 8)
    if "expand" in small and "num_heads" in small and "state_size" in small:
        small["num_heads"] = small["expand"] * WIDTH // HEAD_DIM
    for value in small.values():
        # Sections of a rotary embedding share out half the (rotated part of the) head.
        tables = [value, *value.values()] if isinstance(value, dict) else []
        for table in tables:
            if isinstance(table, dict) and table.get("mrope_section"):
                half = (small.get("head_dim") or HEAD_DIM) // 2
                half = int(half * (table.get("partial_rotary_factor") or 1))
                third = half // 3
                table["mrope_section"] = [half - 2 * third, third, third]


def tiny_config(model_type: str, **changes: Any) -> Any:
    """Return a small configuration of a family."""
    cls = CONFIG_MAPPING[model_type]
    settings = shrunk(cls().to_dict())
    for name in ("transformers_version", "model_type", "architectures"):
        settings.pop(name, None)
    for name, value in {**OVERRIDES.get(model_type, {}), **changes}.items():
        target = settings
        *parents, leaf = name.split(".")
        for part in parents:
            target = target[part]
        if leaf.startswith("~"):
            target.pop(leaf[1:], None)
        else:
            target[leaf] = value
    config = cls(**settings)
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    return config


def randomised(model: Any, seed: int = 0) -> Any:
    """Move norm gains, biases and everything that starts at a constant far from where it starts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            if parameter.ndim < 2:
                parameter.add_((0.1 if "bias" in name else 0.4) * noise)
            elif parameter.shape[-1] > 1:
                spread = float(parameter.float().std())
                if not spread < 10 or spread == 0:
                    parameter.copy_(0.1 * noise)
                elif spread < 0.05:
                    parameter.mul_(0.12 / spread)
    return model.eval().requires_grad_(False)


def tiny_model(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """Return a small random model of a family, with gains and biases that matter."""
    torch.manual_seed(seed)
    auto = families()[model_type]
    config = tiny_config(model_type, **changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = auto.from_config(copy.deepcopy(config))
    return randomised(model.float(), seed)
