"""The driver: hands settings to workers, writes down what comes back, and reports the choice."""

from __future__ import annotations

import datetime
import json
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import monotonic
from typing import Any

from saber import __version__, artifacts, codec
from saber.config import RunConfig, override, require_empty_thoughts
from saber.errors import OutputError, SaberError, UsageError
from saber.gathering import gather
from saber.pipeline import Listener
from saber.record import environment
from saber.sweep import front, journal
from saber.sweep.crew import Alone, Crew, Local
from saber.sweep.grid import Axis, Range, Setting, changed, grid, read_axis
from saber.sweep.journal import Journal, Row
from saber.sweep.search import Grid, Search, Source, check_objectives, open_storage, space
from saber.sweep.table import as_parquet, row_of
from saber.sweep.trial import Job


@dataclass(frozen=True)
class Plan:
    """What a sweep is to do."""

    axes: tuple[str, ...] = ()
    """Axes as `FIELD=V1,V2,...` or, for a search, `FIELD=LOW..HIGH`."""
    trials: int = 0
    """Trials of a search; 0 makes a grid."""
    minutes: float = 0.0
    """No trial begins after so many minutes; 0 sets no limit."""
    workers: int = 1
    """Processes, each with a model of its own; 1 is this process, unless Ray is asked for."""
    ray: str = ""
    """Address of a Ray cluster for the workers, or `local` to start Ray here; empty takes none."""
    aim: float = front.AIM
    """Share of validation prompts that the chosen setting may leave amiss, 0 to 1."""
    also: tuple[str, ...] = ()
    """Further objectives of a search."""
    storage: str = ""
    """Database of a search, as an SQLAlchemy URL; empty takes a file in the sweep's folder."""


@dataclass(frozen=True)
class SweepResult:
    """What a sweep came to."""

    folder: Path
    """Where everything lies."""
    record: dict[str, Any]
    """What `sweep.json` holds."""
    left: int
    """Settings of the grid, or trials of the search, that are still to be done."""


@dataclass(frozen=True)
class Hearing(Listener):
    """A run's listener that hears of trials too."""

    on_trial: Callable[[Row, int], None] = field(default=lambda _row, _of: None)
    """Told of each trial that ended, and how many there are to be."""


def sweep(
    model: str,
    out: Path,
    config: RunConfig,
    plan: Plan,
    *,
    overwrite: bool = False,
    resume: bool = False,
    force: bool = False,
    command: str = "",
    listener: Hearing = Hearing(),
) -> SweepResult:
    """Try many settings of one model and choose one by validation prompts; write the folder `out`.

    Held-out prompts are measured once, with the chosen setting, when all trials have ended. A sweep
    that was cut off goes on with `resume`. Raises children of `SaberError`.
    """
    require_empty_thoughts(config)
    if not 0 <= plan.aim <= 1:
        raise UsageError(f"the aim is {plan.aim}; it must lie between 0 and 1.")
    if plan.workers < 1:
        raise UsageError("--workers must be at least 1.")
    started = datetime.datetime.now(datetime.timezone.utc)
    begin = monotonic()
    base = override(config, {"data": {"battery": "half"}})
    plan = _with_axes(out, base, plan, resume)
    axes = [read_axis(base, text) for text in plan.axes]
    settings = [] if plan.trials else grid(base, _listed(axes))
    check_objectives(plan.also)
    if "over-refusal" in plan.also and gather(base).validation.borderline is None:
        raise UsageError(
            "--also over-refusal needs borderline prompts that select, and these settings have none.",
            "Leave it out, or take the bundled targets, which have such.",
        )
    journal.prepare(out, model, overwrite=overwrite, resume=resume)
    with journal.locked(out):
        if (overwrite and not resume) or not (out / journal.STUDY).exists():
            _clear(out)
        storage = open_storage(out, plan.storage) if plan.trials else None
        listener.on_stage(f"loading {model}")
        job = Job(model, base, out / journal.SHARED, force, plan.workers)
        with closing(_crew(job, plan, listener)) as crew:
            about = crew.about()
            notes = about["model"].get("notes", ())
            for text in (*notes, *filter(None, [about["remark"]])):
                listener.on_stage(f"note: {text}")
            ready = monotonic()
            study = _study(out, about, plan)
            book = Journal(out / journal.TRIALS)
            settings = _numbered(out, study, settings)
            source: Source = Grid(settings, book.done())
            total = len(settings)
            if plan.trials:
                source = Search(
                    base,
                    axes or space(base),
                    out,
                    book.rows,
                    trials=plan.trials,
                    driver=study["driver"],
                    name=f"saber-{study['identity'][:16]}",
                    storage=storage,
                    also=plan.also,
                )
                total = plan.trials
            former = _former(out)
            done = len(_wanted(book, settings))
            if former and former["left"] == 0 and done >= total:
                raise OutputError(f"the sweep in {out} is finished.", "There is nothing to resume.")
            listener.on_stage(f"{total} settings, {done} of them done")
            until = begin + 60 * plan.minutes if plan.minutes else None
            at_work = monotonic()
            _work_through(crew, source, book, until, total, listener)
            phases = {"preparing": ready - begin, "trials": monotonic() - at_work}
            rows = _wanted(book, settings)
            left = max(0, total - len(rows))
            record = {
                "schema": artifacts.SCHEMA,
                "kind": "sweep",
                "saber_version": __version__,
                "command": command,
                "environment": {**environment(started), "workers": plan.workers},
                **{k: about[k] for k in ("model", "config", "judge", "prompts")},
                "axes": {a.field: list(a.values) for a in _listed(axes)} if settings else {},
                "search": None if settings else {"axes": list(plan.axes), "also": list(plan.also)},
                "baseline": about["baseline"],
                "left": left,
                **_outcome(crew, base, rows, plan, left, former, about["baseline"], listener),
            }
            phases["all"] = monotonic() - begin
            record["work"] = _work(rows, about, record, former, phases)
        artifacts.write_json(out / journal.SWEEP, record)
        as_parquet(out / journal.PARQUET, record["trials"])
    return SweepResult(out, record, left)


def _crew(job: Job, plan: Plan, listener: Hearing) -> Crew:
    """Return the workers that a plan asks for."""
    if plan.ray:
        from saber.sweep.cluster import Cluster

        return Cluster(replace(job, shared=None), plan.workers, plan.ray)
    return Local(job, plan.workers) if plan.workers > 1 else Alone(job, listener.progress)


def _work(
    rows: Sequence[Row],
    about: Mapping[str, Any],
    record: Mapping[str, Any],
    former: Mapping[str, Any] | None,
    phases: Mapping[str, float],
) -> dict[str, Any]:
    """Return what the sweep took, over all times that it was gone on with: tokens and seconds.

    Of the tokens before the first trial, those `prepared` are for what trials share. `worker_seconds` are
    those of all workers together; the others are seconds of the clock, of which a killed driver left none.
    """
    earlier = (former or {}).get("work", {})
    held = record["best"]["heldout"] if record["best"] else {}
    return {
        "tokens": sum(r.tokens for r in rows),
        "shared": sum(r.shared for r in rows),
        "preparing": about["tokens"] + earlier.get("preparing", 0),
        "prepared": about["prepared"] + earlier.get("prepared", 0),
        "heldout": held.get("tokens", 0),
        "seconds": phases["all"] + earlier.get("seconds", 0),
        "preparing_seconds": phases["preparing"] + earlier.get("preparing_seconds", 0),
        "trials_seconds": phases["trials"] + earlier.get("trials_seconds", 0),
        "heldout_seconds": held.get("seconds", 0),
        "worker_seconds": sum(r.seconds for r in rows),
    }


def _listed(axes: Sequence[Axis | Range]) -> list[Axis]:
    """Return the axes of a grid; raises `UsageError` for ranges, which a grid cannot walk."""
    for axis in axes:
        if isinstance(axis, Range):
            raise UsageError(
                f"axis {axis.field} is a range, and a grid needs values.",
                "List them, or search with --trials N.",
            )
    return [axis for axis in axes if isinstance(axis, Axis)]


def _with_axes(out: Path, base: RunConfig, plan: Plan, resume: bool) -> Plan:
    """Take the axes, and what a search began with, from the study where a resumed one is given none."""
    if not (resume and (out / journal.STUDY).exists()):
        return plan
    study = journal.read_study(out)
    asked = study["asked"]
    searched = bool(asked["trials"])
    if not plan.axes and (searched or not plan.trials):
        trials, also = plan.trials or int(asked["trials"]), plan.also or tuple(asked["also"])
        plan = replace(plan, axes=tuple(asked["axes"]), trials=trials, also=also)
    if searched != bool(plan.trials):
        kind = "search" if searched else "grid"
        raise UsageError(f"the sweep in {out} is a {kind}.", "Go on with it as one.")
    before = [read_axis(base, text) for text in asked["axes"]]
    if searched and before != [read_axis(base, text) for text in plan.axes]:
        raise UsageError(
            f"the search in {out} has other axes ({', '.join(asked['axes']) or 'its own'}).",
            "Give the same ones, or none.",
        )
    return plan


def _clear(out: Path) -> None:
    """Remove a former sweep: its mark of completeness first, and last what tells that it is one."""
    for name in (journal.SWEEP, journal.TRIALS, journal.PARQUET, journal.README):
        (out / name).unlink(missing_ok=True)
    for path in out.glob(f"{journal.OPTUNA}*"):
        path.unlink()
    for name in (journal.SHARED, journal.PLOTS):
        shutil.rmtree(out / name, ignore_errors=True)
    (out / journal.STUDY).unlink(missing_ok=True)


def _study(out: Path, about: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """Return the folder's study, written now where there is none; raises where it is of another kind."""
    now = {part: about[part] for part in journal.SAME}
    asked = {"axes": list(plan.axes), "trials": plan.trials, "also": list(plan.also)}
    if (out / journal.STUDY).exists():
        study = journal.read_study(out)
        journal.require_same(out, study, now)
        study["asked"] = asked
    else:
        told = json.dumps([now, plan.axes, plan.also], sort_keys=True)
        study = {**now, "asked": asked, "numbers": {}}
        study |= {"identity": codec.digest(told), "driver": uuid.uuid4().hex}
    journal.write_study(out, study)
    return study


def _numbered(out: Path, study: dict[str, Any], settings: Sequence[Setting]) -> list[Setting]:
    """Give each setting its number in this sweep for good: a grown grid counts on."""
    numbers: dict[str, int] = study["numbers"]
    found = []
    for setting in settings:
        number = numbers.setdefault(setting.key, len(numbers) + 1)
        found.append(replace(setting, number=number))
    if settings:
        journal.write_study(out, study)
    return found


def _wanted(book: Journal, settings: Sequence[Setting]) -> list[Row]:
    """Return the trials of these settings, of a search (which has no settings) all.

    Each has the values of the axes as they are now: it may have ended before there was one of them.
    """
    if not settings:
        return list(book.rows)
    values = {s.key: s.values for s in settings}
    return [replace(r, values=values[r.key]) for r in book.rows if r.key in values]


def _former(out: Path) -> dict[str, Any] | None:
    path = out / journal.SWEEP
    return artifacts.read_json(path) if path.exists() else None


def _work_through(
    crew: Crew,
    source: Source,
    book: Journal,
    until: float | None,
    total: int,
    listener: Hearing,
) -> None:
    """Do the settings that the source gives, each written down as it ends."""
    # By number: a search may ask for the same values twice, and two workers may be at them at once.
    running: dict[int, Setting] = {}
    while True:
        while crew.free and (until is None or monotonic() < until):
            setting = source.next()
            if setting is None:
                break
            running[setting.number] = setting
            crew.start(setting, source.prune(setting))
        if not running:
            return
        row = crew.wait()
        book.append(row)
        source.tell(running.pop(row.number), row)
        listener.on_trial(row, total)


def _outcome(
    crew: Crew,
    base: RunConfig,
    rows: Sequence[Row],
    plan: Plan,
    left: int,
    former: Mapping[str, Any] | None,
    before: Mapping[str, Any],
    listener: Hearing,
) -> dict[str, Any]:
    """Return the table, the front and, once nothing is left to do, the chosen setting's report."""
    mode, keeps = base.data.mode, bool(base.data.keep or base.data.retain)
    chosen = front.choose(rows, plan.aim, mode)
    on_front = front.pareto(rows, mode)
    if not left and chosen is None:
        said = next((r.error for r in rows if r.error), "nothing was measured")
        raise SaberError(f"none of {len(rows)} settings could be measured; the first: {said}")
    best = None
    if chosen is not None and not left:
        listener.on_stage(f"measuring setting {chosen.number} on held-out prompts")
        best = _best(crew, base, chosen, plan, mode, former, before)
    order = [*front.ranked(rows, mode), *(r for r in rows if r not in front.finished(rows))]
    return {
        "rule": front.rule(plan.aim, mode, keeps=keeps),
        "faults": front.faults(mode, keeps=keeps),
        "aim": plan.aim,
        "trials": [
            {
                **row_of(row, mode),
                "front": row.number in on_front,
                "best": bool(best) and chosen is not None and row.number == chosen.number,
            }
            for row in order
        ],
        "front": on_front,
        "best": best,
    }


def _best(
    crew: Crew,
    base: RunConfig,
    chosen: Row,
    plan: Plan,
    mode: str,
    former: Mapping[str, Any] | None,
    before: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the chosen setting with its held-out measures, which are taken once for each choice."""
    earlier = (former or {}).get("best") or {}
    held = earlier.get("heldout")
    looks = int(earlier.get("looks", 0))
    if earlier.get("number") != chosen.number or held is None:
        held = crew.held_out(changed(base, chosen.values))
        looks += 1
    assert chosen.measured is not None
    seen, now = front.amiss(chosen.measured, mode), front.amiss(held["edited"], mode)
    asked = chosen.measured.get("lost")
    was = front.amiss({**before, "lost": asked and {**asked, "successes": 0}}, mode)
    return {
        "number": chosen.number,
        "values": dict(chosen.values),
        "plan": chosen.plan,
        "reached": front.reached(chosen.measured, plan.aim, mode),
        "helps": seen.rate < was.rate,
        "amiss": {"untouched": asdict(was), "validation": asdict(seen), "heldout": asdict(now)},
        "validation": chosen.measured,
        "heldout": held,
        "looks": looks,
        "shrinkage": {
            "amiss": now.rate - seen.rate,
            "refusal": held["edited"]["refusal"]["rate"] - chosen.measured["refusal"]["rate"],
            "kl_sequence": front.divergence(held["edited"]) - front.divergence(chosen.measured),
            "perplexity_ratio": _ratio(held["edited"], held["baseline"])
            - _ratio(chosen.measured, before),
        },
    }


def _ratio(after: Mapping[str, Any], before: Mapping[str, Any]) -> float:
    return float(after["perplexity"]["overall"] / before["perplexity"]["overall"])
