"""The clock on which a sweep with more workers is replayed, and the readings of large models."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import scaling
from scaling import Costs, makespan

COSTS = Costs(first=10.0, start=4.0, trials=[5.0, 15.0], driver=0.5, last=3.0, seed=1000, row=10)


def test_one_worker_does_one_after_the_other():
    assert makespan(COSTS, 4, 1) == pytest.approx(10 + 4 * 0.5 + 5 + 15 + 5 + 15 + 3)


def test_more_workers_are_bounded_by_the_longest_trial_and_the_driver():
    # Three start 4 s later; the driver hands the last one out at 14 + 3 x 0.5.
    assert makespan(COSTS, 4, 4) == pytest.approx(14 + 3 * 0.5 + 15 + 3)
    assert makespan(COSTS, 640, 10**4) > 10 + 640 * 0.5


def test_a_second_worker_never_slows_a_sweep_down():
    times = [makespan(COSTS, 64, n) for n in (1, 2, 4, 8, 64)]
    assert times == sorted(times, reverse=True)


def test_readings_of_a_published_model_are_counted_from_its_shapes(monkeypatch, capsys):
    monkeypatch.setattr(scaling, "SHAPES", {"gpt-oss-20b": scaling.SHAPES["gpt-oss-20b"]})
    scaling.readings(Namespace(memory=[4.0, 64.0]))
    # 24 writers of 32 experts of 2,880 inputs, and as many of 4,096.
    whole = 24 * 8 * (32 * 2880**2 + 4096**2) / 2**30
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[1:4] for row in rows] == [[f"{whole:.0f}", "4", "13"], [f"{whole:.0f}", "64", "1"]]
