"""What was measured and decided, as `tl.advice` puts it: a marked table, bars, facts, sentences."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.text import Text

from tl.display.tables import (
    LOG_WIDTH,
    clean,
    console,
    facts,
    new_table,
    print_titled,
    results_table,
    say,
)
from tl.sections import Section

BAR = 30  # characters from 0 to 1
HEADS = {"similar": " similar to the pretraining", "different": " different from it"}
Rows = Sequence[Mapping[str, Any]]


def sections(parts: Sequence[Section]) -> None:
    """Print sections one below the other; kinds that nothing is known of are left out."""
    for part in parts:
        if part.kind in _PRINTERS:
            _PRINTERS[part.kind](part.title, part.rows)
            if part.note:
                say(_wrapped(part.note) + "\n")


def _grid(title: str, rows: Rows) -> None:
    """The decision table; the cell that was chosen stands in brackets, as logs have no colours."""
    table = new_table()
    table.add_column("", no_wrap=True)
    for head in HEADS.values():
        table.add_column(head, overflow="fold")
    for row in rows:
        cells = [Text(clean(row["amount"]))]
        for column in HEADS:
            text = clean(str(row[column]))
            marked = row["marked"] == column
            style = "bold green" if marked else ""
            cells.append(Text(f"[{text}]" if marked else f" {text}", style=style))
        table.add_row(*cells)
    print_titled(title, table)


def _bars(title: str, rows: Rows) -> None:
    """Values in [0, 1] with their intervals."""
    table = new_table()
    table.show_header = False
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    for row in rows:
        text = row.get("text") or f"{row['value']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
        line = bar_text(row["value"], row["low"], row["high"])
        table.add_row(Text(clean(row["name"])), Text(line), Text(clean(text)))
    print_titled(title, table)


def bar_text(value: float, low: float, high: float, width: int = BAR) -> str:
    """A bar from 0 to 1: filled to the lower end of an interval, the value a dot within it.

    Example:
        >>> bar_text(0.5, 0.3, 0.7, width=10)
        '███━━●━···'
        >>> bar_text(-0.1, -0.3, 0.05, width=10)
        '●·········'
    """

    def cell(x: float) -> int:
        return min(max(round(x * width), 0), width)

    dot = min(max(int(value * width), 0), width - 1)
    left, right = min(cell(low), dot), max(cell(high), dot + 1)
    line = "█" * left + "━" * (right - left) + "·" * (width - right)
    return f"{line[:dot]}●{line[dot + 1 :]}"


def _facts(title: str, rows: Rows) -> None:
    facts(title, {row["name"]: row["text"] for row in rows})


def _list(title: str, rows: Rows) -> None:
    _lines(title, [_wrapped(row["text"], first="- ", others="  ") for row in rows])


def _text(title: str, rows: Rows) -> None:
    _lines(title, [_wrapped(row["text"]) for row in rows])


def _lines(title: str, texts: Sequence[str]) -> None:
    console.print(Text(clean(title), style="bold"), soft_wrap=True)
    for text in texts:
        say(text)
    say("")


def _wrapped(text: str, first: str = "", others: str = "") -> str:
    """Sentences in lines that a screen has room for."""
    width = min(console.width, LOG_WIDTH) if console.is_terminal else LOG_WIDTH
    return textwrap.fill(
        clean(text),
        width,
        initial_indent=first,
        subsequent_indent=others,
        break_long_words=False,
        break_on_hyphens=False,
    )


_PRINTERS: Mapping[str, Callable[[str, Rows], None]] = {
    "grid": _grid,
    "bars": _bars,
    "facts": _facts,
    "list": _list,
    "text": _text,
    "table": results_table,
}
