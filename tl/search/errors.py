"""What can be wrong with a search."""

from __future__ import annotations

from tl.config import RequestError, TlError


class SearchError(RequestError):
    """The search cannot be as it was asked for."""


class TrialsError(TlError):
    """The search failed: no trial came to an end."""
