"""A worker: a process that an engine starts somewhere, and that runs jobs of a batch.

It imports what jobs need once, and forks a process for each job: that one is the job's own, and
begins without a second of imports. A job that is killed costs that job alone.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tl.batches.jobs import DONE, FAILED, INTERRUPTED, LOST, REFUSED, Entry, Rules
from tl.batches.ledger import BEAT_SECONDS, Ledger
from tl.batches.resources import Slots, take_slot
from tl.locks import Lock

LOOK_SECONDS = 0.2  # between two looks at the child and at the request to stop
GRACE_SECONDS = 120.0  # for a job to write its checkpoint
TAKEN = 75  # exit code of a child whose job another process has taken
STATES = {0: DONE, 2: REFUSED, 130: INTERRUPTED}


@dataclass(frozen=True)
class Task:
    """What a worker is to do; travels to other machines.

    Args:
        place: Folder of the batch.
        session: Of the call that starts the worker.
        rules: Which jobs, and how often each.
        target: "module:function" of the job: takes settings (YAML) and folder, gives an exit code
            and the first line of what went wrong.
        load: "module:function" that imports what jobs need.
        keys: Only these jobs; None: all of the rules.
        stay: Wait for jobs in back-off instead of ending.
        slots: Shares of this machine, one of which each job takes; None: the engine shares out.
        environment: Variables of the worker.
    """

    place: Path
    session: str
    rules: Rules
    target: str
    load: str
    keys: tuple[str, ...] | None = None
    stay: bool = False
    slots: Slots | None = None
    environment: dict[str, str] = field(default_factory=dict)


def work(task: Task, name: str | None = None) -> int:
    """Run jobs until none is left that could be run now.

    Args:
        task: Which.
        name: Of this worker in the ledger; default: host and process.

    Returns:
        How many jobs it ran.
    """
    os.environ.update(task.environment)
    stopping = _Stopping(task)
    resolve(task.load)()
    ledger, worker = Ledger(task.place), name or f"{platform.node()}-{os.getpid()}"
    ran = 0
    while not stopping.asked():
        entry, wait = _next(ledger, task)
        if entry is None:
            if wait is None or not task.stay:
                break
            time.sleep(min(max(wait, LOOK_SECONDS), 1.0))
            continue
        with _slot(task) as free:
            if not free:
                time.sleep(LOOK_SECONDS)
                continue
            ran += _run(ledger, task, entry, worker, stopping)
    return ran


def resolve(name: str) -> Callable[..., Any]:
    """The function that "module:function" names."""
    module, _, function = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


class _Stopping:
    """Whether the worker was asked to end: by the call that started it, or by a signal."""

    def __init__(self, task: Task) -> None:
        self.ledger, self.session = Ledger(task.place), task.session
        self.signalled = False
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            with contextlib.suppress(ValueError):  # an engine may run it in a thread
                signal.signal(signum, self._note)

    def _note(self, _signum: int, _frame: object) -> None:
        self.signalled = True

    def asked(self) -> bool:
        return self.signalled or self.ledger.stopped(self.session)


def _next(ledger: Ledger, task: Task) -> tuple[Entry | None, float | None]:
    """A job to run now; else in how many seconds one may be, None where none ever will."""
    keys = task.keys if task.keys is not None else tuple(task.rules.before)
    soonest: float | None = None
    for entry in sorted(filter(None, map(ledger.read, keys)), key=lambda e: e.number):
        if not task.rules.may_run(entry, ledger.state(entry)):
            continue
        wait = task.rules.wait(entry)
        if not wait and not ledger.runs(entry.key):
            return entry, 0.0
        soonest = wait if soonest is None else min(soonest, wait)
    return None, soonest


@contextlib.contextmanager
def _slot(task: Task) -> Iterator[bool]:
    """A share of this machine, for one job; False where other batches have all of it."""
    if task.slots is None:
        yield True
        return
    slot = take_slot(task.slots)
    if slot is None:
        yield False
        return
    try:
        os.environ.update(slot.environment)
        yield True
    finally:
        slot.release()


def _run(ledger: Ledger, task: Task, entry: Entry, worker: str, stopping: _Stopping) -> int:
    """Run one job in a process of its own and write down how it ended."""
    if ledger.state(entry) == LOST:
        ledger.settle(entry.key, "its process is gone", 0.0)
    lock = ledger.lock(entry.key)
    if lock is None:
        return 0
    context: Any = multiprocessing.get_context("fork")
    child = context.Process(target=_job, args=(task, entry.key, worker, lock))
    child.start()
    lock.hand_over()  # the child has it from its first moment
    _wait(child, ledger, entry.key, stopping)
    code = int(child.exitcode)
    child.close()
    if code == TAKEN:
        return 0
    if code < 0 or code not in STATES:
        pause = task.rules.pause(1 + task.rules.failures(ledger.read(entry.key) or entry))
        _settle(ledger, entry.key, _death(code), pause)
    return 1


def _wait(child: Any, ledger: Ledger, key: str, stopping: _Stopping) -> None:
    """Wait for a job; hand on the request to stop, and insist after a while."""
    asked: float | None = None
    beaten = time.monotonic()
    while child.exitcode is None:
        child.join(LOOK_SECONDS)
        now = time.monotonic()
        if now - beaten > BEAT_SECONDS:
            ledger.beat(key)
            beaten = now
        if asked is None and stopping.asked():
            asked = now
            child.terminate()
        elif asked is not None and now - asked > GRACE_SECONDS:
            child.kill()


def _settle(ledger: Ledger, key: str, reason: str, backoff: float) -> None:
    """Write down the loss of a job; its loader processes may hold the lock for some seconds yet."""
    deadline = time.monotonic() + BEAT_SECONDS
    while ledger.settle(key, reason, backoff) is None and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)


def _death(code: int) -> str:
    """What the exit code of a process that said nothing tells."""
    if code == -signal.SIGKILL:
        return "killed by signal 9 (SIGKILL): out of memory, or killed by hand"
    if code < 0:
        return f"killed by signal {-code} ({signal.Signals(-code).name})"
    return f"its process ended with code {code} and without a word"


def _job(task: Task, key: str, worker: str, lock: Lock) -> None:
    """The job's own process."""
    ledger = Ledger(task.place)
    lock.take_over()
    entry = ledger.read(key)
    if entry is None or not task.rules.may_run(entry, entry.state):
        ledger.free(key, lock)
        sys.exit(TAKEN)
    _write_to(ledger.log(entry))
    code = run_job(ledger, task, entry, worker)
    ledger.free(key, lock)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if code in STATES else 1)  # threads of libraries must not keep it


def run_job(ledger: Ledger, task: Task, entry: Entry, worker: str) -> int:
    """Run a job in this process, which holds its lock; returns its exit code."""
    entry = ledger.begin(entry, worker, platform.node())
    code, error = resolve(task.target)(entry.settings, ledger.job_folder(entry))
    state = STATES.get(code, FAILED)
    pause = task.rules.pause(1 + task.rules.failures(entry)) if state == FAILED else 0.0
    ledger.end(entry, state, error, pause)
    return int(code)


def _write_to(log: Path) -> None:
    """Let all that this process and its children print go to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
