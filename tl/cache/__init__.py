"""Activations on disk: what the frozen part of a network says about each image, kept for all jobs.

A *shelf* is one folder per key (model, weights of the frozen part, preprocessing, frontier, view);
it holds immutable *segments*: raw arrays, the SHA-256 of each image's contents, and checksums. Each
segment comes into place by one rename, so a kill at any moment leaves no wrong entry. Jobs may read
and fill the same shelf at the same time.

Example:
    >>> cache = ActivationCache(folder, limit_bytes=20 * 10**9)
    >>> with cache.shelf(key, [Field("pooled", (1280,), "float32")]) as shelf:
    ...     with shelf.writing(images=len(digests)) as writer:
    ...         missing = ~shelf.present(digests)
    ...         writer.append(digests_of_a_batch, {"pooled": values})
    ...     rows = shelf.rows(digests)
    ...     batch = rows.gather("pooled", indices)
"""

from __future__ import annotations

from tl.cache.errors import CacheError, size_text
from tl.cache.rows import Rows
from tl.cache.segments import Field
from tl.cache.shelf import Shelf
from tl.cache.store import ActivationCache, ShelfInfo, folder_bytes, free_bytes
from tl.cache.writer import Writer

__all__ = [
    "ActivationCache",
    "CacheError",
    "Field",
    "Rows",
    "Shelf",
    "ShelfInfo",
    "Writer",
    "folder_bytes",
    "free_bytes",
    "size_text",
]
