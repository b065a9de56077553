"""`saber export`: every format from a run folder, its card and provenance, and what it refuses."""

import json
import os
import pkgutil
import shlex
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import gguf
import ggufs
import pytest
import torch
import transformers
from conftest import make_model, make_tokenizer
from huggingface_hub import ModelCard, constants
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_cli import failing
from test_export_lora import IDS, random_plan, read

from saber import artifacts
from saber.ablation import EditPlan, Factor, apply
from saber.checkpoint import export as export_module
from saber.checkpoint import plan_on_disk, runs
from saber.checkpoint.export import ExportSpec, commands, export, export_all
from saber.checkpoint.export_checks import gguf_adapter
from saber.checkpoint.gguf_file import Change, decode, encode, open_gguf
from saber.checkpoint.gguf_lora import write_gguf_lora
from saber.checkpoint.gguf_names import changes
from saber.checkpoint.licence import licence
from saber.checkpoint.merged import save_merged
from saber.checkpoint.origin import origin, plan_hash
from saber.checkpoint.runs import Run, note_export, way_back
from saber.checkpoint.sketch import take
from saber.checkpoint.verification import verify
from saber.cli.main import build_parser, main
from saber.errors import ModelError, OutputError, SaberError
from saber.lm.load import LoadSpec, load
from saber.lm.model import fingerprint
from saber.notices import GENERIC, NARROW, WARNING
from saber.report.card import limits, results

MEASURED = {
    "refusal": {"rate": 0.9, "low": 0.8, "high": 0.95, "n": 10},
    "perplexity": {"overall": 2.5},
    "kl": {"sequence": 0.01},
}
KEYS = {
    "base",
    "base_fingerprint",
    "plan_hash",
    "config_hash",
    "config",
    "seed",
    "version",
    "run_version",
}


def run_folder(tmp_path, model, name, plan, source="folder", sketch=True, **data):
    """What a finished run on a model leaves, as far as exports read it."""
    folder = tmp_path / "run"
    mark = fingerprint(model)
    record = {
        "schema": 1,
        "saber_version": "0.0.9",
        "command": "saber run x",
        "model": {
            "name": str(name),
            "source": source,
            "model_type": model.config.model_type,
            "base": None,
            "fingerprint": mark,
        },
        "config": {"seed": 7, "data": {"behaviour": "refusal", "mode": "removal", **data}},
        "baseline": MEASURED,
        "edited": MEASURED,
    }
    artifacts.write_json(folder / "run.json", record)
    plan.save(folder / "plan", {"fingerprint": mark})
    if sketch:
        take(model, plan).save(folder / "plan" / "sketch")
    return folder


@pytest.fixture
def made(tmp_path):
    """A run on a pico model's folder, and that folder."""
    model = make_model("llama", layers=2)
    folder = tmp_path / "pico"
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return run_folder(tmp_path, model, folder, random_plan(model)), folder


@pytest.fixture
def made_gguf(tmp_path):
    """A run on a pico model in a GGUF file, and that file."""
    model = ggufs.dense_model("llama")
    file = ggufs.write(model, tmp_path / "pico.gguf", "Q8_0")
    return run_folder(tmp_path / "g", model, file, random_plan(model), source="gguf"), file


def call(capsys, *arguments):
    code = main(["export", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("lacks", ["model", "model.name", "model.fingerprint", "config"])
def test_a_run_that_lacks_what_is_needed(capsys, made, tmp_path, lacks):
    run, _ = made
    record = artifacts.read_json(run / "run.json")
    part, _, leaf = lacks.partition(".")
    record.pop(part) if not leaf else record[part].pop(leaf)
    artifacts.write_json(run / "run.json", record)
    for ask in (("chat", run, "--prompt", "x"), ("export", run, "--format", "lora")):
        out = ("--out", tmp_path / "o") if ask[0] == "export" else ()
        assert f"lacks {lacks}" in failing(capsys, *ask, *out)[1]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda run: change(run / "run.json", schema=2), "is of schema 2, this version reads"),
        (lambda run: change(run / "plan" / "meta.json", fingerprint="sha256:0"), "another model"),
        (lambda run: (run / "run.json").write_text("[" * 100_000), "is not valid JSON"),
    ],
)
def test_a_run_that_does_not_fit_together_is_no_edit(capsys, made, tmp_path, damage, said):
    run, _ = made
    damage(run)
    for ask in (("chat", run, "--prompt", "x"), ("export", run, "--format", "merged")):
        out = ("--out", tmp_path / "o") if ask[0] == "export" else ()
        assert said in failing(capsys, *ask, *out)[1]
    assert not (tmp_path / "o").exists()


def change(file, **values):
    artifacts.write_json(file, {**artifacts.read_json(file), **values})


def test_a_damaged_plan_is_named(capsys, made, tmp_path):
    run, _ = made
    file = run / "plan" / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:40])
    for ask in (("chat", run, "--prompt", "x"), ("export", run, "--format", "lora")):
        out = ("--out", tmp_path / "o") if ask[0] == "export" else ()
        said = failing(capsys, *ask, *out)[1]
        assert "tensors.safetensors cannot be read" in said
        assert "damaged" in said
    assert not (tmp_path / "o").exists()


HARMS = {
    "empty": lambda _meta: b"",
    "cut off": lambda meta: json.dumps(meta).encode()[:40],
    "no text": lambda _meta: b"\xff\x00",
    "no object": lambda _meta: b"[]",
    "nothing in it": lambda _meta: {},
    "no kind": lambda meta: {k: v for k, v in meta.items() if k != "kind"},
    "no axes": lambda meta: {k: v for k, v in meta.items() if k != "axes"},
    "axes in a list": lambda meta: {**meta, "axes": list(meta["axes"])},
    "axes in words": lambda meta: {**meta, "axes": dict.fromkeys(meta["axes"], "0")},
    "an axis too many": lambda meta: {**meta, "axes": dict.fromkeys(meta["axes"], 2)},
    "a factor too few": lambda meta: {**meta, "axes": dict(list(meta["axes"].items())[1:])},
    "a factor too many": lambda meta: {**meta, "axes": {**meta["axes"], "x": 0}},
    "names in a list": lambda meta: {**meta, "names": ["x"]},
    "half a name": lambda meta: {**meta, "names": {next(iter(meta["axes"])): ["x"]}},
    "a configuration in words": lambda meta: {**meta, "config": "x"},
}
"""What can be wrong with a plan's `meta.json`: what it holds then."""


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_plans_meta_is_named(capsys, made, tmp_path, harm):
    run, _ = made
    file = run / "plan" / "meta.json"
    value = HARMS[harm](artifacts.read_json(file))
    file.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
    for ask in (("chat", run, "--prompt", "x"), ("export", run, "--format", "lora")):
        out = ("--out", tmp_path / "o") if ask[0] == "export" else ()
        code, said = failing(capsys, *ask, *out)
        assert code == 2
        assert str(file) in said
        assert "It is damaged or incomplete: copy it anew, or make it again." in said
    assert not (tmp_path / "o").exists()


def test_a_plan_whose_factors_do_not_fit_together_is_named(capsys, made, tmp_path):
    run, _ = made
    file = run / "plan" / "tensors.safetensors"
    whole = {key: value.clone() for key, value in load_file(file).items()}
    name = next(key for key in whole if key.endswith(".left"))
    for changed in (
        {k: v for k, v in whole.items() if k != name},
        {**whole, name: whole[name][:, :1].contiguous()},
        {**whole, name: whole[name][:, 0].contiguous()},
    ):
        save_file(changed, file)
        ask = ("export", run, "--format", "lora", "--out", tmp_path / "o")
        said = failing(capsys, *ask)[1]
        assert "tensors.safetensors" in said
        assert "It is damaged or incomplete: copy it anew, or make it again." in said
    assert not (tmp_path / "o").exists()


def test_a_run_finds_its_model_from_another_folder(made, capsys, tmp_path, monkeypatch):
    """By the way up from the run folder to where the run was started."""
    run, model = made
    monkeypatch.chdir(tmp_path)
    record = artifacts.read_json(run / "run.json")
    way = way_back(Path("run"), "./pico", "folder")
    assert way == {"relative_to": ".."}
    record["model"] |= {"name": "./pico", **way}
    artifacts.write_json(run / "run.json", record)
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.chdir(other)
    say = ("--prompt", "x", "--max-new-tokens", "2", "--json")
    assert main(["chat", "../run", *say]) == 0
    capsys.readouterr()
    assert call(capsys, "../run", "--format", "lora", "--out", "a")[0] == 0
    assert call(capsys, "../run", "--format", "merged", "--out", "m")[0] == 0
    moved = model.rename(tmp_path / "moved")
    for ask in (("chat", "../run", *say), ("export", "../run", "--format", "lora", "--out", "b")):
        assert "./pico is not here. Say where it is: --base" in failing(capsys, *ask)[1]
        assert main([*map(str, ask), "--base", str(moved)]) == 0
        capsys.readouterr()
    assert "--base needs a run folder" in failing(capsys, "chat", moved, "--base", "x", *say)[1]


def test_no_folder_of_this_machine_gets_into_a_run(tmp_path, monkeypatch):
    (tmp_path / "here" / "pico").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert way_back(Path("runs") / "x", "pico", "gguf") == {"relative_to": "../.."}
    assert way_back(tmp_path / "elsewhere", "pico", "folder") == {}
    assert way_back(Path("run"), str(tmp_path / "here" / "pico"), "folder") == {}
    assert way_back(Path("run"), "owner/name", "hub") == {}


def test_a_run_folder_is_its_edited_model_where_a_model_is_wanted(made, capsys, tmp_path):
    run, model = made
    said = failing(capsys, "inspect", run)[1]
    assert "no edited model in it" in said
    assert "--format merged" in said
    shutil.copytree(model, run / "model")
    assert main(["inspect", str(run), "--json"]) == 0
    capsys.readouterr()
    assert "lies in --out" in failing(capsys, "run", run, "--out", run, "--overwrite")[1]
    assert "nothing-here" in failing(capsys, "eval", "./nothing-here", "--base", run)[1]


def test_a_merged_model_is_written_without_bars(made, capfd, tmp_path):
    run, _ = made
    assert main(["export", str(run), "--format", "merged", "--out", str(tmp_path / "m")]) == 0
    assert "shard" not in capfd.readouterr().err
    assert transformers.utils.logging.is_progress_bar_enabled()


def test_lora_from_the_command_line(capsys, made, tmp_path):
    run, folder = made
    code, said = call(capsys, run, "--format", "lora", "--out", tmp_path / "a")
    assert code == 0
    assert said["format"] == "lora"
    assert said["bytes"] == sum(p.stat().st_size for p in (tmp_path / "a").iterdir())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    apart = transformers.AutoModelForCausalLM.from_pretrained(folder)
    apply(apart, EditPlan.load(run / "plan"))
    found = read(model, tmp_path / "a")
    assert isinstance(found, PeftModel)
    torch.testing.assert_close(found(IDS).logits, apart(IDS).logits, rtol=1e-4, atol=1e-4)


def test_an_export_is_noted_in_the_run_as_those_of_its_end_are(capsys, made, tmp_path, monkeypatch):
    run, model = made
    other, lm = Path(shutil.copytree(run, tmp_path / "other")), load(str(model))
    (wanted,) = export_all(Run.load(other), ["lora"], other, lm=lm, spec=LoadSpec())
    monkeypatch.chdir(tmp_path)
    ask = ("--format", "lora", "--partial", "--out")
    before = (run / "run.json").read_text(encoding="utf-8")
    assert call(capsys, "run", *ask, "run/adapter")[0] == 0
    record = artifacts.read_json(run / "run.json")
    assert record.pop("exports") == [wanted]
    artifacts.write_json(tmp_path / "rest.json", record)
    assert (tmp_path / "rest.json").read_text(encoding="utf-8") == before
    call(capsys, "run", *ask, "beside")
    away = tmp_path.parent / f"{tmp_path.name}-away"
    for name in ("x", "y/x"):
        call(capsys, run, *ask, away / name)
    shutil.rmtree(away)
    shutil.rmtree(run / "adapter")
    call(capsys, "run", *ask, "run/adapter")
    found = artifacts.read_json(run / "run.json")["exports"]
    # What was written once more stands there once; elsewhere on the machine is no business of the run's.
    assert [row["path"] for row in found] == ["../beside", ".../x", ".../x", "adapter"]
    assert not list(run.glob(".*"))


@pytest.mark.parametrize("rows", ['[ {"format": "gguf"} ]', "[]", "null", None])
def test_noting_an_export_keeps_every_other_byte(capsys, made, tmp_path, rows):
    run, _ = made
    record = artifacts.read_json(run / "run.json")
    head = json.dumps(record, indent=1)[:-2] + ',\n "a": 1.50, "deep": {"exports": [0]}, "b": NaN'
    head, tail = head + (',\n\t"exports" : ' if rows else ""), ' , "z":"\u00fc\\u00fc ]}"'
    (run / "run.json").write_text(f"{head}{rows or ''}{tail}\n}}\n", "utf-8")
    assert call(capsys, run, "--format", "lora", "--out", run / "adapter")[0] == 0
    text = (run / "run.json").read_text("utf-8")
    assert text.startswith(head if rows else head + tail)
    assert text.endswith(f"{tail}\n}}\n" if rows else "\n}\n")
    before = json.loads(rows) or [] if rows else []
    found = json.loads(text)["exports"]
    assert found[:-1] == before
    assert found[-1]["path"] == "adapter"
    assert text.count('"adapter"') == 1


def test_exports_made_at_once_are_all_noted(made):
    run, _ = made

    def note(name):
        for i in range(8):
            note_export(run, {"format": "lora", "path": f"{name}{i}", "bytes": 1, "notes": []})

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(note, "abc"))
    found = [row["path"] for row in artifacts.read_json(run / "run.json")["exports"]]
    assert sorted(found) == [f"{name}{i}" for name in "abc" for i in range(8)]


def test_an_export_that_waits_for_another_too_long_is_told(made, monkeypatch):
    run, _ = made
    monkeypatch.setattr(runs, "WAIT", 0.05)
    with runs.alone(run), pytest.raises(OutputError, match=r"another process holds .*run\.json"):
        note_export(run, {"format": "lora", "path": "a", "bytes": 1, "notes": []})


def test_an_export_that_fails_is_not_noted_and_one_that_cannot_be_is_told(
    capsys, made, tmp_path, monkeypatch
):
    run, _ = made
    before = (run / "run.json").read_bytes()
    ask = ("export", run, "--format", "lora", "--out", tmp_path / "o")
    failing(capsys, *ask, "--base", tmp_path / "nowhere")
    assert (run / "run.json").read_bytes() == before
    usual = os.replace

    def unless_ours(source, target):
        if Path(target).name == "run.json":
            raise OSError(30, "Read-only file system")
        usual(source, target)

    monkeypatch.setattr(os, "replace", unless_ours)
    code, row = call(capsys, *ask[1:])
    assert code == 0
    assert any("not noted in run.json" in n and "Read-only" in n for n in row["notes"])
    assert (run / "run.json").read_bytes() == before
    assert not list(run.glob(".*"))
    assert (tmp_path / "o" / "README.md").is_file()


def test_merged_from_the_command_line(capsys, made, tmp_path):
    run, folder = made
    code, _ = call(capsys, run, "--format", "merged", "--out", tmp_path / "m")
    assert code == 0
    apart = transformers.AutoModelForCausalLM.from_pretrained(folder)
    apply(apart, EditPlan.load(run / "plan"))
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    for name, value in apart.state_dict().items():
        assert torch.equal(merged.state_dict()[name], value)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "m").chat_template


def test_gguf_and_its_adapter_from_the_command_line(capsys, made_gguf, tmp_path):
    run, file = made_gguf
    code, said = call(capsys, run, "--format", "gguf", "--out", tmp_path / "deep" / "e.gguf")
    assert code == 0
    assert {p.name for p in (tmp_path / "deep").iterdir()} == {"e.gguf", "e.md"}
    assert {row["after"] for row in said["tensors"]} == {"Q8_0"}
    before, after = ggufs.weights(file), ggufs.weights(tmp_path / "deep" / "e.gguf")
    plan = EditPlan.load(run / "plan")
    wanted = (
        before["blk.1.ffn_down.weight"]
        + plan.factors["model.layers.1.mlp.down_proj"].delta().numpy()
    )
    assert abs(after["blk.1.ffn_down.weight"] - wanted).max() < 0.01
    code, said = call(capsys, run, "--format", "gguf-lora", "--out", tmp_path / "l")
    assert code == 0
    assert {p.name for p in (tmp_path / "l").iterdir()} == {"pico-saber-lora.gguf", "README.md"}
    assert any("Rank 3" in note for note in said["notes"])


def test_a_table_says_what_storing_did(capsys, made_gguf, tmp_path):
    run, _ = made_gguf
    assert main(["export", str(run), "--format", "gguf", "--out", str(tmp_path / "e.gguf")]) == 0
    said = capsys.readouterr().out
    assert "edit kept" in said
    assert "Q8_0" in said


@pytest.mark.parametrize("kind", ["lora", "merged", "gguf", "gguf-lora"])
def test_every_artifact_says_where_it_comes_from_and_what_it_is(kind, made, made_gguf, tmp_path):
    folder = (made_gguf if kind.startswith("gguf") else made)[0]
    run = Run.load(folder)
    done = export(run, kind, tmp_path / "o")
    wanted = origin(run.record, run.plan)
    assert wanted.keys() == KEYS
    assert (wanted["seed"], wanted["run_version"]) == ("7", "0.0.9")
    if kind.startswith("gguf"):
        reader = gguf.GGUFReader(next((tmp_path / "o").glob("*.gguf")))
        found = {
            f[6:]: reader.fields[f].contents() for f in reader.fields if f.startswith("saber.")
        }
    else:
        with safe_open(next((tmp_path / "o").glob("*.safetensors")), "pt") as file:
            found = file.metadata()
            assert found.pop("format") == "pt"
    assert found == wanted
    card = done.card.read_text(encoding="utf-8")
    assert WARNING in card
    for key in KEYS - {"config"}:
        assert wanted[key] in card
    assert (
        f"library_name: {'gguf' if 'gguf' in kind else 'peft' if kind == 'lora' else 'transformers'}"
        in card
    )


def test_the_card_has_the_notice_that_fits(tmp_path):
    model = make_model("llama", layers=2)
    model.save_pretrained(tmp_path / "pico")
    for index, (data, notice) in enumerate(
        (({"mode": "over-refusal"}, NARROW), ({"behaviour": "lists"}, GENERIC))
    ):
        folder = run_folder(tmp_path, model, tmp_path / "pico", random_plan(model), **data)
        card = export(Run.load(folder), "lora", tmp_path / f"o{index}").card
        assert notice in card.read_text(encoding="utf-8")


def test_the_card_tells_the_costs_and_the_limits_as_the_runs_own_does(made, tmp_path):
    folder, _ = made
    record = artifacts.read_json(folder / "run.json")
    told = {**MEASURED, "incoherent": {"rate": 0.036, "low": 0.01, "high": 0.09, "n": 112}}
    told["over_refusal"] = {"borderline": {"rate": 0.08, "low": 0.03, "high": 0.2, "n": 48}}
    licences = {"license": "other", "license_name": "mine", "license_link": "https://x.org/l"}
    record["model"].update(licences)
    record.update(baseline=told, edited=told, judge={"name": "phrases"})
    for kind in ("lora", "merged"):
        run = replace(Run.load(folder), record=record)
        text = export(run, kind, tmp_path / kind).card.read_text(encoding="utf-8")
        data = ModelCard(text).data.to_dict()
        assert {key: data[key] for key in licences} == licences
        assert "abliterated" in data["tags"]
        for part in (results(record, heading="", plots=False), limits(record), "Judge: phrases."):
            assert part in text
        assert "incoherent answers, target prompts | 3.6%" in text
        assert "over-refusal, borderline prompts | 8.0%" in text
        assert "plots/" not in text
        assert str(tmp_path) not in text.split("## Use")[0]


def test_a_bases_licence_is_what_its_own_card_says(tmp_path, monkeypatch):
    assert licence(str(tmp_path), "folder") == {}
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: mit\ntags:\n- x\n---\n# Base\n")
    assert licence(str(tmp_path), "folder") == {"license": "mit"}
    own = "license: other\nlicense_name: own\nlicense_link: LICENSE"
    card.write_text(f"---\n{own}\n---\n")
    assert licence(str(tmp_path), "folder") == {"license": "other", "license_name": "own"}
    for damaged in ("---\nlicense: [a: b: c\n---\n", "---\nlicense_name: x\n---\n", "# Words"):
        card.write_text(damaged)
        assert licence(str(tmp_path), "folder") == {}
    card.write_bytes(b"\xff\xfe")
    assert licence(str(tmp_path), "folder") == {}
    assert licence("demo", "demo") == {}
    # The hub's cache, without a connection.
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    assert licence("some/base", "hub") == {}
    snapshot = cache / "models--some--base" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text(f"---\n{own}\n---\n")
    (cache / "models--some--base" / "refs").mkdir()
    (cache / "models--some--base" / "refs" / "main").write_text("abc")
    link = f"{constants.ENDPOINT}/some/base/blob/main/LICENSE"
    assert licence("some/base", "hub")["license_link"] == link


def test_a_plans_hash_depends_on_all_of_it_and_not_on_order():
    plan = random_plan(make_model("gpt2", layers=2))
    same = EditPlan(dict(reversed(plan.factors.items())))
    assert plan_hash(same) == plan_hash(plan)
    name, factor = next(iter(plan.factors.items()))
    for other in (
        replace(factor, left=factor.left + 1e-3),
        replace(factor, axis=0),
        replace(factor, bias=None),
        replace(factor, weight="other"),
    ):
        assert plan_hash(EditPlan({**plan.factors, name: other})) != plan_hash(plan)


def test_drowned_edits_are_warned_of(capsys, tmp_path):
    model = ggufs.dense_model("llama")
    file = ggufs.write(model, tmp_path / "pico.gguf", "Q4_0")
    run = run_folder(tmp_path, model, file, random_plan(model, size=0.02), source="gguf")
    _, said = call(capsys, run, "--format", "gguf", "--type", "keep", "--out", tmp_path / "k")
    assert any("drowned the edit in 4 of 4 tensors" in note for note in said["notes"])
    _, said = call(capsys, run, "--format", "gguf", "--out", tmp_path / "a")
    assert not any("drowned" in note for note in said["notes"])
    assert any("stored in another type (Q4_0 to Q8_0)" in note for note in said["notes"])
    table = (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    assert table.count("| Q4_0 | Q8_0 |") == 4


def test_biases_that_a_gguf_adapter_cannot_hold_are_named(capsys, tmp_path):
    model = ggufs.dense_model("gpt2")
    file = ggufs.write(model, tmp_path / "pico.gguf")
    run = run_folder(tmp_path, model, file, random_plan(model), source="gguf")
    ask = ("export", run, "--format", "gguf-lora", "--out", tmp_path / "l.gguf")
    code, error = failing(capsys, *ask)
    assert code == 2
    assert "cannot hold the change of blk.0.attn_output.bias" in error
    assert "--partial" in error
    assert not (tmp_path / "l.gguf").exists()
    assert main([*map(str, ask), "--partial"]) == 0
    card = (tmp_path / "l.md").read_text(encoding="utf-8")
    assert "NOT in it" in card
    assert "blk.1.ffn_down.bias" in card


def test_folders_that_are_no_finished_run(capsys, tmp_path, made):
    run, _ = made
    empty = tmp_path / "empty"
    empty.mkdir()
    ask = ("--format", "lora", "--out", tmp_path / "o")
    assert "is no run folder" in failing(capsys, "export", empty, *ask)[1]
    (empty / "state.json").write_text("{}")
    assert "is not finished" in failing(capsys, "export", empty, *ask)[1]
    (run / "plan" / "meta.json").unlink()
    code, error = failing(capsys, "export", run, *ask)
    assert code == 2
    assert "has no plan" in error
    EditPlan().save(run / "plan", {})
    assert "changes nothing" in failing(capsys, "export", run, *ask)[1]
    assert not (tmp_path / "o").exists()


def test_unknown_format_and_taken_or_unfit_out(capsys, made, made_gguf, tmp_path):
    run, _ = made_gguf
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").touch()
    code, error = failing(capsys, "export", run, "--format", "ggfu", "--out", taken)
    assert code == 2
    assert "Did you mean 'gguf'" in error
    for kind in ("lora", "merged", "gguf", "gguf-lora"):
        assert (
            "exists already" in failing(capsys, "export", run, "--format", kind, "--out", taken)[1]
        )
    (tmp_path / "e.md").write_text("mine")
    out = tmp_path / "e.gguf"
    assert (
        "e.md exists already" in failing(capsys, "export", run, "--format", "gguf", "--out", out)[1]
    )
    assert (tmp_path / "e.md").read_text() == "mine"
    wrong = failing(capsys, "export", run, "--format", "lora", "--out", tmp_path / "f.gguf")
    assert "names a file" in wrong[1]
    (tmp_path / "file").write_text("")
    for kind in ("lora", "gguf"):
        out = tmp_path / "file" / "o"
        assert "cannot" in failing(capsys, "export", run, "--format", kind, "--out", out)[1]


@pytest.mark.parametrize("name", ["o", "o.gguf"])
@pytest.mark.parametrize("kind", ["lora", "merged", "gguf", "gguf-lora"])
def test_an_empty_folder_is_free(made, made_gguf, tmp_path, kind, name):
    out = tmp_path / name
    out.mkdir()
    done = export(Run.load((made_gguf if "gguf" in kind else made)[0]), kind, out)
    assert done.card == out / "README.md"
    assert len(list(out.iterdir())) > 1


def test_a_folder_where_the_card_of_a_file_would_be(made_gguf, tmp_path):
    (tmp_path / "o.md").mkdir()
    with pytest.raises(OutputError, match=r"o\.md exists already"):
        export(Run.load(made_gguf[0]), "gguf", tmp_path / "o.gguf")
    assert (tmp_path / "o.md").is_dir()
    assert not (tmp_path / "o.gguf").exists()


def test_a_folder_that_is_called_as_a_gguf_file_is_a_folder(capsys, made, made_gguf, tmp_path):
    folder = made[1].rename(tmp_path / "folder.gguf")
    ask = ("run", folder, "--out", tmp_path / "r", "--export", "gguf")
    assert f"{folder} is none" in failing(capsys, *ask)[1]
    ask = ("export", made_gguf[0], "--format", "gguf", "--out", tmp_path / "o", "--base", folder)
    assert f"--base {folder} is no .gguf file" in failing(capsys, *ask)[1]


def test_unknown_tensor_type(capsys, made_gguf, tmp_path):
    run, _ = made_gguf
    ask = ("export", run, "--format", "gguf", "--out", tmp_path / "e.gguf", "--type", "q9")
    assert "unknown tensor type 'q9'" in failing(capsys, *ask)[1]
    assert not (tmp_path / "e.gguf").exists()


def test_missing_extra(capsys, made, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    code, error = failing(capsys, "export", made[0], "--format", "lora", "--out", tmp_path / "o")
    assert code == 2
    assert "pip install 'saber-llm[export]'" in error
    ask = ("run", made[1], "--out", tmp_path / "r", "--export", "merged,lora")
    assert "saber-llm[export]" in failing(capsys, *ask)[1]
    assert not (tmp_path / "r").exists()


def test_another_model_is_refused_unless_forced(capsys, made, tmp_path):
    run, _ = made
    other = tmp_path / "other"
    make_model("llama", layers=2, seed=1).save_pretrained(other)
    make_tokenizer().save_pretrained(other)
    for kind in ("merged", "lora"):
        ask = ("export", run, "--format", kind, "--out", tmp_path / kind, "--base", other)
        code, error = failing(capsys, *ask)
        assert code == 2
        assert "not the model that the run was made on" in error
        assert not (tmp_path / kind).exists()
        assert main([*map(str, ask), "--force"]) == 0
        card = (tmp_path / kind / "README.md").read_text(encoding="utf-8")
        assert "NOT the model of the run" in card or "was not held against" in card
        # A card may be published: it names no folder of this machine.
        assert other.name in card
        assert str(tmp_path) not in card
        exports = json.loads((run / "run.json").read_text(encoding="utf-8"))["exports"]
        assert str(tmp_path) not in json.dumps(exports)
    wide = tmp_path / "wide"
    make_model("llama", layers=2, d_model=64).save_pretrained(wide)
    ask = ("export", run, "--format", "lora", "--out", tmp_path / "w", "--base", wide, "--force")
    assert "has the shape" in failing(capsys, *ask)[1]
    assert "no such model" in failing(capsys, *ask[:-3], "--base", "./nothing")[1]


def test_another_gguf_is_refused_unless_forced(capsys, made_gguf, tmp_path):
    run, _ = made_gguf
    other = ggufs.write(ggufs.dense_model("llama", seed=1), tmp_path / "other.gguf")
    ask = ("export", run, "--format", "gguf", "--out", tmp_path / "e.gguf", "--base", other)
    code, error = failing(capsys, *ask)
    assert code == 2
    assert "does not hold the weights" in error
    assert not (tmp_path / "e.gguf").exists()
    assert main([*map(str, ask), "--force"]) == 0
    assert "was not held against" in (tmp_path / "e.md").read_text(encoding="utf-8")
    gpt2 = ggufs.write(ggufs.dense_model("gpt2"), tmp_path / "g.gguf")
    wrong = failing(capsys, *ask[:-1], gpt2, "--force", "--out", tmp_path / "g2.gguf")
    assert "is a 'gpt2' model" in wrong[1]
    folder = failing(capsys, *ask[:-1], "some/model", "--out", tmp_path / "h.gguf")
    assert "is no .gguf file" in folder[1]


def test_a_run_on_a_folder_takes_a_gguf_of_the_same_weights(capsys, tmp_path):
    model = ggufs.dense_model("llama")
    model.save_pretrained(tmp_path / "pico")
    run = run_folder(tmp_path, model, tmp_path / "pico", random_plan(model))
    ask = ("export", run, "--format", "gguf", "--out", tmp_path / "e.gguf")
    code, error = failing(capsys, *ask)
    assert code == 2
    assert "--base FILE.gguf" in error
    file = ggufs.write(model, tmp_path / "quantised.gguf", "Q4_1")
    assert main([*map(str, ask), "--base", str(file)]) == 0


def test_a_run_without_a_sketch_asks_its_model(made, tmp_path, monkeypatch):
    model = ggufs.dense_model("llama")
    model.save_pretrained(tmp_path / "mine")
    make_tokenizer().save_pretrained(tmp_path / "mine")
    folder = run_folder(tmp_path / "s", model, tmp_path / "mine", random_plan(model), sketch=False)
    file = ggufs.write(model, tmp_path / "q.gguf", "Q4_1")
    run = Run.load(folder)
    assert run.sketch is None
    export(run, "gguf", tmp_path / "a.gguf", ExportSpec(base=str(file)))
    other = ggufs.write(ggufs.dense_model("llama", seed=1), tmp_path / "o.gguf")
    with pytest.raises(ModelError, match="does not hold the weights"):
        export(run, "gguf", tmp_path / "b.gguf", ExportSpec(base=str(other)))
    lost = Run({**run.record, "model": {**run.model, "name": "./gone"}}, run.plan, None)
    with pytest.raises(ModelError, match="no such model"):
        export(lost, "gguf", tmp_path / "c.gguf", ExportSpec(base=str(file)))


def test_nothing_is_left_when_the_disk_is_full(made, tmp_path, monkeypatch):
    run = Run.load(made[0])

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("saber.checkpoint.lora.save_file", full)
    with pytest.raises(Exception, match="No space left"):
        export(run, "lora", tmp_path / "o")
    assert not (tmp_path / "o").exists()
    assert not list(tmp_path.glob(".*.part"))


def stop(*_args, **_kwargs):
    """Press Ctrl-C."""
    raise KeyboardInterrupt


STOPS = {
    "lora, its weights written": ("lora", "out", "peft.LoraConfig.save_pretrained"),
    "merged, from memory": ("merged", "out", "saber.checkpoint.merged.stamp"),
    "merged, its weights written": ("merged", "out", "saber.checkpoint.export.export_card"),
    "gguf": ("gguf", "out", "saber.checkpoint.gguf_rewrite._copy"),
    "gguf, a file without its card": ("gguf", "o.gguf", "saber.checkpoint.export.export_card"),
    "gguf-lora": ("gguf-lora", "o.gguf", "gguf.GGUFWriter.write_tensors_to_file"),
}
"""Where an export is stopped: its format, its place, and what is called then."""


@pytest.mark.parametrize("what", STOPS)
def test_ctrl_c_leaves_nothing_and_says_how_to_export_again(
    capsys, made, made_gguf, tmp_path, monkeypatch, what
):
    kind, name, moment = STOPS[what]
    run, _ = made_gguf if "gguf" in kind else made
    ask = ["export", run, "--format", kind, "--partial", "--out", tmp_path / "a b" / name]
    (tmp_path / "a b").mkdir()
    record = (run / "run.json").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(moment, stop)
        code, said = failing(capsys, *ask)
    assert code == 130
    assert said.startswith("saber: interrupted. Nothing half-written was left, and the run in ")
    assert f"{run} is finished and safe there." in said
    assert not list((tmp_path / "a b").iterdir())
    assert (run / "run.json").read_bytes() == record
    command = shlex.split(said.partition("Export it again with: ")[2])
    assert command == ["saber", *map(str, ask)]
    assert main(command[1:]) == 0
    assert (tmp_path / "a b" / name).exists()


def test_ctrl_c_at_the_end_of_a_run_says_what_is_left_to_export(
    capsys, made, tmp_path, monkeypatch
):
    run, model = made

    def ends(*_args, **_kwargs):
        kinds, lm = ["merged", "lora"], load(str(model))
        list(export_all(Run.load(run), kinds, run, lm=lm, spec=LoadSpec()))

    monkeypatch.setattr("saber.pipeline.run", ends)
    with monkeypatch.context() as patched:
        patched.setattr("saber.checkpoint.lora.save_file", stop)
        code, said = failing(capsys, "run", "demo", "--out", tmp_path / "o")
    assert code == 130
    assert "Nothing half-written was left" in said
    assert "is finished and safe there." in said
    for command in said.partition("Export it again with: ")[2].split(" && "):
        assert main(shlex.split(command)[1:]) == 0
    assert (run / "adapter").is_dir()
    assert (run / "model").is_dir()


def test_commands_that_go_on_load_the_model_as_the_run_did(tmp_path):
    spec = LoadSpec(offload=True, trust_remote_code=True, chat_template="t.jinja")
    (said,) = commands(["merged"], tmp_path / "run", spec)
    arguments = build_parser().parse_args(shlex.split(said)[1:])
    assert arguments.offload
    assert arguments.trust_remote_code
    assert arguments.chat_template == "t.jinja"


def test_what_a_second_ctrl_c_leaves_is_named(capsys, made, tmp_path, monkeypatch):
    run, _ = made
    monkeypatch.setattr("saber.checkpoint.lora.save_file", stop)
    monkeypatch.setattr("saber.artifacts.shutil.rmtree", lambda *_a, **_k: None)
    said = failing(capsys, "export", run, "--format", "lora", "--out", tmp_path / "o")[1]
    assert f"{tmp_path / '.o.part'} is left of it" in said
    assert "Nothing half-written" not in said


def test_ctrl_c_elsewhere_is_no_matter_of_an_export(capsys, made, tmp_path, monkeypatch):
    """Not even where --out looks like a run that can be gone on with."""
    run, _ = made
    (tmp_path / "state.json").touch()
    monkeypatch.setattr("saber.cli.main.read_config", stop)
    said = failing(capsys, "export", run, "--format", "lora", "--out", tmp_path)[1]
    assert said == "saber: interrupted."


def test_formats_are_checked_before_a_run_begins(capsys, model_folder, tmp_path):
    ask = ("run", model_folder, "--out", tmp_path / "r", "--export")
    code, error = failing(capsys, *ask, "merged,lroa")
    assert code == 2
    assert "Did you mean 'lora'" in error
    error = failing(capsys, *ask, "merged,gguf")[1]
    assert "saber export RUN --format gguf --base FILE.gguf" in error
    assert "goes alone" in failing(capsys, *ask, "none,lora")[1]
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_a_run_leaves_what_was_asked_for(model_folder, tmp_path):
    from test_pipeline import small

    from saber.pipeline import run
    from saber.run_folder import prepare_folder

    out = tmp_path / "r"
    done = run(str(model_folder), out, small(), force=True, export=("lora", "merged"))
    assert [e["format"] for e in done.record["exports"]] == ["lora", "merged"]
    plan = EditPlan.load(out / "plan")
    loaded = Run.load(out)
    assert loaded.sketch is not None
    assert loaded.sketch.samples.keys() == plan.factors.keys()
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 2 * len(plan.factors)
    merged = transformers.AutoModelForCausalLM.from_pretrained(out / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    # The sketch is of the weights before the edit, and so is what the adapter goes onto.
    fresh = take(model, plan)
    for name, values in fresh.samples.items():
        assert torch.equal(values, loaded.sketch.samples[name])
    found = read(model, out / "adapter")(IDS).logits
    torch.testing.assert_close(found, merged(IDS).logits, rtol=1e-4, atol=1e-4)
    prepare_folder(out, overwrite=True, resume=False)
    assert not list(out.iterdir())


@pytest.mark.slow
def test_a_run_keeps_what_is_noted_while_it_exports(model_folder, tmp_path):
    from test_pipeline import small

    from saber.pipeline import Listener, run

    row = {"format": "lora", "path": "../mine", "bytes": 1, "notes": []}
    listener = Listener(on_record=lambda folder: note_export(folder, row))
    done = run(str(model_folder), tmp_path / "r", small(), force=True, listener=listener)
    for record in (done.record, artifacts.read_json(tmp_path / "r" / "run.json")):
        assert [e["path"] for e in record["exports"]] == ["../mine", "model"]


def test_embedding_and_vector_factors_have_a_place_or_a_name(tmp_path):
    model = ggufs.moe_model("qwen3_moe")
    generator = torch.Generator().manual_seed(0)
    plan = EditPlan(
        {
            "model.embed_tokens": Factor(
                torch.randn(64, 1, generator=generator),
                torch.randn(1, 300, generator=generator) * 0.01,
                None,
                1,
            ),
            "model.layers.0.input_layernorm": Factor(
                torch.randn(64, 1, generator=generator), torch.tensor([0.1]), None, 0
            ),
        }
    )
    file = ggufs.write(model, tmp_path / "p.gguf")
    run = Run.load(run_folder(tmp_path, model, file, plan, source="gguf"))
    export(run, "gguf", tmp_path / "e.gguf")
    apply(model, plan)
    wanted, found = ggufs.tensors_of(model), ggufs.weights(tmp_path / "e.gguf")
    for name in ("token_embd.weight", "blk.0.attn_norm.weight"):
        assert abs(found[name] - wanted[name]).max() < 1e-5
    with pytest.raises(export_module.UsageError, match=r"blk\.0\.attn_norm\.weight"):
        export(run, "gguf-lora", tmp_path / "l.gguf")


def during(monkeypatch, moment, work):
    """Call `work` once in the middle of something; return the list that its errors come into."""
    module, _, name = moment.rpartition(".")
    real, said = getattr(pkgutil.resolve_name(module), name), []

    def meanwhile(*args, **kwargs):
        if not said:
            said.append(None)
            try:
                work()
            except SaberError as error:
                said[0] = error
        return real(*args, **kwargs)

    monkeypatch.setattr(moment, meanwhile)
    return said


@pytest.mark.parametrize("what", [what for what in STOPS if "card" not in STOPS[what][2]])
def test_two_exports_at_once_to_one_place(made, made_gguf, tmp_path, monkeypatch, what):
    """The second is refused, and takes nothing away from the first."""
    kind, name, moment = STOPS[what]
    run = Run.load((made_gguf if "gguf" in kind else made)[0])
    spec, out = ExportSpec(partial=True), tmp_path / "at once" / name
    alone = export(run, kind, tmp_path / "alone" / name, spec)
    said = during(monkeypatch, moment, lambda: export(run, kind, out, spec))
    done = export(run, kind, out, spec)
    assert isinstance(said[0], OutputError)
    assert "another process is writing" in str(said[0])
    assert done.bytes == alone.bytes
    assert sorted(p.name for p in out.parent.rglob("*")) == sorted(
        p.name for p in (tmp_path / "alone").rglob("*")
    )


@pytest.mark.parametrize("name", ["o", "o.gguf"])
def test_an_export_that_comes_late_leaves_what_another_has_written(
    made_gguf, tmp_path, monkeypatch, name
):
    """The place was free when it began, and it had work to do before it came to write."""
    run, out, first = Run.load(made_gguf[0]), tmp_path / name, []
    real = artifacts.claimed

    def late(*args):
        if not first:
            first.append(None)
            first[0] = export(run, "gguf", out)
        return real(*args)

    with monkeypatch.context() as patched:
        patched.setattr("saber.artifacts.claimed", late)
        with pytest.raises(OutputError, match="exists already"):
            export(run, "gguf", out)
    files = {out, first[0].card} if out.is_file() else set(out.iterdir())
    assert sum(p.stat().st_size for p in files) >= first[0].bytes > 0


@pytest.mark.parametrize("name", ["o", "o.gguf"])
def test_what_a_killed_export_has_left_is_in_nobodys_way(made_gguf, tmp_path, name):
    out = tmp_path / name
    if out.suffix:
        (tmp_path / ".o.gguf.part").write_bytes(b"half")
        (tmp_path / ".o.gguf.lock").touch()
    else:
        (tmp_path / ".o.part" / "files").mkdir(parents=True)
        for left in ("lock", "half", "files/half"):
            (tmp_path / ".o.part" / left).touch()
    done = export(Run.load(made_gguf[0]), "gguf", out)
    assert done.card.exists()
    assert "half" not in {p.name for p in tmp_path.rglob("*")}
    assert not list(tmp_path.glob(".o*"))


@pytest.mark.parametrize("base", ["pico.gguf", "gone.gguf", "demo"])
@pytest.mark.parametrize("kind", ["lora", "merged"])
def test_verify_says_what_a_gguf_base_cannot_be_held_against(capsys, made, tmp_path, base, kind):
    export(Run.load(made[0]), kind, tmp_path / "x")
    base = tmp_path / base if base != "demo" else base
    code, said = failing(capsys, "verify", tmp_path / "x", "--base", base)
    assert code == 2
    assert "x carries no fingerprint that" in said
    assert "Leave --base out; --run RUN holds" in said


UNTOUCHED = "tensors without an edit have the base's bytes"
EDITED = "edited tensors are the base's with the plan's change, to rounding"


def rewritten(path, tensor, change):
    """Change the bytes of one tensor of a GGUF file, in a copy beside it."""
    whole = bytearray(path.read_bytes())
    found = open_gguf(path).tensors[tensor]
    raw = change(bytes(whole[found.offset : found.offset + found.nbytes]), found)
    whole[found.offset : found.offset + found.nbytes] = raw
    other = path.with_name("other.gguf")
    other.write_bytes(whole)
    return other


def flipped(raw, _tensor):
    return raw[:-1] + bytes([raw[-1] ^ 1])


def nudged(raw, tensor):
    """One value by three steps of its type."""
    values = decode(raw, tensor.type, tensor.shape[-1]).copy()
    values[1, 2] += 3 * abs(values[1]).max() / 127
    return encode(values, tensor.type)


@pytest.fixture
def exported_gguf(made_gguf, tmp_path):
    """A run on a GGUF file whose plan changes some of its tensors, that file, and the edited one."""
    run, file = made_gguf
    lm = load(str(file), LoadSpec(device="cpu"), tokenizer=False)
    plan = EditPlan.load(run / "plan")
    plan = EditPlan({n: f for n, f in plan.factors.items() if "o_proj" in n})
    plan_on_disk.save(run / "plan", lm, plan)
    plan.save(run / "plan", {"fingerprint": fingerprint(lm.model), "config": {"seed": 7}})
    record = artifacts.read_json(run / "run.json")
    record["model"]["fingerprint"] = fingerprint(lm.model)
    artifacts.write_json(run / "run.json", {**record, "config": {"seed": 7}})
    export(Run.load(run), "gguf", tmp_path / "x.gguf")
    return run, file, tmp_path / "x.gguf"


def failed(path, run, base):
    return {c.what: c.detail for c in verify(path, run, str(base)).checks if not c.passed}


def test_verify_holds_a_gguf_file_against_its_base_tensor_by_tensor(exported_gguf, tmp_path):
    run, file, made = exported_gguf
    assert len(verify(made, run, str(file)).checks) == 8
    assert failed(made, run, file) == {}
    for kind in ("q8_0", "f16", "bf16", "q4_0", "f32"):
        export(Run.load(run), "gguf", tmp_path / kind, ExportSpec(type=kind))
        assert failed(tmp_path / kind, run, file) == {}
    changed = "blk.0.attn_output.weight"
    other = rewritten(made, "blk.1.ffn_down.weight", flipped)
    assert failed(other, run, file) == {UNTOUCHED: "others in blk.1.ffn_down.weight"}
    assert failed(rewritten(made, changed, nudged), run, file) == {EDITED: f"others in {changed}"}
    before = open_gguf(file).tensors[changed]
    raw = file.read_bytes()[before.offset : before.offset + before.nbytes]
    left = rewritten(made, changed, lambda _raw, _tensor: raw)
    assert failed(left, run, file) == {EDITED: f"others in {changed}"}


def test_verify_finds_another_gguf_base(exported_gguf, tmp_path):
    run, _, made = exported_gguf
    again = ggufs.write(ggufs.dense_model("llama", seed=1), tmp_path / "again.gguf", "Q8_0")
    found = failed(made, run, again)
    assert set(found) == {UNTOUCHED, EDITED}
    assert found[EDITED] == "others in blk.0.attn_output.weight, blk.1.attn_output.weight"
    named = {"general.author": ("someone", gguf.GGUFValueType.STRING)}
    model = ggufs.dense_model("llama")
    other = ggufs.write(model, tmp_path / "named.gguf", "Q8_0", extra=named)
    assert failed(made, run, other) == {"metadata are the base's": "others"}
    with pytest.raises(ModelError, match="no such file"):
        verify(made, run, str(tmp_path / "gone.gguf"))


def test_verify_holds_a_gguf_file_against_its_base_without_its_run(exported_gguf, tmp_path, capsys):
    run, file, made = exported_gguf
    found = verify(made, None, str(file))
    assert [c.what for c in found.checks if c.passed] == [
        "weights carry their origin",
        "metadata are the base's",
        "tensors are the base's",
        RESEMBLE,
    ]
    assert found.unchecked == (
        "that the 2 of 21 tensors that differ do so by the plan: give --run RUN as well",
    )
    export(Run.load(run), "gguf", tmp_path / "f32", ExportSpec(type="f32"))
    assert failed(tmp_path / "f32", None, file) == {}
    # A plan is what tells a changed value from an edit; other weights show without one.
    assert failed(rewritten(made, "blk.1.ffn_down.weight", flipped), None, file) == {}
    other = rewritten(made, "blk.1.ffn_down.weight", lambda raw, _tensor: raw[::-1])
    assert failed(other, None, file) == {RESEMBLE: "unlike: blk.1.ffn_down.weight"}
    again = ggufs.write(ggufs.dense_model("llama", seed=1), tmp_path / "again.gguf", "Q8_0")
    assert failed(made, None, again)[RESEMBLE].startswith("unlike: token_embd.weight, blk.0.attn_q")
    assert set(failed(made, None, "demo")) == {"metadata are the base's", "tensors are the base's"}
    with pytest.raises(ModelError, match="no such file"):
        verify(made, None, str(tmp_path / "gone.gguf"))
    assert main(["verify", str(made), "--base", str(file)]) == 0
    assert "not checked: that the 2 of 21 tensors" in capsys.readouterr().out


RESEMBLE = "tensors that differ from the base's resemble them"
HEADER, EXACT = (
    "metadata are those of an adapter of the base",
    "tensors are the plan's, bit for bit",
)
FIT, SAMPLED = "tensors fit the base's", "the base's weights are those that the plan was made on"


@pytest.mark.parametrize("place", ["l.gguf", "l"])
def test_verify_holds_an_adapter_of_llama_cpp_against_run_and_base(exported_gguf, tmp_path, place):
    run, file, _ = exported_gguf
    made = tmp_path / place
    export(Run.load(run), "gguf-lora", made)
    found = verify(made, run, str(file))
    assert [c.what for c in found.checks][-3:] == [HEADER, EXACT, SAMPLED]
    assert (found.passed, found.unchecked) == (True, ())
    written = made if made.is_file() else next(made.glob("*.gguf"))
    changed = "blk.0.attn_output.weight.lora_b"
    other = rewritten(written, changed, flipped)
    assert failed(other, run, file) == {EXACT: f"others: {changed}"}
    assert failed(other, None, file) == {}
    other.unlink()
    again = ggufs.write(ggufs.dense_model("llama", seed=1), tmp_path / "again.gguf", "Q8_0")
    assert list(failed(made, run, again)) == [SAMPLED]
    wider = ggufs.write(ggufs.dense_model("llama", hidden=96), tmp_path / "wider.gguf", "F32")
    assert failed(made, None, wider)[FIT].startswith("others: blk.0.attn_output.weight.lora_a")
    with pytest.raises(ModelError, match="has the shape"):
        verify(made, run, str(wider))
    shutil.rmtree(run / "plan" / "sketch")
    found = verify(made, run, str(file))
    assert (found.passed, len(found.unchecked)) == (True, 1)
    assert "the run keeps no samples" in found.unchecked[0]


def test_verify_finds_an_adapter_of_llama_cpp_that_does_more(exported_gguf, tmp_path):
    """Another alpha scales the whole edit; a further key or tensor may do anything."""
    run, file, _ = exported_gguf
    base, plan = open_gguf(file), EditPlan.load(run / "plan")
    edits = changes(base, plan)
    meta = origin(Run.load(run).record, plan)

    def written(name, edits, alpha=0.0, **more):
        write_gguf_lora(base, edits, tmp_path / name, {**meta, **more})
        if alpha:
            reader = gguf.GGUFReader(tmp_path / name, "r+")
            reader.get_field("adapter.lora.alpha").parts[-1][0] = alpha
            reader.data.flush()
        return tmp_path / name

    assert failed(written("same.gguf", edits), run, file) == {}
    assert failed(written("more.gguf", edits, alpha=9.0), run, file) == {
        HEADER: "others: adapter.lora.alpha"
    }
    stem = edits[1].tensor.name
    assert failed(written("less.gguf", edits[:1]), run, file) == {
        EXACT: f"others: {stem}.lora_a, {stem}.lora_b"
    }
    down = Change(base.tensors["blk.0.ffn_down.weight"], "", edits[0].left, torch.ones(2, 1, 96))
    names = "blk.0.ffn_down.weight.lora_a, blk.0.ffn_down.weight.lora_b"
    assert failed(written("on.gguf", [*edits, down]), run, file) == {EXACT: f"others: {names}"}


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "mixtral"])
def test_an_adapter_of_llama_cpp_is_held_against_any_layout(family, tmp_path):
    """Experts, paired rows, biases that it cannot hold, and the token embedding."""
    build = ggufs.moe_model if family in ("qwen3_moe", "mixtral") else ggufs.dense_model
    model = build(family)
    file = ggufs.write(model, tmp_path / "pico.gguf", "F32")
    tokens = "transformer.wte" if family == "gpt2" else "model.embed_tokens"
    size = model.get_input_embeddings().weight.shape
    embedding = Factor(torch.randn(size[1], 2), torch.randn(2, size[0]), None, 1)
    plan = EditPlan({**random_plan(model).factors, tokens: embedding})
    edits = changes(open_gguf(file), plan)
    made = tmp_path / "l.gguf"
    write_gguf_lora(open_gguf(file), [c for c in edits if not c.bias], made, {"base": "x"})
    held = gguf_adapter(made, str(file), plan, take(model, plan))
    assert [c for c in held.checks if not c.passed] == []
    assert [c.passed for c in gguf_adapter(made, str(file), None, None).checks] == [True, True]
    assert bool(held.unchecked) == (family == "gpt2")
    for said in held.unchecked:
        assert "blk.0.attn_output.bias" in said
        assert said.endswith("which such an adapter has no place for")


@pytest.fixture
def exported_lora(made, tmp_path):
    """A run on a model's folder, that folder, and the run's adapter for PEFT."""
    run, folder = made
    lm = load(str(folder), LoadSpec(device="cpu"), tokenizer=False)
    plan = EditPlan.load(run / "plan")
    plan_on_disk.save(run / "plan", lm, plan)
    meta = {"fingerprint": fingerprint(lm.model), "config": {"seed": 7}}
    plan.save(run / "plan", meta)
    record = artifacts.read_json(run / "run.json")
    artifacts.write_json(run / "run.json", {**record, "config": {"seed": 7}})
    export(Run.load(run), "lora", tmp_path / "a")
    return run, folder, tmp_path / "a"


SETTINGS = "settings are the plan's"


def test_verify_holds_an_adapter_of_peft_against_run_and_base(exported_lora, tmp_path):
    run, folder, made = exported_lora
    found = verify(made, run, str(folder))
    assert [c.what for c in found.checks][-3:] == ["it was made from this base", SETTINGS, EXACT]
    assert (found.passed, found.unchecked) == (True, ())
    weights = made / "adapter_model.safetensors"
    whole = weights.read_bytes()
    with safe_open(weights, "pt") as file:
        name = sorted(file.keys())[-1]
        carried = file.metadata()
    tensors = load_file(weights)
    for other in (
        {**tensors, name: tensors[name] + 1},
        {n: t for n, t in tensors.items() if n != name},
    ):
        save_file(other, weights, carried)
        assert failed(made, run, folder) == {EXACT: f"others: {name}"}
    weights.write_bytes(whole)
    settings = artifacts.read_json(made / "adapter_config.json")
    for key, value in (("lora_alpha", 9), ("use_rslora", True), ("alpha_pattern", {"o_proj": 1})):
        artifacts.write_json(made / "adapter_config.json", {**settings, key: value})
        assert failed(made, run, folder) == {SETTINGS: f"others: {key}"}
    renamed = {
        **settings,
        "base_model_name_or_path": "x",
        "target_modules": settings["target_modules"][::-1],
    }
    artifacts.write_json(made / "adapter_config.json", {**renamed, "fresh": None})
    assert failed(made, run, folder) == {}
    (made / "adapter_config.json").write_text("{")
    assert "adapter_config.json" in failed(made, run, folder)[EXACT]
    (made / "adapter_config.json").unlink()
    (left,) = verify(made, run, str(folder)).unchecked
    assert "cannot be made again" in left


def test_verify_holds_an_adapter_of_peft_against_a_base_that_has_no_fingerprint(
    exported_gguf, tmp_path, monkeypatch
):
    run, file, _ = exported_gguf
    export(Run.load(run), "lora", tmp_path / "a")
    found = verify(tmp_path / "a", run, str(file))
    assert [c.what for c in found.checks][-2:] == [SETTINGS, EXACT]
    assert found.passed
    assert found.unchecked == (
        "that the base is the run's model: only a folder of safetensors files has a fingerprint",
    )
    monkeypatch.setitem(sys.modules, "peft", None)
    found = verify(tmp_path / "a", run, str(file))
    assert found.passed
    assert found.unchecked[0].startswith("that tensors are the plan's, bit for bit: this needs")


@pytest.mark.parametrize(
    ("kind", "with_run", "with_base", "left"),
    [
        (
            "merged",
            False,
            False,
            "base and plan give these very bits: give --run RUN and --base MODEL",
        ),
        ("merged", True, False, "base and plan give these very bits: give --base MODEL"),
        ("merged", False, True, "base and plan give these very bits: give --run RUN"),
        ("merged", True, True, ""),
        ("lora", False, False, "its tensors are the plan's: give --run RUN and --base MODEL"),
        ("lora", True, False, "its tensors are the plan's: give --base MODEL"),
        ("lora", True, True, ""),
        ("gguf", False, False, "against base and plan: give --run RUN and --base FILE.gguf, which"),
        ("gguf", True, False, "its tensors against base and plan: give --base FILE.gguf, which"),
        ("gguf", True, True, "its tensors against base and plan: give --base FILE.gguf, which"),
        ("gguf-lora", False, False, "the plan's: give --run RUN and --base FILE.gguf, which"),
        ("gguf-lora", True, False, "its tensors are the plan's: give --base FILE.gguf, which"),
    ],
)
def test_verify_says_in_a_line_what_it_could_not_check(
    exported_lora, capsys, tmp_path, kind, with_run, with_base, left
):
    run, folder, _ = exported_lora
    out = tmp_path / ("x.gguf" if "gguf" in kind else "x")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    spec = ExportSpec()
    if "gguf" in kind:
        spec = ExportSpec(base=str(ggufs.write(model, tmp_path / "pico.gguf", "F32")))
    export(Run.load(run), kind, out, spec)
    options = [*(["--run", run] if with_run else []), *(["--base", folder] if with_base else [])]
    assert main(["verify", str(out), *map(str, options), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["unchecked"]
    assert len(said) == bool(left)
    assert left in "".join(said)
    assert main(["verify", str(out), *map(str, options)]) == 0
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if line.startswith("not checked: ")] == [
        f"not checked: {line}" for line in said
    ]


def test_verify_says_that_weights_saved_from_memory_cannot_be_made_again(exported_lora, tmp_path):
    run, folder, _ = exported_lora
    save_merged(
        load(str(folder), LoadSpec(device="cpu")),
        EditPlan.load(run / "plan"),
        tmp_path / "m",
        {**origin(Run.load(run).record, EditPlan.load(run / "plan"))},
    )
    found = verify(tmp_path / "m", run, str(folder))
    assert found.passed
    assert len(found.unchecked) == 1
    assert "saved from memory" in found.unchecked[0]
