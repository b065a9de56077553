"""Everything a model goes through on a device that is not the CPU, and on two of them.

There is none here, so one is made up (`accelerator.cpp`): what would be an error on CUDA because of
where tensors lie is one there, and so is float64, which Apple's GPUs lack. Speed, kernels and rounding of
real ones are not tested by it.
"""

import multiprocessing
import shutil
from pathlib import Path

import accelerators
import pytest
from test_architectures import FAMILIES as ARCHITECTURES

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]

SMALL = [
    *("--device", "acc", "--limit", "4", "--max-new-tokens", "6", "--force"),
    *("--set", "spectral.permutations=20", "--set", "entanglement.null_draws=20"),
    *("--set", "evaluation.battery_new_tokens=4", "--set", "refine.max_q=1.0"),
]
OFFLOADED = ["llama", "gpt2", "gemma3", "qwen3_moe", "mamba2", "zamba2"]
"""Plain layers, Conv1D, sandwich norms, routed experts, states, shared blocks."""
ONE = ["--passes", "1", "--lambda", "1"]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A process that has the device."""
    library = accelerators.build(tmp_path_factory.mktemp("accelerator"))
    with multiprocessing.get_context("spawn").Pool(1, accelerators.register, (library,)) as pool:
        yield pool


def test_the_device_refuses_what_real_ones_refuse(elsewhere):
    said = elsewhere.apply(accelerators.refusals)
    fine = {"number of the CPU", "CPU index in brackets"}
    assert {name for name, error in said.items() if not error} == fine
    for name in said.keys() - fine:
        assert ("float64" if "float64" in name else "same device") in said[name]


def assert_alike(there, here):
    assert there["device"] == "acc"
    assert there["writers"] == here["writers"] > 0
    assert there["untouched"] == pytest.approx(here["untouched"], rel=1e-4)
    assert there["perplexity"] == pytest.approx(here["perplexity"], rel=1e-4)
    assert there["kl"] == pytest.approx(here["kl"], rel=2e-2, abs=1e-7)


@pytest.mark.parametrize("preset", ["default", "orthogonal"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_a_model_on_two_devices_is_edited_as_on_the_cpu(elsewhere, family, preset):
    placement = accelerators.spread(family)
    there = elsewhere.apply(accelerators.edited, (family, preset, "acc", placement))
    here = elsewhere.apply(accelerators.edited, (family, preset, "cpu"))
    assert_alike(there, here)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_writers_of_next_to_nothing_are_found_in_16_bits_on_two_devices(elsewhere, family):
    there = elsewhere.apply(accelerators.proved, (family, "acc", accelerators.spread(family)))
    assert there == elsewhere.apply(accelerators.proved, (family, "cpu"))
    assert len(there) == 8


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_every_kind_of_model_is_edited_on_a_device_as_on_the_cpu(elsewhere, family):
    there = elsewhere.apply(accelerators.edited, (family, "default", "acc"))
    here = elsewhere.apply(accelerators.edited, (family, "default", "cpu"))
    assert_alike(there, here)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_offloaded_layers_come_one_at_a_time(elsewhere, family, dtype):
    seen = elsewhere.apply(accelerators.offloaded, (family, dtype))
    assert (seen["layers"], seen["others"], seen["first"]) == ({"cpu"}, {"acc"}, {"cpu"})
    assert seen["during"] == [{"cpu", "acc"}]
    device, logits = seen["logits"]
    assert device == "acc"
    assert logits == seen["whole"]


@pytest.mark.parametrize("preset", ["default", "orthogonal"])
@pytest.mark.parametrize("family", OFFLOADED)
def test_an_offloaded_model_is_edited_as_on_the_cpu(elsewhere, family, preset):
    there = elsewhere.apply(accelerators.edited, (family, preset, "acc", None, True, False))
    here = elsewhere.apply(accelerators.edited, (family, preset, "cpu", None, False, False))
    assert_alike(there, here)


@pytest.mark.parametrize(
    "call",
    [
        ["--preset", "card", "--passes", "1", "--set", "refine.shortlist=4"],
        [*ONE, "--lengths", "4,6"],
        [*ONE, "--dtype", "bfloat16"],
        [*ONE, "--dtype", "bfloat16", "--offload"],
        ["--passes", "2"],
        [*ONE, "--retain", "hacking"],
        [*ONE, "--set", "probe.positions=2", "--set", "edit.sensitivity=1"],
    ],
    ids=lambda call: " ".join(call),
)
def test_runs_of_all_kinds_go_through_on_a_device(elsewhere, call):
    (outcome,) = elsewhere.apply(
        accelerators.commands, ([["run", "model", "--out", "run", *SMALL, *call]],)
    )
    assert outcome[0] == 0, outcome[1]


def test_other_commands_go_through_on_a_device(elsewhere):
    on = ["--device", "acc"]
    brief = [*on, "--limit", "4", "--max-new-tokens", "6"]
    edited = str(Path("run") / "model")
    calls = [
        ["run", "model", "--out", "run", *SMALL, *ONE],
        ["inspect", "model", *on],
        ["eval", edited, "--base", "model", *brief],
        ["chat", "run", "--compare", *on],
        ["sweep", "model", "--out", "sweep", *SMALL, "--preset", "orthogonal", "--top-k", "1,2"],
        ["inspect", "model", *on, "--offload"],
        ["eval", edited, "--base", "model", *brief, "--offload"],
        ["chat", "run", "--compare", *on, "--offload"],
        ["audit", "model", "--out", "audit", *on, "--limit", "4", "--force", "--offload"],
        ["sweep", "model", "--out", "again", *SMALL, "--axis", "edit.lambda=1,10", "--passes", "1"],
    ]
    for call, (status, errors) in zip(
        calls, elsewhere.apply(accelerators.commands, (calls,)), strict=True
    ):
        assert status == 0, f"{call[0]}: {errors}"
