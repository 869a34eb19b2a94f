"""Workers on this machine, started by submitit's local executor."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import submitit

from tl.batches.ledger import LEDGER
from tl.batches.worker import Task, work

MINUTES = 60 * 24 * 365  # submitit ends a worker after two by default
LINES = 3


class LocalEngine:
    """Starts workers as processes of this machine.

    Args:
        place: Folder of the batch.
    """

    per_job = False

    def __init__(self, place: Path) -> None:
        self.executor = submitit.LocalExecutor(folder=place / LEDGER / "local")
        self.executor.update_parameters(timeout_min=MINUTES)

    def start(self, task: Task) -> Any:
        """Start a worker; Ctrl-C on the terminal reaches it through the ledger only."""
        with _deaf():
            job = self.executor.submit(work, task)
        job._cancel_at_deletion = False
        return job

    def alive(self, handle: Any) -> bool:
        """Whether its process runs."""
        return not handle.done()

    def waits(self, handle: Any) -> bool:  # noqa: ARG002 - as the protocol has it
        """Never: there is no queue."""
        return False

    def said(self, handle: Any) -> str:
        """The last lines of its log."""
        text = handle.stderr() or handle.stdout() or ""
        return "\n".join(text.strip().splitlines()[-LINES:])

    def why(self, handle: Any) -> str:  # noqa: ARG002 - as the protocol has it
        """Nobody knows."""
        return ""

    def kill(self, handle: Any) -> None:
        """Ask it to end: submitit's process hands the signal on."""
        with suppress(ProcessLookupError):
            handle._process.terminate()

    def close(self) -> None:
        """Nothing is held."""


@contextmanager
def _deaf() -> Iterator[None]:
    """Children that begin meanwhile ignore Ctrl-C: they would not wait for a checkpoint."""
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
