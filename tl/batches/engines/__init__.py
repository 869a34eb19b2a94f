"""Engines: what starts the workers of a batch, here or on other machines.

An engine starts a worker and says whether it is still there. What the jobs do is in the ledger.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from tl.batches.errors import BatchError
from tl.batches.worker import Task

ENGINES = ("local", "slurm", "ray")


class Engine(Protocol):
    """Starts workers.

    Attributes:
        per_job: Whether each worker gets one job; else each takes whatever is to be done.
    """

    per_job: bool

    def start(self, task: Task) -> Any:
        """Start a worker, or put it into a queue; returns a handle.

        Raises:
            FullError: There must be fewer first.
            EngineError: That cannot be done now.
        """

    def alive(self, handle: Any) -> bool:
        """Whether a worker waits in a queue, begins, or runs."""

    def waits(self, handle: Any) -> bool:
        """Whether it waits in a queue."""

    def said(self, handle: Any) -> str:
        """What a worker that ended printed last, for people; empty where that is not known."""

    def why(self, handle: Any) -> str:
        """Why a worker was ended from outside, in one line; empty where that is not known."""

    def kill(self, handle: Any) -> None:
        """Ask a worker to end, or take it out of the queue."""

    def close(self) -> None:
        """Give back what the engine holds; workers are gone by then."""


def make_engine(name: str, settings: Mapping[str, Any], place: Path) -> Engine:
    """The engine of a launcher.

    Args:
        name: `local`, `slurm` or `ray`.
        settings: Of the launcher's preset.
        place: Folder of the batch.

    Raises:
        BatchError: A package is missing, or there is no cluster; says what to do.
    """
    try:
        if name == "local":
            from tl.batches.engines.local import LocalEngine

            return LocalEngine(place, **settings)
        if name == "slurm":
            from tl.batches.engines.slurm import SlurmEngine

            return SlurmEngine(place, **settings)
        if name == "ray":
            from tl.batches.engines.ray import RayEngine

            return RayEngine(place, **settings)
    except ModuleNotFoundError as error:
        if error.name not in {"submitit", "ray"}:
            raise
        extra = "ray" if error.name == "ray" else "slurm"
        msg = f'hydra/launcher={name} needs {error.name}: pip install "tl[{extra}]"'
        raise BatchError(msg) from error
    msg = f"no engine {name}; there are {', '.join(ENGINES)}"
    raise BatchError(msg)
