"""Runs above other runs: a batch of jobs has one, whatever process a job runs in."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tl.environment import environment

from .records import read_record
from .store import TrackingError

PARENT = (
    "TL_PARENT_RUN"  # folder of the run above all jobs that this process and its children start
)
GIVEN = "MLFLOW_RUN_ID"
_given: set[str] = set()  # runs that a job of this process has taken


def parent_named() -> dict[str, Any] | None:
    """The run above this job that the environment names, as a spool keeps it.

    That is the one that TL_PARENT_RUN names, or the one that an earlier job of this process took.

    Raises:
        TrackingError: There is no run in that folder.
    """
    folder = os.environ.get(PARENT)
    if not folder:
        given = os.environ.get(GIVEN)
        return {"run_id": given} if given in _given else None
    known = read_record(Path(folder))
    if not known.get("job"):
        msg = f"{PARENT}={folder} names no folder of a run with a run.json; unset it"
        raise TrackingError(msg)
    return {
        "run_id": known.get("run_id"),
        "job": known["job"],
        "folder": str(Path(folder).absolute()),
    }


def await_run(folder: Path, seconds: float = 60.0) -> None:
    """Wait until another process has begun the run of a folder.

    Raises:
        TrackingError: It did not in time.
    """
    deadline = time.monotonic() + seconds
    while not read_record(folder).get("job"):
        if time.monotonic() > deadline:
            msg = f"another process works on {folder}, and its MLflow run did not begin; try again"
            raise TrackingError(msg)
        time.sleep(0.2)


def run_given() -> str | None:
    """Id of the run that was made for this process, as `mlflow run` does, before it began.

    It is for one job: what this process begins afterwards, and what jobs of a batch do in processes
    of their own, is below it.
    """
    given = os.environ.get(GIVEN)
    if not given or given in _given or os.environ.get(PARENT):
        return None
    _given.add(given)
    return given


@contextmanager
def above(output_dir: Path) -> Iterator[None]:
    """Put all jobs that begin meanwhile below the run of a folder, those of other processes too."""
    with environment({PARENT: str(output_dir.absolute())}):
        yield
