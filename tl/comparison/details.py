"""What two runs do differently: classes, images with small pictures; and how sure each run is."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tl.bundle.images import ImageError, open_image
from tl.comparison.judging import Group
from tl.comparison.records import PREDICTIONS, Record
from tl.config import Task
from tl.evaluation import Sheet
from tl.evaluation.multi import average_precision
from tl.pages import thumbnail

BINS = 10  # of a reliability diagram: 15 leave too few images in each for most test splits
MOST_CLASSES = 60  # with the largest changes
MOST_CELLS = 20_000  # runs x classes up to which each run lists all its classes
MOST_LISTED = 200  # classes of a run that are listed
MOST_RANKED = 50  # runs whose classes are ranked, for several labels
MOST_FLIPS = 60


def reliability(sheet: Sheet) -> dict[str, list[Any]] | None:
    """Confidence and accuracy by bins of confidence that have images; one label an image only."""
    if sheet.score is None:
        return None
    bins = np.minimum((sheet.score * BINS).astype(np.int64), BINS - 1)
    images = np.bincount(bins, minlength=BINS)
    there = images > 0
    right = sheet.said == sheet.truth.truth
    confidence = np.bincount(bins, weights=sheet.score, minlength=BINS)[there] / images[there]
    accuracy = np.bincount(bins, weights=right, minlength=BINS)[there] / images[there]
    return {
        "confidence": _rounded(confidence),
        "accuracy": _rounded(accuracy),
        "images": images[there].tolist(),
    }


def by_class(group: Group, sheets: Sequence[Sheet]) -> NDArray[np.float64] | None:
    """How good each run is at each class, (runs, classes); NaN for classes without images.

    Recall, or average precision with several labels, of the `MOST_RANKED` best runs then; None for
    regression.

    Args:
        group: Of the runs.
        sheets: What they said, in the order of the group.
    """
    truth = group.truth
    if truth.task is Task.regression:
        return None
    if truth.task is Task.single:
        images = np.bincount(truth.truth, minlength=len(truth.classes))
        right = [
            np.bincount(truth.truth[s.said == truth.truth], minlength=len(truth.classes))
            for s in sheets
        ]
        with np.errstate(invalid="ignore"):
            recall: NDArray[np.float64] = np.array(right) / images
        return recall
    found = np.full((len(sheets), len(truth.classes)), np.nan)
    once = np.ones((1, len(truth)))
    for row, sheet in enumerate(sheets[:MOST_RANKED]):
        for k in np.flatnonzero(truth.truth.any(axis=0)):
            found[row, k] = average_precision(sheet.said[:, k], truth.truth[:, k], once)[0]
    return found


def changed_classes(
    group: Group, figures: NDArray[np.float64] | None, pair: tuple[int, int] | None
) -> list[dict[str, Any]]:
    """Classes in which two runs differ most, with the worst and the best of all runs."""
    if figures is None or pair is None:
        return []
    truth = group.truth
    single = truth.task is Task.single
    counts = np.bincount(truth.truth, minlength=len(truth.classes)) if single else None
    images = counts if counts is not None else truth.truth.sum(axis=0)
    a, b = figures[pair[0]], figures[pair[1]]
    change = np.nan_to_num(np.abs(a - b), nan=-1)
    order = np.argsort(-change, kind="stable")[:MOST_CLASSES]
    there = np.isfinite(figures).all(axis=1)
    known = figures[there] if there.any() else figures
    return [
        {
            "class": truth.classes[k],
            "images": int(images[k]),
            "worst": _plain(known[:, k].min()),
            "best": _plain(known[:, k].max()),
            "a": _plain(a[k]),
            "b": _plain(b[k]),
        }
        for k in order.tolist()
        if change[k] > 0
    ]


def flips(
    group: Group, a: tuple[Record, Sheet], b: tuple[Record, Sheet], *, pictures: bool
) -> list[dict[str, Any]]:
    """Images that one of two runs has right, or much nearer, and the other has not.

    The surest changes first, those for the one and those for the other in turn.

    Args:
        group: Of both.
        a: One run and what it said.
        b: The other.
        pictures: Whether to make small pictures of images that are still in the run's data folder.
    """
    gain = _gain(group, a[1], b[1])
    order = np.argsort(-np.abs(gain), kind="stable")
    sides = [order[gain[order] > 0], order[gain[order] < 0]]
    half = MOST_FLIPS // 2
    most = [max(half, MOST_FLIPS - len(side)) for side in reversed(sides)]
    turns = [side[:n].tolist() for side, n in zip(sides, most, strict=True)]
    longest = max(map(len, turns))
    chosen = [rows[i] for i in range(longest) for rows in turns if i < len(rows)]
    said = [_answers(record, sheet) for record, sheet in (a, b)]
    roots = [Path(root) for r, _ in (a, b) if (root := r.params.get("data.root"))]
    return [
        {
            "image": str(group.truth.path[i]),
            "sha256": str(group.truth.sha256[i]),
            "label": _label(group, i),
            "a": {"run": a[0].id, **said[0](i)},
            "b": {"run": b[0].id, **said[1](i)},
            "thumbnail": _picture(group, i, roots) if pictures else None,
        }
        for i in chosen
    ]


def _gain(group: Group, a: Sheet, b: Sheet) -> NDArray[np.float64]:
    """By how much a is better than b at each image; 0 where neither is."""
    truth = group.truth
    if truth.task is Task.single and a.score is not None and b.score is not None:
        right = (a.said == truth.truth).astype(float) - (b.said == truth.truth)
        gain: NDArray[np.float64] = right * (a.score + b.score)
        return gain
    if truth.task is Task.regression:
        error: NDArray[np.float64] = np.abs(b.said - truth.truth) - np.abs(a.said - truth.truth)
        return error
    wrong = [np.abs(sheet.said - truth.truth).mean(axis=1) for sheet in (b, a)]
    return np.asarray(wrong[0] - wrong[1], dtype=np.float64)


def _answers(record: Record, sheet: Sheet) -> Any:
    """Row of the sheet -> what the run said of that image, and how sure it was."""
    truth = sheet.truth
    if truth.task is Task.single:

        def single(row: int) -> dict[str, Any]:
            assert sheet.score is not None
            name = truth.classes[int(sheet.said[row])]
            return {"predicted": name, "score": round(float(sheet.score[row]), 4)}

        return single
    if truth.task is Task.regression:
        return lambda row: {"predicted": f"{float(sheet.said[row]):.4g}", "score": None}
    names = _named_labels(record, sheet)
    return lambda row: {"predicted": ", ".join(names[row]) or "none", "score": None}


def _named_labels(record: Record, sheet: Sheet) -> list[list[str]]:
    """With several labels what counts as said depends on thresholds: the run's own table has it."""
    import pandas as pd

    path = record.file(PREDICTIONS)
    assert path is not None  # it was read before
    table = pd.read_parquet(path, columns=["split", "predicted"])
    rows = table["predicted"][table["split"].astype(str) == sheet.split]
    return [list(rows.iloc[i]) for i in sheet.truth.order.tolist()]


def _label(group: Group, row: int) -> str:
    truth = group.truth
    if truth.task is Task.regression:
        return f"{float(truth.truth[row]):.4g}"
    if truth.task is Task.single:
        return truth.classes[int(truth.truth[row])]
    names = [truth.classes[k] for k in np.flatnonzero(truth.truth[row])]
    return ", ".join(names) or "none"


def _picture(group: Group, row: int, roots: Sequence[Path]) -> str | None:
    """A small picture, where a file of that name still has the very bytes that were judged."""
    for root in roots:
        path = root / str(group.truth.path[row])
        try:
            contents = path.read_bytes()
            if hashlib.sha256(contents).hexdigest() == str(group.truth.sha256[row]):
                return thumbnail(open_image(contents))
        except (OSError, ValueError, ImageError):
            continue
    return None


def listed(
    group: Group, figures: NDArray[np.float64] | None
) -> list[dict[str, float | None] | None]:
    """Class -> figure for each run of a group, where there are not too many to list."""
    count = len(group.truth.classes)
    if figures is None or count > MOST_LISTED or figures.size > MOST_CELLS:
        return [None] * len(group.ids)
    rows = figures.round(4).tolist()
    return [dict(zip(group.truth.classes, map(_plain, row), strict=True)) for row in rows]


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _rounded(values: NDArray[np.float64]) -> list[float]:
    rounded: list[float] = values.round(4).tolist()
    return rounded
