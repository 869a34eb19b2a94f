"""Tables of predictions, one row an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from tl.config import Task
from tl.evaluation import multi, regression, single

KEPT = ("path", "split", "sha256", "group")  # what the table of images says of each


def predictions_table(
    table_rows: pd.DataFrame,
    outputs: ArrayLike,
    classes: Sequence[str],
    *,
    task: Task = Task.single,
    targets: ArrayLike | None = None,
    thresholds: Sequence[float] | None = None,
) -> pd.DataFrame:
    """One row per image: what it is, what the network said, and how sure it was.

    Args:
        table_rows: Rows [path, split, label, …] of an image table; `label` is a class index. Its
            sha256 and group are kept where it has them.
        outputs: As for `evaluate`, in the order of the rows.
        classes: The C class names.
        task: What the images are labelled with.
        targets: As for `evaluate`; default: the column `label`.
        thresholds: For several labels: the probability from which each class counts as present.

    Returns:
        Columns path and split, sha256 (of the bytes of the image, by which the predictions of
        several runs are paired; empty where nobody looked) and group, as the rows have them; then
        label, predicted (class names), correct, score (probability of `predicted`) and one column
        `p_<class>` per class. For several labels: labels, predicted (lists of class names),
        correct (all of them right), wrong (number of classes that are too many or missing) and the
        `p_<class>`. For regression: target, predicted, error.
    """
    truth = table_rows["label"].to_numpy() if targets is None else targets
    known = [name for name in KEPT if name in table_rows]
    columns: dict[str, Any] = {name: table_rows[name].to_numpy() for name in known}
    if task is Task.regression:
        v, t = regression.checked(outputs, truth)
        return pd.DataFrame(columns | {"target": t, "predicted": v, "error": v - t})
    names = np.asarray(classes, dtype=object)
    if task is Task.multi:
        p, present = multi.checked(outputs, truth, classes)
        said = p >= np.asarray(thresholds, dtype=np.float64)
        wrong = (said != present).sum(axis=1)
        columns |= {
            "labels": _names(present, names),
            "predicted": _names(said, names),
            "correct": wrong == 0,
            "wrong": wrong,
        }
    else:
        p, y = single.checked(outputs, truth, classes)
        predicted = p.argmax(axis=1)
        columns |= {
            "label": names[y],
            "predicted": names[predicted],
            "correct": predicted == y,
            "score": p.max(axis=1).astype(np.float32),
        }
    return _with_shares(columns, p, classes)


def _with_shares(
    columns: dict[str, Any], p: NDArray[np.float64], classes: Sequence[str]
) -> pd.DataFrame:
    """The columns, and the probability of each class."""
    shares = pd.DataFrame(p.astype(np.float32), columns=[f"p_{name}" for name in classes])
    return pd.concat([pd.DataFrame(columns), shares], axis=1)


def _names(present: NDArray[np.bool_], names: NDArray[np.object_]) -> list[list[str]]:
    return [names[row].tolist() for row in present]
