"""Models with their thoughts on: what they are asked, what is read of it, and what is counted."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from conftest import CHAT_TEMPLATE, make_lm, make_model, make_tokenizer

from saber import conversation, pipeline
from saber.ablation import Removal, applied, orthogonal
from saber.audit import audit
from saber.cli.main import build_parser, main, read_config
from saber.cli.tables import result_rows
from saber.config import override, preset
from saber.errors import ModelError, UsageError
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
from saber.sweep.drive import Plan, sweep

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


def failing(capsys, *arguments):
    """Run a command that must fail as it was used wrongly; return its one line."""
    assert main([str(a) for a in arguments]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    return said


def helped(capsys, command):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "command",
    [
        ("run", "no-model", "--thinking"),
        ("run", "no-model", "--set", "load.thinking=true"),
        ("run", "no-model", "--config", "think.toml"),
        ("sweep", "no-model", "--thinking"),
        ("audit", "no-model", "--thinking"),
        ("inspect", "no-model", "--thinking"),
        ("export", "no-run", "--format", "lora", "--out", "o", "--thinking"),
    ],
    ids=lambda command: " ".join(command),
)
def test_what_edits_or_reads_weights_takes_no_thoughts(capsys, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "think.toml").write_text("[load]\nthinking = true\n")
    said = failing(capsys, *command)
    assert "edits are found at the first token of the answer" in said
    assert "saber eval MODEL --thinking" in said
    assert "--thinking" not in helped(capsys, command[0])
    assert [path.name for path in tmp_path.iterdir()] == ["think.toml"]


@pytest.mark.parametrize("command", ["eval", "chat", "ui"])
def test_the_help_of_what_takes_thoughts_says_so(capsys, command):
    assert "--thinking let the model think" in helped(capsys, command)


def test_a_run_from_python_takes_no_thoughts_either(tmp_path):
    config = override(preset("default"), {"load": {"thinking": True}})
    with pytest.raises(UsageError, match="saber eval MODEL --thinking"):
        pipeline.run("no-model", tmp_path / "run", config)
    with pytest.raises(UsageError, match="saber eval MODEL --thinking"):
        sweep("no-model", tmp_path / "sweep", config, Plan(axes=("edit.alpha=1,0.5",)))
    with pytest.raises(UsageError, match="saber eval MODEL --thinking"):
        audit("no-model", tmp_path / "audit", config)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [("eval",), ("chat", "--prompt", "x"), ("ui",)])
def test_a_text_in_front_of_answers_does_not_go_with_thoughts(capsys, command):
    name, *more = command
    ask = (name, "no-model", *more, "--thinking", "--response-prefix", "<think></think>")
    assert "--response-prefix" in failing(capsys, *ask)


def test_tasks_take_no_thoughts(capsys):
    said = failing(capsys, "eval", "no-model", "--lm-eval", "x", "--thinking")
    assert "--thinking does nothing with --lm-eval" in said


@pytest.mark.parametrize(
    ("options", "answers", "battery"),
    [
        ([], 32, 64),
        (["--thinking"], 1024, 1024),
        (["--thinking", "--max-new-tokens", "2048"], 2048, 2048),
        (["--thinking", "--max-new-tokens", "20"], 20, 64),
        (["--thinking", "--set", "evaluation.battery_new_tokens=8"], 1024, 8),
        (["--config", "think.toml"], 1024, 1024),
        (["--thinking", "--config", "short.toml"], 16, 32),
    ],
)
def test_answers_behind_thoughts_have_more_room(options, answers, battery, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "think.toml").write_text("[load]\nthinking = true\n")
    (tmp_path / "short.toml").write_text(
        "[evaluation]\nmax_new_tokens = 16\nbattery_new_tokens = 32\n"
    )
    config = read_config(build_parser().parse_args(["eval", "demo", *options]))
    assert config.load.thinking == (options[:1] != [])
    assert (config.evaluation.max_new_tokens, config.evaluation.battery_new_tokens) == (
        answers,
        battery,
    )


@pytest.mark.parametrize(
    ("options", "limit"),
    [([], 256), (["--thinking"], 1024), (["--thinking", "--max-new-tokens", "9"], 9)],
)
@pytest.mark.parametrize("template", [OPENS, CHAT_TEMPLATE])
def test_chat_lets_a_model_think(options, limit, template, model_folder, monkeypatch, capsys):
    """Where it has no thoughts, that is said, and it answers all the same."""
    seen = []

    def generate(lm, prompts, most, settled=None):
        seen.append((lm.thinking, most))
        return [Completion((), f"{opened(lm, *prompts)}Hm.</think>Yes.")]

    with_template(model_folder, template)
    monkeypatch.setattr(conversation, "generate", generate)
    assert main(["chat", str(model_folder), "--prompt", "x", "--json", *options]) == 0
    told = capsys.readouterr()
    mark = "<think>\n" if options and template == OPENS else ""
    assert json.loads(told.out)["model"] == f"{mark}Hm.</think>Yes."
    assert seen == [(bool(options), limit)]
    nothing = bool(options) and template == CHAT_TEMPLATE
    assert ("nothing changes with --thinking" in told.err) == nothing
    assert len(told.err.splitlines()) == nothing


def with_template(folder, template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["--json", "table"])
def test_eval_measures_a_model_with_its_thoughts_on(form, few, model_folder, tmp_path, capsys):
    """A random model never closes the thought that its template opened."""
    base = tmp_path / "base"
    make_model("llama", seed=1).save_pretrained(base)
    with_template(base, CHAT_TEMPLATE)
    with_template(model_folder, OPENS)
    ask = ["eval", str(model_folder), "--base", str(base), "--limit", "2", "--thinking"]
    ask += ["--max-new-tokens", "6", "--set", "evaluation.battery_new_tokens=6"]
    assert main([*ask, *(["--json"] if form == "--json" else [])]) == 0
    told = capsys.readouterr()
    said = " ".join(told.err.split())
    assert said.count("nothing changes with --thinking: the chat template of") == 1
    if form == "table":
        assert "thought never closed (target)" in told.out
        return
    record = json.loads(told.out)
    assert record["config"]["load"]["thinking"] is True
    assert record["config"]["evaluation"]["max_new_tokens"] == 6
    before, after = (record[side]["thought_open"] for side in ("baseline", "edited"))
    assert before["target"]["rate"] == 0.0
    assert after["target"]["rate"] == after["battery"]["rate"] == 1.0
    assert after["target"]["low"] == wilson(2, 2).low
    assert record["edited"]["incoherent"]["rate"] == 1.0
    assert record["edited"]["kl"]["sequence"] > 0
