"""Probabilities that mean what they say: a temperature fitted on val, and how far it holds."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_softmax, logit, softmax

from tl.config import Task

CALIBRATION_BINS = 15
FEWEST = 30  # images of val below which there is no temperature
FOLDS = 5  # of val, each judged with the temperature of the others
SEED = 0
COLDEST, HOTTEST = 0.1, 10.0
# The logarithm of the temperature has a normal prior around 0 with this standard deviation. Without
# it, a network that is right on all images of val would be made as sure as the limit allows: in
# simulations with 30 images the log loss of others rose by up to 2.9 without, by 0.14 with it.
SPREAD = 0.5
MOST_VALUES = 2_000_000  # (images x classes) that a fit reads: one number needs no more
SMALLEST = float(np.finfo(np.float32).tiny)

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Temperature:
    """What the logits are divided by before they become probabilities.

    Args:
        value: Above 1: the network was too sure of itself; below 1: not sure enough. 1: as it is.
        note: One sentence on where it comes from.
        images: Of val; 0 where they are not known.
        per_image: For each image of val the temperature that the other folds chose, (N,): with
            these, val says what the temperature is worth on images that it was not fitted on.
    """

    value: float
    note: str
    images: int = 0
    per_image: Array = field(default_factory=lambda: np.ones(0))


def fit_temperature(logits: ArrayLike, targets: ArrayLike, task: Task) -> Temperature:
    """Choose the temperature under which what is true on val is most likely.

    It stays 1 where val has fewer than `FEWEST` images, and where the temperatures of the folds do
    not make the left-out images more likely.

    Args:
        logits: Outputs of the network for val, (N, C).
        targets: One label: class indices (N,); several: 0 or 1, (N, C).
        task: Regression has no probabilities: its temperature is 1.

    Source: Guo et al., "On calibration of modern neural networks", ICML 2017, section 4.2.
    """
    z, y = np.asarray(logits, dtype=np.float64), np.asarray(targets)
    images = len(z)
    ones = np.ones(images)
    if task is Task.regression:
        return Temperature(1.0, "a number has no probability", images, ones)
    if images < FEWEST or not np.isfinite(z).all():
        note = f"not fitted: {images} images of val are too few, {FEWEST} are needed"
        return Temperature(1.0, note, images, ones)
    rng = np.random.default_rng(SEED)
    chosen = rng.permutation(images)[: max(MOST_VALUES // z.shape[1], FEWEST)]
    fold = rng.permutation(images) % FOLDS
    per_image = ones.copy()
    for number in range(FOLDS):
        others = chosen[fold[chosen] != number]
        per_image[fold == number] = _best(z[others], y[others], task)
    part = z[chosen], y[chosen]
    before = _surprise(*part, task, np.ones(len(chosen)))
    after = _surprise(*part, task, per_image[chosen])
    if not after < before:
        note = f"not used: no temperature makes the {images} images of val more likely"
        return Temperature(1.0, note, images, ones)
    note = (
        f"fitted on {images} images of val: log loss {before:.4f} -> {after:.4f} on left-out ones"
    )
    return Temperature(_best(*part, task), note, images, per_image)


def _best(z: Array, y: NDArray[np.int64], task: Task) -> float:
    def surprise(log_temperature: float) -> float:
        mean = _surprise(z, y, task, np.full(len(z), np.exp(log_temperature)))
        return mean + (log_temperature / SPREAD) ** 2 / 2 / len(z)

    limits = (float(np.log(COLDEST)), float(np.log(HOTTEST)))
    found = minimize_scalar(surprise, bounds=limits, method="bounded", options={"xatol": 1e-4})
    return float(np.exp(found.x))


def _surprise(z: Array, y: NDArray[np.int64], task: Task, temperatures: Array) -> float:
    """Log loss in nats: of an image, with several labels of a label."""
    warm = z / temperatures[:, None]
    if task is Task.single:
        return float(-log_softmax(warm, axis=1)[np.arange(len(y)), y].mean())
    return float((np.logaddexp(0, warm) - warm * y).mean())


def probabilities(logits: ArrayLike, task: Task, temperature: float | Array = 1.0) -> Array:
    """Probabilities (N, C) of logits (N, C), with one temperature or one an image."""
    z = np.asarray(logits, np.float64) / np.reshape(temperature, (-1, 1))
    found: Array = softmax(z, axis=1) if task is Task.single else expit(z)
    return found


def logits_of(calibrated: ArrayLike, task: Task) -> Array:
    """Logits (N, C) of probabilities (N, C), up to a constant of each row with one label."""
    p = np.asarray(calibrated, np.float64)
    found: Array
    if task is Task.single:
        found = np.log(np.maximum(p, SMALLEST))
    else:
        found = logit(np.clip(p, SMALLEST, 1 - 2.0**-25))
    return found


def reliability(
    confidence: Array, correct: NDArray[np.bool_], bins: int = CALIBRATION_BINS
) -> pd.DataFrame:
    """Confidence against accuracy, in bins of equal width.

    Args:
        confidence: Shape (N,), in [0, 1].
        correct: Shape (N,); whether the prediction is right.
        bins: Number of bins that divide [0, 1]; those without images are left out.

    Returns:
        Columns low and high (limits of the bin), images, confidence and accuracy (means).
    """
    index = bin_of(confidence, bins)
    images = np.bincount(index, minlength=bins)
    used = np.flatnonzero(images)
    sums = (np.bincount(index, weights=v, minlength=bins)[used] for v in (confidence, correct))
    means = [values / images[used] for values in sums]
    return pd.DataFrame(
        {
            "low": used / bins,
            "high": (used + 1) / bins,
            "images": images[used],
            "confidence": means[0],
            "accuracy": means[1],
        }
    )


def bin_of(confidence: Array, bins: int = CALIBRATION_BINS) -> NDArray[np.int64]:
    """Number of the bin of each confidence."""
    return np.minimum((confidence * bins).astype(np.int64), bins - 1)


def calibration_error(
    confidence: Array, correct: NDArray[np.bool_], bins: int = CALIBRATION_BINS
) -> float:
    """Expected calibration error: mean gap of confidence and accuracy over bins of equal width.

    Args:
        confidence: Shape (N,); probability of the predicted class, in [0, 1].
        correct: Shape (N,); whether the prediction is right.
        bins: Number of bins that divide [0, 1].

    Source: Guo et al., "On calibration of modern neural networks", ICML 2017.
    """
    gap = np.bincount(bin_of(confidence, bins), weights=confidence - correct, minlength=bins)
    return float(np.abs(gap).sum() / len(confidence))
