"""The error of this room."""

from __future__ import annotations

from tl.config import TlError


class ExportError(TlError):
    """The bundle could not be written; what stood in its place before is untouched."""


class BundlePlaceError(ExportError):
    """There can be no bundle at the place that was asked for."""

    exit_code = 2
