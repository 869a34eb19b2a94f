"""The study of a search: where it is kept, who gets which trial, and what becomes of lost ones."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from tl.config import Sampler, SearchSettings
from tl.config.searching import JOURNAL
from tl.search.errors import SearchError
from tl.search.locking import FileLocks, JournalLock, Locks, PostgresLocks
from tl.search.samplers import COARSE, FINE, GIVEN, make_pruner, make_sampler
from tl.search.space import Dimension
from tl.tracking.processes import lives, own_process
from tl.tracking.store import reason_of, redacted

BEAT_SECONDS = 15.0
LOST_SECONDS = 90.0  # without a beat, for a worker on another host
ATTEMPTS = 2  # of settings whose worker died: a third would die of them, too
SETUP = "tl"  # attribute of the study that holds what all workers share
LOST = "lost"  # attribute of a trial that does not count, as its worker was gone
DONE = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


def open_storage(address: str, folder: Path, study: str) -> tuple[BaseStorage, Locks]:
    """The storage of a study and its locks; tables are made by one process alone.

    Args:
        address: `search.storage`.
        folder: Of the search.
        study: Name of the study.

    Raises:
        SearchError: It cannot be used.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    files = FileLocks(folder / "study")
    if address == JOURNAL:
        journal = folder / "study" / "journal.log"
        lock: Any = JournalLock(journal)  # Optuna asks for no more than its two methods
        return JournalStorage(JournalFileBackend(str(journal), lock)), files
    try:
        from sqlalchemy import create_engine

        if address.startswith("sqlite"):
            with files.exclusive("tables"):
                return RDBStorage(address, {"connect_args": {"timeout": 60}}), files
        engine = create_engine(address, pool_pre_ping=True, connect_args={"connect_timeout": 10})
        locks = PostgresLocks(engine, study)
        with PostgresLocks(engine, "").exclusive("tables"):
            return RDBStorage(address, {"pool_pre_ping": True}), locks
    except Exception as error:  # of SQLAlchemy, its drivers, alembic and Optuna: each has its own
        cause = reason_of(error.__cause__ or error)
        missing = isinstance(error, ImportError) or "No module" in str(error)
        remedy = 'pip install "tl[server]"' if missing else "start it, or create the database"
        msg = f"search.storage={redacted(address)} cannot be used: {cause}; {remedy}"
        raise SearchError(msg) from error


class Trials:
    """The trials of a search, as one worker sees them.

    Args:
        study: With its setup.
        storage: Of the study.
        locks: Shared by all workers.
        settings: `search.*`.
        space: What is varied.
        seed: Of what is drawn.
    """

    def __init__(
        self,
        study: optuna.Study,
        storage: BaseStorage,
        locks: Locks,
        settings: SearchSettings,
        space: Sequence[Dimension],
        seed: int,
    ) -> None:
        self.study, self.storage, self.locks = study, storage, locks
        self.settings, self.space, self.seed = settings, tuple(space), seed
        self._beats: dict[int, tuple[Any, float]] = {}

    def all(self) -> list[FrozenTrial]:
        """Those that count: begun, and not lost."""
        trials = self.study.get_trials(deepcopy=False)
        return [t for t in trials if t.state != TrialState.WAITING and LOST not in t.user_attrs]

    def lost(self) -> list[FrozenTrial]:
        """Those whose worker was gone."""
        return [t for t in self.study.get_trials(deepcopy=False) if LOST in t.user_attrs]

    def done(self) -> list[FrozenTrial]:
        """Those that came to an end."""
        return [t for t in self.all() if t.state in DONE]

    def running(self) -> list[FrozenTrial]:
        """Those under way."""
        return [t for t in self.all() if t.state == TrialState.RUNNING]

    def enough(self) -> bool:
        """Whether as many as asked for came to an end."""
        return len(self.done()) >= self.settings.trials

    def next(self) -> optuna.Trial | None:
        """A trial for this worker; None where all are given out."""
        with self.locks.exclusive("trials"):
            self.reap()
            begun = self.all()
            if len(begun) >= self.settings.trials:
                return None
            trial = self.study.ask()
            trial.set_user_attr("worker", own_process())
            if "kind" not in trial.user_attrs:
                trial.set_user_attr("kind", self._kind(begun))
            return trial

    def _kind(self, begun: Sequence[FrozenTrial]) -> str:
        sampler = self.settings.sampler
        if sampler is not Sampler.coarse_to_fine:
            return str(sampler.value)
        coarse = sum(t.user_attrs.get("kind") == COARSE for t in begun)
        return COARSE if coarse < self.settings.trials // 2 else FINE

    def reap(self) -> list[int]:
        """Mark trials as failed whose workers are gone, and queue their settings again.

        A worker of this machine is asked for by its process. One of another machine must beat: its
        beats are timed by our own clock, as clocks of hosts differ.

        Returns:
            Numbers of these trials.
        """
        gone = [t for t in self.study.get_trials(deepcopy=False) if self._is_gone(t)]
        for trial in gone:
            attempt = int(trial.user_attrs.get("attempt", 1))
            self.give_up(trial, f"its worker died ({self._worker(trial)})", attempt=attempt)
        return [trial.number for trial in gone]

    def give_up(self, trial: FrozenTrial | optuna.Trial, reason: str, *, attempt: int) -> None:
        """Mark a trial as failed; it does not count, unless its settings were tried so before."""
        attrs: dict[str, Any] = {"attempt": attempt + 1}
        attrs |= {k: v for k, v in trial.user_attrs.items() if k in ("kind", "share")}
        again = attempt < ATTEMPTS
        marks: dict[str, Any] = {"error": reason}
        if again:
            marks[LOST] = True
        self._mark(trial, marks)
        with suppress(ValueError, optuna.exceptions.UpdateFinishedTrialError):
            self.study.tell(trial.number, state=TrialState.FAIL)
            if again:
                self.study.enqueue_trial(trial.params, user_attrs=attrs)

    def _mark(self, trial: FrozenTrial | optuna.Trial, values: Mapping[str, Any]) -> None:
        with suppress(optuna.exceptions.UpdateFinishedTrialError):
            for key, value in values.items():
                self.storage.set_trial_user_attr(trial._trial_id, key, value)

    @staticmethod
    def _worker(trial: FrozenTrial) -> str:
        words = str(trial.user_attrs.get("worker", "")).split(" ")
        return f"process {words[1]}" if len(words) > 1 else "an unknown process"

    def _is_gone(self, trial: FrozenTrial) -> bool:
        if trial.state != TrialState.RUNNING:
            return False
        found = lives(trial.user_attrs.get("worker", ""))
        if found is not None:
            return not found
        now, beat = time.monotonic(), trial.user_attrs.get("beat")
        seen = self._beats.get(trial.number)
        if seen is None or seen[0] != beat:
            self._beats[trial.number] = (beat, now)
            return False
        return now - seen[1] > LOST_SECONDS

    @contextmanager
    def beating(self, trial: optuna.Trial) -> Iterator[None]:
        """Say every some seconds that the worker of a trial lives."""
        end = threading.Event()

        def beat() -> None:
            number = 0
            while not end.wait(BEAT_SECONDS):
                number += 1
                with suppress(Exception):  # a database that is away for a moment
                    self._mark(trial, {"beat": number})

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join()

    def tell(
        self, trial: optuna.Trial, attrs: Mapping[str, Any], value: float | None, state: TrialState
    ) -> bool:
        """Record how a trial ended; False where it was taken for lost meanwhile."""
        self._mark(trial, attrs)
        try:
            complete = state == TrialState.COMPLETE
            self.study.tell(trial, value if complete else None, state=state)
        except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
            return False
        return True


def study_name(settings: SearchSettings, folder: Path) -> str:
    """Name of the study in its storage."""
    return settings.study or folder.name


def read_setup(storage: BaseStorage, name: str) -> dict[str, Any] | None:
    """What the first worker wrote down for all; None before it did."""
    try:
        study = optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        return None
    found: dict[str, Any] | None = study.user_attrs.get(SETUP)
    return found


def open_study(
    storage: BaseStorage,
    locks: Locks,
    name: str,
    settings: SearchSettings,
    setup: Mapping[str, Any],
    seed: int,
) -> Trials:
    """The study, made with its first trials where it is not there yet.

    Args:
        storage: Of it.
        locks: Of it.
        name: Of it.
        settings: `search.*`.
        setup: What all workers share: `space`, `direction`, `epochs`, `given`.
        seed: Of what is drawn.
    """
    space = [Dimension.from_dict(d) for d in setup["space"]]
    with locks.exclusive("trials"):
        study = optuna.create_study(
            study_name=name,
            storage=storage,
            direction=setup["direction"],
            load_if_exists=True,
            sampler=make_sampler(settings, space, seed),
            pruner=make_pruner(settings.pruner, setup["epochs"], folds=bool(setup["folds"])),
        )
        if SETUP not in study.user_attrs:
            _queue_first(study, settings, space, setup["given"], seed)
            study.set_user_attr(SETUP, dict(setup))
    return Trials(study, storage, locks, settings, space, seed)


def _queue_first(
    study: optuna.Study,
    settings: SearchSettings,
    space: Sequence[Dimension],
    given: Mapping[str, Any] | None,
    seed: int,
) -> None:
    """The settings as they were given, then the cells of a grid."""
    if study.get_trials(deepcopy=False):  # its worker was killed just here
        return
    if settings.sampler is not Sampler.grid:
        if given is not None:
            study.enqueue_trial(dict(given), user_attrs={"kind": GIVEN, "share": 1.0})
        return
    from tl.search.samplers import grid_cells

    for cell in grid_cells(space, settings.grid_points, seed)[: settings.trials]:
        study.enqueue_trial(cell, user_attrs={"kind": Sampler.grid.value})
