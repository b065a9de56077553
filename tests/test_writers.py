"""The writers found are all of them, with the right gains; and nothing else is taken for one."""

from dataclasses import replace

import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from conftest import make_lm, make_model
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

from saber.ablation import Removal, applied, orthogonal
from saber.errors import ModelError, UnprovenWriter
from saber.inspection import inspect, require_ablated, shares_left
from saber.linalg import unit
from saber.lm.layers import find_layers
from saber.lm.substitution import Bench, layer_calls
from saber.lm.writers import (
    Writer,
    ablated_law,
    ablated_stream,
    embedding_share,
    embedding_writer,
    find_writers,
    zeroed_law,
)

NAMES = {
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "gemma2": ("self_attn.o_proj", "mlp.down_proj"),
    "gemma3": ("self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
}


@pytest.mark.parametrize("family", NAMES)
def test_two_writers_a_layer_are_found_and_no_others(family):
    lm = make_lm(family)
    writers = find_writers(lm)
    assert [(w.layer, w.name.split(".", 3)[-1]) for w in writers] == [
        (layer, name) for layer in range(4) for name in NAMES[family]
    ]
    assert {w.axis for w in writers} == {1 if family == "gpt2" else 0}
    assert all((w.bias is not None) == (family == "gpt2") for w in writers)
    assert all((w.gain is not None) == family.startswith("gemma") for w in writers)


def test_square_query_projection_is_no_writer():
    assert not any("q_proj" in w.weight for w in find_writers(make_lm("llama")))


@pytest.mark.parametrize(("family", "offset"), [("gemma2", 1.0), ("gemma3", 1.0)])
def test_gains_are_read_off_without_knowing_their_convention(family, offset):
    lm = make_lm(family)
    norms = {
        "self_attn.o_proj": "post_attention_layernorm",
        "mlp.down_proj": "post_feedforward_layernorm",
    }
    for writer in find_writers(lm):
        norm = norms[writer.name.split(".", 3)[-1]]
        expected = offset + lm.layers[writer.layer].get_submodule(norm).weight
        torch.testing.assert_close(unit(writer.gain), unit(expected), atol=1e-4, rtol=1e-3)


def test_zeroed_law_fails_when_a_writer_is_left_out(lm):
    writers = find_writers(lm)
    assert zeroed_law(lm, writers) < 1e-5
    assert zeroed_law(lm, writers[:-1]) > 1e-2


def test_full_edit_leaves_nothing_along_the_direction(lm):
    direction = unit(torch.randn(lm.d_model, generator=torch.Generator().manual_seed(3)))
    before = ablated_law(lm, direction)
    with applied(lm.model, orthogonal(lm, find_writers(lm), [Removal(direction, 1.0, 0)], "all")):
        after = ablated_law(lm, direction)
    assert max(a / b for a, b in zip(after, before, strict=True)) < 1e-4


def test_without_the_gain_the_direction_stays():
    lm = make_lm("gemma2")
    from dataclasses import replace

    blind = [replace(w, gain=None) for w in find_writers(lm)]
    direction = unit(torch.randn(lm.d_model, generator=torch.Generator().manual_seed(3)))
    before = ablated_law(lm, direction)
    with applied(lm.model, orthogonal(lm, blind, [Removal(direction, 1.0, 0)], "all")):
        after = ablated_law(lm, direction)
    assert max(a / b for a, b in zip(after, before, strict=True)) > 0.1


def test_an_edit_behind_uneven_gains_moves_the_stream_along_its_direction_alone():
    generator = torch.Generator().manual_seed(5)
    gain = torch.randn(256, generator=generator).mul(1.5).exp().double()
    basis = unit(torch.randn(2, 256, generator=generator)).double()
    writer = Writer("w.weight", 0, "mlp", 0, None, gain)
    write = writer.write(basis)
    torch.testing.assert_close(writer.read(basis) @ write, torch.eye(2, dtype=torch.float64))
    moved = (gain[:, None] * write).norm(dim=0)
    least = (gain[:, None] * torch.linalg.pinv(writer.read(basis))).norm(dim=0)
    assert (moved < 1.2).all()
    assert (least > 2 * moved).all()
    # Sparing the rms too: dividing by the gains alone would write without bound where one is nil.
    exact = torch.linalg.pinv(basis) / gain[:, None]
    assert (write.norm(dim=0) < exact.norm(dim=0)).all()
    plain = replace(writer, gain=None)
    torch.testing.assert_close(plain.write(basis), torch.linalg.pinv(basis))


def test_inspect_reports_a_proved_model(lm):
    report = inspect(lm)
    assert report["proved"] is True
    assert len(report["writers"]) == 8
    assert report["laws"]["zeroed"] < 1e-4
    assert report["laws"]["ablated"] < 1e-4


class Mixing(torch.nn.Module):
    """A block that writes through a module that is no plain linear map."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states, *args, **kwargs):
        return self.inner(hidden_states, *args, **kwargs) + torch.tanh(hidden_states)


def test_a_hidden_writer_is_an_error_that_names_the_layer(llama):
    llama.layers[2] = Mixing(llama.layers[2])
    with pytest.raises(UnprovenWriter, match="layer 2"):
        find_writers(llama)


def test_what_other_layers_have_is_no_proof_for_this_one(llama):
    """Layers share what was found, but one with a writer more is searched to the end."""
    mlp = llama.layers[2].mlp
    mlp.again = torch.nn.Linear(llama.d_model, llama.d_model, bias=False).requires_grad_(False)
    mlp.register_forward_hook(lambda m, args, output: output + m.again(torch.tanh(args[0])))
    writers = find_writers(llama)
    assert len(writers) == 9
    assert [w.weight for w in writers if "again" in w.weight] == ["model.layers.2.mlp.again.weight"]


def test_layers_alike_are_searched_once(monkeypatch):
    from saber.lm import search

    searched = []
    full = search._searched
    monkeypatch.setattr(search, "_searched", lambda b, *a: searched.append(b) or full(b, *a))
    assert len(find_writers(make_lm("gemma2"))) == 8
    assert len(searched) == 1


def test_a_weak_writer_is_not_taken_for_a_centred_one(llama):
    """Weights of small inputs are tried with large values; so must be what tells a mean apart."""
    for layer in llama.layers:
        layer.mlp.up_proj.weight.mul_(1e-4)
    assert not any(w.centred for w in find_writers(llama))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_writers_are_found_in_half_precision(lm, dtype):
    expected = {w.weight: w for w in find_writers(lm)}
    lm.model.to(dtype)
    found = find_writers(lm)
    assert {w.weight for w in found} == set(expected)
    for writer in found:
        gain = expected[writer.weight].gain
        assert (writer.gain is None) == (gain is None)
        if gain is not None:
            torch.testing.assert_close(writer.gain, gain, atol=0.05, rtol=0.05)


def test_one_plus_a_large_gain_is_told_from_the_gain_in_half_precision():
    lm = make_lm("gemma3")
    for layer in lm.layers:
        for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
            norm.weight.add_(6)
    lm.model.to(torch.bfloat16)
    conventions = [w.convention for w in find_writers(lm)]
    assert len(conventions) == 8
    assert all(c.startswith("(1 + ") and "*" not in c for c in conventions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_writers_that_share_a_norm_of_one_plus_weight_have_its_gain(llama, dtype):
    generator = torch.Generator().manual_seed(3)
    for layer in llama.layers:
        mlp, width = layer.mlp, llama.d_model
        mlp.again = torch.nn.Linear(width, width, bias=False).requires_grad_(False)
        mlp.again.weight.copy_(torch.randn(width, width, generator=generator) / width**0.5)
        mlp.shared = Gemma3RMSNorm(width).requires_grad_(False)
        mlp.shared.weight.copy_(0.5 * torch.randn(width, generator=generator))
        mlp.register_forward_hook(lambda m, args, out: m.shared(out + m.again(torch.tanh(args[0]))))
    llama.model.to(dtype)
    writers = find_writers(llama)
    assert len(writers) == 12
    behind = [w for w in writers if ".mlp." in w.weight]
    assert all(w.convention.endswith("mlp.shared.weight)") for w in behind)
    require_ablated(llama, writers)


def test_what_others_write_does_not_drown_a_writer_in_its_rounding(llama):
    """A trained model's last layers write many times what comes in: the rounding of that is no misfit."""
    llama.model.to(torch.bfloat16)
    for layer in llama.layers:
        layer.self_attn.o_proj.weight.mul_(300)
    writers = find_writers(llama)
    assert len(writers) == 8
    assert zeroed_law(llama, writers) < 1e-6


def test_a_full_edit_is_told_from_rounding_where_layers_write_little(llama):
    """In bfloat16 the rounding of the stream alone is a third of what such layers write along a direction."""
    for layer in llama.layers:
        layer.self_attn.o_proj.weight.mul_(0.1)
        layer.mlp.down_proj.weight.mul_(0.1)
    llama.model.to(torch.bfloat16)
    writers = find_writers(llama)
    before = {k: (v.data_ptr(), v.clone()) for k, v in llama.model.state_dict().items()}
    assert max(shares_left(llama, writers)) < 1e-4
    require_ablated(llama, writers)
    missed = [w for w in writers if not (w.layer == 2 and "o_proj" in w.weight)]
    shares = shares_left(llama, missed)
    assert shares[2] > 0.05 > max(shares[:2])
    for name, value in llama.model.state_dict().items():
        assert value.data_ptr() == before[name][0]
        assert torch.equal(value, before[name][1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weak", [("o_proj",), ("down_proj",), ("o_proj", "down_proj")])
def test_writers_far_below_the_rounding_of_the_stream_are_found(llama, weak, dtype):
    """With the stream of a layer in 16 bits they would change not a bit of its output."""
    for name, parameter in llama.model.named_parameters():
        if name.split(".")[-2] in weak:
            parameter.mul_(1e-4)
    llama.model.to(dtype)
    missing = [Bench(layer, call).leftover([]) for layer, call in pairs(llama)]
    assert (max(missing) < 1e-3) == (len(weak) == 2)
    writers = find_writers(llama)
    assert [w.name.split(".")[-1] for w in writers] == ["o_proj", "down_proj"] * 4
    require_ablated(llama, writers)
    without = [w for w in writers if w.layer != 1 or w.name.split(".")[-1] not in weak]
    assert zeroed_law(llama, writers) < 1e-7 < 5e-6 < zeroed_law(llama, without)
    if len(weak) == 2:
        with pytest.raises(UnprovenWriter, match=r"ablated law fails at layer 1"):
            require_ablated(llama, without)


def pairs(lm):
    return zip(lm.layers, layer_calls(lm), strict=True)


def test_no_layer_is_left_in_float32_where_the_proof_fails(llama):
    llama.model.to(torch.bfloat16)
    llama.layers[2] = Mixing(llama.layers[2])
    before = {k: v.data_ptr() for k, v in llama.model.state_dict().items()}
    with pytest.raises(UnprovenWriter, match="layer 2") as kept:
        find_writers(llama)
    assert {k: v.data_ptr() for k, v in llama.model.state_dict().items()} == before
    assert {p.dtype for p in llama.model.parameters()} == {torch.bfloat16}
    assert kept.value.residual > 0.1


def test_one_layer_at_a_time_is_held_in_float32(llama):
    llama.model.to(torch.bfloat16)
    wide = set()

    def count(*_):
        held = [any(p.dtype == torch.float32 for p in each.parameters()) for each in llama.layers]
        wide.add(sum(held))

    for layer in llama.layers:
        # As accelerate's hooks, which bring what a layer is given to where its weights are.
        hook = AlignDevicesHook(execution_device="cpu", io_same_device=True)
        add_hook_to_module(layer, hook, append=True)
        layer.register_forward_hook(count)
    assert len(find_writers(llama)) == 8
    assert wide == {0, 1}


def test_a_layer_is_tried_on_a_stream_on_its_own_device(llama):
    last = llama.layers[-1]
    # For lack of a second device its weights go elsewhere once it has been called.
    handle = last.register_forward_hook(lambda module, _args, _output: module.to("meta") and None)
    streams = [call.hidden.device.type for call in layer_calls(llama)]
    handle.remove()
    assert streams == ["cpu", "cpu", "cpu", "meta"]


def test_ablated_stream_removes_the_direction_from_every_output(lm):
    basis = unit(torch.randn(1, lm.d_model, generator=torch.Generator().manual_seed(5)))
    outputs = []
    with ablated_stream(lm, basis):
        handles = [
            layer.register_forward_hook(
                lambda _m, _i, o: outputs.append(o[0] if isinstance(o, tuple) else o)
            )
            for layer in lm.layers
        ]
        lm.model(input_ids=torch.arange(5, 15)[None])
        for handle in handles:
            handle.remove()
    assert len(outputs) == 4
    assert max(float((o @ basis.T).abs().max() / o.norm(dim=-1).max()) for o in outputs) < 1e-5


def test_encoders_are_not_taken_for_decoders():
    import transformers

    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=400,
    )
    model = transformers.BertForMaskedLM(config).eval()
    with pytest.raises(ModelError, match="not causal"):
        find_layers(model)


def test_layers_path_is_checked():
    model = make_model("llama")
    assert find_layers(model, "model.layers") == "model.layers"
    with pytest.raises(ModelError, match="not in this model"):
        find_layers(model, "model.nothing")
    with pytest.raises(ModelError, match="no ModuleList"):
        find_layers(model, "model.norm")


def test_an_edited_embedding_brings_nothing_of_the_direction(llama):
    writer = embedding_writer(llama)
    assert (writer.layer, writer.kind, writer.axis) == (-1, "embedding", 1)
    r = unit(torch.randn(llama.d_model, generator=torch.Generator().manual_seed(3)))
    assert embedding_share(llama, r[None])[0] > 0.5
    with applied(llama.model, orthogonal(llama, [writer], [Removal(r, 1.0, 1)], "nearest")):
        assert embedding_share(llama, r[None])[0] < 1e-5


@pytest.mark.parametrize(("family", "reason"), [("gemma2", "output head"), ("gpt2", "output head")])
def test_a_tied_embedding_is_not_a_writer(family, reason):
    with pytest.raises(ModelError, match=reason):
        embedding_writer(make_lm(family))


def test_an_embedding_behind_a_norm_is_not_a_writer():
    config = transformers.BloomConfig(
        vocab_size=400, hidden_size=32, n_layer=2, n_head=4, tie_word_embeddings=False
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    model.transformer.word_embeddings_layernorm.weight.mul_(torch.linspace(0.5, 2, 32))
    lm = replace(make_lm("llama"), model=model, layers_path="transformer.h")
    with pytest.raises(ModelError, match="scaled row"):
        embedding_writer(lm)


def test_inspection_tells_what_a_run_needs(llama):
    """d_model 32, four layers; attention writes from 32 inputs, the MLP from as many as it is wide."""
    needs = inspect(llama)["memory"]
    wide = llama.model.config.intermediate_size
    assert needs["moments"] == 4 * 8 * (32**2 + wide**2)
    assert needs["moments_least"] == 8 * wide**2
    layer = sum(4 * p.numel() for p in llama.layers[0].parameters())
    assert needs["probe"] - needs["offloaded"] == 3 * layer
