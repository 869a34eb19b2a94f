"""What the page of a run is made of, and how its figures are written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

Kind = Literal["numbers", "table", "cards", "picture", "reliability", "steps", "advice"]
WORDS = {"val": "validation", "test": "test", "train": "training"}


@dataclass(frozen=True)
class Block:
    """One thing within a part of the page.

    Args:
        kind: What the content is. `numbers`: rows `name`, `value`, `note`; `table`: `columns`
            (name -> whether it is of numbers, or `bar`) and `rows`, lists of cells; `cards`: see
            `parts.html`; `picture`: `address`, `text` (for those who do not see it); `reliability`:
            bins; `steps`: rows `head`, `text`, `link`; `advice`: a `tl.sections.Section`.
        content: As the kind says.
        title: Heading; empty for none.
        note: A sentence below.
    """

    kind: Kind
    content: Any
    title: str = ""
    note: str = ""


@dataclass(frozen=True)
class Part:
    """One part of the page.

    Args:
        id: Place in the page.
        title: Heading.
        texts: Sentences at the beginning.
        blocks: What follows.
        files: Names in the run's folder from which every figure comes.
    """

    id: str
    title: str
    texts: Sequence[str] = ()
    blocks: Sequence[Block] = ()
    files: Sequence[str] = ()


def facts(rows: Mapping[str, str], title: str = "", note: str = "") -> Block:
    """Names and what they stand for; empty ones are left out."""
    cells = [[name, text] for name, text in rows.items() if text]
    return Block("table", {"columns": {}, "rows": cells}, title, note)


def share(value: float) -> str:
    """A share in per cent.

    Example:
        >>> share(0.9542), share(1.0), share(0.00012)
        ('95.4 %', '100 %', '0.01 %')
    """
    if value in (0, 1):
        return f"{100 * value:.0f} %"
    return f"{100 * value:.1f} %" if value >= 0.001 else f"{100 * value:.2g} %"


def number(value: float) -> str:
    """A figure as `metrics.json` has it, with as many digits as mean something.

    Example:
        >>> number(0.95424), number(12.3456), number(153.0), number(1234567.8)
        ('0.954', '12.35', '153', '1,234,568')
    """
    if not isfinite(value):
        return "–"
    if value == int(value) and abs(value) >= 10:
        return f"{value:,.0f}"
    size = abs(value)
    return f"{value:.3f}" if size < 10 else f"{value:.2f}" if size < 1000 else f"{value:,.0f}"


def images(count: int, of: str = "") -> str:
    """`1 image`, `2,000 test images`."""
    return f"{count:,} {of + ' ' if of else ''}image{'' if count == 1 else 's'}"


def listed(names: Iterable[str], most: int = 3) -> str:
    """`a, b and c`; with more than `most` of them `a, b, c and 4 more`."""
    every = list(names)
    shown, left = every[:most], len(every) - most
    if left > 0:
        return f"{', '.join(shown)} and {left:,} more"
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]])) if shown else ""


def first_up(text: str) -> str:
    """With a large first letter; the rest, which may name things, stays."""
    return text[:1].upper() + text[1:]


def tile(name: str, value: str, note: str = "") -> dict[str, str]:
    """One row of a block of `numbers`."""
    return {"name": name, "value": value, "note": note}


def step(head: str, text: str, link: str = "", page: str = "") -> dict[str, str]:
    """One row of a block of `steps`.

    Args:
        head: What to do, in a few words.
        text: Why, with figures.
        link: The part of the page that shows it.
        page: Or a file beside the page.
    """
    return {"head": head, "text": text, "link": link, "page": page}
