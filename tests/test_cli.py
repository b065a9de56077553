"""Bad input: one clear line, a non-zero exit, nothing half-written."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_tokenizer

from saber import __version__
from saber.cli.console import console, note
from saber.cli.main import main
from saber.cli.progress import listening
from saber.cli.tables import result_rows, results_table
from saber.config import PRESETS, override, preset
from saber.gathering import gather
from saber.lm.load import load
from saber.lm.model import fingerprint
from saber.sweep.journal import KIND


def failing(capsys, *arguments):
    """Run a command that must fail; return its exit code and its one line."""
    try:
        code = main([str(a) for a in arguments])
    except SystemExit as exit_:
        code = exit_.code
    error = capsys.readouterr().err
    said = [line for line in error.splitlines() if line.startswith("saber")]
    assert code != 0
    assert "Traceback" not in error
    assert len(said) == 1, error
    assert error.strip().endswith(said[0])
    return code, said[0]


def lines(path, rows):
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


MANY = [f"Tell me about number {i}" for i in range(40)]
OTHERS = [f"Describe the letter {i}" for i in range(40)]


def test_no_such_model(capsys, tmp_path):
    code, error = failing(capsys, "run", "./nothing-here", "--out", tmp_path / "o")
    assert code == 2
    assert "no such model" in error


def test_hub_id_that_cannot_be_reached(capsys, tmp_path):
    code, error = failing(capsys, "run", "nobody/nothing", "--out", tmp_path / "o")
    assert code == 2
    assert "nobody/nothing" in error


def test_missing_gguf(capsys, tmp_path):
    assert "no such file" in failing(capsys, "inspect", tmp_path / "x.gguf")[1]


def test_folder_without_configuration(capsys, tmp_path):
    assert "no config.json" in failing(capsys, "inspect", tmp_path)[1]


def test_folder_without_weights(capsys, model_folder):
    (model_folder / "model.safetensors").unlink()
    assert "no weights" in failing(capsys, "inspect", model_folder)[1]


def test_folder_without_tokenizer(capsys, model_folder):
    for file in model_folder.glob("tokenizer*"):
        file.unlink()
    assert (
        "no tokenizer"
        in failing(capsys, "run", model_folder, "--out", model_folder.parent / "o")[1]
    )


def test_truncated_weights(capsys, model_folder):
    file = model_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    assert "cannot read the weights" in failing(capsys, "inspect", model_folder)[1]


def test_a_device_without_memory_left_is_one_line(capsys, model_folder, monkeypatch):
    def full(*_a, **_k):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr("saber.inspection.shares_left", full)
    code, error = failing(capsys, "inspect", model_folder)
    assert code == 1
    assert "no memory left" in error
    assert "--device-map auto" in error
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", full)
    code, error = failing(capsys, "inspect", model_folder)
    assert (code, "--device-map auto" in error, "the hub" in error) == (2, True, False)


def test_no_chat_template_says_how_to_pass_one(capsys, tmp_path):
    folder = tmp_path / "plain"
    make_model("llama").save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    assert "--chat-template" in failing(capsys, "run", folder, "--out", tmp_path / "o")[1]


def test_encoder_only_model(capsys, tmp_path):
    import transformers

    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=400,
    )
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    make_tokenizer().save_pretrained(tmp_path / "bert")
    assert "not a causal" in failing(capsys, "inspect", tmp_path / "bert")[1]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (None, "no prompt file"),
        (b"", "t.txt"),
        (b"one\ntwo\nthree", "splits need"),
        (b"caf\xe9 \xff\n" * 30, "UTF-8"),
    ],
)
def test_bad_target_files(capsys, tmp_path, content, what):
    target = tmp_path / "t.txt"
    if content is not None:
        target.write_bytes(content)
    neutral = lines(tmp_path / "n.txt", OTHERS)
    out = tmp_path / "o"
    code, error = failing(
        capsys, "run", "demo", "--target", target, "--neutral", neutral, "--out", out
    )
    assert code == 2
    assert what in error
    assert not out.exists()


def test_same_prompt_in_both_sets(capsys, tmp_path):
    target, neutral = (
        lines(tmp_path / "t.txt", MANY),
        lines(tmp_path / "n.txt", [*OTHERS, "tell me about NUMBER 7!"]),
    )
    error = failing(
        capsys, "run", "demo", "--target", target, "--neutral", neutral, "--out", tmp_path / "o"
    )[1]
    assert "number 7" in error.lower()


def test_target_without_neutral(capsys, tmp_path):
    target = lines(tmp_path / "t.txt", MANY)
    assert (
        "go together"
        in failing(capsys, "run", "demo", "--target", target, "--out", tmp_path / "o")[1]
    )


def test_unwritable_out(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert failing(capsys, "run", "demo", "--out", tmp_path / "file" / "o")[0] == 2


def test_out_that_is_not_empty(capsys, tmp_path):
    (tmp_path / "x").write_text("")
    assert "--overwrite" in failing(capsys, "run", "demo", "--out", tmp_path)[1]


def test_unknown_names_suggest_the_nearest(capsys, tmp_path):
    assert (
        "'card'" in failing(capsys, "run", "demo", "--preset", "crad", "--out", tmp_path / "o")[1]
    )
    assert (
        "edit.alpha"
        in failing(capsys, "run", "demo", "--set", "edit.alfa=1", "--out", tmp_path / "o")[1]
    )
    assert (
        "NAME=VALUE" in failing(capsys, "run", "demo", "--set", "alpha", "--out", tmp_path / "o")[1]
    )
    assert (
        "unknown format"
        in failing(capsys, "run", "demo", "--export", "gguff", "--out", tmp_path / "o")[1]
    )


@pytest.mark.parametrize("seed", ["-1", "99999999999999999999"])
def test_seeds_out_of_range(capsys, tmp_path, seed):
    out = tmp_path / "o"
    said = failing(capsys, "run", "demo", "--seed", seed, "--out", out)[1]
    assert "between 0 and 2147483647" in said
    axis = ("--preset", "card", "--axis", f"seed={seed},0")
    assert "between 0 and 2147483647" in failing(capsys, "sweep", "demo", *axis, "--out", out)[1]
    assert "2147483647" in failing(capsys, "diff", "a", "b", "--seed", seed)[1]
    assert not out.exists()


@pytest.mark.parametrize("value", ["5", '["card"]', "{ name = 1 }"])
def test_a_preset_that_is_no_name(capsys, tmp_path, value):
    file = lines(tmp_path / "c.toml", [f"preset = {value}"])
    code, said = failing(capsys, "run", "demo", "--config", file, "--out", tmp_path / "o")
    assert code == 2
    assert "setting preset needs one name" in said
    assert "card, default, orthogonal" in said


@pytest.mark.parametrize("device", ["xpu", "meta", "hpu", "cuda:99", "mps"])
def test_devices_that_are_not_here(capsys, model_folder, device):
    assert "not available here" in failing(capsys, "inspect", model_folder, "--device", device)[1]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--judge-pattern", "^x"], "--judge-pattern does nothing with --judge phrases"),
        (["--judge", "regex", "--judge-pattern", "x", "--judge-url", "u"], "--judge endpoint"),
        (["--set", "judging.retries=1"], "judging.retries does nothing"),
        (["--lambda", "3", "--preset", "card"], "It goes with --edit selective"),
        (["--edit", "orthogonal", "--set", "edit.sensitivity=1"], "goes with --edit selective"),
        (["--scope", "all"], "--scope does nothing with --edit selective"),
    ],
)
def test_options_that_do_nothing(capsys, tmp_path, options, what):
    assert what in failing(capsys, "run", "demo", "--out", tmp_path / "o", *options)[1]
    code, said = failing(capsys, "eval", "no-such-model", *options)
    assert code == 2
    judged = "--judge" in what or "judging" in what
    assert (what in said) if judged else ("does nothing" not in said)


def test_edits_are_no_business_of_eval(capsys):
    for option in ("--preset", "--edit", "--lambda", "--top-k", "--alpha", "--passes", "--scope"):
        assert "unrecognized arguments" in failing(capsys, "eval", "demo", option, "1")[1]


@pytest.mark.parametrize("command", ["eval", "inspect", "chat", "export"])
def test_what_edits_nothing_takes_no_option_of_edits(capsys, command):
    more = ("--format", "lora", "--out", "o") if command == "export" else ()
    code, said = failing(capsys, command, "no-such-model", *more, "--allow-unproven")
    assert code == 2
    assert f"--allow-unproven does nothing with saber {command}" in said
    assert "saber run and saber sweep" in said
    assert "--allow-unproven" not in helped(capsys, command)


def test_settings_of_edits_are_no_business_of_eval(capsys, tmp_path):
    for setting in ("edit.alpha=0.5", "refine.passes=2", "load.allow_unproven=true"):
        said = failing(capsys, "eval", "no-such-model", "--set", setting)[1]
        assert "does nothing with saber eval" in said
    file = lines(tmp_path / "c.toml", ["[edit]", "alpha = 0.5", "[load]", "allow_unproven = true"])
    ask = ("--config", file, "--set", "evaluation.battery_new_tokens=8", "--seed", "1")
    assert "no such model" in failing(capsys, "eval", "no-such-model", *ask)[1]


def test_axes_that_do_nothing(capsys, tmp_path):
    ask = ("sweep", "demo", "--out", tmp_path / "o", "--axis", "edit.lambda=1,2")
    said = failing(capsys, *ask, "--preset", "card")[1]
    assert "--lambda does nothing with --edit orthogonal" in said
    kinds = ("--axis", "edit.kind=selective,orthogonal", "--trials", "-1")
    assert "does nothing" not in failing(capsys, *ask, *kinds)[1]


def test_settings_at_their_default_do_not_count(capsys, tmp_path):
    """Here the prompts are not to be found, which is told later."""
    file = lines(
        tmp_path / "c.toml", ["[edit]", 'scope = "nearest"', "[judging]", "threshold = 0.5"]
    )
    ask = ("run", "demo", "--config", file, "--target", "none.txt", "--neutral", "none.txt")
    assert "no prompt file" in failing(capsys, *ask, "--out", tmp_path / "o")[1]
    assert "no prompt file" in failing(capsys, *ask, "--lambda", "0", "--edit", "orthogonal")[1]


def test_a_type_goes_with_gguf_alone(capsys, tmp_path):
    ask = ("export", tmp_path, "--type", "q4_0", "--out", tmp_path / "o", "--format")
    assert "--format gguf" in failing(capsys, *ask, "merged")[1]


def helped(capsys, *command):
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    return " ".join(capsys.readouterr().out.split())


def test_help_says_what_the_presets_have(capsys):
    said = helped(capsys, "run")
    plain, orthogonal, card = (PRESETS[name] for name in ("default", "orthogonal", "card"))
    assert orthogonal.refine.top_k == card.refine.top_k
    assert orthogonal.edit.alpha == plain.edit.alpha
    assert {p.edit.scope for p in PRESETS.values()} == {plain.edit.scope}
    passes = [p.refine.passes for p in (plain, orthogonal, card)]
    for text in (
        f"(default: {plain.refine.top_k}; orthogonal, card: {card.refine.top_k})",
        f"(default: {plain.edit.alpha:g}; card: {card.edit.alpha:g})",
        "(default: {}; orthogonal: {}; card: {})".format(*passes),
        f"own, nearest, upstream or all (default: {plain.edit.scope})",
        f"length of judged answers (default: {plain.evaluation.max_new_tokens})",
        f"of splits, nulls and bootstraps (default: {plain.seed})",
        f"(default: {plain.preset})",
    ):
        assert text in said


@pytest.mark.parametrize(
    "command", ["run", "sweep", "eval", "inspect", "chat", "export", "apply", "verify", "diff"]
)
def test_what_an_option_takes_is_a_word(capsys, command):
    names = re.findall(r"--[a-z-]+ ([A-Z][A-Z_]*)", helped(capsys, command))
    assert not [name for name in names if "_" in name]


def test_retain_without_categories(capsys, tmp_path):
    target, neutral = lines(tmp_path / "t.txt", MANY), lines(tmp_path / "n.txt", OTHERS)
    ask = ("run", "demo", "--target", target, "--neutral", neutral, "--out", tmp_path / "o")
    said = failing(capsys, *ask, "--retain", "weapons")[1]
    assert "these targets have none" in said
    assert "column category" in said


def test_wrong_use_of_the_command_line(capsys):
    assert failing(capsys, "rum")[0] == 2
    assert failing(capsys, "run")[0] == 2


def test_a_model_that_hardly_refuses_exits_3(capsys, model_folder, tmp_path):
    code, error = failing(
        capsys,
        "run",
        model_folder,
        "--out",
        tmp_path / "o",
        "--limit",
        2,
        "--max-new-tokens",
        4,
        "--json",
    )
    assert code == 3
    assert "nothing was edited" in error


def test_inspect_json_is_the_contract(capsys, model_folder):
    assert main(["inspect", str(model_folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["proved"] is True
    assert report["layers"] == 4
    assert set(report["writers"][0]) >= {"name", "layer", "kind", "axis", "gain"}
    assert set(report["laws"]) == {"zeroed", "ablated"}


@pytest.mark.slow
def test_run_chat_and_report_end_to_end(capsys, few, model_folder, tmp_path):
    out = tmp_path / "run"
    options = [
        "--force",
        "--limit",
        "3",
        "--max-new-tokens",
        "4",
        "--passes",
        "1",
        "--set",
        "refine.max_q=1",
        "--set",
        "evaluation.battery_new_tokens=4",
        "--set",
        "entanglement.weight=0",
        "--set",
        "refine.shortlist=0",
        "--set",
        "refine.stop=never",
        *(f"--{name}={file}" for name, file in few.items()),
    ]
    (model_folder / "README.md").write_text("---\nlicense: mit\n---\n# The base\n")
    assert main(["run", str(model_folder), "--out", str(out), *options]) == 0
    printed = capsys.readouterr().out
    assert "refusal (target)" in printed
    for card in (out / "README.md", out / "model" / "README.md"):
        assert "license: mit" in card.read_text()
    for name in (
        "run.json",
        "README.md",
        "report.html",
        "plan/tensors.safetensors",
        "model/config.json",
    ):
        assert (out / name).is_file(), name
    assert list((out / "plots").glob("*.png"))
    assert list((out / "plots").glob("*.svg"))
    capsys.readouterr()
    assert (
        main(
            ["chat", str(out), "--compare", "--prompt", "hello", "--max-new-tokens", "4", "--json"]
        )
        == 0
    )
    assert set(json.loads(capsys.readouterr().out)) == {"prompt", "untouched", "edited"}
    assert (
        main(["chat", str(out / "model"), "--prompt", "hello", "--max-new-tokens", "4", "--json"])
        == 0
    )
    capsys.readouterr()
    assert main(["verify", str(out), "--base", str(model_folder), "--json"]) == 0
    checks = {check["what"] for check in json.loads(capsys.readouterr().out)["checks"]}
    assert {"the plan is the run's", "it was made from this base"} <= checks
    assert (
        "with --base" in failing(capsys, "chat", out, "--base", out / "model", "--prompt", "x")[1]
    )
    assert main(["report", str(out), "--json"]) == 0
    assert (
        main(
            [
                "eval",
                str(out / "model"),
                "--base",
                str(model_folder),
                "--limit",
                "2",
                "--max-new-tokens",
                "4",
                "--set",
                "evaluation.battery_new_tokens=4",
                "--json",
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["edited"]["kl"]["sequence"] > 0


@pytest.mark.slow
def test_eval_alone_shows_what_it_measured_and_how_to_do_so_again(capsys, model_folder, tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text("\n".join(f"Tell me fact number {i} about Norway." for i in range(30)))
    options = ["--limit", "2", "--max-new-tokens", "4", "--lengths", "2,4", "--seed", "3"]
    options += ["--set", "evaluation.battery_new_tokens=4", "--keep", str(mine)]
    command = ["eval", str(model_folder), *options]
    assert main([*command, "--json"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["fingerprints"] == {str(model_folder): fingerprint(load(str(model_folder)).model)}
    assert record["config"]["seed"] == 3
    assert record["config"]["evaluation"]["lengths"] == [2, 4]
    assert record["config"]["load"]["system"] == ""
    assert record["saber_version"] == __version__
    assert {"torch", "transformers", "python", "started"} <= set(record["environment"])
    held = gather(override(preset("default"), {"seed": 3, "data": {"limit": 2}})).reporting
    for kind in ("target", "neutral", "borderline", "everyday", "battery"):
        row, some = record["prompts"][kind], getattr(held, kind)
        assert (row["name"], row["n"]) == (some.name, 2)
        assert row["fingerprint"] == some.fingerprint()
    (kept,) = record["prompts"]["kept"]
    assert (kept["name"], kept["n"]) == ("mine/heldout", 2)
    rows = result_rows(record["measured"], None)
    assert not [row for row in rows if "KL" in row[0] or "median" in row[0]]
    assert [row for row in rows if row[0] == "perplexity, answers"]
    both = [row[0] for row in result_rows(record["measured"], record["measured"])]
    assert "KL, sequence (nats)" in both
    assert "  KL, sequence (mine)" in both


def test_compare_needs_a_run(capsys, model_folder):
    assert "run folder" in failing(capsys, "chat", model_folder, "--compare", "--prompt", "x")[1]


def test_chat_takes_the_runs_system_prompt_unless_one_is_given(monkeypatch, tmp_path):
    from saber import conversation
    from saber.ablation import EditPlan
    from saber.errors import ModelError

    seen = []

    def loaded(name, spec):
        seen.append((name, spec.system))
        raise ModelError("that is enough")

    model = {"name": "m", "fingerprint": "f"}
    record = {"model": model, "config": {"load": {"system": "be brief"}}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    monkeypatch.setattr(conversation.EditPlan, "load", lambda _folder: EditPlan())
    monkeypatch.setattr(conversation, "load", loaded)
    for options in ([], ["--system", "be long"]):
        assert main(["chat", str(tmp_path), "--prompt", "x", *options]) == 2
    assert seen == [("m", "be brief"), ("m", "be long")]


def test_the_package_runs_as_the_command():
    command = [sys.executable, "-m", "saber", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, f"saber {__version__}"), done.stderr


UNKNOWN = "~nobody-of-that-name/x"


@pytest.mark.parametrize(
    "command",
    [
        ["inspect", UNKNOWN],
        ["diff", UNKNOWN, UNKNOWN],
        ["run", "demo", "--target", f"{UNKNOWN}.txt", "--neutral", "n.txt"],
        ["run", "demo", "--judge", "regex", "--judge-pattern", f"@{UNKNOWN}"],
    ],
)
def test_the_home_of_an_unknown_user_is_a_path_that_is_not_there(capsys, tmp_path, command):
    out = ["--out", tmp_path / "o"] if command[0] == "run" else []
    assert "~nobody" in failing(capsys, *command, *out)[1]


@pytest.mark.parametrize(
    "option", ["--target", "--keep", "--retain", "--lengths", "--chat-template", "--everyday"]
)
def test_an_option_that_names_nothing_is_not_left_out_without_a_word(capsys, tmp_path, option):
    code, error = failing(capsys, "run", "demo", option, "", "--out", tmp_path / "o")
    assert (code, f"{option} is empty" in error) == (2, True)


def test_a_base_without_a_name_is_told(capsys):
    assert "name of the base is empty" in failing(capsys, "eval", "demo", "--base", "")[1]


def test_overwrite_and_resume_exclude_each_other(capsys, tmp_path):
    both = ("--overwrite", "--resume", "--out", tmp_path / "o")
    for command in ("run", "sweep", "audit"):
        assert "exclude each other" in failing(capsys, command, "demo", *both)[1]


def test_arguments_that_are_no_text_are_told(capsys, tmp_path):
    code, error = failing(capsys, "chat", "demo", "--prompt", "caf\udce9")
    assert (code, "is not UTF-8" in error) == (2, True)


def test_what_looks_like_markup_is_printed_as_it_is(capsys, model_folder):
    odd = model_folder.parent / "[" / "red] [" / "b] :smile:"
    odd.parent.mkdir(parents=True)
    model_folder.rename(odd)
    assert main(["diff", str(odd), str(odd), "--plot", str(odd.parent / "p.svg")]) == 0
    assert "[/red] [/p.svg" in capsys.readouterr().out.replace("\n", "")
    assert main(["chat", str(odd), "--prompt", "x", "--max-new-tokens", "4"]) == 0
    number = {"rate": 0.5, "low": 0.1, "high": 0.9}
    console().print(note("[/x]"), results_table(measured_with(number), None, 4, "[/b] :smile:"))
    assert "[/b] :smile: (target)" in capsys.readouterr().out
    with listening(console(stderr=True)) as listener:
        listener.on_stage("measuring [/x]")
        assert list(listener.progress([1], "[/x]", 1)) == [1]
    assert "measuring [/x]" in capsys.readouterr().err


def measured_with(number):
    """As much of a measurement as the table shows."""
    one = {"overall": 1.0, "by_category": {}}
    names = ("refusal", "refusal_seen", "refusal_unseen", "incoherent")
    return {
        **dict.fromkeys(names, number),
        "over_refusal": {"borderline": number, "neutral": number},
        "perplexity": {**one, "prompt_text": one},
        "accuracy": {**one, "low": 0.1, "high": 0.9},
    }


def test_an_encoding_that_lacks_a_character_is_no_traceback(monkeypatch, model_folder):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setenv("COLUMNS", "30")
    assert main(["inspect", str(model_folder)]) == 0
    sys.stdout.flush()
    assert b"?" in written.getvalue()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_standard_output_that_is_full_is_one_line(model_folder):
    command = [sys.executable, "-m", "saber", "inspect", str(model_folder), "--json"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "saber: No space left on device.\n")


def test_a_closed_standard_input_is_no_traceback(capsys, monkeypatch, model_folder):
    monkeypatch.setattr(sys, "stdin", None)
    assert "--yes" in failing(capsys, "push", model_folder, "me/x")[1]
    assert main(["chat", str(model_folder), "--max-new-tokens", "4"]) == 0


def test_a_message_that_is_no_text_is_told(capsys, monkeypatch, model_folder):
    for errors in ("surrogateescape", "strict"):
        typed = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8", errors=errors)
        monkeypatch.setattr(sys, "stdin", typed)
        assert "not UTF-8" in failing(capsys, "chat", model_folder, "--max-new-tokens", "4")[1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": "4"}, "expected int, got str"),
        ({"num_attention_heads": 3}, "not a multiple"),
    ],
)
def test_a_configuration_that_does_not_hold_together(capsys, model_folder, change, said):
    file = model_folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    code, error = failing(capsys, "inspect", model_folder)
    assert (code, said in error) == (2, True), error


def test_a_chat_template_that_cannot_be_read(capsys, model_folder):
    ask = ("chat", model_folder, "--prompt", "x", "--chat-template")
    assert "template none.jinja: No such file" in failing(capsys, *ask, "none.jinja")[1]
    odd = model_folder / "odd.jinja"
    odd.write_bytes(b"\xff")
    assert "it is not UTF-8. Give a Jinja file" in failing(capsys, *ask, odd)[1]


def test_a_base_of_another_size_is_told(capsys, model_folder, few, tmp_path):
    wide = tmp_path / "wide"
    make_model("llama", d_model=64).save_pretrained(wide)
    make_tokenizer().save_pretrained(wide)
    small = ["--limit", "2", "--max-new-tokens", "4", "--set", "evaluation.battery_new_tokens=4"]
    code, error = failing(capsys, "eval", model_folder, "--base", wide, *small)
    assert (code, "no edit of --base" in error) == (2, True)


@pytest.mark.parametrize("lacks", ["model", "config"])
def test_a_sweep_whose_study_is_of_another_form(capsys, tmp_path, lacks):
    study = {"kind": KIND, "schema": 1, "model": {}, "config": {}}
    (tmp_path / "study.json").write_text(json.dumps({**study, lacks: "x"}))
    ask = ("run", "demo", "--from-sweep", tmp_path, "--trial", "1", "--out", tmp_path / "o")
    assert f"lacks {lacks}" in failing(capsys, *ask)[1]
