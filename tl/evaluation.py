"""What a classifier is worth: metrics with an interval, calibration, a table of predictions.

Pure functions from probabilities to numbers; nothing here knows a network or a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from tl.config import TlError

CALIBRATION_BINS = 15


class EvaluationError(TlError):
    """The predictions cannot be judged, because the network gave no finite probabilities."""


@dataclass(frozen=True)
class Report:
    """Result of one evaluation.

    `metrics` holds `acc` with its 95 % Wilson interval `acc_low` and `acc_high`, `f1_macro` and
    `balanced_acc` (means over the classes that occur), `loss` (mean negative log-likelihood in
    nats), `ece` (expected calibration error) and `images`. All but `loss` and `images` are in
    [0, 1]. `per_class` has one row per class [class, images, precision, recall, f1]; what is
    undefined there (the recall of a class without images) is NaN. `confusion` counts images:
    true classes are its rows, predicted classes its columns.
    """

    split: str
    metrics: dict[str, float]
    per_class: pd.DataFrame
    confusion: NDArray[np.int64]
    classes: tuple[str, ...]

    def flat(self) -> dict[str, float]:
        """The metrics under their names in `metrics.json` and MLflow, such as `val/acc`."""
        return {f"{self.split}/{name}": value for name, value in self.metrics.items()}


def evaluate(
    probabilities: ArrayLike, labels: ArrayLike, classes: Sequence[str], split: str
) -> Report:
    """Judge the predictions for one split.

    Args:
        probabilities: Shape (N, C); each row sums to 1.
        labels: Shape (N,); index of the true class, in [0, C).
        classes: The C class names.
        split: Name of the split, which becomes the prefix of the metrics.

    Raises:
        EvaluationError: A probability is not finite, as happens when a training diverges.
        ValueError: The shapes do not fit each other, or the rows are no probabilities.

    Example:
        >>> p = [[0.9, 0.1], [0.4, 0.6], [0.7, 0.3]]
        >>> report = evaluate(p, [0, 1, 1], ["ant", "bee"], "val")
        >>> round(report.flat()["val/acc"], 3), report.confusion.tolist()
        (0.667, [[1, 0], [1, 1]])
    """
    p, y = _checked(probabilities, labels, classes)
    predicted = p.argmax(axis=1)
    correct = predicted == y
    per_class = _per_class(y, predicted, classes)
    low, high = accuracy_interval(int(correct.sum()), len(y))
    metrics = {
        "acc": float(correct.mean()),
        "acc_low": low,
        "acc_high": high,
        "f1_macro": float(per_class["f1"].mean()),
        "balanced_acc": float(per_class["recall"].mean()),
        "loss": negative_log_likelihood(p, y),
        "ece": calibration_error(p.max(axis=1), correct),
        "images": float(len(y)),
    }
    confusion = confusion_matrix(y, predicted, labels=np.arange(len(classes))).astype(np.int64)
    return Report(split, metrics, per_class, confusion, tuple(classes))


def _checked(
    probabilities: ArrayLike, labels: ArrayLike, classes: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    p, y = np.asarray(probabilities, dtype=np.float64), np.asarray(labels)
    if p.ndim != 2 or len(p) == 0 or p.shape[1] != len(classes) or y.shape != p.shape[:1]:
        msg = (
            f"expected probabilities (N, {len(classes)}) and labels (N,) with N > 0, "
            f"got {p.shape} and {y.shape}"
        )
        raise ValueError(msg)
    if not np.issubdtype(y.dtype, np.integer) or y.min() < 0 or y.max() >= len(classes):
        msg = f"labels must be integers in [0, {len(classes) - 1}]"
        raise ValueError(msg)
    bad = int((~np.isfinite(p)).any(axis=1).sum())
    if bad:
        msg = (
            f"the network gave no finite probabilities for {bad} of {len(p)} images: its training "
            "has diverged; use a lower finetune.head_lr or finetune.precision=32-true"
        )
        raise EvaluationError(msg)
    # Half precision sums to 1 only within about 1 %.
    if p.min() < 0 or np.abs(p.sum(axis=1) - 1).max() > 0.01:
        msg = "each row of probabilities must be non-negative and sum to 1: are these logits?"
        raise ValueError(msg)
    return p, y.astype(np.int64)


def _per_class(
    y: NDArray[np.int64], predicted: NDArray[np.int64], classes: Sequence[str]
) -> pd.DataFrame:
    precision, recall, f1, images = precision_recall_fscore_support(
        y, predicted, labels=np.arange(len(classes)), zero_division=np.nan
    )
    return pd.DataFrame(
        {
            "class": list(classes),
            "images": images.astype(np.int64),
            "precision": precision,
            "recall": recall,
            "f1": f1,
        }
    )


def accuracy_interval(correct: int, images: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of an accuracy; it stays within [0, 1] and is honest for few images.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference",
    JASA 22 (1927).
    """
    interval = binomtest(correct, images).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def negative_log_likelihood(probabilities: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Mean of -log p(true class), in nats; a probability of 0 counts as the smallest float32."""
    p = probabilities[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(p, np.finfo(np.float32).tiny)).mean())


def calibration_error(
    confidence: NDArray[np.float64], correct: NDArray[np.bool_], bins: int = CALIBRATION_BINS
) -> float:
    """Expected calibration error: mean gap of confidence and accuracy over bins of equal width.

    Args:
        confidence: Shape (N,); probability of the predicted class, in [0, 1].
        correct: Shape (N,); whether the prediction is right.
        bins: Number of bins that divide [0, 1].

    Source: Guo et al., "On calibration of modern neural networks", ICML 2017.
    """
    index = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    gap = np.bincount(index, weights=confidence - correct, minlength=bins)
    return float(np.abs(gap).sum() / len(confidence))


def predictions_table(
    table_rows: pd.DataFrame, probabilities: ArrayLike, classes: Sequence[str]
) -> pd.DataFrame:
    """One row per image: what it is, what the network said, and how sure it was.

    Args:
        table_rows: Rows [path, split, label, …] of an image table; `label` is a class index.
        probabilities: Shape (N, C), in the order of the rows.
        classes: The C class names.

    Returns:
        Columns path, split, label, predicted (class names), correct, score (probability of
        `predicted`) and one column `p_<class>` per class.
    """
    p, y = _checked(probabilities, table_rows["label"].to_numpy(), classes)
    names = np.asarray(classes, dtype=object)
    predicted = p.argmax(axis=1)
    columns = {
        "path": table_rows["path"].to_numpy(),
        "split": table_rows["split"].to_numpy(),
        "label": names[y],
        "predicted": names[predicted],
        "correct": predicted == y,
        "score": p.max(axis=1).astype(np.float32),
    }
    shares = pd.DataFrame(p.astype(np.float32), columns=[f"p_{name}" for name in classes])
    return pd.concat([pd.DataFrame(columns), shares], axis=1)
