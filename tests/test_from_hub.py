"""Models of the hub: what is read of them, what else is fetched, and what is told where they are closed."""

import json
import sys
from pathlib import Path

import hubs
import pytest
import torch
from conftest import CHAT_TEMPLATE, fewer_capabilities, make_model, make_tokenizer
from huggingface_hub import constants, snapshot_download
from test_apply import assert_same, plan_of
from test_cli import failing
from test_export import MEASURED
from test_pipeline import small

from saber import artifacts
from saber.checkpoint import carry, plan_on_disk
from saber.checkpoint.apply import ApplySpec, apply_to_files
from saber.checkpoint.export import ExportSpec, export
from saber.checkpoint.licence import licence
from saber.checkpoint.provenance import FILE
from saber.checkpoint.runs import Run
from saber.checkpoint.verification import verify
from saber.cli import sweep as cli_sweep
from saber.cli.main import main
from saber.config import override, preset, resolved
from saber.conversation import Partner
from saber.errors import SaberError
from saber.lm.load import LoadSpec, as_stored, load, skeleton
from saber.lm.model import fingerprint
from saber.pipeline import run
from saber.record import describe_model
from saber.sweep.journal import TRIALS, write_study

NAME, MAIN = "me/base", LoadSpec()
READ = {"preprocessor_config.json", "processing_own.py", "LICENSE", "assets/logo.svg"}
"""What transformers does not fetch of a language model, and comes along."""


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in with a model on it, and an empty cache."""
    server = hubs.Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _s: None)
    monkeypatch.setenv("HF_TOKEN", "hf_owner_secret")
    folder = tmp_path / "published"
    make_model("llama", layers=2).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    repo = server.create(NAME, private=False)
    repo.commits.append({"oid": "a" * 40})
    repo.files |= {path.name: path.read_bytes() for path in folder.iterdir()}
    repo.files |= dict.fromkeys(READ, b"read by others")
    repo.files |= {"original/consolidated.00.pth": b"weights", "README.md": b"# The base\n"}
    yield server
    server.close()


def ran(run, spec=MAIN):
    """The run folder that a run on that model leaves, and its model in memory."""
    lm = load(NAME, spec)
    plan, mark = plan_of(lm), fingerprint(lm.model)
    config = {"seed": 7, "load": {"revision": spec.revision}}
    plan_on_disk.save(run / "plan", lm, plan)
    plan.save(run / "plan", {"fingerprint": mark, "config": config, "saber_version": "0"})
    record = {
        "schema": 1,
        "saber_version": "0",
        "command": "saber run x",
        "model": {
            "name": NAME,
            "source": "hub",
            "base": NAME,
            "revision": describe_model(lm, mark)["revision"],
            "fingerprint": mark,
            "storage_dtype": "float32",
        },
        "config": config,
        "baseline": MEASURED,
        "edited": MEASURED,
    }
    artifacts.write_json(run / "run.json", record)
    return Run.load(run), lm


def files(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_what_others_read_of_a_model_comes_along(hub, tmp_path):
    """The cache holds what was read so far: no processor, no code of its own, no licence."""
    run, lm = ran(tmp_path / "run")
    done = export(run, "merged", tmp_path / "merged", lm=lm)
    made = apply_to_files(tmp_path / "run", NAME, tmp_path / "applied", ApplySpec(workers=1))
    whole = set(hub.repos[NAME].files) - {"original/consolidated.00.pth", ".gitattributes"}
    for folder in (tmp_path / "merged", tmp_path / "applied"):
        assert files(folder) == {*whole, FILE}
        assert (folder / "processing_own.py").read_bytes() == b"read by others"
        assert verify(folder).passed
    assert (done.notes, made.notes) == ((), ())
    assert not any("consolidated" in call for call in hub.calls)


def test_large_files_stay_on_the_hub_and_are_named(hub, tmp_path, monkeypatch):
    run, lm = ran(tmp_path / "run")
    hub.repos[NAME].files["assets/film.mp4"] = b"0" * 70_000
    monkeypatch.setattr(carry, "LARGEST", 60_000)
    done = export(run, "merged", tmp_path / "out", lm=lm)
    assert not (tmp_path / "out" / "assets" / "film.mp4").exists()
    assert any("assets/film.mp4" in note for note in done.notes)


@pytest.mark.parametrize("how", ["offline", "down"])
def test_without_the_hub_what_the_cache_holds_goes_along(hub, tmp_path, monkeypatch, how):
    run, lm = ran(tmp_path / "run")
    if how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        hub.refused["/tree/"] = (503, "Down")
    done = export(run, "merged", tmp_path / "out", lm=lm)
    assert not files(tmp_path / "out") & READ
    assert any(f"hf download {NAME}" in note for note in done.notes)
    assert f"hf download {NAME}" in done.card.read_text()


def test_a_later_commit_of_the_hub_is_not_mixed_in(hub, tmp_path):
    run, lm = ran(tmp_path / "run")
    hub.repos[NAME].commits.append({"oid": "b" * 40})
    done = export(run, "merged", tmp_path / "out", lm=lm)
    assert not files(tmp_path / "out") & READ
    assert any("hf download" in note for note in done.notes)


def test_a_run_stays_on_its_commit(hub, tmp_path):
    """Another program may have fetched a later one meanwhile."""
    run, lm = ran(tmp_path / "run")
    assert run.model["revision"] == "a" * 40
    export(run, "merged", tmp_path / "at once", lm=lm)
    make_model("llama", layers=2, seed=1).save_pretrained(tmp_path / "later")
    repo = hub.repos[NAME]
    repo.past["a" * 40] = dict(repo.files)
    repo.files["model.safetensors"] = (tmp_path / "later" / "model.safetensors").read_bytes()
    repo.commits.append({"oid": "b" * 40})
    assert Path(snapshot_download(NAME)).name == "b" * 40
    export(run, "merged", tmp_path / "exported")
    apply_to_files(tmp_path / "run", NAME, tmp_path / "applied", ApplySpec(workers=1))
    for folder in (tmp_path / "exported", tmp_path / "applied"):
        assert_same(folder, tmp_path / "at once")
        assert verify(folder, tmp_path / "run", NAME).passed


@pytest.mark.parametrize("file", ["chat_template.json", "processor_config.json"])
def test_a_template_that_lies_with_the_processor_is_found(hub, model_folder, file):
    """As of LLaVA and its kin, whose tokenizers have none."""
    (model_folder / "chat_template.jinja").unlink()
    (model_folder / file).write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    assert load(str(model_folder)).tokenizer.chat_template == CHAT_TEMPLATE
    held = hub.repos[NAME].files
    del held["chat_template.jinja"]
    held[file] = (model_folder / file).read_bytes()
    assert load(NAME).tokenizer.chat_template == CHAT_TEMPLATE


@pytest.mark.parametrize(
    ("status", "code", "told"),
    [
        (403, "GatedRepo", "Accept its terms on its page of the hub"),
        (401, "GatedRepo", "hf auth login"),
        (401, "RepoNotFound", "if it is private, run hf auth login"),
    ],
)
def test_what_to_do_where_a_model_is_closed_is_told(hub, capsys, status, code, told):
    hub.refused[NAME] = (status, "Closed", code)
    assert told in failing(capsys, "inspect", NAME)[1]
    assert told in failing(capsys, "diff", NAME, NAME)[1]


@pytest.fixture
def versions(hub, tmp_path):
    """Two commits of the model on the stand-in: `a`, which the tag v1 names, and main, all else."""
    make_model("llama", layers=3, seed=1).save_pretrained(tmp_path / "later")
    repo = hub.repos[NAME]
    repo.files["README.md"] = b"---\nlicense: mit\n---\n# The base\n"
    repo.past["a" * 40] = dict(repo.files)
    repo.refs["v1"] = "a" * 40
    for name in ("config.json", "model.safetensors"):
        repo.files[name] = (tmp_path / "later" / name).read_bytes()
    repo.files["chat_template.jinja"] = CHAT_TEMPLATE.replace("user", "asker").encode()
    repo.files["README.md"] = b"---\nlicense: apache-2.0\n---\n# The base\n"
    repo.commits.append({"oid": "b" * 40})
    return repo


@pytest.mark.parametrize("revision", ["v1", "a" * 40])
def test_a_revision_is_read_throughout(versions, tmp_path, revision):
    spec = LoadSpec(revision=revision)
    lm = load(NAME, spec)
    assert (len(lm.layers), lm.revision) == (2, "a" * 40)
    assert lm.tokenizer.chat_template == CHAT_TEMPLATE
    assert len(skeleton(NAME, spec).model.layers) == 2
    assert licence(NAME, "hub", revision)["license"] == "mit"
    later = load(NAME)
    assert (len(later.layers), later.revision) == (3, "b" * 40)
    assert later.tokenizer.chat_template != CHAT_TEMPLATE
    assert licence(NAME, "hub")["license"] == "apache-2.0"


def test_headers_and_a_processors_template_are_of_the_revision(versions):
    """Of a configuration without a dtype, and a tokenizer without a template."""
    past = versions.past["a" * 40]
    config = json.loads(past["config.json"])
    del config["dtype"]
    past["config.json"] = json.dumps(config).encode()
    past["processor_config.json"] = json.dumps({"chat_template": CHAT_TEMPLATE}).encode()
    del past["chat_template.jinja"]
    versions.files["model.safetensors"] = b"nothing that could be read"
    lm = load(NAME, LoadSpec(revision="v1"))
    assert lm.stored_dtype == torch.float32
    assert lm.tokenizer.chat_template == CHAT_TEMPLATE


def test_values_as_stored_are_of_the_very_commit(versions):
    lm = load(NAME, LoadSpec(revision="v1", dtype="bfloat16"))
    versions.refs["v1"] = "b" * 40  # moved meanwhile
    again = as_stored(lm, LoadSpec(revision="v1", dtype="bfloat16"))
    assert (len(again.layers), again.revision) == (2, "a" * 40)


def test_a_revision_that_is_none_is_one_line(versions, capsys):
    told = failing(capsys, "inspect", NAME, "--revision", "v9")[1]
    assert "v9" in told
    assert "--revision" in told
    assert "--revision" in failing(capsys, "inspect", f"{NAME}@v1")[1]
    assert "is empty" in failing(capsys, "inspect", NAME, "--revision", "")[1]


def test_a_revision_is_of_hub_models_alone(model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    for name in (str(model_folder), str(tmp_path / "some.gguf"), "demo"):
        for command in ("run", "sweep", "audit", "eval", "inspect", "chat"):
            more = ("--top-k", "1") if command == "sweep" else ()
            told = failing(capsys, command, name, "--revision", "v1", *more)[1]
            assert "--revision v1" in told
            assert "hub" in told


def test_what_is_made_of_a_revision_is_of_its_commit(versions, tmp_path):
    """A run names the commit; all that comes later stays on it, whatever main is by then."""
    run, _ = ran(tmp_path / "run", LoadSpec(revision="v1"))
    load(NAME)  # main is in the cache as well
    for kind in ("merged", "lora"):
        export(run, kind, tmp_path / kind)
        assert verify(tmp_path / kind, tmp_path / "run", NAME).passed
    assert artifacts.read_json(tmp_path / "merged" / "config.json")["num_hidden_layers"] == 2
    partner = Partner.of(str(tmp_path / "run"))
    assert len(partner.loaded(LoadSpec()).layers) == 2
    with pytest.raises(SaberError, match="another fingerprint.*--revision " + "a" * 40):
        partner.loaded(LoadSpec(revision="main"))
    for kind in ("merged", "lora"):
        with pytest.raises(SaberError, match="another fingerprint.*--revision " + "a" * 40):
            export(run, kind, tmp_path / "x", ExportSpec(load=LoadSpec(revision="main")))


def test_an_edit_of_an_older_version_stays_on_its_commit(versions, tmp_path):
    """Its plan does not say where factors lie in files, so the model is loaded."""
    run, _ = ran(tmp_path / "run", LoadSpec(revision="v1"))
    (tmp_path / "run" / "plan" / "disk.json").unlink()
    load(NAME)
    export(run, "merged", tmp_path / "out")
    assert artifacts.read_json(tmp_path / "out" / "config.json")["num_hidden_layers"] == 2


def test_a_runs_commit_that_is_not_cached_is_no_hindrance(versions, tmp_path):
    """Main may hold the very same weights."""
    ran(tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    path.write_text(path.read_text().replace("b" * 40, "c" * 40))
    assert len(Partner.of(str(tmp_path / "run")).loaded(LoadSpec()).layers) == 3
    export(Run.load(tmp_path / "run"), "lora", tmp_path / "lora")


def test_an_adapter_says_which_revision_it_is_for(versions, tmp_path):
    run, _ = ran(tmp_path / "run", LoadSpec(revision="v1"))
    export(run, "lora", tmp_path / "lora")
    assert f'revision="{"a" * 40}"' in (tmp_path / "lora" / "README.md").read_text()
    assert artifacts.read_json(tmp_path / "lora" / "adapter_config.json")["revision"] == "a" * 40


def test_export_refuses_a_revision_that_does_nothing(versions, tmp_path, model_folder):
    run, _ = ran(tmp_path / "run", LoadSpec(revision="v1"))
    given = LoadSpec(revision="v1")
    with pytest.raises(SaberError, match="--revision"):
        export(run, "gguf", tmp_path / "x.gguf", ExportSpec(load=given))
    with pytest.raises(SaberError, match="--revision"):
        export(run, "merged", tmp_path / "x", ExportSpec(str(model_folder), load=given))


def test_eval_holds_two_revisions_against_each_other(versions, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("SABER_CACHE", "off")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Say one.\nSay two.\n")
    words = ["eval", NAME, "--revision", "v1", "--base", f"{NAME}@main", "--json", "--limit", "2"]
    words += ["--eval-target", str(prompts), "--everyday", "none", "--max-new-tokens", "4"]
    words += ["--set", "data.battery=half", "--set", "evaluation.battery_new_tokens=4"]
    assert main(words) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["revisions"] == {NAME: "a" * 40, f"{NAME}@main": "b" * 40}
    assert len(set(record["fingerprints"].values())) == 2


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_at_a_revision"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
    version = "VERSION"
"""


def test_code_is_of_the_revision(versions, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    monkeypatch.setattr("sys.path", [*sys.path])
    for version, held in (("old", versions.past["a" * 40]), ("new", versions.files)):
        config = json.loads(held["config.json"])
        config |= {"model_type": "own_at_a_revision", "architectures": ["OwnModel"]}
        config["auto_map"] = {
            "AutoConfig": "own_code.OwnConfig",
            "AutoModelForCausalLM": "own_code.OwnModel",
        }
        held["config.json"] = json.dumps(config).encode()
        held["own_code.py"] = CODE.replace("VERSION", version).encode()
    spec = LoadSpec(revision="v1", trust_remote_code=True)
    assert skeleton(NAME, spec).version == "old"
    assert load(NAME, spec).model.version == "old"
    assert skeleton(NAME, spec).version == "old"


def test_a_run_of_a_revision_is_of_its_commit_in_all_it_leaves(versions, few, tmp_path, capsys):
    out, config = tmp_path / "run", small("orthogonal", data=few, load={"revision": "v1"})
    with fewer_capabilities():
        made = run(NAME, out, config, export=("merged",), force=True).record["model"]
    assert (made["revision"], made["layers"], made["license"]) == ("a" * 40, 2, "mit")
    assert artifacts.read_json(out / "model" / "config.json")["num_hidden_layers"] == 2
    assert verify(out / "model", out, NAME).passed
    load(NAME)
    assert main(["chat", str(out), "--prompt", "Hi", "--max-new-tokens", "4", "--json"]) == 0
    words = ["export", str(out), "--format", "lora", "--out", str(tmp_path / "lora"), "--partial"]
    assert main(words) == 0
    assert main(["apply", str(out), NAME, "--out", str(tmp_path / "applied")]) == 0
    assert_same(tmp_path / "applied", out / "model")


@pytest.mark.parametrize(
    ("given", "commit", "taken"),
    [((), "a", "a" * 40), (("--revision", "v1"), "a", "v1"), ((), "c", "")],
)
def test_a_trial_is_built_on_the_commit_that_was_swept(
    versions, tmp_path, monkeypatch, given, commit, taken
):
    """Where the cache has it; what main has by now is held against the fingerprint."""
    load(NAME, LoadSpec(revision="v1"))
    model = {"name": NAME, "revision": commit * 40, "fingerprint": "sha256:0"}
    settings = resolved(override(preset("default"), {"load": {"revision": "a-branch"}}))
    write_study(tmp_path, {"model": model, "config": settings})
    row = {"number": 1, "key": "k", "values": {}, "state": "done", "nodes": []}
    (tmp_path / TRIALS).write_text(json.dumps(row) + "\n")
    asked = []
    monkeypatch.setattr(cli_sweep, "run_command", lambda *a: asked.append(a[1].load.revision) or 0)
    words = ["run", NAME, "--from-sweep", str(tmp_path), "--trial", "1", *given]
    assert main(words) == 0
    assert asked == [taken or "a-branch"]
