"""What the Slurm engine runs on the nodes: a worker, or a process of a job that has several."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from tl import ranks
from tl.batches.jobs import RUNNING
from tl.batches.ledger import Ledger
from tl.batches.worker import Task, resolve, work

LOOK_SECONDS = 0.2


def run(task: Task, tries: int, folder: Path) -> int:
    """Do a task; the other processes of this job of Slurm take part in what the first one runs.

    Args:
        task: With one job.
        tries: Failures of it that are allowed before this job of Slurm ends: the next attempt may
            ask Slurm for more. Where Slurm itself starts the job again, one more.
        folder: Where the processes leave word for each other.

    Returns:
        How many jobs this process ran.
    """
    tries += _number(os.environ, "SLURM_RESTART_COUNT")
    rules = replace(task.rules, attempts=min(task.rules.attempts, tries))
    task, name, place = replace(task, rules=rules), worker_name(os.environ), ranks.place()
    over = folder / f"{name}.over"
    if place.rank > 0:
        return _take_part(task, name, over)
    try:
        return work(task, name)
    finally:
        if place.world > 1:
            over.touch()


def worker_name(variables: Mapping[str, str]) -> str:
    """How the ledger calls the worker of a job of Slurm: one name for all of its processes.

    Example:
        >>> worker_name({"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "1"})
        'slurm-12-1'
    """
    again = _number(variables, "SLURM_RESTART_COUNT")
    return f"slurm-{variables.get('SLURM_JOB_ID', '')}" + (f"-{again}" if again else "")


def _number(variables: Mapping[str, str], name: str) -> int:
    value = variables.get(name, "")
    return int(value) if value.isdigit() else 0


def _take_part(task: Task, name: str, over: Path) -> int:
    """Wait until the first process runs the job, and run it with it; the ledger is its business."""
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
