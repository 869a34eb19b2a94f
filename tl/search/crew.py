"""Further processes of this machine that try settings: started, watched, and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import IO

from tl import display
from tl.cores import SHARE, usable_cores
from tl.search.errors import TrialsError
from tl.search.setup import Workplace
from tl.search.shown import Lines
from tl.search.team import STORAGE, Team
from tl.search.trying import check

MODULE = "tl.search.worker"
STOP_SECONDS = 20.0
MOST_STARTS = 3  # of one worker in a row, without a trial that came to an end
POLL_SECONDS = 0.5


@dataclass
class _Worker:
    """One process, and what it says in a file."""

    number: int
    process: subprocess.Popen[bytes] | None = None
    log: IO[bytes] | None = None
    starts: int = 0
    done: int = field(default=0)


def work(team: Team, place: Workplace, lines: Lines) -> None:
    """Let `search.workers` processes try settings until all are given out.

    Raises:
        TrialsError: They die, one after the other.
        Interrupted: Ctrl-C or SIGTERM: they are stopped, too.
    """
    number = min(team.asked.search.workers, team.asked.search.trials)
    workers = [_Worker(n) for n in range(1, number + 1)]
    display.say(f"{number} workers, each with {_share(number)} cores: {team.folder.path}/workers")
    with _stopped_at_the_end(workers):
        while True:
            done = place.trials.done()
            lines.news(done)
            check(done)
            if len(done) >= team.asked.search.trials:
                return
            place.trials.reap()
            left = len(place.trials.all()) < team.asked.search.trials
            for worker in workers:
                _keep(worker, team, number, len(done), needed=left)
            if left and all(w.process is None for w in workers):
                raise TrialsError(
                    f"the workers died {MOST_STARTS} times in a row; {team.folder.path}/workers "
                    "has what they said last"
                )
            time.sleep(POLL_SECONDS)


def _share(workers: int) -> int:
    return max(1, usable_cores() // workers)


def _keep(worker: _Worker, team: Team, workers: int, done: int, *, needed: bool) -> None:
    """Start a worker that is not there, unless it died again and again or is not needed."""
    if worker.process is not None:
        code = worker.process.poll()
        if code is None:
            return
        worker.process = None
        if code:
            ended = f"signal {-code}" if code < 0 else f"code {code}"
            display.say(f"worker {worker.number} ended by {ended}")
    if done > worker.done:
        worker.starts, worker.done = 0, done
    if needed and worker.starts < MOST_STARTS:
        worker.starts += 1
        _start(worker, team, workers)


def _start(worker: _Worker, team: Team, workers: int) -> None:
    folder = team.folder.path / "workers"
    folder.mkdir(parents=True, exist_ok=True)
    share = str(_share(workers))
    env = {
        **os.environ,
        SHARE: share,
        "OMP_NUM_THREADS": share,
        STORAGE: team.asked.search.storage,
        **_device(worker.number),
    }
    with (folder / f"{worker.number}.log").open("ab") as log:
        worker.process = subprocess.Popen(
            [sys.executable, "-m", MODULE, str(team.folder.path)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,  # Ctrl-C is ours to hand on
        )


def _device(number: int) -> dict[str, str]:
    """The GPU of a worker, in turn, where there are several."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]
    return {"CUDA_VISIBLE_DEVICES": names[(number - 1) % len(names)]} if len(names) > 1 else {}


@contextmanager
def _stopped_at_the_end(workers: list[_Worker]) -> Iterator[None]:
    try:
        yield
    finally:
        alive = [w.process for w in workers if w.process is not None and w.process.poll() is None]
        for process in alive:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        for process in alive:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
