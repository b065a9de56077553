"""`saber diff`: what changed is told apart, whoever made it, and bad input gets one clear line."""

import functools
import json
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import failing

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import diff_cases as cases

from saber.checkpoint.delta import compare_matrices
from saber.checkpoint.diff import compare, record
from saber.checkpoint.naming import Layout, aligned, gain_behind, kind_of
from saber.checkpoint.reading import Checkpoint, Stored, in_memory, open_checkpoint
from saber.checkpoint.rounding import grid_of, survey, ulp
from saber.checkpoint.sharing import Piece, sharing
from saber.checkpoint.spectrum import singular, spectrum
from saber.cli.main import main
from saber.errors import ModelError

F32, BF16 = "float32", "bfloat16"
EVERY = [(f, d) for f in cases.FAMILIES for d in (F32, BF16)]


@functools.cache
def situation(family, dtype, seed=0):
    return cases.situation(family, seed, cases.DTYPES[dtype])


def found(family, dtype, name, folder, seed=0):
    base = situation(family, dtype, seed)
    return cases.differing(base, cases.CASES[name].edit(base), folder)


def check(family, dtype, name, folder, seed=0):
    case, v = cases.CASES[name], found(family, dtype, name, folder, seed).verdict
    assert v.name in case.right, (v.text, v.evidence)
    if case.rank is not None:
        assert v.rank == case.rank, v.text
    return v


@pytest.mark.parametrize(("family", "dtype"), EVERY)
@pytest.mark.parametrize("name", ["ablation_1", "ablation_3"])
def test_an_ablation_is_called_one_of_its_rank(tmp_path, family, dtype, name):
    v = check(family, dtype, name, tmp_path)
    assert v.strength == pytest.approx(1.0, abs=0.01)
    assert v.law > 0.99
    assert v.pure
    assert set(v.kinds) == {
        "attention out",
        "expert down" if family == "mixtral" else "mlp down",
    }


@pytest.mark.parametrize(
    ("family", "dtype", "name"),
    [
        ("llama", F32, "ablation_weak"),
        ("gpt2", BF16, "ablation_weak"),
        ("mixtral", F32, "ablation_layers"),
        ("gemma2", BF16, "ablation_embedding"),
        *(
            (family, dtype, name)
            for name in ("columns_kept", "rows_kept", "rows_apart", "frobenius_kept")
            for family, dtype in (("llama", F32), ("gpt2", BF16))
        ),
        ("gemma2", F32, "saber_orthogonal"),
        ("gemma2", BF16, "saber_orthogonal"),
        ("gpt2", BF16, "saber_orthogonal"),
        ("llama", BF16, "amplified"),
    ],
)
def test_ablations_of_many_makers_are_told(tmp_path, family, dtype, name):
    check(family, dtype, name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", F32), ("gpt2", BF16), ("mixtral", BF16), ("gemma2", F32)]
)
def test_the_selective_edit_has_its_own_verdict(tmp_path, family, dtype):
    v = check(family, dtype, "saber_selective", tmp_path)
    assert v.law < 0.3
    assert "shared output directions" in v.text


@pytest.mark.parametrize(
    ("family", "dtype", "name"),
    [
        ("llama", F32, "fine_tune"),
        ("gpt2", BF16, "fine_tune"),
        ("mixtral", BF16, "fine_tune_sgd"),
        ("llama", BF16, "lora"),
        ("gpt2", F32, "lora_writers"),
        ("llama", BF16, "merge_of_tunes"),
        ("gemma2", BF16, "merge_of_strangers"),
        ("llama", F32, "merge_of_small_stranger"),
        ("llama", F32, "low_precision"),
        ("gpt2", BF16, "low_precision"),
        ("llama", F32, "quantised_8"),
        ("llama", BF16, "quantised_4"),
        ("llama", F32, "scaled"),
        ("gpt2", BF16, "rank_reduced"),
        ("llama", F32, "pruned"),
        ("gemma2", BF16, "norms_only"),
        ("mixtral", BF16, "identity"),
    ],
)
def test_nothing_else_is_called_an_ablation(tmp_path, family, dtype, name):
    check(family, dtype, name, tmp_path)


def test_what_bfloat16_leaves_of_a_weak_ablation_is_said_with_care(tmp_path):
    base = situation("llama", BF16)
    v = cases.differing(base, cases.ablation(1, 0.01)(base), tmp_path / "weak").verdict
    assert v.name == "low_rank_writers"
    assert 0.5 < v.law < 0.95
    assert "only in part" in v.text
    lost = cases.differing(base, cases.ablation(1, 0.002)(base), tmp_path / "lost").verdict
    assert lost.name == "rounding"


@pytest.mark.slow
def test_an_ablation_under_a_light_fine_tune_is_seen_and_said_to_be_mixed(tmp_path):
    v = check("llama", BF16, "healed", tmp_path)
    assert not v.pure
    assert "other changes" in v.text


@pytest.mark.long
@pytest.mark.parametrize(("family", "dtype"), EVERY)
@pytest.mark.parametrize("name", cases.CASES)
def test_every_case_in_every_family(tmp_path, family, dtype, name):
    check(family, dtype, name, tmp_path, seed=3)


def test_the_rounding_unit_is_the_distance_to_the_next_number():
    x = torch.randn(2000) * 10.0 ** torch.randint(-3, 4, (2000,)).float()
    for dtype in (torch.bfloat16, torch.float16):
        stored = x.to(dtype)
        # Next number of the same binade: one more in the bit pattern.
        following = (stored.view(torch.int16) + 1).view(dtype)
        step = (following.double() - stored.double()).abs().float()
        torch.testing.assert_close(ulp(stored.float(), dtype), step)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 64), (40, 600)])
def test_rounding_stays_below_the_floor_and_not_far_below(dtype, shape):
    torch.manual_seed(0)
    a = torch.randn(shape) * torch.rand(shape[0], 1).exp()
    s = survey(a, a.to(dtype).float())
    top = float(torch.linalg.svdvals(s.delta)[0])
    assert s.within_rounding
    assert s.floor / 4 < top < s.floor
    assert s.energy == pytest.approx(s.noise, rel=0.2)


def test_float32_files_that_hold_bfloat16_are_seen_through():
    x = torch.randn(30, 30)
    assert grid_of(x) == torch.float32
    assert grid_of(x.bfloat16().float()) == torch.bfloat16
    assert grid_of(x.half().float()) == torch.float16


@pytest.mark.parametrize("shape", [(500, 300), (300, 700), (40, 300)])
def test_the_leading_spectrum_is_that_of_the_full_decomposition(shape):
    generator = torch.Generator().manual_seed(1)
    d = 0.02 * torch.randn(shape, generator=generator)
    for i in range(5):
        left, right = (torch.randn(n, 1, generator=generator) for n in shape)
        d = d + left @ right.T / 2**i
    left, values, right = singular(d, 5, generator)
    torch.testing.assert_close(values.float(), torch.linalg.svdvals(d)[:5], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(left.T @ left, torch.eye(5), atol=1e-4, rtol=1e-4)
    rebuilt = left * values.float() @ right.T
    assert float((d - rebuilt).norm()) < 1.01 * 0.02 * (shape[0] * shape[1]) ** 0.5


def test_rank_counts_what_stands_out_of_bfloat16():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(300, 400, generator=generator).bfloat16()
    change = (
        0.1 * torch.randn(300, 4, generator=generator) @ torch.randn(4, 400, generator=generator)
    )
    s = survey(a, (a.float() + change).bfloat16())
    assert torch.linalg.matrix_rank(s.delta) == 300
    assert spectrum(s, generator).rank == 4


def test_the_law_gives_strengths_and_names_the_gain():
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(48, 80, generator=generator, dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(48, 2, generator=generator, dtype=torch.float64)).Q
    cut = w - q @ torch.diag(torch.tensor([1.0, 0.4]).double()) @ (q.T @ w)
    law = compare_matrices(w.float(), cut.float(), (0,), generator=generator).law
    assert law.strengths == pytest.approx((1.0, 0.4), abs=1e-3)
    assert law.gain == ""
    # The writer's output side of SABER behind a gain, docs/method.md, "Norm gains".
    gain = torch.rand(48, generator=generator, dtype=torch.float64) + 0.1
    metric = gain**2 + (gain**2).mean() / 48
    reading = q[:, :1] * gain[:, None]
    write = reading / metric[:, None]
    write = write / (reading * write).sum()
    cut = w - 0.7 * write @ (reading.T @ w)
    change = compare_matrices(w.float(), cut.float(), (0,), gain.float(), generator=generator)
    assert change.law.gain == "norm gain"
    assert change.law.strengths == pytest.approx((0.7,), abs=1e-3)
    plain = compare_matrices(w.float(), cut.float(), (0,), generator=generator)
    assert not plain.law.holds


def test_a_square_matrix_is_looked_at_from_both_sides():
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(48, 48, generator=generator)
    r = torch.nn.functional.normalize(torch.randn(48, generator=generator), dim=0)
    for axis, cut in ((0, w - torch.outer(r, r @ w)), (1, w - torch.outer(w @ r, r))):
        for sides in ((0, 1), (1, 0)):
            change = compare_matrices(w, cut, sides, generator=generator)
            assert change.law.holds
            assert change.axis == change.law.axis == axis
            assert abs(float(change.left[:, 0] @ r)) > 0.999


def test_a_matrix_that_shrank_as_a_whole_is_not_ablated():
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(48, 80, generator=generator)
    law = compare_matrices(w, 0.9 * w, (0,), generator=generator).law
    assert law.within > 0.99  # what is along its directions is what an ablation would be
    assert law.elsewhere == pytest.approx(0.1, abs=1e-3)
    assert not law.holds


def test_directions_are_held_against_one_another_behind_the_gains():
    generator = torch.Generator().manual_seed(0)
    r = torch.nn.functional.normalize(torch.randn(64, generator=generator), dim=0)
    pieces = []
    for layer in range(3):
        w = torch.randn(64, 80, generator=generator)
        gain = torch.exp(1.5 * torch.randn(64, generator=generator))
        z = torch.randn(80, generator=generator)
        change = compare_matrices(w, w + torch.outer(r / gain, z), (0,), gain, generator=generator)
        pieces.append(Piece(f"{layer}", "mlp down", layer, True, change, gain))
    found = sharing(pieces)
    assert found.behind_gain
    assert found.shared > 0.99
    assert found.directions == 1
    written = sharing([replace(p, gain=None) for p in pieces])
    assert not written.behind_gain
    assert written.shared < 0.7


def test_names_sort_into_kinds():
    matrix = Stored("F32", (4, 4), Path())
    for name, kind in {
        "model.layers.0.self_attn.o_proj.weight": "attention out",
        "transformer.h.0.attn.c_proj.weight": "attention out",
        "transformer.h.0.mlp.c_proj.weight": "mlp down",
        "gpt_neox.layers.0.attention.dense.weight": "attention out",
        "gpt_neox.layers.0.mlp.dense_4h_to_h.weight": "mlp down",
        "model.decoder.layers.0.fc2.weight": "mlp down",
        "model.layers.0.block_sparse_moe.experts.3.w2.weight": "expert down",
        "model.layers.0.block_sparse_moe.experts.3.w1.weight": "expert in",
        "model.layers.0.block_sparse_moe.gate.weight": "router",
        "model.layers.0.mlp.shared_experts.down_proj.weight": "mlp down",
        "model.layers.0.mlp.experts.down_proj": "expert down",
        "model.layers.0.mlp.gate_proj.weight": "mlp in",
        "backbone.layers.0.mixer.out_proj.weight": "mixer out",
        "model.layers.0.linear_attn.out_proj.weight": "mixer out",
        "model.layers.0.self_attn.kv_b_proj.weight": "attention in",
        "model.embed_tokens.weight": "embedding",
        "lm_head.weight": "head",
        "model.layers.0.self_attn.o_proj.bias": "bias",
        "something.else": "other",
    }.items():
        assert kind_of(name, matrix) == kind, name


def test_the_stream_axis_follows_the_checkpoint():
    shapes = {"h.0.mlp.c_proj.weight": (96, 32), "h.0.attn.c_proj.weight": (32, 32)}
    gpt2 = in_memory("x", {n: torch.zeros(s) for n, s in shapes.items()}, {"n_embd": 32})
    assert Layout.of(gpt2).sides("attention out", (32, 32), False) == (1, 0)
    linear = in_memory(
        "x", {n: torch.zeros(s[::-1]) for n, s in shapes.items()}, {"hidden_size": 32}
    )
    assert Layout.of(linear).sides("attention out", (32, 32), False) == (0, 1)
    experts = {"layers.0.mlp.experts.down_proj": torch.zeros(4, 32, 32)}
    for kind, axis in (("gpt_oss", 1), ("qwen3_moe", 0)):
        fused = in_memory("x", experts, {"hidden_size": 32, "model_type": kind})
        assert Layout.of(fused).sides("expert down", (32, 32), True)[0] == axis


def test_fused_experts_are_compared_one_by_one():
    torch.manual_seed(0)
    w = {"layers.0.mlp.experts.down_proj": torch.randn(4, 48, 32)}
    r = torch.nn.functional.normalize(torch.randn(32), dim=0)
    edited = {n: t.clone() for n, t in w.items()}
    for t in edited.values():
        for expert in (1, 3):
            t[expert] -= torch.outer(t[expert] @ r, r)
    config = {"hidden_size": 32}
    result = compare(in_memory("a", w, config), in_memory("b", edited, config))
    assert [p.name.rpartition("[")[2] for p in result.pieces] == ["1]", "3]"]
    assert result.verdict.name == "directional_ablation"
    assert result.verdict.kinds == {"expert down": 2}


def test_gains_stand_behind_writers_of_sandwiched_layers_alone():
    base = situation("gemma2", F32)
    opened = in_memory("g", base.tensors, {"model_type": "gemma2"})
    name = "model.layers.1.mlp.down_proj.weight"
    expected = 1 + base.tensors["model.layers.1.post_feedforward_layernorm.weight"]
    torch.testing.assert_close(gain_behind(opened, name, "mlp down"), expected)
    llama = in_memory("l", situation("llama", F32).tensors, {"model_type": "llama"})
    assert gain_behind(llama, name, "mlp down") is None
    assert gain_behind(llama, "model.layers.1.self_attn.o_proj.weight", "attention out") is None


def test_prefixes_that_savers_add_are_seen_through():
    tensors = {"h.0.mlp.c_proj.weight": torch.zeros(9, 9), "wte.weight": torch.zeros(9, 9)}
    base = in_memory("a", tensors)
    longer = in_memory("b", {f"transformer.{n}": t for n, t in tensors.items()})
    assert aligned(base, longer) == {n: f"transformer.{n}" for n in tensors}
    assert compare(base, longer).verdict.name == "identical"


def test_prefixes_are_seen_through_where_the_head_is_called_the_same():
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "model.layers.0.mlp.down_proj.weight": torch.randn(32, 64, generator=generator),
        "lm_head.weight": torch.randn(50, 32, generator=generator),
    }
    base = in_memory("a", tensors)
    name = "model.language_model.layers.0.mlp.down_proj.weight"
    head = tensors["lm_head.weight"]
    tuned = torch.randn(32, 64, generator=generator)
    other = in_memory("b", {name: tuned, "lm_head.weight": head, "visual.proj.weight": head})
    assert aligned(base, other) == dict(zip(tensors, (name, "lm_head.weight"), strict=True))
    found = compare(base, other)
    assert found.verdict.name == "full_rank"
    assert found.added == ("visual.proj.weight",)
    assert found.removed == ()


def test_weights_with_nan_are_not_called_the_same():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 64, generator=generator)
    broken = weight.clone()
    broken[3, 5] = float("nan")
    name = "model.layers.0.mlp.down_proj.weight"
    found = compare(in_memory("a", {name: weight}), in_memory("b", {name: broken}))
    assert found.verdict.name == "not_measured"
    assert "NaN or infinity in 1 changed tensor" in found.verdict.text


def test_only_one_pair_of_tensors_is_held_at_a_time(tmp_path, monkeypatch):
    base = situation("llama", BF16)
    cases.differing(base, cases.fine_tune(base), tmp_path)
    alive, most = [], []
    read = Checkpoint.read

    def watched(self, name, index=None):
        tensor = read(self, name, index)
        alive[:] = [ref for ref in alive if ref() is not None]
        alive.append(weakref.ref(tensor))
        most.append(len(alive))
        return tensor

    monkeypatch.setattr(Checkpoint, "read", watched)
    compare(open_checkpoint(str(tmp_path / "base")), open_checkpoint(str(tmp_path / "edited")))
    assert len(most) > 50
    # The last pair is let go only when the first of the next has been read.
    assert max(most) <= 3


def write(folder, tensors, shards=1, config=None):
    folder.mkdir()
    names = sorted(tensors)
    listed = {}
    for i in range(shards):
        part = {n: tensors[n].contiguous() for n in names[i::shards]}
        file = (
            f"model-{i + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        )
        save_file(part, folder / file)
        listed |= dict.fromkeys(part, file)
    if shards > 1:
        index = {"metadata": {}, "weight_map": listed}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def pair(tmp_path):
    """A base in one file, and its ablation in three shards."""
    base = situation("llama", F32)
    config = {"hidden_size": 64, "model_type": "llama"}
    write(tmp_path / "base", base.tensors, config=config)
    write(tmp_path / "edited", cases.ablation(1)(base), 3, config)
    return tmp_path / "base", tmp_path / "edited"


def test_files_folders_and_shards_give_the_same(pair, capsys):
    base, edited = pair
    assert main(["diff", str(base), str(edited), "--json"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert main(["diff", str(base / "model.safetensors"), str(edited), "--json"]) == 0
    other = json.loads(capsys.readouterr().out)
    assert one["verdict"]["name"] == "directional_ablation"
    assert one["verdict"] == other["verdict"]
    assert one["changes"] == other["changes"]
    assert one["tensors"]["changed"] == 8
    assert one["tensors"]["unchanged"] == one["tensors"]["common"] - 8
    assert one["shared_directions"]["overlap"] > 0.99


def test_a_folder_without_configuration_is_read_by_its_shapes(pair):
    base, edited = pair
    (base / "config.json").unlink()
    result = compare(open_checkpoint(str(base)), open_checkpoint(str(edited)))
    assert result.layout.d_model == 64
    assert result.verdict.name == "directional_ablation"


def test_the_table_says_what_and_why(pair, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["diff", *map(str, pair), "--top", "2"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "A directional ablation of rank 1, strength 1.00, in 4 mlp down, 4 attention out" in said
    assert "most changed (2 of 8)" in said
    assert "output directions of changed writers overlap by 1.00" in said


def test_a_run_folder_stands_for_its_model(pair):
    base, edited = pair
    run = base.parent / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    with pytest.raises(ModelError, match="no exported model"):
        open_checkpoint(str(run))
    edited.rename(run / "model")
    assert compare(open_checkpoint(str(base)), open_checkpoint(str(run))).verdict.rank == 1


def test_added_removed_reshaped_retyped_tensors_are_listed(tmp_path):
    torch.manual_seed(0)
    tensors = {f"layers.0.{n}.weight": torch.randn(16, 16) for n in "abcd"}
    changed = dict(tensors)
    changed["layers.0.new.weight"] = changed.pop("layers.0.a.weight")
    changed["layers.0.b.weight"] = torch.randn(16, 17)
    changed["layers.0.c.weight"] = tensors["layers.0.c.weight"].bfloat16()
    result = record(compare(in_memory("x", tensors), in_memory("y", changed)))
    listed = result["tensors"]
    assert listed["added"] == ["layers.0.new.weight"]
    assert listed["removed"] == ["layers.0.a.weight"]
    assert listed["reshaped"] == ["layers.0.b.weight"]
    assert listed["retyped"] == ["layers.0.c.weight"]
    assert (listed["unchanged"], listed["changed"]) == (1, 1)
    assert result["verdict"]["name"] == "rounding"
    assert result["verdict"]["pure"] is False


def test_codes_of_quantised_weights_are_not_measured():
    tensors = {"layers.0.q.weight": torch.randint(0, 9, (16, 16), dtype=torch.uint8)}
    other = {n: t + 1 for n, t in tensors.items()}
    result = compare(in_memory("x", tensors), in_memory("y", other))
    assert result.verdict.name == "not_measured"
    assert result.unmeasured == ("layers.0.q.weight",)
    assert (
        compare(in_memory("x", tensors), in_memory("y", dict(tensors))).verdict.name == "identical"
    )


def test_a_damaged_tensor_is_named_and_the_rest_is_judged(pair, capsys):
    base, edited = pair
    file = sorted(edited.glob("*.safetensors"))[0]
    tensors = load_file(file)
    name = next(n for n, t in tensors.items() if t.ndim == 2 and "proj" in n)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file)
    assert main(["diff", str(base), str(edited), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [c["name"] for c in result["changes"] if not c["finite"]] == [name]
    assert result["verdict"]["name"] == "directional_ablation"
    assert result["verdict"]["pure"] is False
    assert main(["diff", str(base), str(edited)]) == 0
    assert f"NaN or infinity in {name}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_plot_is_drawn_the_same_each_time(pair, capsys, tmp_path, kind):
    files = [tmp_path / f"{i}" / f"p.{kind}" for i in range(2)]
    for file in files:
        assert main(["diff", *map(str, pair), "--plot", str(file), "--json"]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].read_bytes()[:4] in (b"\x89PNG", b"<?xm")
    assert not list(tmp_path.rglob("*.part"))


def test_every_verdict_can_be_drawn(pair, tmp_path):
    base, _ = pair
    assert main(["diff", str(base), str(base), "--plot", str(tmp_path / "p.svg"), "--json"]) == 0
    assert (tmp_path / "p.svg").stat().st_size > 1000


def test_another_architecture(pair, capsys, tmp_path):
    write(tmp_path / "other", {"wte.weight": torch.zeros(9, 9)})
    code, error = failing(capsys, "diff", pair[0], tmp_path / "other")
    assert code == 2
    assert "no tensor in common" in error


def test_another_size(pair, capsys, tmp_path):
    small = {
        n: t[:8, :8] if t.ndim == 2 else t
        for n, t in load_file(pair[0] / "model.safetensors").items()
    }
    write(tmp_path / "small", small)
    assert "different sizes" in failing(capsys, "diff", pair[0], tmp_path / "small")[1]


def test_a_shard_that_is_cut_short(pair, capsys):
    base, edited = pair
    file = sorted(edited.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-100])
    code, error = failing(capsys, "diff", base, edited)
    assert code == 2
    assert file.name in error
    assert "truncated" in error


def test_an_index_that_names_a_missing_shard(pair, capsys):
    base, edited = pair
    file = sorted(edited.glob("*.safetensors"))[2]
    file.unlink()
    error = failing(capsys, "diff", base, edited, "--json")[1]
    assert file.name in error
    assert "which is not in" in error


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_an_index_that_is_none(pair, capsys, text):
    base, edited = pair
    (edited / "model.safetensors.index.json").write_text(text)
    assert "index.json" in failing(capsys, "diff", base, edited)[1]


def test_folders_and_files_that_hold_no_weights(pair, capsys, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no weights" in failing(capsys, "diff", pair[0], empty)[1]
    (empty / "pytorch_model.bin").write_bytes(b"x")
    error = failing(capsys, "diff", pair[0], empty)[1]
    assert "pickle" in error
    assert "save_pretrained" in error
    assert "Convert" in failing(capsys, "diff", pair[0], empty / "pytorch_model.bin")[1]
    (empty / "m.gguf").write_bytes(b"GGUF")
    assert ".gguf" in failing(capsys, "diff", empty / "m.gguf", pair[0])[1]
    (empty / "adapter_model.safetensors").write_bytes((pair[0] / "model.safetensors").read_bytes())
    assert "adapter" in failing(capsys, "diff", pair[0], empty)[1]
    (empty / "x.safetensors").write_bytes(b"no header at all")
    assert "x.safetensors" in failing(capsys, "diff", pair[0], empty)[1]


def test_names_that_lead_nowhere(pair, capsys):
    assert "no such checkpoint" in failing(capsys, "diff", pair[0], "./nothing")[1]
    code, error = failing(capsys, "diff", pair[0], "nobody/nothing")
    assert code == 2
    assert "nobody/nothing" in error


def test_wrong_use(pair, capsys, tmp_path):
    base, edited = pair
    assert ".svg" in failing(capsys, "diff", base, edited, "--plot", tmp_path / "x.pdf")[1]
    assert "--top" in failing(capsys, "diff", base, edited, "--top", "-1")[1]
    assert failing(capsys, "diff", base)[0] == 2
    (tmp_path / "file").write_text("")
    code, error = failing(capsys, "diff", base, edited, "--plot", tmp_path / "file" / "x.png")
    assert code == 2
    assert "cannot write" in error
