"""Text and tables: aligned, one format a column, alike on a terminal and in a log."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tl import ranks

LOG_WIDTH = 100  # characters of a line where there is no terminal
NOTHING = "–"


def _console(*, stderr: bool = False) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    if isinstance(stream, io.TextIOWrapper) and "utf" not in stream.encoding.lower():
        # A class name must not break a job only because the log is in another encoding.
        stream.reconfigure(errors="replace")
    width = None if stream is not None and stream.isatty() else LOG_WIDTH
    quiet = ranks.place().rank > 0  # of several processes of a job the first one speaks
    return Console(
        width=width, stderr=stderr, highlight=False, markup=False, emoji=False, quiet=quiet
    )


console = _console()
_errors = _console(stderr=True)


def say(text: str) -> None:
    """Print plain text; it is not broken into lines of its own."""
    console.print(text, soft_wrap=True)


def error(message: str) -> None:
    """Print a message to stderr; its further lines are indented below the first."""
    first, *rest = message.rstrip().split("\n")
    text = Text.assemble(("error: ", "bold red"), first)
    for line in rest:
        text.append(f"\n       {line}")
    _errors.print(text, soft_wrap=True)


def results_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows of values; the columns are the keys, in the order in which they appear.

    A column of numbers has one format: thousands separated, or as many decimals as its size asks
    for. None and NaN are shown as a dash.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print_columns(title, {c: [row.get(c) for row in rows] for c in columns})


def stage_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the stages of a network before or after a phase, and their sum.

    Args:
        title: Heading, such as "phase 1 of 2: head".
        rows: One per stage, with `stage`, `parameters` (count), `trainable` (count, or true and
            false), `lr` (None where frozen), and after a phase `weights` and `buffers`.
    """
    known = ("stage", "parameters", "trainable", "lr")
    columns = list(dict.fromkeys([*known, *(key for row in rows for key in row)]))
    cells: dict[str, list[Any]] = {c: [row.get(c) for row in rows] for c in columns}
    parameters = [int(n or 0) for n in cells["parameters"]]
    trains = list(cells["trainable"])
    counts = [
        n if flag is True else int(flag or 0) for n, flag in zip(parameters, trains, strict=True)
    ]
    cells["trainable"] = [*(n or None for n in counts), sum(counts)]
    cells["parameters"] = [*parameters, sum(parameters)]
    cells["stage"] = [*cells["stage"], "all"]
    for name in columns:
        if name not in ("stage", "parameters", "trainable"):
            cells[name].append("")
    cells["lr"] = [f"{v:.2e}" if isinstance(v, Real) else v for v in cells["lr"]]
    styles = [*("bold green" if n else "" for n in counts), ""]
    print_columns(title, cells, styles=styles, numbers=("lr",), total=True)


def facts(title: str, values: Mapping[str, str]) -> None:
    """Print names and what they stand for, one a line; long texts wrap under themselves."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in values.items():
        table.add_row(name, clean(text))
    print_titled(title, table)


# Rules below the header and above a sum; nothing else, so that a log stays plain.
_RULES = box.Box("    \n    \n ── \n    \n ── \n ── \n    \n    \n")


def new_table(*, gap: int = 3) -> Table:
    """An empty table with a rule below its header; `gap` characters between the columns."""
    return Table(
        box=_RULES,
        show_edge=False,
        pad_edge=False,
        padding=(0, gap - 1, 0, 0),
        header_style="bold",
    )


def print_columns(
    title: str,
    columns: Mapping[str, list[Any]],
    *,
    styles: Sequence[str] = (),
    numbers: Sequence[str] = (),
    total: bool = False,
) -> None:
    """Print columns; `numbers` are aligned like numbers, `total`: the last row is a sum."""
    table = new_table()
    texts = []
    for name, values in columns.items():
        right = name in numbers or _is_numeric(values)
        # Two lines of a row come from long text, never from a number.
        table.add_column(
            Text(name), justify="right" if right else "left", no_wrap=right, overflow="fold"
        )
        texts.append(_formatted(values))
    rows = list(zip(*texts, strict=True))
    for i, row in enumerate(rows):
        if total and i == len(rows) - 1:
            table.add_section()
        table.add_row(*map(Text, row), style=styles[i] if styles else None)
    print_titled(title, table)


def width_of(table: Table) -> int:
    """Characters that a table takes where nothing is squeezed."""
    return console.measure(table, options=console.options.update(width=10_000)).maximum


def print_titled(title: str, table: Table) -> None:
    """A log has no right edge: a table that is wider than usual is not squeezed there."""
    if console.quiet:
        return
    console.print(Text(clean(title), style="bold"), soft_wrap=True)
    if console.is_terminal:
        console.print(table)
    else:
        Console(file=console.file, width=max(width_of(table), LOG_WIDTH)).print(table)
    console.print()


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_numeric(values: Sequence[Any]) -> bool:
    present = [v for v in values if v is not None and v != ""]
    return bool(present) and all(_is_number(v) for v in present)


def _formatted(values: Sequence[Any]) -> list[str]:
    """Texts of one column; all floats of a column get the same number of decimals."""
    sizes = [abs(float(v)) for v in values if _is_number(v) and not isinstance(v, Integral)]
    sizes = [size for size in sizes if math.isfinite(size) and size > 0]
    largest, smallest = (max(sizes), min(sizes)) if sizes else (0.0, 1.0)
    if smallest < 1e-3:
        pattern = ".2e"
    else:
        pattern = f",.{3 if largest <= 1 else 2 if largest < 10 else 1 if largest < 1e4 else 0}f"
    return [_cell(value, pattern) for value in values]


def _cell(value: Any, pattern: str) -> str:
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Integral):
        return f"{int(value):,}"
    if isinstance(value, Real):
        return NOTHING if math.isnan(value) else format(float(value), pattern)
    return clean(str(value))


def clean(text: str) -> str:
    """Names come from folders: control characters would move the cursor or break the table."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
