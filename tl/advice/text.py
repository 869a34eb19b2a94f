"""An advice as Markdown: advice.md reads well as it is, too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tl.advice.sections import COLUMNS
from tl.sections import Section

BAR = 20  # characters from 0 to 1
Rows = Sequence[Mapping[str, Any]]


def markdown(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """All sections below one heading."""
    parts = [f"# {_plain(title)}", _plain(subtitle)]
    for section in sections:
        if section.rows:
            parts += [f"## {_plain(section.title)}", _BODIES[section.kind](section.rows)]
            parts += [_plain(section.note)] if section.note else []
    return "\n\n".join(parts) + "\n"


def _plain(text: Any) -> str:
    """Names come from folders: they must neither break a table nor become markup."""
    clean = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))
    for character in "\\`*_<[|":
        clean = clean.replace(character, f"\\{character}")
    return clean


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [[_plain(h) for h in head], ["---"] * len(head)]
    lines += [[_plain(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _grid(rows: Rows) -> str:
    table = []
    for row in rows:
        cells = [f"→ {row[c]} ←" if row["marked"] == c else row[c] for c in COLUMNS]
        table.append([row["amount"], *cells])
    return _table(["", "similar to the pretraining", "different from it"], table)


def _bars(rows: Rows) -> str:
    return _table(
        ["features", "", "quality (95 % interval)"],
        [[row["name"], "█" * round(BAR * max(row["value"], 0)), row["text"]] for row in rows],
    )


def _curve(rows: Rows) -> str:
    return _table(
        ["training images", "quality (95 % interval)", ""],
        [
            [f"{row['images']:,}", row["text"], "measured" if row["measured"] else "expected"]
            for row in rows
        ],
    )


def _facts(rows: Rows) -> str:
    return _table(["", ""], [[row["name"], row["text"]] for row in rows])


def _list(rows: Rows) -> str:
    return "\n".join(f"- {_plain(row['text'])}" for row in rows)


def _text(rows: Rows) -> str:
    return "\n\n".join(_plain(row["text"]) for row in rows)


def _rows(rows: Rows) -> str:
    return _table(list(rows[0]), [list(row.values()) for row in rows])


_BODIES: Mapping[str, Callable[[Rows], str]] = {
    "grid": _grid,
    "bars": _bars,
    "curve": _curve,
    "facts": _facts,
    "list": _list,
    "table": _rows,
    "text": _text,
}
