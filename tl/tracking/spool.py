"""What a job has to say to the MLflow store, kept in a file of the run's folder until it is taken.

`RUN/spool/` holds `records.jsonl` (one record a line, only ever appended to), `taken.jsonl` (its
last line says how far the store has them), `refused.jsonl` (what the store will never take, and
why), `files/` (copies of files from elsewhere) and `lock`, which the process that sends them holds.
The folder is gone when the store has everything.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tl.config import RequestError, TlError
from tl.files import replacing
from tl.locks import Lock, holder, take

FOLDER = "spool"
RECORDS, TAKEN, REFUSED, FILES, LOCK = (
    *("records.jsonl", "taken.jsonl", "refused.jsonl", "files", "lock"),
)
READ_BYTES = 1 << 20  # of records that are read at once
LOOK_SECONDS = 0.5  # that somebody may hold the lock who only asks whether it is held
STATE_BYTES = 1 << 16  # of `taken.jsonl`, before it is written anew


class SpoolError(TlError):
    """The records of a run cannot be kept or read."""


class BusyError(SpoolError, RequestError):
    """Another process sends the records of this run."""

    def __init__(self, folder: Path) -> None:
        self.owner = holder(folder / LOCK)
        super().__init__(
            f"{folder.parent} is in use by another process ({self.owner or 'unknown'}); "
            "wait for it to end"
        )


@dataclass
class Taken:
    """How far the store has the records.

    Args:
        offset: Bytes of `records.jsonl` that are settled, but for `later`.
        later: Offsets of records before that which are tried again: files, while their own store
            is away.
        job: Whose records come next.
        runs: Job -> its MLflow run.
        tried: Jobs and models whose creation was tried, so that an answer may have been lost.
    """

    offset: int = 0
    later: list[int] = field(default_factory=list)
    job: str = ""
    runs: dict[str, str] = field(default_factory=dict)
    tried: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Entry:
    """A record with its place in the file; `record` is None where the line is damaged."""

    start: int
    end: int
    record: dict[str, Any] | None
    line: bytes = b""


class Spool:
    """The records of one run, which this process alone adds to and sends.

    A torn last line, left by a process that was killed while it wrote, is cut off. Where the disk
    is full, records are held in memory until it takes them again.

    Args:
        output_dir: Folder of the run.
        make: Make the spool where there is none.

    Raises:
        BusyError: Another process has it.
        SpoolError: It cannot be written.
    """

    def __init__(self, output_dir: Path, *, make: bool = True) -> None:
        self.output_dir = output_dir
        self.folder = output_dir / FOLDER
        self._mutex = threading.RLock()
        self._backlog: list[bytes] = []
        self.added = threading.Event()  # something was appended since it was last cleared
        try:
            if make:
                self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = self._take_lock()
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
            self._file = os.open(self.folder / RECORDS, flags, 0o666)
        except OSError as error:
            raise SpoolError(f"cannot write {self.folder}: {error.strerror}") from error
        self._cut_torn_line()
        self.taken = self._read_taken()

    def _take_lock(self) -> Lock:
        file = self.folder / LOCK
        until = time.monotonic() + LOOK_SECONDS
        while True:
            try:
                lock = take(file)
            except BlockingIOError as error:
                if time.monotonic() > until:
                    raise BusyError(self.folder) from error
                time.sleep(LOOK_SECONDS / 10)
                continue
            if lock.is_on(file):  # else the one before has removed the folder meanwhile
                lock.sign()
                return lock
            lock.release()
            self.folder.mkdir(exist_ok=True)

    @property
    def size(self) -> int:
        """Bytes of the records, those of a forked process included."""
        return os.fstat(self._file).st_size

    def _cut_torn_line(self) -> None:
        size = end = self.size
        while end:
            start = max(0, end - READ_BYTES)
            found = os.pread(self._file, end - start, start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end < size:
            os.ftruncate(self._file, end)

    def _read_taken(self) -> Taken:
        try:
            lines = (self.folder / TAKEN).read_bytes().split(b"\n")
        except FileNotFoundError:
            return Taken()
        for line in reversed(lines[:-1]):  # what follows the last newline is torn
            with suppress(ValueError, TypeError):
                return Taken(**json.loads(line))
        return Taken()

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record: it is in the file when this returns, and so outlives the process."""
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        with self._mutex:
            self._backlog.append(line)
            self._write_backlog()
        self.added.set()

    def _write_backlog(self) -> None:
        data, before = b"".join(self._backlog), self.size
        try:
            done = 0
            while done < len(data):
                done += os.write(self._file, data[done:])
        except OSError:  # a full disk: whole lines or none
            with suppress(OSError):
                os.ftruncate(self._file, before)
            return
        self._backlog.clear()

    def cut(self, size: int) -> None:
        """Take back all that was added since the file had `size` bytes."""
        with self._mutex, suppress(OSError):
            self._backlog.clear()
            os.ftruncate(self._file, size)

    def settle(self) -> None:
        """Bring what was added onto the disk itself, where it outlives the power, too.

        Raises:
            SpoolError: The disk is full, and records are in memory only.
        """
        with self._mutex:
            if self._backlog:
                self._write_backlog()
            if self._backlog:
                msg = f"cannot write {self.folder / RECORDS}: no space left on the disk"
                raise SpoolError(msg)
        with suppress(OSError):
            os.fsync(self._file)

    def read(self, offset: int) -> list[Entry]:
        """Records from `offset` on, about a megabyte of them."""
        entries: list[Entry] = []
        length = READ_BYTES
        while True:
            data = os.pread(self._file, length, offset)
            end = data.rfind(b"\n") + 1
            if end or len(data) < length:
                break
            length *= 2  # one long line
        for line in data[:end].splitlines(keepends=True):
            stop = offset + len(line)
            entries.append(Entry(offset, stop, _parsed(line), line))
            offset = stop
        return entries

    def waiting(self) -> int:
        """How many records the store has not taken."""
        count, offset = len(self.taken.later) + len(self._backlog), self.taken.offset
        while data := os.pread(self._file, READ_BYTES, offset):
            count += data.count(b"\n")
            offset += len(data)
        return count

    @property
    def empty(self) -> bool:
        """Whether the store has taken everything."""
        return self.taken.offset >= self.size and not self.taken.later and not self._backlog

    def note(self) -> None:
        """Write down how far the store has the records."""
        if self._file < 0:
            return  # somebody else may have it by now
        line = json.dumps(asdict(self.taken)).encode() + b"\n"
        file = self.folder / TAKEN
        with suppress(OSError):  # what is sent twice counts once
            if file.exists() and file.stat().st_size > STATE_BYTES:
                with replacing(file) as part:
                    part.write_bytes(line)
                return
            with file.open("ab") as stream:
                stream.write(line)

    def refuse(self, entry: Entry, reason: str) -> None:
        """Keep a record that the store will never take, with the reason."""
        text = entry.line.decode(errors="replace").strip()
        line = {"reason": reason, "record": entry.record or text}
        with (self.folder / REFUSED).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")

    def refused(self) -> list[str]:
        """Why records were refused, one reason a record."""
        try:
            lines = (self.folder / REFUSED).read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []
        found = (_parsed(line.encode()) for line in lines)
        return [str(record.get("reason")) for record in found if record]

    def keep(self, path: Path) -> str:
        """Where a record finds a file or folder later: a copy, if it is not in the run's folder.

        Returns:
            A path relative to the run's folder.
        """
        full, own = path.absolute(), self.output_dir.absolute()
        if full.is_relative_to(own):
            return full.relative_to(own).as_posix()
        place = self.folder / FILES / f"{time.time_ns():x}" / full.name
        place.parent.mkdir(parents=True)
        if full.is_dir():
            shutil.copytree(full, place)
        else:
            shutil.copy2(full, place)
        return place.relative_to(self.output_dir).as_posix()

    def close(self, *, remove: bool = False) -> None:
        """Let others have it; `remove` deletes it, as far as nothing was refused."""
        with self._mutex:
            if self._file < 0:
                return
            os.close(self._file)
            self._file = -1
        if remove:
            kept = (self.folder / REFUSED).exists()
            for name in (RECORDS, TAKEN, *(() if kept else (FILES, LOCK))):
                shutil.rmtree(self.folder / name, ignore_errors=True)
                with suppress(OSError):
                    (self.folder / name).unlink(missing_ok=True)
            with suppress(OSError):
                self.folder.rmdir()
        self._lock.release()


def waits(output_dir: Path) -> bool:
    """Whether the folder of a run holds records that wait."""
    return (output_dir / FOLDER / RECORDS).is_file()


def in_use(output_dir: Path) -> bool:
    """Whether a living process holds the spool of a run, as far as locks can tell."""
    file = output_dir / FOLDER / LOCK
    if not file.exists():
        return False
    try:
        take(file, shared=True).release()
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
