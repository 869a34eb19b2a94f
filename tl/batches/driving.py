"""The call of a batch: it starts workers, watches the ledger, and ends when all is said."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from tl.batches.engines import Engine
from tl.batches.errors import EngineError, FullError
from tl.batches.jobs import DONE, LOST, RUNNING, Entry
from tl.batches.ledger import Ledger
from tl.batches.worker import Task, run_job
from tl.config import Interrupted

TICK_SECONDS = 0.5
LOST_SECONDS = 5.0  # a worker that lives says better why its job died
SILENT_SECONDS = 60.0  # and an engine where both are gone: it may not know yet that they are
HERE = "this process"
INTERRUPTED_CODE = 130
IDLE_DEATHS = 3  # workers that ended in a row without having begun a job


@dataclass(frozen=True)
class View:
    """What a job is doing at a moment.

    Args:
        entry: As last written.
        state: What is true now.
        queued: Its worker waits in a queue.
        open: It runs, or will run in this call.
    """

    entry: Entry
    state: str
    queued: bool = False
    open: bool = False


@dataclass
class Call:
    """One call of a batch.

    Args:
        ledger: Of the batch.
        task: What workers are to do.
        limit: Workers at once.
        deadline: On `time.monotonic`, when the budget is spent; None: never.
        watch: Receives all jobs after each look.
    """

    ledger: Ledger
    task: Task
    limit: int
    deadline: float | None = None
    watch: Callable[[Sequence[View]], None] = lambda _views: None
    stopped: str = ""
    _lost_since: dict[str, float] = field(default_factory=dict)

    def run(self, engine: Engine | None) -> list[View]:
        """Run the jobs until none is left that this call would run.

        Args:
            engine: Starts the workers; None: this process is the worker.

        Returns:
            What became of each; `stopped` says why those that are still open were not run.

        Raises:
            EngineError: The engine cannot start workers.
        """
        if engine is None:
            return self._run_here()
        crew = _Crew(engine, self.task, self.limit)
        try:
            while (views := self._round(crew)) is None:
                pass
        except EngineError:
            self._stop("the engine failed")
            raise
        finally:
            crew.close()
        return views

    def _round(self, crew: _Crew) -> list[View] | None:
        """Look, start what can be started, wait a little; the outcome where all is said."""
        try:
            views = self.look(crew)
            self.watch(views)
            if self.stopped:
                crew.dismiss()
                # What another call runs goes on without this one.
                if not crew.alive:
                    return views
            elif not any(view.open for view in views):
                return views
            else:
                crew.top_up(views)
            if self.deadline is not None and time.monotonic() > self.deadline:
                self._stop("the budget is spent")
            time.sleep(TICK_SECONDS)
        except Interrupted:
            self._stop("interrupted")
        return None

    def look(self, crew: _Crew | None = None) -> list[View]:
        """All jobs of this call now."""
        views = []
        if crew is not None:
            crew.look()
        for key in self.task.rules.before:
            entry = self.ledger.read(key)
            if entry is None:
                continue
            state = self.ledger.state(entry)
            if state == LOST and entry.state == RUNNING:
                entry = self._settled(entry, crew)
                state = self.ledger.state(entry)
            else:
                self._lost_since.pop(key, None)
            lost = state == LOST and entry.state == RUNNING  # a moment ago
            to_run = self.task.rules.may_run(entry, state)
            queued = crew is not None and crew.queued(key)
            views.append(View(entry, state, queued, to_run or lost or state == RUNNING))
        return sorted(views, key=lambda view: view.entry.number)

    def _settled(self, entry: Entry, crew: _Crew | None) -> Entry:
        """Write down a loss that no worker has written down, and what the engine knows of it."""
        why = crew.why(entry.key) if crew is not None else ""
        waits = crew is not None and not why and crew.has(entry.key)
        since = self._lost_since.setdefault(entry.key, time.monotonic())
        if time.monotonic() - since < (SILENT_SECONDS if waits else LOST_SECONDS):
            return entry
        del self._lost_since[entry.key]
        last = entry.attempts[-1]
        reason = why or f"its process {last.pid} on {last.host} is gone"
        pause = self.task.rules.pause(1 + self.task.rules.failures(entry))
        return self.ledger.settle(entry.key, reason, pause) or entry

    def _stop(self, reason: str) -> None:
        if not self.stopped:
            self.stopped = reason
            self.ledger.stop(self.task.session, reason)

    def _run_here(self) -> list[View]:
        """One job after the other in this process."""
        try:
            for entry in self._turns():
                lock = self.ledger.lock(entry.key)
                if lock is None:
                    continue
                try:
                    if run_job(self.ledger, self.task, entry, HERE) == INTERRUPTED_CODE:
                        raise Interrupted
                finally:
                    self.ledger.free(entry.key, lock)
        except Interrupted:
            late = self.deadline is not None and time.monotonic() > self.deadline
            self.stopped = "the budget is spent" if late else "interrupted"
        views = self.look()
        return [replace(view, open=view.open and view.state != DONE) for view in views]

    def _turns(self) -> Iterator[Entry]:
        """The next job to run, as long as there is one; waits out back-offs and other processes."""
        while True:
            views = self.look()
            self.watch(views)
            rules = self.task.rules
            ready = [v.entry for v in views if rules.may_run(v.entry, v.state)]
            now = [entry for entry in ready if not rules.wait(entry)]
            if now:
                yield now[0]
            elif any(view.open for view in views):
                time.sleep(TICK_SECONDS)
            else:
                return
            if self.deadline is not None and time.monotonic() > self.deadline:
                raise Interrupted


class _Crew:
    """The workers of a call."""

    def __init__(self, engine: Engine, task: Task, limit: int) -> None:
        self.engine, self.task, self.limit = engine, task, limit
        self.alive: list[tuple[Any, str | None]] = []  # handle, key of its one job
        self._tries: dict[str | None, int] = {}  # key -> attempts when its worker was started
        self._idle: dict[str | None, int] = {}
        self._ended: dict[str | None, Any] = {}  # key -> handle of its last worker that ended
        self._begun = -1

    def look(self) -> None:
        """Forget the workers that ended."""
        for handle, key in list(self.alive):
            if not self.engine.alive(handle):
                self.alive.remove((handle, key))
                self._idle[key] = self._idle.get(key, 0) + 1
                self._ended[key] = handle

    def has(self, key: str) -> bool:
        """Whether a job has a worker of its own, as far as the engine knows."""
        return any(key == of for _, of in self.alive)

    def why(self, key: str) -> str:
        """Why the worker of a job ended, or was interrupted; empty where that is not known."""
        handle = next((h for h, of in self.alive if of == key), self._ended.get(key))
        return "" if handle is None else self.engine.why(handle)

    def queued(self, key: str) -> bool:
        """Whether the worker of a job waits in a queue."""
        return any(key == of and self.engine.waits(handle) for handle, of in self.alive)

    def top_up(self, views: Sequence[View]) -> None:
        """Start workers for what is to be run.

        Raises:
            EngineError: Workers end without having begun a job.
        """
        rules = self.task.rules
        ready = [v for v in views if rules.may_run(v.entry, v.state) and not rules.wait(v.entry)]
        if self.engine.per_job:
            self._one_each(ready)
            return
        begun = sum(len(view.entry.attempts) for view in views)
        if begun != self._begun:
            self._begun, self._idle = begun, {}
        self._check(None)
        mine = sum(view.state == RUNNING for view in views)
        for _ in range(min(self.limit, mine + len(ready)) - len(self.alive)):
            self.alive.append((self.engine.start(self.task), None))

    def _one_each(self, ready: Sequence[View]) -> None:
        with_worker = {key for _, key in self.alive}
        for view in ready:
            key, tries = view.entry.key, len(view.entry.attempts)
            if key in with_worker or len(self.alive) >= self.limit:
                continue
            if view.entry.state == RUNNING:  # lost: first it is written down why
                continue
            if self._tries.get(key) != tries:
                self._idle.pop(key, None)
            self._check(key)
            try:
                handle = self.engine.start(replace(self.task, keys=(key,)))
            except FullError:
                if not self.alive:
                    raise
                return
            self._tries[key] = tries
            self.alive.append((handle, key))

    def _check(self, key: str | None) -> None:
        """Give up where workers end and no job begins."""
        if self._idle.get(key, 0) < IDLE_DEATHS:
            return
        said = self.engine.said(self._ended[key])
        msg = f"{IDLE_DEATHS} workers ended without beginning a job" + (
            f":\n{said}" if said else ""
        )
        raise EngineError(msg)

    def dismiss(self) -> None:
        """Take back what still waits in a queue."""
        for handle, _ in self.alive:
            if self.engine.waits(handle):
                with suppress(EngineError):
                    self.engine.kill(handle)

    def close(self) -> None:
        """Ask the workers that are left to end, and let the engine go."""
        for handle, _ in self.alive:
            with suppress(EngineError):
                self.engine.kill(handle)
        self.engine.close()
