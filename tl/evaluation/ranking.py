"""How well scores put the images with a label before the others: ROC and precision-recall.

Intervals are those of the bootstrap over images, by its limit: each image's influence on a figure
is worked out from one sorting, so that no draw has to sort the images anew.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit
from scipy.stats import norm

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Ranking:
    """Areas under the curves of each class, one against all others, and of their means.

    What is undefined (a class without images, or on every image) is NaN, and no part of a mean.

    Args:
        auc: Area under the ROC curve, (C,).
        ap: Average precision, (C,).
        ap_low: Lower end of its 95 % interval, (C,).
        ap_high: Upper end, (C,).
        means: `auc` and `ap`, each with `_low` and `_high`, where they are defined.
    """

    auc: Array
    ap: Array
    ap_low: Array
    ap_high: Array
    means: dict[str, float]


def rank(scores: Array, present: NDArray[np.bool_]) -> Ranking:
    """Judge the order in which the scores of each class put the images.

    Args:
        scores: Larger where the class is more likely, (N, C).
        present: Whether the image has the label, (N, C).
    """
    images, classes = scores.shape
    auc, ap, low, high = (np.full(classes, np.nan) for _ in range(4))
    pull = {"auc": np.zeros(images), "ap": np.zeros(images)}
    counts = present.sum(axis=0)
    for k in np.flatnonzero(counts):
        ap[k], of_ap, area, of_area = _of_class(scores[:, k], present[:, k])
        pull["ap"] += of_ap
        low[k], high[k] = _interval(ap[k], of_ap)
        if counts[k] < images:
            auc[k] = area
            pull["auc"] += of_area
    means: dict[str, float] = {}
    for name, values in (("auc", auc), ("ap", ap)):
        number = int(np.isfinite(values).sum())
        if number:
            mean = float(np.nanmean(values))
            lower, upper = _interval(mean, pull[name] / number)
            means |= {name: mean, f"{name}_low": lower, f"{name}_high": upper}
    return Ranking(auc, ap, low, high, means)


def _interval(value: float, influence: Array, confidence: float = 0.95) -> tuple[float, float]:
    """Normal interval on the scale of log odds, so that it stays within [0, 1].

    Source: B. Efron, "The jackknife, the bootstrap and other resampling plans", SIAM 1982, chapter
    6 (the infinitesimal jackknife is the bootstrap's standard deviation).
    """
    error = float(np.sqrt(np.square(influence).sum()))
    if not 0 < value < 1 or error == 0:
        return value, value
    reach = norm.ppf((1 + confidence) / 2) * error / (value * (1 - value))
    return float(expit(logit(value) - reach)), float(expit(logit(value) + reach))


def _of_class(scores: Array, present: NDArray[np.bool_]) -> tuple[float, Array, float, Array]:
    """Average precision and area under the ROC curve, and how much one image moves each.

    Images of one score come together. An influence is the derivative of the figure by the weight
    of the image; those of all images have the sum 0.

    Source: E. DeLong, D. DeLong, D. Clarke-Pearson, Biometrics 44 (1988), for the area, whose
    structural components these are.
    """
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    run = np.append(0, np.cumsum(ranked[1:] != ranked[:-1]))  # of each image, best score first
    y = present[order]
    found, all_in = np.bincount(run, weights=y), np.bincount(run)
    hits, taken = found.cumsum(), all_in.cumsum()
    positives = hits[-1]
    precision = hits / taken
    ap = float((found * precision).sum() / positives)
    later = np.cumsum((found / taken)[::-1])[::-1]
    later_share = np.cumsum((found * hits / taken**2)[::-1])[::-1]
    of_ap = (y * (precision[run] + later[run] - ap) - later_share[run]) / positives
    negatives = len(y) - positives
    area, of_area = np.nan, np.zeros(len(y))
    if negatives:
        wrong = all_in - found
        above = (negatives - wrong.cumsum() + wrong / 2) / negatives  # of negatives below
        below = (hits - found / 2) / positives  # of positives above
        area = float((found * above).sum() / positives)
        of_area = np.where(y, (above[run] - area) / positives, (below[run] - area) / negatives)
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return ap, of_ap[back], float(area), of_area[back]
