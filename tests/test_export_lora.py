"""An edit as a PEFT adapter is the edit itself: exact, scalable, and read by plain PEFT."""

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import ggufs
import pytest
import torch
from conftest import make_lm, make_model
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file

from saber.ablation import EditPlan, Factor, apply
from saber.checkpoint.export import check_places
from saber.checkpoint.lora import WEIGHTS, layout, placeless, read_lora, write_lora
from saber.errors import MissingExtra, ModelError, UsageError
from saber.lm.load import skeleton
from saber.lm.writers import find_writers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import tiny

IDS = torch.tensor([[1, 50, 60, 70, 80, 90, 100, 110]])


def build(family):
    if family in ("qwen3_moe", "mixtral"):
        return ggufs.moe_model(family)
    return make_model(family, layers=2, d_model=32)


def writers(model):
    """Every residual writer of these families, with the axis of d_model and its bias."""
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "attn.c_proj.weight", "mlp.c_proj.weight")) or (
            "down_proj" in name
        ):
            conv = "c_proj" in name
            bias = name.replace("weight", "bias") if conv else None
            yield name, parameter, 1 if conv or parameter.ndim == 3 else 0, bias


def random_plan(model, rank=2, biases=True, size=0.3, seed=0):
    """A plan of random factors, whose ranks differ from layer to layer."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for index, (name, parameter, axis, bias) in enumerate(writers(model)):
        k = rank + index % 2
        shape = list(parameter.shape)
        width = shape.pop(axis)
        left = torch.randn(width, k, generator=generator) * size
        right = torch.randn(k, *shape, generator=generator) * size / width**0.5
        change = torch.randn(width, generator=generator) * size if bias and biases else None
        key = name.removesuffix(".weight")
        factors[key] = Factor(left, right, change, axis, "" if name.endswith(".weight") else name)
    return EditPlan(factors)


def saved(model, tmp_path, plan, name="base"):
    """The model's folder, an adapter of the plan, and the model with the plan applied."""
    folder = tmp_path / name
    model.save_pretrained(folder)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    empty = skeleton(str(folder))
    write_lora(empty, plan, layout(empty, plan), adapter, "owner/base", {"plan_hash": "sha256:1"})
    return folder, adapter


def read(model, adapter):
    with warnings.catch_warnings():
        # Of transformers to PEFT; any other warning is an error here.
        warnings.simplefilter("ignore", FutureWarning)
        return PeftModel.from_pretrained(model, adapter)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral", "qwen3_moe"])
def test_adapter_and_merged_agree_to_rounding_and_scale(family, tmp_path):
    model = build(family)
    plan = random_plan(model)
    _, adapter = saved(model, tmp_path, plan)
    plain = model(IDS).logits
    adapted = read(model, adapter)
    beside = adapted(IDS).logits
    merged = adapted.merge_and_unload()
    apart = build(family)
    apply(apart, plan)
    wanted = dict(apart.named_parameters())
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(parameter, wanted[name], rtol=0, atol=2e-6)
    torch.testing.assert_close(beside, apart(IDS).logits, rtol=1e-4, atol=1e-4)
    assert (beside - plain).abs().max() > 0.05


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_weight_of_the_adapter_scales_the_edit(family, tmp_path):
    model = build(family)
    plan = random_plan(model)
    _, adapter = saved(model, tmp_path, plan)
    adapted = read(model, adapter)
    for module in adapted.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(0.5)
    half = EditPlan(
        {
            n: Factor(
                0.5 * f.left, f.right, None if f.bias is None else 0.5 * f.bias, f.axis, f.weight
            )
            for n, f in plan.factors.items()
        }
    )
    apart = build(family)
    apply(apart, half)
    torch.testing.assert_close(adapted(IDS).logits, apart(IDS).logits, rtol=1e-4, atol=1e-4)


def test_bfloat16_base_agrees_to_its_rounding(tmp_path):
    model = build("llama").to(torch.bfloat16)
    plan = random_plan(model)
    _, adapter = saved(model, tmp_path, plan)
    merged = read(model, adapter).merge_and_unload()
    apart = build("llama").to(torch.bfloat16)
    apply(apart, plan)
    for name, parameter in merged.named_parameters():
        # PEFT rounds the change and then the sum; the merged folder rounds once.
        torch.testing.assert_close(parameter, apart.get_parameter(name), rtol=2**-7, atol=2**-9)


def test_adapter_says_where_it_comes_from_and_names_no_path(tmp_path):
    model = build("llama")
    folder, adapter = saved(model, tmp_path, random_plan(model))
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["auto_mapping"]["saber"] == {"plan_hash": "sha256:1"}
    assert config["base_model_name_or_path"] == "owner/base"
    assert str(folder) not in json.dumps(config)
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["plan_hash"] == "sha256:1"


def test_ranks_are_those_of_the_plan(tmp_path):
    model = build("llama")
    plan = random_plan(model)
    _, adapter = saved(model, tmp_path, plan)
    found = load_file(adapter / "adapter_model.safetensors")
    for name, factor in plan.factors.items():
        key = f"base_model.model.{name}.lora_A.weight"
        torch.testing.assert_close(found[key], factor.right, rtol=0, atol=0)
        torch.testing.assert_close(found[key.replace("_A", "_B")], factor.left, rtol=0, atol=0)


def test_biases_that_only_some_modules_have_are_named():
    model = build("gpt2")
    plan = random_plan(model)
    one = dict(plan.factors.items())
    first = next(iter(one))
    one[first] = Factor(one[first].left, one[first].right, None, one[first].axis)
    found = layout(model, EditPlan(one))
    assert not found.bias
    assert set(found.lost) == {f"{n}.bias" for n in one if n != first}
    assert layout(model, plan).bias
    assert layout(model, plan).lost == ()


def test_a_weight_that_two_modules_share_is_named():
    model = build("llama")
    model.model.layers[1].self_attn.o_proj.weight = model.model.layers[0].self_attn.o_proj.weight
    lost = layout(model, random_plan(model)).lost
    assert lost == ("model.layers.0.self_attn.o_proj.weight",)


def test_edited_embedding_goes_into_an_adapter(tmp_path):
    model = ggufs.moe_model("qwen3_moe")
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(64, 2, generator=generator), torch.randn(2, 300, generator=generator)
    plan = EditPlan({"model.embed_tokens": Factor(left, right * 0.02, None, 1)})
    _, adapter = saved(model, tmp_path, plan)
    merged = read(model, adapter).merge_and_unload()
    apart = ggufs.moe_model("qwen3_moe")
    apply(apart, plan)
    weight = merged.get_input_embeddings().weight
    torch.testing.assert_close(weight, apart.get_input_embeddings().weight)


def test_experts_beside_a_dense_layer_of_the_same_name(tmp_path):
    import transformers

    config = ggufs.moe_model("qwen3_moe").config
    config.mlp_only_layers = [0]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    plan = random_plan(model)
    assert model.model.layers[0].mlp.down_proj.weight.ndim == 2
    state = {k: v.clone() for k, v in model.state_dict().items()}
    _, adapter = saved(model, tmp_path, plan)
    merged = read(model, adapter).merge_and_unload()
    torch.manual_seed(0)
    apart = transformers.AutoModelForCausalLM.from_config(config)
    apart.load_state_dict(state)
    apply(apart, plan)
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(parameter, apart.get_parameter(name), rtol=0, atol=2e-6)


def test_experts_as_wide_as_the_stream_are_not_mistaken(tmp_path):
    model = ggufs.moe_model("qwen3_moe", inner=64)
    assert model.get_parameter("model.layers.0.mlp.experts.down_proj").shape[1:] == (64, 64)
    plan = random_plan(model)
    _, adapter = saved(model, tmp_path, plan)
    merged = read(model, adapter).merge_and_unload()
    apart = ggufs.moe_model("qwen3_moe", inner=64)
    apply(apart, plan)
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(parameter, apart.get_parameter(name), rtol=0, atol=2e-6)


def test_experts_stored_with_outputs_last_and_their_biases(tmp_path):
    import transformers

    def fresh():
        torch.manual_seed(0)
        config = transformers.GptOssConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            vocab_size=300,
            num_local_experts=4,
            num_experts_per_tok=2,
            pad_token_id=0,
        )
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        return model.eval().requires_grad_(False)

    model = fresh()
    generator = torch.Generator().manual_seed(1)
    name = "model.layers.1.mlp.experts.down_proj"
    left, right = (torch.randn(*s, generator=generator) for s in ((32, 2), (2, 4, 32)))
    plan = EditPlan({name: Factor(left, right, torch.ones(4, 32), 2, name, f"{name}_bias")})
    assert layout(model, plan).lost == (f"{name}_bias",)
    _, adapter = saved(model, tmp_path, plan)
    merged = read(model, adapter).merge_and_unload().get_parameter(name)
    wanted = fresh().get_parameter(name) + plan.factors[name].delta()
    torch.testing.assert_close(merged, wanted, rtol=0, atol=1e-5)


def test_plan_of_another_model_names_the_weight():
    plan = random_plan(build("llama"))
    with pytest.raises(ModelError, match=r"has no weight model\.layers\.0\.self_attn\.o_proj"):
        layout(build("gpt2"), plan)
    with pytest.raises(ModelError, match="has the shape"):
        layout(make_model("llama", layers=2, d_model=64), plan)


def test_nothing_that_fits_is_refused(tmp_path):
    model = build("llama")
    plan = EditPlan({"model.norm": Factor(torch.ones(32, 1), torch.ones(1), None, 0)})
    where = layout(model, plan)
    assert where.lost == ("model.norm.weight",)
    with pytest.raises(UsageError, match="has a place"):
        write_lora(model, plan, where, tmp_path, "b", {})


def test_missing_peft_names_the_extra(monkeypatch):
    import sys

    from saber.checkpoint.lora import require_peft

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtra, match=r"saber-llm\[export\]"):
        require_peft()


def test_a_plain_adapter_is_read_as_a_plan(tmp_path):
    model = build("llama")
    plan = EditPlan({n: f for n, f in random_plan(model, rank=2).factors.items() if "o_proj" in n})
    ranks = {f.left.shape[1] for f in plan.factors.values()}
    assert ranks == {2}
    _, adapter = saved(model, tmp_path, plan)
    back = read_lora(adapter)
    for name, factor in plan.factors.items():
        torch.testing.assert_close(back.factors[name].delta(), factor.delta())


def test_what_peft_refuses_to_adapt_is_left_out_by_name_or_told_before_any_work(tmp_path):
    folder = tmp_path / "hybrid"
    tiny.tiny_model("falcon_h1").save_pretrained(folder)
    model = skeleton(str(folder))
    plan = EditPlan(
        {
            f"model.layers.0.{name}": Factor(torch.ones(64, 1), torch.ones(1, width), None, 0)
            for name, width in (("mamba.out_proj", 128), ("self_attn.o_proj", 64))
        }
    )
    refused = placeless(model)
    where = layout(model, plan, refused)
    assert where.lost == ("model.layers.0.mamba.out_proj.weight",)
    assert list(where.modules) == ["model.layers.0.self_attn.o_proj"]
    (tmp_path / "adapter").mkdir()
    write_lora(model, plan, where, tmp_path / "adapter", str(folder), {})
    assert {key.split(".lora_")[0] for key in load_file(tmp_path / "adapter" / WEIGHTS)} == {
        "base_model.model.model.layers.0.self_attn.o_proj"
    }

    lm = make_lm("llama")
    found = find_writers(lm)
    check_places(["lora"], lm, found)
    lm.model.config.model_type = "mamba2"  # by which PEFT tells, and by the last part of the name
    check_places(["lora"], lm, found)
    alike = [replace(w, weight="layers.0.mixer.out_proj.weight") for w in found]
    check_places(["lora"], lm, [*alike, found[0]])
    check_places(["merged"], lm, alike)
    with pytest.raises(UsageError, match=r"adapts none of the residual writers .*mixer.out_proj"):
        check_places(["lora"], lm, alike)
