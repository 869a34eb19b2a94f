"""The error of this room, and sizes as people read them."""

from __future__ import annotations

import errno
from pathlib import Path

from tl.config import TlError

NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
REMEDY = "choose another folder with cache.dir=, or go without with cache.mode=off"


class CacheError(TlError):
    """The cache cannot be written, is too small, or lacks what is asked of it.

    Whoever fills the cache catches it, says it once and computes without the cache.
    """


def write_error(folder: Path, error: OSError) -> CacheError:
    """What a failed write means, and what to do next."""
    if error.errno in NO_SPACE:
        return CacheError(
            f"the disk of the cache {folder} is full: free some space, remove old activations with "
            f"tl cache prune=all, or {REMEDY}"
        )
    reason = (error.strerror or str(error)).lower()
    return CacheError(f"the cache {folder} cannot be written ({reason}): {REMEDY}")


def size_text(count: float) -> str:
    """A number of bytes for people: 1.2 GB."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"
