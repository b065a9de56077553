"""Local workers, and drivers and workers that are killed: no finished trial is lost or done twice."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from multiprocessing import get_context

import pytest
import torch
from conftest import make_model, make_tokenizer
from test_sweep import config_of

from saber.config import override
from saber.lm.forward import Share
from saber.subject import Subject
from saber.sweep.crew import MOST_DEATHS, Local
from saber.sweep.drive import Plan, sweep
from saber.sweep.grid import changed, grid, read_axis
from saber.sweep.journal import SWEEP, TRIALS, Journal
from saber.sweep.trial import Bench, Job

GRID = Plan(("refine.top_k=1,2,3", "edit.alpha=0.5,1.0"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A pico model, settings, and what a sweep of one thread comes to that nobody disturbs."""
    folder = tmp_path_factory.mktemp("world")
    make_model("llama", layers=2).save_pretrained(folder / "pico")
    make_tokenizer().save_pretrained(folder / "pico")
    config = config_of(folder)
    with pytest.MonkeyPatch.context() as patch, one_thread():
        patch.setenv("SABER_CACHE", str(folder / "cache"))
        result = sweep(str(folder / "pico"), folder / "whole", config, GRID, force=True)
    return folder, config, result


@contextmanager
def one_thread():
    """Some processors give other last digits with more threads, and workers have as many as there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def told(folder):
    """Everything in the journal but what it cost."""
    rows = sorted(Journal(folder / TRIALS).rows, key=lambda row: row.number)
    free = {"seconds": 0.0, "tokens": 0, "shared": 0}
    return [dataclasses.asdict(dataclasses.replace(row, **free)) for row in rows]


def drive(world, out, workers=1):
    """Run or resume a sweep; what a child process does until it is killed."""
    folder, config, _ = world
    os.environ["SABER_CACHE"] = str(folder / "cache")
    torch.set_num_threads(1)
    os.cpu_count = lambda: workers  # and one thread for each of them
    plan = dataclasses.replace(GRID, workers=workers)
    sweep(str(folder / "pico"), out, config, plan, resume=True, force=True)


def written(out):
    """Bytes of the journal."""
    return (out / TRIALS).stat().st_size if (out / TRIALS).exists() else 0


def killed_at_random(world, out, kills, rng, workers=1):
    """Kill the driver `kills` times, then let one finish; return how many deaths were amid trials."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["saber.sweep.crew"])
    cut = 0
    for turn in range(kills + 1):
        child = context.Process(target=drive, args=((*world[:2], None), out, workers))
        child.start()
        if turn < kills and rng.random() < 0.7:  # amid trials, however long it takes to load
            size = written(out)
            while child.is_alive() and written(out) == size:
                child.join(0.01)
            child.join(rng.uniform(0.0, 0.5))
        else:
            child.join(rng.uniform(0.5, 4.0) if turn < kills else None)
        if child.is_alive():
            cut += (out / TRIALS).exists()
            os.kill(child.pid, signal.SIGKILL)
            child.join()
        elif child.exitcode == 0:
            break
    return cut


@pytest.mark.slow
def test_a_driver_killed_at_random_moments_loses_nothing_and_repeats_nothing(world, tmp_path):
    out = tmp_path / "s"
    killed_at_random(world, out, 5, random.Random(1))
    whole = world[2]
    assert told(out) == told(whole.folder)
    record = json.loads((out / SWEEP).read_text())
    assert record["front"] == whole.record["front"]
    assert record["best"]["plan"] == whole.record["best"]["plan"]


@pytest.mark.long
def test_twenty_deaths_of_drivers_and_their_workers(world, tmp_path):
    rng, deaths = random.Random(2), 0
    for turn in range(20):
        if deaths >= 20:
            break
        deaths += killed_at_random(world, tmp_path / str(turn), 5, rng, workers=1 + turn % 2)
        assert told(tmp_path / str(turn)) == told(world[2].folder)
    assert deaths >= 20


def test_each_worker_gets_a_gpu_of_its_own_where_there_are_several(tmp_path, monkeypatch):
    def devices(count, device="auto", device_map=""):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        spec = {"load": {"device": device, "device_map": device_map}}
        crew = Local(Job("pico", override(config_of(tmp_path), spec), None), 3)
        return [crew.device(slot) for slot in range(3)]

    assert devices(2) == devices(2, "cuda") == ["cuda:0", "cuda:1", "cuda:0"]
    assert devices(1) == devices(0) == devices(2, device_map="balanced") == ["auto"] * 3
    assert devices(2, "cuda:1") == ["cuda:1"] * 3
    assert devices(2, "cpu") == ["cpu"] * 3


def test_a_worker_loads_the_model_onto_its_device_and_settings_stay(tmp_path, monkeypatch):
    config, asked = config_of(tmp_path), []

    def loaded(_model, given):
        asked.append(given.load.device)
        raise InterruptedError

    monkeypatch.setattr(Subject, "load", loaded)
    job = Job("pico", config, None)
    for device in ("cuda:1", ""):
        with pytest.raises(InterruptedError):
            Bench(job, device=device)
    assert asked == ["cuda:1", config.load.device]
    assert job.base.load.device == config.load.device


@pytest.mark.slow
def test_two_workers_do_what_one_does_and_a_death_costs_one_trial(world, tmp_path, monkeypatch):
    folder, config, whole = world
    monkeypatch.setenv("SABER_CACHE", str(folder / "cache"))
    job = Job(str(folder / "pico"), whole_base(config), tmp_path / "shared", force=True)
    axes = [read_axis(job.base, text) for text in GRID.axes]
    settings = grid(job.base, axes)
    crew = Local(job, 2, threads=1)
    try:
        crew.about()
        assert crew.free == 2
        # One that dies while it has nothing to do costs nothing.
        os.kill(idle := crew.processes(1)[0], signal.SIGKILL)
        gone(idle)
        time.sleep(0.5)
        for setting in settings[:2]:
            crew.start(setting)
        # The second worker is still loading when it dies.
        (second,) = crew.processes(1)
        os.kill(second, signal.SIGKILL)
        rows = [crew.wait(), crew.wait()]
        assert crew.free == 2
        assert crew.processes(1) != [second]
        expected = {row["number"]: row for row in told(whole.folder)}
        for row in rows:
            assert row.state == "done"
            assert row.plan == expected[row.number]["plan"]
            assert row.measured == expected[row.number]["measured"]
        pids = crew.processes(0) + crew.processes(1)
    finally:
        crew.close()
    for pid in pids:
        gone(pid)


@pytest.fixture(scope="module")
def large(world):
    """The same settings with prompts enough to probe them together."""
    folder, config, _ = world
    files = {}
    for kind in ("target", "neutral"):
        said = [(f"{kind} request {i} {'and more ' * (7 * i % 31)}", "fit") for i in range(240)]
        said += [
            (f"{kind} {part} {i}", part) for part in ("validation", "heldout") for i in range(8)
        ]
        lines = [json.dumps({"prompt": text, "split": split}) for text, split in said]
        path = folder / f"many-{kind}.jsonl"
        path.write_text("\n".join(lines))
        files[kind] = str(path)
    return override(whole_base(config), {"data": files})


def kept_by(shared):
    """What workers share on disk, by file."""
    return {p.relative_to(shared): p.read_bytes() for p in shared.rglob("*.safetensors")}


@pytest.mark.slow
def test_workers_probe_a_large_prompt_set_together(world, large, tmp_path, monkeypatch):
    folder = world[0]
    monkeypatch.setenv("SABER_CACHE", str(folder / "cache"))

    def job(name):
        return Job(str(folder / "pico"), large, tmp_path / name, force=True)

    with one_thread():
        alone = Bench(job("alone"))
        expected = alone.about()
        first, second = Bench(job("benches")), Bench(job("benches"))
        shared_out = first._shared_out(2)
        assert [look.prompts.name for look in shared_out] == ["many-target/fit", "many-neutral/fit"]
        for bench, share in ((first, Share(0, 2)), (second, Share(1, 2))):
            before = bench.subject.lm.work.tokens
            assert not bench.part(share)
            each = bench.subject.lm.work.tokens - before
            assert 0.4 * expected["prepared"] < each < 0.6 * expected["prepared"]
        before = first.subject.lm.work.tokens
        found = first.about(2)
        assert first.subject.lm.work.tokens - before < 0.2 * expected["prepared"]
        # The start of the template goes through each worker once.
        assert expected["prepared"] <= found["prepared"] < 1.01 * expected["prepared"]
        assert 0 < found["tokens"] - found["prepared"] <= expected["tokens"] - expected["prepared"]
        assert first._shared_out(2) == []

    crew = Local(job("crew"), 2, threads=1)
    try:
        assert crew.about()["prepared"] == found["prepared"]
    finally:
        crew.close()

    crew = Local(job("death"), 2, threads=1)

    def kill():
        while not (pids := crew.processes(1)):
            time.sleep(0.01)
        os.kill(pids[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        assert crew.about()["prepared"] >= expected["prepared"]
        assert not crew.processes(1)
    finally:
        killer.join()
        crew.close()
    kept = kept_by(tmp_path / "alone")
    assert len(kept) >= 5
    for name in ("benches", "crew", "death"):
        assert kept_by(tmp_path / name) == kept, name


def whole_base(config):
    return changed(config, {"data.battery": "half"})


def gone(pid):
    """Wait for a process to be no more; it is not ours to reap."""
    for _ in range(200):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError(f"worker {pid} is still there")


class _Deadly(Local):
    """Each worker dies as soon as it has a trial."""

    def start(self, setting, prune=None):
        super().start(setting, prune)
        for pid in self.processes(0):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_setting_that_kills_every_worker_fails_at_last(world, tmp_path):
    folder, config, _ = world
    job = Job(str(folder / "pico"), whole_base(config), tmp_path / "shared", force=True)
    crew = _Deadly(job, 1)
    try:
        crew.start(grid(job.base, [read_axis(job.base, "edit.alpha=1")])[0])
        row = crew.wait()
    finally:
        crew.close()
    assert row.state == "failed"
    assert row.error == f"its worker died {MOST_DEATHS} times"


@pytest.mark.slow
def test_benches_find_the_untouched_models_activations_on_disk(world, tmp_path):
    folder, config, whole = world
    fresh = Bench(Job(str(folder / "pico"), whole_base(config), tmp_path, force=True))
    found = Bench(
        Job(str(folder / "pico"), whole_base(config), whole.folder / "shared", force=True)
    )
    setting = grid(fresh.base, [read_axis(fresh.base, "edit.alpha=0.75")])[0]
    with one_thread():
        first, second = fresh.trial(setting), found.trial(setting)
    assert (first.plan, first.measured) == (second.plan, second.measured)
    assert second.tokens < first.tokens
    assert first.tokens + first.shared == second.tokens + second.shared


DRIVER = """
import signal
import sys
from types import SimpleNamespace as Some
from saber.sweep.crew import Local

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
crew = Local(Some(base=Some(load=Some(device="cpu", device_map=""))), 1, 1)
try:
    print("begins", flush=True)
    crew.about()
except KeyboardInterrupt:
    sys.exit(130)
finally:
    crew.close()
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="groups of processes")
@pytest.mark.parametrize("after", [0.1, 0.3])
def test_ctrl_c_while_workers_begin_ends_them_without_a_word(after):
    """A terminal sends it to all processes; what they still imported ended in tracebacks."""
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert driver.stdout is not None
    assert driver.stdout.readline() == "begins\n"
    time.sleep(after)
    os.killpg(driver.pid, signal.SIGINT)
    # To the end of all that hold it open: the server of workers and the workers too.
    _, said = driver.communicate(timeout=60)
    assert (driver.returncode, said) == (130, "")


def test_the_driver_itself_hears_of_ctrl_c():
    # Also where these tests themselves run in the background, which ignores it.
    asked = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    asked += "import saber.cli.sweep, saber.sweep.cluster, saber.sweep.drive\n"
    asked += "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


@pytest.mark.parametrize("ignored", [False, True])
def test_workers_ignore_ctrl_c_where_their_driver_does(ignored):
    asked = "import signal\n"
    asked += (
        f"signal.signal(signal.SIGINT, signal.{'SIG_IGN' if ignored else 'default_int_handler'})\n"
    )
    asked += "import saber.sweep.quiet\nprint(signal.getsignal(signal.SIGINT).name)"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ("SIG_IGN" if ignored else "SIG_DFL")
