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
