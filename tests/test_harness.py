"""Tasks of lm-eval on a model in memory."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_lm
from test_cli import failing

from saber.cli.main import main
from saber.errors import DataError, MissingExtra, UsageError
from saber.evaluation.harness import load_tasks, run_tasks, task_list
from saber.lm.chat import encode

ITEMS = [
    ("Red or blue?", ["red", "blue", "neither of them"], 0),
    ("One or two?", ["one", "two"], 1),
    ("In or out?", ["in", "out", "both"], 2),
    ("Up or down?", ["up", "down"], 0),
    ("Left or right?", ["left", "right"], 1),
]
TASK = """
task: choices
dataset_path: json
dataset_kwargs:
  data_files: {{test: "{data}"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture
def task(tmp_path, monkeypatch):
    """A task on local data; its tests are skipped without the extra."""
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    data, file = tmp_path / "data.jsonl", tmp_path / "choices.yaml"
    rows = [{"q": q, "choices": c, "answer": a} for q, c, a in ITEMS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file.write_text(TASK.format(data=data))
    return file


def accuracy(lm, items):
    """The share of items whose right choice is the likeliest after the template, from plain logits."""
    right = 0
    for question, choices, answer in items:
        start = encode(lm, [question])[0].ids
        scores = []
        for choice in choices:
            tail = lm.tokenizer(choice, add_special_tokens=False).input_ids
            logits = lm.model(torch.tensor([[*start, *tail]])).logits[0, len(start) - 1 : -1]
            rows = torch.arange(len(tail))
            scores.append(float(logits.log_softmax(-1)[rows, torch.tensor(tail)].sum()))
        right += scores.index(max(scores)) == answer
    return right / len(items)


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_plain_logits_after_the_template(task, seed):
    lm = make_lm("llama", seed=seed)
    found = run_tasks(lm, load_tasks([str(task)]))["tasks"]["choices"]
    assert found["n"] == len(ITEMS)
    assert found["shots"] == 0
    assert found["metrics"]["acc"]["value"] == pytest.approx(accuracy(lm, ITEMS))
    assert found["metrics"]["acc"]["stderr"] > 0


def test_a_limit_asks_the_first_items(task, llama):
    found = run_tasks(llama, load_tasks([str(task)]), limit=2)["tasks"]["choices"]
    assert found["n"] == 2
    assert found["metrics"]["acc"]["value"] == pytest.approx(accuracy(llama, ITEMS[:2]))


def test_the_command_prints_both_models(task, capsys, model_folder):
    base = ["--base", str(model_folder), "--json"]
    assert main(["eval", str(model_folder), "--lm-eval", str(task), *base]) == 0
    record = json.loads(capsys.readouterr().out)["lm_eval"]
    assert record["baseline"] == record["edited"]
    assert record["edited"]["tasks"]["choices"]["n"] == len(ITEMS)
    assert main(["eval", str(model_folder), "--lm-eval", str(task)]) == 0
    assert "choices" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("task: [x", UsageError),
        ("nothing: 1", UsageError),
        (TASK.format(data="nowhere.jsonl"), DataError),
    ],
)
def test_a_bad_task_is_one_clear_line(task, text, error):
    task.write_text(text)
    with pytest.raises(error, match=r"choices\.yaml") as caught:
        load_tasks([str(task)])
    assert "\n" not in str(caught.value)


def test_the_bundled_example_is_whole(task, llama, monkeypatch):
    root = Path(__file__).parents[1]
    monkeypatch.chdir(root)
    found = run_tasks(llama, load_tasks(["examples/local_task/colours.yaml"]), limit=4)
    assert 0 <= found["tasks"]["colours"]["metrics"]["acc"]["value"] <= 1
    lines = (root / "examples/local_task/colours.jsonl").read_text().splitlines()
    assert len({json.loads(line)["question"] for line in lines}) == 24


def test_a_missing_extra_names_the_install_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(MissingExtra, match=r"pip install 'saber-llm\[lm-eval\]'"):
        load_tasks(["hellaswag"])


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--judge", "regex", "--judge-pattern", "x"], "--judge"),
        (["--judge-pattern", "x"], "--judge-pattern"),
        (["--target", "t.txt", "--neutral", "n.txt"], "--target"),
        (["--keep", "k.txt"], "--keep"),
        (["--lengths", "8,16"], "--lengths"),
        (["--max-new-tokens", "64"], "--max-new-tokens"),
        (["--behaviour", "lists"], "--behaviour"),
        (["--mode", "over-refusal"], "--mode"),
        (["--seed", "1"], "--seed"),
        (["--response-prefix", "x"], "--response-prefix"),
        (["--allow-unproven"], "--allow-unproven"),
        (["--set", "evaluation.battery_new_tokens=8"], "evaluation.battery_new_tokens"),
        (["--set", "judging.retries=1", "--limit", "2"], "judging.retries"),
    ],
)
def test_options_that_no_task_reads_are_refused(capsys, options, what):
    code, said = failing(capsys, "eval", "no-such-model", "--lm-eval", "a", *options)
    assert code == 2
    assert f"{what} does nothing with --lm-eval." in said
    assert "Leave it out" in said


def test_options_that_tasks_read_are_taken(capsys, tmp_path, monkeypatch):
    """What commands share in a file is no option of this one."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    file = tmp_path / "c.toml"
    file.write_text(
        '[evaluation]\njudge = "regex"\n[judging]\npattern = "x"\n[edit]\nalpha = 0.5\n'
    )
    read = ["--limit", "2", "--system", "x", "--device", "cpu", "--dtype", "float32"]
    read += ["--layers-path", "x", "--trust-remote-code", "--config", file, "--base", "no-such"]
    read += ["--set", "load.device_map=auto", "--chat-template", "x", "--json"]
    said = failing(capsys, "eval", "no-such-model", "--lm-eval", "a", *read)[1]
    assert "needs the package 'lm-eval'" in said


def test_a_missing_file_and_an_empty_list_are_refused():
    assert task_list("a, b") == ["a", "b"]
    with pytest.raises(UsageError, match=r"no task file nowhere\.yaml"):
        task_list("hellaswag,nowhere.yaml")
    with pytest.raises(UsageError, match="names no task"):
        task_list(" ,")
