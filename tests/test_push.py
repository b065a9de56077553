"""`saber push` and `--push`, against a stand-in of the hub's HTTP interface."""

import contextlib
import io
import json
import os
import pty
import shutil
import subprocess
import sys
from dataclasses import replace

import hubs
import pytest
from conftest import make_model, make_tokenizer
from huggingface_hub import constants
from test_apply import MODELS, contents, make
from test_export import run_folder
from test_export_lora import random_plan

from saber import artifacts
from saber.checkpoint.apply import ApplySpec, apply_to_files
from saber.checkpoint.card import export_card
from saber.checkpoint.export import export
from saber.checkpoint.parcel import parcel
from saber.checkpoint.push import Target, _message
from saber.checkpoint.runs import Run
from saber.checkpoint.verification import verify
from saber.cli.main import main
from saber.errors import DataError
from saber.notices import FILES, GENERIC, NARROW, WARNING, warned

TOKEN = "hf_owner_secret"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint and a run on it, to be read alone."""
    return make(tmp_path_factory.mktemp("source"), MODELS["llama"](), shard="12KB")


@pytest.fixture(scope="module")
def once(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("applied") / "pico-edited"
    apply_to_files(source.run, str(source.model), out, ApplySpec(workers=1))
    return out


@pytest.fixture
def model(once, tmp_path):
    """An edited folder that a test may change."""
    return shutil.copytree(once, tmp_path / "edited")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in that this process takes for the hub, with a token for it in the environment."""
    server = hubs.Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _s: None)
    for name in ("HF_OIDC_RESOURCE", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.close()


@pytest.fixture
def saber(capsys):
    """Run a command; return its exit code, standard output and error. No token is ever printed."""

    def call(*arguments):
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as exit_:
            code = exit_.code
        said = capsys.readouterr()
        for token in (TOKEN, "hf_reader_secret", "hf_fine_secret", "hf_wrong_secret"):
            assert token not in said.out + said.err
        assert "Traceback" not in said.err
        return code, said.out, said.err

    return call


@pytest.fixture
def refused(saber):
    """Run a command that must fail; return its exit code and its one line."""

    def call(*arguments):
        code, _, error = saber(*arguments)
        error = error.replace("[y/N] saber", "[y/N]\nsaber")  # the terminal's echo ends the line
        lines = [line for line in error.splitlines() if line.startswith("saber")]
        assert code != 0
        assert len(lines) == 1, error
        assert error.strip().endswith(lines[0])
        return code, lines[0]

    return call


@pytest.fixture
def answer(monkeypatch):
    """Sit at a terminal and give this answer."""

    def type_(text):
        terminal = io.StringIO(text)
        terminal.isatty = lambda: True
        monkeypatch.setattr(sys, "stdin", terminal)

    return type_


def pushed(folder, repo):
    """What an exported folder is on the hub: its card names the repository."""
    files = contents(folder)
    assert b'"THIS FOLDER"' in files["README.md"]
    named = files["README.md"].replace(b'"THIS FOLDER"', f'"{repo}"'.encode())
    return {**files, "README.md": named}


def held(hub, repo):
    return {n: c for n, c in hub.repos[repo].files.items() if n != ".gitattributes"}


# What is pushed, and how it can be seen


def test_a_folder_is_pushed_whole_private_and_in_one_commit(saber, hub, model):
    code, out, error = saber("push", model, "me/edited", "--yes")
    assert code == 0
    assert held(hub, "me/edited") == contents(model)
    assert hub.repos["me/edited"].private
    (commit,) = hub.repos["me/edited"].commits
    assert commit["summary"] == "base, edited by SABER 0.1.0"
    assert f"pushed: {hub.url}/me/edited\n" in out
    assert f"commit: {commit['oid']}" in out
    size = sum(map(len, contents(model).values()))
    for part in ("me/edited (new)", "private", hub.url, "as me", f"{size / 1e6:.2f} MB"):
        assert part in error
    assert f"files:  {len(contents(model))}," in error


def test_what_comes_back_from_the_hub_is_verified(hub, saber, model, source, tmp_path):
    assert saber("push", model, "me/edited", "--yes")[0] == 0
    for name, content in hub.repos["me/edited"].files.items():
        path = tmp_path / "back" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert (tmp_path / "back" / ".gitattributes").exists()
    assert verify(tmp_path / "back", source.run, str(source.model)).passed
    (tmp_path / "back" / "more.txt").write_text("x")
    assert not verify(tmp_path / "back").passed


def test_public_has_to_be_said(saber, hub, model):
    code, _, error = saber("push", model, "me/edited", "--yes", "--public")
    assert code == 0
    assert not hub.repos["me/edited"].private
    assert "PUBLIC" in error


@pytest.mark.parametrize(("name", "repo"), [("edited", "me/edited"), ("lab/edited", "lab/edited")])
def test_a_name_alone_is_ones_own(saber, hub, model, name, repo):
    assert saber("push", model, name, "--yes")[0] == 0
    assert set(hub.repos) == {repo}


def test_other_files_of_the_repository_stay_and_are_told(saber, hub, model):
    hub.create("me/edited", private=True).files |= {"README.md": b"old", "notes.md": b"mine"}
    code, _, error = saber("push", model, "me/edited", "--yes")
    assert code == 0
    assert "exists, 1 of its 3 files are replaced and the others stay" in error
    assert held(hub, "me/edited") == {**contents(model), "notes.md": b"mine"}


def test_json_holds_the_result_alone(saber, hub, model):
    code, out, _ = saber("push", model, "me/edited", "--yes", "--json")
    pushed = json.loads(out)["pushed"]
    assert code == 0
    assert pushed["url"] == f"{hub.url}/me/edited"
    assert pushed["commit"] == hub.repos["me/edited"].head
    assert pushed["files"] == len(contents(model))
    assert not pushed["public"]


# The commands that make a model


def test_apply_makes_and_pushes(saber, hub, source, tmp_path):
    out = tmp_path / "edited"
    command = ("apply", source.run, source.model, "--out", out, "--workers", "1")
    code, said, _ = saber(*command, "--push", "me/edited", "--yes", "--json")
    assert code == 0
    assert json.loads(said)["folder"] == str(out)
    assert json.loads(said)["pushed"]["repo"] == "me/edited"
    assert held(hub, "me/edited") == contents(out)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on a folder, with measurements."""
    root = tmp_path_factory.mktemp("run")
    model = make_model("llama", layers=2)
    model.save_pretrained(root / "pico")
    make_tokenizer().save_pretrained(root / "pico")
    return run_folder(root, model, root / "pico", random_plan(model))


def test_export_makes_and_pushes_an_adapter(saber, hub, run, tmp_path):
    command = ("export", run, "--format", "lora", "--out", tmp_path / "a")
    code, said, _ = saber(*command, "--push", "me/adapter", "--yes")
    assert code == 0
    assert "lora: " in said
    assert "adapter_model.safetensors" in held(hub, "me/adapter")
    assert held(hub, "me/adapter") == pushed(tmp_path / "a", "me/adapter")
    card = held(hub, "me/adapter")["README.md"].decode()
    assert 'PeftModel.from_pretrained(model, "me/adapter")' in card


def test_a_gguf_file_goes_with_its_card(hub, saber, run, tmp_path):
    import gguf

    origin = {"plan_hash": "sha256:ab", "version": "0.1.0", "base": "pico"}
    writer = gguf.GGUFWriter(tmp_path / "e.gguf", "llama")
    for name, value in origin.items():
        writer.add_string(f"saber.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    record = Run.load(run).record
    artifacts.write_text(
        tmp_path / "e.md", export_card("gguf", tmp_path / "e.gguf", record, origin)
    )
    artifacts.write_text(tmp_path / "other.txt", "mine")
    assert saber("push", tmp_path / "e.gguf", "me/gguf", "--yes")[0] == 0
    assert held(hub, "me/gguf") == {
        "e.gguf": (tmp_path / "e.gguf").read_bytes(),
        "README.md": (tmp_path / "e.md").read_bytes(),
    }


def test_of_a_run_folder_the_model_goes_and_nothing_else(hub, saber, refused, run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    assert "no edited model" in refused("push", folder, "me/x", "--yes")[1]
    export(Run.load(folder), "merged", folder / "model")
    assert saber("push", folder, "me/x", "--yes")[0] == 0
    assert held(hub, "me/x") == pushed(folder / "model", "me/x")
    assert 'AutoModelForCausalLM.from_pretrained("me/x")' in held(hub, "me/x")["README.md"].decode()
    assert "run.json" not in held(hub, "me/x")
    export(Run.load(folder), "lora", folder / "adapter")
    assert str(folder / "adapter") in refused("push", folder, "me/x", "--yes")[1]


@pytest.mark.slow
def test_in_a_terminal_the_whole_way(hub, source, tmp_path):
    """The command as a user starts it: its own process, HF_ENDPOINT, a terminal, the answer typed."""
    out = tmp_path / "edited"
    offline = {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"}
    command = [sys.executable, "-m", "saber.cli.main", "apply", str(source.run), str(source.model)]
    command += ["--out", str(out), "--workers", "1", "--push", "me/edited"]
    ours, theirs = pty.openpty()
    with contextlib.closing(os.fdopen(ours, "wb", buffering=0)) as keyboard:
        process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={k: v for k, v in os.environ.items() if k not in offline}
            | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf")},
        )
        os.close(theirs)
        keyboard.write(b"y\n")
        said, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert "Push? [y/N]" in error
    assert f"pushed: {hub.url}/me/edited" in said
    assert TOKEN not in said + error
    assert hub.repos["me/edited"].private
    assert held(hub, "me/edited") == contents(out)


# The user agrees, or nothing is sent


@pytest.mark.parametrize("typed", ["n\n", "\n", "", "yep\n"])
def test_what_is_no_yes_is_a_no(saber, hub, model, answer, typed):
    before = contents(model)
    answer(typed)
    code, out, error = saber("push", model, "me/edited")
    assert (code, out) == (1, "")
    assert f"Push it with: saber push {model} me/edited" in error
    assert hub.changing() == []
    assert contents(model) == before


def test_declined_after_an_edit_the_model_stays(saber, hub, source, answer, tmp_path):
    answer("n\n")
    out = tmp_path / "edited"
    command = ("apply", source.run, source.model, "--out", out, "--workers", "1")
    code, said, _ = saber(*command, "--push", "me/edited", "--json")
    assert code == 1
    assert json.loads(said)["pushed"] is None
    assert verify(out).passed
    assert hub.changing() == []


def test_yes_is_asked_for(saber, hub, model, answer):
    answer("y\n")
    code, _, error = saber("push", model, "me/edited")
    assert code == 0
    assert error.index("private") < error.index("Push? [y/N]")
    assert held(hub, "me/edited") == contents(model)


def test_interrupted_at_the_question(refused, hub, model, answer, monkeypatch):
    answer("")
    monkeypatch.setattr(sys.stdin, "readline", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    code, line = refused("push", model, "me/edited")
    assert code == 130
    assert "saber push" in line
    assert hub.changing() == []


def early(refused, source, tmp_path, *options, repo="me/edited"):
    """An apply whose push cannot be: refused before anything is written."""
    out = tmp_path / "early"
    found = refused("apply", source.run, source.model, "--out", out, "--push", repo, *options)
    assert not out.exists()
    assert not list(tmp_path.glob(".early*"))
    return found


def test_nobody_to_ask(refused, hub, source, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    code, line = early(refused, source, tmp_path)
    assert code == 2
    assert "--yes" in line
    assert hub.calls == []


@pytest.mark.parametrize("repo", ["a/b/c", "me/--", "./edited", "me/x y", "me/x.git"])
def test_no_name_for_a_repository(refused, hub, source, tmp_path, repo):
    code, line = early(refused, source, tmp_path, "--yes", repo=repo)
    assert code == 2
    assert "OWNER/NAME" in line
    assert hub.calls == []


def test_offline(refused, hub, source, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, line = early(refused, source, tmp_path, "--yes")
    assert code == 2
    assert "HF_HUB_OFFLINE" in line


def test_no_token(refused, hub, source, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    code, line = early(refused, source, tmp_path, "--yes")
    assert code == 2
    assert "hf auth login" in line
    assert hub.calls == []


def test_the_token_file_is_read(saber, hub, model, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text(TOKEN)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert saber("push", model, "me/edited", "--yes")[0] == 0


def test_a_token_that_the_hub_does_not_know(refused, hub, source, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_secret")
    code, line = early(refused, source, tmp_path, "--yes")
    assert code == 1
    assert "does not accept the token" in line


def test_a_token_that_can_only_read(refused, hub, source, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_reader_secret")
    assert "can only read" in early(refused, source, tmp_path, "--yes")[1]


def test_an_owner_that_is_not_the_tokens(refused, hub, source, tmp_path):
    code, line = early(refused, source, tmp_path, "--yes", repo="you/edited")
    assert code == 2
    assert "me, lab" in line


def test_a_fine_token_is_refused_by_the_hub_alone(refused, hub, model, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_fine_secret")
    line = refused("push", model, "lab/edited", "--yes")[1]
    assert "may not write to lab/edited (You have no write access)" in line
    assert "settings/tokens" in line


def test_no_connection(refused, hub, source, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    code, line = early(refused, source, tmp_path, "--yes")
    assert code == 1
    assert "no connection to http://127.0.0.1:9" in line


def test_an_answer_that_is_no_hubs(refused, hub, source, tmp_path, monkeypatch):
    monkeypatch.setattr(hubs._Handler, "_route", lambda *_: ["a portal"])
    assert "cannot be pushed" in early(refused, source, tmp_path, "--yes")[1]


def test_a_public_repository_is_never_filled_unasked(refused, saber, hub, source, model, tmp_path):
    hub.create("me/edited", private=False)
    code, line = early(refused, source, tmp_path, "--yes")
    assert code == 2
    assert "public" in line
    assert "--public" in line
    assert held(hub, "me/edited") == {}
    assert saber("push", model, "me/edited", "--yes", "--public")[0] == 0


def test_a_private_repository_is_not_opened(refused, hub, source, tmp_path):
    hub.create("me/edited", private=True)
    code, line = early(refused, source, tmp_path, "--yes", "--public")
    assert code == 2
    assert "is private" in line
    assert hub.repos["me/edited"].private


def test_made_public_while_the_model_was_edited(refused, hub, model, answer, monkeypatch):
    hub.create("me/edited", private=True)
    answer("")

    def agreed():
        hub.repos["me/edited"].private = False
        return "y\n"

    monkeypatch.setattr(sys.stdin, "readline", agreed)
    assert "is public" in refused("push", model, "me/edited")[1]
    assert held(hub, "me/edited") == {}


def test_a_hub_that_makes_it_public_all_the_same(refused, hub, model):
    hub.always_public = True
    assert "is public" in refused("push", model, "me/edited", "--yes")[1]
    assert held(hub, "me/edited") == {}
    assert hub.blobs == {}


@pytest.mark.parametrize("option", ["--public", "--yes"])
def test_options_that_go_with_push(refused, source, tmp_path, option):
    out = tmp_path / "o"
    code, line = refused("apply", source.run, source.model, "--out", out, option)
    assert code == 2
    assert f"{option} goes with --push" in line
    assert not out.exists()


def test_there_is_no_option_for_the_token(refused, hub, model):
    assert refused("push", model, "me/x", "--yes", "--token", "abc")[0] == 2


# What goes wrong on the way


@pytest.mark.parametrize("where", ["PUT /lfs/", "/commit/"])
def test_a_lost_connection_and_a_second_push(refused, saber, hub, model, where):
    hub.drops[where] = 99
    code, line = refused("push", model, "me/edited", "--yes")
    assert code == 1
    assert "connection" in line
    assert f"saber push {model} me/edited" in line
    assert held(hub, "me/edited") == {}
    hub.drops.clear()
    sent = set(hub.blobs)
    hub.calls.clear()
    assert saber("push", model, "me/edited", "--yes")[0] == 0
    assert held(hub, "me/edited") == contents(model)
    again = {c.rpartition("/")[2] for c in hub.calls if c.startswith("PUT")}
    assert not again & sent
    if where == "/commit/":
        assert again == set()


def test_a_short_loss_heals_itself(saber, hub, model):
    hub.drops["PUT /lfs/"] = 2
    assert saber("push", model, "me/edited", "--yes")[0] == 0
    assert held(hub, "me/edited") == contents(model)


@pytest.mark.parametrize("status", [400, 403, 409, 429, 500])
def test_a_refusal_is_told_without_the_token(refused, hub, model, status):
    hub.refused["/commit/"] = (status, f"no: {TOKEN} is bad")
    code, line = refused("push", model, "me/edited", "--yes")
    assert code == 1
    assert "saber push" in line
    assert ("settings/tokens" in line) == (status == 403)
    assert held(hub, "me/edited") == {}


def test_what_the_storage_says_is_told(refused, hub, model):
    hub.refused["PUT /lfs/"] = (410, "this address has expired")
    line = refused("push", model, "me/edited", "--yes")[1]
    assert "410" in line
    assert "this address has expired" in line
    assert held(hub, "me/edited") == {}


def test_what_is_wrong_with_the_card_is_told(refused, hub, model):
    hub.card_errors.append("license is unknown")
    assert "license is unknown" in refused("push", model, "me/edited", "--yes")[1]
    assert hub.blobs == {}


def test_after_an_edit_the_refusal_says_how_to_push_what_is_there(refused, hub, source, tmp_path):
    hub.refused["/commit/"] = (500, "down")
    out = tmp_path / "edited"
    command = ("apply", source.run, source.model, "--out", out, "--workers", "1")
    _, line = refused(*command, "--push", "me/edited", "--yes")
    assert f"saber push {out} me/edited" in line
    assert verify(out).passed


def flipped(_name, content):
    return bytes([content[0] ^ 1]) + content[1:]


@pytest.mark.parametrize("name", ["model-00001-of-", "config.json", "README.md"])
@pytest.mark.parametrize("changed", [flipped, lambda _n, c: c + b"x"], ids=["bit", "length"])
def test_a_hub_that_stores_something_else(refused, hub, model, name, changed):
    hub.stored = lambda n, c: changed(n, c) if n.startswith(name) else c
    code, line = refused("push", model, "me/edited", "--yes")
    assert code == 1
    assert "does not hold what was sent" in line
    assert name in line


def test_a_hub_that_leaves_a_file_out(refused, hub, model, monkeypatch):
    whole = hubs._Handler._mode
    ignore = lambda h, r, p: {**whole(h, r, p), "shouldIgnore": p == "config.json"}  # noqa: E731
    monkeypatch.setattr(hubs._Handler, "_mode", ignore)
    assert "config.json" in refused("push", model, "me/edited", "--yes")[1]


def test_nothing_new_is_no_failure(saber, hub, model):
    assert saber("push", model, "me/edited", "--yes")[0] == 0
    code, out, _ = saber("push", model, "me/edited", "--yes")
    assert code == 0
    assert len(hub.repos["me/edited"].commits) == 1
    assert hub.repos["me/edited"].head in out


# What may not be pushed


def test_no_such_path(refused, hub, tmp_path):
    assert refused("push", tmp_path / "x", "me/x", "--yes")[0] == 2
    assert hub.calls == []


def without_card(folder):
    (folder / "README.md").unlink()


def without_warning(folder):
    card = folder / "README.md"
    card.write_text(card.read_text().replace("responsible", "not responsible"))


def without_origin(folder):
    card = folder / "README.md"
    card.write_text(card.read_text().replace("sha256:", "md5:"))


def without_record(folder):
    (folder / "saber_provenance.json").unlink()
    for file in folder.glob("*.safetensors"):
        file.unlink()


def other_weights(folder):
    first, second = sorted(folder.glob("model-*"))[:2]
    shutil.copy(second, first)
    for file in folder.glob("model-*"):
        file.write_bytes(file.read_bytes()[:-4])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (without_card, "no card"),
        (without_warning, "lost SABER's warning"),
        (without_origin, "neither the plan nor the base"),
        (without_record, "no provenance"),
        (other_weights, "another's or missing"),
    ],
)
def test_an_edited_model_goes_with_warning_and_provenance(refused, hub, model, damage, said):
    damage(model)
    code, line = refused("push", model, "me/edited", "--yes")
    assert code == 2
    assert said in line
    assert hub.changing() == []


def test_a_model_that_saber_did_not_write(refused, hub, source):
    assert "no provenance" in refused("push", source.model, "me/edited", "--yes")[1]


def test_a_card_may_be_added_to(saber, hub, model):
    card = model / "README.md"
    text = card.read_text().replace("whoever publishes", "whoever\n> publishes")
    card.write_text(text + "\n## My words\n")
    assert saber("push", model, "me/edited", "--yes")[0] == 0


def test_hidden_files_stay_unless_the_record_names_them(model):
    for name in (".env", ".cache/huggingface/x", ".git/config", "sub/.secret", ".gitattributes"):
        path = model / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    files = set(parcel(model).files)
    assert {f for f in files if ".env" in f or f == "x" or "secret" in f or ".git/" in f} == set()
    assert ".gitattributes" in files
    record = json.loads((model / "saber_provenance.json").read_text())
    record["files"][".env"] = {"sha256": "0", "size": 1}
    (model / "saber_provenance.json").write_text(json.dumps(record))
    assert ".env" in parcel(model).files


def test_a_file_that_is_no_gguf(model):
    with pytest.raises(DataError, match="gguf file"):
        parcel(model / "config.json")


@pytest.mark.parametrize("notice", [WARNING, NARROW, GENERIC, FILES])
def test_every_notice_is_known_again(notice):
    assert warned(f"# A model\n\n> [!WARNING]\n> {notice}\n")
    assert not warned(notice[:-20])


@pytest.mark.parametrize(
    ("base", "named"),
    [
        ("Qwen/Qwen3", "Qwen/Qwen3"),
        ("/home/me/qwen/", "qwen"),
        ("./qwen", "qwen"),
        ("demo", "demo"),
    ],
)
def test_the_message_names_no_folder_of_this_machine(base, named, model):
    files = replace(parcel(model), origin={"base": base, "version": "1"})
    assert _message(files) == f"{named}, edited by SABER 1"


def test_a_target_holds_no_token():
    assert not {"token"} & set(Target.__dataclass_fields__)
