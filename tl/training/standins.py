"""Classes in the place of several labels or of a number, for what is measured with classes alone.

How well the features of each stage tell images apart, and whether flips keep them apart, is asked
of classes (`tl.evidence`, `tl.training.selection`). Of several labels the rarest says most about an
image. Of a number the halves: for normal numbers whose correlation with the best linear guess is r,
the quality of telling them apart is 2/pi asin(r), which lies between r squared and r.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tl.config import Task
from tl.data.table import ImageTable

Indices = NDArray[np.int64]
NOTES = {
    Task.multi: "an image has several labels: similarity is measured by the rarest label of each, "
    "and those without a label are a class of their own",
    Task.regression: "a number has no classes: amount and similarity are measured by its lower and "
    "upper half, and classes are these two",
}


def classes_of(table: ImageTable, rows: pd.DataFrame) -> Indices:
    """A class index of each of some rows (N,): its class, its rarest label, or its half.

    Args:
        table: Images; train says which labels are rare, and where the middle is.
        rows: Of the table.
    """
    targets = table.targets(rows)
    if table.task is Task.single:
        return np.asarray(targets, np.int64)
    train = table.targets("train")
    if table.task is Task.regression:
        bound, inclusive = middle(train)
        return np.asarray(targets >= bound if inclusive else targets > bound, np.int64)
    rank = np.argsort(np.argsort(train.sum(axis=0), kind="stable"))
    none = targets.shape[1]
    rarest = np.where(targets > 0, rank, none).argmin(axis=1)
    return np.asarray(np.where(targets.any(axis=1), rarest, none), np.int64)


def class_counts(table: ImageTable, rows: pd.DataFrame) -> Indices:
    """Images of each class, with each label, or of each half, among some rows."""
    if table.task is Task.multi:
        return np.asarray(table.targets(rows).sum(axis=0), np.int64)
    number = 2 if table.task is Task.regression else len(table.classes)
    return np.bincount(classes_of(table, rows), minlength=number)


def middle(train: NDArray[np.floating]) -> tuple[float, bool]:
    """The median, and whether it belongs to the upper half.

    Where many numbers are equal, the halves are as even as they can be.

    Example:
        >>> middle(np.array([1.0, 2, 2, 2, 3, 3]))
        (2.0, False)
    """
    median = float(np.median(train))
    above, from_it = (train > median).mean(), (train >= median).mean()
    return median, bool(abs(from_it - 0.5) < abs(above - 0.5))
