"""Every kind of residual writer that occurs among architectures is found, proved and edited."""

import json
import math
import re
import sys
import tokenize
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import tiny

from saber.ablation import EditPlan, Removal, applied, apply, orthogonal
from saber.errors import ModelError, UnprovenWriter
from saber.inspection import inspect, require_ablated
from saber.linalg import unit
from saber.lm.chat import encode
from saber.lm.forward import counts_from_zero, forward
from saber.lm.generate import Request, answer, generate
from saber.lm.inputs import plan_reading, read_inputs
from saber.lm.layers import find_layers, stream
from saber.lm.load import LoadSpec, load
from saber.lm.model import LanguageModel
from saber.lm.padding import ignores_padding
from saber.lm.substitution import held, layer_calls, zeros
from saber.lm.writers import ablated_law, find_writers, zeroed_law

# Varied on purpose: dense, fused and shared experts, latent and linear attention, state spaces, short
# convolutions, gains of both conventions, parallel blocks, Conv1D, biases, several streams, vision.
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {},
    "qwen3_next": {},
    "gemma2": {},
    "gemma3": {},
    "gemma4": {
        "text_config.enable_moe_block": True,
        "text_config.num_experts": 4,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 32,
    },
    "gemma4_text": {
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 3,
        "per_layer_config": {2: {"head_dim": 32}, 5: {"head_dim": 32}},
    },
    "gpt_oss": {},
    "deepseek_v3": {},
    "llama4_text": {},
    "mixtral": {},
    "phi3": {},
    "olmo2": {},
    "falcon_h1": {},
    "jamba": {},
    "lfm2": {},
    "granitemoehybrid": {},
    "mamba2": {},
    "gpt2": {},
    "gpt_neox": {},
    "bloom": {},
    "cohere2": {},
    "glm4_moe": {},
}


def language_model(family, **changes):
    model = tiny.tiny_model(family, **changes)
    return LanguageModel(
        model=model,
        tokenizer=make_tokenizer(),
        name=family,
        source="folder",
        base=None,
        stored_dtype=torch.float32,
        layers_path=find_layers(model),
    )


def direction(d_model, seed=0):
    return unit(torch.randn(d_model, generator=torch.Generator().manual_seed(seed)))


def leftover(lm, writers, r):
    """The worst layer's share of r that a full edit leaves in what it writes."""
    before = ablated_law(lm, r)
    with applied(lm.model, orthogonal(lm, writers, [Removal(r, 1.0, 0)], "all")):
        return max(a / b for a, b in zip(ablated_law(lm, r), before, strict=True))


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(6, 22).reshape(2, 8), use_cache=False).logits


@pytest.mark.parametrize("family", ["falcon_h1", "jamba", "lfm2", "mamba2", "qwen3_next", "llama"])
def test_answers_that_end_early_leave_the_others_as_they_are(family):
    lm = language_model(family)
    prompts = [f"What is {i} + {i}?" for i in (1, 2, 33, 4)]
    limits = (2, 2, 9, 2)
    together = answer(lm, [Request(p, n) for p, n in zip(prompts, limits, strict=True)])
    alone = [answer(lm, [Request(p, n)])[0] for p, n in zip(prompts, limits, strict=True)]
    assert [c.ids for c in together] == [c.ids for c in alone]


@pytest.mark.parametrize(
    ("family", "pads"),
    [
        *((name, True) for name in ("mamba", "falcon_mamba", "mamba2", "jamba", "gemma3")),
        *((name, False) for name in ("mpt", "recurrent_gemma")),
    ],
)
def test_answers_beside_others_are_the_likeliest_tokens_of_whole_texts(family, pads):
    """States of a recurrence take no mask of old tokens; some models mind padding itself."""
    lm = language_model(family)
    assert ignores_padding(lm) == pads
    lm = replace(lm, pads=pads)
    prompts = ["Hi", "What is the time in Paris, please, right now?", "Say a word or two", "Hm"]
    found = answer(lm, [Request(p, n) for p, n in zip(prompts, (2, 7, 7, 4), strict=True)])
    for prompt, completion in zip(prompts, found, strict=True):
        (encoded,) = encode(lm, [prompt], [completion.ids])
        with torch.no_grad():
            scores = lm.model(input_ids=torch.tensor([encoded.ids]), use_cache=False).logits[0]
        assert completion.ids == tuple(scores[encoded.answer_positions].argmax(-1).tolist())


@pytest.mark.parametrize(
    ("family", "told"), [("roberta-prelayernorm", False), ("xlm-roberta-xl", False), ("gpt2", True)]
)
def test_models_that_number_tokens_themselves_are_read_and_asked_as_they_are(family, told):
    """Some count positions from behind the index of padding on."""
    lm = language_model(family)
    assert counts_from_zero(lm) == told
    lm = replace(lm, told=told, pads=told)
    prompts = ["Hi", "What is the time in Paris, please, right now?", "Say a word or two", "Hm"]
    encoded = encode(lm, prompts, [c.ids for c in generate(lm, prompts, 5)])
    wanted = [e.answer_positions for e in encoded]
    for batch, _ in forward(lm, [e.ids for e in encoded], wanted):
        for row, found in zip(batch.rows, batch.split(batch.logits), strict=True):
            with torch.no_grad():
                ids = torch.tensor([encoded[row].ids])
                plain = lm.model(input_ids=ids, use_cache=False).logits[0, wanted[row]]
            torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-4)
            assert encoded[row].ids[-5:] == tuple(plain.argmax(-1).tolist())


def test_a_float32_stream_beside_half_precision_weights():
    """Mamba 2 keeps one: what its layers write is rounded all the same."""
    lm = language_model("mamba2")
    lm.model.to(torch.bfloat16)
    writers = find_writers(lm)
    assert [w.weight for w in writers] == [
        f"backbone.layers.{i}.mixer.out_proj.weight" for i in range(4)
    ]


def test_how_a_model_numbers_tokens_is_found_out_as_it_is_loaded(tmp_path):
    for family, told in (("xlm-roberta-xl", False), ("llama", True)):
        tiny.tiny_model(family).save_pretrained(tmp_path / family)
        make_tokenizer().save_pretrained(tmp_path / family)
        lm = load(str(tmp_path / family), LoadSpec(device="cpu"))
        assert (lm.told, lm.pads) == (told, told)


def test_a_window_that_the_cache_does_not_know_counts_no_padding():
    lm = language_model("gpt_neo")  # with a window of 128 tokens
    prompts = ["Say it: " + "a" * count for count in (1, 30, 118)]
    for prompt, completion in zip(prompts, generate(lm, prompts, 8), strict=True):
        (encoded,) = encode(lm, [prompt], [completion.ids])
        with torch.no_grad():
            scores = lm.model(input_ids=torch.tensor([encoded.ids]), use_cache=False).logits[0]
        assert completion.ids == tuple(scores[encoded.answer_positions].argmax(-1).tolist())


def weaken(lm, writers, share=1e-4):
    """Let writers add this share of the stream: all of even layers, and the first one of odd ones."""
    for index, (layer, call) in enumerate(zip(lm.layers, layer_calls(lm), strict=True)):
        own = [w for w in writers if w.layer == index]
        for writer in own if index % 2 == 0 else own[:1]:
            for name in filter(None, (writer.weight, writer.bias)):
                parameter, added = lm.model.get_parameter(name), math.inf
                while not 0.5 < added / share < 2:  # behind a norm, until its epsilon bounds it
                    with held(zeros([parameter])):
                        without = call.run(layer)
                    added = float((call.run(layer) - without).norm() / call.rows.norm())
                    parameter.mul_(share / added)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_writers_of_next_to_nothing_are_found_in_bfloat16(family):
    """Added to the stream in bfloat16 they would be lost in its rounding."""
    lm = language_model(family, **FAMILIES[family])
    expected = find_writers(lm)
    weaken(lm, expected)
    lm.model.to(torch.bfloat16)
    before = {k: (v.data_ptr(), v.clone()) for k, v in lm.model.state_dict().items()}
    writers = find_writers(lm)
    told = [(w.weight, w.axis, w.bias, w.convention, w.centred) for w in expected]
    assert [(w.weight, w.axis, w.bias, w.convention, w.centred) for w in writers] == told
    assert zeroed_law(lm, writers) < 1e-4
    require_ablated(lm, writers)
    for name, value in lm.model.state_dict().items():
        assert value.data_ptr() == before[name][0]
        assert torch.equal(value, before[name][1])


def test_experts_of_a_multimodal_model_show_their_rows():
    lm = language_model("kimi_k25")
    writers = find_writers(lm)
    assert lm.model.config._experts_implementation != lm.text_config._experts_implementation
    before = lm.text_config._experts_implementation
    seen = set()
    reading = plan_reading(lm, writers, encode(lm, ["one", "two", "three"]))
    read_inputs(lm, writers, reading, lambda key, _rows: seen.add(key[0]))
    assert seen >= {w.name for w in writers if w.experts}
    assert lm.text_config._experts_implementation == before


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_both_laws_hold_and_what_is_saved_is_what_was_edited(family, tmp_path):
    lm = language_model(family, **FAMILIES[family])
    writers = find_writers(lm)
    r = direction(lm.d_model)
    assert zeroed_law(lm, writers) < 1e-4
    assert leftover(lm, writers, r) < 1e-4
    assert zeroed_law(lm, writers[1:]) > 1e-3
    before = {k: v.clone() for k, v in lm.model.state_dict().items()}
    plan = orthogonal(lm, writers, [Removal(r, 0.9, 0)], "all")
    with applied(lm.model, plan):
        edited = logits(lm.model)
    assert all(torch.equal(v, before[k]) for k, v in lm.model.state_dict().items())
    plan.save(tmp_path / "plan", {})
    apply(lm.model, EditPlan.load(tmp_path / "plan"))
    lm.model.save_pretrained(tmp_path / "model")
    again = logits(type(lm.model).from_pretrained(tmp_path / "model").eval())
    assert (again - edited).abs().max() < 1e-4 * edited.abs().max()


@pytest.mark.slow
def test_a_writer_behind_a_filter_over_tokens_is_refused_with_the_way_out():
    """A short convolution behind a writer gives it another gain at every lag; one gain is no proof."""
    lm = language_model("inkling_text")
    writers = find_writers(lm)
    with pytest.raises(UnprovenWriter, match=r"ablated law.*model\.layers\.\d.*residual") as error:
        require_ablated(lm, writers)
    assert "--allow-unproven" in error.value.remedy
    assert "--layers-path" in error.value.remedy
    require_ablated(replace(lm, allow_unproven=True), writers)
    report = inspect(lm)
    assert not report["proved"]
    assert "ablated law" in report["reason"]
    # In 16 bits too, as models run on GPUs.
    half = language_model("inkling_text")
    half.model.to(torch.bfloat16)
    with pytest.raises(UnprovenWriter, match=r"ablated law"):
        require_ablated(half, find_writers(half))


@pytest.mark.slow
def test_a_gain_on_the_stream_is_measured_where_no_parameter_is_one():
    """The layer scales every coordinate of the stream by a function of a parameter."""
    lm = language_model("muse_spark")
    writers = find_writers(lm)
    assert zeroed_law(lm, writers) < 1e-4
    assert all(w.carried for w in writers)
    require_ablated(lm, writers)


def test_several_streams_are_read_as_their_mean():
    from saber.lm.substitution import streams_axis
    from saber.probing import ProbeSpec, probe
    from saber.prompts import Prompt, PromptSet

    lm = language_model("hy_v4")
    axis = streams_axis(lm)
    assert axis is not None
    prompts = PromptSet("p", tuple(Prompt(str(i), "c", f"tell {i}") for i in range(3)))
    hidden = probe(lm, prompts, ProbeSpec()).hidden
    assert hidden.shape == (3, 1, len(lm.layers) + 1, lm.d_model)
    seen = []
    handle = lm.layers[1].register_forward_hook(lambda _m, _a, o: seen.append(stream(o)))
    ids = torch.tensor([encode(lm, ["tell 1"])[0].ids])
    with torch.no_grad():
        lm.model(input_ids=ids, use_cache=False)
    handle.remove()
    torch.testing.assert_close(hidden[1, 0, 2], seen[0].mean(axis)[0, -1], atol=1e-4, rtol=1e-3)


def suffixes(writers):
    return {w.weight.split(".layers.")[1].partition(".")[2] for w in writers}


@pytest.mark.slow
def test_fused_experts_are_edited_along_the_axis_of_their_outputs():
    axes = {}
    for family in ("gpt_oss", "llama4_text", "mixtral"):
        # Square experts: a shape says nothing about the axis.
        writers = find_writers(language_model(family, intermediate_size=64))
        (axes[family],) = {w.axis for w in writers if w.experts}
        assert {w.experts for w in writers} == {None, 4}
    assert axes == {"gpt_oss": 2, "llama4_text": 2, "mixtral": 1}


def test_expert_biases_belong_to_their_experts_and_are_edited():
    lm = language_model("gpt_oss")
    writer = next(w for w in find_writers(lm) if w.experts)
    assert writer.bias == f"{writer.weight}_bias"
    r = direction(lm.d_model)
    with applied(lm.model, orthogonal(lm, [writer], [Removal(r, 1.0, 0)], "all")):
        bias = lm.model.get_parameter(writer.bias)
        assert bias.shape[0] == 4
        assert (bias @ r).abs().max() < 1e-5
    assert (lm.model.get_parameter(writer.bias) @ r).abs().max() > 1e-2


def test_names_on_disk_are_those_that_saving_writes(tmp_path):
    from safetensors import safe_open

    lm = language_model("mixtral")
    lm.model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = set(file.keys())
    writers = find_writers(lm)
    assert all(set(w.disk) <= stored for w in writers)
    assert {len(w.disk) for w in writers} == {1, 4}


@pytest.mark.slow
def test_experts_behind_one_norm_are_told_apart():
    """Two summands under one norm: neither can be tried beside the other."""
    writers = find_writers(language_model("gemma4", **FAMILIES["gemma4"]))
    assert {"mlp.down_proj.weight", "experts.down_proj", "per_layer_projection.weight"} <= suffixes(
        writers
    )
    nested = next(w for w in writers if w.experts)
    assert " * " in nested.convention


def test_names_that_differ_by_a_digit_are_no_siblings():
    lm = language_model("dbrx")
    parts = {w.weight.split(".ffn.")[1] for w in find_writers(lm) if ".ffn." in w.weight}
    assert parts == {"experts.mlp.w2"}  # w1 and v1 read the stream


def cut(family, layers):
    """Return settings that leave only so many layers of a small model."""
    config = tiny.tiny_config(family)
    depth, lists = config.num_hidden_layers, config.to_dict()
    kept = {k: v[:layers] for k, v in lists.items() if isinstance(v, list) and len(v) == depth}
    return {**kept, "num_hidden_layers": layers, "num_kv_shared_layers": 0}


@pytest.mark.slow
def test_several_streams_with_a_gain_in_place_are_complete_but_not_proved(capsys, tmp_path):
    tiny.tiny_model("gemma3n_text", **cut("gemma3n_text", 2)).save_pretrained(tmp_path)
    code, said = inspected(capsys, tmp_path, "--json")
    report = json.loads(said)
    names = {w["name"].split(".layers.")[1].partition(".")[2] for w in report["writers"]}
    assert names == {
        "self_attn.o_proj.weight",
        "mlp.down_proj.weight",
        "laurel.linear_right.weight",
        "per_layer_projection.weight",
    }
    assert report["laws"]["zeroed"] < 1e-4
    assert (code, report["proved"]) == (1, False)
    assert re.search(r"input_layernorm.*up to \d\d% of it can come back", report["reason"])


@pytest.mark.slow
def test_what_is_promised_where_the_stream_passes_a_gain_in_place(tmp_path):
    """No writer writes an edited direction any more, though the layer's own gain can restore some."""
    lm = language_model("gemma3n")
    assert "vision" not in lm.layers_path
    writers = find_writers(lm)
    assert all(w.carried for w in writers)
    assert zeroed_law(lm, writers) < 1e-4
    assert zeroed_law(lm, writers[1:]) > 1e-3
    r = direction(lm.d_model)
    before = written(lm, writers, r)
    plan = orthogonal(lm, writers, [Removal(r, 1.0, 0)], "all")
    with applied(lm.model, plan):
        edited = logits(lm.model)
        assert all(a < 1e-5 * b for a, b in zip(written(lm, writers, r), before, strict=True))
    apply(lm.model, plan)
    lm.model.save_pretrained(tmp_path)
    again = logits(type(lm.model).from_pretrained(tmp_path).eval())
    assert (again - edited).abs().max() < 1e-4 * edited.abs().max()


def written(lm, writers, r):
    """What each writer's weight writes along r, through the gain behind it."""
    return [
        float(
            (
                w.read(r[None]) @ lm.model.get_parameter(w.weight).movedim(w.axis, 0).flatten(1)
            ).norm()
        )
        for w in writers
    ]


@pytest.mark.slow
def test_a_norm_on_the_stream_is_named_as_the_reason():
    lm = language_model("bart", encoder_layers=2, decoder_layers=2)
    with pytest.raises(
        UnprovenWriter, match=r"norm stands on the residual stream.*--allow-unproven"
    ):
        find_writers(lm)
    assert find_writers(replace(lm, allow_unproven=True)) is not None


def test_vision_tower_is_not_taken_for_the_decoder():
    lm = language_model("gemma3")
    assert "vision" not in lm.layers_path
    assert all("vision" not in w.weight for w in find_writers(lm))


@pytest.mark.parametrize(
    ("method", "remedy"),
    [
        ("gptq", "quantised from"),
        ("awq", "quantised from"),
        ("bitsandbytes", r"model\.dequantize\(\)"),
        ("mxfp4", r"Mxfp4Config\(dequantize=True\)"),
        ("fp8", r"FineGrainedFP8Config\(dequantize=True\)"),
    ],
)
def test_quantised_weights_are_refused_by_name(capsys, tmp_path, method, remedy):
    from saber.cli.main import main

    model = tiny.tiny_model("llama")
    model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    packed = f'{{"quantization_config": {{"quant_method": "{method}", "bits": 4}},'
    (tmp_path / "config.json").write_text(text.replace("{", packed, 1))
    assert main(["inspect", str(tmp_path), "--device", "cpu"]) == 2
    assert re.search(rf"{method}.*{remedy}", capsys.readouterr().err)


CUSTOM = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def custom(folder, code):
    """Save a small model whose own code comes with it."""
    tiny.tiny_model("llama").save_pretrained(folder)
    (folder / "own.py").write_text(code)
    text = (folder / "config.json").read_text().replace('"llama"', '"own"')
    text = text.replace("LlamaForCausalLM", "OwnForCausalLM")
    mapped = (
        '"auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},'
    )
    (folder / "config.json").write_text(text.replace("{", "{" + mapped, 1))


def test_code_of_a_checkpoint_runs_only_when_asked_for(tmp_path):
    custom(tmp_path, CUSTOM)
    with pytest.raises(ModelError, match=r"custom code.*--trust-remote-code"):
        load(str(tmp_path), LoadSpec(device="cpu"), tokenizer=False)
    trusting = LoadSpec(device="cpu", trust_remote_code=True)
    lm = load(str(tmp_path), trusting, tokenizer=False)
    assert type(lm.model).__name__ == "OwnForCausalLM"
    assert inspect(lm)["proved"]


LEAKY = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.layers[2].register_forward_hook(
            lambda _module, args, output: output + torch.tanh(args[0])
        )
"""


def inspected(capsys, folder, *options):
    """The exit code of `saber inspect` and what it prints."""
    from saber.cli.main import main

    code = main(["inspect", str(folder), "--device", "cpu", "--dtype", "float32", *options])
    return code, re.sub(r"\s+", " ", capsys.readouterr().out)


def test_inspect_prints_what_is_proved(capsys, tmp_path):
    tiny.tiny_model("llama").save_pretrained(tmp_path)
    code, said = inspected(capsys, tmp_path)
    assert code == 0
    assert re.search(r"llama: 4 layers, 8 writers.*-> proved", said)


@pytest.mark.slow
def test_inspect_of_a_custom_decoder_that_fails_the_proof(capsys, tmp_path):
    """The reason names the module, the law and the residual, and what to pass."""
    custom(tmp_path, LEAKY)
    code, said = inspected(capsys, tmp_path, "--trust-remote-code")
    assert code == 1
    assert re.search(r"NOT proved.*zeroed law fails at layer 2 \(model\.layers\.2\)", said)
    assert re.search(r"\(residual \d.*--allow-unproven", said)


@pytest.mark.slow
def test_no_architecture_has_its_name_in_the_code():
    """Comments may give examples; what runs knows no family."""
    known = sorted({re.split(r"[\d_]", name)[0] for name in FAMILIES} - {"mamba"})
    source = Path(__file__).resolve().parent.parent / "src" / "saber"
    # Of files that are read without a model names are all that there is to go by.
    unloaded = {source / "checkpoint" / name for name in ("naming.py", "gguf_file.py")}
    files = set(source.rglob("*.py")) - unloaded
    for path in sorted(files):
        with path.open("rb") as file:
            words = [
                t.string
                for t in tokenize.tokenize(file.readline)
                if t.type in (tokenize.NAME, tokenize.STRING) and not t.string.startswith('"""')
            ]
        # gptq is a way of quantising, and llama.cpp a program.
        words = [re.sub(r"gptq|x?llama[._-]?(cpp|cli|gguf)", "", w.lower()) for w in words]
        named = [n for n in known for w in words if re.search(rf"(?<![a-z]){n}", w)]
        assert not named, f"{path}: {named}"


def test_inspect_needs_no_tokenizer(tmp_path):
    tiny.tiny_model("llama").save_pretrained(tmp_path)
    report = inspect(load(str(tmp_path), LoadSpec(device="cpu"), tokenizer=False))
    assert report["proved"]
    assert report["coverage"]["layers"] == report["layers"]
    weights = 4 * report["parameters"]
    assert report["memory"]["probe"] > weights
    assert weights < report["memory"]["edit"] < 4 * weights


def e2b_like(folder):
    """A small model with the layer pattern of the model that the card describes."""
    kinds = (["sliding_attention"] * 4 + ["full_attention"]) * 7
    model = tiny.tiny_model(
        "gemma4_text",
        num_hidden_layers=35,
        layer_types=kinds,
        num_kv_shared_layers=20,
        hidden_size_per_layer_input=16,
        per_layer_config={
            i: {"head_dim": 32} for i, k in enumerate(kinds) if k == "full_attention"
        },
    )
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


@pytest.mark.slow
def test_card_preset_has_the_cards_counts_on_its_own_model(few, tmp_path):
    from saber.cli.main import main

    e2b_like(tmp_path / "model")
    # A random model shows no behaviour, so purity would skip directions at random.
    small = ["entanglement.weight=0", "refine.max_q=1", "refine.shortlist=0"]
    small += ["entanglement.null_draws=20", "spectral.permutations=20"]
    command = ["run", str(tmp_path / "model"), "--out", str(tmp_path / "run"), "--preset", "card"]
    command += ["--force", "--limit", "2", "--max-new-tokens", "4", "--export", "none"]
    command += ["--device", "cpu", "--dtype", "float32", "--set", "evaluation.battery_new_tokens=4"]
    command += [f"--{name}={file}" for name, file in few.items()]
    assert main([*command, *(part for name in small for part in ("--set", name))]) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["directions_ablated"] == 50
    assert [len(p["directions"]) for p in record["passes"]] == [10] * 5
    layers = {c["layer"] for c in record["passes"][0]["candidates"]}
    assert len(layers) == 22
