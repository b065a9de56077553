"""The merged export: off the checkpoint's files wherever that can be, so that nothing of them is lost."""

import errno
import json
import os
import re
import shutil
import threading
import time
from dataclasses import replace

import pytest
import torch
from conftest import make_model, make_tokenizer
from safetensors.torch import load_file, save_file
from test_apply import MODELS, assert_same, plan_of, same_bits, tensors
from test_export import MEASURED

from saber import artifacts
from saber.checkpoint import export as export_module
from saber.checkpoint import plan_on_disk, save_merged, workers
from saber.checkpoint.export import export, export_all
from saber.checkpoint.parcel import parcel
from saber.checkpoint.provenance import FILE
from saber.checkpoint.runs import Run
from saber.checkpoint.shards import WEIGHTS
from saber.checkpoint.verification import verify
from saber.config import RunConfig
from saber.errors import OutputError
from saber.lm.disk import disk_names
from saber.lm.load import LoadSpec, load
from saber.lm.model import fingerprint, is_of
from saber.notices import WARNING
from saber.subject import Subject

FLOAT32 = LoadSpec(device="cpu", dtype="float32")
KEPT = "model.norm.weight"
IGNORED = "model.layers.2.eh_proj.weight"


def published(folder):
    """A bfloat16 checkpoint as people publish them: with more in it than transformers reads or writes."""
    make_model("llama", layers=2).to(torch.bfloat16).save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    held = load_file(folder / WEIGHTS)
    held[KEPT] = held[KEPT].float() + 1e-4  # in float32, as routers' biases are
    held[IGNORED] = torch.ones(3, 5, dtype=torch.bfloat16)
    save_file(held, folder / WEIGHTS, metadata={"format": "pt"})
    config = artifacts.read_json(folder / "config.json")
    config |= {"torch_dtype": config.pop("dtype"), "num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "LICENSE").write_text("mine")
    (folder / "preprocessor_config.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# The base\n")
    (folder / "pytorch_model.bin").write_bytes(b"the same once more")
    (folder / "assets").mkdir()
    (folder / "assets" / "logo.svg").write_text("<svg/>")
    return folder


def ran(folder, run, spec=FLOAT32, **settings):
    """The run folder that a run on a checkpoint leaves, and its model in memory."""
    lm = load(str(folder), spec)
    plan, mark = plan_of(lm), fingerprint(lm.model, dtype=lm.stored_dtype)
    plan_on_disk.save(run / "plan", lm, plan)
    plan.save(run / "plan", {"fingerprint": mark, "config": {"seed": 7}, "saber_version": "0"})
    record = {
        "schema": 1,
        "saber_version": "0",
        "command": "saber run x",
        "model": {
            "name": str(folder),
            "source": "folder",
            "fingerprint": mark,
            "storage_dtype": str(lm.stored_dtype).removeprefix("torch."),
        },
        "config": {"seed": 7, **settings},
        "baseline": MEASURED,
        "edited": MEASURED,
    }
    artifacts.write_json(run / "run.json", record)
    return Run.load(run), lm


@pytest.fixture
def base(tmp_path):
    """Such a checkpoint."""
    return published(tmp_path / "base")


def from_memory(folder, out, spec=FLOAT32):
    lm = load(str(folder), spec)
    save_merged(lm, plan_of(lm), out)
    return out


@pytest.mark.parametrize("loaded", [True, False], ids=["run", "saber export"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_of_the_checkpoint_is_lost(base, tmp_path, monkeypatch, loaded, dtype):
    run, lm = ran(base, tmp_path / "run", LoadSpec(device="cpu", dtype=dtype))
    monkeypatch.setattr(export_module, "load", lambda *_, **__: pytest.fail("it was loaded again"))
    monkeypatch.setattr(export_module, "as_stored", lambda *_: pytest.fail("it was loaded again"))
    out = tmp_path / "run" / "model"
    done = export(run, "merged", out, lm=lm if loaded else None)
    for path in base.rglob("*"):
        name = path.relative_to(base)
        if path.is_file() and name.name not in ("README.md", WEIGHTS, "pytorch_model.bin"):
            assert (out / name).read_bytes() == path.read_bytes(), name
    assert [n for n in done.notes if "pytorch_model.bin" in n]
    assert not (out / "pytorch_model.bin").exists()
    before, after = tensors(base), tensors(out)
    assert list(before) == list(after)
    changed = {name for name in before if not same_bits(before[name], after[name])}
    assert changed == {f"{name}.weight" for name in run.plan.factors}
    # What is edited has the bits that were measured, rounded once to the checkpoint's dtype.
    wanted = tensors(from_memory(base, tmp_path / "memory", LoadSpec(device="cpu", dtype=dtype)))
    assert all(same_bits(after[name], wanted[name]) for name in changed)
    assert not list((tmp_path / "run").glob(".*.part"))


def test_card_and_provenance_are_ours_and_hold(base, tmp_path):
    run, _ = ran(base, tmp_path / "run")
    done = export(run, "merged", tmp_path / "out")
    card = done.card.read_text()
    assert card.startswith("---\n")
    assert WARNING in card
    assert "library_name: transformers" in card
    assert card.index("## Provenance") < card.index("# The base")
    assert "license: mit" not in card
    assert (tmp_path / "out" / FILE).is_file()
    found = verify(tmp_path / "out", tmp_path / "run", str(base))
    assert found.passed, found.checks
    assert parcel(tmp_path / "out").origin["plan_hash"] == found.origin["plan_hash"]
    assert "LICENSE" in parcel(tmp_path / "out").files


def test_shards_stay_as_they_are_cut(tmp_path):
    make_model("llama", layers=2).save_pretrained(tmp_path / "base", max_shard_size="12KB")
    make_tokenizer().save_pretrained(tmp_path / "base")
    run, lm = ran(tmp_path / "base", tmp_path / "run")
    export(run, "merged", tmp_path / "out", lm=lm)
    names = sorted(p.name for p in (tmp_path / "base").glob("*.safetensors*"))
    assert len(names) > 4
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors*")) == names
    # The run's own copies, not links to the base's.
    assert {os.stat(tmp_path / "out" / name).st_nlink for name in names} == {1}
    assert_same(tmp_path / "out", from_memory(tmp_path / "base", tmp_path / "memory"))


def test_a_template_that_was_given_goes_with_the_model(base, tmp_path):
    (base / "chat_template.jinja").unlink(missing_ok=True)
    template = "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}"
    (tmp_path / "own.jinja").write_text(template)
    spec = replace(FLOAT32, chat_template=str(tmp_path / "own.jinja"))
    run, lm = ran(base, tmp_path / "run", spec)
    record = {**run.record, "config": {"load": {"chat_template": str(tmp_path / "own.jinja")}}}
    for index, model in enumerate((lm, None)):
        out = tmp_path / f"out{index}"
        export(replace(run, record=record), "merged", out, lm=model)
        assert load(str(out), FLOAT32).tokenizer.chat_template == template
        assert verify(out).passed


def weave(run, **_):
    """As if the files wove one of the plan's weights together with others."""
    disk = artifacts.read_json(run / "plan" / "disk.json")
    disk["factors"][next(iter(disk["factors"]))]["weight"] = [[]]
    artifacts.write_json(run / "plan" / "disk.json", disk)


def forget(run, **_):
    (run / "plan" / "disk.json").unlink()


def change(base, **_):
    held = load_file(base / WEIGHTS)
    held[KEPT] = held[KEPT] * 2
    save_file(held, base / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("harm", "reason"),
    [(weave, "weave"), (forget, "older version"), (change, "were changed since")],
)
def test_what_cannot_be_written_off_the_files_is_saved_from_memory(base, tmp_path, harm, reason):
    run, lm = ran(base, tmp_path / "run")
    wanted = from_memory(base, tmp_path / "memory")
    harm(run=tmp_path / "run", base=base)
    done = export(run, "merged", tmp_path / "out", lm=lm)
    assert any(reason in note for note in done.notes)
    assert reason in done.card.read_text()
    assert_same(tmp_path / "out", wanted)
    # A processor, a licence and the like are not transformers' to save, and come along all the same.
    for name in ("preprocessor_config.json", "LICENSE", "assets/logo.svg"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()
    assert "# The base" not in done.card.read_text()
    assert parcel(tmp_path / "out").files


def test_a_run_in_the_models_own_folder_is_not_copied_into_itself(base):
    run, lm = ran(base, base / "runs" / "one")
    export(run, "merged", base / "runs" / "one" / "model", lm=lm)
    assert not (base / "runs" / "one" / "model" / "runs").exists()


MIXED = {"llama": "norm", "gpt2": "wte", "mixtral": r"gate\.|experts\.1\."}
"""By family: tensors that its files hold in float32. Norms, tied embeddings that come first, and routers and
one expert, which lies with the others in one parameter."""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", MIXED)
def test_what_files_hold_wider_keeps_its_bits_from_memory(tmp_path, family, dtype):
    """Float32 tensors beside 16 bits, whether the model computes in one or in the other."""
    base, out = tmp_path / "base", tmp_path / "out"
    MODELS[family]().to(torch.bfloat16).save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    held = load_file(base / WEIGHTS)
    wide = {name for name in held if re.search(MIXED[family], name)}
    assert wide
    held |= {name: held[name].float() * (1 + 1e-4) for name in wide}
    save_file(held, base / WEIGHTS, metadata={"format": "pt"})
    lm = load(str(base), LoadSpec(device="cpu", dtype=dtype))
    plan = plan_of(lm)
    save_merged(lm, plan, out)
    found = tensors(out)
    changed = {name for name in held if not torch.equal(held[name].float(), found[name].float())}
    parts = [f.weight or f"{name}.weight" for name, f in plan.factors.items()]
    parts += [
        f.bias_name or f"{name}.bias" for name, f in plan.factors.items() if f.bias is not None
    ]
    assert changed <= {name for part in parts for name in disk_names(lm.model, part)}
    assert wide - changed
    assert all(found[name].dtype == torch.float32 for name in wide - changed)
    assert artifacts.read_json(out / "config.json")["dtype"] == "bfloat16"
    assert load(str(out), FLOAT32).stored_dtype == torch.bfloat16
    # The model in memory is of one dtype again.
    assert {p.dtype for p in lm.model.parameters()} == {torch.bfloat16}


def test_a_model_folder_around_the_run_does_not_go_into_its_own_copy(base):
    run, lm = ran(base, base / "runs" / "mine")
    done = export(run, "merged", base / "runs" / "mine" / "model", lm=lm)
    assert any("inside the model's own folder" in note for note in done.notes)
    assert not (done.path / "runs").exists()


def test_files_that_would_round_what_was_measured_are_not_written(tmp_path):
    """Where the configuration says float32 of bfloat16 files, the edit is kept in float32."""
    base = published(tmp_path / "base")
    config = artifacts.read_json(base / "config.json")
    (base / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    run, lm = ran(base, tmp_path / "run")
    done = export(run, "merged", tmp_path / "out", lm=lm)
    assert any("stored in BF16" in note for note in done.notes)
    assert_same(tmp_path / "out", from_memory(base, tmp_path / "memory"))
    assert tensors(tmp_path / "out")[KEPT].dtype == torch.float32
    assert {t.dtype for t in tensors(tmp_path / "out").values()} == {torch.float32}


def test_a_disk_that_fills_up_leaves_nothing(base, tmp_path, monkeypatch):
    run, lm = ran(base, tmp_path / "run")
    write, written = os.write, 0

    def full(handle, data):
        nonlocal written
        written += len(data)
        if written > 20_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, data)

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(OutputError, match=r"No space left.*or choose another --out"):
            export(run, "merged", tmp_path / "run" / "model", lm=lm)
    assert not (tmp_path / "run" / "model").exists()
    assert not list((tmp_path / "run").glob(".*.part"))
    export(run, "merged", tmp_path / "run" / "model", lm=lm)


@pytest.mark.parametrize("moment", ["submit", "wait"])
def test_ctrl_c_while_files_are_written_leaves_nothing(base, tmp_path, monkeypatch, moment):
    """No thread goes on to write, whether it came while the jobs were begun or later."""
    run, lm = ran(base, tmp_path / "run")
    begun, told = threading.Event(), threading.Event()
    submit = workers.ThreadPoolExecutor.submit

    def slow(_job, check):
        begun.set()
        try:
            for _ in range(500):
                check()
                time.sleep(0.01)
        except workers.Stopped:
            told.set()
            raise

    def stop(*args):
        if moment == "submit":
            submit(*args)
        begun.wait()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(workers, "do", slow)
        place = workers if moment == "wait" else workers.ThreadPoolExecutor
        patched.setattr(place, moment, stop)
        with pytest.raises(KeyboardInterrupt, match="Nothing half-written was left"):
            list(export_all(run, ["merged"], tmp_path / "run", lm=lm, spec=FLOAT32))
    assert told.is_set()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["plan", "run.json"]
    export(run, "merged", tmp_path / "run" / "model", lm=lm)


@pytest.mark.parametrize("files", [True, False], ids=["off its files", "from memory"])
def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    base, tmp_path, monkeypatch, files
):
    run, lm = ran(base, tmp_path / "run")
    if not files:
        forget(tmp_path / "run")
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 24)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(OutputError, match="are to be written and"):
        export(run, "merged", tmp_path / "out", lm=lm)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*.part"))


def test_a_spread_model_is_cast_tensor_by_tensor(base, tmp_path):
    lm = load(str(base), FLOAT32)
    wanted = tensors(from_memory(base, tmp_path / "whole"))
    lm.model.hf_device_map = {"": 0}
    save_merged(lm, plan_of(lm), tmp_path / "out")
    found, stored = tensors(tmp_path / "out"), tensors(base)
    assert {name: t.dtype for name, t in found.items()} == {n: stored[n].dtype for n in found}
    assert {t.dtype for name, t in found.items() if name != KEPT} == {torch.bfloat16}
    assert all(same_bits(found[name], value) for name, value in wanted.items())


def test_what_is_too_large_for_16_bits_is_not_saved_as_infinity(base, tmp_path):
    lm = replace(load(str(base), FLOAT32), name="of-no-files", stored_dtype=torch.float16)
    with torch.no_grad():
        lm.model.model.norm.weight[3] = 1e5
    save_merged(lm, plan_of(lm), tmp_path / "out")
    found = tensors(tmp_path / "out")
    assert found[KEPT][3] == 1e5
    assert {t.dtype for name, t in found.items() if name != KEPT} == {torch.float16}


def test_nothing_is_edited_in_memory_where_the_files_are_written(base, tmp_path):
    run, lm = ran(base, tmp_path / "run")
    mark = fingerprint(lm.model)
    export(run, "merged", tmp_path / "out", lm=lm)
    assert fingerprint(lm.model) == mark


def test_a_snapshot_of_the_hub_is_copied_through_its_links(base, tmp_path, monkeypatch):
    """The cache of the hub holds files under their hashes, and a folder of links to them."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    base.rename(blobs)
    snapshot.mkdir()
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    run, lm = ran(snapshot, tmp_path / "run")
    asked = []
    monkeypatch.setattr(plan_on_disk, "hub_folder", lambda *what: asked.append(what) or snapshot)
    lm.model.config._commit_hash = "abc"
    record = {**run.record, "model": {**run.model, "name": "me/base", "base": "me/base"}}
    done = export(
        replace(run, record=record), "merged", tmp_path / "out", lm=replace(lm, name="me/base")
    )
    assert asked == [("me/base", "abc")]
    assert not any("transformers saves" in note for note in done.notes)
    for path in (tmp_path / "out").iterdir():
        assert not path.is_symlink()
    assert IGNORED in tensors(tmp_path / "out")
    assert "base_model: me/base" in done.card.read_text()


def test_a_card_names_no_folder_of_the_hubs_cache(base, tmp_path, monkeypatch):
    """As of a hub model that has pickled weights alone, which is saved from memory."""
    run, lm = ran(base, tmp_path / "run")
    (base / WEIGHTS).unlink()
    monkeypatch.setattr(plan_on_disk, "hub_folder", lambda *_: base)
    record = {**run.record, "model": {**run.model, "name": "me/base", "base": "me/base"}}
    done = export(
        replace(run, record=record), "merged", tmp_path / "out", lm=replace(lm, name="me/base")
    )
    assert any("me/base has neither" in note for note in done.notes)
    assert str(tmp_path) not in done.card.read_text() + str(done.notes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_is_known_in_whatever_dtype_it_is_loaded(base, tmp_path, dtype):
    """One tensor of it is stored in float32, which a model in bfloat16 rounds."""
    subject = Subject.load(str(base), RunConfig(load=LoadSpec(device="cpu", dtype=dtype)))
    _, lm = ran(base, tmp_path / "run")
    assert not torch.equal(
        lm.model.model.norm.weight, lm.model.model.norm.weight.bfloat16().float()
    )
    for other in ("float32", "bfloat16"):
        assert is_of(subject.mark, load(str(base), LoadSpec(device="cpu", dtype=other)))
    # Runs of older versions took the values in memory.
    assert is_of(fingerprint(lm.model), lm)
    with torch.no_grad():
        lm.model.model.norm.weight.mul_(1.1)
    assert not is_of(subject.mark, lm)
