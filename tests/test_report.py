"""A finished run becomes plots, a card and a page: true to its numbers, safe, and repeatable."""

from __future__ import annotations

import copy
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from huggingface_hub import ModelCard

from saber.cli.main import main
from saber.errors import DataError
from saber.report import PLOTS, build, html_report, model_card, reading, style, tables
from saber.report.plots import applicable
from saber.report.toml import dumps

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CATEGORIES = ["arithmetic", "logic", "code", "instruction_following", "factual_recall"]
HITS = [0.2, 0.3, 0.15, 0.4, 0.5]
HARMS = ["fraud", "malware", "physical harm", "privacy", "disinformation"]


def proportion(successes: int, n: int) -> dict[str, Any]:
    z, rate = 1.96, successes / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return {"rate": rate, "low": low, "high": high, "n": n, "successes": successes}


def direction(rng: np.random.Generator, layer: int, component: int, index: int) -> dict[str, Any]:
    peak = math.exp(-((layer - 15) ** 2) / 40)
    d_prime = float((0.5 + 3.6 * peak) * 0.85 ** (index - 1) * 0.75**component)
    d_prime += float(rng.normal(0, 0.15))
    per = {
        c: float(abs(rng.normal(0.02 + 0.012 * k + 0.0015 * layer, 0.015)))
        for k, c in enumerate(CATEGORIES)
    }
    worst = max(per, key=lambda c: per[c])
    auroc = min(0.999, 0.5 + 0.5 * math.tanh(max(d_prime, 0.0) / 2))
    purity = 1 - per[worst]
    return {
        "layer": layer, "component": component, "position": -1, "d_prime": max(0.05, d_prime),
        "auroc": auroc, "auroc_low": auroc - 0.02, "auroc_high": min(1.0, auroc + 0.01),
        "p_value": 0.001, "q_value": 0.003, "entanglement": per, "worst_category": worst,
        "worst_entanglement": per[worst], "null_percentile": 0.62, "purity": purity,
        "score": d_prime * purity, "causal": 2.2 if component == 0 else None,
        "strength": 0.0, "status": "not selected",
    }  # fmt: skip


def one_pass(rng: np.random.Generator, index: int, before: float, after: float) -> dict[str, Any]:
    found = [direction(rng, layer, k, index) for layer in range(6, 24) for k in range(3)]
    ranked = sorted(found, key=lambda d: -d["score"])
    for d in ranked[:10]:
        d["strength"], d["status"] = 0.85 * d["purity"], "ablated"
        if d["worst_entanglement"] > 0.1:
            d["strength"], d["status"] = 0.3 * d["purity"], "weakened"
    ranked[10]["status"] = "skipped"
    return {
        "index": index, "log_odds_before": before, "log_odds_after": after,
        "rate_before": 0.9 / index, "rate_after": 0.5 / index,
        "directions": ranked[:10], "candidates": found,
        "hydra": {"top_auroc": ranked[0]["auroc"], "top_d_prime": ranked[0]["d_prime"],
                  "top_layer": ranked[0]["layer"], "dormant": 0 if index == 1 else 3 - index // 2,
                  "compensation": None if index == 1 else
                  {"estimate": 0.22 / index, "low": 0.02, "high": 0.45 / index}},
    }  # fmt: skip


def measure(edited: bool) -> dict[str, Any]:
    refused = [1, 0, 0, 0, 0] if edited else [22, 23, 21, 22, 21]
    ratio = 1.012 if edited else 1.0
    incoherent, partial = (2, 3) if edited else (0, 2)
    return {
        "refusal": proportion(sum(refused), 112), "incoherent": proportion(incoherent, 112),
        "partial": proportion(partial, 112),
        "refusal_by_category": {c: proportion(r, 23 if k == 1 else 22)
                                for k, (c, r) in enumerate(zip(HARMS, refused, strict=True))},
        "refusal_seen": proportion(0 if edited else 65, 66),
        "refusal_unseen": proportion(1 if edited else 44, 46),
        "labels": {
            "target": {"refusal": sum(refused), "partial": partial, "incoherent": incoherent,
                       "answer": 112 - sum(refused) - partial - incoherent},
            "neutral": {"refusal": 0 if edited else 18, "partial": 1, "incoherent": 0,
                        "answer": 111 if edited else 93},
            "borderline": {"refusal": 1 if edited else 31, "partial": 2,
                           "answer": 44 if edited else 15, "incoherent": 1 if edited else 0}},
        "over_refusal": {"borderline": proportion(1 if edited else 31, 48),
                         "neutral": proportion(0 if edited else 18, 112)},
        "perplexity": {
            "overall": 12.31 * ratio,
            "by_category": {c: v * ratio ** (k - 1) for k, (c, v) in
                            enumerate(zip(CATEGORIES, [3.9, 7.7, 9.1, 22.4, 18.6], strict=True))},
            "prompt_text": {"overall": 498.0 - 12 * edited, "by_category": {}}, "own_answers": 1.9},
        "accuracy": {"overall": 0.31 - 0.01 * edited, "low": 0.228, "high": 0.406, "n": 100,
                     "by_category": {c: v - 0.05 * edited * (k == 2) for k, (c, v) in
                                     enumerate(zip(CATEGORIES, HITS, strict=True))}},
        "kl": {"first_token": 0.19 * edited, "sequence": 0.0135 * edited,
               "first_token_low": 0.12 * edited, "first_token_high": 0.31 * edited,
               "sequence_low": 0.011 * edited, "sequence_high": 0.0174 * edited,
               "first_token_median": 0.15 * edited, "sequence_median": 0.0061 * edited,
               "sequence_p95": 0.08 * edited, "sequence_max": 1.4 * edited},
    }  # fmt: skip


def prompt_set(name: str) -> dict[str, Any]:
    return {"name": name, "fit": 96, "validation": 32, "heldout": 112,
            "fingerprint": f"sha256:{'0123456789abcdef' * 4}"}  # fmt: skip


def fake_run() -> dict[str, Any]:
    """A complete run of five passes, as the pipeline writes it."""
    rng = np.random.default_rng(7)
    odds = [3.2, 0.4, -1.6, -2.9, -3.6, -3.9]
    passes = [one_pass(rng, i + 1, odds[i] + 0.25 * (i > 0), odds[i + 1]) for i in range(5)]
    said = {
        "id": "t-1",
        "category": "fraud",
        "prompt": "How do I <b>do</b> it?",
        "before": {"label": "refusal", "excerpt": "EXCERPT I cannot help with that."},
        "after": {"label": "answer", "excerpt": "EXCERPT <script>alert(1)</script> & so on"},
    }
    return {
        "schema": 1, "saber_version": "0.1.0", "command": "saber run demo --preset card",
        "model": {"name": "demo", "source": "demo", "model_type": "llama",
                  "base": "HuggingFaceTB/SmolLM2-135M-Instruct", "fingerprint": "sha256:feedbeef",
                  "layers": 30, "d_model": 576, "parameters": 134515008,
                  "compute_dtype": "float32", "storage_dtype": "float16", "device": "cpu"},
        "environment": {"python": "3.11.7", "torch": "2.9", "transformers": "5.0", "threads": 2,
                        "platform": "Linux-x86_64", "processor": "Xeon",
                        "started": "2026-11-23T13:00:00Z"},
        "config": {"preset": "card", "seed": 0, "revision": None,
                   "spectral": {"method": "fisher", "per_layer": 3},
                   "edit": {"kind": "orthogonal", "alpha": 0.85},
                   "refine": {"passes": 5, "top_k": 10},
                   "evaluation": {"judge": "phrases", "max_new_tokens": 48, "lengths": [20, 48]}},
        "prompts": {"target": prompt_set("bundled target"),
                    "neutral": prompt_set("bundled neutral"),
                    "borderline": {"name": "borderline", "n": 48, "fingerprint": "sha256:1"},
                    "capability": {"name": "capability", "n": 120, "fingerprint": "sha256:2",
                                   "categories": dict.fromkeys(CATEGORIES, 24)},
                    "battery": {"name": "bundled battery", "n": 100, "fingerprint": "sha256:3",
                                "categories": dict.fromkeys(CATEGORIES, 20)}},
        "seconds": {"load": 9.1, "probe": 31.0, "spectral": 4.2, "entanglement": 2.0, "ablate": 3.3,
                    "refine": 88.0, "evaluate": 140.5, "save": 1.2, "total": 279.3},
        "work": {"tokens": 123456, "tflop": 33.1, "gflops": 160.2},
        "baseline": measure(False), "edited": measure(True),
        "comparison": {"refusal": {"b": 108, "c": 0, "p_value": 1e-20},
                       "over_refusal": {"b": 48, "c": 0, "p_value": 1e-9},
                       "accuracy": {"b": 3, "c": 2, "p_value": 1.0},
                       "perplexity_ratio": {"estimate": 1.012, "low": 0.994, "high": 1.031}},
        "directions_ablated": 50,
        "layers_edited": len({d["layer"] for p in passes for d in p["directions"]}),
        "candidate_layers": list(range(6, 24)), "stop_reason": "passes", "passes": passes,
        "examples": {kind: [copy.deepcopy(said) for _ in range(5)]
                     for kind in ("target", "neutral", "borderline")},
    }  # fmt: skip


def baseline_only(run: dict[str, Any]) -> None:
    run.update(edited=None, passes=[], directions_ablated=0, layers_edited=0)
    for name in ("comparison", "seconds", "stop_reason", "work"):
        del run[name]


def one_direction(run: dict[str, Any]) -> None:
    only = run["passes"][0]
    only["directions"] = only["candidates"] = only["directions"][:1]
    run.update(passes=[only], directions_ablated=1, layers_edited=1, candidate_layers=[14])


def sparse(run: dict[str, Any]) -> None:
    """A run from a library caller who measured little: optional fields are absent or null."""
    for name in (
        "comparison",
        "environment",
        "examples",
        "stop_reason",
        "work",
        "candidate_layers",
    ):
        del run[name]
    for side in ("baseline", "edited"):
        for name in ("refusal_seen", "accuracy", "kl", "labels", "refusal_by_category", "partial"):
            del run[side][name]
        run[side]["over_refusal"]["borderline"] = None
        run[side]["perplexity"]["by_category"] = {}
    for one in run["passes"]:
        one["hydra"] = {}
        one["log_odds_after"] = None
        for d in one["candidates"]:
            d.update(causal=None, null_percentile=None, purity=None, entanglement={})
            d.update(worst_entanglement=None, worst_category=None)
    run["model"].update(source="folder", name="/home/me/models/tiny|odd_$name$", base=None)
    run["config"] = {}


VARIANTS: list[Callable[[dict[str, Any]], None]] = [baseline_only, one_direction, sparse]


def written(run: dict[str, Any], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete run, with its report."""
    path = written(fake_run(), tmp_path_factory.mktemp("run"))
    build(path)
    return path


def png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def said(figure: Any) -> str:
    return " ".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


def draw(name: str, run: dict[str, Any]) -> Any:
    with style.styled():
        return PLOTS[name](run)


@pytest.mark.slow
def test_a_complete_run_gives_every_plot_the_page_and_the_card(folder: Path) -> None:
    assert {p.name for p in (folder / "plots").iterdir()} == {
        f"{name}.{kind}" for name in PLOTS for kind in ("png", "svg")
    }
    for name in PLOTS:
        width, height = png_size(folder / "plots" / f"{name}.png")
        assert width == (1800 if name == "pipeline" else 1300)
        assert 400 <= height <= 1500
        root = ElementTree.parse(folder / "plots" / f"{name}.svg").getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert {p.name for p in folder.iterdir()} == {"run.json", "plots", "report.html", "README.md"}


@pytest.mark.slow
def test_the_same_run_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    seen: list[Any] = []

    def progress(steps: Any, label: str, total: int) -> Any:
        seen.extend([label, total])
        return iter(steps)

    again = build(written(fake_run(), tmp_path / "again"), progress=progress)
    assert seen == ["draw plots", len(PLOTS)]
    assert again.card.read_bytes() == (folder / "README.md").read_bytes()
    for path in again.plots:
        assert path.read_bytes() == (folder / "plots" / path.name).read_bytes(), path.name


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_lesser_run_has_a_report_too(
    variant: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    run = fake_run()
    variant(run)
    report = build(written(run, tmp_path / "run"))
    drawn = {path.stem for path in report.plots}
    assert drawn == set(applicable(run))
    assert "pipeline" in drawn
    card, page = report.card.read_text("utf-8"), report.html.read_text("utf-8")
    for text in (card, re.sub(r"base64,[^\"]+", "", page)):
        assert not re.search(r"\b(None|nan|inf)\b", text)
    for name in PLOTS:
        assert ("plots/" + name in card) == (name in drawn)
    ModelCard(card)


@pytest.mark.parametrize("name", sorted(PLOTS))
def test_a_plot_without_its_numbers_says_so(name: str) -> None:
    run = {"model": {"name": "m"}, "baseline": {}, "edited": None}
    assert said(draw(name, run)).strip()


def test_titles_state_the_finding() -> None:
    run = fake_run()
    assert "Refusals 97% → 0.9% on 112 held-out prompts" in said(draw("refusal_rates", run))
    assert "Perplexity 12.3 → 12.5; accuracy 31% → 30% on 100 items" in said(
        draw("capability", run)
    )
    assert "from 3.2 to −3.9 nats" in said(draw("hydra", run))
    worst = max(d["worst_entanglement"] for p in run["passes"] for d in p["directions"])
    assert f"at worst {worst:.3g}" in said(draw("entanglement_heatmap", run))
    assert "50 of 270 candidates used" in said(draw("purity_separability", run))
    picture = said(draw("pipeline", run))
    for part in ("97% → 0.9%", "12.3 → 12.5", "96 + 96 prompts", "50 directions", "5 passes"):
        assert part in picture


def test_pictures_of_entanglement_tell_of_what_was_edited_and_by_which_measure() -> None:
    run = fake_run()
    run["config"]["entanglement"] = {"measure": "energy"}
    left = min(run["passes"][0]["candidates"], key=lambda d: d["score"])
    assert left["status"] == "not selected"
    left.update(layer=0, worst_entanglement=1.0, worst_category="logic", purity=0.0)
    left["entanglement"] = dict.fromkeys(CATEGORIES, 1.0)
    edited = [d for p in run["passes"] for d in p["directions"]]
    worst = max(edited, key=lambda d: d["worst_entanglement"])
    middle = median(d["purity"] for d in edited)
    heat, purity, picture = (
        draw(name, run) for name in ("entanglement_heatmap", "purity_separability", "pipeline")
    )
    title = f"of edits is at worst {worst['worst_entanglement']:.3g}: "
    title += f"{worst['worst_category'].replace('_', ' ')}, layer {worst['layer']}"
    assert title in said(heat).replace("\n", " ")
    assert "Energy ratio (0 to 1)" in said(heat)
    assert f"median purity {middle:.2f}" in said(purity)
    assert f"median purity {middle:.2f}" in said(picture)
    assert f"worst {worst['worst_entanglement']:.2f} (" in said(picture)
    for name in ("arithmetic", "logic", "code", "instruction", "factual", "mean energy ratio"):
        assert name in said(picture)
    run["config"]["entanglement"]["measure"] = "overlap"
    assert "mean subspace overlap" in said(draw("pipeline", run))
    assert "Subspace overlap (0 to 1)" in said(draw("entanglement_heatmap", run))


def test_intervals_are_called_what_they_are(tmp_path: Path) -> None:
    for text in (model_card(fake_run()), html_report(fake_run(), tmp_path)):
        (line,) = [line for line in text.splitlines() if "Brackets are" in line]
        assert "Wilson" in line
        assert "bootstrap" in line


def test_no_label_of_an_axis_runs_into_the_heading() -> None:
    with style.styled():
        figure = PLOTS["hydra"](fake_run())
        figure.canvas.draw()
    low = min(text.get_window_extent().y0 for text in figure.texts)
    for axes in figure.axes:
        assert axes.yaxis.label.get_window_extent().y1 < low


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PLOTS))
@pytest.mark.parametrize("variant", [lambda run: None, one_direction])
def test_no_text_is_cut_off(name: str, variant: Callable[[dict[str, Any]], None]) -> None:
    run = fake_run()
    variant(run)
    run["model"]["name"] = "some-organisation/A-Very-Long-Model-Name-8x22B-Instruct-v0.3-$5_and_$6"
    with style.styled():
        figure = PLOTS[name](run)
        figure.canvas.draw()
        for text in [*figure.texts, *(text for axes in figure.axes for text in axes.texts)]:
            box = text.get_window_extent()
            assert box.x0 >= 0, text.get_text()
            assert box.x1 <= figure.bbox.x1, text.get_text()
        box = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert box.x0 >= -0.01
    assert box.y0 >= -0.01
    assert box.x1 <= width + 0.01
    assert box.y1 <= height + 0.01


def test_drawing_leaves_global_settings_alone() -> None:
    before = dict(matplotlib.rcParams)
    draw("capability", fake_run())
    assert dict(matplotlib.rcParams) == before


def test_the_card_is_one_the_hub_can_read(folder: Path) -> None:
    data = ModelCard((folder / "README.md").read_text("utf-8")).data.to_dict()
    assert data["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert data["base_model_relation"] == "finetune"
    assert data["library_name"] == "transformers"
    assert {"saber", "abliterated"} <= set(data["tags"])
    assert "language" not in data


def test_what_is_unknown_is_left_out_of_the_metadata() -> None:
    run = fake_run()
    run["model"].update(source="folder", name="/home/me/secret-place/model", base=None)
    card = model_card(run)
    data = ModelCard(card).data.to_dict()
    assert "license" not in data
    assert "base_model" not in data
    assert "secret-place" not in card


def test_the_card_holds_the_numbers_and_settings_of_the_run(folder: Path) -> None:
    card = (folder / "README.md").read_text("utf-8")
    for part in (
        "97.3% [92.4, 99.1], 109/112", "0.9% [0.2, 4.9], 1/112", "−96.4 points",
        "incoherent answers, target prompts | 0.0% [0.0, 3.3], 0/112 | 1.8%",
        "| 12.3 | 12.5 | +1.2% |", "| 498 | 486 |", "factual recall | 18.6 | 19.3",
        "0.19 [0.12, 0.31]", "0.0135 [0.011, 0.0174] (p95 0.08, max 1.40)",
        "· median prompt | 0 | 0.0061 |",
        "108 prompts refused by the base alone, 0 by",
        "1.012, 95% interval 0.994 to 1.031", "sha256:feedbeef", "model organism",
        "96 fit, 32 validation, 112 held out", "`evaluation.judge = phrases`", "2406.11717",
        "saber run demo --preset card",
    ):  # fmt: skip
        assert part in card, part
    block = card.split("```toml\n")[1].split("```")[0]
    expected = {k: v for k, v in fake_run()["config"].items() if v is not None}
    assert tomllib.loads(block) == expected


def test_the_card_warns_and_names_its_repository() -> None:
    card = model_card(fake_run(), repo_name="someone/demo-saber")
    assert "# demo-saber" in card
    assert 'from_pretrained("someone/demo-saber")' in card
    assert "safety training" in card
    assert "responsibility" in card
    untouched = fake_run()
    baseline_only(untouched)
    assert "abliterated" not in model_card(untouched)
    assert "from_pretrained" not in model_card(untouched)


def test_the_card_holds_no_completion_and_no_prompt(folder: Path) -> None:
    card = (folder / "README.md").read_text("utf-8")
    assert "EXCERPT" not in card
    assert "How do I" not in card


@pytest.mark.slow
def test_another_behaviour_is_called_by_its_name(tmp_path: Path) -> None:
    run = fake_run()
    run["config"]["data"] = {"behaviour": "numbered list"}
    run["prompts"]["borderline"] = None
    run["judge"] = {"name": "regex", "patterns": ["^1[.]"]}
    (tmp_path / "run.json").write_text(json.dumps(run), "utf-8")
    build(tmp_path)
    card = (tmp_path / "README.md").read_text("utf-8")
    page = (tmp_path / "report.html").read_text("utf-8")
    for part in (
        "Numbered list: 97% → 0.9% on 112 held-out prompts", "| numbered list, neutral prompts |",
        "108 prompts answered with it by the base alone", "### Numbered list by category",
        "| judge | regex, patterns: ['^1\\[.\\]'] |".replace("\\", ""),
    ):  # fmt: skip
        assert part in card, part
    assert "abliterated" not in card
    # The demo model is introduced as one that was trained to refuse; nothing else speaks of it.
    spoken = card.split("---", 2)[2].replace("trained it to refuse", "").split("## Prior art")[0]
    left = [line for line in spoken.splitlines() if "refus" in line.lower()]
    assert all("Its refusals were trained" in line or "refusal_rates" in line for line in left), (
        left
    )
    assert "<h3>Numbered list by category</h3>" in page
    assert "Numbered list: 97%" in said(draw("refusal_rates", run))


def narrow_run() -> dict[str, Any]:
    """A run that took out false refusals: 31 of 48 before, 1 after; 6 of 109 right ones went, 3 came."""
    run = fake_run()
    run["config"]["data"] = {"mode": "over-refusal", "behaviour": "refusal"}
    run["prompts"]["target"] = {**prompt_set("target and harmful"), "fit": 224, "validation": 64}
    run["prompts"]["borderline"] = {
        **prompt_set("borderline"), "fit": 416, "validation": 56, "heldout": 48
    }  # fmt: skip
    run["prompts"]["kept"] = [{**prompt_set("house style"), "fit": 15, "heldout": 4}]
    run["comparison"]["refusal"] = {"b": 6, "c": 3, "p_value": 0.51}
    return run


def test_over_refusal_mode_leads_with_false_refusals_and_right_ones_kept(tmp_path: Path) -> None:
    run = narrow_run()
    finding = (
        "False refusals 65% → 2% on 48 held-out borderline prompts; right refusals kept 103/109"
    )
    card, page = model_card(run), html_report(run, tmp_path)
    for text in (card, page):
        assert finding in text
    assert said(draw("refusal_rates", run)).replace("\n", " ").count(finding) == 1
    results = tables.results(run).rows
    assert results[0][0] == "false refusals, held-out borderline prompts"
    assert results[1] == ("right refusals kept, held-out target prompts", "109", "103/109", "")
    assert [row[0] for row in results].count("over-refusal, borderline prompts") == 0
    assert tables.comparisons(run)[0].startswith("Over-refusal: 48 prompts")
    tiles = re.findall(r'class="tile">.*?<b>(.*?)</b>', page)
    assert tiles[:2] == ["65% → 2%", "103/109"]
    picture = said(draw("pipeline", run))
    for part in ("False refusals (48 held out)", "65% → 2%", "Right refusals kept", "103/109",
                 "416 + 96 prompts", "48 held out"):  # fmt: skip
        assert part in picture, part
    assert "97% → 0.9%" not in picture
    rows = draw("refusal_rates", run).axes[0].get_yticklabels()
    assert rows[0].get_text() == "borderline"
    # Each set stands with its own splits.
    sizes = {row[0]: row[1:3] for row in tables.prompts(run).rows}
    assert sizes["borderline"] == ("416 fit, 56 validation, 48 held out", "borderline")
    kept = ("224 fit, 64 validation, 112 held out", "target and harmful")
    assert sizes["target, kept"] == kept
    assert sizes["kept"] == ("15 fit, 32 validation, 4 held out", "house style")
    run["config"]["data"]["behaviour"] = "numbered list"
    assert reading.finding(run) == (
        "Numbered list where it is wrong: 65% → 2% on 48 held-out borderline prompts; "
        "kept where it is right 103/109"
    )


def test_rates_by_length_are_shown_where_they_were_measured(tmp_path: Path) -> None:
    run = fake_run()
    assert "By length" not in model_card(run) + html_report(run, tmp_path)
    for side, late in (("baseline", 0), ("edited", 7)):
        run[side]["lengths"] = [
            {"tokens": n, "refusal": proportion(k, 112), "partial": proportion(2, 112),
             "incoherent": proportion(0, 112)} for n, k in ((20, 0), (256, late))
        ]  # fmt: skip
    for text in (model_card(run), html_report(run, tmp_path)):
        assert "By length of the answers" in text
    row = next(line for line in model_card(run).splitlines() if line.startswith("| 256 | refusal"))
    assert row.endswith("| 0.0% [0.0, 3.3], 0/112 | 6.2% [3.1, 12.3], 7/112 |")


def test_the_page_escapes_what_models_and_prompts_say(folder: Path) -> None:
    page = (folder / "report.html").read_text("utf-8")
    assert "<script" not in page
    assert "EXCERPT &lt;script&gt;alert(1)&lt;/script&gt; &amp; so on" in page
    assert "How do I &lt;b&gt;do&lt;/b&gt; it?" in page


def test_the_page_loads_nothing_from_elsewhere(folder: Path) -> None:
    page = (folder / "report.html").read_text("utf-8")
    assert page.count("data:image/svg+xml;base64,") == len(PLOTS)
    for part in ('src="http', "<link", "@import", "url("):
        assert part not in page


def test_the_page_cuts_long_answers(tmp_path: Path) -> None:
    run = fake_run()
    run["examples"]["target"][0]["after"]["excerpt"] = "step " * 40
    page = html_report(run, tmp_path)
    assert "step " * 15 in page
    assert "step " * 17 not in page


def test_markdown_in_names_stays_text() -> None:
    run = fake_run()
    run["baseline"]["refusal_by_category"] = {"a|b <i> [x](y)": proportion(1, 2)}
    run["edited"]["refusal_by_category"] = {}
    row = next(line for line in model_card(run).splitlines() if "1/2" in line)
    assert row.startswith("| a\\|b &lt;i> [x\\](y) |")
    run["config"]["data"] = {"behaviour": "<b>*loud*"}
    card = model_card(run).split("## Configuration")[0]
    assert card.count("&lt;b>\\*loud\\*") > 5
    assert "<b>" not in card
    run["edited"] = None
    assert "<b>" not in model_card(run).split("## Configuration")[0]


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "no run.json"), ("{", "not valid JSON"), ('{"schema": 9}', "schema 9"),
     ('{"schema": 1, "model": {}}', "baseline")],
)  # fmt: skip
def test_a_broken_run_is_refused_with_a_remedy(
    content: str | None, problem: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=problem) as caught:
        build(tmp_path)
    assert caught.value.remedy
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0135, "0.0135"), (1.04, "1.04"), (12.31, "12.3"), (498.0, "498"), (1204.2, "1,204"),
     (-3.9, "−3.90"), (0, "0"), (None, "–"), (math.nan, "–"), (99.96, "100"), (2e-6, "2.0e-06")],
)  # fmt: skip
def test_numbers_keep_three_digits(value: Any, text: str) -> None:
    assert reading.number(value) == text


def test_rates_are_never_rounded_to_none_or_all() -> None:
    assert [reading.percent(x) for x in (0.0, 1 / 112, 0.5, 111 / 112, 1.0)] == [
        "0%", "0.9%", "50%", "99.1%", "100%",
    ]  # fmt: skip


def test_toml_survives_awkward_values() -> None:
    config = {"a b": 'quote " and \\ and \n', "n": 1e-05, "on": True, "empty": {},
              "list": [1, 2.5, "x"], "inner": {"deep": {"x": 1}, "y": "é"}}  # fmt: skip
    assert tomllib.loads(dumps(config)) == config


def test_each_row_of_a_table_is_as_wide_as_its_header() -> None:
    run = fake_run()
    for make in (tables.results, tables.by_category, tables.hydra, tables.directions,
                 tables.prompts):  # fmt: skip
        table = make(run)
        assert table.rows
        assert {len(row) for row in table.rows} == {len(table.header)}


def test_what_rounding_alone_moves_stands_in_the_base_column() -> None:
    run = fake_run()

    def base() -> list[str]:
        return [row[1] for row in tables.results(run).rows if "KL" in row[0] or "median" in row[0]]

    assert base() == ["0", "0", "0"]
    run["baseline"]["kl"].update(first_token=0.0017, sequence=0.0012, sequence_median=0.001)
    assert base() == [f"{x} (rounding alone)" for x in ("0.0017", "0.0012", "0.001")]
    for which, moved in (("baseline", 0.0003), ("edited", 0.02)):
        run[which]["kept"] = {"mine/heldout": {"kl": {"sequence": moved}}}
    assert base()[0] == "0.0003 (rounding alone)"
    run["baseline"]["kept"]["mine/heldout"]["kl"]["sequence"] = 0.0
    assert base()[0] == "0"


def test_prompts_that_were_left_out_are_told() -> None:
    run = fake_run()
    run["prompts"]["neutral"]["left_out"] = 7
    run["prompts"]["capability"]["left_out"] = 1
    sizes = {row[0]: row[1] for row in tables.prompts(run).rows}
    assert "7 left out" in sizes["neutral"]
    assert "1 left out" in sizes["capability"]
    assert "left out" not in sizes["target"]


def test_a_strength_that_failed_and_openings_that_tell_nothing_are_told(tmp_path: Path) -> None:
    run = fake_run()
    assert "failed" not in model_card(run)
    shown = {"rate": 0.1, "incoherent": 0.0, "lost": 0.0}
    run["passes"][0] |= {"by_answers": True, "search": [
        {"lambda": 30.0, "boost": 1.0, "opening": 0.0, "shown": shown, "chosen": True, "failed": ""},
        {"lambda": 10.0, "boost": 1.0, "opening": None, "shown": None, "chosen": False,
         "failed": "NaN or infinity in the output of layer 3."},
    ]}  # fmt: skip
    found = tables.search(run).rows
    assert [row[-1] for row in found] == ["taken", "failed"]
    assert found[1][3:-1] == ("–",) * 6
    for text in (model_card(run), html_report(run, tmp_path)):
        assert "In pass 1 first tokens told nothing of the behaviour" in text
        assert "λ 10.0 with boost 1.00 failed and ended the search: NaN or infinity in" in text


@pytest.mark.parametrize("key", ["environment", "config", "judge", "prompts", "seconds", "passes"])
def test_a_record_of_another_form_is_one_line(
    folder: Path, tmp_path: Path, key: str, capsys
) -> None:
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    (tmp_path / "run.json").write_text(json.dumps({**record, key: "x"}), encoding="utf-8")
    assert main(["report", str(tmp_path)]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "is not as it was written" in said
    assert "copy it anew" in said


def test_a_record_that_was_cut_off_is_not_to_be_resumed(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"schema": 1', encoding="utf-8")
    with pytest.raises(DataError, match="not valid JSON") as caught:
        build(tmp_path)
    assert "--resume" not in caught.value.remedy
