"""What the Slurm engine runs on the nodes: a worker, or a process of a job that has several."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from tl import ranks
from tl.batches.engines.together import take_part
from tl.batches.worker import Task, work


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
        return take_part(task, name, over)
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
