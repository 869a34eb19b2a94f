"""One label an image: accuracy, ranking, calibration, confusion."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_matrix
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix

from tl.evaluation.calibration import CALIBRATION_BINS, bin_of, calibration_error, reliability
from tl.evaluation.groups import by_group, worst_group
from tl.evaluation.ranking import rank
from tl.evaluation.report import Report, refuse_infinite
from tl.evaluation.resampling import figures_with_intervals, shares

MOST_CONFUSED = 2000  # classes up to which there is a matrix: beyond, hundreds of megabytes
TOP = 5

Array = NDArray[np.float64]
Labels = NDArray[np.int64]


def judge_single(
    probabilities: ArrayLike,
    targets: ArrayLike,
    classes: Sequence[str],
    split: str,
    *,
    held_out: ArrayLike | None = None,
    uncalibrated: ArrayLike | None = None,
    sure_from: float | None = None,
    groups: Iterable[object] | None = None,
) -> Report:
    """Judge the predictions of one label an image; see `tl.evaluation.evaluate`."""
    p, y = checked(probabilities, targets, classes)
    honest, raw = (
        p if other is None else checked(other, targets, classes)[0]
        for other in (held_out, uncalibrated)
    )
    predicted, sure = p.argmax(axis=1), p.max(axis=1)
    correct = predicted == y
    low, high = accuracy_interval(int(correct.sum()), len(y))
    figures = _Figures(honest, y, predicted)
    of_all, per_class = _with_intervals(figures, y, predicted, classes)
    ranking = rank(p, _one_hot(y, len(classes)))
    per_class = per_class.assign(ap=ranking.ap, auc=ranking.auc)
    found = by_group(correct.astype(np.float64), groups) if groups is not None else None
    metrics = {
        "acc": float(correct.mean()),
        "acc_low": low,
        "acc_high": high,
        **of_all,
        **ranking.means,
        "loss": negative_log_likelihood(raw, y),
        "ece_uncalibrated": calibration_error(raw.max(axis=1), raw.argmax(axis=1) == y),
        **_of_the_sure(sure, correct, sure_from),
        **worst_group(found, "acc", lowest=True),
        "images": float(len(y)),
    }
    few = len(classes) <= MOST_CONFUSED
    return Report(
        split,
        metrics,
        per_class,
        confusion_matrix(y, predicted, labels=np.arange(len(classes))) if few else None,
        tuple(classes),
        truth=y,
        predicted=p,
        groups=found,
        bins=reliability(honest.max(axis=1), correct),
        bins_uncalibrated=reliability(raw.max(axis=1), raw.argmax(axis=1) == y),
    )


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


class _Figures:
    """Figures of the images for weights (R, N): of all classes together, then F1 of each class.

    Args:
        p: Probabilities, (N, C).
        y: True classes, (N,).
        predicted: Classes, (N,).
    """

    def __init__(self, p: Array, y: Labels, predicted: Labels) -> None:
        images, classes = p.shape
        self.names = ["f1_macro", "balanced_acc", "f1_weighted", "log_loss", "brier", "ece"]
        right, sure = predicted == y, p.max(axis=1)
        of_truth = p[np.arange(images), y]
        means = [
            -np.log(np.maximum(of_truth, np.finfo(np.float32).tiny)),
            np.square(p).sum(axis=1) - 2 * of_truth + 1,
        ]
        if classes > TOP:
            self.names.append("top5")
            means.append((p > of_truth[:, None]).sum(axis=1) < TOP)
        self.means = np.stack(means, axis=1).astype(np.float64)
        self.gaps = np.zeros((images, CALIBRATION_BINS))
        self.gaps[np.arange(images), bin_of(sure)] = sure - right
        self.counts = [
            _indicator(labels, classes, mask)
            for labels, mask in ((y, None), (predicted, None), (y, right))
        ]

    def __call__(self, weights: Array) -> Array:
        """Shape (R, names + classes)."""
        total = weights.sum(axis=1, keepdims=True)
        truth, said, right = ((count @ weights.T).T for count in self.counts)
        there, any_way = truth > 0, truth + said > 0
        with np.errstate(invalid="ignore"):  # 0 of 0 is undefined
            recall, f1 = right / truth, 2 * right / (truth + said)
        macro, balanced = _mean(f1, any_way), _mean(recall, there)
        weighted = (np.where(there, f1, 0) * truth).sum(axis=1, keepdims=True) / total
        means = weights @ self.means / total
        ece = np.abs(weights @ self.gaps).sum(axis=1, keepdims=True) / total
        parts = [macro, balanced, weighted, means[:, :2], ece, means[:, 2:], f1]
        return np.concatenate(parts, axis=1)


def _mean(values: Array, defined: NDArray[np.bool_]) -> Array:
    """Mean over the classes where a figure is defined, (R, 1)."""
    sums = np.where(defined, values, 0).sum(axis=1, keepdims=True)
    found: Array = sums / defined.sum(axis=1, keepdims=True)
    return found


def _indicator(labels: Labels, classes: int, mask: NDArray[np.bool_] | None) -> csr_matrix:
    """Which images are of which class, (classes, images)."""
    images = np.arange(len(labels)) if mask is None else np.flatnonzero(mask)
    places = (labels[images], images)
    return csr_matrix((np.ones(len(images)), places), shape=(classes, len(labels)))


def _one_hot(labels: Labels, classes: int) -> NDArray[np.bool_]:
    found = np.zeros((len(labels), classes), bool)
    found[np.arange(len(labels)), labels] = True
    return found


def _with_intervals(
    figures: _Figures, y: Labels, predicted: Labels, classes: Sequence[str]
) -> tuple[dict[str, float], pd.DataFrame]:
    """Figures of all classes with their 95 % intervals, and the table of the classes."""
    of_all, f1 = figures_with_intervals(figures, len(y), width=4)
    number = len(classes)
    truth, said, right = (
        np.bincount(labels, minlength=number) for labels in (y, predicted, y[predicted == y])
    )
    table: dict[str, object] = {"class": list(classes), "images": truth}
    table |= shares("precision", right, said) | shares("recall", right, truth) | f1
    return of_all, pd.DataFrame(table)


def _of_the_sure(
    scores: Array, correct: NDArray[np.bool_], sure_from: float | None
) -> dict[str, float]:
    """Share of the images whose answer is sure, and how many of these are right."""
    if sure_from is None:
        return {}
    sure = scores >= sure_from
    found = {"sure_share": float(sure.mean())}
    if sure.any():
        low, high = accuracy_interval(int(correct[sure].sum()), int(sure.sum()))
        found |= {"sure_acc": float(correct[sure].mean()), "sure_acc_low": low}
        found["sure_acc_high"] = high
    return found


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
