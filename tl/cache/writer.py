"""Filling a shelf: rows go to disk as they come, a segment at a time becomes visible."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tl.cache.errors import CacheError, write_error
from tl.cache.rows import to_digests
from tl.cache.segments import DTYPES, Field, Partial

if TYPE_CHECKING:
    from tl.cache.shelf import Shelf

# A segment is committed after so many seconds: a killed pass loses no more than that.
SECONDS = 30.0


class Writer:
    """Appends to a shelf; made by `Shelf.writing`, and good only inside of it.

    Args:
        shelf: Its lock is held.
        segment_bytes: A segment is committed when it is that large.
    """

    def __init__(self, shelf: Shelf, segment_bytes: int) -> None:
        self._shelf = shelf
        self._segment_bytes = segment_bytes
        self._partial: Partial | None = None
        self._pending: set[bytes] = set()

    def append(self, digests: Sequence[str], arrays: Mapping[str, NDArray[Any]]) -> None:
        """Write the rows of some images; an image that is there already is left out.

        Args:
            digests: SHA-256 of the contents of each image, in hex.
            arrays: Field -> (images, *shape); float32 is converted where the field is float16.

        Raises:
            CacheError: The disk is full or the folder not writable, the size limit leaves no room,
                or a value is too large for float16.
            ValueError: Names or shapes are not those of the shelf.
        """
        self._check(len(digests), arrays)
        keys = to_digests(digests)
        new = ~self._shelf.contains(keys)
        chosen: set[bytes] = set()
        for i, key in enumerate(keys.tolist()):
            new[i] &= key not in self._pending and key not in chosen
            if new[i]:
                chosen.add(key)
        if not chosen:
            return
        rows = {f.name: _stored(f, arrays[f.name][new]) for f in self._shelf.fields}
        try:
            if self._partial is None:
                self._partial = Partial(self._shelf.path, self._shelf.fields)
            self._partial.append(keys[new], rows)
            self._pending |= chosen
        except OSError as error:
            self.discard()
            raise write_error(self._shelf.path.parent, error) from error
        old = time.monotonic() - self._partial.began >= SECONDS
        if old or self._partial.bytes >= self._segment_bytes:
            self.flush()

    def flush(self) -> None:
        """Make everything that was appended visible to all jobs.

        Raises:
            CacheError: As in `append`; what was not yet visible is gone then.
        """
        partial = self._partial
        if partial is None:
            return
        try:
            self._shelf.make_room(partial.unwritten)
            segment = partial.commit()
        except OSError as error:
            self.discard()
            raise write_error(self._shelf.path.parent, error) from error
        except BaseException:
            self.discard()
            raise
        self._partial = None
        self._pending.clear()
        self._shelf.add(segment)

    def discard(self) -> None:
        """Remove what is not yet visible."""
        partial, self._partial = self._partial, None
        self._pending.clear()
        if partial is not None:
            partial.discard()

    def _check(self, images: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        names = {field.name for field in self._shelf.fields}
        if set(arrays) != names:
            raise ValueError(f"the shelf has the fields {sorted(names)}, got {sorted(arrays)}")
        for field in self._shelf.fields:
            if arrays[field.name].shape != (images, *field.shape):
                raise ValueError(
                    f"{field.name} must be {(images, *field.shape)}, got {arrays[field.name].shape}"
                )


def _stored(field: Field, values: NDArray[Any]) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        stored: NDArray[Any] = values.astype(DTYPES[field.dtype], copy=False)
    if field.dtype == "float16" and np.isinf(stored).any() and not np.isinf(values).any():
        raise CacheError(f"{field.name} has values beyond 65504, which float16 cannot hold")
    return stored
