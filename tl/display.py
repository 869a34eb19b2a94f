"""What a person sees: tables, progress and errors, alike readable on a terminal and in a log file.

The pictures are in `tl.figures`; `save_confusion` and `save_curves` are reachable from here too.
"""

from __future__ import annotations

import io
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from tl.figures import save_confusion, save_curves

if TYPE_CHECKING:
    import pandas as pd

    from tl.evaluation import Report

__all__ = [
    "bar",
    "console",
    "error",
    "facts",
    "predictions",
    "report",
    "results_table",
    "save_confusion",
    "save_curves",
    "say",
    "stage_table",
    "summary",
]

MOST_PREDICTIONS = 10  # rows of the table of predictions
LOG_WIDTH = 100  # characters of a line where there is no terminal
MOST_CLASSES = 20  # rows of the per-class table
MOST_CONFUSION_CLASSES = 12
NOTHING = "–"


def _console(*, stderr: bool = False) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    if isinstance(stream, io.TextIOWrapper) and "utf" not in stream.encoding.lower():
        # A class name must not break a job only because the log is in another encoding.
        stream.reconfigure(errors="replace")
    width = None if stream is not None and stream.isatty() else LOG_WIDTH
    return Console(width=width, stderr=stderr, highlight=False, markup=False, emoji=False)


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


# --- tables -------------------------------------------------------------------------------------


def results_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows of values; the columns are the keys, in the order in which they appear.

    A column of numbers has one format: thousands separated, or as many decimals as its size asks
    for. None and NaN are shown as a dash.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    _print_table(title, {c: [row.get(c) for row in rows] for c in columns})


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
    _print_table(title, cells, styles=styles, numbers=("lr",), total=True)


def facts(title: str, values: Mapping[str, str]) -> None:
    """Print names and what they stand for, one a line; long texts wrap under themselves."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in values.items():
        table.add_row(name, _clean(text))
    _print(title, table)


def predictions(table: pd.DataFrame) -> None:
    """Print the first predictions, how many images each class got, and how many were unusable."""
    rows = [
        {"image": r.source, "label": r.error or r.label, "score": r.score}
        for r in table.head(MOST_PREDICTIONS).itertuples()
    ]
    _print_table("predictions", {k: [row[k] for row in rows] for k in ("image", "label", "score")})
    if len(table) <= MOST_PREDICTIONS:
        return
    counts = table["label"].value_counts().head(MOST_CLASSES)
    say(f"… and {len(table) - MOST_PREDICTIONS:,} more")
    results_table("images by class", [{"class": k, "images": int(v)} for k, v in counts.items()])
    bad = int(table["error"].notna().sum())
    if bad:
        say(f"{bad:,} images could not be read: see column error")


def summary(reports: Sequence[Report], places: Mapping[str, str]) -> None:
    """Print what a job found, and where everything is."""
    for one in reports:
        report(one)
    facts("where everything is", places)


def report(report: Report) -> None:
    """Print metrics, the per-class table, and the confusion matrix where it fits a screen."""
    say(_headline(report) + "\n")
    _per_class_table(report)
    if len(report.classes) <= MOST_CONFUSION_CLASSES:
        _confusion_table(report)


def _headline(report: Report) -> str:
    m = report.metrics
    acc, low, high = (f"{100 * m[key]:.1f} %" for key in ("acc", "acc_low", "acc_high"))
    return (
        f"{report.split}: accuracy {acc} (95 % interval {low} to {high}), "
        f"{int(m['images']):,} images\n"
        f"{' ' * len(report.split)}  macro F1 {m['f1_macro']:.3f}, balanced accuracy "
        f"{m['balanced_acc']:.3f}, loss {m['loss']:.3f}, calibration error {m['ece']:.3f}"
    )


def _per_class_table(report: Report) -> None:
    table = report.per_class
    left = len(table) - MOST_CLASSES
    title = f"{report.split}: per class"
    if left > 0:
        table = table.sort_values("f1", kind="stable", na_position="last").head(MOST_CLASSES)
        title += f", the {MOST_CLASSES} with the lowest F1 ({left:,} more are not shown)"
    _print_table(title, {str(name): list(table[name]) for name in table.columns})


def _confusion_table(report: Report) -> None:
    """Rows are true classes; where the names are long, the columns have numbers."""
    names = [_clean(name) for name in report.classes]
    heads = names
    if sum(max(cell_len(name), 4) + 2 for name in names) + max(map(cell_len, names)) > LOG_WIDTH:
        heads = [str(i) for i in range(1, len(names) + 1)]
        names = [f"{i:>2} {name}" for i, name in enumerate(names, start=1)]
    table = _new_table(gap=2)
    table.add_column("", no_wrap=True)
    for head in heads:
        table.add_column(Text(head), justify="right", no_wrap=True)
    for i, (name, counts) in enumerate(zip(names, report.confusion, strict=True)):
        cells = [
            Text(f"{n:,}" if n else "·", style="bold green" if i == j else "red" if n else "dim")
            for j, n in enumerate(counts)
        ]
        table.add_row(Text(name), *cells)
    if console.is_terminal and _width(table) > console.width:
        say(f"{report.split}: the confusion matrix is wider than this window; see its picture")
        return
    _print(f"{report.split}: confusion (rows: true class, columns: predicted class)", table)


# Rules below the header and above a sum; nothing else, so that a log stays plain.
_RULES = box.Box("    \n    \n ── \n    \n ── \n ── \n    \n    \n")


def _new_table(*, gap: int = 3) -> Table:
    return Table(
        box=_RULES,
        show_edge=False,
        pad_edge=False,
        padding=(0, gap - 1, 0, 0),
        header_style="bold",
    )


def _print_table(
    title: str,
    columns: Mapping[str, list[Any]],
    *,
    styles: Sequence[str] = (),
    numbers: Sequence[str] = (),
    total: bool = False,
) -> None:
    """Print columns; `numbers` are aligned like numbers, `total`: the last row is a sum."""
    table = _new_table()
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
    _print(title, table)


def _width(table: Table) -> int:
    return console.measure(table, options=console.options.update(width=10_000)).maximum


def _print(title: str, table: Table) -> None:
    """A log has no right edge: a table that is wider than usual is not squeezed there."""
    console.print(Text(_clean(title), style="bold"), soft_wrap=True)
    if console.is_terminal:
        console.print(table)
    else:
        Console(file=console.file, width=max(_width(table), LOG_WIDTH)).print(table)
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
    return _clean(str(value))


def _clean(text: str) -> str:
    """Names come from folders: control characters would move the cursor or break the table."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


# --- progress -----------------------------------------------------------------------------------


@contextmanager
def bar(
    title: str, unit: str = "images", every_s: float = 10.0
) -> Iterator[Callable[[int, int], None]]:
    """Show progress: a bar on a terminal, one plain line every `every_s` seconds in a log.

    Yields:
        A function of (done, total); it may be called as often as one likes.

    Example:
        >>> with bar("checking images") as update:
        ...     update(3, 10)
    """
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit, markup=False),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(title, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)
        return
    last = time.monotonic()

    def log(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= every_s:
            last = now
            say(f"{title}: {done:,} of {total:,} {unit}")

    yield log
