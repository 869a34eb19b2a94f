"""One label an image: accuracy, calibration, confusion."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from tl.evaluation.report import Report, refuse_infinite

CALIBRATION_BINS = 15
MOST_CONFUSED = 2000  # classes up to which there is a matrix: beyond, hundreds of megabytes


def judge_single(
    probabilities: ArrayLike, targets: ArrayLike, classes: Sequence[str], split: str
) -> Report:
    """Judge the predictions of one label an image; see `tl.evaluation.evaluate`."""
    p, y = checked(probabilities, targets, classes)
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
    confusion = None
    if len(classes) <= MOST_CONFUSED:
        labels = np.arange(len(classes))
        confusion = confusion_matrix(y, predicted, labels=labels).astype(np.int64)
    return Report(split, metrics, per_class, confusion, tuple(classes))


def checked(
    probabilities: ArrayLike, labels: ArrayLike, classes: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Probabilities and labels as arrays.

    Raises:
        EvaluationError: A probability is not finite.
        ValueError: They do not fit each other, or are no probabilities.
    """
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
    refuse_infinite(p, "probabilities")
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
