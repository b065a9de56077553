"""`saber chat`: a conversation in a terminal, single messages elsewhere."""

import io
import json
import sys
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from saber import conversation
from saber.ablation import EditPlan, Factor
from saber.cli.main import main
from saber.lm.chat import encode
from saber.lm.generate import Completion


def plan_for(lm):
    name = "model.layers.1.mlp.down_proj"
    weight = lm.model.get_parameter(f"{name}.weight")
    return EditPlan(
        {name: Factor(torch.ones(len(weight), 1), torch.ones(1, weight.shape[1]), None, 0)}
    )


@pytest.fixture
def asked(monkeypatch, llama):
    """What the model was asked: messages before, prompt, and whether it was edited."""
    seen = []
    untouched = llama.model.get_parameter("model.layers.1.mlp.down_proj.weight").clone()

    def generate(lm, prompts, limit, settled=None):
        weight = lm.model.get_parameter("model.layers.1.mlp.down_proj.weight")
        edited = not torch.equal(weight, untouched)
        seen.append((lm.before, *prompts, edited))
        return [Completion((), f" {'E' if edited else 'U'}{len(seen)} ")]

    monkeypatch.setattr(conversation, "generate", generate)
    monkeypatch.setattr(conversation, "load", lambda _name, _spec: llama)
    partner = conversation.Partner("run", plan_for(llama))
    monkeypatch.setattr(conversation.Partner, "of", lambda _name, _base: partner)
    return seen


def type_in(monkeypatch, lines, terminal=True):
    given = iter(lines)

    def typed(_console, _mark=""):
        try:
            return next(given)
        except StopIteration as end:
            raise EOFError from end

    monkeypatch.setattr(Console, "input", typed)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: terminal, raising=False)


def test_in_a_terminal_each_model_remembers_its_own_answers(asked, monkeypatch, capsys):
    type_in(monkeypatch, ["one", "  ", "two", "/new", "three"])
    assert main(["chat", "run", "--compare", "--json"]) == 0
    assert asked == [
        ((), "one", False),
        ((), "one", True),
        ((("user", "one"), ("assistant", "U1")), "two", False),
        ((("user", "one"), ("assistant", "E2")), "two", True),
        ((), "three", False),
        ((), "three", True),
    ]
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line[0] == "{"]
    assert rows[1] == {"prompt": "two", "untouched": "U3", "edited": "E4"}


@pytest.mark.parametrize(
    ("answer", "remembered"),
    [
        ("[THINK]Tea, then.[/THINK]Drink tea.", "Drink tea."),
        ("<|channel|>analysis<|message|>Hm.assistant<|channel|>final<|message|>Yes.", "Yes."),
        ("[THINK]Tea, then", "\u2026"),
        ("Drink tea.", "Drink tea."),
    ],
)
def test_what_a_model_thought_is_shown_and_not_remembered(
    answer, remembered, asked, monkeypatch, capsys
):
    """Some templates refuse answers with their thoughts, and empty ones."""
    heard = conversation.generate

    def generate(*given, **more):
        heard(*given, **more)
        return [Completion((), answer)]

    monkeypatch.setattr(conversation, "generate", generate)
    type_in(monkeypatch, ["one", "[THINK]two[/THINK]2", "three"])
    assert main(["chat", "run", "--json"]) == 0
    second = (("user", "one"), ("assistant", remembered))
    assert [before for before, *_ in asked] == [
        (),
        second,
        (*second, ("user", "[THINK]two[/THINK]2"), ("assistant", remembered)),
    ]
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["edited"] == answer


@pytest.mark.parametrize("given", [["--prompt", "one", "--prompt", "/new"], []])
def test_elsewhere_messages_stand_on_their_own(given, asked, monkeypatch):
    type_in(monkeypatch, ["one", "/new"], terminal=bool(given))
    assert main(["chat", "run", *given]) == 0
    assert asked == [((), "one", True), ((), "/new", True)]


def test_the_oldest_is_forgotten_where_the_context_ends(llama):
    said = tuple((role, f"{role} {i}") for i in range(4) for role in ("user", "assistant"))
    assert conversation.remembered(llama, said, "now", 8) == said
    (whole,) = encode(replace(llama, before=said), ["now"])
    llama.text_config.max_position_embeddings = len(whole.ids) + 8
    assert conversation.remembered(llama, said, "now", 8) == said
    assert conversation.remembered(llama, said, "now", 9) == said[2:]
    assert conversation.remembered(llama, said, "now", 400) == ()


def test_answers_are_shown_as_they_come(asked, monkeypatch, capsys):
    def generate(lm, prompts, limit, settled=None):
        for text in (" It", " It is \N{REPLACEMENT CHARACTER}", " It is \u00e9t\u00e9"):
            assert not settled(text)
            so_far.append(capsys.readouterr().out)
        return [Completion((), " It is \u00e9t\u00e9. ")]

    so_far = []
    monkeypatch.setattr(conversation, "generate", generate)
    assert main(["chat", "run", "--compare", "--prompt", "one"]) == 0
    assert so_far == [
        "untouched: It",
        " is",
        " \u00e9t\u00e9",
        ".\nedited: It",
        " is",
        " \u00e9t\u00e9",
    ]
    assert capsys.readouterr().out == ".\n"


def test_an_answer_that_reads_otherwise_later_is_shown_anew(asked, monkeypatch, capsys):
    def generate(lm, prompts, limit, settled=None):
        settled("do n")
        return [Completion((), "don't")]

    monkeypatch.setattr(conversation, "generate", generate)
    assert main(["chat", "run", "--prompt", "one"]) == 0
    assert capsys.readouterr().out == "edited: do n\ndon't\n"


def test_any_text_goes_through_a_pipe_of_one_code_page(asked, monkeypatch):
    """As on Windows, where what is no console takes cp1252 and the like alone."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(
        conversation, "generate", lambda *_, **__: [Completion((), "\u00e9 \u4f60")]
    )
    assert main(["chat", "run", "--prompt", "one"]) == 0
    out.flush()
    assert out.buffer.getvalue().decode("cp1252").split() == ["edited:", "\u00e9", "?"]
