"""The main job on a pico model: files, determinism, resume, and that held-out prompts select nothing."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import SHARED_CACHE, fewer_capabilities, make_tokenizer, thinned
from safetensors.torch import load_file

from saber import artifacts, editors, pipeline, prompts, refinement, subject
from saber.ablation import EditPlan, applied
from saber.checkpoint.apply import apply_to_files
from saber.checkpoint.export import export_all
from saber.checkpoint.runs import Run
from saber.cli.main import main
from saber.config import PRESETS, override, preset, read_toml, resolved
from saber.errors import (
    DataError,
    ModelError,
    NoEdit,
    NoGain,
    NonFinite,
    OutputError,
    UnknownName,
    UsageError,
    WeakBehaviour,
)
from saber.evaluation import judge as judges
from saber.evaluation.divergence import diverge, own_answers
from saber.evaluation.readout import Readout
from saber.gathering import gather
from saber.hydra import compensation
from saber.lm.forward import silent
from saber.lm.generate import Completion
from saber.lm.load import LoadSpec, load
from saber.lm.model import fingerprint
from saber.lm.writers import find_writers
from saber.memo import forgetful
from saber.openings import Fitted
from saber.passes import Refinement
from saber.pipeline import run
from saber.prompts.splits import NAMES
from saber.record import describe_data
from saber.report.toml import dumps
from saber.run_folder import load_pass, prepare_folder
from saber.strength import Ruler, Shown
from saber.subject import (
    NARROW_RIDGE,
    Subject,
    Watch,
    calm,
    calm_by_category,
    in_mode,
    refined,
    wrongly,
)

SMALL = {
    "data": {"limit": 4},
    "spectral": {"permutations": 50},
    "entanglement": {"null_draws": 20, "weight": 0.0},
    "edit": {"scope": "all", "lambda": 1.0, "sensitivity": 1.0},
    "refine": {"passes": 2, "top_k": 1, "shortlist": 0, "stop": "never", "max_q": 1.0},
    "evaluation": {"max_new_tokens": 6, "battery_new_tokens": 4},
    "load": {"device": "cpu", "dtype": "float32"},
}


def small(name="orthogonal", **extra):
    config = override(preset(name), SMALL)
    if name == "default":
        config = override(config, {"refine": {"top_k": 0}})
    return override(config, extra) if extra else config


def untimed(record):
    return {
        k: v for k, v in record.items() if k not in ("seconds", "environment", "work", "command")
    }


def whole(record):
    """Tokens of a run and of what it took from an earlier one."""
    kept = record["work"]["baseline"]
    return record["work"]["tokens"] + kept["kept"] * kept["tokens"]


both = pytest.mark.parametrize("name", ["default", "orthogonal"])


@pytest.fixture(scope="module")
def third_files(tmp_path_factory):
    """Every third of the bundled prompts: with fewer, not every layer's direction would be taken."""
    return thinned(tmp_path_factory.mktemp("third"), 3)


@pytest.fixture
def third(third_files):
    """The same, with few of the capability prompts."""
    with fewer_capabilities():
        yield third_files


@pytest.fixture(scope="module", params=["default", "orthogonal"])
def finished(request, pico, third_files, tmp_path_factory):
    """A run on a `third` that tests look at and do not change."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with fewer_capabilities():
        return run(str(pico), folder, small(request.param, data=third_files), force=True)


@pytest.mark.slow
def test_run_leaves_a_complete_folder(finished, pico, tmp_path):
    import transformers

    folder, record = finished.folder, json.loads((finished.folder / "run.json").read_text())
    assert record == json.loads(json.dumps(finished.record))
    assert record["schema"] == 1
    assert set(record["seconds"]) >= {"load", "probe", "total"}
    selective = record["config"]["edit"]["kind"] == "selective"
    assert record["directions_ablated"] == (4 if selective else 2)
    assert not (folder / "state.json").exists()
    for key in ("refusal", "incoherent", "over_refusal", "perplexity", "accuracy", "kl"):
        assert key in record["baseline"]
        assert key in record["edited"]
    assert record["baseline"]["kl"]["sequence"] == 0.0
    kl = record["edited"]["kl"]
    assert 0.0 < kl["sequence_low"] < kl["sequence"] < kl["sequence_high"]
    assert 0.0 < kl["first_token_low"] < kl["first_token"] < kl["first_token_high"]
    assert 0.0 < kl["sequence_median"] < kl["sequence_p95"]
    everyday = record["edited"]["kl_everyday"]
    assert 0.0 < everyday["sequence_low"] < everyday["sequence"] < everyday["sequence_high"]
    assert everyday["sequence"] != kl["sequence"]
    assert record["baseline"]["kl_everyday"]["sequence"] == 0.0
    assert record["edited"]["over_refusal"]["everyday"]["n"] == 4
    assert record["prompts"]["everyday"]["heldout"] == 4
    assert (
        record["comparison"]["perplexity_ratio"]["low"]
        <= record["comparison"]["perplexity_ratio"]["high"]
    )
    for this in record["passes"]:
        felt = [row["sensitivity"] for row in this["directions"]]
        if not selective:
            assert set(felt) == {None}
            continue
        assert len({row["lambda"] for row in this["directions"]}) == 4
        for row in this["directions"]:
            dear = (row["sensitivity"] / (sum(felt) / 4)) ** record["config"]["edit"]["sensitivity"]
            assert row["lambda"] == pytest.approx(1.0 * dear)
    edited = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    base = transformers.AutoModelForCausalLM.from_pretrained(pico)
    changed = {
        n for n, p in edited.state_dict().items() if not torch.equal(p, base.state_dict()[n])
    }
    assert changed == {
        f"model.layers.{i}.{w}.weight"
        for i in range(4)
        for w in ("self_attn.o_proj", "mlp.down_proj")
    }
    assert edited.dtype == base.dtype
    transformers.AutoTokenizer.from_pretrained(folder / "model")
    # The plan made on the base's files, without the model, gives the same weights.
    made = apply_to_files(folder, str(pico), tmp_path / "applied")
    assert made.record.origin["base_fingerprint"] == record["model"]["fingerprint"]
    weights = load_file(tmp_path / "applied" / "model.safetensors")
    for name, value in load_file(folder / "model" / "model.safetensors").items():
        assert torch.equal(value, weights[name])


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["off", "on"])
def test_same_seed_gives_the_same_record(finished, pico, third, tmp_path, monkeypatch, cache):
    monkeypatch.setenv("SABER_CACHE", SHARED_CACHE if cache == "on" else "off")
    config = small(finished.record["config"]["preset"], data=third)
    again = run(str(pico), tmp_path / "again", config, force=True).record
    assert json.dumps(untimed(finished.record)) == json.dumps(untimed(again))
    # An earlier run's measures of the untouched model are the same, and cost nothing.
    assert again["work"]["baseline"]["kept"] == (cache == "on")
    assert whole(again) == whole(finished.record)


@pytest.mark.slow
def test_card_preset_has_the_cards_counts(model_folder, few, tmp_path):
    config = override(
        small("card", data=few), {"refine": {"passes": 5, "shortlist": 0, "top_k": 3}}
    )
    record = run(str(model_folder), tmp_path / "card", config, force=True, export=()).record
    assert record["directions_ablated"] == 15
    assert len(record["passes"]) == 5
    assert all(len(p["directions"]) == 3 for p in record["passes"])
    card = PRESETS["card"]
    assert (card.refine.top_k, card.edit.alpha, card.refine.passes, card.spectral.components) == (
        10,
        0.85,
        5,
        3,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["orthogonal", "default"])
def test_a_run_in_half_precision_leaves_other_weights_as_they_are_stored(
    model_folder, few, tmp_path, name
):
    config = small(name, data=few, refine={"passes": 1}, load={"dtype": "bfloat16"})
    record = run(str(model_folder), tmp_path / "run", config, force=True).record
    assert record["model"]["compute_dtype"] == "bfloat16"
    assert record["model"]["storage_dtype"] == "float32"
    # A later load in another dtype still knows the model.
    assert record["model"]["fingerprint"] == fingerprint(load(str(model_folder)).model)
    assert record["baseline"]["kl"]["sequence"] > 0  # what rounding moves
    plan = EditPlan.load(tmp_path / "run" / "plan")
    changes = {f"{n}.weight": factor.delta() for n, factor in plan.factors.items()}
    before = load_file(model_folder / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert after.keys() == before.keys()
    for weight, value in after.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[weight] + changes.pop(weight, 0))
    assert not changes


@pytest.mark.slow
@both
def test_held_out_prompts_select_nothing(model_folder, few, tmp_path, monkeypatch, name):
    """With every held-out prompt replaced by another text, the very same edit is made."""
    config = small(name, data=few, edit={"lambda": 0.0})
    first = run(str(model_folder), tmp_path / "a", config, force=True, export=())
    original = pipeline.gather

    def other(config):
        data = original(config)

        def swapped(given):
            return replace(
                given,
                prompts=tuple(replace(p, text=f"Unlike text {i}") for i, p in enumerate(given)),
            )

        sets = data.reporting
        return replace(
            data,
            reporting=replace(
                sets,
                target=swapped(sets.target),
                neutral=swapped(sets.neutral),
                borderline=swapped(sets.borderline),
                battery=swapped(sets.battery),
                everyday=swapped(sets.everyday),
            ),
        )

    monkeypatch.setattr(pipeline, "gather", other)
    second = run(str(model_folder), tmp_path / "b", config, force=True, export=())
    assert first.record["passes"] == second.record["passes"]
    assert first.record["baseline"]["perplexity"] != second.record["baseline"]["perplexity"]
    plans = [(tmp_path / n / "plan" / "tensors.safetensors").read_bytes() for n in "ab"]
    assert plans[0] == plans[1]


def test_splits_that_select_and_report_share_no_prompt():
    data = gather(PRESETS["default"])
    chosen = data.selecting
    selecting = [
        chosen.target,
        chosen.neutral,
        chosen.target_validation,
        chosen.neutral_validation,
        chosen.capability,
    ]
    sets = data.reporting
    texts = {prompts.normalised(p.text) for s in selecting for p in s}
    held = [
        prompts.normalised(p.text)
        for s in (sets.target, sets.neutral, sets.borderline, sets.battery)
        for p in s
    ]
    assert len(held) > 300
    assert not texts & set(held)


@pytest.mark.slow
@pytest.mark.parametrize("finished", ["default"], indirect=True)
def test_how_often_inputs_are_read_changes_no_digit_of_a_run(finished, pico, third, tmp_path):
    config = small("default", data=third, edit={"memory": 1e-6})
    less = run(str(pico), tmp_path / "run", config, force=True)
    records = [untimed(found.record) for found in (finished, less)]
    for record in records:
        del record["config"]["edit"]["memory"], record["exports"]
    assert records[0] == records[1]
    assert whole(less.record) > whole(finished.record)
    plans = [EditPlan.load(found.folder / "plan").digest() for found in (finished, less)]
    assert plans[0] == plans[1]


@pytest.mark.slow
@pytest.mark.parametrize("finished", ["orthogonal"], indirect=True)
def test_resume_repeats_no_finished_pass_and_ends_alike(finished, pico, third, tmp_path):
    config = small(data=third)
    seen = []

    class Stop(Exception):
        pass

    def stop(this):
        seen.append(this.index)
        raise Stop

    with pytest.raises(Stop):
        run(
            str(pico),
            tmp_path / "cut",
            config,
            force=True,
            listener=pipeline.Listener(on_pass=stop),
        )
    assert not (tmp_path / "cut" / "run.json").exists()
    again = []
    resumed = run(
        str(pico),
        tmp_path / "cut",
        config,
        force=True,
        resume=True,
        listener=pipeline.Listener(on_pass=lambda p: again.append(p.index)),
    )
    assert (seen, again) == ([1], [2])
    assert untimed(resumed.record) == untimed(finished.record)
    folders = (finished.folder, tmp_path / "cut")
    plans = [(f / "plan" / "tensors.safetensors").read_bytes() for f in folders]
    assert plans[0] == plans[1]
    with pytest.raises(OutputError, match="finished"):
        run(str(pico), tmp_path / "cut", config, resume=True)


@pytest.mark.slow
def test_resume_with_other_settings_is_refused(model_folder, few, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(
            str(model_folder),
            tmp_path / "x",
            small(data=few),
            force=True,
            listener=pipeline.Listener(on_stage=_interrupt_measuring),
        )
    with pytest.raises(UsageError, match="config"):
        run(str(model_folder), tmp_path / "x", small(data=few, seed=5), force=True, resume=True)


@pytest.mark.slow
def test_a_damaged_pass_is_not_gone_on_from(model_folder, few, tmp_path):
    class Stop(Exception):
        pass

    def stop(_pass):
        raise Stop

    def go(**options):
        run(str(model_folder), tmp_path / "x", small(data=few), force=True, **options)

    with pytest.raises(Stop):
        go(listener=pipeline.Listener(on_pass=stop))
    meta = tmp_path / "x" / "passes" / "1" / "meta.json"
    whole = json.loads(meta.read_text())
    del whole["candidates"][0]["direction"]["layer"]
    for text, what in (
        (json.dumps(whole), "does not hold a whole pass"),
        ("{", "is not valid JSON"),
    ):
        meta.write_text(text)
        with pytest.raises(DataError, match=rf"passes.1.meta\.json {what}"):
            go(resume=True)


@pytest.mark.slow
def test_resume_with_other_prompts_or_another_template_is_refused(model_folder, tmp_path):
    """The names of the files and the settings are the same; what is in the files is not."""
    files = {}
    for kind in ("target", "neutral", "eval_target"):
        path = tmp_path / f"{kind}.txt"
        path.write_text("\n".join(f"{kind} request {i}" for i in range(20)))
        files[kind] = str(path)
    template = tmp_path / "t.jinja"
    template.write_text(make_tokenizer().chat_template)
    config = small(data=files, load={"chat_template": str(template)})

    def go(**options):
        run(str(model_folder), tmp_path / "x", config, force=True, **options)

    with pytest.raises(KeyboardInterrupt):
        go(listener=pipeline.Listener(on_stage=_interrupt_measuring))
    for path, what in ((tmp_path / "eval_target.txt", "prompts"), (template, "template")):
        kept = path.read_text()
        path.write_text(kept.replace("request", "demand").replace("<end>", "<end> "))
        with pytest.raises(UsageError, match=f"another .*{what}"):
            go(resume=True)
        path.write_text(kept)
    with pytest.raises(KeyboardInterrupt):
        go(resume=True, listener=pipeline.Listener(on_stage=_interrupt_measuring))


def test_each_split_of_each_set_has_a_fingerprint_of_its_own(tmp_path):
    files = {}
    for kind in ("target", "neutral", "eval_target", "keep"):
        path = tmp_path / f"{kind}.txt"
        path.write_text("\n".join(f"{kind} request {i}" for i in range(20)))
        files[kind] = str(path)

    def described():
        return describe_data(gather(override(preset("default"), {"data": files})))

    before = described()
    parts = ("fingerprint", "validation_fingerprint", "heldout_fingerprint")
    rows = [before["target"], before["neutral"], *before["kept"]]
    marks = [row[part] for row in rows for part in parts]
    assert len(marks) == 9
    assert len(set(marks)) == len(marks)
    (tmp_path / "eval_target.txt").write_text("another one\n")
    after = described()
    changed = {p for p in parts if before["target"][p] != after["target"][p]}
    assert changed == {"heldout_fingerprint"}
    assert {k for k in before if before[k] != after[k]} == {"target"}


def _interrupt_measuring(stage):
    if stage.startswith("measuring"):
        raise KeyboardInterrupt


def test_a_model_that_hardly_refuses_is_not_edited(model_folder, tmp_path):
    with pytest.raises(WeakBehaviour) as caught:
        run(str(model_folder), tmp_path / "weak", small())
    assert caught.value.exit_code == 3
    assert "another --judge for other languages than English" in caught.value.remedy
    assert not (tmp_path / "weak" / "plan").exists()
    assert not (tmp_path / "weak" / "run.json").exists()


def test_out_is_checked_before_anything_is_loaded(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(OutputError):
            run("no-such-model", tmp_path, small(), overwrite=overwrite)
    assert (tmp_path / "precious.txt").read_text() == "mine"
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        run("no-such-model", tmp_path / "file", small())


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": True}])
def test_one_run_at_a_time_in_a_folder(tmp_path, options):
    """A second one would go on with the first's passes, or remove them."""
    with artifacts.claimed(tmp_path / "out"), pytest.raises(OutputError, match="another process"):
        run("demo", tmp_path / "out", small(), **options)
    assert not list(tmp_path.iterdir())


def test_a_place_where_no_lock_can_be_made_is_told(tmp_path, monkeypatch):
    """As in /proc, where a folder is there and nothing can be made in it."""

    def none(*_args, **_kwargs):
        raise FileNotFoundError(2, "No such file or directory")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", none)
        with pytest.raises(OutputError, match=r"cannot write .*: No such file"):
            artifacts.claimed(tmp_path / "out").__enter__()


def test_a_report_that_cannot_be_written_does_not_lose_the_run(
    model_folder, few, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out"
    settings = tmp_path / "c.toml"
    config = override(small("default", data=few), {"edit": {"scope": "nearest"}})
    settings.write_text(dumps(resolved(config)))
    asked = [str(model_folder), "--out", str(out), "--config", str(settings), "--force"]
    for fault, code, told in (
        (OutputError("cannot write report.html: disk full."), 2, "not its report: cannot"),
        (KeyboardInterrupt(), 130, "is finished and safe there"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr("saber.cli.commands.build", Mock(side_effect=fault))
            assert main(["run", *asked, *([] if code == 2 else ["--overwrite"])]) == code
        said = capsys.readouterr().err.splitlines()[-1]
        assert told in said
    for command in said.partition(" with: ")[2].split(" && "):
        assert main(shlex.split(command)[1:]) == 0
    assert (out / "report.html").exists()
    assert (out / "model" / "config.json").exists()


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": True}])
def test_a_folder_that_no_run_has_marked_stays_as_it_is(model_folder, tmp_path, options):
    """A folder with a model and a README only looks like a run's."""
    mine = tmp_path / "mine"
    shutil.copytree(model_folder, mine / "model")
    (mine / "README.md").write_text("mine")
    (mine / "run.json").write_text('{"lap": 1}')
    before = contents(mine)
    for model in (str(mine / "model"), str(model_folder)):
        with pytest.raises(OutputError) as caught:
            run(model, mine, small(), force=True, **options)
        assert "--resume" not in caught.value.remedy
    assert contents(mine) == before


def test_a_model_inside_out_is_refused(model_folder, tmp_path):
    (tmp_path / "link").symlink_to(model_folder)
    for out in (model_folder, model_folder.parent, tmp_path / "link"):
        for overwrite in (False, True):
            with pytest.raises(OutputError, match="lies in --out"):
                run(str(model_folder), out, small(), overwrite=overwrite)
    assert (model_folder / "config.json").is_file()


def test_what_may_be_done_with_a_run_is_suggested_and_no_more(tmp_path):
    state = {"model": "", "config": {}, "judge": {}, "version": "0"}
    out = tmp_path / "o"
    out.mkdir()
    (out / "state.json").write_text(json.dumps(state))
    with pytest.raises(OutputError, match=r"interrupted run.*--resume, or --overwrite"):
        prepare_folder(out, overwrite=False, resume=False)
    prepare_folder(out, overwrite=False, resume=True)
    (out / "run.json").write_text(json.dumps({"config": {}, "saber_version": "0"}))
    with pytest.raises(OutputError, match=r"finished run.*another, or --overwrite\.$"):
        prepare_folder(out, overwrite=False, resume=False)
    (out / "mine.part").write_text("mine")
    with pytest.raises(OutputError, match=r"not a run's \(mine\.part\)"):
        prepare_folder(out, overwrite=True, resume=False)
    (out / "mine.part").rename(out / ".ours.part")
    (out / "plots").mkdir()
    (out / "plots" / "fig1.pdf").write_text("mine")
    with pytest.raises(OutputError, match=r"plots/fig1\.pdf"):
        prepare_folder(out, overwrite=True, resume=False)
    (out / "plots" / "fig1.pdf").rename(out / "plots" / "fig1.png")
    prepare_folder(out, overwrite=True, resume=False)
    assert not list(out.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("finished", ["orthogonal"], indirect=True)
def test_overwrite_replaces_a_former_run(finished, pico, third, tmp_path):
    folder = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    config = small(data=third, seed=1)
    again = run(str(pico), folder, config, force=True, overwrite=True, export=())
    assert again.record["config"]["seed"] == 1
    assert not (folder / "model").exists()


@pytest.mark.slow
def test_nan_weights_name_the_layer(model_folder, few, tmp_path):
    import transformers

    from saber.errors import SaberError

    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = float("nan")
    broken = tmp_path / "broken"
    model.save_pretrained(broken)
    make_tokenizer().save_pretrained(broken)
    with pytest.raises(SaberError, match="layer 2"):
        run(str(broken), tmp_path / "out", small(data=few), force=True)
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.mark.slow
def test_a_measure_that_is_not_finite_is_named(model_folder, few, tmp_path, monkeypatch):
    whole = pipeline.summarise

    def overflown(measured):
        found = whole(measured)
        return {**found, "kl_everyday": {**found["kl_everyday"], "sequence": float("inf")}}

    monkeypatch.setattr(pipeline, "summarise", overflown)
    with pytest.raises(NonFinite, match=r"the untouched model's kl_everyday\.sequence.*--dtype"):
        run(str(model_folder), tmp_path / "out", small(data=few), force=True)
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.mark.slow
def test_an_export_that_fails_leaves_a_finished_run(
    model_folder, few, tmp_path, monkeypatch, capsys
):
    """Whatever an exporter comes to, one line says how to go on, and that works."""

    def full(_handle, _data):
        raise OSError(28, "No space left on device")

    config = small(data=few)
    out = tmp_path / "out"
    plots = pipeline.Listener(on_record=lambda folder: Path(folder, "told").touch())
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(OutputError, match=r"is finished.*No space left") as caught:
            run(str(model_folder), out, config, force=True, listener=plots)
    assert not (out / "model").exists()
    assert not list(out.glob(".*.part"))
    assert not (out / "state.json").exists()
    assert (out / "told").exists()
    record = json.loads((out / "run.json").read_text())
    assert record["exports"] == []
    assert record["seconds"]["total"] > 0
    with pytest.raises(OutputError, match="saber export writes"):
        run(str(model_folder), out, config, force=True, resume=True)

    with monkeypatch.context() as patched:
        broken = Mock(side_effect=RuntimeError("no such kernel\nand much more"))
        patched.setattr("saber.checkpoint.export.write_lora", broken)
        made = Run.load(out)
        with pytest.raises(OutputError, match="RuntimeError: no such kernel") as both:
            list(
                export_all(
                    made, ["merged", "lora"], out, lm=load(str(model_folder)), spec=LoadSpec()
                )
            )
    assert both.value.remedy.count("saber export") == 2
    assert both.value.exit_code == caught.value.exit_code == 2

    assert main(["report", str(out)]) == 0
    command = shlex.split(caught.value.remedy.partition(": ")[2])
    assert command[:2] == ["saber", "export"]
    assert main(command[1:]) == 0
    assert load_file(out / "model" / "model.safetensors")


def test_settings_from_toml_and_their_errors(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("seed = 3\n[edit]\nalpha = 0.5\n")
    config = override(PRESETS["default"], read_toml(file))
    assert (config.seed, config.edit.alpha) == (3, 0.5)
    assert resolved(config)["edit"]["alpha"] == 0.5
    config = override(config, {"edit": {"lambda": 10}})
    assert (config.edit.lambda_, resolved(config)["edit"]["lambda"]) == (10.0, 10.0)
    assert override(PRESETS["default"], resolved(config)) == config
    with pytest.raises(UsageError, match=r"edit\.lambda is -1"):
        override(config, {"edit": {"lambda": -1}})
    with pytest.raises(UnknownName, match=r"edit\.alhpa.*edit\.alpha"):
        override(config, {"edit": {"alhpa": 1.0}})
    with pytest.raises(UsageError, match="between 0 and 1"):
        override(config, {"edit": {"alpha": 3.0}})
    with pytest.raises(UnknownName, match="covariance"):
        override(config, {"spectral": {"method": "covarianc"}})
    with pytest.raises(UsageError, match="needs int"):
        override(config, {"refine": {"passes": 1.5}})
    file.write_text("seed = ")
    with pytest.raises(UsageError, match="TOML"):
        read_toml(file)
    file.write_bytes(b"\xef\xbb\xbfseed = 3\r\n")  # as some editors on Windows save it
    assert read_toml(file) == {"seed": 3}


@pytest.mark.parametrize("text", [f"seed = 1{'0' * 5000}", f"a = {'[' * 3000}{']' * 3000}"])
def test_toml_beyond_what_python_reads(tmp_path, text):
    file = tmp_path / "c.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match="not valid TOML"):
        read_toml(file)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"edit": {"lambda": 10**400}}, "needs float"),
        ({"evaluation": {"lengths": "9" * 5000}}, "needs whole numbers"),
        ({"data": {"target": ["a.txt"]}}, r"data\.target needs text, not \['a.txt'\]"),
        ({"data": {"behaviour": 5}}, r"data\.behaviour needs text, not 5"),
        ({"load": {"system": {"x": "1"}}}, r"load\.system needs text"),
    ],
)
def test_values_of_other_types_are_not_taken_for_text_or_numbers(values, said):
    with pytest.raises(UsageError, match=said):
        override(PRESETS["default"], values)


@pytest.mark.slow
def test_ctrl_c_exits_130_and_says_how_to_go_on(few, model_folder, tmp_path):
    code = (
        "import sys, saber.pipeline as p, saber.cli.commands as c\n"
        "from saber.cli.main import main\n"
        "def cut(*a, **k): raise KeyboardInterrupt\n"
        "p.refined = cut\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = [
        "run",
        str(model_folder),
        "--out",
        str(tmp_path / "o"),
        "--force",
        "--limit",
        "2",
        "--max-new-tokens",
        "4",
        *(f"--{name}={file}" for name, file in few.items()),
    ]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    assert "--resume" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "o" / "run.json").exists()


def test_the_judge_registry_is_what_runs_use():
    with pytest.raises(UnknownName):
        judges.named_judge("phrase")


def test_retained_categories_leave_the_targets_and_are_kept():
    data = gather(override(PRESETS["default"], {"data": {"retain": "fraud,weapons"}}))
    chosen, held = data.selecting, data.reporting
    (kept,), (validation,), (reported,) = chosen.keep, chosen.keep_validation, held.kept
    assert set(kept.categories) == {"fraud", "weapons"} == set(reported.categories)
    for left in (chosen.target, chosen.target_validation, held.target):
        assert not {"fraud", "weapons"} & set(left.categories)
    parts = [
        {p.id for p in s}
        for s in (kept, validation, reported, chosen.target, chosen.target_validation, held.target)
    ]
    assert sum(map(len, parts)) == 240 == len(set().union(*parts))


def test_a_category_that_is_held_out_as_a_whole_can_be_retained():
    usual = gather(PRESETS["default"])
    unseen = sorted(set(usual.reporting.target.categories) - usual.reporting.seen)
    data = gather(override(PRESETS["default"], {"data": {"retain": unseen[:1]}}))
    assert set(data.selecting.keep[0].categories) == set(unseen[:1])
    assert len(data.selecting.keep[0]) >= 8
    assert unseen[0] not in data.reporting.target.categories


def test_retain_names_the_nearest_category_and_leaves_enough():
    with pytest.raises(UnknownName, match="'fraud'"):
        gather(override(PRESETS["default"], {"data": {"retain": "fraudd"}}))
    every = sorted({p.category for p in prompts.target()})
    with pytest.raises(DataError, match="fewer categories"):
        gather(override(PRESETS["default"], {"data": {"retain": every}}))


def test_an_edit_that_cannot_tell_inputs_apart_keeps_nothing():
    for changes in ({"keep": "x.txt"}, {"retain": "fraud"}, {"mode": "over-refusal"}):
        with pytest.raises(UsageError, match="tell inputs apart"):
            override(PRESETS["card"], {"data": changes})


def test_the_embedding_is_edited_by_an_orthogonal_edit_alone():
    for kind in ("orthogonal", "card"):
        assert override(PRESETS[kind], {"edit": {"embeddings": True}}).edit.embeddings
    with pytest.raises(UsageError, match=r"no effect on a selective edit.*--edit orthogonal"):
        override(PRESETS["default"], {"edit": {"embeddings": True}})


def test_keep_files_are_split_and_must_not_overlap_with_targets(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("\n".join(f"Tell me fact number {i} about Norway." for i in range(30)))
    config = override(PRESETS["default"], {"data": {"keep": [str(file)]}})
    data = gather(config)
    sets = (data.selecting.keep[0], data.selecting.keep_validation[0], data.reporting.kept[0])
    assert sum(map(len, sets)) == 30
    (described,) = describe_data(data)["kept"]
    assert [described[part] for part in NAMES] == [len(s) for s in sets]
    assert described["name"] == "mine"
    file.write_text("\n".join(p.text for p in list(prompts.target())[:30]))
    with pytest.raises(DataError, match="same prompt"):
        gather(config)
    file.write_text("Only one.\n")
    with pytest.raises(DataError, match="need 20"):
        gather(config)


HELD = prompts.neutral().where(split="heldout").texts[:30]
FITTED = prompts.neutral().where(split="fit").texts[:30]
MINE = [f"Tell me fact number {i} about Norway." for i in range(30)]


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ({"keep": HELD}, r"keep/\w+ and in neutral/heldout: .* --keep gives"),
        ({"keep": prompts.battery().texts}, r"keep/\w+ and in battery: .* --keep gives"),
        (
            {"keep": prompts.borderline().where(split="heldout").texts},
            r"keep/\w+ and in borderline/heldout: .* --keep gives",
        ),
        ({"keep": FITTED}, r"neutral/fit and in keep/heldout: .* --keep gives"),
        ({"everyday": prompts.battery().texts}, "everyday/fit and in battery: .* --everyday gives"),
        ({"eval_target": FITTED}, "neutral/fit and in eval_target: .* --eval-target gives"),
        ({"borderline": FITTED}, "neutral/fit and in borderline: .* --borderline gives"),
        (
            {"keep": MINE, "eval_neutral": [t.upper() for t in MINE]},
            "keep/fit and in eval_neutral: .* --keep or --eval-neutral gives",
        ),
        (
            {"target": prompts.capability().texts, "neutral": MINE},
            "capability and in target/heldout: .* --target gives",
        ),
    ],
)
def test_what_selects_is_not_reported_on(texts, said, tmp_path):
    data = {}
    for name, some in texts.items():
        file = tmp_path / f"{name}.txt"
        file.write_text("\n".join(" ".join(text.split()) for text in some))
        data[name] = [str(file)] if name == "keep" else str(file)
    with pytest.raises(DataError, match=said) as error:
        gather(override(PRESETS["default"], {"data": data}))
    assert "\n" not in str(error.value)
    assert "must not be reported on" in str(error.value)


def test_targets_are_not_preserved_as_well(tmp_path):
    rows = [{"prompt": text, "split": "fit"} for text in MINE[:8]]
    for split, some in (("validation", MINE[8:12]), ("heldout", MINE[12:])):
        rows += [{"prompt": text, "split": split} for text in some]
    rows[0]["prompt"] = prompts.capability().texts[0]
    target, neutral = tmp_path / "target.jsonl", tmp_path / "neutral.txt"
    target.write_text("\n".join(map(json.dumps, rows)))
    neutral.write_text("\n".join(f"Tell me fact number {i} about Peru." for i in range(30)))
    files = {"target": str(target), "neutral": str(neutral)}
    with pytest.raises(DataError, match=r"target/fit and in capability: .*cannot be preserved"):
        gather(override(PRESETS["default"], {"data": files}))


@pytest.mark.parametrize("mode", ["removal", "over-refusal"])
@pytest.mark.parametrize("battery", ["all", "half"])
def test_bundled_sets_and_a_keep_file_of_ones_own_lie_apart(mode, battery, tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("\n".join(MINE))
    for more in ({}, {"keep": [str(file)]}):
        gather(override(PRESETS["default"], {"data": {"mode": mode, "battery": battery, **more}}))
    if mode == "removal":
        for category in sorted({p.category for p in prompts.target()}):
            gather(override(PRESETS["default"], {"data": {"retain": category}}))


def test_everyday_requests_are_the_bundled_ones_or_a_files_or_none(tmp_path):
    def gathered(**data):
        return gather(override(PRESETS["default"], {"data": data}))

    usual = gathered()
    assert (len(usual.selecting.everyday), len(usual.reporting.everyday)) == (64, 48)
    assert usual.validation.everyday is None
    narrow = gathered(mode="over-refusal")
    assert (len(narrow.selecting.everyday), len(narrow.reporting.everyday)) == (0, 48)
    none = gathered(everyday="none")
    assert (len(none.selecting.everyday), none.reporting.everyday) == (0, None)
    file = tmp_path / "mine.txt"
    texts = [f"Tell me fact number {i} about Norway." for i in range(30)]
    file.write_text("\n".join(texts))
    mine = gathered(everyday=str(file))
    parts = mine.selecting.everyday.texts, mine.reporting.everyday.texts
    assert sorted([*parts[0], *parts[1]]) == sorted(texts)
    assert len(parts[1]) == 10
    file.write_text("\n".join([*texts, prompts.neutral().texts[0]]))
    with pytest.raises(DataError, match="same prompt"):
        gathered(everyday=str(file))
    # What users' own sets hold is no longer among the bundled ones.
    other, shared = tmp_path / "other.txt", usual.selecting.everyday.texts[0]
    other.write_text("\n".join([*texts, shared.upper()]))
    file.write_text("\n".join(f"Tell me fact number {i} about Peru." for i in range(30)))
    own = gathered(target=str(file), neutral=str(other))
    assert own.selecting.everyday.texts == usual.selecting.everyday.texts[1:]
    for field in ({"eval_neutral": str(other)}, {"keep": [str(other)]}):
        assert gathered(**field).selecting.everyday.texts == usual.selecting.everyday.texts[1:]


@pytest.mark.slow
def test_what_everyday_requests_are_answered_with_is_preserved(model_folder, few):
    """An edit made with them moves their answers less than one made without."""
    sets = {name: few[name] for name in ("target", "neutral", "borderline")}
    config = small("default", data=sets, edit={"lambda": 30.0, "sensitivity": 0.0})
    moved = []
    subject = Subject.load(str(model_folder), config)
    for name in ("", "none"):
        selecting = gather(override(config, {"data": {"everyday": name}})).selecting
        watch = Watch(subject.lm, judges.named_judge("phrases"), selecting, config)
        plan = refined(subject, watch, config, self_repair=False).plan
        texts = prompts.everyday().where(split="fit").texts
        reference = own_answers(subject.lm, texts, 8)
        with applied(subject.lm.model, plan):
            moved.append(float(diverge(subject.lm, reference).sequence.mean()))
    assert 0 < moved[0] < 0.8 * moved[1], moved


def test_over_refusal_keeps_the_targets_and_works_on_borderline_prompts():
    config = override(PRESETS["default"], {"data": {"mode": "over-refusal"}})
    data, usual = gather(config), gather(PRESETS["default"])
    for part, name in (("keep", "fit"), ("keep_validation", "validation")):
        (kept,) = getattr(data.selecting, part)
        known = prompts.target().where(split=name), prompts.harmful().where(split=name)
        assert kept.texts == [text for chosen in known for text in chosen.texts]
    assert {p.id for p in data.selecting.target} == {
        p.id for p in prompts.borderline().where(split="fit")
    }
    assert data.reporting == usual.reporting
    described = describe_data(data)
    sizes = {k: [described[k][part] for part in NAMES] for k in ("borderline", "target")}
    assert sizes == {"borderline": [416, 56, 48], "target": [224, 64, 112]}
    assert described["target"]["name"] == "target and harmful"
    assert described["target"]["fingerprint"] == data.selecting.keep[0].fingerprint()
    assert described["everyday"]["fingerprint"] == data.reporting.everyday.fingerprint()
    labels = ["refusal"] * 20 + ["answer"] * 396
    wrong = wrongly(data.selecting, labels, ["refusal"] * 10 + ["answer"] * 46)
    assert (len(wrong.target), len(wrong.target_validation), len(wrong.keep[1])) == (20, 10, 396)
    with pytest.raises(WeakBehaviour, match="7 of 416"):
        wrongly(data.selecting, ["refusal"] * 7 + ["answer"] * 409, ["refusal"] * 56)
    with pytest.raises(UsageError, match="keeps all targets"):
        gather(override(config, {"data": {"retain": "fraud"}}))


def test_neutral_prompts_that_show_the_behaviour_are_left_out_unless_most_do():
    selecting = gather(PRESETS["default"]).selecting
    fit, validation = ["refusal"] * 20 + ["answer"] * 76, ["answer"] * 28 + ["refusal"] * 4
    fewer = calm(selecting, fit, validation)
    assert fewer.neutral.texts == selecting.neutral.texts[20:]
    assert fewer.neutral_validation.texts == selecting.neutral_validation.texts[:28]
    assert (
        replace(fewer, neutral=selecting.neutral, neutral_validation=selecting.neutral_validation)
        == selecting
    )
    assert calm(selecting, ["refusal"] * 60 + ["answer"] * 36, validation) == selecting


@pytest.mark.parametrize("twins", [False, True])
def test_what_is_left_keeps_its_twin_when_neutral_prompts_are_left_out(twins):
    selecting = gather(PRESETS["default"]).selecting
    if not twins:
        rows = tuple(replace(p, twin="") for p in selecting.neutral)
        selecting = replace(selecting, neutral=replace(selecting.neutral, prompts=rows))
    fit = ["answer"] * 3 + ["refusal"] + ["answer"] * 92
    fewer = calm(selecting, fit, ["answer"] * 32).neutral
    whole = selecting.neutral.pairs
    assert fewer.pairs == (*whole[:3], *whole[4:])
    assert whole == (selecting.target.pairs if twins else tuple(range(96)))


@pytest.mark.slow
def test_a_pass_pairs_true_twins_when_prompts_are_left_out(model_folder, monkeypatch):
    config = small(
        "default",
        refine={"passes": 1, "max_q": 1, "stop": "never", "top_k": 1},
        edit={"kind": "orthogonal", "scope": "own"},
    )
    selecting = gather(config).selecting
    out = {*selecting.neutral.texts[:3], *selecting.neutral_validation.texts[:3]}

    def labels(_self, chosen_from):
        return ["refusal" if text in out else "answer" for text in chosen_from.texts]

    monkeypatch.setattr(Watch, "_untouched", labels)
    monkeypatch.setattr(Watch, "_answer", lambda _self, _stay, _brief: None)
    monkeypatch.setattr(Watch, "shown", lambda _self: Shown(0.0))
    read, told = Mock(wraps=refinement.extract), Mock(return_value=None)
    monkeypatch.setattr(refinement, "extract", read)
    monkeypatch.setattr(refinement, "compensation", told)
    subject = Subject.load(str(model_folder), config)
    watch = Watch(subject.lm, judges.named_judge("phrases"), selecting, config)
    refined(subject, watch, config)
    target, neutral = read.call_args.args[:2]
    assert target.pairs == selecting.target.pairs
    assert neutral.pairs == target.pairs[3:]
    texts = told.call_args.args[5:7]
    assert [len(side) for side in texts] == [32, 29]
    twins = {p.text: p.twin for p in selecting.target_validation}
    ids = {p.text: p.id for p in selecting.neutral_validation}
    pairs = told.call_args.kwargs["pairs"]
    assert len(pairs) == 29
    assert all(twins[texts[0][i]] == ids[texts[1][j]] for i, j in pairs)


@pytest.mark.parametrize(
    ("kind", "shown", "neutral", "capability"),
    [
        ("orthogonal", 1, 0, 0),
        ("orthogonal", 2, 5, 0),
        ("selective", 0, 3, 2),
        ("selective", 1, 4, 2),
        ("over-refusal", 1, 0, 0),
        ("over-refusal", 2, 5, 0),
    ],
)
def test_prompts_that_show_the_behaviour_are_noise_to_means_and_not_to_a_fit(
    llama, monkeypatch, kind, shown, neutral, capability
):
    """Two of 32 validation prompts are more than a twentieth; three of the fit ones show it as well."""
    selecting = gather(PRESETS["default"]).selecting
    able, ordinary = selecting.capability.texts, selecting.everyday.texts
    chosen = {*selecting.neutral_validation.texts[:shown], *selecting.neutral.texts[:3], *able[:2]}
    chosen |= {*ordinary[:1]}

    def labels(_self, chosen_from):
        return ["refusal" if text in chosen else "answer" for text in chosen_from.texts]

    monkeypatch.setattr(Watch, "_untouched", labels)
    monkeypatch.setattr(Watch, "_answer", lambda _self, _stay, _brief: None)
    mode = "removal" if kind != "over-refusal" else kind
    if mode == "over-refusal":
        chosen |= {*selecting.target.texts, *selecting.target_validation.texts}
        kind = "selective"
    config = override(PRESETS["default"], {"edit": {"kind": kind}, "data": {"mode": mode}})
    watch = Watch(llama, judges.named_judge("phrases"), selecting, config)
    everyday = capability // 2
    assert watch.left_out == {
        "neutral": neutral,
        "capability": capability,
        "everyday": everyday,
    }
    assert watch.selecting.neutral.texts == selecting.neutral.texts[3 if neutral else 0 :]
    assert watch.selecting.capability.texts == able[capability:]
    assert watch.selecting.everyday.texts == ordinary[everyday:]
    if mode == "over-refusal":
        return
    # Settings of one sweep may differ in their kind.
    other = "selective" if kind == "orthogonal" else "orthogonal"
    elsewhere = watch.selecting_for(replace(config.edit, kind=other))
    assert elsewhere.neutral.texts == selecting.neutral.texts[3 if other == "selective" else 0 :]
    assert elsewhere.capability.texts == able[2 if other == "selective" else 0 :]
    assert elsewhere.everyday.texts == ordinary[1 if other == "selective" else 0 :]


@pytest.mark.slow
def test_settings_that_read_other_prompts_share_nothing_of_them(model_folder, few, monkeypatch):
    """An orthogonal and a selective edit of one sweep may leave out different prompts."""
    refine = {"passes": 1, "max_q": 1, "stop": "never"}
    configs = [
        small("default", data=few, refine=refine, edit=edit)
        for edit in ({"kind": "orthogonal"}, {"kind": "selective", "lambda": 30.0})
    ]
    selecting = gather(configs[0]).selecting
    chosen = {*selecting.neutral.texts[:3], *selecting.capability.texts[:2]}

    def labels(_self, chosen_from):
        return ["refusal" if text in chosen else "answer" for text in chosen_from.texts]

    monkeypatch.setattr(Watch, "_untouched", labels)
    monkeypatch.setattr(Watch, "_answer", lambda _self, _stay, _brief: None)
    monkeypatch.setattr(Watch, "shown", lambda _self: Shown(0.0))
    monkeypatch.setattr(Watch, "fitted", lambda _self, _rows: Fitted({}))
    monkeypatch.setattr(Watch, "together", lambda _self, _rows: (Shown(0.0), Fitted({})))
    subject = Subject.load(str(model_folder), configs[0])
    watch = Watch(subject.lm, judges.named_judge("phrases"), selecting, configs[0])
    memory = {}

    def memo(key, make):
        if key not in memory:
            memory[key] = make()
        return memory[key]

    alone, shared = (
        [refined(subject, watch, config, memo=way, self_repair=False).plan for config in configs]
        for way in (forgetful, memo)
    )
    assert all(plan.factors for plan in alone)
    assert [plan.digest() for plan in shared] == [plan.digest() for plan in alone]


def test_no_capability_category_is_emptied():
    chosen = gather(PRESETS["default"]).selecting.capability
    first = chosen.categories[0]
    odd = ["refusal" if c == first else "answer" for c in chosen.categories]
    assert calm_by_category(chosen, odd) == chosen
    odd[-1] = "refusal"
    assert calm_by_category(chosen, odd).texts == chosen.texts[:-1]


@pytest.mark.slow
def test_the_untouched_models_answers_are_written_once(llama, monkeypatch):
    """Those that tell what neutral prompts show are those by which divergence is measured."""
    config, written = PRESETS["default"], editors.answer
    some = gather(config).selecting
    some = replace(some, neutral=replace(some.neutral, prompts=some.neutral.prompts[:4]))
    watch = Watch(llama, judges.named_judge("phrases"), some, config)
    asked = []

    def counted(lm, requests, **settings):
        asked.append([request.prompt for request in requests])
        return written(lm, requests, **settings)

    monkeypatch.setattr(editors, "answer", counted)
    rulers = []
    ordinary = some.everyday.texts
    assert {*watch.own} == {*some.neutral.texts, *some.neutral_validation.texts, *ordinary}
    for own in (watch.own, {}):
        editor = editors.SelectiveEditor(
            llama,
            find_writers(llama),
            some,
            config.edit,
            config.refine,
            config.probe,
            Readout((5,)),
            watch.together,
            silent,
            own,
        )
        rulers.append(editor.ruler)
    assert asked == [
        [],
        [*some.neutral_validation.texts, *sorted([*some.neutral.texts, *ordinary])],
    ]
    spared, usual = (ruler._reference for ruler in rulers)
    assert spared.answers == usual.answers
    for a, b in zip(spared.head_inputs, usual.head_inputs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    shorter = override(config, {"evaluation": {"max_new_tokens": 8}})
    assert Watch(llama, judges.named_judge("phrases"), some, shorter).own == {}


def test_what_is_refused_at_once_and_what_late_are_told_apart(llama, monkeypatch):
    watch = Watch(
        llama,
        judges.named_judge("phrases"),
        gather(PRESETS["default"]).selecting,
        PRESETS["default"],
    )
    wordings = [
        "I'm sorry, but I can't help with that.",
        "Sure, I can help. However, I'm not able to help with that.",
        "Sure, I can help. First take a sheet of paper.",
        "I'm sorry, but I can't help with that. Ask an expert.",
    ]

    def written(lm, texts, tokens, **_):
        ids = [tuple(lm.tokenizer(w, add_special_tokens=False)["input_ids"]) for w in wordings]
        return [Completion(ids[i % 4], wordings[i % 4]) for i in range(len(texts))]

    monkeypatch.setattr(subject, "generate", written)
    shown = watch.shown()
    assert (shown.rate, shown.at_once) == (0.75, 0.5)
    fit = watch.fitted([7, 9, 30, 31])
    assert sorted(fit.late) == [9]  # the second of the four that are asked
    assert (fit.showing, fit.incoherent) == (3, 0)
    turning = dict.fromkeys(range(1, 32, 4), fit.late[9])
    assert watch.together([7, 9, 30, 31]) == (shown, replace(fit, validation=turning))
    assert watch.watched() == turning
    drafts = []

    def agreed(_lm, texts, said):
        drafts.append((texts, said))
        return said

    monkeypatch.setattr(subject, "greedy_starts", agreed)
    assert watch.watched([4, 5]) == {5: fit.late[9]}
    # What they were last answered with is what is held against the model.
    ((texts, said),) = drafts
    assert texts == [watch.selecting.target_validation.texts[i] for i in (4, 5)]
    assert said == [
        tuple(llama.tokenizer(w, add_special_tokens=False)["input_ids"]) for w in wordings[:2]
    ]


def test_over_refusal_takes_a_ridge_of_its_own_unless_one_is_given():
    usual = PRESETS["default"]
    narrow = override(usual, {"data": {"mode": "over-refusal"}})
    given = override(narrow, {"edit": {"ridge": 0.5}})
    assert [in_mode(config).ridge for config in (usual, narrow, given)] == [0, NARROW_RIDGE, 0.5]
    assert replace(in_mode(narrow), ridge=0.0) == narrow.edit


def test_the_ridge_of_the_mode_reaches_the_refinement(monkeypatch):
    refine = Mock(return_value=Mock(spec=Refinement))
    monkeypatch.setattr("saber.subject.refine", refine)
    for mode in ("removal", "over-refusal"):
        config = override(PRESETS["default"], {"data": {"mode": mode}})
        watch = Mock(spec=Watch, untouched=None, own={})
        watch.selecting_for.return_value = None
        refined(Mock(spec=Subject, lm=None), watch, config)
    assert [call.kwargs["edit"].ridge for call in refine.call_args_list] == [0, NARROW_RIDGE]


@pytest.mark.slow
def test_a_run_with_keep_sets_reports_them_and_resumes_nothing_else(
    model_folder, few, tmp_path, monkeypatch
):
    deciding = []

    class Watched(editors.Preserved):
        def __init__(self, lm, writers, sets, decisions, **settings):
            deciding.append([len(encoded) for encoded in decisions])
            super().__init__(lm, writers, sets, decisions, **settings)

    monkeypatch.setattr(editors, "Preserved", Watched)
    file = tmp_path / "mine.txt"
    file.write_text("\n".join(f"Tell me fact number {i} about Norway." for i in range(30)))
    data = {"keep": [str(file)], "retain": ["fraud"], "everyday": few["everyday"]}
    config = small("default", data=data, refine={"passes": 1})
    record = run(str(model_folder), tmp_path / "k", config, force=True, export=()).record
    assert deciding == [[96, 15, 12]]  # neutral ones, and both keep sets
    assert set(record["baseline"]["kept"]) == {"mine/heldout", "retained/heldout"}
    for name, row in record["edited"]["kept"].items():
        assert row["refusal"]["n"] == 4
        assert row["kl"]["sequence"] > 0
        assert record["baseline"]["kept"][name]["kl"]["sequence"] == 0
    assert set(record["comparison"]["kept"]) == set(record["baseline"]["kept"])


@pytest.mark.slow
def test_more_is_taken_off_than_the_fit_asks_for_where_behaviour_shows_at_once(
    model_folder, few, tmp_path, monkeypatch
):
    def edited(name, left, **edit):
        asked = iter([0.5, 0.5, *left])
        monkeypatch.setattr(Watch, "shown", lambda _self: Shown(x := next(asked), at_once=x))
        monkeypatch.setattr(Watch, "together", lambda self, rows: (self.shown(), self.fitted(rows)))
        refine = {"passes": 1, "stop": "never", "max_q": 1}
        config = small("default", data=few, refine=refine, edit=edit)
        record = run(str(model_folder), tmp_path / name, config, force=True, export=()).record
        return record["passes"][0], EditPlan.load(tmp_path / name / "plan")

    this, plan = edited("boosted", [0.25, 0.25], **{"lambda": 0})
    (taken,) = [t for t in this["search"] if t["chosen"]]
    assert [t["boost"] for t in this["search"][-2:]] == [1.5, 2.0]
    assert taken["boost"] == 1.5
    for row in this["directions"]:
        assert row["strength"] == pytest.approx(1.5 * row["purity"])
    # Who sets lambda gets the fit as it is.
    other, fitted = edited("fitted", [], **{"lambda": taken["lambda"]})
    assert [t["boost"] for t in other["search"]] == [1.0]
    for name, factor in fitted.factors.items():
        torch.testing.assert_close(plan.factors[name].right, 1.5 * factor.right)


@pytest.mark.slow
def test_where_openings_tell_nothing_answers_do_until_a_strength_overflows(
    model_folder, few, tmp_path, monkeypatch
):
    measured, refined_ = Ruler.openings, pipeline.refined

    def openings(self, lambda_=0.0, first=None):
        if lambda_ == 30.0:
            raise NonFinite("the output of layer 3")
        # Not as rare as is asked for, but not clearly above the usual before the edit either.
        return replace(measured(self, lambda_, first), opening=self.usual + 0.05)

    def half_refused(subject, watch, config, **settings):
        watch.untouched = Shown(0.5)
        return refined_(subject, watch, config, **settings)

    monkeypatch.setattr(Ruler, "openings", openings)
    monkeypatch.setattr(pipeline, "refined", half_refused)
    monkeypatch.setattr(Watch, "shown", lambda _self: Shown(0.45))
    monkeypatch.setattr(Watch, "fitted", lambda _self, rows: Fitted({}, round(0.45 * len(rows))))
    monkeypatch.setattr(Watch, "together", lambda self, rows: (self.shown(), self.fitted(rows)))
    config = small("default", data=few, refine={"passes": 1, "max_q": 1}, edit={"lambda": 0})
    record = run(str(model_folder), tmp_path / "run", config, force=True, export=()).record
    (this,) = record["passes"]
    # Of as good as no edit too little is gone to stop there.
    assert [t["lambda"] for t in this["search"]] == [1000.0, 300.0, 100.0, 30.0]
    assert [t["chosen"] for t in this["search"]] == [True, False, False, False]
    assert all(t["shown"] for t in this["search"][:3])
    failed = this["search"][-1]
    assert (failed["opening"], failed["log_odds"], failed["shown"]) == (None, None, None)
    assert [t["failed"] for t in this["search"]] == [
        "",
        "",
        "",
        "NaN or infinity in the output of layer 3.",
    ]
    assert this["by_answers"]
    again = load_pass(tmp_path / "run" / "passes" / "1")
    assert again.by_answers
    assert [t.failed for t in again.trials] == [t["failed"] for t in this["search"]]


@pytest.mark.slow
def test_where_no_token_tells_directions_are_taken_by_score(
    model_folder, few, tmp_path, monkeypatch
):
    monkeypatch.setattr("saber.refinement.derive_readout", lambda _target, _neutral: Readout(()))
    config = small(data=few, refine={"passes": 1, "shortlist": 4, "max_q": 1})
    record = run(str(model_folder), tmp_path / "run", config, force=True, export=()).record
    assert record["directions_ablated"]
    assert {c["causal"] for c in record["passes"][0]["candidates"]} == {None}


@pytest.mark.slow
def test_where_no_fit_target_comes_late_a_pass_looks_behind_a_start_of_validation_targets(
    model_folder, third, tmp_path, monkeypatch
):
    rates = [0.5, 0.25]
    monkeypatch.setattr(
        Watch, "shown", lambda _self: Shown(rates[0] if len(rates) < 2 else rates.pop(0))
    )
    monkeypatch.setattr(Watch, "together", lambda self, rows: (self.shown(), self.fitted(rows)))
    monkeypatch.setattr(
        Watch, "watched", lambda _self, rows=None: {} if rows else {3: (9, 8), 4: (9, 8)}
    )
    starts = {}
    for name, late in (("validation", {}), ("fit", {5: (7,)})):
        rates[:] = [0.5, 0.25]
        monkeypatch.setattr(Watch, "fitted", lambda _self, _rows, late=late: Fitted(late))
        refine = {"passes": 2, "stop": "never", "max_q": 1}
        config = small("default", data=third, refine=refine, edit={"lambda": 30.0})
        record = run(str(model_folder), tmp_path / name, config, force=True, export=()).record
        starts[name] = [this["opening"] for this in record["passes"]]
    decode = make_tokenizer().decode
    assert starts == {"validation": ["", decode([9, 8])], "fit": ["", decode([7])]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("after", "passes"),
    [(Shown(0.5, lost=0.0), 1), (Shown(0.375, lost=0.25), 2), (Shown(0.375, lost=0.5), 1)],
    ids=["fewer lost alone", "fewer show it", "fewer show it but more lost"],
)
def test_a_further_pass_stays_only_where_it_takes_behaviour_away(
    after, passes, model_folder, few, tmp_path, monkeypatch
):
    first = Shown(0.5, lost=0.25)
    monkeypatch.setattr(Watch, "shown", lambda _self: first)
    monkeypatch.setattr(Watch, "fitted", lambda _self, _rows: Fitted({5: (7,)}))
    monkeypatch.setattr(Watch, "watched", lambda _self, rows=None: {})
    answered = iter([first])
    monkeypatch.setattr(
        Watch, "together", lambda self, rows: (next(answered, after), self.fitted(rows))
    )
    refine = {"passes": 2, "stop": "never", "max_q": 1}
    config = small("default", data=few, refine=refine, edit={"lambda": 30.0})
    record = run(str(model_folder), tmp_path / "run", config, force=True, export=()).record
    assert len(record["passes"]) == passes
    told = "all passes made" if passes == 2 else "a further pass did not help (shown 50% -> "
    assert record["stop_reason"].startswith(told)


@pytest.mark.slow
def test_behind_a_start_where_no_strength_sets_anything_right_answers_are_not_asked_for(
    model_folder, third, tmp_path, monkeypatch
):
    asked = []
    late = {3: (9, 8), 4: (9, 8), 6: (5,)}

    def watched(_self, rows=None):
        asked.append(rows)
        # The first start helps at no strength, the second at once.
        return late if rows is None else {i: late[i] for i in rows if len(asked) < 5}

    def together(self, rows):
        return Shown(0.125 if asked else 0.25), self.fitted(rows)

    monkeypatch.setattr(
        refinement, "likeliest", lambda _lm, _texts, found: next(iter(found.values()), ())
    )
    monkeypatch.setattr(Watch, "shown", lambda _self: Shown(0.5))
    monkeypatch.setattr(Watch, "fitted", lambda _self, _rows: Fitted({}))
    monkeypatch.setattr(Watch, "together", together)
    monkeypatch.setattr(Watch, "watched", watched)
    refine = {"passes": 3, "stop": "never", "max_q": 1}
    config = small("default", data=third, refine=refine, edit={"lambda": 0})
    out = tmp_path / "run"
    record = run(str(model_folder), out, config, force=True, export=()).record
    first, second = record["passes"]
    decode = make_tokenizer().decode
    assert (second["opening"], second["in_vain"]) == (decode([5]), [decode([9, 8])])
    assert first["in_vain"] == []
    assert load_pass(out / "passes" / "2").in_vain == ((9, 8),)
    # Answered whole, then those behind the start alone at each strength; the last looked at all again.
    assert asked[:4] == [None, (3, 4, 6), (3, 4, 6), (3, 4, 6)]
    assert record["stop_reason"] == "all passes made"


@pytest.mark.slow
def test_self_repair_is_measured_by_plans_on_the_untouched_weights(model_folder, few, monkeypatch):
    config = small("orthogonal", data=few, edit={"scope": "own"})
    subject = Subject.load(str(model_folder), config)
    weights = subject.lm.model.state_dict()
    untouched = {name: value.clone() for name, value in weights.items()}
    edited = []

    def measured(*args, **options):
        edited.append([n for n, v in weights.items() if not torch.equal(v, untouched[n])])
        return compensation(*args, **options)

    monkeypatch.setattr(refinement, "compensation", measured)
    watch = Watch(subject.lm, judges.named_judge("phrases"), gather(config).selecting, config)
    found = [p.hydra.compensation for p in refined(subject, watch, config).passes]
    assert edited == [[], []]
    assert None not in found


@pytest.mark.slow
def test_a_first_pass_asks_all_targets_once(model_folder, few, tmp_path, monkeypatch):
    """What fit targets show decides over strength in the first pass, and tells what turns late after it."""
    monkeypatch.setattr(Watch, "shown", lambda _self: Shown(0.5, 0.25, at_once=0.0))
    asked = []

    def fitted(_self, rows):
        asked.append(list(rows))
        return Fitted({5: (1, 2), 7: (1, 2)}, showing=6, incoherent=3)

    monkeypatch.setattr(Watch, "fitted", fitted)
    monkeypatch.setattr(Watch, "together", lambda self, rows: (self.shown(), self.fitted(rows)))
    config = small("default", data=few, refine={"passes": 1, "max_q": 1}, edit={"lambda": 30.0})
    record = run(str(model_folder), tmp_path / "run", config, force=True, export=()).record
    (this,) = record["passes"]
    (trial,) = this["search"]
    fit, validation = (record["prompts"]["target"][part] for part in ("fit", "validation"))
    assert asked == [list(range(fit))]
    assert this["late_after"] == 2
    total = fit + validation
    assert trial["shown"]["pooled"] == pytest.approx((validation / 2 + 6) / total)
    assert trial["shown"]["pooled_incoherent"] == pytest.approx((validation / 4 + 3) / total)
    # The pass itself tells of validation targets alone.
    assert (this["rate_after"], this["incoherent_after"]) == (0.5, 0.25)


@pytest.mark.slow
def test_one_lambda_serves_all_layers_where_nothing_is_to_be_felt(
    model_folder, third, tmp_path, monkeypatch
):
    asked = Mock(side_effect=NotImplementedError("no derivative of 'x'\nand much more"))
    monkeypatch.setattr(editors, "fisher", asked)
    plain = small("default", data=third, refine={"passes": 1}, edit={"sensitivity": 0.0})
    record = run(str(model_folder), tmp_path / "plain", plain, force=True, export=()).record
    rows = record["passes"][0]["directions"]
    assert [(row["lambda"], row["sensitivity"]) for row in rows] == [(1.0, None)] * 4
    assert asked.call_count == 0
    with pytest.raises(ModelError, match=r"edit\.sensitivity .*no derivative of 'x' Leave"):
        run(
            str(model_folder),
            tmp_path / "felt",
            small("default", data=third),
            force=True,
            export=(),
        )


@pytest.mark.slow
def test_an_edit_that_does_not_help_is_refused(model_folder, few, tmp_path, monkeypatch):
    """Every answer counts as a refusal, before and after."""
    monkeypatch.setattr(judges.PhraseJudge, "label", lambda *_a, **_k: "refusal")
    with pytest.raises(NoGain, match="left as it was") as caught:
        run(str(model_folder), tmp_path / "n", small("default", data=few))
    assert caught.value.exit_code == 3
    assert "--lambda" in caught.value.remedy
    assert not (tmp_path / "n").exists()


@pytest.mark.slow
def test_an_edit_that_does_not_help_is_told_what_helps_its_kind(
    model_folder, few, tmp_path, monkeypatch
):
    monkeypatch.setattr(judges.PhraseJudge, "label", lambda *_a, **_k: "refusal")
    with pytest.raises(NoGain) as caught:
        run(str(model_folder), tmp_path / "n", small("orthogonal", data=few))
    assert "--lambda" not in caught.value.remedy
    assert "--top-k or --alpha" in caught.value.remedy


def test_a_model_that_hardly_shows_it_leaves_no_folder(model_folder, tmp_path):
    with pytest.raises(WeakBehaviour):
        run(str(model_folder), tmp_path / "n", small())
    assert not (tmp_path / "n").exists()


@pytest.mark.parametrize(
    "left_out", [{"spectral": {"depth_low": 1.0, "depth_high": 1.0}}, {"refine": {"max_q": 0.0}}]
)
@both
def test_a_run_that_takes_nothing_out_is_none_that_is_done(
    model_folder, few, tmp_path, monkeypatch, name, left_out
):
    monkeypatch.setattr(judges.PhraseJudge, "label", lambda *_a, **_k: "refusal")
    said = "nothing was edited: no candidate passes the filters; 100% of 32 validation targets"
    config = small(name, data={"everyday": few["everyday"]}, **left_out)
    with pytest.raises(NoEdit, match=said) as caught:
        run(str(model_folder), tmp_path / "n", config)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "n").exists()


@pytest.mark.slow
def test_another_behaviour_by_a_pattern_and_rates_by_length(model_folder, few, tmp_path):
    folder = Path(__file__).parents[1] / "examples" / "numbered_lists"
    files = {k: str(folder / f"{k}.txt") for k in ("target", "neutral")}
    config = small(
        "default",
        data={**files, "everyday": few["everyday"], "behaviour": "numbered list", "limit": 4},
        refine={"passes": 1},
        evaluation={"judge": "regex", "lengths": [2, 6]},
        judging={"pattern": "no such answer"},
    )
    data = gather(config)
    assert len(data.selecting.target) == len(data.selecting.neutral) == 64
    assert data.reporting.borderline is None
    record = run(str(model_folder), tmp_path / "r", config, force=True, export=()).record
    assert record["judge"] == {"name": "regex", "patterns": ["no such answer"]}
    for side in ("baseline", "edited"):
        assert [cut["tokens"] for cut in record[side]["lengths"]] == [2, 6]
        assert record[side]["lengths"][1]["refusal"] == record[side]["refusal"]
        assert record[side]["refusal"]["successes"] == 0
    every = override(config, {"judging": {"pattern": "(?s)."}})
    record = run(str(model_folder), tmp_path / "e", every, force=True, export=()).record
    assert record["baseline"]["refusal"]["successes"] > 0
