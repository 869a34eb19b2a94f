"""The one error of this room."""

from __future__ import annotations

from tl.config import RequestError


class CompareError(RequestError):
    """There is nothing to compare, or not what was named; nothing was written."""
