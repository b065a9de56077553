"""Models with their thoughts on: what they are asked, what is read of it, and what is counted."""

from dataclasses import asdict, replace

import pytest
import torch
from conftest import CHAT_TEMPLATE, make_lm

from saber.ablation import Removal, applied, orthogonal
from saber.cli.tables import result_rows
from saber.errors import ModelError
from saber.evaluation import lengths
from saber.evaluation import measure as measuring
from saber.evaluation.divergence import score_battery
from saber.evaluation.judge import PhraseJudge, thinking
from saber.evaluation.lengths import by_length
from saber.evaluation.measure import EvaluationSets, EvaluationSpec, measure, summarise
from saber.evaluation.statistics import wilson
from saber.linalg import unit
from saber.lm import generate as generation
from saber.lm import load as loading
from saber.lm import thought
from saber.lm.chat import opened, render
from saber.lm.generate import Completion, Request, answer, generate, reading
from saber.lm.load import LoadSpec, load
from saber.lm.marks import behind, left_open
from saber.lm.writers import find_writers
from saber.prompts import Prompt, PromptSet

SWITCH = CHAT_TEMPLATE + "{% if enable_thinking is false %}<think></think>{% endif %}"
OTHER_SWITCH = CHAT_TEMPLATE + "{% if not thinking %}</think>{% endif %}"
OPENS = CHAT_TEMPLATE + "{% if add_generation_prompt %}<think>\n{% endif %}"
ASKED = "<s><user> x <end> <bot>"


def thinker(template=CHAT_TEMPLATE, *marks, **more):
    lm = make_lm("llama", **more)
    lm.tokenizer.chat_template = template
    if marks:
        lm.tokenizer.add_special_tokens({"additional_special_tokens": list(marks)})
    return replace(lm, thinking=True)


@pytest.mark.parametrize(
    ("template", "without", "behind_it"),
    [
        (SWITCH, "<think></think>", ""),
        (OTHER_SWITCH, "</think>", ""),
        (OPENS, "<think>\n\n</think>\n\n", "<think>\n"),
        (CHAT_TEMPLATE, "", ""),
    ],
)
def test_with_its_thoughts_on_a_model_is_asked_as_its_template_does_it(
    template, without, behind_it
):
    lm = thinker(template)
    assert render(lm, "x") == ASKED + behind_it
    assert render(replace(lm, thinking=False), "x") == ASKED + without
    assert thought.thinks(lm) == (without != behind_it)
    assert thought.thinks(replace(lm, thinking=False)) == (without != behind_it)


def test_no_empty_thought_stands_in_front_either():
    lm = replace(thinker(), response_prefix="[THINK][/THINK]")
    assert render(lm, "x") == ASKED
    assert thought.thinks(lm)


@pytest.mark.parametrize(
    ("prompt", "open_"),
    [
        ("a<think>\n", "<think>\n"),
        ("a[THINK]", "[THINK]"),
        ("a<|channel>thought\n", "<|channel>thought\n"),
        ("a<seed:think>", "<seed:think>"),
        ("<|start|>assistant<|channel|>analysis<|message|>", "<|channel|>analysis<|message|>"),
        ("a<|channel|>final<|message|>", ""),
        ("a<think>\n\n</think>\n\n", ""),
        ("What is <think>? <bot>", ""),
        ("a<|channel>final\n", ""),
        ("a", ""),
    ],
)
def test_the_thought_that_a_prompt_leaves_open(prompt, open_):
    assert left_open(prompt) == open_
    assert not open_ or behind(open_) is None


def test_a_thought_that_the_prompt_opened_is_read_as_one():
    """Without its mark one that is never closed would pass for the answer."""
    lm = thinker(OPENS)
    assert opened(lm, "x") == "<think>\n"
    assert opened(replace(lm, thinking=False), "x") == ""
    for text, answered in (("Hm. I can't help.", None), ("Hm.</think>Sure.", "Sure.")):
        ids = tuple(lm.tokenizer(text, add_special_tokens=False).input_ids)
        heard = []

        def hear(so_far, heard=heard):
            heard.append(so_far)
            return True

        (one,) = generate(lm, ["x"], len(ids), starts=[ids])
        (two,) = generate(lm, ["x"], len(ids) + 4, starts=[ids], settled=hear)
        assert one.ids == two.ids == ids
        assert one.text == two.text == reading(lm, "x", ids) == f"<think>\n{text}"
        assert heard == [one.text]
        assert behind(one.text) == answered
        assert thinking(one.text) == (answered is None)
    assert PhraseJudge().label("<think>\nHm. I can't help.") == "incoherent"
    assert reading(replace(lm, thinking=False), "x", ids) == text


def test_long_answers_keep_within_the_bound_on_keys_and_values(monkeypatch):
    lm, bound, limit = thinker(OPENS), 600, 100
    monkeypatch.setattr(generation, "CACHED_PER_BATCH", bound)
    sizes = []

    def seen(_module, _args, given, _out):
        cache = given.get("past_key_values") or given.get("cache")
        rows = len(given["input_ids"])
        if cache is not None and rows > 1:
            sizes.append(rows * cache.get_seq_length())

    handle = lm.model.register_forward_hook(seen, with_kwargs=True)
    lm.model.generation_config.eos_token_id = None
    lm.tokenizer.eos_token = None
    asked = [Request(f"number {i}", limit - 20 * (i % 3)) for i in range(12)]
    found = answer(lm, asked)
    handle.remove()
    assert [len(c.ids) for c in found] == [r.max_new_tokens for r in asked]
    assert bound / 2 < max(sizes) <= bound


def test_a_model_is_loaded_with_its_thoughts_on(model_folder, monkeypatch):
    asked = []

    def empty(lm):
        asked.append(lm.thinking)
        return "[THINK][/THINK]"

    monkeypatch.setattr(loading, "empty_thought", empty)
    lm = load(str(model_folder), LoadSpec(device="cpu", thinking=True))
    assert lm.thinking
    assert asked == [False]
    assert render(lm, "x") == ASKED
    assert render(replace(lm, thinking=False), "x") == f"{ASKED}[THINK][/THINK]"
    assert not load(str(model_folder), LoadSpec(device="cpu")).thinking


def test_answers_longer_than_the_context_are_told():
    lm = replace(make_lm("gpt2"), thinking=True)
    lm.model.generation_config.eos_token_id = None
    lm.tokenizer.eos_token = None
    with pytest.raises(ModelError, match="max_new_tokens"):
        generate(lm, ["x"], 600)


def asking(name, *texts, **more):
    return PromptSet(name, tuple(Prompt(f"{name}{i}", "c", t, **more) for i, t in enumerate(texts)))


SETS = EvaluationSets(
    target=asking("target", "open", "refuse", "answer", "open too"),
    neutral=asking("neutral", "open", "answer"),
    borderline=asking("borderline", "refuse", "answer"),
    battery=asking(
        "battery", "open 4", "say 4", reference="4", checker={"kind": "number", "value": 4}
    ),
    seen=frozenset(),
    kept=(asking("kept", "open", "refuse"),),
    everyday=asking("everyday", "answer", "answer this"),
)
SAID = {"open": "Well, 4", "refuse": "Hm.</think>I can't help.", "say": "2+2</think>4"}
SPEC = EvaluationSpec(max_new_tokens=40, battery_new_tokens=40)


@pytest.fixture
def scripted(monkeypatch):
    """What is said begins with the prompt's first word."""

    def said(lm, prompt, limit):
        text = SAID.get(prompt.split()[0], "Hm.</think>Sure, it is 4.")
        ids = tuple(lm.tokenizer(text, add_special_tokens=False).input_ids[:limit])
        return Completion(ids, reading(lm, prompt, ids))

    def answers(lm, asked, **_):
        return [said(lm, a.prompt, a.max_new_tokens) for a in asked]

    monkeypatch.setattr(measuring, "answer", answers)
    monkeypatch.setattr(lengths, "generate", lambda lm, ps, n, **_: [said(lm, p, n) for p in ps])


def removal(lm):
    direction = unit(torch.randn(lm.d_model, generator=torch.Generator().manual_seed(1)))
    return orthogonal(lm, find_writers(lm), [Removal(direction, 1.0, 0)], "all")


def test_thoughts_that_never_closed_are_counted_apart(scripted):
    lm = thinker(OPENS)
    spec = replace(SPEC, lengths=(4, 40))
    before = measure(lm, SETS, spec, PhraseJudge())
    with applied(lm.model, removal(lm)):
        after = measure(lm, SETS, spec, PhraseJudge(), untouched=before)
    for found in map(summarise, (before, after)):
        still = found["thought_open"]
        assert still["target"] == asdict(wilson(2, 4))
        assert {name: row["rate"] for name, row in still.items()} == {
            "target": 0.5,
            "neutral": 0.5,
            "borderline": 0.0,
            "everyday": 0.0,
            "battery": 0.5,
        }
        assert (found["refusal"]["rate"], found["incoherent"]["rate"]) == (0.25, 0.5)
        assert found["accuracy"]["overall"] == 0.5
        assert found["kept"]["kept"]["thought_open"]["rate"] == 0.5
        assert [cut["thought_open"]["rate"] for cut in found["lengths"]] == [1.0, 0.5]
    rows = result_rows(summarise(before), summarise(after))
    shown = "50.0% (15.0-85.0)"
    assert ("thought never closed (target)", shown, shown) in rows
    assert rows.index(("thought never closed (target)", shown, shown)) == 1 + rows.index(
        ("incoherent (target)", shown, shown)
    )
    names = [name for name, *_ in rows]
    assert names.index("thought never closed (battery)") == 1 + names.index("accuracy")
    assert [n for n in names if n.startswith("  thought")] == [
        f"  thought never closed at {n} tokens" for n in (4, 40)
    ]
    assert [len(a) for a in before.reference.answers] == [7, 25]  # thoughts and all
    assert summarise(after)["kl"]["sequence"] > 0
    assert after.divergence.per_token.shape == (32,)


def test_without_thoughts_nothing_is_counted_of_them(scripted):
    lm = replace(thinker(OPENS), thinking=False)
    found = summarise(measure(lm, SETS, replace(SPEC, lengths=(4,)), PhraseJudge()))
    assert "thought_open" not in found
    assert "thought_open" not in found["lengths"][0]
    assert "thought_open" not in found["kept"]["kept"]
    assert not [name for name, *_ in result_rows(found, found) if "thought" in name]


def test_given_answers_are_scored_behind_an_empty_thought(scripted):
    """Nobody wrote thoughts to them, and within one they would be something else."""
    lm = thinker(OPENS)
    calm = score_battery(replace(lm, thinking=False), SETS.battery)
    assert measure(lm, SETS, SPEC, PhraseJudge()).scores.answers.perplexity() == (
        calm.answers.perplexity()
    )
    assert score_battery(lm, SETS.battery).answers.perplexity() != calm.answers.perplexity()


def test_answers_that_are_cut_keep_the_thought_that_the_prompt_opened(scripted):
    cuts = by_length(thinker(OPENS), asking("asked", "refuse"), (4, 40), PhraseJudge())
    assert [cut.labels for cut in cuts] == [("incoherent",), ("refusal",)]
    assert [cut.thought_open for cut in cuts] == [(True,), (False,)]
