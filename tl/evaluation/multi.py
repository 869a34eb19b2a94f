"""Several labels an image: average precision, thresholds, and what the decisions are worth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.stats import mannwhitneyu

from tl.config import Task
from tl.evaluation import resampling
from tl.evaluation.calibration import CALIBRATION_BINS, bin_of, calibration_error, reliability
from tl.evaluation.groups import by_group, worst_group
from tl.evaluation.ranking import Ranking, rank
from tl.evaluation.report import EvaluationError, Report, refuse_infinite
from tl.evaluation.resampling import figures_with_intervals, interval, shares

FEW = 5  # images with a label below which its threshold is not chosen by them alone
# Chance that probabilities which know nothing of a class look as good: above it the best F1 comes
# of saying the class of every image.
MOST_CHANCE = 0.01
LARGEST = 1 - 2.0**-25  # largest probability below 1 that a sigmoid of float32 tells from it

Array = NDArray[np.float64]
Marks = NDArray[np.bool_]


def judge_multi(
    probabilities: ArrayLike,
    targets: ArrayLike,
    classes: Sequence[str],
    split: str,
    thresholds: Sequence[float] | None,
    *,
    held_out: ArrayLike | None = None,
    uncalibrated: ArrayLike | None = None,
    groups: Iterable[object] | None = None,
) -> Report:
    """Judge the predictions of several labels an image; see `tl.evaluation.evaluate`."""
    p, y = checked(probabilities, targets, classes)
    honest, raw = (
        p if other is None else checked(other, targets, classes)[0]
        for other in (held_out, uncalibrated)
    )
    if not y.any():
        raise EvaluationError(f"no image of {split} has any label: there is nothing to judge")
    chosen = choose_thresholds(p, y) if thresholds is None else np.asarray(thresholds, np.float64)
    if chosen.shape != (len(classes),):
        raise ValueError(f"expected {len(classes)} thresholds, got {chosen.shape}")
    said, ranking = p >= chosen, rank(p, y)
    figures = _Figures(honest, y, said)
    of_all, per_class = _with_intervals(figures, y, said, classes, chosen, ranking)
    low, high = _map_interval(p, y, ranking)
    found = by_group((said != y).mean(axis=1), groups) if groups is not None else None
    metrics = {
        "map": float(per_class["ap"].mean()),
        "map_low": low,
        "map_high": high,
        **of_all,
        **{key: value for key, value in ranking.means.items() if key.startswith("auc")},
        "loss": binary_cross_entropy(raw, y),
        "ece_uncalibrated": calibration_error(raw.ravel(), y.ravel()),
        **worst_group(found, "hamming", lowest=False),
        "images": float(len(y)),
    }
    return Report(
        split,
        metrics,
        per_class,
        None,
        tuple(classes),
        Task.multi,
        tuple(chosen.tolist()),
        truth=y,
        predicted=p,
        groups=found,
        bins=reliability(honest.ravel(), y.ravel()),
        bins_uncalibrated=reliability(raw.ravel(), y.ravel()),
    )


def checked(
    probabilities: ArrayLike, targets: ArrayLike, classes: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Probabilities and labels as arrays of the same shape.

    Raises:
        EvaluationError: A probability is not finite.
        ValueError: They do not fit each other, or are no probabilities.
    """
    p, y = np.asarray(probabilities, dtype=np.float64), np.asarray(targets)
    if p.ndim != 2 or len(p) == 0 or p.shape[1] != len(classes) or y.shape != p.shape:
        msg = (
            f"expected probabilities and targets (N, {len(classes)}) with N > 0, "
            f"got {p.shape} and {y.shape}"
        )
        raise ValueError(msg)
    if not np.isin(y, (0, 1)).all():
        raise ValueError("targets must be 0 or 1")
    refuse_infinite(p, "probabilities")
    if p.min() < 0 or p.max() > 1:
        raise ValueError("probabilities must be in [0, 1]: are these logits?")
    return p, y.astype(bool)


class _Figures:
    """Figures of the images for weights (R, N): of all labels together, then F1 of each label.

    Args:
        p: Probabilities, (N, C).
        y: Whether the image has the label, (N, C).
        said: Whether the model says so, (N, C).
    """

    names = ("f1_macro", "f1_micro", "exact_match", "hamming", "log_loss", "brier", "ece")

    def __init__(self, p: Array, y: Marks, said: Marks) -> None:
        images, classes = p.shape
        self.counts = [marks.astype(np.float64) for marks in (y, said, said & y)]
        wrong, right = said != y, np.where(y, p, 1 - np.minimum(p, LARGEST))
        self.means = np.stack(
            [
                ~wrong.any(axis=1),
                wrong.mean(axis=1),
                -np.log(np.maximum(right, np.finfo(np.float32).tiny)).mean(axis=1),
                np.square(p - y).mean(axis=1),
            ],
            axis=1,
        )
        place = np.arange(images)[:, None] * CALIBRATION_BINS + bin_of(p)
        size = images * CALIBRATION_BINS
        gaps = np.bincount(place.ravel(), weights=(p - y).ravel(), minlength=size)
        self.gaps = gaps.reshape(images, CALIBRATION_BINS) / classes

    def __call__(self, weights: Array) -> Array:
        """Shape (R, names + classes)."""
        total = weights.sum(axis=1, keepdims=True)
        truth, said, right = (weights @ count for count in self.counts)
        known = truth + said
        with np.errstate(invalid="ignore"):  # 0 of 0 is undefined
            f1 = 2 * right / known
            micro = 2 * right.sum(axis=1, keepdims=True) / known.sum(axis=1, keepdims=True)
            macro = np.where(known > 0, f1, 0).sum(axis=1, keepdims=True)
            macro /= (known > 0).sum(axis=1, keepdims=True)
        means = weights @ self.means / total
        ece = np.abs(weights @ self.gaps).sum(axis=1, keepdims=True) / total
        return np.concatenate([macro, micro, means, ece, f1], axis=1)


def _with_intervals(
    figures: _Figures,
    y: Marks,
    said: Marks,
    classes: Sequence[str],
    thresholds: Array,
    ranking: Ranking,
) -> tuple[dict[str, float], pd.DataFrame]:
    """Figures of all labels with their 95 % intervals, and the table of the labels."""
    of_all, f1 = figures_with_intervals(figures, len(y), width=len(classes))
    right, given, images = (said & y).sum(axis=0), said.sum(axis=0), y.sum(axis=0)
    table: dict[str, object] = {
        "class": list(classes),
        "images": images,
        "ap": ranking.ap,
        "ap_low": ranking.ap_low,
        "ap_high": ranking.ap_high,
        "auc": ranking.auc,
        "threshold": thresholds,
    }
    table |= shares("precision", right, given) | shares("recall", right, images) | f1
    return of_all, pd.DataFrame(table)


def average_precision(
    scores: NDArray[np.float64], present: NDArray[np.bool_], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Average precision of one class, for many weightings of the images at once.

    Scikit-learn's figure, which sorts the images anew for each weighting.

    Args:
        scores: Shape (N,); larger where the class is more likely.
        present: Shape (N,); whether the image has the label.
        weights: Shape (R, N); how often each image counts.

    Returns:
        Shape (R,), in [0, 1]; NaN where no image with the label counts.
    """
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    places = np.flatnonzero(present[order])
    # Images of one score come together: precision is that after the last of them.
    last = np.searchsorted(-ranked, -ranked[places], side="right") - 1
    w = np.take(weights, order, axis=1)
    taken = np.cumsum(w, axis=1)[:, last]
    w = w[:, places]
    found = np.cumsum(w, axis=1)[:, np.searchsorted(places, last, side="right") - 1]
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(taken > 0, found / taken, 0)
        result: NDArray[np.float64] = (w * precision).sum(axis=1) / w.sum(axis=1)
    return result


def _map_interval(p: Array, y: Marks, ranking: Ranking) -> tuple[float, float]:
    """95 % interval of the mean over the classes that occur, over draws of images.

    With so many images that drawing them takes long, that of the limit of the draws.
    """
    there = np.flatnonzero(y.any(axis=0))
    if len(y) * len(there) * resampling.MOST_RESAMPLES > resampling.MOST_VALUES:
        return ranking.means["ap_low"], ranking.means["ap_high"]

    def mean(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        figures = np.stack([average_precision(p[:, k], y[:, k], weights) for k in there], axis=1)
        defined = np.isfinite(figures)
        means: NDArray[np.float64] = np.where(defined, figures, 0).sum(axis=1, keepdims=True)
        with np.errstate(invalid="ignore"):
            means /= defined.sum(axis=1, keepdims=True)
        return means

    low, high = interval(mean, len(y), width=len(there))
    return float(low[0]), float(high[0])


def binary_cross_entropy(p: NDArray[np.float64], y: NDArray[np.bool_]) -> float:
    """Mean over images and classes of -log p(what is true), in nats; finite at 0 and 1."""
    right = np.where(y, p, 1 - np.minimum(p, LARGEST))
    return float(-np.log(np.maximum(right, np.finfo(np.float32).tiny)).mean())


def choose_thresholds(p: NDArray[np.float64], y: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The probability of each class from which calling it present gives the best F1.

    Halfway between two images. A class with fewer than `FEW` images, or one that the probabilities
    do not tell (a rank test, `MOST_CHANCE`), gets the threshold that gives the best F1 over the
    decisions of all classes: its own would fit those few, or put the label on every image.

    Args:
        p: Probabilities, (N, C).
        y: Whether the image has the label, (N, C).

    Returns:
        Shape (C,), in (0, 1).

    Source: Lipton, Elkan, Naryanaswamy, "Optimal thresholding of classifiers to maximize F1
    measure", ECML PKDD 2014; Fan, Lin, "A study on threshold selection for multi-label
    classification", 2007, on what a threshold of few images does.
    """
    common = _best_threshold(p.ravel(), y.ravel())
    chosen = np.full(p.shape[1], common)
    for k in np.flatnonzero((y.sum(axis=0) >= FEW) & ~y.all(axis=0)):
        scores, there = p[:, k], y[:, k]
        if mannwhitneyu(scores[there], scores[~there], alternative="greater").pvalue <= MOST_CHANCE:
            chosen[k] = _best_threshold(scores, there)
    return chosen


def _best_threshold(scores: NDArray[np.float64], present: NDArray[np.bool_]) -> float:
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    ends = np.flatnonzero(np.append(np.diff(ranked) != 0, True))
    found = np.cumsum(present[order])[ends]
    f1 = 2 * found / (ends + 1 + present.sum())
    cuts = (ranked[ends] + np.append(ranked[ends][1:], 0)) / 2
    good = cuts[(f1 >= f1.max() - 1e-12) & (cuts > 0) & (cuts < 1)]
    # Of cuts that are as good, the one nearest to the middle is moved least by other images.
    return float(good[np.abs(good - 0.5).argmin()]) if len(good) else 0.5
