"""From the jobs of a command to what became of them."""

from __future__ import annotations

import os
import secrets
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl.batches.driving import Call, View
from tl.batches.engines import make_engine
from tl.batches.errors import BatchError
from tl.batches.jobs import (
    DONE,
    FAILED,
    INTERRUPTED,
    LOST,
    REFUSED,
    RUNNING,
    WAITING,
    WRONG,
    Entry,
    Job,
    Rules,
)
from tl.batches.ledger import Ledger
from tl.batches.resources import Slots, slots
from tl.batches.sharing import shares
from tl.batches.showing import watching
from tl.batches.worker import Task
from tl.config import BatchConfig
from tl.display import say

BASIC = "basic"
SKEW_SECONDS = 30.0
MANY = 100_000  # workers at once where the engine's own queue is the limit


@dataclass(frozen=True)
class Outcome:
    """What became of the jobs of a call.

    Args:
        views: By number.
        stopped: Why jobs are left that were not run to their end; empty: none are.
        known: How many were done before.
    """

    views: tuple[View, ...]
    stopped: str = ""
    known: int = 0

    def of(self, *states: str) -> list[Entry]:
        """Jobs in some states."""
        return [view.entry for view in self.views if view.state in states]

    @property
    def wrong(self) -> list[Entry]:
        """Jobs that failed, were lost or refused."""
        return self.of(*WRONG)

    @property
    def left(self) -> list[Entry]:
        """Jobs that were interrupted or never begun, or that another call runs."""
        return self.of(INTERRUPTED, WAITING, RUNNING)


class Batch:
    """A batch that can be run: its jobs make sense, its folder and its engine are there.

    Args:
        jobs: All jobs of the command.
        place: Folder of the batch.
        config: `batch.*`.
        engine: `basic`: one job after the other in this process; else see `engines`.
        settings: Of the engine.

    Raises:
        BatchError: It cannot be run as it was asked for; nothing was started.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        place: Path,
        config: BatchConfig,
        *,
        engine: str = BASIC,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        check(jobs, place)
        self.jobs, self.config, self.name = jobs, config, engine
        self.engine = None if engine == BASIC else make_engine(engine, settings or {}, place)
        self.ledger = Ledger(place)

    def run(self, target: str, load: str) -> Outcome:
        """Run the jobs that are not done yet.

        Args:
            target: Of each job; see `Task`.
            load: Likewise.

        Raises:
            EngineError: Workers cannot be started.
        """
        began = time.monotonic()
        warn_of_skew(self.ledger)
        index, count = self.config.shard_of()
        entries = self.ledger.add(self.jobs, anew=self.config.retry == "all")[index::count]
        known = sum(self.ledger.state(entry) == DONE for entry in entries)
        machine = self._shares(entries, load) if self.name == "local" else None
        limit = machine.count if machine else self.config.jobs or MANY
        limit = 1 if self.name == BASIC else limit
        say(headline(len(entries), known, limit, machine.reason if machine else ""))
        if machine and machine.warning:
            say(f"warning: {machine.warning}")
        task = Task(
            self.ledger.place,
            session=secrets.token_hex(4),
            rules=rules_of(self.ledger, entries, self.config),
            target=target,
            load=load,
            stay=True,
            slots=machine,
            environment=_environment(),
        )
        budget = self.config.budget_seconds()
        deadline = None if budget is None else began + budget
        shown = min(limit, len(entries))
        with (
            _alarm(deadline if self.name == BASIC else None),
            watching(self.ledger, shown, quiet=self.name == BASIC) as watch,
        ):
            call = Call(self.ledger, task, limit, deadline, watch)
            views = call.run(self.engine)
        self.ledger.forget(task.session)
        return Outcome(tuple(views), call.stopped, known)

    def _shares(self, entries: Sequence[Entry], load: str) -> Slots:
        """Shares of this machine for the jobs that are not done."""
        left = {entry.key for entry in entries if self.ledger.state(entry) != DONE}
        configs = [job.config for job in self.jobs if job.key in left]
        if not configs:
            return slots(self.config.jobs, len(entries))
        return shares(self.config, configs, load, say)


def check(jobs: Sequence[Job], place: Path) -> None:
    """Refuse a batch that makes no sense, before anything is written.

    Raises:
        BatchError: It has no jobs, the same job twice, or the folder of a single run.
    """
    if not jobs:
        msg = "the batch has no jobs: one of its settings has no value to sweep over"
        raise BatchError(msg)
    seen: dict[str, Job] = {}
    twins = []
    for job in jobs:
        if first := seen.get(job.key):
            twins.append(f"jobs {first.number} and {job.number}: {' '.join(job.overrides)}")
        seen.setdefault(job.key, job)
    if twins:
        msg = "jobs of the batch are the same; leave one of each out:\n" + "\n".join(twins)
        raise BatchError(msg)
    if (place / "config.yaml").exists():
        msg = f"{place} holds a run, not a batch; choose another output_dir"
        raise BatchError(msg)


def rules_of(ledger: Ledger, entries: Sequence[Entry], config: BatchConfig) -> Rules:
    """Which of the jobs this call runs."""
    none = config.retry == "none"
    left = [e.key for e in entries if none and ledger.state(e) in (FAILED, LOST, REFUSED)]
    before = {entry.key: len(entry.attempts) for entry in entries}
    return Rules(config.attempts, config.backoff, before, tuple(left))


def headline(jobs: int, done: int, limit: int, reason: str) -> str:
    """The first line of a batch.

    Example:
        >>> headline(8, 3, 2, "2 cores")
        'batch of 8 jobs, 3 of them done before; 2 at once (2 cores)'
    """
    text = f"batch of {jobs} job{'' if jobs == 1 else 's'}"
    if done:
        text += f", {done if done < jobs else 'all'} of them done before"
    if 1 < limit < MANY and done < jobs:
        text += f"; {limit} at once" + (f" ({reason})" if reason else "")
    return text


def warn_of_skew(ledger: Ledger) -> None:
    """Say when this machine and the file system disagree about the time; nothing relies on it."""
    skew = time.time() - ledger.now()
    if abs(skew) > SKEW_SECONDS:
        say(
            f"warning: the clocks of this machine and of the file system of {ledger.place} differ "
            f"by {abs(skew):.0f} s: times shown are off by as much; nothing else depends on them"
        )


def read_states(place: Path) -> dict[int, str]:
    """Number -> state of all jobs in a batch's folder; empty where it holds no batch."""
    if not (place / "ledger").is_dir():
        return {}
    ledger = Ledger(place)
    return {entry.number: ledger.state(entry) for entry in ledger.all()}


def _environment() -> dict[str, str]:
    """What a worker needs of the environment of this process."""
    kept = ("TL_PARENT_RUN", "CUDA_VISIBLE_DEVICES", "TL_CORES")
    return {name: os.environ[name] for name in kept if name in os.environ}


@contextmanager
def _alarm(deadline: float | None) -> Iterator[None]:
    """Interrupt this process when the budget is spent, as SIGTERM would."""
    if deadline is None:
        yield
        return
    seconds = max(deadline - time.monotonic(), 0.0)
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def leading(place: Path) -> Iterator[bool]:
    """Whether this is the one call of a batch that keeps the MLflow run above its jobs."""
    lock = Ledger(place).lead()
    try:
        yield lock is not None
    finally:
        if lock is not None:
            lock.release()
