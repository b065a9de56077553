"""`saber ui`: what its page shows of runs, sweeps and audits, and a run's model behind it."""

import asyncio
import json
import shutil
import socket
import sys
import threading
import urllib.request

import pytest
import torch
from gradio_client import Client
from test_audit import record as audited  # noqa: F401, a fixture
from test_report import VARIANTS, fake_run, written

from saber import conversation
from saber.ablation import EditPlan, Factor
from saber.cli import ui as command
from saber.cli.main import main
from saber.conversation import Partner
from saber.errors import MissingExtra, UsageError
from saber.evaluation.judge import named_judge
from saber.lm.generate import Completion
from saber.lm.load import LoadSpec, load
from saber.lm.model import fingerprint
from saber.report import build, write_answers
from saber.ui import build_page, frames, serve
from saber.ui.page import look
from saber.ui.talk import Talk, judge_of


@pytest.fixture(autouse=True)
def closed_loops(monkeypatch):
    """Close the event loops that gradio makes wherever none runs, and leaves open."""
    made, new = [], asyncio.new_event_loop

    def counted():
        made.append(new())
        return made[-1]

    monkeypatch.setattr(asyncio, "new_event_loop", counted)
    yield
    asyncio.set_event_loop(None)
    for loop in made:
        if not loop.is_running():
            loop.close()


WRITER = "model.layers.1.mlp.down_proj"


def components(page, kind):
    return [c["props"] for c in page.get_config_file()["components"] if c["type"] == kind]


def tabs(page):
    return [tab["label"] for tab in components(page, "tabitem")]


def saved_plan(folder, model, mark="f"):
    weight = model.get_parameter(f"{WRITER}.weight")
    left = torch.linspace(-1.0, 1.0, len(weight))[:, None]
    plan = EditPlan({WRITER: Factor(left, torch.ones(1, weight.shape[1]), None, 0)})
    plan.save(folder / "plan", {"fingerprint": mark, "config": {}, "saber_version": "0"})
    return plan


@pytest.fixture(scope="module")
def run_of(pico, tmp_path_factory):
    """The folder of a run on a pico model, with a plan and the answers to all prompts; not to be changed."""
    lm = load(str(pico))
    run = fake_run()
    mark = fingerprint(lm.model, dtype=lm.stored_dtype)
    run["model"] |= {"name": str(pico), "source": "folder", "fingerprint": mark}
    folder = written(run, tmp_path_factory.mktemp("ui") / "run")
    saved_plan(folder, lm.model, mark)
    build(folder)
    write_answers(folder, ANSWERS)
    return folder


ANSWERS = [
    {
        "set": "target",
        "id": "t-1",
        "category": "fraud",
        "prompt": "One\u2028line?",
        "before": {"label": "refusal", "excerpt": "I cannot"},
        "after": {"label": "incoherent", "excerpt": "so so so"},
    },
    {
        "set": "battery",
        "id": "b-1",
        "category": "factual_recall",
        "prompt": "Capital?",
        "before": {"correct": True},
        "after": {"correct": False},
    },
]


# What the page shows


def test_every_direction_of_every_pass_is_a_row():
    run = fake_run()
    found = frames.directions(run)
    assert len(found) == sum(len(p["candidates"]) for p in run["passes"])
    assert found["ablated"].sum() == run["directions_ablated"]
    one = run["passes"][2]["candidates"][7]
    row = found[(found["pass"] == 3) & (found["layer"] == one["layer"])]
    row = row[row["component"] == str(one["component"])]
    assert row["purity"].tolist() == [one["purity"]]
    assert row["d′"].tolist() == [one["d_prime"]]


@pytest.mark.parametrize("change", [*VARIANTS, lambda run: None])
def test_any_run_has_a_page(change, tmp_path):
    run = fake_run()
    change(run)
    page = build_page(written(run, tmp_path / "run"))
    expected = ["Report", *(["Directions"] if run["passes"] else [])]
    assert tabs(page) == [*expected, *(["Answers"] if "examples" in run else [])]
    (report,) = (c["value"] for c in components(page, "html"))
    # What models wrote is text in the report, and the report is text in the page.
    assert "<script" not in report
    assert "&amp;lt;script&amp;gt;" in report or "examples" not in run


def test_every_held_out_prompt_is_in_the_table(run_of):
    page = build_page(run_of)
    tables = components(page, "dataframe")
    assert tables[-1]["value"]["data"] == [
        ["target", "fraud", "One\u2028line?", "refusal", "incoherent", "I cannot", "so so so"],
        ["battery", "factual recall", "Capital?", "solved", "not solved", "", ""],
    ]


def test_answers_of_a_damaged_run_are_told_of(run_of, tmp_path, capsys):
    damaged = shutil.copytree(run_of, tmp_path / "run")
    (damaged / "answers.jsonl").write_text("{")
    assert main(["ui", str(damaged)]) == 2
    assert "answers.jsonl cannot be read" in capsys.readouterr().err


def test_an_audit_has_a_page(audited, tmp_path):  # noqa: F811
    (tmp_path / "audit.json").write_text(json.dumps(audited))
    page = build_page(tmp_path)
    said = [c["value"] for c in components(page, "markdown")]
    assert "How fragile some\\|model is" in said[0]
    assert any("is enough to lose half of it" in text for text in said)
    assert len(components(page, "dataframe")) == 3


def sweep_of(front, tmp_path):
    trials = [
        {
            "number": i,
            "values": {"edit.alpha": alpha},
            "state": state,
            "best": best,
            "front": best,
            "refusal": {"rate": rate, "low": 0.0, "high": 1.0, "n": 40, "successes": 1},
            "incoherent": {"rate": 0.025},
            "perplexity": 2.5,
            "accuracy": {"overall": 0.4},
            "kl": {"sequence": kl},
            "layers": 3,
            "directions": 5,
        }
        for i, (alpha, state, best, rate, kl) in enumerate(front)
    ]
    record = {
        "schema": 1,
        "kind": "sweep",
        "model": {"name": "m", "source": "hub"},
        "config": {"data": {"behaviour": "refusal"}},
        "baseline": {"perplexity": {"overall": 2.4}, "refusal": {"n": 40}},
        "trials": trials,
        "axes": {"edit.alpha": [0.5, 1.0]},
        "best": None,
        "left": 1,
    }
    (tmp_path / "sweep.json").write_text(json.dumps(record))
    return record


def test_a_sweep_has_a_page(tmp_path):
    rows = [(0.5, "done", False, 0.4, 0.01), (1.0, "done", True, 0.1, 0.02)]
    record = sweep_of([*rows, (2.0, "failed", False, 0.0, 0.0)], tmp_path)
    found = frames.settings(record)
    assert found["left, %"].tolist() == [40.0, 10.0]
    assert found["is"].tolist() == ["behind it", "best"]
    page = build_page(tmp_path)
    (table,) = components(page, "dataframe")
    assert [row[1] for row in table["value"]["data"]] == ["0", "1", "2"]


def test_the_page_asks_for_no_fonts_from_elsewhere():
    assert "http" not in json.dumps([look()._stylesheets, look()._font_css])


# The model behind it


@pytest.fixture
def asked(monkeypatch):
    """What the model was asked: messages before, prompt, and by how much the weight differs."""
    seen = []

    def generate(lm, prompts, limit, settled=None):
        weight = lm.model.get_parameter(f"{WRITER}.weight")
        changed = (weight[0, 0] - untouched[0]).item() if untouched else 0.0
        untouched.append(weight[0, 0].item())
        seen.append(([text for _, text in lm.before], *prompts, round(changed, 4)))
        return [Completion((), f" I cannot help with {len(seen)}. ")]

    untouched = []
    monkeypatch.setattr(conversation, "generate", generate)
    return seen


def test_the_edited_side_has_the_share_that_is_asked_for(run_of, asked):
    talk = Talk(Partner.of(str(run_of)), LoadSpec(), named_judge("phrases"))
    first = talk.answers("one", 1.0, 8)
    assert {who: a.label for who, a in first.items()} == dict.fromkeys(
        ("untouched", "edited"), "refusal"
    )
    # The same message with another share: the untouched model is not asked again.
    told = []
    again = talk.answers("one", 0.5, 8, on_text=lambda *part: told.append(part))
    assert told[0] == ("untouched", first["untouched"].text)
    assert again["untouched"] == first["untouched"]
    talk.answers("one", 0.0, 9)
    assert asked == [
        ([], "one", 0.0),
        ([], "one", -1.0),
        ([], "one", -0.5),
        ([], "one", 0.0),
        ([], "one", 0.0),
    ]


@pytest.mark.parametrize(("thoughts", "most", "usual"), [(False, 1024, 256), (True, 4096, 1024)])
def test_answers_behind_thoughts_have_more_room(thoughts, most, usual, run_of):
    talk = Talk(Partner.of(str(run_of)), LoadSpec(thinking=thoughts))
    (limit,) = (
        slider
        for slider in components(build_page(run_of, talk), "slider")
        if slider["label"] == "Most tokens of an answer"
    )
    assert (limit["maximum"], limit["value"]) == (most, usual)


def test_one_message_at_a_time_is_answered(run_of, monkeypatch):
    talk, inside, most = Talk(Partner.of(str(run_of)), LoadSpec()), [], []

    def generate(lm, prompts, limit, settled=None):
        inside.append(1)
        most.append(len(inside))
        threading.Event().wait(0.02)
        inside.pop()
        return [Completion((), "x")]

    monkeypatch.setattr(conversation, "generate", generate)
    threads = [threading.Thread(target=talk.answers, args=(f"{i}", 1.0, 4)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 8


def test_only_judges_at_hand_label_answers():
    run = fake_run()
    assert judge_of(run) is not None
    run["config"]["evaluation"]["judge"] = "endpoint"
    assert judge_of(run) is None
    run["config"]["evaluation"]["judge"] = "regex"
    run["config"]["judging"] = {"pattern": "@/no/such/file"}
    assert judge_of(run) is None


def test_there_is_nobody_to_talk_to_without_an_edit(tmp_path):
    with pytest.raises(UsageError, match="no run folder"):
        Talk(Partner("model"), LoadSpec())
    served = serve(written(fake_run(), tmp_path / "run"), port=None)
    try:
        assert "Talk" not in tabs(served.page)
    finally:
        served.close()


# The server


@pytest.fixture
def served(run_of, asked):
    served = serve(run_of)
    yield served
    served.close()


def test_a_conversation_over_the_wire(served, asked):
    client = Client(served.url, verbose=False)
    _, untouched, edited, *labels = client.predict("one", 50, 16, api_name="/send")
    assert [m["role"] for m in untouched] == ["user", "assistant"]
    assert "50% of the edit" in labels[1]
    assert "saber-refusal" in labels[0]
    client.predict("two", 100, 16, api_name="/send")
    assert asked[-1] == (["one", "I cannot help with 2."], "two", -1.0)
    _, untouched, edited, *_ = client.predict(0, 16, api_name="/again")
    assert len(untouched) == len(edited) == 4
    assert asked[-1] == (["one", "I cannot help with 2."], "two", 0.0)
    _, untouched, *_ = client.predict(api_name="/clear")
    assert untouched == []
    with pytest.raises(Exception, match="Nothing was asked yet"):
        client.predict(0, 16, api_name="/again")
    with pytest.raises(Exception, match="no message"):
        client.predict(" ", 100, 16, api_name="/send")


def test_answers_come_in_parts(served, monkeypatch):
    def generate(lm, prompts, limit, settled=None):
        settled("so")
        return [Completion((), "so far")]

    monkeypatch.setattr(conversation, "generate", generate)
    job = Client(served.url, verbose=False).submit("one", 100, 16, api_name="/send")
    job.result(timeout=60)
    lengths = [
        [[m["content"][0]["text"] for m in side[1:]] for side in out[1:3]] for out in job.outputs()
    ]
    assert lengths == [
        [[], []],
        [["so"], []],
        [["so far"], []],
        [["so far"], ["so"]],
        [["so far"], ["so far"]],
        [["so far"], ["so far"]],
        [["so far"], ["so far"]],
    ]


def test_what_is_wrong_with_the_model_is_shown_on_the_page(run_of, asked):
    served = serve(run_of, LoadSpec(device="gpu9"))
    try:
        client = Client(served.url, verbose=False)
        with pytest.raises(Exception, match="gpu9"):
            client.predict("one", 100, 16, api_name="/send")
    finally:
        served.close()
    assert asked == []


def test_filters_over_the_wire(served):
    client = Client(served.url, verbose=False)
    _, table = client.predict("all", 6, 23, True, "layer", api_name="/directions")
    assert len(table["data"]) == 50
    shown = client.predict("battery", "any", True, api_name="/answers")
    assert [row[2] for row in shown["data"]] == ["Capital?"]


def test_the_command_serves_until_it_is_interrupted(run_of, monkeypatch, capsys):
    pages = []

    def wait():
        (url,) = (json.loads(line)["url"] for line in capsys.readouterr().out.splitlines())
        with urllib.request.urlopen(url, timeout=10) as reply:
            pages.append(reply.read().decode())
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "wait", wait)
    assert main(["ui", str(run_of), "--json"]) == 0
    assert "SABER on pico" in pages[0]


def test_other_machines_are_told_of(run_of, monkeypatch, capsys):
    def wait():
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "wait", wait)
    assert main(["ui", str(run_of), "--host", "0.0.0.0"]) == 0
    assert "without a password" in capsys.readouterr().err
    assert main(["ui", str(run_of)]) == 0
    assert "without a password" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        (["--port", "0"], 2, "between 1 and 65535"),
        (["--host", "no such host"], 2, "there is no address"),
        (["--base", "/no/such/model"], None, ""),
    ],
)
def test_a_bad_address_is_one_line(given, code, said, run_of, capsys):
    if code is None:
        # A wrong model is told when it is loaded, as the run can be looked through without.
        serve(run_of, base=given[1]).close()
        return
    assert main(["ui", str(run_of), *given]) == code
    assert said in capsys.readouterr().err


def test_a_port_that_is_taken_is_one_line(run_of, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["ui", str(run_of), "--port", str(port)]) == 2
    assert f"cannot serve at port {port}" in capsys.readouterr().err


def test_a_folder_that_is_none_of_ours_is_one_line(tmp_path, capsys):
    assert main(["ui", str(tmp_path)]) == 2
    assert "holds no run.json" in capsys.readouterr().err
    sweep_of([(1.0, "done", True, 0.1, 0.02)], tmp_path)
    assert main(["ui", str(tmp_path), "--base", "m"]) == 2
    assert "--base needs a run folder" in capsys.readouterr().err


def test_without_gradio_the_extra_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("saber.ui")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(MissingExtra, match=r"\[ui\]"):
        import saber.ui  # noqa: F401
