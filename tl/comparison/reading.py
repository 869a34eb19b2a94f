"""What runs said of their images, and how their training went: from files, many at once."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tl.comparison.records import HISTORY, PREDICTIONS, Record
from tl.evaluation import PairingError, Sheet
from tl.evaluation.sheets import Truth, columns_needed, sheets

READERS = 8  # files at once: a server answers several, and Arrow reads beside Python
MOST_POINTS = 200  # of a curve


@dataclass(frozen=True)
class Said:
    """A run with what it said.

    Args:
        record: The run.
        sheets: Split -> what it said; empty where `why_not` says why.
        why_not: Why it cannot be compared; None where it can.
        curve: As in `compare.json`; None where there is no history.
    """

    record: Record
    sheets: dict[str, Sheet]
    why_not: str | None
    curve: dict[str, Any] | None


def read(
    records: Sequence[Record], note: Callable[[int, int], None] = lambda *_: None
) -> list[Said]:
    """Read predictions and histories of runs.

    Args:
        records: The runs.
        note: Called with the number of runs that are done, and of all.
    """
    known: dict[str, Truth] = {}  # images of a data set, which most runs share
    found = []
    with ThreadPoolExecutor(READERS) as pool:
        for said in pool.map(lambda record: _read(record, known), records):
            found.append(said)
            note(len(found), len(records))
    return found


def _read(record: Record, known: dict[str, Truth]) -> Said:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        path = record.file(PREDICTIONS)
        if path is None:
            return Said(record, {}, record.why_no_predictions(), None)
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            table = file.read(columns=columns_needed(names), use_threads=False)
        found = sheets(table, names, known)
    except PairingError as error:
        return Said(record, {}, str(error), None)
    except (ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        return Said(record, {}, f"its {PREDICTIONS} cannot be read ({reason})", None)
    metric = next(iter(found.values())).metric if found else ""
    return Said(record, found, None, _curve(record, metric))


def _curve(record: Record, metric: str) -> dict[str, Any] | None:
    """The headline on val after each epoch, over all phases; epochs count from 1."""
    path = record.file(HISTORY)
    if path is None:
        return None
    key = f"val/{metric}"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [*csv.DictReader(file)]
    except (OSError, UnicodeDecodeError, csv.Error):
        return None
    points, marks, last = [], [], None
    for epoch, row in enumerate(rows, start=1):
        if row.get("phase") != last:
            last = row.get("phase")
            marks.append({"x": epoch, "phase": last})
        value = _number(row.get(key))
        if value is not None:
            points.append((epoch, value))
    step = math.ceil(len(points) / MOST_POINTS) or 1
    shown = points[::step] + (points[-1:] if points and (len(points) - 1) % step else [])
    x, y = [p[0] for p in shown], [p[1] for p in shown]
    return {"metric": key, "x": x, "y": y, "marks": marks} if shown else None


def _number(text: Any) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None
