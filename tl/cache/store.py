"""The cache as a whole: its shelves, its size limit, and what goes first."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tl import locks
from tl.cache.errors import REMEDY, CacheError, size_text, write_error
from tl.cache.segments import FACTS as SEGMENT_FACTS
from tl.cache.segments import HIDDEN, VERSION, Field, discard, leftovers, segments
from tl.cache.shelf import FACTS, IN_USE, WRITING, Shelf

SEGMENT_BYTES = 256 << 20
PRUNING = ".pruning"  # held while shelves are removed


@dataclass(frozen=True)
class ShelfInfo:
    """What a person wants to know of a shelf.

    Args:
        path: Its folder.
        key: What its activations depend on; empty where that cannot be read.
        images: Rows in it.
        bytes: On disk.
        last_used: Seconds since 1970, when a job opened or closed it.
        in_use: A running job has it open, or there are no locks by which to know.
    """

    path: Path
    key: Mapping[str, Any]
    images: int
    bytes: int
    last_used: float
    in_use: bool

    def __str__(self) -> str:
        return f"{self.text('model')} at {self.text('frontier')}, view {self.text('view')}"

    def text(self, name: str) -> str:
        """A part of the key: model, frontier, view; of a view its number."""
        value = self.key.get(name, "?")
        return str(value.get("number", value) if isinstance(value, dict) else value)


class ActivationCache:
    """The activations under one folder, within one limit.

    Args:
        folder: It need not exist yet.
        limit_bytes: Beyond it the least recently used shelves go, when a job writes.
        segment_bytes: Size of the files that become visible at once.
    """

    def __init__(
        self, folder: Path, *, limit_bytes: int, segment_bytes: int = SEGMENT_BYTES
    ) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._segment_bytes = segment_bytes

    def shelf(self, key: Mapping[str, Any], fields: Sequence[Field]) -> Shelf:
        """Open the shelf of these activations; it may be empty, and exists once it is written to.

        Args:
            key: All that the values depend on, as plain JSON: hash of the weights, preprocessing,
                frontier, view. `model`, `frontier` and `view` are shown by `tl cache`; of a view
                that is an object its `number`.
            fields: The arrays of each image.
        """
        whole = {"version": VERSION, "key": key, "fields": [asdict(field) for field in fields]}
        text = json.dumps(whole, sort_keys=True, separators=(",", ":"), allow_nan=False)
        name = hashlib.sha256(text.encode()).hexdigest()[:24]
        return Shelf(
            self.folder / name,
            key,
            fields,
            room=self._make_room,
            segment_bytes=self._segment_bytes,
        )

    def shelves(self) -> list[ShelfInfo]:
        """All shelves, the least recently used first."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # nothing there yet
                stack.enter_context(self._alone())
            return self._scan()

    def _scan(self) -> list[ShelfInfo]:
        """As `shelves`; one process at a time, for the look at a lock is a short lock itself."""
        paths: list[Path] = []
        with contextlib.suppress(OSError):
            paths += (p for p in self.folder.iterdir() if p.name[0] != HIDDEN and p.is_dir())
        return sorted(map(_info, paths), key=lambda info: (info.last_used, info.path.name))

    def prune(self, limit_bytes: int, *, used_before: float = 0.0) -> list[ShelfInfo]:
        """Remove shelves, but never one that a running job has open.

        Args:
            limit_bytes: The least recently used go until the rest is no larger.
            used_before: Besides, what was last used before that time, in seconds since 1970.

        Returns:
            What was removed.

        Raises:
            CacheError: The folder cannot be written.
        """
        if not self.folder.is_dir():
            return []
        try:
            with self._alone():
                return self._remove(limit_bytes, used_before)
        except OSError as error:
            raise write_error(self.folder, error) from error

    def _remove(self, limit_bytes: int, used_before: float) -> list[ShelfInfo]:
        for path in leftovers(self.folder):
            shutil.rmtree(path, ignore_errors=True)
        infos = self._scan()
        total = sum(info.bytes for info in infos)
        removed = []
        for info in infos:
            if info.in_use:
                continue
            goes = total > limit_bytes or info.last_used < used_before or not info.images
            if goes and _evict(info.path):
                removed.append(info)
                total -= info.bytes
            else:
                _sweep(info.path)
        return removed

    def _make_room(self, shelf: Path, coming: int) -> None:
        """Hold the limit for a writer of `shelf`, with `coming` bytes that are not yet written.

        Raises:
            CacheError: It cannot be held, or the disk has no room for what is to come.
        """
        with self._alone():
            self._hold_limit(shelf, coming)

    def _hold_limit(self, shelf: Path, coming: int) -> None:
        infos = self._scan()
        total = sum(info.bytes for info in infos)
        over = total + coming - self.limit_bytes
        fixed = sum(info.bytes for info in infos if info.in_use) + coming
        if fixed > self.limit_bytes:
            own = sum(info.bytes for info in infos if info.path == shelf) + coming
            others = f", {size_text(fixed - own)} are in use by other jobs" if fixed > own else ""
            raise CacheError(
                f"the activations take {size_text(own)}{others}, and cache.max_gb allows "
                f"{size_text(self.limit_bytes)} in {self.folder}: raise it, or {REMEDY}"
            )
        free = free_bytes(self.folder)
        if coming and coming > free + max(over, 0):
            raise CacheError(
                f"the activations take {size_text(coming)}, and the disk of the cache "
                f"{self.folder} has {size_text(free)} left: free some space, or {REMEDY}"
            )
        if over > 0:
            self._remove(self.limit_bytes - coming, 0.0)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One process at a time removes shelves: two would remove twice as many."""
        lock = locks.take(self.folder / PRUNING, wait=True)
        try:
            yield
        finally:
            lock.release()


def _info(path: Path) -> ShelfInfo:
    key: Any = None
    with contextlib.suppress(OSError, ValueError):
        key = json.loads((path / FACTS).read_text())
    images = 0
    for segment in segments(path):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            images += int(json.loads((segment / SEGMENT_FACTS).read_text())["images"])
    last_used = 0.0
    for name in (IN_USE, ""):
        with contextlib.suppress(OSError):
            last_used = last_used or (path / name).stat().st_mtime
    known = key if isinstance(key, dict) else {}
    return ShelfInfo(path, known, images, folder_bytes(path), last_used, _in_use(path))


def _in_use(path: Path) -> bool:
    try:
        lock = locks.take(path / IN_USE)
    except FileNotFoundError:
        return False
    except OSError:  # a job holds it, or nobody can tell
        return True
    held = lock.held
    lock.release()
    return not held


def _evict(path: Path) -> bool:
    """Remove a shelf, unless a job has opened it."""
    try:
        lock = locks.take(path / IN_USE)
    except BlockingIOError:
        return False
    except FileNotFoundError:
        return True
    try:
        if not lock.held or not lock.is_on(path / IN_USE):
            return False
        discard(path)
        return True
    finally:
        lock.release()


def _sweep(path: Path) -> None:
    """Remove what a dead writer left in a shelf."""
    with contextlib.suppress(OSError):
        lock = locks.take(path / WRITING)
        try:
            for left in leftovers(path) if lock.held else ():
                shutil.rmtree(left, ignore_errors=True)
        finally:
            lock.release()


def folder_bytes(path: Path) -> int:
    """Size of all files below a folder."""
    total = 0
    for place, _, names in os.walk(path):  # unlike `rglob` it bears what vanishes meanwhile
        for name in names:
            with contextlib.suppress(OSError):
                total += Path(place, name).stat().st_size
    return total


def free_bytes(path: Path) -> int:
    """Free space of the disk that a folder is on, or will be on."""
    there = next((p for p in (path, *path.absolute().parents) if p.exists()), path)
    return shutil.disk_usage(there).free
