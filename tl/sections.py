"""One part of what a person reads of a result: on the screen, on a page, in a text file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["grid", "bars", "curve", "facts", "list", "table", "text"]


@dataclass(frozen=True)
class Section:
    """One part of what a person reads.

    Args:
        title: Heading.
        kind: What the rows are. `grid`: `amount`, `similar`, `different`, `marked` (`similar`,
            `different` or empty); `bars`: `name`, `value`, `low`, `high` in [0, 1] and `text`, the
            figures in words; `curve`: these, `images` and `measured`, for pages only; `facts`:
            `name`, `text`; `list` and `text`: `text`; `table`: column -> value.
        rows: From top to bottom.
        note: A sentence below them.
    """

    title: str
    kind: Kind
    rows: Sequence[Mapping[str, Any]]
    note: str = ""


def duration(seconds: float) -> str:
    """Seconds, rounded as an estimate deserves.

    Example:
        >>> [duration(s) for s in (0.42, 8.6, 84, 700, 9000)]
        ['0.4 s', '9 s', '1 min 20 s', '12 min', '2.5 h']
    """
    if seconds < 1:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 300:
        minutes, rest = divmod(round(seconds / 10) * 10, 60)
        return f"{minutes:.0f} min {rest:.0f} s" if rest else f"{minutes:.0f} min"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
