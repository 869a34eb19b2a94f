"""Which image is in which segment, and fast, flat reading of rows in any order."""

from __future__ import annotations

import math
import mmap
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from tl.cache.segments import DIGEST, DTYPES, Field, Segment

if TYPE_CHECKING:
    import torch

MAPPED = 256 << 20  # bytes of the maps that a process may keep in its memory between two calls
FAULT = 64 << 10  # bytes that the kernel maps around a row at its first touch
CHUNK = 2 << 20  # bytes copied at once on their way to their place: they stay in the cache


def to_digests(texts: Sequence[str]) -> NDArray[Any]:
    """SHA-256 in hex, as an array of 32-byte strings.

    Raises:
        ValueError: One of them is no SHA-256.
    """
    if any(len(text) != 2 * DIGEST.itemsize for text in texts):
        raise ValueError("digests are SHA-256 in 64 hexadecimal digits")
    return np.frombuffer(bytes.fromhex("".join(texts)), DIGEST)


class Index:
    """Digest -> segment and row, over all segments of a shelf."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = list(segments)
        digests = np.concatenate([np.empty(0, DIGEST), *(s.digests for s in segments)])
        rows = np.concatenate([np.empty(0, np.uint32), *(s.rows for s in segments)])
        numbers = np.repeat(np.arange(len(segments), dtype=np.int32), [s.images for s in segments])
        # The parts are sorted already, which a stable sort turns to account.
        order = np.argsort(digests, kind="stable")
        self._digests, self._rows, self._numbers = digests[order], rows[order], numbers[order]

    def find(self, digests: NDArray[Any]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Number of the segment, -1 where there is none, and row in it, of each digest."""
        numbers = np.full(len(digests), -1, np.int32)
        rows = np.zeros(len(digests), np.int64)
        if len(self._digests):
            order = np.argsort(digests, kind="stable")  # neighbours are found near each other
            place = np.empty(len(digests), np.int64)
            place[order] = np.searchsorted(self._digests, digests[order])
            place = np.minimum(place, len(self._digests) - 1)
            found = self._digests[place] == digests
            numbers[found] = self._numbers[place[found]]
            rows[found] = self._rows[place[found]]
        return numbers, rows


class Rows:
    """The rows of some images, in the order in which they were asked for.

    It stays good when its shelf is closed, and even when the shelf is evicted meanwhile. Segments
    are mapped into memory; what has been mapped is let go of beyond `MAPPED` bytes, so the memory
    of the process stays flat however large the shelf is.
    """

    _live: ClassVar[weakref.WeakSet[Rows]] = weakref.WeakSet()
    _touched: ClassVar[int] = 0

    def __init__(
        self,
        segments: Sequence[Segment],
        fields: Sequence[Field],
        numbers: NDArray[np.int32],
        rows: NDArray[np.int64],
    ) -> None:
        used = np.unique(numbers)
        self._numbers = np.searchsorted(used, numbers).astype(np.int32)
        self._rows = rows
        self._fields = {field.name: field for field in fields}
        self._maps = {name: [segments[i].map(name) for i in used] for name in self._fields}
        self._live.add(self)

    def __len__(self) -> int:
        return len(self._rows)

    def gather(self, name: str, indices: NDArray[Any] | torch.Tensor) -> torch.Tensor:
        """Copy rows into memory.

        Args:
            name: Of the field.
            indices: Positions in the list of digests that `Shelf.rows` was given; any order, with
                repetitions if need be.

        Returns:
            Float32, (indices, *shape of the field).

        Raises:
            IndexError: A position is out of range.
        """
        import torch

        wanted = np.asarray(indices, np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"positions must be in [0, {len(self)})")
        field, maps = self._fields[name], self._maps[name]
        numbers, rows = self._numbers[wanted], self._rows[wanted]
        if len(maps) == 1:
            out = np.take(maps[0][1], rows, axis=0, mode="clip")
            self._let_go(len(rows) * max(field.bytes, FAULT))
        else:
            out = np.empty((len(rows), math.prod(field.shape)), DTYPES[field.dtype])
            self._gather_parts(maps, numbers, rows, out)
        # One conversion of the whole is several times faster than one of each part.
        return torch.from_numpy(out.reshape(len(rows), *field.shape)).float()

    def _gather_parts(
        self,
        maps: Sequence[tuple[mmap.mmap, NDArray[Any]]],
        numbers: NDArray[np.int32],
        rows: NDArray[np.int64],
        out: NDArray[Any],
    ) -> None:
        """Copy rows that lie in several segments, which are read from front to back."""
        order = np.lexsort((rows, numbers))
        ends = np.searchsorted(numbers[order], np.arange(len(maps) + 1))
        row_bytes = out.itemsize * out.shape[1]
        step = max(1, CHUNK // row_bytes)
        for (_, values), begin, end in zip(maps, ends[:-1], ends[1:], strict=True):
            for start in range(begin, end, step):
                places = order[start : min(start + step, end)]
                out[places] = np.take(values, rows[places], axis=0, mode="clip")
                self._let_go(len(places) * max(row_bytes, FAULT))

    @classmethod
    def _let_go(cls, touched: int) -> None:
        """Unmap what was read: it stays in the kernel's page cache, and costs this process nothing.

        Shelves that together fit into `MAPPED` stay mapped, which saves the faults of the next
        epoch.
        """
        cls._touched += touched
        if cls._touched < MAPPED:
            return
        cls._touched = 0
        every = [m for rows in cls._live for maps in rows._maps.values() for m, _ in maps]
        if sum(map(len, every)) > MAPPED and hasattr(mmap, "MADV_DONTNEED"):
            for mapped in every:
                mapped.madvise(mmap.MADV_DONTNEED)
