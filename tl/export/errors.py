"""The error of this room."""

from __future__ import annotations

from tl.config import TlError


class ExportError(TlError):
    """The bundle could not be written; what stood in its place before is untouched."""
