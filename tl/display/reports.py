"""What a job found: predictions, metrics, per-class tables, confusion matrices, places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.text import Text

from tl.display.tables import (
    LOG_WIDTH,
    clean,
    console,
    facts,
    new_table,
    print_columns,
    print_titled,
    results_table,
    say,
    width_of,
)

if TYPE_CHECKING:
    import pandas as pd

    from tl.evaluation import Report

MOST_PREDICTIONS = 10  # rows of the table of predictions
MOST_CLASSES = 20  # rows of the per-class table
MOST_CONFUSION_CLASSES = 12


def predictions(table: pd.DataFrame) -> None:
    """Print the first predictions, how many images each class got, and how many were unusable."""
    rows = [
        {"image": r.source, "label": r.error or r.label, "score": r.score}
        for r in table.head(MOST_PREDICTIONS).itertuples()
    ]
    print_columns("predictions", {k: [row[k] for row in rows] for k in ("image", "label", "score")})
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
    print_columns(title, {str(name): list(table[name]) for name in table.columns})


def _confusion_table(report: Report) -> None:
    """Rows are true classes; where the names are long, the columns have numbers."""
    names = [clean(name) for name in report.classes]
    heads = names
    if sum(max(cell_len(name), 4) + 2 for name in names) + max(map(cell_len, names)) > LOG_WIDTH:
        heads = [str(i) for i in range(1, len(names) + 1)]
        names = [f"{i:>2} {name}" for i, name in enumerate(names, start=1)]
    table = new_table(gap=2)
    table.add_column("", no_wrap=True)
    for head in heads:
        table.add_column(Text(head), justify="right", no_wrap=True)
    for i, (name, counts) in enumerate(zip(names, report.confusion, strict=True)):
        cells = [
            Text(f"{n:,}" if n else "·", style="bold green" if i == j else "red" if n else "dim")
            for j, n in enumerate(counts)
        ]
        table.add_row(Text(name), *cells)
    if console.is_terminal and width_of(table) > console.width:
        say(f"{report.split}: the confusion matrix is wider than this window; see its picture")
        return
    print_titled(f"{report.split}: confusion (rows: true class, columns: predicted class)", table)
