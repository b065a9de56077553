"""Where the next setting comes from: a grid in its order, or a search that learns from what came."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from saber.config import RunConfig
from saber.errors import MissingExtra, UsageError
from saber.sweep import front
from saber.sweep.grid import Axis, Range, Setting, changed, check_axes
from saber.sweep.journal import OPTUNA, Row
from saber.sweep.trial import Prune

FIRST = 10
"""Random trials before the search learns, and before it prunes."""
ALSO = ("over-refusal", "accuracy")
"""Further objectives that a search can have."""


@runtime_checkable
class Source(Protocol):
    """Gives settings, one after the other."""

    def next(self) -> Setting | None:
        """Return the next setting to try; None when there is none."""
        ...

    def prune(self, setting: Setting) -> Prune | None:
        """Return the test by which a trial of the setting may end early."""
        ...

    def tell(self, setting: Setting, row: Row) -> None:
        """Hear what came of it."""
        ...


class Grid:
    """All settings of a grid that are not done yet."""

    def __init__(self, settings: Sequence[Setting], done: Mapping[str, Row]) -> None:
        self._left = deque(s for s in settings if s.key not in done)

    def next(self) -> Setting | None:
        """Return the next of the grid."""
        return self._left.popleft() if self._left else None

    def prune(self, setting: Setting) -> Prune | None:
        """A grid is measured as a whole."""
        del setting
        return None

    def tell(self, setting: Setting, row: Row) -> None:
        """A grid learns nothing."""


@dataclass(frozen=True)
class Beaten:
    """Prunes a trial that forward passes show to be worse than a finished one in both respects."""

    points: tuple[tuple[float, float], ...]
    """Opening and KL of finished trials."""
    margin: float = 0.01
    """How much worse its opening has to be, probability."""

    def __call__(self, cheap: Mapping[str, float]) -> bool:
        """Whether these scores are beaten."""
        opening, kl = cheap["opening"], cheap["kl_sequence"]
        return any(opening > o + self.margin and kl > k for o, k in self.points)


def space(config: RunConfig) -> list[Axis | Range]:
    """Return the axes of a search that was given none."""
    shared: list[Axis | Range] = [Range("edit.alpha", 0.4, 1.0)]
    if config.edit.kind == "selective":
        return [*shared, Range("edit.lambda", 0.3, 1000.0, log=True)]
    return [*shared, Range("refine.top_k", 4.0, 80.0, log=True, whole=True)]


class Search:
    """Optuna's multi-objective search by ask and tell: answers amiss and KL, and what else is asked for.

    Its own journal (a file in the sweep's folder, or a database that several machines may share)
    remembers what was asked. When it opens it is told of ended trials that it has not heard of, and
    asks again for those that this driver began and never ended. With one worker, one seed and no
    interruption the trials are the same again.
    """

    def __init__(
        self,
        config: RunConfig,
        axes: Sequence[Axis | Range],
        folder: Path,
        rows: Sequence[Row],
        *,
        trials: int,
        driver: str,
        name: str = "saber",
        storage: Any = None,
        also: Sequence[str] = (),
    ) -> None:
        """Open the search; `storage` is what `open_storage` gave, by default a file in the folder.

        In a database `name` tells it from searches on other models, prompts or axes; `driver` tells
        this process's trials from other machines'.
        """
        check_axes(axes)
        self._optuna = _import()
        self._config, self._axes, self._also, self._most = config, axes, tuple(also), trials
        self._mode = config.data.mode
        self._rows = list(rows)
        self._driver, self._name = driver, name
        self._asked: dict[int, Any] = {}
        self._study = self._open(storage or open_storage(folder), config.seed)
        self._catch_up()

    def _open(self, storage: Any, seed: int) -> Any:
        optuna = self._optuna
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        begun = len(self._rows)
        # Seeded anew by what is done, so that a resumed search does not repeat its first draws.
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=FIRST, multivariate=True, seed=seed + 1000 * begun
        )
        study = optuna.create_study(
            study_name=self._name,
            storage=storage,
            sampler=sampler,
            directions=["minimize"] * (2 + len(self._also)),
            load_if_exists=True,
        )
        if len(study.directions) != 2 + len(self._also):
            raise UsageError(
                f"the search began with {len(study.directions)} objectives, not {2 + len(self._also)}.",
                "Give the same ones with --also.",
            )
        return study

    def _catch_up(self) -> None:
        """Bring the search's own memory to what the sweep's journal says."""
        rows = {row.number: row for row in self._rows}
        for trial in self._study.get_trials(deepcopy=False):
            row = rows.pop(trial.number + 1, None)
            if trial.state.is_finished() or trial.user_attrs.get("driver") != self._driver:
                continue
            self._end(trial.number, row)
            if row is None and trial.params:
                self._study.enqueue_trial(trial.params)
        for row in rows.values():
            # The search's journal is gone: what was measured is told to it again.
            done = row.state == "done"
            states = self._optuna.trial.TrialState
            self._study.add_trial(
                self._optuna.trial.create_trial(
                    state=states.COMPLETE if done else states.FAIL,
                    params=dict(row.values),
                    distributions=self._distributions(),
                    values=self._values(row) if done else None,
                )
            )

    def _distributions(self) -> dict[str, Any]:
        kinds = self._optuna.distributions
        found: dict[str, Any] = {}
        for axis in self._axes:
            if isinstance(axis, Axis):
                found[axis.field] = kinds.CategoricalDistribution(axis.values)
            elif axis.whole:
                found[axis.field] = kinds.IntDistribution(int(axis.low), int(axis.high), axis.log)
            else:
                found[axis.field] = kinds.FloatDistribution(axis.low, axis.high, axis.log)
        return found

    def next(self) -> Setting | None:
        """Ask for a setting; None once as many were tried as were wanted."""
        if len(self._rows) + len(self._asked) >= self._most:
            return None
        trial = self._study.ask(self._distributions())
        trial.set_user_attr("driver", self._driver)
        values = {axis.field: trial.params[axis.field] for axis in self._axes}
        setting = Setting(trial.number + 1, values, changed(self._config, values))
        self._asked[setting.number] = trial
        return setting

    def prune(self, setting: Setting) -> Prune | None:
        """Return a test against the trials that have ended, once there are some."""
        del setting
        points = [
            (row.cheap["opening"], row.cheap["kl_sequence"])
            for row in self._rows
            if row.state == "done" and row.cheap
        ]
        return Beaten(tuple(points) if len(points) >= FIRST else ())

    def tell(self, setting: Setting, row: Row) -> None:
        """Tell it what came of the setting."""
        self._rows.append(row)
        self._asked.pop(setting.number, None)
        self._end(setting.number - 1, row)

    def _end(self, number: int, row: Row | None) -> None:
        states = self._optuna.trial.TrialState
        if row is not None and row.state == "done":
            self._study.tell(number, self._values(row))
        else:
            # A pruned one is failed here: Optuna's own pruning knows one objective only.
            self._study.tell(number, state=states.FAIL)

    def _values(self, row: Row) -> list[float]:
        measured = row.measured
        assert measured is not None
        further = {
            "over-refusal": lambda: measured["over_refusal"]["borderline"]["rate"],
            "accuracy": lambda: 1 - measured["accuracy"]["overall"],
        }
        return [*front.scores(row, self._mode), *(float(further[n]()) for n in self._also)]


def _import() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise MissingExtra("optuna", "search") from error
    return optuna


def check_objectives(names: Sequence[str]) -> None:
    """Raise `UsageError` for an objective that there is not."""
    for name in names:
        if name not in ALSO:
            raise UsageError(f"unknown objective {name!r}.", f"Known: {', '.join(ALSO)}.")


def open_storage(folder: Path, url: str = "") -> Any:
    """Return where a search remembers: a file in the folder, or a database by its SQLAlchemy URL.

    Raises `MissingExtra` without Optuna, and `UsageError` for a database that cannot be used.
    """
    optuna = _import()
    if not url:
        backend = optuna.storages.journal.JournalFileBackend(str(folder / OPTUNA))
        return optuna.storages.JournalStorage(backend)
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return optuna.storages.RDBStorage(url)
    except (SQLAlchemyError, ImportError, ValueError) as error:
        said = str(error).strip().splitlines()[0]
        raise UsageError(
            f"the database {_without_password(url)} cannot be used: {said}.",
            "Check the address (such as sqlite:///study.db), and that the server runs.",
        ) from error


def _without_password(url: str) -> str:
    head, at, tail = url.rpartition("@")
    if not at:
        return url
    scheme, _, rest = head.partition("://")
    return f"{scheme}://{rest.partition(':')[0]}@{tail}"
