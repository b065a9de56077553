"""Models of the hub: what is read of them, what else is fetched, and what is told where they are closed."""

import json
from pathlib import Path

import hubs
import pytest
from conftest import CHAT_TEMPLATE, make_model, make_tokenizer
from huggingface_hub import constants, snapshot_download
from test_apply import assert_same, plan_of
from test_cli import failing
from test_export import MEASURED

from saber import artifacts
from saber.checkpoint import carry, plan_on_disk
from saber.checkpoint.apply import ApplySpec, apply_to_files
from saber.checkpoint.export import export
from saber.checkpoint.provenance import FILE
from saber.checkpoint.runs import Run
from saber.checkpoint.verification import verify
from saber.lm.load import load
from saber.lm.model import fingerprint
from saber.record import describe_model

NAME = "me/base"
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


def ran(run):
    """The run folder that a run on that model leaves, and its model in memory."""
    lm = load(NAME)
    plan, mark = plan_of(lm), fingerprint(lm.model)
    plan_on_disk.save(run / "plan", lm, plan)
    plan.save(run / "plan", {"fingerprint": mark, "config": {"seed": 7}, "saber_version": "0"})
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
        "config": {"seed": 7},
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
