"""The error of the frozen frontier."""

from __future__ import annotations

from tl.config import TlError


class SplitError(TlError):
    """This model cannot be split, or not proven: one line says why; training goes on uncached."""


def first_line(error: BaseException) -> str:
    """What an error of torch says, short enough for one line."""
    text = str(error).strip().split("\n")[0][:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
