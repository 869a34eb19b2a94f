"""A job of several processes that an engine starts: the first one is a worker, the others help."""

from __future__ import annotations

import os
import time
from pathlib import Path

from tl.batches.jobs import RUNNING
from tl.batches.ledger import Ledger
from tl.batches.worker import Task, resolve

LOOK_SECONDS = 0.2


def take_part(task: Task, name: str, over: Path) -> int:
    """Wait until the first process runs the job, and run it with it; the ledger is its business.

    Args:
        task: With one job.
        name: Of the first process as a worker.
        over: A file that is there when it runs no more jobs.

    Returns:
        How many jobs this process ran.
    """
    os.environ.update(task.environment)
    resolve(task.load)()
    ledger, (key,) = Ledger(task.place), task.keys or ("",)
    while not over.exists():
        entry = ledger.read(key)
        if entry is not None and entry.state == RUNNING and entry.attempts[-1].worker == name:
            resolve(task.target)(entry.settings, ledger.job_folder(entry))
            return 1
        time.sleep(LOOK_SECONDS)
    return 0
