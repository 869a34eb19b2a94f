"""A shelf: the activations of one frozen part under one preprocessing and view."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tl import locks
from tl.cache.errors import CacheError, write_error
from tl.cache.rows import Index, Rows, to_digests
from tl.cache.segments import (
    ENTRY,
    HIDDEN,
    DamagedError,
    Field,
    Segment,
    discard,
    leftovers,
    segments,
    write_text,
)
from tl.cache.writer import Writer

log = logging.getLogger(__name__)

IN_USE, WRITING, FACTS = "in-use", "writing", "shelf.json"
# Where there are no locks, the unfinished segment of a live writer looks like that of a dead one.
LEFT_SECONDS = 24 * 3600.0
TRIES = 100  # to open a shelf that others evict at the same time


class Shelf:
    """One entry of the cache; while it is open nobody evicts it.

    Made by `ActivationCache.shelf`; use it in a `with` statement, or `close` it.

    Args:
        path: Its folder; it need not exist yet.
        key: What the activations depend on, for people.
        fields: The arrays of each image.
        room: Called with (this shelf, bytes yet to come): makes room or raises CacheError.
        segment_bytes: Size of a segment.
    """

    def __init__(
        self,
        path: Path,
        key: Mapping[str, Any],
        fields: Sequence[Field],
        *,
        room: Callable[[Path, int], None],
        segment_bytes: int,
    ) -> None:
        self.path = path
        self.fields = tuple(fields)
        self._key = dict(key)
        self._room = room
        self._segment_bytes = segment_bytes
        self._lock: locks.Lock | None = None
        self._segments: dict[Path, Segment] = {}
        self._damaged: set[Path] = set()
        self._index: Index | None = None
        with contextlib.suppress(OSError):  # `writing` says why, where that matters
            self._open(make=False)
        self._read()

    # --- reading --------------------------------------------------------------------------------

    def present(self, digests: Sequence[str]) -> NDArray[np.bool_]:
        """Which images are there. Segments that hold any of them are verified at the first call."""
        return self.contains(to_digests(digests))

    def contains(self, digests: NDArray[Any]) -> NDArray[np.bool_]:
        """As `present`, of digests as `tl.cache.rows.to_digests` gives them."""
        return self._find(digests)[0] >= 0

    def rows(self, digests: Sequence[str]) -> Rows:
        """The rows of these images, to be read in any order.

        Raises:
            CacheError: Some are not there.
        """
        numbers, rows = self._find(to_digests(digests))
        missing = int((numbers < 0).sum())
        if missing:
            raise CacheError(f"{missing:,} of {len(digests):,} images are not in {self.path}")
        try:
            return Rows(self._indexed().segments, self.fields, numbers, rows)
        except OSError as error:
            raise CacheError(f"the cache {self.path} cannot be read: {error}") from error

    def __len__(self) -> int:
        return sum(segment.images for segment in self._segments.values())

    @property
    def bytes_per_image(self) -> int:
        """On disk, with the image's share of the index."""
        return sum(field.bytes for field in self.fields) + ENTRY.itemsize

    def _find(self, digests: NDArray[Any]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        while True:
            index = self._indexed()
            numbers, rows = index.find(digests)
            bad = False
            for number in np.unique(numbers[numbers >= 0]):
                try:
                    index.segments[number].verify()
                except DamagedError as error:
                    self._drop(index.segments[number].path, error)
                    bad = True
            if not bad:
                return numbers, rows

    def _indexed(self) -> Index:
        if self._index is None:
            self._index = Index(list(self._segments.values()))
        return self._index

    def _read(self) -> None:
        """Find the segments that are there now."""
        here = [path for path in segments(self.path) if path not in self._damaged]
        if list(self._segments) != here:
            self._index = None
        self._segments = {path: s for path, s in self._segments.items() if path in here}
        for path in here:
            if path not in self._segments:
                try:
                    self._segments[path] = Segment(path, self.fields)
                except DamagedError as error:
                    self._drop(path, error)

    def _drop(self, path: Path, error: DamagedError) -> None:
        segment = self._segments.pop(path, None)
        self._damaged.add(path)
        self._index = None
        count = f" {segment.images:,}" if segment else ""
        log.warning("damaged activations in %s: %s; its%s images are missing", path, error, count)

    # --- writing --------------------------------------------------------------------------------

    @contextmanager
    def writing(self, images: int = 0) -> Iterator[Writer]:
        """Fill the shelf; waits while another job does, and knows afterwards what that one wrote.

        Ask `present` inside: before, another job may have been at it.

        Args:
            images: How many `present` lacked, where that is known: if they cannot fit, it is said
                now, not after hours. What another job adds meanwhile is taken off.

        Raises:
            CacheError: The folder is not writable, the disk is full, or the limit too small.
        """
        known = len(self)
        try:
            self._open(make=True)
            lock = self._wait()
        except OSError as error:
            raise write_error(self.path.parent, error) from error
        try:
            try:
                self._tidy(locked=lock.held)
                self._read()
                coming = images - max(0, len(self) - known)
                if coming > 0:
                    self._room(self.path, coming * self.bytes_per_image)
            except OSError as error:
                raise write_error(self.path.parent, error) from error
            writer = Writer(self, self._segment_bytes)
            try:
                yield writer
            except BaseException:
                # Rows that were computed are right, whatever stopped the job.
                with contextlib.suppress(CacheError):
                    writer.flush()
                raise
            writer.flush()
        finally:
            with contextlib.suppress(OSError):
                self._remove_damaged()  # what `present` found meanwhile
            lock.release()

    @contextmanager
    def writing_beside(self) -> Iterator[Writer]:
        """Fill the shelf beside a process of the same job that is within `writing` all the while.

        The two must not write the same images; `refresh` shows each what the other wrote.

        Raises:
            CacheError: As `writing`.
        """
        try:
            self._open(make=True)
        except OSError as error:
            raise write_error(self.path.parent, error) from error
        self._read()
        writer = Writer(self, self._segment_bytes)
        try:
            yield writer
        except BaseException:
            with contextlib.suppress(CacheError):
                writer.flush()
            raise
        writer.flush()

    def refresh(self) -> None:
        """See what other processes have written since."""
        with contextlib.suppress(OSError):
            self._open(make=False)
        self._read()

    def make_room(self, coming: int) -> None:
        """Hold the size limit, with all that is written and `coming` bytes beside it."""
        self._room(self.path, coming)

    def add(self, segment: Segment) -> None:
        """Take in a segment that this process has just committed."""
        self._segments[segment.path] = segment
        self._index = None

    def _wait(self) -> locks.Lock:
        file = self.path / WRITING
        try:
            lock = locks.take(file)
        except BlockingIOError:
            who = locks.holder(file)
            log.warning(
                "waiting for process %s, which fills the same activations %s",
                who or "of another job",
                self.path,
            )
            lock = locks.take(file, wait=True)
        lock.sign()
        return lock

    def _tidy(self, *, locked: bool) -> None:
        """Remove what dead writers left and what is damaged; say in a file what the shelf is."""
        for path in leftovers(self.path):
            with contextlib.suppress(OSError):
                if locked or time.time() - path.stat().st_mtime > LEFT_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)
        self._remove_damaged()
        file = self.path / FACTS
        text = json.dumps({**self._key, "fields": [asdict(f) for f in self.fields]}, indent=1)
        if not file.exists() or file.read_text(errors="replace") != text:
            partial = file.with_name(f"{HIDDEN}{FACTS}")
            write_text(partial, text)
            partial.replace(file)

    def _remove_damaged(self) -> None:
        for path in self._damaged:
            with contextlib.suppress(FileNotFoundError):
                discard(path)

    # --- opening --------------------------------------------------------------------------------

    def _open(self, *, make: bool) -> None:
        """Take the shared lock that keeps the shelf; again, where it was evicted in between."""
        file = self.path / IN_USE
        for _ in range(TRIES):
            if self._lock is not None and self._lock.is_on(file):
                self._lock.touch()
                return
            if self._lock is not None:
                self._lock.release()
                self._lock = None
            if make:
                self.path.mkdir(parents=True, exist_ok=True)
            elif not self.path.is_dir():
                return
            with contextlib.suppress(FileNotFoundError):  # evicted since the line above
                self._lock = locks.take(file, shared=True, wait=True)
        raise FileNotFoundError(errno.ENOENT, "cannot be locked", str(file))

    def close(self) -> None:
        """Let others evict it from now on."""
        if self._lock is not None:
            self._lock.touch()
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Shelf:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
