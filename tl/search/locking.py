"""Who may change a study now, and who leads its search: locks that die with their holder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from tl.locks import Lock, take


class Locks(Protocol):
    """Locks by name that all workers of a study share."""

    def exclusive(self, name: str) -> Any:
        """Context in which nobody else holds the lock of that name; waits for it."""

    def attempt(self, name: str) -> Any:
        """A held lock with `release()`, or None where somebody else holds it."""


class FileLocks:
    """Locks on files of the search's folder; the kernel frees those of a process that dies.

    Args:
        folder: Made where it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def exclusive(self, name: str) -> Iterator[None]:
        """See `Locks`."""
        lock = take(self.folder / f"{name}.lock", wait=True)
        try:
            yield
        finally:
            lock.release()

    def attempt(self, name: str) -> Lock | None:
        """See `Locks`; says in the file who holds it."""
        try:
            lock = take(self.folder / f"{name}.lock")
        except BlockingIOError:
            return None
        lock.sign()
        return lock


class PostgresLocks:
    """Advisory locks of a PostgreSQL server; they end with the connection of their holder.

    Args:
        engine: Of SQLAlchemy.
        study: Name of the study.
    """

    def __init__(self, engine: Any, study: str) -> None:
        self.engine, self.study = engine, study

    @contextmanager
    def exclusive(self, name: str) -> Iterator[None]:
        """See `Locks`."""
        held = _Session(self.engine, self._key(name))
        held.run("SELECT pg_advisory_lock(:key)")
        try:
            yield
        finally:
            held.release()

    def attempt(self, name: str) -> _Session | None:
        """See `Locks`."""
        held = _Session(self.engine, self._key(name))
        if held.run("SELECT pg_try_advisory_lock(:key)"):
            return held
        held.connection.close()
        return None

    def _key(self, name: str) -> int:
        digest = hashlib.sha256(f"tl search {self.study} {name}".encode()).digest()
        return int.from_bytes(digest[:8], "big", signed=True)


class _Session:
    """A connection that holds a lock.

    Each statement ends its transaction: a leader holds a lock for hours, and an open transaction
    would keep the server from cleaning up.
    """

    def __init__(self, engine: Any, key: int) -> None:
        self.key = key
        self.connection = engine.connect().execution_options(isolation_level="AUTOCOMMIT")

    def run(self, statement: str) -> Any:
        from sqlalchemy import text

        return self.connection.execute(text(statement), {"key": self.key}).scalar()

    def release(self) -> None:
        """Give it back; a connection that is lost has done so."""
        with suppress(Exception):
            self.run("SELECT pg_advisory_unlock(:key)")
        with suppress(Exception):
            self.connection.close()


class JournalLock:
    """Lock of a journal file that the kernel frees; mends a line that a killed writer left open.

    Args:
        file: The journal.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._lock: Lock | None = None

    def acquire(self) -> bool:
        """Wait for the lock."""
        self._lock = take(self.file.with_suffix(".lock"), wait=True)
        _mend(self.file)
        return True

    def release(self) -> None:
        """Give it back."""
        if self._lock is not None:
            self._lock.release()


def _mend(file: Path) -> None:
    """Cut a last line without end: its writer died within it."""
    with file.open("rb+") as journal:
        end = journal.seek(0, 2)
        if not end:
            return
        journal.seek(end - 1)
        if journal.read(1) == b"\n":
            return
        journal.seek(0)
        journal.truncate(journal.read().rfind(b"\n") + 1)
