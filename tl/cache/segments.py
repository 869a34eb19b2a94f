"""Segments: immutable folders of raw arrays, the index of their images, and checksums."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import mmap
import os
import secrets
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tl.cores import usable_cores

VERSION = 1  # of the layout on disk; it is part of every shelf's name
BLOCK = 16 << 20  # bytes of a file with a checksum of their own, so that threads share a file
PIECE = 1 << 20  # bytes read at once for a checksum: they stay in the processor's cache
MOST_THREADS = 4
HIDDEN = "."  # names that begin so are unfinished or on their way out
FACTS_BYTES = 4096  # more than the facts of a segment take
FACTS, INDEX = "segment.json", "index.bin"
DIGEST = np.dtype("S32")  # a SHA-256; numpy compares equally long byte strings like numbers
ENTRY = np.dtype([("digest", DIGEST), ("row", "<u4")])
DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}


@dataclass(frozen=True)
class Field:
    """One array of a shelf.

    Args:
        name: As the network's graph calls it.
        shape: Of one image's row.
        dtype: "float32" or "float16".
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES or self.bytes < 1:
            raise ValueError(f"field {self.name} is {self.dtype} {self.shape}")

    @property
    def bytes(self) -> int:
        """Of one image's row."""
        return int(math.prod(self.shape) * DTYPES[self.dtype].itemsize)


class DamagedError(Exception):
    """A segment is not as it was written; the text says what is wrong."""


# Segments whose arrays this process has read and found right, by place and file times.
_verified: set[tuple[Any, ...]] = set()


class Segment:
    """One segment on disk; its index is read and checked when the object is made.

    Raises:
        DamagedError: A file is missing, unreadable or of another size, or the index is wrong.
    """

    def __init__(self, path: Path, fields: Sequence[Field]) -> None:
        self.path = path
        self.fields = {field.name: (i, field) for i, field in enumerate(fields)}
        try:
            facts = json.loads((path / FACTS).read_text())
            self.images = int(facts["images"])
            sizes = {file_name(i): f.bytes * self.images for i, f in self.fields.values()}
            sizes[INDEX] = ENTRY.itemsize * self.images
            self._checksums = {name: list(facts["checksums"][name]) for name in sizes}
            status = {name: (path / name).stat() for name in sizes}
        except FileNotFoundError as error:
            raise DamagedError(f"{Path(error.filename).name} is missing") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedError(f"{FACTS} cannot be read") from error
        for name, size in sizes.items():
            blocks = -(-size // BLOCK)
            if status[name].st_size != size or len(self._checksums[name]) != blocks:
                raise DamagedError(f"{name} has not the size that {FACTS} says")
        self._identity = (str(path), *((s.st_ino, s.st_mtime_ns) for s in status.values()))
        self._check([INDEX])
        entries = np.fromfile(path / INDEX, ENTRY)
        self.digests = np.ascontiguousarray(entries["digest"])
        self.rows = np.ascontiguousarray(entries["row"])
        if self.rows.size and int(self.rows.max()) >= self.images:
            raise DamagedError(f"{INDEX} names rows that are not there")

    def verify(self) -> None:
        """Read every array once, in the first call of this process.

        Raises:
            DamagedError: A checksum is wrong.
        """
        if self._identity not in _verified:
            self._check([file_name(i) for i, _ in self.fields.values()])
            self.trust()

    def trust(self) -> None:
        """Take the arrays as verified: this process has just written them."""
        _verified.add(self._identity)

    def _check(self, names: Sequence[str]) -> None:
        jobs = [(name, i, crc) for name in names for i, crc in enumerate(self._checksums[name])]
        try:
            if len(jobs) == 1:
                wrong = [self._is_wrong(*jobs[0])]
            else:
                threads = min(MOST_THREADS, usable_cores())
                with ThreadPoolExecutor(threads) as pool:
                    wrong = list(pool.map(lambda job: self._is_wrong(*job), jobs))
        except OSError as error:
            raise DamagedError(f"{(error.strerror or str(error)).lower()}") from error
        bad = {name for (name, _, _), found in zip(jobs, wrong, strict=True) if found}
        if bad:
            raise DamagedError(f"the checksum of {', '.join(sorted(bad))} is wrong")

    def _is_wrong(self, name: str, block: int, wanted: int) -> bool:
        piece, found, left = memoryview(bytearray(PIECE)), 0, BLOCK
        with (self.path / name).open("rb", buffering=0) as stream:
            stream.seek(block * BLOCK)
            while left and (count := stream.readinto(piece[: min(left, PIECE)])):
                found = zlib.crc32(piece[:count], found)
                left -= count
        return found != wanted

    def map(self, name: str) -> tuple[mmap.mmap, NDArray[Any]]:
        """The rows of a field, mapped into memory: (images, values of a row)."""
        number, field = self.fields[name]
        with (self.path / file_name(number)).open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        values = np.frombuffer(mapped, DTYPES[field.dtype])
        return mapped, values.reshape(self.images, -1)


def file_name(number: int) -> str:
    """File of a shelf's field; the names of graph nodes need not be good file names."""
    return f"field{number:02d}.bin"


class Partial:
    """A segment in the making: rows go to disk as they come, and one rename makes it visible.

    Every method but `discard` may raise OSError; the partial segment is useless then.
    """

    def __init__(self, shelf: Path, fields: Sequence[Field]) -> None:
        self.images = self.bytes = 0
        self.began = time.monotonic()
        self._fields = fields
        self._path = shelf / f"{HIDDEN}partial-{os.getpid()}-{secrets.token_hex(4)}"
        self._files: list[_File] = []
        self._digests: list[NDArray[Any]] = []
        self._path.mkdir()
        try:
            for i in range(len(fields)):
                self._files.append(_File(self._path / file_name(i)))
        except OSError:
            self.discard()
            raise

    def append(self, digests: NDArray[Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        """Write rows; `arrays` have their field's type and shape."""
        for field, file in zip(self._fields, self._files, strict=True):
            file.write(np.ascontiguousarray(arrays[field.name]))
        self._digests.append(digests)
        self.images += len(digests)
        self.bytes = sum(file.bytes for file in self._files) + ENTRY.itemsize * self.images

    @property
    def unwritten(self) -> int:
        """Bytes that `commit` adds: the index, and the facts with their checksums."""
        return ENTRY.itemsize * self.images + FACTS_BYTES

    def commit(self) -> Segment:
        """Finish the files, bring them to the disk, and put the segment in its place."""
        entries = np.empty(self.images, ENTRY)
        digests = np.concatenate(self._digests)
        order = np.argsort(digests, kind="stable")
        entries["digest"], entries["row"] = digests[order], order
        index = _File(self._path / INDEX)
        self._files.append(index)
        index.write(entries)
        for file in self._files:
            file.close()
        facts = {
            "version": VERSION,
            "images": self.images,
            "checksums": {file.path.name: file.checksums for file in self._files},
        }
        write_text(self._path / FACTS, json.dumps(facts))
        sync_folder(self._path)
        target = self._path.with_name(f"segment-{time.time_ns():020d}-{secrets.token_hex(4)}")
        self._path.rename(target)
        sync_folder(target.parent)
        try:
            segment = Segment(target, self._fields)
        except DamagedError as error:
            raise OSError(errno.EIO, f"what was written reads back wrong: {error}") from error
        segment.trust()
        return segment

    def discard(self) -> None:
        """Remove what was written so far."""
        for file in self._files:
            file.abandon()
        shutil.rmtree(self._path, ignore_errors=True)


class _File:
    """A new file with the checksum of each block, computed as it is written.

    Written with `write`, never through a map: there a full disk would kill the process.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = 0
        self.checksums: list[int] = []
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)

    def write(self, array: NDArray[Any]) -> None:
        rest = memoryview(array.reshape(-1).view(np.uint8).data)
        while rest:
            used = self.bytes % BLOCK
            written = os.write(self._descriptor, rest[: min(len(rest), BLOCK - used)])
            before = self.checksums.pop() if used else 0
            self.checksums.append(zlib.crc32(rest[:written], before))
            self.bytes += written
            rest = rest[written:]

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def abandon(self) -> None:
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = -1


def write_text(path: Path, text: str) -> None:
    """Write a small file and bring it to the disk."""
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def sync_folder(path: Path) -> None:
    """Bring a folder's names to the disk, where the file system knows how."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard(path: Path) -> None:
    """Remove a folder; a kill in between leaves nothing that looks whole."""
    hidden = path.with_name(f"{HIDDEN}gone-{secrets.token_hex(8)}")
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def segments(shelf: Path) -> Iterator[Path]:
    """Folders of the finished segments of a shelf, oldest first."""
    try:
        yield from sorted(p for p in shelf.iterdir() if p.name.startswith("segment-"))
    except OSError:
        return


def leftovers(folder: Path) -> Iterator[Path]:
    """Hidden folders that dead processes left in a folder."""
    try:
        yield from [p for p in folder.iterdir() if p.name.startswith(HIDDEN) and p.is_dir()]
    except OSError:
        return
