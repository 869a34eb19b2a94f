"""The error of this room."""

from __future__ import annotations

from tl.config import ProblemsError


class DataError(ProblemsError):
    """The images or their folders are wrong."""
