"""Plans made on a checkpoint's files: the same bits as in memory, whatever happens on the way."""

import errno
import json
import os
import shutil
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_cli import failing

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import tiny

from saber import artifacts
from saber.ablation import EditPlan, Factor, Removal, apply, orthogonal
from saber.checkpoint import blocks, plan_on_disk, save_merged, workers
from saber.checkpoint.apply import ApplySpec, apply_to_files
from saber.checkpoint.carry import carry_others
from saber.checkpoint.merged import files_of
from saber.checkpoint.origin import plan_hash
from saber.checkpoint.plan_on_disk import DiskPlan
from saber.checkpoint.provenance import FileMark, Record
from saber.checkpoint.reading import _shards, open_checkpoint
from saber.checkpoint.shards import INDEX, WEIGHTS, fingerprint, read_source
from saber.checkpoint.stage import Stage
from saber.checkpoint.verification import verify
from saber.errors import DataError, ModelError, NonFinite, OutputError, SaberError
from saber.linalg import unit
from saber.lm.disk import Layout, piece
from saber.lm.layers import find_layers
from saber.lm.model import LanguageModel
from saber.lm.writers import find_writers
from saber.products import exact_product

HERE = ApplySpec(workers=1)
CUT = {"num_hidden_layers": 2}
MODELS = {
    "llama": lambda: make_model("llama", layers=2),
    "gpt2": lambda: make_model("gpt2", layers=2),
    "gemma2": lambda: make_model("gemma2", layers=2),
    "mixtral": lambda: tiny.tiny_model("mixtral", **CUT),
    "gpt_oss": lambda: tiny.tiny_model(
        "gpt_oss", **CUT, layer_types=["sliding_attention", "full_attention"]
    ),
}


@dataclass(frozen=True)
class Made:
    """A checkpoint folder with a run folder whose plan was made from it."""

    model: Path
    run: Path
    merged: Path

    def apply(self, out, spec=HERE, **changes):
        return apply_to_files(self.run, str(self.model), out, replace(spec, **changes))


def loaded(folder, model):
    return LanguageModel(
        model=model,
        tokenizer=make_tokenizer(),
        name=str(folder),
        source="folder",
        base=None,
        stored_dtype=model.dtype,
        layers_path=find_layers(model),
    )


def saved(folder, model, shard="50GB"):
    model.save_pretrained(folder, max_shard_size=shard)
    return saved_as_it_is(folder, model)


def saved_as_it_is(folder, model):
    make_tokenizer().save_pretrained(folder)
    return loaded(folder, type(model).from_pretrained(folder, dtype="auto").eval())


def plan_of(lm, seed=0, only=lambda _w: True):
    generator = torch.Generator().manual_seed(seed)
    directions = unit(torch.randn(3, lm.d_model, generator=generator))
    removals = [Removal(v, s, 0) for v, s in zip(directions, (1.0, 0.7, 0.3), strict=True)]
    return orthogonal(lm, [w for w in find_writers(lm) if only(w)], removals, "all")


def save_plan(run, lm, plan):
    plan_on_disk.save(run / "plan", lm, plan)
    config = {"seed": 7, "edit": {"alpha": 0.9}}
    plan.save(run / "plan", {"fingerprint": "sha256:00", "config": config, "saber_version": "0"})


def make(root, model, dtype=torch.bfloat16, shard="50GB", only=lambda _w: True):
    model = model if model.dtype == dtype else model.to(dtype)
    lm = saved(root / "base", model, shard)
    plan = plan_of(lm, only=only)
    save_plan(root / "run", lm, plan)
    save_merged(lm, plan, root / "merged")
    return Made(root / "base", root / "run", root / "merged")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A pico Llama in six shards, of which not all are edited."""
    root = tmp_path_factory.mktemp("sharded")
    return make(root, MODELS["llama"](), shard="12KB", only=lambda w: "o_proj" in w.weight)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_plan_has_one_hash_in_memory_and_in_its_files(family, tmp_path):
    made = make(tmp_path, MODELS[family]())
    found = DiskPlan.read(made.run / "plan").hash()
    assert found == plan_hash(EditPlan.load(made.run / "plan"))
    name, factor = next(iter(EditPlan.load(made.run / "plan").factors.items()))
    assert found != plan_hash(EditPlan({name: factor}))


def tensors(folder):
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def assert_same(folder, other):
    a, b = tensors(folder), tensors(other)
    assert a.keys() == b.keys()
    assert [k for k in a if not same_bits(a[k], b[k])] == []


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_files_of_the_decoder_alone_lack_the_name_that_holds_it(family, tmp_path):
    """As GPT-2's own on the hub: `h.0.attn...`, where the model has `transformer.h.0.attn...`."""
    model = MODELS[family]()
    model.save_pretrained(tmp_path / "base")
    path, holder = tmp_path / "base" / "model.safetensors", f"{model.base_model_prefix}."
    bare = {name.removeprefix(holder): value for name, value in load_file(path).items()}
    save_file(bare, path, metadata={"format": "pt"})
    lm = saved_as_it_is(tmp_path / "base", model)
    save_plan(tmp_path / "run", lm, plan := plan_of(lm))
    made = apply_to_files(tmp_path / "run", str(tmp_path / "base"), tmp_path / "out", HERE)
    assert made.record.edited == ["model.safetensors"]
    written = tensors(tmp_path / "out")
    assert written.keys() == bare.keys()
    apply(lm.model, plan)
    edited = type(model).from_pretrained(tmp_path / "out").state_dict()
    for name, value in lm.model.state_dict().items():
        assert torch.equal(edited[name], value), name
    found = verify(tmp_path / "out", tmp_path / "run", str(tmp_path / "base"))
    assert found.passed, found.checks


def contents(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


# The same bits as in memory


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("family", MODELS)
def test_streamed_equals_in_memory_bit_for_bit(family, dtype, tmp_path):
    made = make(tmp_path, MODELS[family](), dtype)
    applied = made.apply(tmp_path / "out")
    assert_same(tmp_path / "out", made.merged)
    before, after = tensors(made.model), tensors(tmp_path / "out")
    changed = [k for k in before if not same_bits(before[k], after[k])]
    assert len(changed) == applied.tensors
    assert applied.tensors > 3


@pytest.mark.skipif(os.name != "posix", reason="folders cannot be synced there")
@pytest.mark.parametrize("linked", [True, False])
def test_what_is_written_reaches_the_disk_unless_that_is_left_to_the_system(
    sharded, tmp_path, monkeypatch, linked
):
    """The same files both ways; with `sync` each of them is brought to the disk, without it none."""
    brought = set()
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda h: (brought.add(os.fstat(h).st_ino), real(h)))
    sharded.apply(tmp_path / "fast", sync=False, copy=not linked)
    assert not brought
    sharded.apply(tmp_path / "sure", copy=not linked)
    new = {p.stat().st_ino for p in (tmp_path / "sure").iterdir()}
    new -= {p.stat().st_ino for p in sharded.model.iterdir()}
    assert len(new) > 3
    assert new <= brought
    assert contents(tmp_path / "fast") == contents(tmp_path / "sure")


def test_a_computed_dtype_that_holds_the_stored_one_gives_the_same_bits(tmp_path):
    """On a CPU a bfloat16 checkpoint is computed in float32, edited there and rounded once."""
    saved(tmp_path / "base", MODELS["llama"]().to(torch.bfloat16))
    cls = type(MODELS["llama"]())
    model = cls.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    lm = replace(loaded(tmp_path / "base", model), stored_dtype=torch.bfloat16)
    plan = plan_of(lm)
    save_plan(tmp_path / "run", lm, plan)
    save_merged(lm, plan, tmp_path / "merged")
    apply_to_files(tmp_path / "run", str(tmp_path / "base"), tmp_path / "out", HERE)
    assert_same(tmp_path / "out", tmp_path / "merged")


def test_experts_apart_on_disk_are_edited_where_they_lie(tmp_path):
    made = make(tmp_path, MODELS["mixtral"]())
    edits = DiskPlan.read(made.run / "plan").edits(read_source(made.model))
    experts = [k for k in edits if ".experts." in k]
    assert len(experts) == 2 * 4
    assert {edits[k].start[0] for k in experts} == {0, 1, 2, 3}


def test_tied_weights_are_edited_under_each_of_their_names(tmp_path):
    """Embedding and head are one tensor in memory; a file that holds both gets the edit in both."""
    model = make_model("llama", layers=1)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    lm = saved(tmp_path / "base", model)
    assert "lm_head.weight" not in tensors(tmp_path / "base")
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(lm.d_model, 2, generator=generator)
    right = torch.randn(2, lm.model.config.vocab_size, generator=generator)
    plan = EditPlan({"model.embed_tokens": Factor(left, right, None, 1)})
    save_plan(tmp_path / "run", lm, plan)
    save_merged(lm, plan, tmp_path / "merged")
    apply_to_files(tmp_path / "run", str(tmp_path / "base"), tmp_path / "out", HERE)
    assert_same(tmp_path / "out", tmp_path / "merged")

    both = load_file(tmp_path / "base" / WEIGHTS)
    both["lm_head.weight"] = both["model.embed_tokens.weight"].clone()
    shutil.copytree(tmp_path / "base", tmp_path / "twice")
    save_file(both, tmp_path / "twice" / WEIGHTS, metadata={"format": "pt"})
    forced = replace(HERE, force=True)
    apply_to_files(tmp_path / "run", str(tmp_path / "twice"), tmp_path / "out2", forced)
    after = tensors(tmp_path / "out2")
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert not torch.equal(after["lm_head.weight"], both["lm_head.weight"])


def test_a_product_has_the_same_bits_in_any_blocks():
    generator = torch.Generator().manual_seed(0)
    for k in (1, 3, 17, 64, 200):
        left = torch.randn(70, k, generator=generator)
        right = torch.randn(k, 90, generator=generator) * torch.logspace(-9, 9, 90)
        whole = exact_product(left, right)
        assert torch.equal(whole[7:9, 5:6], exact_product(left[7:9], right[:, 5:6]))
        assert torch.equal(whole.T, exact_product(right.T, left.T))
        wanted = (left.double() @ right.double()).float()
        size = left.abs().amax(1)[:, None] * right.abs().amax(0)
        assert ((whole - wanted).abs() / size).max() < k * 2.0**-22


def test_pieces_are_read_off_indices():
    index = torch.arange(2 * 3 * 4).reshape(2, 3, 4)
    assert piece("x", index[1], (2, 3, 4)).start == (1, 0, 0)
    turned = piece("x", index[1, :, 1:3].T, (2, 3, 4))
    assert (turned.start, turned.axes, turned.shape) == ((1, 0, 1), (2, 1), (2, 3))
    assert piece("x", index[:, :1], (2, 3, 4)).axes == (0, -1, 2)
    assert piece("x", index.reshape(6, 4), (2, 3, 4)) is None
    assert piece("x", index[0, [0, 2, 1]], (2, 3, 4)) is None
    assert piece("x", index[0, [0, 1, 1]], (2, 3, 4)) is None


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_pieces_put_together_are_the_parameter(family):
    model = MODELS[family]()
    layout = Layout(model)
    for name, parameter in model.named_parameters():
        if "experts.down_proj" in name or "o_proj" in name:
            ((*pieces,),) = layout.pieces(name)
            assert sum(torch.Size(p.shape).numel() for p in pieces) == parameter.numel()


# The folder


def test_shards_are_mirrored_and_untouched_ones_linked(sharded, tmp_path):
    (sharded.model / "sub").mkdir(exist_ok=True)
    (sharded.model / "sub" / "chat.jinja").write_text("{{ x }}")
    made = sharded.apply(tmp_path / "out")
    base, out = sharded.model, tmp_path / "out"
    names = sorted(p.name for p in base.glob("*.safetensors"))
    assert names == sorted(p.name for p in out.glob("*.safetensors"))
    assert 0 < len(made.record.edited) < len(names)
    for name in names:
        linked = os.path.samefile(base / name, out / name)
        assert linked == (name not in made.record.edited)
        with safe_open(base / name, "pt") as a, safe_open(out / name, "pt") as b:
            assert list(a.keys()) == list(b.keys())
    for name in (INDEX, "config.json", "tokenizer.json", "chat_template.jinja", "sub/chat.jinja"):
        if (base / name).exists():
            assert (base / name).read_bytes() == (out / name).read_bytes()
            assert not os.path.samefile(base / name, out / name)
    assert not list(tmp_path.glob(".*"))
    assert_same(out, sharded.merged)


@pytest.fixture
def with_links(sharded, tmp_path):
    """The same checkpoint with links: to a folder that has links of its own, and to where they lead on."""
    base = tmp_path / "base"
    shutil.copytree(sharded.model, base, ignore=shutil.ignore_patterns("sub"))
    other = tmp_path / "elsewhere"
    (other / "deep").mkdir(parents=True)
    (other / "config.json").write_text("{}")
    (other / "model.safetensors").write_bytes(b"unedited")
    (other / "deep" / "note.txt").write_text("note")
    (other / "itself").symlink_to(other)
    (other / "deep" / "back").symlink_to(base)
    (base / "1_Pooling").symlink_to(other)
    (base / "above").symlink_to(tmp_path)
    return replace(sharded, model=base)


def test_linked_folders_are_carried_as_real_ones_and_no_link_is_followed_in_a_circle(
    with_links, tmp_path, monkeypatch
):
    made = with_links.apply(tmp_path / "out")
    out = tmp_path / "out"
    assert not [p for p in out.rglob("*") if p.is_symlink()]
    assert [p.name for p in out.iterdir() if p.is_dir()] == ["1_Pooling"]
    found = sorted(p.relative_to(out).as_posix() for p in (out / "1_Pooling").rglob("*"))
    assert found == ["1_Pooling/config.json", "1_Pooling/deep", "1_Pooling/deep/note.txt"]
    assert made.record.skipped == ("1_Pooling/model.safetensors",)
    assert verify(out).passed
    monkeypatch.chdir(with_links.model)
    apply_to_files(with_links.run, ".", tmp_path / "again", HERE)
    assert contents(tmp_path / "again").keys() == contents(out).keys()


def test_runs_and_hidden_files_in_a_model_folder_are_no_part_of_the_model(sharded, tmp_path):
    base = shutil.copytree(sharded.model, tmp_path / "with_runs")
    for name in ("run.json", "study.json", "audit.json"):
        (base / "mine" / name[:-5]).mkdir(parents=True)
        (base / "mine" / name[:-5] / name).write_text("{}")
        (base / "mine" / name[:-5] / "answers.jsonl").write_text("{}")
    (base / "mine" / "vocabulary.txt").write_text("a")
    (base / ".env").write_text("KEY=1")
    (base / ".gitattributes").write_text("")
    replace(sharded, model=base).apply(tmp_path / "out")
    carry_others(base, tmp_path / "saved")
    for out in (tmp_path / "out", tmp_path / "saved"):
        found = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
        assert {f for f in found if "/" in f} == {"mine/vocabulary.txt", "sub/chat.jinja"}
        assert ".env" not in found
        assert ".gitattributes" in found


def test_a_place_in_a_linked_folder_is_in_the_model(with_links, tmp_path):
    out = tmp_path / "elsewhere" / "deep" / "out"
    refused(with_links, tmp_path, "inside the source", OutputError, out=out)
    with pytest.raises(ModelError, match="inside the model's own folder"):
        files_of(with_links.run, str(with_links.model), None, out, torch.bfloat16)


def in_subfolder(folder):
    """Move a checkpoint's shards to a subfolder, as its index then says."""
    index = json.loads((folder / INDEX).read_text())
    (folder / "sub").mkdir(exist_ok=True)
    for path in sorted(folder.glob("*.safetensors")):
        path.rename(folder / "sub" / path.name)
    index["weight_map"] = {name: f"sub/{file}" for name, file in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_shards_in_a_subfolder_stay_there(sharded, tmp_path, workers):
    base = Path(shutil.copytree(sharded.model, tmp_path / "base"))
    in_subfolder(base)
    (base / "pytorch_model.bin").write_bytes(b"unedited")
    seen = []
    made = apply_to_files(
        sharded.run,
        str(base),
        tmp_path / "out",
        replace(HERE, workers=workers),
        lambda done, total: seen.append((done, total)),
    )
    out = tmp_path / "out"
    assert not made.forced
    assert made.record.skipped == ("pytorch_model.bin",)
    assert not list(out.glob("*.safetensors"))
    assert_same(out / "sub", sharded.merged)
    assert (out / INDEX).read_bytes() == (base / INDEX).read_bytes()
    assert verify(out, sharded.run, str(base)).passed
    assert seen[-1][0] >= seen[-1][1] > 0
    found = type(MODELS["llama"]()).from_pretrained(out, dtype="auto").state_dict()
    wanted = tensors(sharded.merged)
    assert all(same_bits(found[name], wanted[name]) for name in wanted)
    changed = open_checkpoint(str(out))
    assert changed.tensors.keys() == wanted.keys()
    edited = out / made.record.edited[0]
    edited.write_bytes(edited.read_bytes()[:-1] + b"?")
    assert [c.what for c in verify(out).checks if not c.passed] == ["every file has its SHA-256"]


def stopped_before_publishing(run, base, out, monkeypatch):
    """Leave a call as one that was cut off when all was written."""

    def stopped(_self):
        raise OutputError("stopped")

    with monkeypatch.context() as patched:
        patched.setattr(Stage, "publish", stopped)
        with pytest.raises(OutputError, match="stopped"):
            apply_to_files(run, str(base), out, HERE)


def test_an_interrupted_call_goes_on_with_shards_in_a_subfolder(sharded, tmp_path, monkeypatch):
    base = Path(shutil.copytree(sharded.model, tmp_path / "base"))
    in_subfolder(base)
    stopped_before_publishing(sharded.run, base, tmp_path / "out", monkeypatch)
    made = apply_to_files(sharded.run, str(base), tmp_path / "out", HERE)
    assert made.resumed == len(read_source(base).shards) > 1


def test_blocks_are_made_by_one_thread_and_others_have_theirs_back(sharded, tmp_path, monkeypatch):
    seen, write = [], workers.write_shard
    monkeypatch.setattr(
        workers,
        "write_shard",
        lambda *a, **k: seen.append(torch.get_num_threads()) or write(*a, **k),
    )
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        sharded.apply(tmp_path / "out")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1}


@pytest.mark.slow
def test_workers_and_copies_change_no_byte(sharded, tmp_path):
    sharded.apply(tmp_path / "one")
    sharded.apply(tmp_path / "two", workers=2, copy=True)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    untouched = set(read_source(sharded.model).shards) - set(Record.load(tmp_path / "two").edited)
    for name in untouched:
        assert not os.path.samefile(sharded.model / name, tmp_path / "two" / name)


def test_other_copies_of_the_weights_stay_behind(sharded, tmp_path):
    shutil.copytree(sharded.model, tmp_path / "base")
    other = [
        *("consolidated.safetensors", "model-q8.gguf", "model.onnx", "model.onnx.data"),
        *("model.onnx_data", "model.onnx_data_1", "pytorch_model.bin"),
    ]
    for name in other:
        (tmp_path / "base" / name).write_bytes(b"unedited")
    made = apply_to_files(sharded.run, str(tmp_path / "base"), tmp_path / "out", HERE)
    assert sorted(made.record.skipped) == other
    assert not (tmp_path / "out" / "consolidated.safetensors").exists()


def test_of_one_file_and_an_index_of_others_what_transformers_reads_is_edited(tmp_path):
    made = make(tmp_path, MODELS["llama"](), shard="12KB")
    whole = tensors(made.model)
    other = {name: value * 2 for name, value in whole.items()}
    save_file(other, made.model / WEIGHTS, metadata={"format": "pt"})
    lm = loaded(
        made.model, type(MODELS["llama"]()).from_pretrained(made.model, dtype="auto").eval()
    )
    assert all(same_bits(lm.model.state_dict()[name], other[name]) for name in other)
    plan = plan_of(lm)
    save_plan(tmp_path / "again", lm, plan)
    done = apply_to_files(tmp_path / "again", str(made.model), tmp_path / "out", HERE)
    apply(lm.model, plan)
    found = tensors(tmp_path / "out")
    assert all(same_bits(found[name], lm.model.state_dict()[name]) for name in found)
    assert found.keys() == whole.keys()
    assert INDEX in done.record.skipped
    assert not (tmp_path / "out" / INDEX).exists()
    assert [f.name for f in _shards(made.model)] == [WEIGHTS]


def test_the_base_card_is_kept_behind_what_was_done(sharded, tmp_path):
    shutil.copytree(sharded.model, tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\n---\n# The base\n")
    apply_to_files(sharded.run, str(tmp_path / "base"), tmp_path / "out", HERE)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n")
    assert card.index("plan_hash") < card.index("# The base")


def with_results(made, tmp_path, **changes):
    """A copy of a run folder with the `run.json` that goes with its plan, and what that holds."""
    run = Path(shutil.copytree(made.run, tmp_path / "run"))
    meta = artifacts.read_json(run / "plan" / artifacts.META)
    model = {"name": str(made.model), "source": "folder", "storage_dtype": "bfloat16"}
    model["fingerprint"] = meta["fingerprint"]
    costs = {
        "refusal": {"rate": 0.9, "low": 0.8, "high": 0.95, "n": 10},
        "incoherent": {"rate": 0.036, "low": 0.01, "high": 0.09, "n": 112},
        "kl": {"sequence": 0.0123},
    }
    record = {"schema": 1, "model": model, "config": meta["config"], "judge": {"name": "phrases"}}
    record |= {"baseline": costs, "edited": costs, **changes}
    artifacts.write_json(run / "run.json", record)
    return run, record


def test_the_card_tells_the_costs_as_that_of_an_export_does(sharded, tmp_path):
    from saber.checkpoint.export import export
    from saber.checkpoint.runs import Run
    from saber.report.card import limits, results

    run, record = with_results(sharded, tmp_path)
    shown = export(Run.load(run), "merged", tmp_path / "export").card.read_text()
    for name, given in (("of a run", run), ("of its plan", run / "plan")):
        apply_to_files(given, str(sharded.model), tmp_path / name, HERE)
        card = (tmp_path / name / "README.md").read_text()
        for text in (card, shown):
            assert results(record, heading="", plots=False) in text
            assert limits(record) in text
            assert "with the plan in memory and not on these files. Judge: phrases." in text
        assert "| incoherent answers, target prompts | 3.6%" in card
        assert "0.0123" in card
        assert "Nothing was measured" not in card
        assert str(tmp_path) not in card.replace(str(sharded.model), "")


def test_the_card_of_other_files_says_that_the_results_are_not_theirs(sharded, tmp_path):
    run, _ = with_results(sharded, tmp_path)
    saved(tmp_path / "other", make_model("llama", layers=2, seed=5).to(torch.bfloat16))
    apply_to_files(run, str(tmp_path / "other"), tmp_path / "out", replace(HERE, force=True))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| incoherent answers, target prompts | 3.6%" in card
    assert "These files are of another model than the run measured (--force)." in card


@pytest.mark.parametrize(
    "changes",
    [
        None,
        {"baseline": None},
        {"config": {"seed": 8}},
        {"model": {"name": "x", "fingerprint": "sha256:11"}},
    ],
    ids=["no run.json", "no results", "other settings", "another model"],
)
def test_the_card_says_that_nothing_was_measured(sharded, tmp_path, changes):
    run, _ = with_results(sharded, tmp_path, **(changes or {}))
    if changes is None:
        (run / "run.json").unlink()
    apply_to_files(run, str(sharded.model), tmp_path / "out", HERE)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Nothing was measured" in card
    assert "plan_hash" in card
    assert "incoherent" not in card


def test_a_damaged_run_json_is_not_taken_for_none(sharded, tmp_path):
    run, _ = with_results(sharded, tmp_path)
    (run / "run.json").write_text("{")
    with pytest.raises(DataError, match=r"run\.json is not valid JSON.*copy it anew"):
        apply_to_files(run, str(sharded.model), tmp_path / "out", HERE)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_the_edited_folder_loads(sharded, tmp_path):
    import transformers

    sharded.apply(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    state = model.state_dict()
    for name, value in tensors(sharded.merged).items():
        assert torch.equal(state[name], value)


# Interrupted


class Killed(Exception):
    pass


def killed_at(made, out, moment):
    """Apply in a child process that kills itself before its n-th call to the system; whether it did."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        return os.WIFSIGNALED(status)
    left = moment

    def counted(call):
        def wrapper(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapper

    for name in ("write", "fsync", "replace", "link", "rmdir", "open"):
        setattr(os, name, counted(getattr(os, name)))
    try:
        made.apply(out)
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment_it_resumes_to_the_same_bytes(sharded, tmp_path):
    sharded.apply(tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    moment, kills = 0, 0
    while True:
        out = tmp_path / f"out{moment}"
        if not killed_at(sharded, out, moment):
            break
        kills += 1
        # What is there is nothing or everything.
        assert not out.exists() or contents(out) == whole
        sharded.apply(out)
        assert contents(out) == whole
        assert not list(tmp_path.glob(".*"))
        moment += 9
    assert kills > 5


def test_finished_shards_are_not_written_again(sharded, tmp_path, monkeypatch):
    from saber.checkpoint import workers

    count, usual = [], workers.do

    def failing(job, check=None):
        if len(count) == 3:
            raise OutputError("cannot write.", "")
        count.append(job.file)
        return usual(job)

    monkeypatch.setattr(workers, "do", failing)
    with pytest.raises(OutputError):
        sharded.apply(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(workers, "do", usual)
    stage = tmp_path / ".out.part" / "files"
    first = {name: (stage / name).stat().st_mtime_ns for name in count}
    assert sharded.apply(tmp_path / "out").resumed == 3
    assert first == {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in count}
    assert_same(tmp_path / "out", sharded.merged)


def test_a_finished_shard_that_was_damaged_since_is_written_again(sharded, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", None)
        patch.setattr("saber.checkpoint.apply._finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sharded.apply(tmp_path / "out")
    edited = next(iter(sorted((tmp_path / ".out.part" / "files").glob("model-*"))))
    name = edited.name
    data = bytearray(edited.read_bytes())
    data[-1] ^= 1
    edited.unlink()
    edited.write_bytes(data)
    made = sharded.apply(tmp_path / "out")
    assert made.resumed == len(read_source(sharded.model).shards) - 1, name
    assert_same(tmp_path / "out", sharded.merged)


def test_what_another_plan_left_is_not_taken_over(sharded, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("saber.checkpoint.apply._finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sharded.apply(tmp_path / "out")
    shutil.copytree(sharded.run, tmp_path / "run")
    path = tmp_path / "run" / "plan" / artifacts.TENSORS
    save_file({k: 2 * v for k, v in load_file(path).items()}, path)
    made = apply_to_files(tmp_path / "run", str(sharded.model), tmp_path / "out", HERE)
    assert made.resumed == 0


@pytest.mark.skipif(not hasattr(os, "getsid"), reason="needs sessions")
def test_what_is_gone_from_the_source_since_is_not_taken_over(sharded, tmp_path, monkeypatch):
    base = Path(shutil.copytree(sharded.model, tmp_path / "base"))
    (base / "sub" / "old.txt").parent.mkdir(exist_ok=True)
    (base / "sub" / "old.txt").write_text("old")
    stopped_before_publishing(sharded.run, base, tmp_path / "out", monkeypatch)
    (base / "sub" / "old.txt").unlink()
    made = apply_to_files(sharded.run, str(base), tmp_path / "out", HERE)
    assert made.resumed
    assert not (tmp_path / "out" / "sub" / "old.txt").exists()
    assert verify(tmp_path / "out").passed


def test_ctrl_c_in_a_terminal_is_for_the_main_process_alone():
    """Workers would each say that they were interrupted; they are ended instead."""
    hand = workers._There()
    try:
        assert os.getsid(hand.process.pid) == hand.process.pid
    finally:
        hand.close()


def test_two_at_once_on_one_folder_are_refused(sharded, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / ".out.part").mkdir()
    with (tmp_path / ".out.part" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another process"):
            sharded.apply(tmp_path / "out")


# Bad input


def refused(made, tmp_path, match, kind=ModelError, model=None, out=None, **changes):
    out = out or tmp_path / "out"
    model = str(model or made.model)
    with pytest.raises(kind, match=match) as error:
        apply_to_files(made.run, model, out, replace(HERE, **changes))
    assert "\n" not in str(error.value)
    assert error.value.remedy
    return error.value


@pytest.fixture
def damaged(sharded, tmp_path):
    """A copy of the checkpoint to do harm to."""
    shutil.copytree(sharded.model, tmp_path / "base")
    return tmp_path / "base"


def first_shard(folder):
    return sorted(folder.glob("*.safetensors"))[0]


@pytest.mark.parametrize("out", [".", "/"])
def test_a_place_without_a_name(sharded, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    refused(sharded, tmp_path, "has no name of its own", OutputError, out=Path(out))
    assert not list(tmp_path.iterdir())


def test_a_truncated_shard(sharded, damaged, tmp_path):
    data = first_shard(damaged).read_bytes()
    for length in (0, 5, 100, len(data) - 1):
        first_shard(damaged).write_bytes(data[:length])
        refused(sharded, tmp_path, "truncated, damaged", model=damaged)
        assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_a_corrupt_header(sharded, damaged, tmp_path):
    data = bytearray(first_shard(damaged).read_bytes())
    data[12] = 0xFF
    first_shard(damaged).write_bytes(data)
    refused(sharded, tmp_path, "truncated, damaged", model=damaged)


def test_a_shard_that_shrinks_while_it_is_read(sharded, damaged, tmp_path, monkeypatch):
    from saber.checkpoint import apply as module

    def cut(*_):
        for path in damaged.glob("*.safetensors"):
            os.truncate(path, path.stat().st_size - 500)

    monkeypatch.setattr(module, "_check_space", cut)
    with pytest.raises(SaberError, match=r"truncated, damaged|ended early|SHA"):
        apply_to_files(sharded.run, str(damaged), tmp_path / "out", replace(HERE, copy=True))
    assert not (tmp_path / "out").exists()


def test_an_index_that_names_a_missing_shard(sharded, damaged, tmp_path):
    name = first_shard(damaged).name
    first_shard(damaged).unlink()
    refused(sharded, tmp_path, f"names {name}, which is not in", model=damaged)


def test_an_index_that_leads_out_of_the_folder(sharded, damaged, tmp_path):
    index = json.loads((damaged / INDEX).read_text())
    shutil.copy(first_shard(damaged), tmp_path / "outside.safetensors")
    for way in ("../outside.safetensors", str(tmp_path / "outside.safetensors")):
        index["weight_map"] = dict.fromkeys(index["weight_map"], way)
        (damaged / INDEX).write_text(json.dumps(index))
        error = refused(sharded, tmp_path, "which is not in", model=damaged)
        assert "Move it into the folder" in error.remedy
    (damaged / "sub").mkdir(exist_ok=True)
    for way in ("./", "sub/../", ".//"):
        index["weight_map"] = dict.fromkeys(index["weight_map"], way + first_shard(damaged).name)
        (damaged / INDEX).write_text(json.dumps(index))
        refused(sharded, tmp_path, "which is not in", model=damaged)


def test_an_index_that_misplaces_a_tensor(sharded, damaged, tmp_path):
    index = json.loads((damaged / INDEX).read_text())
    names = list(index["weight_map"])
    index["weight_map"][names[0]] = index["weight_map"][names[-1]]
    (damaged / INDEX).write_text(json.dumps(index))
    refused(sharded, tmp_path, "but it is not", model=damaged)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("model.norm.weight", "It is in {there}: say so in the weight_map"),
        ("lm_head.bias", "None of its files holds it: take it out of the weight_map"),
    ],
)
def test_a_tensor_that_is_not_where_the_index_says(sharded, damaged, tmp_path, name, remedy):
    index = json.loads((damaged / INDEX).read_text())
    there = index["weight_map"].get(name)
    index["weight_map"][name] = index["weight_map"]["model.embed_tokens.weight"]
    (damaged / INDEX).write_text(json.dumps(index))
    error = refused(sharded, tmp_path, f"says that {name} is in .*, but it is not", model=damaged)
    assert error.remedy.startswith(remedy.format(there=there))


def test_a_tensor_of_another_shape(sharded, damaged, tmp_path):
    for path in damaged.glob("*.safetensors"):
        held = load_file(path)
        for name in held:
            if "o_proj" in name:
                held[name] = held[name][:, :-1].contiguous()
                save_file(held, path, metadata={"format": "pt"})
    refused(sharded, tmp_path, r"has shape \[32, 31\].*\[32, 32\] in the plan", model=damaged)


def test_a_tensor_that_is_not_there(sharded, tmp_path):
    other = make_model("gpt2", layers=1)
    saved(tmp_path / "gpt2", other)
    refused(sharded, tmp_path, "has no tensor .*o_proj", model=tmp_path / "gpt2")


def test_nan_in_what_is_edited(sharded, damaged, tmp_path):
    for path in damaged.glob("*.safetensors"):
        held = load_file(path)
        for name in held:
            if "o_proj" in name:
                held[name][3, 3] = float("nan")
                save_file(held, path, metadata={"format": "pt"})
    refused(sharded, tmp_path, "NaN", NonFinite, model=damaged, force=True)


def test_another_model_is_refused_unless_forced(sharded, tmp_path):
    other = make_model("llama", layers=2, seed=5).to(torch.bfloat16)
    saved(tmp_path / "other", other)
    refused(sharded, tmp_path, "plan was made from", model=tmp_path / "other")
    forced = replace(HERE, force=True)
    made = apply_to_files(sharded.run, str(tmp_path / "other"), tmp_path / "out", forced)
    assert made.forced


def test_a_plan_of_an_older_version(sharded, tmp_path):
    shutil.copytree(sharded.run, tmp_path / "run")
    (tmp_path / "run" / "plan" / plan_on_disk.FILE).unlink()
    with pytest.raises(DataError, match=r"older version.*Make the run again"):
        apply_to_files(tmp_path / "run", str(sharded.model), tmp_path / "out", HERE)
    assert EditPlan.load(tmp_path / "run" / "plan").factors


def harmed(file, change):
    """Change the text of a file, or its object where it holds one."""
    value = json.loads(file.read_text())
    file.write_text(change(value) or json.dumps(value))


DAMAGE = {
    "an empty meta.json": (artifacts.META, lambda _: "\n"),
    "a meta.json that is cut off": (artifacts.META, lambda meta: json.dumps(meta)[:60]),
    "a meta.json of nothing": (artifacts.META, lambda meta: meta.clear()),
    "no axes": (artifacts.META, lambda meta: meta.pop("axes") and None),
    "axes in words": (artifacts.META, lambda meta: meta.update(axes="x")),
    "a configuration in words": (artifacts.META, lambda meta: meta.update(config="x")),
    "no factors": (plan_on_disk.FILE, lambda disk: disk.pop("factors") and None),
    "factors in a list": (plan_on_disk.FILE, lambda disk: disk.update(factors=["x"])),
    "pieces in words": (
        plan_on_disk.FILE,
        lambda disk: [parts.update(weight=[["x"]]) for parts in disk["factors"].values()] and None,
    ),
}
"""What can be wrong with a saved plan: in which file, and what changes it so."""


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_plan_is_one_clear_line(sharded, tmp_path, what):
    run, (name, change) = shutil.copytree(sharded.run, tmp_path / "run"), DAMAGE[what]
    harmed(run / "plan" / name, change)
    sharded.apply(tmp_path / "whole")
    for ask in (
        lambda: apply_to_files(run, str(sharded.model), tmp_path / "out", HERE),
        lambda: verify(tmp_path / "whole", run),
    ):
        with pytest.raises(DataError) as caught:
            ask()
        assert str(run / "plan" / name) in caught.value.problem
        assert "damaged or incomplete: copy it anew" in caught.value.remedy
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "whole"]


def test_damaged_factors_are_one_clear_line(sharded, tmp_path):
    run = Path(shutil.copytree(sharded.run, tmp_path / "run"))
    file = run / "plan" / artifacts.TENSORS
    whole, held = file.read_bytes(), {k: v.clone() for k, v in load_file(file).items()}
    name = next(key for key in held if key.endswith(".right"))
    for harm in (
        lambda: file.write_bytes(whole[: len(whole) // 2]),
        lambda: file.write_bytes(b""),
        lambda: save_file({k: v for k, v in held.items() if k != name}, file),
        lambda: save_file({**held, name: held[name][:1].contiguous()}, file),
    ):
        harm()
        with pytest.raises(DataError, match=r"tensors\.safetensors.*copy it anew"):
            apply_to_files(run, str(sharded.model), tmp_path / "out", HERE)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_factor_that_the_files_weave_together(sharded, tmp_path):
    shutil.copytree(sharded.run, tmp_path / "run")
    path = tmp_path / "run" / "plan" / plan_on_disk.FILE
    value = json.loads(path.read_text())
    name = next(iter(value["factors"]))
    value["factors"][name]["weight"] = [[]]
    path.write_text(json.dumps(value))
    with pytest.raises(ModelError, match=rf"{name}.*weave.*merged"):
        apply_to_files(tmp_path / "run", str(sharded.model), tmp_path / "out", HERE)


def test_places_to_write(sharded, tmp_path):
    refused(sharded, tmp_path, "is the source", OutputError, out=sharded.model)
    refused(sharded, tmp_path, "inside the source", OutputError, out=sharded.model / "x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    refused(sharded, tmp_path, "not empty", OutputError, out=tmp_path / "full")
    refused(sharded, tmp_path, "is a file", OutputError, out=tmp_path / "full" / "x")
    assert [p.name for p in tmp_path.iterdir()] == ["full"]
    (tmp_path / "empty").mkdir()
    sharded.apply(tmp_path / "empty")


def test_a_disk_that_is_known_to_be_too_small(sharded, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    refused(sharded, tmp_path, r"disk of .* is full: .* are free", OutputError)


def test_a_disk_that_gets_full_keeps_what_is_finished(sharded, tmp_path, monkeypatch):
    usual, left = os.write, [6]

    def full(handle, data):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return usual(handle, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        refused(sharded, tmp_path, "No space left on device", OutputError, copy=True)
    assert not (tmp_path / "out").exists()
    assert sharded.apply(tmp_path / "out", copy=True).resumed > 0
    assert_same(tmp_path / "out", sharded.merged)


@pytest.mark.parametrize("model", ["demo", "x.gguf", "nowhere", "some/where"])
def test_what_is_no_folder_of_safetensors(sharded, tmp_path, model):
    with pytest.raises(ModelError, match=r"no folder of safetensors|no such model folder"):
        apply_to_files(sharded.run, model, tmp_path / "out", HERE)


def test_a_folder_that_is_called_as_a_gguf_file_is_a_folder(sharded, tmp_path):
    folder = Path(shutil.copytree(sharded.model, tmp_path / "base.gguf"))
    made = apply_to_files(sharded.run, str(folder), tmp_path / "out.gguf", HERE)
    assert not made.forced
    assert_same(made.folder, sharded.merged)
    assert verify(made.folder, sharded.run, str(folder)).passed


# Pickled weights


@pytest.fixture
def pickled(sharded, tmp_path):
    """The same checkpoint as two pickles with an index."""
    folder = tmp_path / "pickled"
    shutil.copytree(sharded.model, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    held = sorted(tensors(sharded.model).items())
    placed = {}
    for number, part in ((1, held[::2]), (2, held[1::2])):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save(dict(part), folder / file)
        placed |= {name: file for name, _ in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": placed}))
    return folder


def test_pickles_are_refused_with_what_converts_them(sharded, pickled, tmp_path):
    error = refused(sharded, tmp_path, "pickled weights", model=pickled)
    assert "--allow-pickle" in error.remedy


def test_pickles_are_converted_when_allowed(sharded, pickled, tmp_path):
    made = apply_to_files(
        sharded.run, str(pickled), tmp_path / "out", replace(HERE, allow_pickle=True)
    )
    assert not made.forced
    assert_same(tmp_path / "out", sharded.merged)
    assert len(made.record.skipped) == 3
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors*")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        INDEX,
    ]


class Harm:
    def __reduce__(self):
        return (os.system, ("touch harmed",))


@pytest.mark.parametrize("listed", [["a.bin"], {}, None])
def test_an_index_of_pickles_that_is_none(sharded, pickled, tmp_path, listed):
    (pickled / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": listed}))
    allowed = replace(HERE, allow_pickle=True)
    with pytest.raises(ModelError, match="has no weight_map"):
        apply_to_files(sharded.run, str(pickled), tmp_path / "out", allowed)


def test_a_pickle_with_code_in_it_runs_nothing(sharded, pickled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Harm()}, pickled / "pytorch_model-00001-of-00002.bin")
    refused(sharded, tmp_path, "more than weights", model=pickled, allow_pickle=True)
    assert not (tmp_path / "harmed").exists()
    (pickled / "pytorch_model-00002-of-00002.bin").unlink()
    (pickled / "pytorch_model-00001-of-00002.bin").write_bytes(b"PK nothing")
    refused(sharded, tmp_path, "damaged", model=pickled, allow_pickle=True)


# Provenance


def failures(*arguments):
    return [check.what for check in verify(*arguments).checks if not check.passed]


def test_edited_shards_carry_where_they_come_from(sharded, tmp_path):
    made = sharded.apply(tmp_path / "out")
    for name in made.record.edited:
        with safe_open(tmp_path / "out" / name, "pt") as file:
            carried = file.metadata()
        assert carried["base_checkpoint"] == fingerprint(read_source(sharded.model))
        assert carried["plan_hash"] == DiskPlan.read(sharded.run / "plan").hash()
        assert (carried["seed"], carried["format"]) == ("7", "pt")
        assert json.loads(carried["config"]) == {"seed": 7, "edit": {"alpha": 0.9}}
    card = (tmp_path / "out" / "README.md").read_text()
    assert carried["plan_hash"] in card


def test_verify_holds_for_what_was_written(sharded, tmp_path):
    sharded.apply(tmp_path / "out")
    found = verify(tmp_path / "out", sharded.run, str(sharded.model))
    assert found.passed
    assert len(found.checks) == 9


def test_verify_finds_a_changed_byte(sharded, tmp_path):
    made = sharded.apply(tmp_path / "out")
    path = tmp_path / "out" / made.record.edited[0]
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert failures(tmp_path / "out") == ["every file has its SHA-256"]


def test_verify_finds_an_edit_that_is_not_the_plans(sharded, tmp_path):
    """A weight was changed and the record made to fit."""
    made = sharded.apply(tmp_path / "out")
    name = made.record.edited[0]
    path = tmp_path / "out" / name
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    mark = FileMark(blocks.sha256(path), path.stat().st_size)
    replace(made.record, files={**made.record.files, name: mark}).save(tmp_path / "out")
    assert failures(tmp_path / "out") == []
    found = failures(tmp_path / "out", sharded.run, str(sharded.model))
    assert found == ["base and plan give these very bits"]


def test_verify_finds_a_shard_that_was_left_unedited(sharded, tmp_path):
    """The base's own shard stands there, and the record says that it is none of those edited."""
    made = sharded.apply(tmp_path / "out")
    name = made.record.edited[0]
    shutil.copyfile(sharded.model / name, tmp_path / "out" / name)
    mark = FileMark(blocks.sha256(sharded.model / name), (sharded.model / name).stat().st_size)
    record = replace(made.record, files={**made.record.files, name: mark})
    replace(record, edited=made.record.edited[1:]).save(tmp_path / "out")
    assert failures(tmp_path / "out", sharded.run) == []
    found = failures(tmp_path / "out", sharded.run, str(sharded.model))
    assert found == ["base and plan give these very bits"]


def test_verify_finds_files_that_come_and_go(sharded, tmp_path):
    sharded.apply(tmp_path / "out")
    (tmp_path / "out" / "config.json").rename(tmp_path / "out" / "other.json")
    assert failures(tmp_path / "out") == ["no file is missing", "no file was added"]


def test_verify_finds_another_run_and_another_base(sharded, tmp_path):
    sharded.apply(tmp_path / "out")
    lm = saved(tmp_path / "other", make_model("llama", layers=2, seed=3).to(torch.bfloat16))
    save_plan(tmp_path / "run", lm, plan_of(lm))
    assert failures(tmp_path / "out", tmp_path / "run") == ["the plan is the run's"]
    assert failures(tmp_path / "out", None, str(tmp_path / "other")) == [
        "it was made from this base"
    ]


def test_verify_asks_the_run_for_the_base_of_what_does_not_carry_its_files(
    sharded, tmp_path, capsys
):
    """An adapter or a GGUF file: it was called another base's than its own."""
    made = sharded.apply(tmp_path / "out")
    with safe_open(tmp_path / "out" / made.record.edited[0], "pt") as file:
        carried = file.metadata()
    del carried["base_checkpoint"]
    adapter = tmp_path / "adapter.safetensors"
    save_file({"a": torch.zeros(1)}, adapter, carried)
    assert failures(adapter, sharded.run, str(sharded.model)) == []
    other = tmp_path / "other"
    saved(other, make_model("llama", layers=2, seed=3).to(torch.bfloat16))
    assert failures(adapter, sharded.run, str(other)) == ["it was made from this base"]
    code, said = failing(capsys, "verify", adapter, "--base", sharded.model)
    assert code == 2
    assert "does not carry the fingerprint of its base's files. Give --run" in said
    run = shutil.copytree(sharded.run, tmp_path / "run")
    disk = run / "plan" / "disk.json"
    artifacts.write_json(disk, {**artifacts.read_json(disk), "checkpoint": None})
    with pytest.raises(DataError, match=r"its run does not know it\. Leave --base out"):
        verify(adapter, run, str(sharded.model))


@pytest.mark.parametrize(
    "content", [b"", b"junk" * 100, b"GGUF" + bytes([3, *[0] * 3, *[5, *[0] * 7] * 2, 9])]
)
def test_verify_of_a_damaged_gguf_file(tmp_path, content):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=r"x\.gguf is truncated, damaged or no GGUF file"):
        verify(tmp_path / "x.gguf")
    with pytest.raises(DataError, match="no provenance"):
        verify(tmp_path)


def test_verify_of_what_carries_nothing(sharded):
    with pytest.raises(DataError, match="no provenance"):
        verify(sharded.model)


# 8-bit floats with blockwise scales


def quantised(weight, size=16):
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % size, 0, -rows % size))
    blocks = padded.reshape(padded.shape[0] // size, size, -1, size)
    scale = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    return codes.reshape(padded.shape)[:rows, :columns].contiguous(), scale


def dequantised(codes, scale, size=16):
    spread = scale.repeat_interleave(size, 0).repeat_interleave(size, 1)
    return codes.float() * spread[: codes.shape[0], : codes.shape[1]]


@pytest.fixture
def eight_bit(tmp_path):
    """A pico Llama whose linear maps are stored in 8 bits, and the same one in float32."""
    lm = saved(tmp_path / "plain", make_model("llama", layers=2).float())
    held = tensors(tmp_path / "plain")
    packed = {}
    for name, value in held.items():
        packed[name] = value
        if name.endswith("_proj.weight"):
            packed[name], packed[f"{name}_scale_inv"] = quantised(value)
            held[name] = dequantised(packed[name], packed[f"{name}_scale_inv"])
    save_file(held, tmp_path / "plain" / WEIGHTS, metadata={"format": "pt"})
    shutil.copytree(tmp_path / "plain", tmp_path / "packed")
    save_file(packed, tmp_path / "packed" / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    plain = loaded(tmp_path / "plain", type(lm.model).from_pretrained(tmp_path / "plain").eval())
    plan = plan_of(plain, only=lambda w: w.layer == 0)
    save_plan(tmp_path / "run", plain, plan)
    apply(plain.model, plan)
    return tmp_path, plain.model.state_dict()


def test_eight_bit_weights_are_edited_and_the_loss_told(eight_bit):
    root, wanted = eight_bit
    forced = replace(HERE, force=True)
    made = apply_to_files(root / "run", str(root / "packed"), root / "out", forced)
    before, after = tensors(root / "packed"), tensors(root / "out")
    edited = sorted(made.record.rounding)
    assert len(edited) == 2
    for name in edited:
        found = dequantised(after[name], after[f"{name}_scale_inv"])
        step = dequantised(torch.ones_like(found), after[f"{name}_scale_inv"])
        error = (found - wanted[name]).abs()
        assert (error <= wanted[name].abs() * 2**-4 + step * 2**-10 + 1e-7).all()
        plain = dequantised(before[name], before[f"{name}_scale_inv"])
        lost = (found - wanted[name]).norm() / (wanted[name] - plain).norm()
        assert made.record.rounding[name] == pytest.approx(float(lost), rel=1e-3)
    untouched = [k for k in before if k.removesuffix("_scale_inv") not in edited]
    assert all(same_bits(before[k], after[k]) for k in untouched)
    assert "8 bits" in (root / "out" / "README.md").read_text()


def test_a_block_that_outgrows_its_scale_gets_a_new_one(eight_bit):
    """Powers of two stay powers of two, as some formats need."""
    root, _ = eight_bit
    name = "model.layers.1.self_attn.o_proj.weight"
    held = tensors(root / "packed")
    held[f"{name}_scale_inv"] = 2.0 ** held[f"{name}_scale_inv"].log2().ceil()
    save_file(held, root / "packed" / WEIGHTS, metadata={"format": "pt"})
    lm = loaded(root / "plain", make_model("llama", layers=2).float())
    left, right = torch.zeros(32, 1), torch.zeros(1, 32)
    left[:16], right[:, :16] = 1.0, 50.0
    plan = EditPlan({name.removesuffix(".weight"): Factor(left, right, None, 0)})
    save_plan(root / "large", lm, plan)
    made = apply_to_files(
        root / "large", str(root / "packed"), root / "out", replace(HERE, force=True)
    )
    after = tensors(root / "out")
    scale, old = after[f"{name}_scale_inv"], held[f"{name}_scale_inv"]
    assert scale[0, 0] > old[0, 0]
    assert (scale.log2() % 1 == 0).all()
    assert torch.equal(scale.flatten()[1:], old.flatten()[1:])
    wanted = dequantised(held[name], old) + left @ right
    found = dequantised(after[name], scale)
    assert ((found - wanted).abs() <= wanted.abs() * 2**-4 + 1e-3).all()
    assert same_bits(after[name][16:], held[name][16:])
    assert made.record.rounding[name] < 0.05


def test_an_eight_bit_weight_that_a_plan_leaves_as_it_is(eight_bit):
    """Of an expert that no prompt reached nothing is taken off: no edit, of which nothing is lost."""
    root, _ = eight_bit
    name = "model.layers.1.self_attn.o_proj"
    lm = loaded(root / "plain", make_model("llama", layers=2).float())
    plan = EditPlan({name: Factor(torch.zeros(32, 1), torch.zeros(1, 32), None, 0)})
    save_plan(root / "none", lm, plan)
    forced = replace(HERE, force=True)
    made = apply_to_files(root / "none", str(root / "packed"), root / "out", forced)
    assert made.record.rounding == {}
    assert_same(root / "packed", root / "out")


def test_an_eight_bit_block_of_zeros_has_no_scale_and_stays(eight_bit):
    root, _ = eight_bit
    name = "model.layers.1.self_attn.o_proj"
    held = tensors(root / "packed")
    scale = 2.0 ** held[f"{name}.weight_scale_inv"].log2().ceil()
    scale[:, 0] = 0.0
    held[f"{name}.weight_scale_inv"] = scale
    held[f"{name}.weight"] = held[f"{name}.weight"].float()
    held[f"{name}.weight"][:, :16] = 0.0
    held[f"{name}.weight"] = held[f"{name}.weight"].to(torch.float8_e4m3fn)
    save_file(held, root / "packed" / WEIGHTS, metadata={"format": "pt"})
    lm = loaded(root / "plain", make_model("llama", layers=2).float())
    right = torch.full((1, 32), 50.0)
    right[:, :16] = 0.0
    plan = EditPlan({name: Factor(torch.ones(32, 1), right, None, 0)})
    save_plan(root / "half", lm, plan)
    forced = replace(HERE, force=True)
    made = apply_to_files(root / "half", str(root / "packed"), root / "out", forced)
    after = tensors(root / "out")
    new = after[f"{name}.weight_scale_inv"]
    assert same_bits(after[f"{name}.weight"][:, :16], held[f"{name}.weight"][:, :16])
    assert (new[:, 0] == 0).all()
    assert (new[:, 1] > scale[:, 1]).all()
    assert (new[:, 1].log2() % 1 == 0).all()
    assert made.record.rounding[f"{name}.weight"] < 0.05


def test_eight_bit_weights_without_blockwise_scales_are_refused(eight_bit):
    root, _ = eight_bit
    held = tensors(root / "packed")
    held = {k: v for k, v in held.items() if "o_proj.weight_scale_inv" not in k}
    save_file(held, root / "packed" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"o_proj.*fp8.*FineGrainedFP8Config"):
        apply_to_files(root / "run", str(root / "packed"), root / "out", replace(HERE, force=True))


@pytest.mark.parametrize(
    ("method", "remedy"),
    [("mxfp4", "Mxfp4Config"), ("gptq", "quantised from"), ("awq", "quantised from")],
)
def test_other_low_precision_is_refused_by_name(sharded, tmp_path, method, remedy):
    held = tensors(sharded.model)
    packed = {}
    for name, value in held.items():
        name = name.replace("o_proj.weight", "o_proj.qweight")
        packed[name] = value.to(torch.int8) if "qweight" in name else value
    shutil.copytree(
        sharded.model, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors*")
    )
    save_file(packed, tmp_path / "base" / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    error = refused(sharded, tmp_path, f"quantised.*{method}", model=tmp_path / "base")
    assert remedy in error.remedy


# The command


def test_the_commands(sharded, tmp_path, capsys):
    from saber.cli.main import main

    out = tmp_path / "out"
    command = ["apply", str(sharded.run), str(sharded.model), "--out", str(out), "--json"]
    assert main([*command, "--workers", "1"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["tensors"] == 2
    assert row["origin"]["seed"] == "7"
    assert main(command) == 2
    assert "not empty" in json.loads(capsys.readouterr().out)["error"]
    assert main(["verify", str(out), "--run", str(sharded.run), "--base", str(sharded.model)]) == 0
    assert "FAILS" not in capsys.readouterr().out
    (out / "config.json").write_text("{}")
    assert main(["verify", str(out)]) == 1
    assert "config.json" in capsys.readouterr().out
    assert main([*command, "--workers", "-1"]) == 2


# Every way in which files and memory differ


@pytest.mark.long
@pytest.mark.parametrize(
    "family",
    [
        *("aria", "bloom", "cohere2", "dbrx", "deepseek_v3", "ernie4_5_moe", "falcon_h1", "gemma3"),
        *("gemma4", "glm4_moe", "gpt_neox", "granitemoehybrid", "jamba", "jetmoe", "lfm2_moe"),
        *("llama4_text", "olmoe", "phi3", "phimoe", "qwen2_moe", "qwen3_next"),
        *("qwen3_vl_moe", "zamba2"),
    ],
)
def test_families_that_are_stored_otherwise(family, tmp_path):
    made = make(tmp_path, tiny.tiny_model(family), torch.float32)
    made.apply(tmp_path / "out")
    assert_same(tmp_path / "out", made.merged)


def test_a_damaged_record_is_one_clear_line(sharded, tmp_path):
    sharded.apply(tmp_path / "out")
    path = tmp_path / "out" / "saber_provenance.json"
    value = json.loads(path.read_text())
    del value["files"]
    path.write_text(json.dumps(value))
    with pytest.raises(DataError, match="damaged"):
        verify(tmp_path / "out")
