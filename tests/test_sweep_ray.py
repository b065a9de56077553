"""Trials on a Ray cluster of several nodes, all of them on this machine."""

import dataclasses
import os
import signal

import pytest
from test_sweep import config_of
from test_sweep_workers import GRID, large, one_thread, told, whole_base, world  # noqa: F401

from saber import codec
from saber.errors import UsageError
from saber.sweep.cluster import Cluster
from saber.sweep.drive import Plan, sweep
from saber.sweep.grid import grid, read_axis
from saber.sweep.trial import Bench, Job

pytestmark = pytest.mark.filterwarnings("ignore")


def test_an_address_that_cannot_be_reached(tmp_path):
    pytest.importorskip("ray")
    plan = Plan(("edit.alpha=1",), ray="127.0.0.1:1")
    with pytest.raises(UsageError, match=r"no Ray cluster at 127\.0\.0\.1:1"):
        sweep("no-such-model", tmp_path / "s", config_of(tmp_path), plan)


@pytest.mark.long
def test_several_nodes_do_what_one_process_does_and_survive_deaths(world, tmp_path, monkeypatch):  # noqa: F811
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster as Nodes

    folder, config, whole = world
    monkeypatch.setenv("SABER_CACHE", str(tmp_path / "cache"))
    nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        nodes.add_node(num_cpus=1)
        job = Job(str(folder / "pico"), whole_base(config), None, force=True)
        crew = Cluster(job, 2, nodes.address)
        expected = {row["number"]: row for row in told(whole.folder)}
        try:
            assert crew.about()["model"]["fingerprint"]
            settings = grid(job.base, [read_axis(job.base, text) for text in GRID.axes])[:3]
            for setting in settings[:2]:
                crew.start(setting)
            (second,) = crew.processes(1)
            assert len(crew.nodes()) == 2
            rows = [crew.wait()]
            os.kill(second, signal.SIGKILL)
            crew.start(settings[2])
            rows += [crew.wait(), crew.wait()]
        finally:
            crew.close()
        assert sorted(row.number for row in rows) == [1, 2, 3]
        for row in rows:
            assert row.plan == expected[row.number]["plan"]
            assert row.measured == expected[row.number]["measured"]
    finally:
        nodes.shutdown()


@pytest.mark.long
def test_actors_probe_a_large_prompt_set_together(world, large, tmp_path, monkeypatch):  # noqa: F811
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster as Nodes

    monkeypatch.setenv("SABER_CACHE", str(tmp_path / "cache"))
    job = Job(str(world[0] / "pico"), large, None, force=True)
    with one_thread():
        alone = Bench(job)
        expected = alone.about()
        first, second = grid(job.base, [read_axis(job.base, "edit.alpha=0.5,1")])
        row = alone.trial(first)
    nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        nodes.add_node(num_cpus=1)
        crew = Cluster(job, 2, nodes.address)
        try:
            found = crew.about()
            assert expected["prepared"] <= found["prepared"] < 1.01 * expected["prepared"]
            seed, root = ray.get(crew._seed), alone.seed().root
            assert seed.root.keys() == root.keys()
            for name, kept in root.items():
                assert codec.digest(*flat(kept.value)) == codec.digest(*flat(seed.root[name].value))
            assert len(crew.nodes()) == 2
            # Either worker does trials with what the first prepared.
            crew.start(second)
            crew.start(first)
            rows = {done.number: done for done in (crew.wait(), crew.wait())}
        finally:
            crew.close()
    finally:
        nodes.shutdown()
    done = rows[first.number]
    assert (done.plan, done.measured) == (row.plan, row.measured)
    assert done.tokens == row.tokens


def flat(value):
    """The tensors of a result, and its other fields."""
    if dataclasses.is_dataclass(value):
        return [part for f in dataclasses.fields(value) for part in flat(getattr(value, f.name))]
    if isinstance(value, (list, tuple)):
        return [part for item in value for part in flat(item)]
    if isinstance(value, dict):
        return [part for item in value.values() for part in flat(item)]
    return [value]
