"""What a job found: predictions, metrics, per-class tables, confusion matrices, places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.text import Text

from tl.config import Task
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
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    from tl.evaluation import Report

MOST_PREDICTIONS = 10  # rows of the table of predictions
MOST_CLASSES = 20  # rows of the per-class table
MOST_CONFUSION_CLASSES = 12


def predictions(table: pd.DataFrame) -> None:
    """Print the first predictions, how many images each class got, and how many were unusable.

    Args:
        table: What `tl.bundle.Bundle.predict` returned, of any task.
    """
    first = table.head(MOST_PREDICTIONS)
    print_columns("predictions", {"image": list(first["source"]), **_said(first)})
    if "sure" in table:
        say(f"{int(table['sure'].sum()):,} of {len(table):,} answers are sure (column sure)")
    if len(table) <= MOST_PREDICTIONS:
        return
    say(f"… and {len(table) - MOST_PREDICTIONS:,} more")
    if "value" in table:
        quantiles = table["value"].quantile([0, 0.25, 0.5, 0.75, 1])
        names = ("lowest", "25 %", "median", "75 %", "highest")
        results_table("values", [dict(zip(names, quantiles, strict=True))])
    else:
        said = table["label"] if "label" in table else table["labels"].explode()
        counts = said.value_counts().head(MOST_CLASSES)
        title = "images by class" if "label" in table else "images by label"
        results_table(title, [{title[10:]: k, "images": int(v)} for k, v in counts.items()])
    bad = int(table["error"].notna().sum())
    if bad:
        say(f"{bad:,} images could not be read: see column error")


def _said(table: pd.DataFrame) -> dict[str, list[Any]]:
    """Columns of what the model said, with the error where an image could not be used."""
    errors = [error if isinstance(error, str) else None for error in table["error"]]
    if "value" in table:
        values = {"value": list(table["value"])}
        return values | ({"error": errors} if any(errors) else {})
    if "label" in table:
        labels = [e or name for e, name in zip(errors, table["label"], strict=True)]
        marks = {"sure": ["yes" if s else "no" for s in table["sure"]]} if "sure" in table else {}
        return {"label": labels, "score": list(table["score"]), **marks}
    texts = [
        error or ", ".join(f"{n} {s:.3f}" for n, s in zip(names, scores, strict=True)) or "none"
        for error, names, scores in zip(errors, table["labels"], table["scores"], strict=True)
    ]
    return {"labels above their thresholds": texts}


def summary(reports: Sequence[Report], places: Mapping[str, str]) -> None:
    """Print what a job found, and where everything is."""
    for one in reports:
        report(one)
    facts("where everything is", places)


def report(report: Report) -> None:
    """Print metrics, the per-class table, and the confusion matrix where it fits a screen."""
    headline = {
        Task.single: _headline,
        Task.multi: _headline_of_labels,
        Task.regression: _headline_of_numbers,
    }
    say(headline[report.task](report) + "\n")
    if report.task is Task.regression:
        columns = {str(name): list(report.per_class[name]) for name in report.per_class.columns}
        print_columns(f"{report.split}: error by range of {clean(report.classes[0])}", columns)
        return
    _per_class_table(report)
    if report.confusion is not None and len(report.classes) <= MOST_CONFUSION_CLASSES:
        _confusion_table(report, report.confusion)


def _headline(report: Report) -> str:
    m = report.metrics
    acc, low, high = (f"{100 * m[key]:.1f} %" for key in ("acc", "acc_low", "acc_high"))
    return (
        f"{report.split}: accuracy {acc} (95 % interval {low} to {high}), "
        f"{int(m['images']):,} images\n"
        f"{' ' * len(report.split)}  macro F1 {m['f1_macro']:.3f}, balanced accuracy "
        f"{m['balanced_acc']:.3f}, loss {m['loss']:.3f}\n"
        f"{' ' * len(report.split)}  calibration error {_calibration(report)}"
        + _sure(report)
        + _worst_group(report)
    )


def _calibration(report: Report) -> str:
    """Calibration error, and what the temperature made of it."""
    m, found = report.metrics, report.temperature
    if found is None or found.value == 1:
        return f"{m['ece']:.3f}"
    return f"{m['ece']:.3f} ({m['ece_uncalibrated']:.3f} without temperature {found.value:.2f})"


def _sure(report: Report) -> str:
    """How many answers are sure, and how many of these are right; a line, or nothing."""
    m, space = report.metrics, " " * len(report.split)
    if report.abstain is None:
        return ""
    if report.abstain.threshold is None:
        return f"\n{space}  sure of none: {report.abstain.note}"
    text = f"\n{space}  sure from {report.abstain.threshold:.3f}: {100 * m['sure_share']:.1f} %"
    if "sure_acc" in m:
        right, low, high = (f"{100 * m[f'sure_acc{end}']:.1f}" for end in ("", "_low", "_high"))
        text += f" of the images, {right} % of these right ({low} to {high})"
    found = report.temperature
    here = report.split == "val" and found is not None and found.images
    return text + ("; chosen on these images" if here else "")


def _worst_group(report: Report) -> str:
    """The group of images that is served worst; a line, or nothing."""
    m, space = report.metrics, " " * len(report.split)
    names = [name for name in m if name.startswith("worst_group_")]
    if not names or report.groups is None:
        return ""
    value = m[names[0]]
    large = report.groups[~report.groups["small"]]
    name = clean(str(large["group"].iloc[int((large["value"] - value).abs().argmin())]))
    low, high = m[f"{names[0]}_low"], m[f"{names[0]}_high"]
    what = {"acc": "accuracy", "hamming": "wrong decisions", "mae": "mean absolute error"}
    said = what[names[0].removeprefix("worst_group_")]
    return (
        f"\n{space}  worst of {int(m['groups']):,} groups: {name}, {said} {value:.3g} "
        f"({low:.3g} to {high:.3g}), {int(m['worst_group_images']):,} images"
    )


def _headline_of_labels(report: Report) -> str:
    m, space = report.metrics, " " * len(report.split)
    chosen = "these images" if report.split == "val" else "val"
    return (
        f"{report.split}: mAP {m['map']:.3f} (95 % interval {m['map_low']:.3f} to "
        f"{m['map_high']:.3f}), {int(m['images']):,} images\n"
        f"{space}  with the thresholds chosen on {chosen}: macro F1 {m['f1_macro']:.3f}, micro F1 "
        f"{m['f1_micro']:.3f},\n"
        f"{space}  all labels right {100 * m['exact_match']:.1f} %, wrong decisions "
        f"{100 * m['hamming']:.1f} %; loss {m['loss']:.3f}, calibration error "
        f"{_calibration(report)}" + _worst_group(report)
    )


def _headline_of_numbers(report: Report) -> str:
    m, space = report.metrics, " " * len(report.split)

    def with_interval(name: str) -> str:
        low, high = m[f"{name}_low"], m[f"{name}_high"]
        return f"{m[name]:.4g} (95 % interval {low:.4g} to {high:.4g})"

    r2 = f"R² {with_interval('r2')}" if "r2" in m else "no R²: all have the same target"
    return (
        f"{report.split}: mean absolute error of {clean(report.classes[0])} "
        f"{with_interval('mae')}, {int(m['images']):,} images\n"
        f"{space}  root mean square error {with_interval('rmse')}, {r2}" + _worst_group(report)
    )


def _per_class_table(report: Report) -> None:
    table, score = report.per_class, "ap" if report.task is Task.multi else "f1"
    left = len(table) - MOST_CLASSES
    title = f"{report.split}: per class"
    if left > 0:
        table = table.sort_values(score, kind="stable", na_position="last").head(MOST_CLASSES)
        lowest = f"the {MOST_CLASSES} with the lowest {score.upper()}"
        title += f", {lowest} ({left:,} more are not shown)"
    names = ("class", "images", "ap", "threshold", "precision", "recall", "f1")
    shown = names if report.task is Task.multi else [n for n in names if n not in names[2:4]]
    columns: dict[str, list[Any]] = {name: list(table[name]) for name in shown}
    sure = "ap" if report.task is Task.multi else "recall"
    limits = zip(table[f"{sure}_low"], table[f"{sure}_high"], strict=True)
    columns[f"95 % of {sure}"] = [f"{a:.2f} to {b:.2f}" if a == a else "" for a, b in limits]
    print_columns(title, columns)


def _confusion_table(report: Report, confusion: NDArray[np.int64]) -> None:
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
    for i, (name, counts) in enumerate(zip(names, confusion, strict=True)):
        cells = [
            Text(f"{n:,}" if n else "·", style="bold green" if i == j else "red" if n else "dim")
            for j, n in enumerate(counts)
        ]
        table.add_row(Text(name), *cells)
    if console.is_terminal and width_of(table) > console.width:
        say(f"{report.split}: the confusion matrix is wider than this window; see its picture")
        return
    print_titled(f"{report.split}: confusion (rows: true class, columns: predicted class)", table)
