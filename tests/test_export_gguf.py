"""An edit in a GGUF file: the merged model's weights to the file's rounding, all else byte for byte."""

import re
import struct
import sys
import tracemalloc
from pathlib import Path

import gguf
import ggufs
import numpy as np
import pytest
import torch
from gguf import quants
from test_export_lora import IDS, random_plan, writers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import tiny

from saber.ablation import EditPlan, Factor, apply
from saber.checkpoint import gguf_rewrite
from saber.checkpoint.gguf_file import GgufFile, open_gguf
from saber.checkpoint.gguf_fit import choose, require_alike, require_architecture
from saber.checkpoint.gguf_lora import write_gguf_lora
from saber.checkpoint.gguf_names import _stem, changes
from saber.checkpoint.gguf_rewrite import rewrite
from saber.checkpoint.sketch import Sketch, likeness, take
from saber.errors import ModelError, OutputError, UnknownName, UsageError
from saber.lm.load import LoadSpec, load

FAMILIES = ("llama", "gpt2", "gemma2", "mixtral", "qwen3_moe")
META = {"plan_hash": "sha256:1", "seed": "0"}


def build(family):
    experts = family in ("mixtral", "qwen3_moe")
    return (ggufs.moe_model if experts else ggufs.dense_model)(family)


def edited(family, tmp_path, kind="F32", wanted="keep", plan=None):
    """A pico model's GGUF file, the same with an edit, its report, and the model with the edit."""
    model = build(family)
    base = ggufs.write(model, tmp_path / "base.gguf", kind)
    plan = plan or random_plan(model)
    file = open_gguf(base)
    out = tmp_path / "edited.gguf"
    report = rewrite(file, out, choose(file, changes(file, plan), wanted), META)
    apply(model, plan)
    return base, out, report, model


@pytest.mark.parametrize("family", FAMILIES)
def test_file_holds_the_merged_models_weights(family, tmp_path):
    base, out, report, model = edited(family, tmp_path)
    before, after, wanted = ggufs.weights(base), ggufs.weights(out), ggufs.tensors_of(model)
    assert list(before) == list(after)
    changed = {row.name for row in report}
    for name, value in after.items():
        np.testing.assert_allclose(value, wanted[name], rtol=0, atol=2e-6, err_msg=name)
        assert np.array_equal(value, before[name]) == (name not in changed)
    weights = [name for name in changed if name.endswith("weight")]
    assert len(weights) == len(list(writers(model)))


@pytest.mark.parametrize(
    ("kind", "stored"),
    [("F32", "float32"), ("BF16", "bfloat16"), ("F16", "float16"), ("Q8_0", "float16")],
)
def test_a_file_is_saved_as_it_is_stored_and_in_float16_where_that_is_quantised(
    kind, stored, tmp_path
):
    path = ggufs.write(build("llama"), tmp_path / "base.gguf", kind)
    lm = load(str(path), LoadSpec(device="cpu"), tokenizer=False)
    assert lm.stored_dtype == getattr(torch, stored)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_rows_of_queries_and_keys_are_paired_as_the_file_has_them(family, tmp_path):
    model = build(family)
    generator = torch.Generator().manual_seed(0)
    factors = {}
    for part in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.1.self_attn.{part}"
        rows, columns = model.get_parameter(f"{name}.weight").shape
        left, right = (torch.randn(*s, generator=generator) for s in ((rows, 2), (2, columns)))
        factors[name] = Factor(left, right * 0.05, None, 0)
    _, out, report, merged = edited(family, tmp_path, plan=EditPlan(factors))
    found, wanted = ggufs.weights(out), ggufs.tensors_of(merged)
    assert len(report) == 3
    for row in report:
        np.testing.assert_allclose(found[row.name], wanted[row.name], rtol=0, atol=2e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_answers_as_the_merged_model_does(family, tmp_path):
    pytest.importorskip("xllamacpp")
    base, out, _, model = edited(family, tmp_path)
    ids = IDS[0].tolist()
    wanted = model(IDS).logits[0, -1].log_softmax(-1)
    found = ggufs.llama_logprobs(ggufs.llama_server(out), ids)
    untouched = ggufs.llama_logprobs(ggufs.llama_server(base), ids)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.02)
    assert (untouched - wanted).abs().max() > 0.2


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "qwen3_moe"])
def test_llama_cpp_reads_the_adapter_and_scales_it(family, tmp_path):
    pytest.importorskip("xllamacpp")
    model = build(family)
    base = ggufs.write(model, tmp_path / "base.gguf")
    plan = random_plan(model)
    file = open_gguf(base)
    out = tmp_path / "lora.gguf"
    assert write_gguf_lora(file, changes(file, plan), out, META) == 3
    ids = IDS[0].tolist()
    for scale in (1.0, 0.5):
        scaled = EditPlan(
            {
                n: Factor(scale * f.left, f.right, None, f.axis, f.weight)
                for n, f in plan.factors.items()
            }
        )
        apart = build(family)
        apply(apart, scaled)
        wanted = apart(IDS).logits[0, -1].log_softmax(-1)
        found = ggufs.llama_logprobs(ggufs.llama_server(base, out, scale), ids)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0.02)
        assert (wanted - model(IDS).logits[0, -1].log_softmax(-1)).abs().max() > 0.1


def test_llama_cpp_reads_an_edited_embedding_in_file_and_adapter(tmp_path):
    pytest.importorskip("xllamacpp")
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(*s, generator=generator) for s in ((64, 2), (2, 300)))
    plan = EditPlan({"model.embed_tokens": Factor(left, right * 0.1, None, 1)})
    base, out, _, model = edited("qwen3_moe", tmp_path, plan=plan)
    file = open_gguf(base)
    write_gguf_lora(file, changes(file, plan), tmp_path / "lora.gguf", META)
    wanted = model(IDS).logits[0, -1].log_softmax(-1)
    ids = IDS[0].tolist()
    for server in (ggufs.llama_server(out), ggufs.llama_server(base, tmp_path / "lora.gguf")):
        torch.testing.assert_close(ggufs.llama_logprobs(server, ids), wanted, rtol=0, atol=0.02)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"])
def test_every_type_is_written_to_its_own_rounding(kind, tmp_path):
    _, out, report, model = edited("llama", tmp_path, kind)
    reader = gguf.GGUFReader(out)
    types = {t.name: t.tensor_type.name for t in reader.tensors}
    wanted = ggufs.tensors_of(model)
    enum = gguf.GGMLQuantizationType[kind]
    for row in report:
        assert (row.before, row.after, types[row.name]) == (kind, kind, kind)
        assert row.size > 0.05
        assert 0.5 < row.kept < 1.5
    stored = ggufs.weights(out)
    base = ggufs.weights(tmp_path / "base.gguf")
    for name in (r.name for r in report):
        change = stored[name] - base[name]
        best = quants.dequantize(quants.quantize(wanted[name], enum), enum)
        # What the base lost to its type, the edited file loses once, and no more than once again.
        error = np.linalg.norm(stored[name] - wanted[name])
        assert error <= 2.1 * np.linalg.norm(best - wanted[name]) + 1e-6
        assert np.linalg.norm(change) > 0


def test_report_says_what_the_file_shows(tmp_path):
    model = build("llama")
    base = ggufs.write(model, tmp_path / "base.gguf", "Q4_0")
    plan = random_plan(model, size=0.02)
    file = open_gguf(base)
    edits = changes(file, plan)
    report = rewrite(file, tmp_path / "o.gguf", choose(file, edits, "keep"), META)
    before, after = ggufs.weights(base), ggufs.weights(tmp_path / "o.gguf")
    for row, change in zip(report, edits, strict=True):
        delta = change.block(0, 0, change.tensor.rows).double().numpy()
        got = after[row.name].astype(np.float64) - before[row.name]
        np.testing.assert_allclose(row.kept, (got * delta).sum() / (delta**2).sum(), rtol=1e-4)
        error = np.linalg.norm(got - delta) / np.linalg.norm(delta)
        np.testing.assert_allclose(row.error, error, rtol=1e-4)
        size = np.linalg.norm(delta) / np.linalg.norm(before[row.name])
        np.testing.assert_allclose(row.size, size, rtol=1e-4)


def test_a_small_edit_drowns_in_four_bits_and_auto_raises_the_type(tmp_path):
    model = build("llama")
    base = ggufs.write(model, tmp_path / "base.gguf", "Q4_0")
    plan = random_plan(model, size=0.02)
    file = open_gguf(base)
    edits = changes(file, plan)
    kept = rewrite(file, tmp_path / "keep.gguf", choose(file, edits, "keep"), META)
    auto = rewrite(file, tmp_path / "auto.gguf", choose(file, edits, "auto"), META)
    assert max(r.kept for r in kept) < 0.6
    assert {r.after for r in auto} == {"Q8_0"}
    assert min(r.kept for r in auto) > 0.9
    strong = rewrite(
        file, tmp_path / "s.gguf", choose(file, changes(file, random_plan(model)), "auto"), META
    )
    assert {r.after for r in strong} == {"Q4_0"}


def test_metadata_and_untouched_tensors_are_carried_over_byte_for_byte(tmp_path):
    model = build("qwen3_moe")
    extra = {
        "test.floats": ([0.1, 2.5], gguf.GGUFValueType.ARRAY),
        "test.flag": (True, gguf.GGUFValueType.BOOL),
        "test.long": (-(2**40), gguf.GGUFValueType.INT64),
        "test.text": ("zwölf ✓", gguf.GGUFValueType.STRING),
        "saber.plan_hash": ("of a former edit", gguf.GGUFValueType.STRING),
    }
    base = ggufs.write(model, tmp_path / "base.gguf", "Q8_0", extra)
    # An empty array, which the library reads but does not write.
    raw = base.read_bytes()
    key = b"test.empty"
    more = struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 8, 0)
    reader = gguf.GGUFReader(base)
    at = reader.tensors[0].field.offset
    start = int(reader.data_offset)
    count = struct.unpack("<Q", raw[16:24])[0]
    info = raw[
        at : reader.tensors[-1].field.offset + sum(p.nbytes for p in reader.tensors[-1].field.parts)
    ]
    head = raw[:16] + struct.pack("<Q", count + 1) + raw[24:at] + more + info
    base.write_bytes(head + b"\0" * (-len(head) % 32) + raw[start:])

    file = open_gguf(base)
    out = tmp_path / "o.gguf"
    report = rewrite(file, out, choose(file, changes(file, random_plan(model)), "keep"), META)
    old, new = gguf.GGUFReader(base), gguf.GGUFReader(out)
    fields = [f for f in old.fields if not f.startswith(("GGUF.", "saber."))]
    assert [f for f in new.fields if not f.startswith(("GGUF.", "saber."))] == fields
    assert "test.empty" in fields
    for name in fields:
        parts = [p.tobytes() for p in old.fields[name].parts]
        assert parts == [p.tobytes() for p in new.fields[name].parts], name
    found = {f: new.fields[f].contents() for f in new.fields if f.startswith("saber.")}
    assert found == {"saber.plan_hash": "sha256:1", "saber.seed": "0"}
    changed = {r.name for r in report}
    assert [t.name for t in old.tensors] == [t.name for t in new.tensors]
    for a, b in zip(old.tensors, new.tensors, strict=True):
        assert (a.tensor_type, a.shape.tolist()) == (b.tensor_type, b.shape.tolist())
        assert (a.data.tobytes() == b.data.tobytes()) == (a.name not in changed)


def test_pieces_of_a_tensor_add_up_to_the_whole(tmp_path, monkeypatch):
    base, out, report, _ = edited("mixtral", tmp_path, "Q8_0")
    monkeypatch.setattr(gguf_rewrite, "BLOCK", 256)
    file = open_gguf(base)
    again = tmp_path / "again.gguf"
    plan = random_plan(build("mixtral"))
    small = rewrite(file, again, choose(file, changes(file, plan), "keep"), META)
    assert again.read_bytes() == out.read_bytes()
    for a, b in zip(small, report, strict=True):
        np.testing.assert_allclose(a[3:], b[3:], rtol=1e-6)


def test_memory_is_that_of_a_few_pieces_whatever_the_tensors_size(tmp_path, monkeypatch):
    model = ggufs.dense_model("llama", hidden=512)
    base = ggufs.write(model, tmp_path / "b.gguf", "Q8_0")
    file = open_gguf(base)
    plan = random_plan(model)
    edits = choose(file, changes(file, plan), "keep")
    largest = max(4 * change.tensor.rows * change.tensor.shape[-1] for change, _ in edits.values())
    peaks = []
    for block in (1 << 22, 1 << 12):
        monkeypatch.setattr(gguf_rewrite, "BLOCK", block)
        tracemalloc.start()
        rewrite(file, tmp_path / "o.gguf", edits, META)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    whole, pieces = peaks
    assert whole > largest
    assert pieces < largest / 2


def q4_k(path):
    """Turn all Q4_0 tensors of a file into Q4_K, which has as many bytes a value, full of zeros."""
    reader = gguf.GGUFReader(path)
    raw = bytearray(path.read_bytes())
    for tensor in reader.tensors:
        if tensor.tensor_type.name == "Q4_0":
            parts = tensor.field.parts
            at = tensor.field.offset + sum(p.nbytes for p in parts[:4])
            raw[at : at + 4] = struct.pack("<I", gguf.GGMLQuantizationType.Q4_K)
            raw[tensor.data_offset : tensor.data_offset + tensor.n_bytes] = bytes(tensor.n_bytes)
    path.write_bytes(raw)
    return path


def test_types_that_cannot_be_written_are_named_and_auto_takes_q8_0(tmp_path):
    model = ggufs.dense_model("llama", hidden=256)
    plan = EditPlan({n: f for n, f in random_plan(model).factors.items() if "o_proj" in n})
    for name in plan.factors:
        model.get_parameter(f"{name}.weight").zero_()
    only = re.compile("attn_output")
    base = ggufs.write(model, tmp_path / "b.gguf", lambda n: "Q4_0" if only.search(n) else "F16")
    file = open_gguf(q4_k(base))
    with pytest.raises(UsageError, match=r"cannot write Q4_K, the type of 2 tensors.*--type q8_0"):
        choose(file, changes(file, plan), "keep")
    out = tmp_path / "o.gguf"
    report = rewrite(file, out, choose(file, changes(file, plan), "auto"), META)
    assert {(r.before, r.after) for r in report} == {("Q4_K", "Q8_0")}
    apply(model, plan)
    after = ggufs.weights(out)
    for row in report:
        wanted = ggufs.tensors_of(model)[row.name]
        assert np.linalg.norm(after[row.name] - wanted) < 0.01 * np.linalg.norm(wanted)


def test_unknown_type_and_rows_that_do_not_fit(tmp_path):
    model = build("llama")
    file = open_gguf(ggufs.write(model, tmp_path / "b.gguf"))
    edits = changes(file, random_plan(model))
    with pytest.raises(UnknownName, match="Did you mean 'q8_0'"):
        choose(file, edits, "q8_O")
    odd = ggufs.dense_model("llama")
    odd.config.intermediate_size = 80
    import transformers

    odd = transformers.AutoModelForCausalLM.from_config(odd.config).requires_grad_(False)
    file = open_gguf(ggufs.write(odd, tmp_path / "odd.gguf", "F16"))
    with pytest.raises(UsageError, match=r"rows of blk\.0\.ffn_down\.weight have 80 values.*f16"):
        choose(file, changes(file, random_plan(odd)), "q8_0")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sketch_knows_its_weights_through_four_bits_and_no_others(family, tmp_path):
    model = build(family)
    plan = random_plan(model)
    sketch = take(model, plan)
    file = open_gguf(ggufs.write(model, tmp_path / "b.gguf", "Q4_0"))
    require_alike(file, changes(file, plan), sketch)
    cls = ggufs.moe_model if family in ("mixtral", "qwen3_moe") else ggufs.dense_model
    other = open_gguf(ggufs.write(cls(family, seed=1), tmp_path / "c.gguf", "Q4_0"))
    with pytest.raises(ModelError, match=r"does not hold the weights.*--force"):
        require_alike(other, changes(other, plan), sketch)


def test_a_sketch_sees_a_matrix_that_lies_the_other_way_round(tmp_path):
    model = build("llama")
    plan = EditPlan({n: f for n, f in random_plan(model).factors.items() if "o_proj" in n})
    sketch = take(model, plan)
    for layer in model.model.layers:
        weight = layer.self_attn.o_proj.weight
        weight.copy_(weight.T.clone())
    file = open_gguf(ggufs.write(model, tmp_path / "b.gguf"))
    with pytest.raises(ModelError, match="does not hold the weights"):
        require_alike(file, changes(file, plan), sketch)


def test_a_sketch_is_saved_and_read(tmp_path):
    model = build("llama")
    sketch = take(model, random_plan(model))
    sketch.save(tmp_path / "s")
    back = Sketch.load(tmp_path / "s")
    assert Sketch.load(tmp_path / "none") is None
    for name, values in sketch.samples.items():
        assert torch.equal(back.samples[name], values)
        assert likeness(values, -values) == pytest.approx(-1)


def test_mistral3_is_kept_as_llama_too(tmp_path):
    file = open_gguf(ggufs.write(build("llama"), tmp_path / "base.gguf"))
    require_architecture(file, "mistral3")
    with pytest.raises(ModelError, match="is a 'llama' model"):
        require_architecture(file, "qwen3")


HYBRIDS = {
    "granitemoe": ("granitemoe", {"attn_output", "ffn_down_exps"}),
    "granitemoehybrid": (
        "granitehybrid",
        {"attn_output", "ssm_out", "ffn_down_exps", "ffn_down_shexp"},
    ),
    "nemotron_h": (
        "nemotron_h_moe",
        {"attn_output", "ssm_out", "ffn_down", "ffn_down_exps", "ffn_down_shexp"},
    ),
}


@pytest.mark.parametrize("family", HYBRIDS)
def test_writers_that_transformers_has_renamed_are_found(family):
    """Its experts and decoders have other names in memory than in the checkpoints that were converted."""
    arch, wanted = HYBRIDS[family]
    key = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch)
    file = GgufFile(Path("x.gguf"), arch, {}, gguf.get_tensor_name_map(key, 8), None)
    model = tiny.tiny_model(family)
    written = re.compile(r"\.(o_proj|out_proj|down_proj|output_linear)(\.weight)?$")
    names = [n for n, _ in model.named_parameters() if written.search(n)]
    found = {name: _stem(file, name) for name in names}
    assert {stem.split(".")[2] for stem in found.values()} == wanted
    blocks = {name: re.search(r"layers\.(\d+)\.", name)[1] for name in names}
    assert all(found[name].split(".")[1] == block for name, block in blocks.items())


def test_files_of_another_architecture_or_size_name_the_tensor(tmp_path):
    plan = random_plan(build("llama"))
    other = open_gguf(ggufs.write(build("gpt2"), tmp_path / "g.gguf"))
    with pytest.raises(ModelError, match=r"'gpt2' model, and the run was made on a 'llama' one"):
        require_architecture(other, "llama")
    for family in FAMILIES:
        file = open_gguf(ggufs.write(build(family), tmp_path / f"{family}.gguf"))
        require_architecture(file, build(family).config.model_type)
    strange = EditPlan({"model.tower.0.proj": next(iter(plan.factors.values()))})
    with pytest.raises(ModelError, match=r"'gpt2' model, which has no place for model\.tower\.0"):
        changes(other, strange)
    wide = ggufs.write(ggufs.dense_model("llama", hidden=128), tmp_path / "w.gguf")
    with pytest.raises(ModelError, match=r"attn_output\.weight has the shape 1 x 128 x 128"):
        changes(open_gguf(wide), plan)
    experts = open_gguf(ggufs.write(build("mixtral"), tmp_path / "m.gguf"))
    with pytest.raises(ModelError, match=r"no tensor blk\.0\.ffn_down\.weight"):
        changes(experts, plan)


def test_broken_files_say_so(tmp_path):
    whole = ggufs.write(build("llama"), tmp_path / "b.gguf").read_bytes()
    file = tmp_path / "x.gguf"
    for content in (whole[:-5000], whole[:900], b"not a model at all, but text", b""):
        file.write_bytes(content)
        with pytest.raises(ModelError, match=r"x\.gguf cannot be read as GGUF"):
            open_gguf(file)
    with pytest.raises(ModelError, match="no such file"):
        open_gguf(tmp_path / "none.gguf")
    file.write_bytes(whole.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0llamb", 1))
    with pytest.raises(ModelError, match="architecture 'llamb'"):
        open_gguf(file)


def test_parts_of_a_split_model_are_refused_with_the_command_that_joins_them(tmp_path):
    extra = {"split.count": (3, gguf.GGUFValueType.UINT16)}
    file = ggufs.write(build("llama"), tmp_path / "x-00001-of-00003.gguf", extra=extra)
    with pytest.raises(ModelError, match=r"one of 3 parts.*llama-gguf-split --merge"):
        open_gguf(file)


def test_nothing_is_left_when_writing_fails(tmp_path, monkeypatch):
    model = build("llama")
    file = open_gguf(ggufs.write(model, tmp_path / "b.gguf"))
    edits = choose(file, changes(file, random_plan(model)), "keep")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf_rewrite, "_copy", full)
    with pytest.raises(OutputError, match="No space left"):
        rewrite(file, tmp_path / "o.gguf", edits, META)
    assert [p.name for p in tmp_path.iterdir()] == ["b.gguf"]

    def stopped(_tensor):
        raise KeyboardInterrupt

    monkeypatch.undo()
    with pytest.raises(KeyboardInterrupt):
        rewrite(file, tmp_path / "o.gguf", edits, META, stopped)
    assert [p.name for p in tmp_path.iterdir()] == ["b.gguf"]


def test_a_plan_with_nan_is_not_written(tmp_path):
    model = build("llama")
    plan = random_plan(model)
    next(iter(plan.factors.values())).left[0, 0] = float("nan")
    file = open_gguf(ggufs.write(model, tmp_path / "b.gguf"))
    with pytest.raises(ModelError, match="NaN or infinity"):
        rewrite(file, tmp_path / "o.gguf", choose(file, changes(file, plan), "keep"), META)


@pytest.mark.parametrize(
    ("kind", "wanted", "value", "ways"),
    [
        ("BF16", "f16", 1e5, "--type bf16"),
        ("F32", "q8_0", 1e9, "--type bf16"),
        ("F32", "q4_0", 1e9, "--type bf16"),
        ("F32", "bf16", 3.4028e38, "--type f32"),
    ],
)
def test_values_too_large_for_a_type_are_not_stored_as_infinity(
    kind, wanted, value, ways, tmp_path
):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[3, 5] = value
    file = open_gguf(ggufs.write(model, tmp_path / "base.gguf", kind))
    found = changes(file, random_plan(model))
    with pytest.raises(ModelError, match=f"attn_output.*too large for {wanted.upper()}.*{ways}"):
        rewrite(file, tmp_path / "out.gguf", choose(file, found, wanted), META)
    assert [path.name for path in tmp_path.iterdir()] == ["base.gguf"]
    # A type that holds them is taken by itself.
    rewrite(file, tmp_path / "out.gguf", choose(file, found, "auto"), META)
    assert all(np.isfinite(t).all() for t in ggufs.weights(tmp_path / "out.gguf").values())


def test_a_base_file_with_infinity_is_named_as_such(tmp_path):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[3, 5] = float("inf")
    file = open_gguf(ggufs.write(model, tmp_path / "base.gguf"))
    typed = choose(file, changes(file, random_plan(model)), "keep")
    with pytest.raises(ModelError, match="of the base file holds NaN or infinity"):
        rewrite(file, tmp_path / "out.gguf", typed, META)
