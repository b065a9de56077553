"""The search: seeded, resumed, pruned by forward passes, and its bad input."""

import dataclasses
import sys

import pytest
from test_sweep import (  # noqa: F401  (fixtures)
    cache,
    config,
    config_of,
    few,
    model_folder,
    original,
    own_cache,
    row,
    swept,
    texts,
    told,
)

from saber.config import override, preset
from saber.errors import MissingExtra, UsageError
from saber.sweep import journal, search
from saber.sweep.drive import Hearing, Plan, _work_through
from saber.sweep.grid import Axis, Range
from saber.sweep.journal import Journal
from saber.sweep.search import Beaten, Search, space

pytest.importorskip("optuna")
AXES = ("edit.alpha=0.2..1", "refine.top_k=1..2")


def scored(setting, refused, kl):
    """A finished row of a setting."""
    return dataclasses.replace(
        row(setting.number, refused, kl), key=setting.key, values=dict(setting.values)
    )


def walk(folder, count, seed=0, rows=(), most=99, driver="me"):
    """Ask and tell a search without a model: refusals fall and KL grows with alpha."""
    base = override(preset("card"), {"seed": seed})
    axes = [Range("edit.alpha", 0.2, 1.0), Axis("refine.stop", ("never", "behaviour"))]
    found = Search(base, axes, folder, rows, trials=most, driver=driver)
    done = []
    for _ in range(count):
        setting = found.next()
        if setting is None:
            break
        alpha = setting.values["edit.alpha"]
        done.append(scored(setting, round(20 * (1 - alpha)), alpha**2))
        found.tell(setting, done[-1])
    return found, done


def test_a_search_is_seeded_and_ends_after_its_trials(tmp_path):
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    first, again, other = (
        walk(folder, 20, seed, most=14)[1] for folder, seed in zip(folders, (0, 0, 1), strict=True)
    )
    assert len(first) == 14
    assert [r.values for r in first] == [r.values for r in again]
    assert [r.values for r in first] != [r.values for r in other]
    assert all(0.2 <= r.values["edit.alpha"] <= 1 for r in first)


def test_what_was_asked_and_never_ended_is_asked_again(tmp_path):
    found, done = walk(tmp_path, 3)
    lost = found.next()
    again = Search(preset("card"), found._axes, tmp_path, done, trials=5, driver="me")
    retried = again.next()
    assert retried.values == lost.values
    assert retried.number != lost.number
    again.tell(retried, scored(retried, 0, 0.1))
    last = again.next()
    assert again.next() is None
    # Another machine's trial under way is left to it.
    other = Search(preset("card"), found._axes, tmp_path, [], trials=9, driver="other")
    assert other.next().values != last.values
    states = [t.state.name for t in other._study.get_trials()]
    assert states == ["COMPLETE", "COMPLETE", "COMPLETE", "FAIL", "COMPLETE", "RUNNING", "RUNNING"]


def test_a_search_whose_own_journal_is_gone_is_told_again(tmp_path):
    done = walk(tmp_path, 4)[1]
    for path in tmp_path.glob(f"{journal.OPTUNA}*"):
        path.unlink()
    found, _ = walk(tmp_path, 0, rows=done)
    assert len(found._study.get_trials()) == 4
    assert found._study.get_trials()[2].values == [
        done[2].measured["refusal"]["rate"],
        done[2].measured["kl"]["sequence"],
    ]


def test_pruning_needs_a_trial_that_is_better_in_both():
    beaten = Beaten(((0.10, 0.5), (0.3, 0.01)))
    assert beaten({"opening": 0.2, "kl_sequence": 0.6})
    assert beaten({"opening": 0.32, "kl_sequence": 0.02})
    assert not beaten({"opening": 0.05, "kl_sequence": 0.6})
    assert not beaten({"opening": 0.2, "kl_sequence": 0.4})
    assert not beaten({"opening": 0.105, "kl_sequence": 0.6})  # within the margin
    assert not Beaten(())({"opening": 1.0, "kl_sequence": 9.0})


@pytest.mark.slow
def test_a_search_on_a_model_is_resumed_prunes_and_chooses(
    config,  # noqa: F811
    model_folder,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    monkeypatch.setattr(search, "FIRST", 3)
    out, seen = tmp_path / "s", []

    class Stop(Exception):
        pass

    def stop(row, _total):
        seen.append(row.number)
        if len(seen) == 2:
            raise Stop

    plan = Plan(AXES, trials=5)
    with pytest.raises(Stop):
        swept(model_folder, out, config, plan, listener=Hearing(on_trial=stop))
    # After three trials every further one is beaten.
    monkeypatch.setattr(search.Beaten, "__call__", lambda self, cheap: bool(self.points))
    result = swept(model_folder, out, config, Plan(), resume=True)
    rows = Journal(out / journal.TRIALS).rows
    assert [r.state for r in rows] == ["done"] * 3 + ["pruned"] * 2
    assert all(r.cheap["kl_sequence"] > 0 for r in rows)
    assert all(r.measured is None for r in rows[3:])
    assert rows[4].tokens + rows[4].shared < rows[0].tokens + rows[0].shared
    assert result.record["best"]["number"] in {r.number for r in rows[:3]}
    with pytest.raises(UsageError, match="is a search"):
        swept(model_folder, out, config, Plan(("edit.alpha=1",)), resume=True)
    with pytest.raises(UsageError, match="other axes"):
        swept(model_folder, out, config, Plan(AXES[:1], trials=6), resume=True)
    # More trials need no axes said again.
    assert len(swept(model_folder, out, config, Plan(trials=6), resume=True).record["trials"]) == 6


class _Pair:
    """Two workers that end their trials in order, without a model."""

    def __init__(self):
        self.running = []

    @property
    def free(self):
        return 2 - len(self.running)

    def start(self, setting, prune=None):
        del prune
        self.running.append(setting)

    def wait(self):
        return scored(self.running.pop(0), 1, 0.1)

    def about(self):
        raise NotImplementedError

    held_out = close = about


def test_two_workers_may_try_the_same_values_at_once(tmp_path):
    axes = [Axis("refine.stop", ("never",))]
    found = Search(preset("card"), axes, tmp_path, [], trials=4, driver="me")
    book = Journal(tmp_path / journal.TRIALS)
    _work_through(_Pair(), found, book, None, 4, Hearing())
    assert sorted(r.number for r in book.rows) == [1, 2, 3, 4]
    assert len({r.key for r in book.rows}) == 1


def test_a_search_without_axes_has_its_own_and_bad_input_is_told(
    config,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    assert {a.field for a in space(preset("default"))} == {"edit.alpha", "edit.lambda"}
    assert {a.field for a in space(preset("card"))} == {"edit.alpha", "refine.top_k"}
    other = override(config, {"data": {"mode": "removal"}})
    with pytest.raises(UsageError, match="needs borderline prompts that select"):
        swept("no-such", tmp_path / "a", other, Plan(AXES, trials=2, also=("over-refusal",)))
    with pytest.raises(UsageError, match="unknown objective 'acuracy'"):
        swept("no-such-model", tmp_path / "a", config, Plan(AXES, trials=2, also=("acuracy",)))
    url = "postgresql://me:secret@127.0.0.1:1/none"
    for bad in (url, "nothing://here", "sqlite:////no/such/folder/x.db"):
        with pytest.raises(UsageError, match="cannot be used") as caught:
            swept("no-such-model", tmp_path / "b", config, Plan(AXES, trials=2, storage=bad))
        assert "secret" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtra, match=r"saber-llm\[search\]"):
        swept("no-such-model", tmp_path / "c", config, Plan(AXES, trials=2))
