"""Files of what was judged: tables of classes and groups, and what the scores are worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tl.config import Task

if TYPE_CHECKING:
    import pandas as pd

    from tl.evaluation import Report
    from tl.runs.folder import RunFolder

CALIBRATION = "calibration.json"


def write_judged(folder: RunFolder, reports: Sequence[Report]) -> None:
    """Write `per_class.csv`, `groups.csv` where there are groups, and `calibration.json`.

    Args:
        folder: Of a run or of an evaluation.
        reports: One a split.
    """
    import pandas as pd

    for name, tables in (
        ("per_class.csv", [(r.split, r.per_class) for r in reports]),
        ("groups.csv", [(r.split, r.groups) for r in reports if r.groups is not None]),
    ):
        if tables:
            parts = [table.assign(split=split) for split, table in tables]
            whole = pd.concat(parts, ignore_index=True)
            whole = whole[["split", *(c for c in whole.columns if c != "split")]]
            folder.write_text(name, whole.to_csv(index=False))
    if reports[0].task is not Task.regression:
        folder.write_json(CALIBRATION, _calibration(reports))


def _calibration(reports: Sequence[Report]) -> dict[str, Any]:
    """What the scores of a model are worth, as plain values."""
    found, abstain = reports[0].temperature, reports[0].abstain
    return {
        "temperature": found.value if found else 1.0,
        "note": found.note if found else "not asked for",
        "images": found.images if found else 0,
        "abstain": asdict(abstain) if abstain else None,
        "splits": {report.split: _of_split(report) for report in reports},
    }


def _of_split(report: Report) -> dict[str, Any]:
    names = ("ece", "ece_low", "ece_high", "ece_uncalibrated")
    known = {name: report.metrics[name] for name in names}
    bins = {"bins": report.bins, "bins_uncalibrated": report.bins_uncalibrated}
    return known | {name: _rows(table) for name, table in bins.items() if table is not None}


def _rows(table: pd.DataFrame) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = table.to_dict("records")  # type: ignore[assignment]
    return rows
