"""The ledger of a batch: what each of its jobs is doing, in files that any machine can read.

One JSON file a job, named by the hash of the job's settings, and beside it a lock that the job's
process holds while it runs: the kernel frees it however the process ends. Nothing compares the
clocks of two machines.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tl.batches.errors import BatchError
from tl.batches.jobs import DONE, LOST, RUNNING, WAITING, WRONG, Attempt, Entry, Job
from tl.config import to_yaml
from tl.files import replacing
from tl.locks import Lock, take

LEDGER = "ledger"
LOGS = "logs"
BEAT_SECONDS = 10.0  # between two signs of life where a file system has no locks
DEAD_SECONDS = 60.0
PROBES = 5  # others look whether a lock is held by taking it for a moment


class Ledger:
    """The ledger in a batch's folder.

    Args:
        place: The folder.

    Raises:
        BatchError: It cannot be written.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self.folder = place / LEDGER
        self._read: dict[str, tuple[tuple[int, int], Entry]] = {}  # file that it was read from
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (place / LOGS).mkdir(exist_ok=True)
        except OSError as error:
            msg = f"cannot make {error.filename or place}: {error.strerror}; choose another with "
            raise BatchError(f"{msg}output_dir=") from error

    # --- jobs -----------------------------------------------------------------------------------

    def add(self, jobs: Sequence[Job], *, anew: bool = False) -> list[Entry]:
        """Entries of jobs, new ones where they are not known yet.

        A job that another process adds meanwhile is added once. New ones get their own number as
        long as no other job has it, else the next free one.

        Args:
            jobs: Of a call.
            anew: What ended before begins again, in a new folder.
        """
        with self.changing():
            used = {entry.number for entry in self.all()} | _numbered(self.place)
            return [self._added(job, used, anew=anew) for job in jobs]

    def _added(self, job: Job, used: set[int], *, anew: bool) -> Entry:
        known = self.read(job.key)
        if known is not None:
            state = self.state(known)
            gone = state == DONE and not self.job_folder(known).is_dir()
            if state in (RUNNING, WAITING) or not (anew or gone):
                return known
        number = job.number if job.number not in used else max(used) + 1
        used.add(number)
        entry = Entry(
            job.key,
            number,
            job.overrides,
            to_yaml(job.settings),
            attempts=known.attempts if known else (),
        )
        self.write(entry)
        return entry

    def all(self) -> list[Entry]:
        """All jobs that were ever in this batch, by number."""
        keys = (path.stem for path in self.folder.glob("*.json"))
        return sorted(filter(None, map(self.read, keys)), key=lambda entry: entry.number)

    def read(self, key: str) -> Entry | None:
        """What is known of a job.

        Raises:
            BatchError: Its file is damaged.
        """
        path = self.folder / f"{key}.json"
        try:
            found = path.stat()
            version = (found.st_ino, found.st_mtime_ns)
            known = self._read.get(key)
            if known is None or known[0] != version:
                known = self._read[key] = (version, _entry(path.read_text(encoding="utf-8")))
            return known[1]
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            msg = f"{path} is no entry of this version of tl ({error}); move it away"
            raise BatchError(msg) from error

    def write(self, entry: Entry) -> None:
        """Write an entry in one move; only who holds the job's lock, or adds it, may do so."""
        with replacing(self.folder / f"{entry.key}.json") as part:
            part.write_text(json.dumps(asdict(entry), indent=1) + "\n", encoding="utf-8")

    def job_folder(self, entry: Entry) -> Path:
        """Folder of the job's run."""
        return self.place / str(entry.number)

    def log(self, entry: Entry) -> Path:
        """What the job printed."""
        return self.place / LOGS / f"{entry.number}.txt"

    # --- who runs what --------------------------------------------------------------------------

    def lock(self, key: str) -> Lock | None:
        """Take the lock of a job; None where another process runs it.

        Raises:
            BatchError: The ledger cannot be written.
        """
        known = (self.folder / f"{key}.lock").exists()
        for probe in range(PROBES):
            try:
                lock = self._take(f"{key}.lock")
            except BlockingIOError:
                time.sleep(0.02 * probe)  # somebody may only be looking
                continue
            if lock.held or not known or not self._beats(key):
                lock.sign()
                lock.touch()
                return lock
            lock.release()
            return None
        return None

    def free(self, key: str, lock: Lock) -> None:
        """Give the lock of a job back."""
        if not lock.held:  # no locks here: what counts is the time of the file
            with contextlib.suppress(OSError):
                os.utime(self.folder / f"{key}.lock", (0, 0))
        lock.release()

    def runs(self, key: str) -> bool:
        """Whether a living process runs a job."""
        path = self.folder / f"{key}.lock"
        if not path.exists():
            return False
        try:
            lock = self._take(path.name, shared=True)
        except BlockingIOError:
            return True
        held = lock.held
        lock.release()
        return not held and self._beats(key)

    def state(self, entry: Entry) -> str:
        """What a job is doing: `lost` where its process went without a word."""
        if entry.state != RUNNING:
            return entry.state
        return RUNNING if self.runs(entry.key) else LOST

    def beat(self, key: str) -> None:
        """Give a sign of life for a job, for file systems without locks."""
        with contextlib.suppress(OSError):
            os.utime(self.folder / f"{key}.lock")

    def _beats(self, key: str) -> bool:
        """Whether there was a sign of life of late, by the clock of the file system alone."""
        with contextlib.suppress(OSError):
            return self.now() - (self.folder / f"{key}.lock").stat().st_mtime < DEAD_SECONDS
        return False

    def now(self) -> float:
        """Seconds since 1970 by the clock of the file system."""
        probe = self.folder / f"clock-{os.getpid()}"
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink(missing_ok=True)
        return now

    def settle(self, key: str, reason: str, backoff: float) -> Entry | None:
        """Write down that a job is lost, unless its process did say how it ended, or lives.

        Args:
            key: Of the job.
            reason: First line for people.
            backoff: Seconds before it may be tried again.
        """
        lock = self.lock(key)
        if lock is None:
            return None
        try:
            entry = self.read(key)
            if entry is None or entry.state != RUNNING:
                return entry
            return self.end(entry, LOST, reason, backoff)
        finally:
            self.free(key, lock)

    def begin(self, entry: Entry, worker: str, host: str) -> Entry:
        """Write down that this process runs a job; it holds the job's lock."""
        attempt = Attempt(worker, host, os.getpid(), time.time())
        entry = replace(entry, state=RUNNING, attempts=(*entry.attempts, attempt))
        self.write(entry)
        return entry

    def end(self, entry: Entry, state: str, error: str = "", backoff: float = 0.0) -> Entry:
        """Write down how the last attempt at a job ended; the job's lock is held."""
        *before, last = entry.attempts
        last = replace(last, ended=time.time(), state=state, error=error)
        retry_at = time.time() + backoff if state in WRONG else 0.0
        entry = replace(entry, state=state, attempts=(*before, last), retry_at=retry_at)
        self.write(entry)
        return entry

    # --- the call -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Alone add jobs."""
        lock = self._take("ledger.lock", wait=True)
        try:
            yield
        finally:
            lock.release()

    def lead(self) -> Lock | None:
        """Become the one call that keeps the MLflow run above the jobs; None where another is."""
        try:
            return self._take("leader.lock")
        except BlockingIOError:
            return None

    def stop(self, session: str, reason: str) -> None:
        """Ask all workers of a call to end: what they run is checkpointed."""
        with replacing(self.folder / f"stop-{session}") as part:
            part.write_text(reason, encoding="utf-8")

    def stopped(self, session: str) -> bool:
        """Whether a call was asked to end."""
        return (self.folder / f"stop-{session}").exists()

    def forget(self, session: str) -> None:
        """Remove the request to end."""
        (self.folder / f"stop-{session}").unlink(missing_ok=True)

    def _take(self, name: str, *, shared: bool = False, wait: bool = False) -> Lock:
        try:
            return take(self.folder / name, shared=shared, wait=wait)
        except BlockingIOError:
            raise
        except OSError as error:
            msg = f"cannot write {self.folder / name}: {error.strerror}"
            raise BatchError(msg) from error


def _entry(text: str) -> Entry:
    values: dict[str, Any] = json.loads(text)
    attempts = tuple(Attempt(**attempt) for attempt in values.pop("attempts"))
    overrides = tuple(values.pop("overrides"))
    return Entry(**values, attempts=attempts, overrides=overrides)


def _numbered(place: Path) -> set[int]:
    """Numbers of folders that hold something, whoever made them."""
    return {
        int(path.name)
        for path in place.iterdir()
        if re.fullmatch(r"\d+", path.name) and path.is_dir() and any(path.iterdir())
    }
