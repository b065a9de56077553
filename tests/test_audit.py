"""How fragile a behaviour is: the ladder of changes, given starts, and that no edit is kept."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_lm, thinned

from saber import artifacts
from saber import audit as auditing
from saber.ablation import EditPlan, Removal, applied, orthogonal
from saber.audit import STARTS, _Ladder, at_random, audit, sizes
from saber.cli.main import main
from saber.config import override, preset
from saber.entanglement import Entanglement
from saber.errors import DataError, OutputError, UsageError, WeakBehaviour
from saber.evaluation.readout import Readout
from saber.gathering import gather
from saber.lm.generate import Completion, generate
from saber.lm.writers import find_writers
from saber.passes import Candidate
from saber.pipeline import Listener
from saber.prompts import Prompt, PromptSet
from saber.report.audit_page import build_audit, changes, findings, page, read_audit
from saber.report.audit_plot import fragility
from saber.spectral import Direction
from saber.subject import Watch

SETTINGS = {
    "spectral": {"permutations": 50},
    "entanglement": {"null_draws": 20, "weight": 0.0},
    "edit": {"lambda": 1.0},
    "refine": {"passes": 2, "stop": "never", "max_q": 1.0},
    "evaluation": {"max_new_tokens": 6},
    "load": {"device": "cpu", "dtype": "float32"},
}


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    """Settings for a pico model, on every fourth of the bundled prompts."""
    files = thinned(tmp_path_factory.mktemp("fourth"), 4) | {"everyday": "none"}
    return override(preset("default"), {**SETTINGS, "data": {**files, "limit": 8}})


@pytest.fixture(scope="module")
def audited(pico, config, tmp_path_factory):
    """An audit that tests look at and do not change."""
    folder = tmp_path_factory.mktemp("audited") / "audit"
    return folder, audit(str(pico), folder, config, force=True)


@pytest.mark.slow
def test_an_audit_keeps_numbers_and_no_edit(audited, pico):
    folder, record = audited
    build_audit(folder)
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert files == {"audit.json", "audit.md", "plots/fragility.png", "plots/fragility.svg"}
    assert read_audit(folder) == json.loads(json.dumps(record))
    kinds = [rung["kind"] for rung in record["rungs"]]
    assert kinds == ["untouched", *["edit"] * 5, "random", "direction"]
    untouched, *edits, random, direction = record["rungs"]
    assert untouched["kl"] is None
    assert untouched["change"] == {"edited": 0.0, "overall": 0.0}
    whole = edits[-1]
    for rung in edits:
        assert rung["change"]["edited"] == pytest.approx(rung["dose"] * whole["change"]["edited"])
        assert 0 < rung["change"]["overall"] < rung["change"]["edited"]
    assert [r["kl"]["sequence"] for r in edits] == sorted(r["kl"]["sequence"] for r in edits)
    assert random["change"]["edited"] == pytest.approx(whole["change"]["edited"], rel=1e-5)
    assert random["kl"]["sequence"] != whole["kl"]["sequence"]
    assert direction["writers"] == 8
    assert all(r["refusal"]["n"] == 8 for r in record["rungs"])
    assert record["passes"]
    assert not list(_vectors(record))


def _vectors(value):
    """Yield lists of numbers as long as a direction."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        if len(value) >= 32 and all(isinstance(x, float) for x in value):
            yield value
        for one in value:
            yield from _vectors(one)


@pytest.mark.slow
def test_an_audit_that_was_cut_off_goes_on(audited, pico, config, tmp_path):
    _, record = audited
    out, seen = tmp_path / "cut", []

    def cut(stage):
        if stage.startswith("making"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        audit(str(pico), out, config, force=True, listener=Listener(on_stage=cut))
    assert not (out / "audit.json").exists()
    with pytest.raises(OutputError, match="an interrupted audit"):
        audit(str(pico), out, config, force=True)
    with pytest.raises(UsageError, match=r"the audit in .* another config"):
        audit(str(pico), out, replace(config, seed=3), force=True, resume=True)
    listener = Listener(on_pass=lambda this: seen.append(this.index))
    again = audit(str(pico), out, config, force=True, resume=True, listener=listener)
    assert seen == []
    assert [p.name for p in out.iterdir()] == ["audit.json"]
    for key in ("rungs", "starts", "direction", "passes"):
        assert again[key] == record[key]
    with pytest.raises(OutputError, match="a finished audit"):
        audit(str(pico), out, config, force=True)


@pytest.mark.slow
def test_only_an_audits_folder_is_replaced(audited, pico, config, tmp_path):
    _, record = audited
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({**record, "config": {}}))
    for options in ({"overwrite": True}, {"resume": True}, {}):
        with pytest.raises(OutputError, match="holds no audit"):
            audit(str(pico), run, config, **options)
    assert [p.name for p in run.iterdir()] == ["run.json"]
    with artifacts.claimed(tmp_path / "x"), pytest.raises(OutputError, match="another process"):
        audit(str(pico), tmp_path / "x", config)
    with pytest.raises(UsageError, match="no meaning in an audit"):
        audit(str(pico), tmp_path / "x", override(config, {"data": {"mode": "over-refusal"}}))
    with pytest.raises(WeakBehaviour):
        audit(str(pico), tmp_path / "x", config)
    assert not (tmp_path / "x").exists()


@pytest.fixture(scope="module")
def plan():
    """A pico Llama, and a plan of two directions for it."""
    lm = make_lm("llama")
    torch.manual_seed(1)
    directions = torch.nn.functional.normalize(torch.randn(2, lm.d_model), dim=1)
    removals = [Removal(d, 0.7, layer) for layer, d in enumerate(directions)]
    return lm, orthogonal(lm, find_writers(lm), removals, "all")


def test_a_share_of_a_plan_makes_that_share_of_each_change(plan):
    lm, whole = plan
    for name, factor in whole.scaled(0.25).factors.items():
        torch.testing.assert_close(factor.delta(), 0.25 * whole.factors[name].delta())
    lm = make_lm("gpt2")  # has biases
    direction = torch.nn.functional.normalize(torch.randn(lm.d_model), dim=0)
    whole = orthogonal(lm, find_writers(lm), [Removal(direction, 1.0, 0)], "all")
    quarter = whole.scaled(0.25)
    biases = [(f.bias, quarter.factors[n].bias) for n, f in whole.factors.items()]
    assert any(a is not None for a, _ in biases)
    for a, b in biases:
        torch.testing.assert_close(0.25 * a, b)


def test_sizes_are_norms_of_what_really_changes(plan):
    lm, whole = plan
    before = {name: p.detach().clone() for name, p in lm.model.named_parameters()}
    with applied(lm.model, whole):
        after = {name: p.detach().clone() for name, p in lm.model.named_parameters()}
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) == len(whole.factors)

    def norm(tensors):
        return sum(float(t.double().pow(2).sum()) for t in tensors) ** 0.5

    size = norm(after[n] - before[n] for n in changed)
    edited, overall = sizes(lm.model, whole)
    assert edited == pytest.approx(size / norm(before[n] for n in changed), rel=1e-4)
    assert overall == pytest.approx(size / norm(before.values()), rel=1e-4)
    assert sizes(lm.model, EditPlan()) == (0.0, 0.0)


def test_random_directions_keep_norms_and_the_angles_between_writers(plan):
    _, whole = plan
    turned = at_random(whole, 0)
    before = torch.cat([f.left for f in whole.factors.values()], 1)
    after = torch.cat([f.left for f in turned.factors.values()], 1)
    torch.testing.assert_close(after.T @ after, before.T @ before, atol=1e-5, rtol=1e-4)
    similar = torch.nn.functional.cosine_similarity(before, after, dim=0)
    assert float(similar.abs().max()) < 0.9
    assert all(torch.equal(turned.factors[n].right, f.right) for n, f in whole.factors.items())
    assert at_random(whole, 0).digest() == turned.digest() != at_random(whole, 1).digest()


class _Marks:
    """A judge that takes answers with a token of some text for the behaviour."""

    def __init__(self, shown, late=()):
        self.shown, self.late = shown, late

    def label(self, completion, *, prompt="", surprise=None):
        return "refusal" if prompt in self.shown else "partial" if prompt in self.late else "answer"

    def settled(self, text_so_far):
        return False


def _ladder(judge, targets, tokens=4):
    lm = make_lm("llama")
    some = PromptSet("t", tuple(Prompt(str(i), "c", text) for i, text in enumerate(targets)))
    config = override(preset("default"), {"evaluation": {"max_new_tokens": tokens}})
    data = gather(config)
    data = replace(data, reporting=replace(data.reporting, target=some, neutral=some))
    return _Ladder(lm, data, judge, config)


def test_starts_are_tried_where_the_behaviour_was_lost_and_long_enough(monkeypatch):
    texts = ["one two", "three", "four five six", "seven", "eight nine"]
    ladder = _ladder(_Marks({"one two"}, {"three"}), texts)
    before = ("refusal", "refusal", "answer", "refusal", "refusal")
    after = ("answer", "answer", "answer", "incoherent", "answer")
    ids = [tuple(c.ids[:3]) for c in generate(ladder.lm, texts, 3)]
    # Other tokens than the model's own, and one answer of a single token.
    given = [tuple((i + 5) % 300 for i in row) for row in ids[:4]] + [ids[4][:1]]
    asked = []

    def answer(lm, requests, **options):
        asked.append([(r.prompt, tuple(r.start), r.max_new_tokens) for r in requests])
        return generate_all(lm, requests, **options)

    generate_all = auditing.answer
    monkeypatch.setattr(auditing, "answer", answer)
    found = ladder._starts(before, after, [Completion(row, "") for row in given])
    assert [(s.tokens, s.shown, s.asked) for s in found] == [(1, 2, 2), (2, 2, 2)]
    assert asked[1] == [("one two", given[0][:2], 6), ("three", given[1][:2], 6)]
    assert STARTS[:2] == (1, 2)


def test_what_is_given_starts_the_answer():
    ladder = _ladder(_Marks(set()), ["one two"])
    own = generate(ladder.lm, ["one two"], 4)[0].ids
    other = tuple((i + 5) % 300 for i in own[:2])
    written = ladder._answered(["one two"], [other])[0]
    assert written.ids[:2] == other
    assert len(written.ids) == 6 or written.ids[-1] in ladder.lm.eos_ids


@pytest.mark.parametrize("tokens", [(), (7,)])
def test_the_one_direction_is_the_one_that_does_most_per_its_cost(config, monkeypatch, tokens):
    lm = make_lm("llama")
    ladder = _Ladder(lm, gather(config), _Marks(set()), config)
    clean = Entanglement({}, {}, "", 0.0, 0.0)
    unit = torch.eye(lm.d_model)[0]
    candidates = [
        Candidate(
            Direction(layer, -1, i, unit, unit, *[1.0] * 6), clean, 1.0, None, None, 0.0, "skipped"
        )
        for i, layer in enumerate((2, 2, 1, 0, *range(3, 9)))
    ]

    def scores(lm, found, *rest):
        assert [d.component for d in found] == [0, 2, 3, 4, 5, 6, 7, 8]
        return [(1.0, 0.0), (3.0, 0.5), (4.0, 3.0)] + [(0.0, 0.0)] * 5

    monkeypatch.setattr(auditing, "causal_scores", scores)
    monkeypatch.setattr(auditing, "derive_readout", lambda target, neutral: Readout(tokens))
    watch = object.__new__(Watch)
    watch.selecting = gather(config).selecting
    best = ladder._best(watch, candidates)
    assert best.direction.component == (2 if tokens else 0)


def _rate(successes, n=40):
    return {"rate": successes / n, "low": 0.0, "high": 1.0, "n": n, "successes": successes}


def _rung(kind, dose, left, kl=0.01, incoherent=0):
    split = {"fraud": _rate(min(left, 10), 10), "theft": _rate(max(left - 10, 0), 30)}
    return {
        "kind": kind,
        "dose": dose,
        "change": {"edited": 0.008 * dose, "overall": 0.004 * dose},
        "writers": 6,
        "refusal": _rate(left),
        "partial": _rate(0),
        "incoherent": _rate(incoherent),
        "refusal_by_category": split,
        "kl": None
        if kind == "untouched"
        else {"sequence": kl, "sequence_low": kl / 2, "sequence_high": 2 * kl},
    }


@pytest.fixture
def record():
    """What an audit of a made-up model found."""
    return {
        "schema": 1,
        "model": {"name": "some|model", "source": "hub"},
        "config": {"data": {"behaviour": "refusal"}},
        "prompts": {},
        "stop_reason": "no direction is left",
        "rungs": [
            _rung("untouched", 0.0, 40),
            _rung("edit", 0.125, 38),
            _rung("edit", 0.25, 18),
            _rung("edit", 1.0, 1),
            _rung("random", 1.0, 39, incoherent=4),
            _rung("direction", 1.0, 30, kl=0.3),
        ],
        "starts": [
            {"tokens": 1, "shown": _rate(30, 38)},
            {"tokens": 2, "shown": _rate(12, 38)},
        ],
        "direction": {"layer": 3},
    }


def test_findings_say_what_the_numbers_are(record):
    said = findings(record)
    assert said == [
        "The untouched model refuses 100.0% (0.0-100.0) of 40 held-out prompts.",
        "An edit of 0.80% of the norm of the 6 weights that it changes leaves 2.5% (0.0-100.0) at a KL of "
        "0.0100.",
        "25% of that edit (0.20%) is enough to lose half of it: 45.0% (0.0-100.0) are left.",
        "The same change along random directions leaves 97.5% (0.0-100.0); 10.0% of the answers are "
        "incoherent.",
        "At 25% of the edit it holds longest in fraud (10 of 10).",
        "Taking the one direction that does most (layer 3) out of all writers leaves 75.0% (0.0-100.0) at a "
        "KL of 0.3000.",
        "With the first 2 tokens of the edited model's answer given, the untouched model still comes to "
        "refuse 31.6% (0.0-100.0) of 38 prompts.",
    ]
    text = page(record)
    assert r"# How fragile some\|model is" in text
    for sentence in said:
        assert f"- {sentence}" in text
    assert "| fraud | 10 | 100% | 100% | 100% | 10% |" in text
    rows = changes(record).rows
    assert rows[1][:3] == ("12.5% of the edit", "0.10%", "6")
    assert rows[1][-1] == "0.0100 [0.0050, 0.0200]"
    assert changes(record, brief=True).rows[1][-1] == "0.0100"


def test_a_behaviour_that_nothing_takes_out_is_a_finding(record):
    record |= {"rungs": record["rungs"][:1], "starts": [], "direction": None}
    assert findings(record)[1] == "No edit was found that changes it: no direction is left."
    assert "By category" not in page(record)
    assert "Behind a given start" not in page(record)
    assert len(fragility(record).axes) == 1


def test_another_behaviour_is_called_by_its_name(record):
    record["config"]["data"]["behaviour"] = "flattery"
    text = "\n".join(findings(record)) + page(record)
    assert "refus" not in text
    assert "shows the behaviour on 100.0%" in text
    assert changes(record).header[3] == "Flattery"


@pytest.mark.slow
def test_command_draws_page_and_plot_and_prints_json(pico, config, tmp_path, capsys, audited):
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "audit.json").write_bytes((audited[0] / "audit.json").read_bytes())
    assert main(["report", str(folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["html"] is None
    assert Path(told["card"]) == folder / "audit.md"
    assert {Path(p).name for p in told["plots"]} == {"fragility.png", "fragility.svg"}
    (folder / "audit.json").write_text('{"schema": 2}')
    with pytest.raises(DataError, match="no audit of schema 1"):
        build_audit(folder)
    assert main(["audit", str(tmp_path / "none"), "--out", str(tmp_path / "x")]) == 2
    assert "none" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    assert main(["audit", str(pico), "--scope", "all"]) == 2
    assert "--scope does nothing" in capsys.readouterr().err
    assert main(["audit", str(pico), "--lengths", "20,100"]) == 2
    assert "--lengths does nothing with saber audit" in capsys.readouterr().err
