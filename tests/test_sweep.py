"""A sweep: its grid, what settings share, the choice, its journal, and bad input."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_lm, make_model, make_tokenizer
from test_cli import failing

import saber.cli.sweep  # noqa: F401  (heavy imports happen before the clocks start)
from saber import codec, prompts
from saber.ablation import EditPlan, applied
from saber.cli.main import main
from saber.config import override, preset
from saber.errors import (
    DataError,
    ModelError,
    OutputError,
    UnknownName,
    UsageError,
    WeakBehaviour,
)
from saber.evaluation import baseline as baselines
from saber.evaluation.judging import make_judge
from saber.evaluation.measure import EvaluationSpec, measure, perplexity_ratio, summarise
from saber.gathering import gather
from saber.pipeline import run
from saber.prompts import PromptSet
from saber.report import build_sweep, read_sweep
from saber.report.style import styled
from saber.report.sweep_card import columns
from saber.report.sweep_plots import heatmap
from saber.subject import Subject
from saber.sweep import front, journal
from saber.sweep import trial as trials
from saber.sweep.drive import Hearing, Plan, sweep
from saber.sweep.grid import Axis, Range, Setting, changed, grid, read_axis
from saber.sweep.journal import Journal, Row
from saber.sweep.tree import Tree
from saber.sweep.trial import Bench, Job

GRID = ("refine.top_k=1,2", "edit.alpha=0.5,1.0")


def config_of(folder, name="card", **extra):
    """Settings for which a trial of a pico model takes a fraction of a second."""
    files = {}
    for kind in ("target", "neutral", "borderline"):
        path = folder / f"{kind}.txt"
        path.write_text("\n".join(f"{kind} request {i}" for i in range(20)))
        files[kind] = str(path)
    small = {
        "data": {**files, "limit": 2},
        "spectral": {"permutations": 20, "depth_low": 0.0, "depth_high": 1.0, "resolve": "none"},
        "entanglement": {"null_draws": 20, "weight": 0.0},
        "refine": {"passes": 2, "max_q": 1.0},
        "evaluation": {"max_new_tokens": 4, "battery_new_tokens": 4},
        "load": {"device": "cpu", "dtype": "float32"},
    }
    return override(override(preset(name), small), extra)


@pytest.fixture(scope="module", autouse=True)
def few():
    """A tenth of the capability and battery prompts."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("capability", "battery"):
            every = getattr(prompts, name)()
            some = PromptSet(every.name, every.prompts[::10])
            patch.setattr(prompts, name, lambda some=some: some)
        yield


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("baselines")


@pytest.fixture(autouse=True)
def own_cache(cache, monkeypatch):
    """One cache for all of these tests."""
    monkeypatch.setenv("SABER_CACHE", str(cache))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A pico model's folder that no test changes."""
    folder = tmp_path_factory.mktemp("model") / "pico"
    make_model("llama", layers=2).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def model_folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "pico")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return tmp_path_factory.mktemp("texts")


@pytest.fixture
def config(texts):
    return config_of(texts)


@pytest.fixture(scope="module")
def whole(original, texts, cache, tmp_path_factory):
    """A finished sweep of four settings; no test changes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SABER_CACHE", str(cache))
        return swept(original, tmp_path_factory.mktemp("sweeps") / "s", config_of(texts))


def swept(model, out, config, plan=None, **options):
    return sweep(str(model), out, config, plan or Plan(GRID), force=True, **options)


def told(rows):
    """What must not depend on how often a sweep was cut off."""
    drop = {"seconds", "tokens", "shared"}
    return [
        {k: v for k, v in dataclasses.asdict(r).items() if k not in drop}
        for r in sorted(rows, key=lambda r: r.number)
    ]


# The grid


def test_axes_are_fields_of_the_configuration_with_converted_values():
    base = preset("card")
    assert read_axis(base, "edit.lambda=1,10,10,100") == Axis("edit.lambda", (1.0, 10.0, 100.0))
    assert read_axis(base, "refine.stop=never,behaviour").values == ("never", "behaviour")
    assert read_axis(base, "edit.alpha=0.4..1") == Range("edit.alpha", 0.4, 1.0)
    assert read_axis(base, "refine.top_k=2..64:log") == Range("refine.top_k", 2.0, 64.0, True, True)
    with pytest.raises(UnknownName, match=r"edit\.lamda.*Did you mean 'edit\.lambda'"):
        read_axis(base, "edit.lamda=1")
    with pytest.raises(UsageError, match=r"Did you mean 'refine\.top_k'"):
        read_axis(base, "top_k=1,2")
    with pytest.raises(UsageError, match="has no values"):
        read_axis(base, "edit.alpha=,")
    with pytest.raises(UsageError, match="between 0 and 1"):
        read_axis(base, "edit.alpha=0.5,3")
    with pytest.raises(UsageError, match="needs int"):
        read_axis(base, "refine.passes=1,two")
    with pytest.raises(UsageError, match="decides what is measured"):
        read_axis(base, "data.limit=1,2")
    with pytest.raises(UsageError, match="not below"):
        read_axis(base, "edit.alpha=1..0.5")
    with pytest.raises(UsageError, match="takes no numbers"):
        read_axis(base, "refine.stop=never..behaviour")


def test_a_grid_is_every_combination_and_never_empty():
    axes = [Axis("refine.top_k", (10, 25)), Axis("edit.alpha", (0.7, 1.0))]
    found = grid(preset("card"), axes)
    assert [tuple(s.values.values()) for s in found] == [(10, 0.7), (10, 1.0), (25, 0.7), (25, 1.0)]
    assert [(s.config.refine.top_k, s.config.edit.alpha) for s in found][2] == (25, 0.7)
    assert len({s.key for s in found}) == 4
    with pytest.raises(UsageError, match="the grid is empty"):
        grid(preset("card"), [])
    with pytest.raises(UsageError, match="given twice"):
        grid(preset("card"), [axes[0], axes[0]])


# What is kept


def test_kept_results_come_back_as_they_were(tmp_path):
    value = (
        EditPlan(),
        {"a": [1, None, float("nan")]},
        frozenset({"x"}),
        torch.arange(6.0)[2:4],
        np.arange(3),
        Setting(1, {"edit.alpha": 0.5}, preset("card")),
    )
    codec.save(tmp_path / "kept", value, {"tokens": 3})
    found, meta = codec.load(tmp_path / "kept")
    assert meta["tokens"] == 3
    assert found[0] == value[0]
    assert found[1]["a"][:2] == [1, None]
    assert found[1]["a"][2] != found[1]["a"][2]
    assert found[2] == value[2]
    assert torch.equal(found[3], value[3])
    assert (found[4] == value[4]).all()
    assert found[5] == value[5]
    assert codec.size(value) == 8 + 24
    meta = json.loads((tmp_path / "kept" / "meta.json").read_text())
    text = json.dumps(meta).replace("saber.ablation:EditPlan", "os:system")
    (tmp_path / "kept" / "meta.json").write_text(text)
    with pytest.raises(DataError, match="no class of this package"):
        codec.load(tmp_path / "kept")


def test_a_tree_computes_once_counts_tokens_and_makes_room(tmp_path):
    lm = make_lm("llama")
    calls = []

    def work(size):
        def compute():
            calls.append(size)
            lm.work.tokens += 10
            return torch.zeros(size)

        return compute

    tree = Tree(lm, tmp_path, memory=1000.0)
    for _ in range(2):
        tree(("probe", "", "a"), work(5))
    assert (calls, tree.saved) == ([5], 10)
    again = Tree(lm, tmp_path, memory=1000.0)
    assert again(("probe", "", "a"), work(5)).shape == (5,)
    assert (calls, again.saved) == ([5], 10)
    tree(("probe", "plan", "a"), work(200))
    tree(("probe", "plan", "b"), work(201))
    tree(("probe", "plan", "b"), work(201))
    tree(("probe", "plan", "a"), work(200))
    assert calls == [5, 200, 201, 200]

    def outer():
        return tree(("probe", "", "a"), work(5)) + tree(("probe", "", "c"), work(5))

    tree(("causal", "", "o"), outer)
    saved = tree.saved
    tree(("causal", "", "o"), outer)
    assert tree.saved - saved == 20


def test_the_baseline_is_measured_once_a_model(config, tmp_path, monkeypatch):
    monkeypatch.setenv("SABER_CACHE", str(tmp_path))
    data = gather(config)
    judge = make_judge("phrases")
    measured = []
    plain = baselines.measure
    monkeypatch.setattr(baselines, "measure", lambda *a, **k: measured.append(1) or plain(*a, **k))

    def once(lm, mark="m", spec=config.evaluation):
        return baselines.baseline(lm, mark, data.validation, spec, judge, {"name": "phrases"})

    first, tokens = once(make_lm("llama"))
    lm = make_lm("llama")
    second, same = once(lm)
    assert len(measured) == 1
    assert tokens == same > 0
    assert lm.work.tokens == 0
    assert summarise(first) == summarise(second)
    once(lm, mark="another model")
    once(lm, spec=EvaluationSpec(max_new_tokens=5, battery_new_tokens=4))
    assert len(measured) == 3
    for meta in Path(os.environ["SABER_CACHE"]).glob("baselines/*/meta.json"):
        meta.write_text("{")
    once(lm)
    assert len(measured) == 4
    once(dataclasses.replace(lm, before=(("system", "be brief"),)))
    assert len(measured) == 5


# Trials


@pytest.mark.slow
@pytest.mark.parametrize("name", ["card", "default", "orthogonal"])
def test_a_trial_is_the_same_edit_as_a_run_and_leaves_the_model_alone(
    name, texts, model_folder, tmp_path
):
    config = config_of(texts, name, refine={"stop": "never", "shortlist": 0})
    if name == "default":
        config = override(config, {"edit": {"lambda": 1.0}})
    bench = Bench(Job(str(model_folder), config, tmp_path / "shared", force=True))
    weights = {k: v.clone() for k, v in bench.subject.lm.model.state_dict().items()}
    others = [
        bench.trial(Setting(n, {}, changed(config, {"edit.alpha": a})))
        for n, a in enumerate((0.5, 0.9), 1)
    ]
    row = bench.trial(Setting(3, {}, config))
    assert {r.state for r in (*others, row)} == {"done"}
    assert row.directions > 0
    for key, value in bench.subject.lm.model.state_dict().items():
        assert torch.equal(value, weights[key]), key
    record = run(str(model_folder), tmp_path / "run", config, force=True, export=()).record
    lm, plan = bench.subject.lm, EditPlan.load(tmp_path / "run" / "plan")
    with applied(lm.model, plan):
        spec, before = config.evaluation, bench._before
        found = measure(lm, bench.data.validation, spec, make_judge("phrases"), untouched=before)
    ratio = perplexity_ratio(before, found, seed=config.seed)
    assert {**summarise(found), "perplexity_ratio": ratio} == row.measured
    assert row.measured["kl"]["sequence"] > 0
    assert EditPlan.load(tmp_path / "run" / "plan").digest() == row.plan
    assert row.directions == record["directions_ablated"]
    assert row.layers == record["layers_edited"]
    assert others[0].plan != row.plan


def test_workers_share_what_moments_may_take(monkeypatch):
    for whole, shares in ((64, {1: 0.0, 2: 32.0, 8: 8.0, 32: 4.0}), (3, {1: 0.0, 2: 3.0})):
        monkeypatch.setattr(trials, "affordable", lambda *_, whole=whole: whole * 2.0**30)
        assert {n: trials._share(Subject(make_lm(), "", ()), n) for n in shares} == shares


@pytest.mark.slow
def test_passes_that_settings_share_are_computed_once(config, model_folder, tmp_path):
    bench = Bench(Job(str(model_folder), config, tmp_path / "shared", force=True))
    first = bench.trial(Setting(1, {}, changed(config, {"refine.passes": 1})))
    deeper = bench.trial(Setting(2, {}, changed(config, {"refine.passes": 3})))
    between = bench.trial(Setting(3, {}, changed(config, {"refine.passes": 2})))
    assert deeper.nodes[:2] == between.nodes
    assert deeper.nodes[:1] == first.nodes
    alone = Bench(Job(str(model_folder), config, tmp_path / "other", force=True))
    whole = alone.trial(Setting(1, {}, changed(config, {"refine.passes": 2})))
    assert told([dataclasses.replace(between, number=1)]) == told([whole])
    # It had nothing to do but measure the plan that the deeper one went through.
    assert between.shared > between.tokens > 0
    assert between.tokens + between.shared == whole.tokens + whole.shared
    # Answers that were not asked for are not kept for a setting that asks for them.
    assert bench.tree(("shown", whole.plan), lambda: "asked") == "asked"
    again = bench.trial(Setting(4, {}, changed(config, {"refine.passes": 2})))
    assert again.tokens == 0
    assert again.measured == between.measured


@pytest.mark.slow
def test_a_setting_that_cannot_be_measured_is_told_and_the_sweep_goes_on(
    config, model_folder, tmp_path
):
    plan = Plan(("seed=0,7", "edit.alpha=1"))
    result = swept(model_folder, tmp_path / "s", config, plan)
    states = {r["values"]["seed"]: r["state"] for r in result.record["trials"]}
    assert states == {0: "done", 7: "failed"}
    assert "seed 7 splits" in result.record["trials"][1]["error"]


# The choice


def row(number, refused, kl, incoherent=0, n=20, state="done"):
    def rate(k):
        return {"rate": k / n, "low": 0.0, "high": 1.0, "n": n, "successes": k}

    measured = {
        "refusal": rate(refused),
        "incoherent": rate(incoherent),
        "kl": {"sequence": kl, "first_token": kl},
    }
    return Row(number, str(number), {}, state, measured=measured if state == "done" else None)


def test_answers_that_were_to_stay_count_where_they_did_not():
    def kept(number, refused, kl, lost):
        one = row(number, refused, kl)
        narrow = {"borderline": one.measured["refusal"]}
        return dataclasses.replace(
            one,
            measured={
                **one.measured,
                "over_refusal": narrow,
                "lost": {"successes": lost, "n": 20} if lost is not None else None,
            },
        )

    for mode in ("removal", "over-refusal"):
        found = front.amiss(kept(1, 1, 0.1, 3).measured, mode)
        assert (found.successes, found.n) == (4, 40)
        found = front.amiss(kept(1, 1, 0.1, None).measured, mode)
        assert (found.successes, found.n) == (1, 20)
        rows = [kept(1, 0, 0.1, 8), kept(2, 1, 0.3, 0)]
        assert front.choose(rows, 0.05, mode).number == 2
        assert front.pareto(rows, mode) == [1, 2]


@pytest.mark.parametrize("mode", ["removal", "over-refusal"])
def test_many_answers_that_stay_are_no_licence_to_leave_the_others_amiss(mode):
    def kept(number, amiss, kl, lost):
        one = row(number, amiss, kl)
        over = {"over_refusal": {"borderline": one.measured["refusal"]}}
        return dataclasses.replace(
            one, measured={**one.measured, **over, "lost": {"successes": lost, "n": 400}}
        )

    nothing, works, spoils = kept(1, 20, 0.0, 0), kept(2, 1, 0.1, 20), kept(3, 0, 0.01, 21)
    assert front.amiss(nothing.measured, mode).rate < 0.05
    assert front.choose([nothing, works, spoils], 0.05, mode) is works
    found = [front.reached(r.measured, 0.05, mode) for r in (nothing, works, spoils)]
    assert found == [False, True, False]
    assert "5% of validation prompts of each kind" in front.rule(mode=mode, keeps=True)


def test_a_trial_counts_kept_answers_that_changed(texts, model_folder, tmp_path):
    kept = tmp_path / "kept.txt"
    kept.write_text(
        "".join(f"Tell me of item {i} in a word.\n" for i in range(40)), encoding="utf-8"
    )
    config = config_of(
        texts,
        "default",
        data={"keep": [str(kept)]},
        edit={"lambda": 1e-3},
        refine={"stop": "never"},
    )
    bench = Bench(Job(str(model_folder), config, tmp_path / "shared", force=True))
    weights = {k: v.clone() for k, v in bench.subject.lm.model.state_dict().items()}

    class Turned:
        """A judge by whom all answers turn with the edit."""

        def label(self, completion, *, prompt="", surprise=None):
            now = bench.subject.lm.model.state_dict()
            return (
                "answer" if all(torch.equal(now[k], v) for k, v in weights.items()) else "refusal"
            )

        def settled(self, text_so_far):
            return False

    bench._judge = Turned()
    row = bench.trial(Setting(1, {}, config))
    found = row.measured["lost"]
    assert found["successes"] == found["n"] == len(bench.data.validation.kept[0]) > 0
    assert front.amiss(row.measured).n == len(bench.data.validation.target) + found["n"]


def test_the_front_and_the_rule():
    rows = [row(1, 0, 0.5), row(2, 1, 0.2), row(3, 4, 0.01), row(4, 1, 0.3), row(5, 9, 0.9)]
    rows.append(row(6, 0, 0.0, state="failed"))
    assert front.pareto(rows) == [1, 2, 3]
    assert [r.number for r in front.ranked(rows)] == [1, 2, 4, 3, 5]
    assert front.choose(rows, 0.05).number == 2
    assert front.choose(rows, 0.0).number == 1
    assert front.choose([row(1, 5, 0.1), row(2, 4, 0.3)], 0.05).number == 2
    # Incoherent answers are no success.
    assert front.choose([row(1, 0, 0.1, incoherent=6), row(2, 1, 0.3)], 0.05).number == 2
    assert front.choose([row(1, 0, 0, state="failed")]) is None
    # The behaviour need not be refusal.
    assert "at most 5% of validation prompts amiss (shown or incoherent)" in front.rule()
    for keeps, said in ((False, "incoherent)"), (True, "or changed where kept)")):
        assert said in front.rule(keeps=keeps)
    assert "no longer refused rightly" in front.rule(mode="over-refusal")
    for aim, said in ((0.05, "5%"), (0.005, "0.5%"), (0.025, "2.5%"), (0.07, "7%")):
        assert f"at most {said} of validation" in front.rule(aim)


@pytest.mark.slow
def test_a_trial_with_a_number_that_is_not_finite_has_failed_and_can_be_written_down(
    config, model_folder, tmp_path, monkeypatch
):
    bench = Bench(Job(str(model_folder), config, tmp_path / "shared", force=True))
    setting = Setting(1, {}, changed(config, {"edit.alpha": 0.9}))
    plain_diverge, plain_summary = trials.diverge, trials.summarise

    def lost(*given, **named):
        found = plain_diverge(*given, **named)
        return dataclasses.replace(found, sequence=found.sequence * np.nan)

    monkeypatch.setattr(trials, "diverge", lost)
    cheap = bench.trial(setting, lambda _cheap: False)
    monkeypatch.setattr(trials, "diverge", plain_diverge)

    def overflown(measured):
        found = plain_summary(measured)
        return {**found, "kl_everyday": {"sequence": float("nan")}}

    monkeypatch.setattr(trials, "summarise", overflown)
    late = bench.trial(setting)
    book = Journal(tmp_path / "trials.jsonl")
    for failed, name in ((cheap, "KL"), (late, "kl_everyday.sequence")):
        assert failed.state == "failed"
        assert failed.error == f"the edited model's {name} is not finite."
        assert failed.measured is failed.cheap is None
        book.append(failed)


@pytest.mark.slow
def test_held_out_prompts_choose_nothing(whole, config, model_folder, tmp_path, monkeypatch):
    """With every held-out prompt another one, table, front and choice stay the same."""
    first = whole.record
    data = gather(override(config, {"data": {"battery": "half"}}))
    chosen = {p.id for p in data.validation.battery} | {p.text for p in data.validation.target}
    assert not chosen & {p.id for p in data.reporting.battery}
    assert not chosen & {p.text for p in data.reporting.target}
    plain = Bench.held_out

    def other(self, config):
        sets = self.data.reporting
        texts = tuple(
            dataclasses.replace(p, text=f"Unlike {i}") for i, p in enumerate(sets.neutral)
        )
        changed = dataclasses.replace(
            sets, neutral=dataclasses.replace(sets.neutral, prompts=texts)
        )
        self.data = dataclasses.replace(self.data, reporting=changed)
        return plain(self, config)

    monkeypatch.setattr(Bench, "held_out", other)
    second = swept(model_folder, tmp_path / "b", config).record
    timeless = ("seconds", "tokens", "shared")

    def trials(record):
        return [{k: v for k, v in r.items() if k not in timeless} for r in record["trials"]]

    assert trials(first) == trials(second)
    assert first["best"]["number"] == second["best"]["number"]
    assert first["best"]["heldout"]["edited"]["kl"] != second["best"]["heldout"]["edited"]["kl"]
    assert first["best"]["plan"] == first["best"]["heldout"]["plan"]
    seen, now = (first["best"]["amiss"][k]["rate"] for k in ("validation", "heldout"))
    assert first["best"]["shrinkage"]["amiss"] == now - seen


# Outputs, resume, and the journal


@pytest.mark.slow
def test_a_sweep_leaves_table_plots_and_a_trial_that_can_be_built(
    whole, model_folder, tmp_path, capsys
):
    result, out = whole, shutil.copytree(whole.folder, tmp_path / "s")
    made = build_sweep(out)
    assert [p.name for p in made.plots] == [
        "heatmap.png",
        "heatmap.svg",
        "front.png",
        "front.svg",
    ]
    names, cells = columns(read_sweep(out))
    assert names == [
        *("", "#", "Top-K", "Alpha", "Refusal", "PPL", "PPL \u0394", "Layers", "Dirs ablated"),
        *("KL", "Incoherent", "Accuracy"),
    ]
    assert len(cells) == 4
    assert sum(line[0] == "best" for line in cells) == 1
    for line, row in zip(cells, result.record["trials"], strict=True):
        told = dict(zip(names, line, strict=True))
        kl, ratio = row["kl"], row["perplexity_ratio"]
        ends = f"{kl['sequence_low']:.4f}-{kl['sequence_high']:.4f}"
        assert told["KL"] == f"{kl['sequence']:.4f} ({ends})"
        assert kl["sequence_low"] < kl["sequence"] < kl["sequence_high"]
        assert f"{abs(100 * (ratio['high'] - 1)):.1f})" in told["PPL \u0394"]
        assert ratio["low"] < ratio["estimate"] < ratio["high"]
        whole_change = row["perplexity"] / result.record["baseline"]["perplexity"]["overall"]
        assert ratio["estimate"] == pytest.approx(whole_change)
    page = made.card.read_text()
    assert f"setting {result.record['best']['number']}" in page
    assert "Held-out prompts had no say" in page
    narrow = read_sweep(out)
    narrow["config"]["data"]["mode"] = "over-refusal"
    for row in narrow["trials"]:
        row["over_refusal"]["borderline"] = {"rate": 0.25, "low": 0.1, "high": 0.5}
    names, cells = columns(narrow)
    assert names[4:6] == ["False refusals", "Refusal"]
    for line in cells:
        assert len(line) == len(names)
        assert line[4] == "25.0% (10.0-50.0)"
    with styled():
        drawn = heatmap(narrow)
    assert drawn.axes[0].get_title(loc="left") == "False refusals"
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(out / "trials.parquet").to_pylist()
    assert sorted(r["set.refine.top_k"] for r in table) == [1, 1, 2, 2]
    assert sum(r["best"] for r in table) == 1
    assert all(r["kl_sequence_low"] < r["kl_sequence"] < r["kl_sequence_high"] for r in table)
    assert all(r["perplexity_ratio_low"] < r["perplexity_ratio_high"] for r in table)
    capsys.readouterr()
    arguments = ["run", str(model_folder), "--from-sweep", str(out), "--force", "--json"]
    arguments += ["--export", "none", "--trial", "3", "--out", str(tmp_path / "built")]
    assert main(arguments) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["sweep"] == {"name": "s", "trial": 3, "same_plan": True}
    card = (tmp_path / "built" / "README.md").read_text()
    assert "trial 3 of the sweep s; the very same edit" in card
    assert (record["config"]["refine"]["top_k"], record["config"]["edit"]["alpha"]) == (2, 0.5)
    assert record["baseline"]["accuracy"]["n"] == 2
    assert main(["report", str(out), "--json"]) == 0


def test_a_trial_that_is_not_there_or_of_another_model_is_refused(
    whole, model_folder, tmp_path, capsys
):
    out = whole.folder
    arguments = ["run", model_folder, "--from-sweep", out, "--out", tmp_path / "o"]
    assert "trial 9" in failing(capsys, *arguments, "--trial", 9)[1]
    assert "--alpha would change" in failing(capsys, *arguments, "--alpha", 0.5)[1]
    assert "no sweep" in failing(capsys, *arguments[:3], tmp_path, "--trial", 1)[1]
    other = tmp_path / "other"
    make_model("llama", seed=3).save_pretrained(other)
    make_tokenizer().save_pretrained(other)
    capsys.readouterr()
    assert "not the model that" in failing(capsys, "run", other, *arguments[2:], "--force")[1]
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_a_sweep_tells_what_its_phases_took(config, model_folder, tmp_path):
    out = tmp_path / "sweep"
    first = swept(model_folder, out, config).record["work"]
    parts = [first[f"{phase}_seconds"] for phase in ("preparing", "trials", "heldout")]
    assert min(parts) > 0
    assert sum(parts) < first["seconds"] < 1.5 * sum(parts)
    # One worker: the clock ran for its trials and for hardly anything else.
    assert first["worker_seconds"] < first["trials_seconds"] < 1.2 * first["worker_seconds"]
    grown = Plan(("refine.top_k=1,2", "edit.alpha=0.5,0.75,1.0"))
    more = swept(model_folder, out, config, grown, resume=True).record["work"]
    for name in ("preparing_seconds", "trials_seconds", "worker_seconds", "seconds"):
        assert more[name] > first[name]


@pytest.mark.slow
def test_a_sweep_that_is_cut_off_does_no_trial_twice_and_ends_alike(
    whole, config, model_folder, tmp_path
):
    out, seen = tmp_path / "cut", []

    class Stop(Exception):
        pass

    def stop(row, _total):
        seen.append(row.number)
        if len(seen) in (1, 3):
            raise Stop

    for _ in range(2):
        with pytest.raises(Stop):
            swept(model_folder, out, config, resume=True, listener=Hearing(on_trial=stop))
        # A killed driver may leave half a line.
        with (out / journal.TRIALS).open("ab") as file:
            file.write(b'{"number": 4, "key')
    # The axes need not be given again.
    result = swept(model_folder, out, config, Plan(), resume=True, listener=Hearing(on_trial=stop))
    assert seen == [1, 2, 3, 4]
    rows = Journal(out / journal.TRIALS).rows
    assert told(rows) == told(Journal(whole.folder / journal.TRIALS).rows)
    assert result.record["front"] == whole.record["front"]
    for part in ("edited", "comparison", "plan"):
        assert result.record["best"]["heldout"][part] == whole.record["best"]["heldout"][part]
    with pytest.raises(OutputError, match="nothing to resume"):
        swept(model_folder, out, config, resume=True)
    # A grid may grow: what is done keeps its number.
    grown = Plan(("refine.top_k=1,2", "edit.alpha=0.5,0.75,1.0"))
    more = swept(model_folder, out, config, grown, resume=True, listener=Hearing(on_trial=stop))
    assert seen == [1, 2, 3, 4, 5, 6]
    assert len(more.record["trials"]) == 6
    assert told(Journal(out / journal.TRIALS).rows)[:4] == told(rows)
    # Values that take the place of others are new settings, however many are done.
    swept(model_folder, out, config, Plan(("edit.alpha=0.6",)), resume=True)
    assert len(Journal(out / journal.TRIALS).rows) == 7
    # What ended before there was an axis has the value that it had.
    wider = Plan(("edit.alpha=0.6,0.5", f"refine.top_k={config.refine.top_k},1"))
    told_now = swept(model_folder, out, config, wider, resume=True).record["trials"]
    assert len(told_now) == 4
    assert all(set(r["values"]) == {"edit.alpha", "refine.top_k"} for r in told_now)
    assert "heatmap.png" in [p.name for p in build_sweep(out).plots]


@pytest.mark.slow
def test_minutes_end_a_sweep_that_then_goes_on(config, model_folder, tmp_path):
    result = swept(model_folder, tmp_path / "s", config, Plan(GRID, minutes=1e-9))
    assert result.left == 4
    assert result.record["best"] is None
    assert "none is chosen yet" in build_sweep(tmp_path / "s").card.read_text()
    assert swept(model_folder, tmp_path / "s", config, resume=True).left == 0


@pytest.mark.slow
def test_a_study_of_another_model_or_prompts_is_refused_and_shows_what_changed(
    config, model_folder, tmp_path
):
    out, one = tmp_path / "s", Plan(("edit.alpha=1",))
    swept(model_folder, out, config, one)
    before = (out / journal.TRIALS).read_bytes()
    other = override(config, {"refine": {"passes": 3}})
    with pytest.raises(UsageError, match=r"config\.refine\.passes 2 -> 3"):
        swept(model_folder, out, other, Plan(("edit.alpha=1,0.5",)), resume=True)
    target = Path(config.data.target)
    text = target.read_text()
    target.write_text(text.replace("request 3", "question 3"))
    with pytest.raises(UsageError, match=r"prompts\.target\.\S*fingerprint \w+"):
        swept(model_folder, out, config, Plan(("edit.alpha=1,0.5",)), resume=True)
    target.write_text(text)
    make_model("llama", seed=4).save_pretrained(model_folder)
    with pytest.raises(UsageError, match=r"model\.fingerprint sha256:\w+"):
        swept(model_folder, out, config, Plan(("edit.alpha=1,0.5",)), resume=True)
    assert (out / journal.TRIALS).read_bytes() == before


def test_one_driver_at_a_time(config, model_folder, tmp_path):
    out = tmp_path / "s"
    out.mkdir()
    with journal.locked(out), pytest.raises(UsageError, match="another process works"):
        swept("no-such-model", out, config)
    assert not (out / journal.STUDY).exists()


@pytest.mark.slow
def test_a_folder_of_something_else_is_left_alone(config, model_folder, tmp_path):
    (tmp_path / "notes.md").write_text("mine")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(OutputError, match="not a sweep's"):
            swept("no-such-model", tmp_path, config, **options)
    out = tmp_path / "s"
    swept(model_folder, out, config, Plan(("edit.alpha=1",)))
    with pytest.raises(OutputError, match="holds a sweep"):
        swept(model_folder, out, config)
    again = swept(model_folder, out, config, Plan(("edit.alpha=0.5",)), overwrite=True)
    assert [r["values"] for r in again.record["trials"]] == [{"edit.alpha": 0.5}]


def test_a_sweep_that_does_not_begin_leaves_nothing(config, model_folder, tmp_path):
    with pytest.raises(WeakBehaviour):
        sweep(str(model_folder), tmp_path / "s", config, Plan(("edit.alpha=1",)))
    assert not (tmp_path / "s").exists()
    (tmp_path / "own").mkdir()
    with pytest.raises(ModelError):
        sweep("no-such-model", tmp_path / "own" / "s", config, Plan(("edit.alpha=1",)))
    assert list((tmp_path / "own").iterdir()) == []


@pytest.mark.parametrize("name", ["README.md", "plots/fig1.pdf", "shared/notes.txt", "study.json"])
def test_what_only_looks_like_a_sweep_is_left_alone(config, model_folder, tmp_path, name):
    file = tmp_path / "s" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("{}")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(UsageError, match=r"not a sweep's|no study"):
            swept(model_folder, tmp_path / "s", config, **options)
    assert file.read_text() == "{}"
    for out in (model_folder, model_folder.parent):
        with pytest.raises(OutputError, match="lies in --out"):
            swept(model_folder, out, config, overwrite=True)


def test_a_damaged_journal_names_the_line(tmp_path):
    path = tmp_path / journal.TRIALS
    Journal(path).append(row(1, 0, 0.1))
    Journal(path).append(row(2, 0, 0.1))
    assert [r.number for r in Journal(path).rows] == [1, 2]
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0][:-20] + b"\n" + lines[1])
    with pytest.raises(DataError, match="line 1"):
        Journal(path)


def test_who_reads_a_journal_leaves_half_a_line_to_who_writes_it(tmp_path):
    path = tmp_path / journal.TRIALS
    Journal(path).append(row(1, 0, 0.1))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:9])
    book = Journal(path)
    assert path.read_bytes() == whole + whole[:9]
    book.append(row(2, 0, 0.1))
    book.append(row(3, 0, 0.1))
    assert [r.number for r in Journal(path).rows] == [1, 2, 3]


@pytest.mark.slow
def test_a_stated_aim_that_is_missed_ends_with_3(texts, model_folder, tmp_path, capsys):
    config_of(texts)
    arguments = ["sweep", str(model_folder), "--preset", "card", "--passes", "1"]
    for kind in ("target", "neutral", "borderline"):
        arguments += [f"--{kind}", str(texts / f"{kind}.txt")]
    # By this judge every answer shows the behaviour, whatever is edited.
    arguments += ["--judge", "regex", "--judge-pattern", "(?s).", "--behaviour", "words"]
    arguments += ["--top-k", "1", "--json"]
    arguments += ["--limit", "2", "--max-new-tokens", "4", "--out", str(tmp_path / "s")]
    assert main([*arguments, "--minutes", "1e-9", "--aim", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["left"] == 1
    assert main([*arguments, "--resume", "--aim", "0"]) == 3
    record = json.loads(capsys.readouterr().out)
    assert record["trials"][0]["amiss"]["rate"] == 1
    assert record["best"]["reached"] is False
    # It is said that nothing was gained, and no trial is proposed.
    assert record["best"]["helps"] is False
    assert record["best"]["amiss"]["untouched"]["rate"] == 1
    assert main([*(a for a in arguments if a != "--json"), "--overwrite", "--aim", "0"]) == 3
    said = " ".join(capsys.readouterr().out.split())
    assert "No setting helps: the untouched model leaves 100.0% of" in said
    assert "build it" not in said
    assert "**No setting helps: " in (tmp_path / "s" / "README.md").read_text()
    assert main(["run", str(model_folder), "--from-sweep", str(tmp_path / "s")]) == 2
    assert "leaves less amiss than the untouched model" in capsys.readouterr().err


def test_bad_input_of_the_command(capsys, tmp_path):
    out = tmp_path / "o"
    ask = ("sweep", "demo", "--alpha", "1", "--out", out, "--minutes")
    for minutes in ("nan", "-1"):
        assert "must not be below 0" in failing(capsys, *ask, minutes)[1]
    assert "the grid is empty" in failing(capsys, "sweep", "demo", "--out", out)[1]
    code, said = failing(capsys, "sweep", "demo", "--axis", "edit.alhpa=1", "--out", out)
    assert code == 2
    assert "Did you mean 'edit.alpha'" in said
    assert "is a range" in failing(capsys, "sweep", "demo", "--alpha", "0.1..1", "--out", out)[1]
    assert (
        "at least 1"
        in failing(capsys, "sweep", "demo", "--alpha", "1", "--workers", 0, "--out", out)[1]
    )
    assert (
        "for a search"
        in failing(capsys, "sweep", "demo", "--alpha", "1", "--also", "accuracy", "--out", out)[1]
    )
    assert "--trial goes with" in failing(capsys, "run", "demo", "--trial", 3, "--out", out)[1]
    assert not out.exists()
