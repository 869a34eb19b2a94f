"""What is wrong with a batch as a whole."""

from __future__ import annotations

from tl.config import RequestError, TlError


class BatchError(RequestError):
    """A batch cannot be run as it was asked for; nothing was started."""


class EngineError(TlError):
    """What starts the workers of a batch failed; the same command goes on."""


class FullError(EngineError):
    """No worker can be added as long as the others are there."""
