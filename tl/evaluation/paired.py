"""Is one model better than another? Answered image by image, on the images that both have judged.

Two figures of two models say little beside each other: most of their noise is the draw of the test
images, which both share. What differs on each image is what counts.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binom, binomtest, norm, ttest_1samp
from scipy.stats import t as t_distribution

from tl.evaluation.multi import average_precision
from tl.evaluation.resampling import drawn_weights

Floats = NDArray[np.float64]
Verdict = Literal["a", "b", "none"]

RESAMPLES = 4000  # of counts or of means: cheap
MOST_RANKED = 1000  # resamples of a ranking, each of which is counted anew
FEWEST_RANKED = 100
# Values (resamples x images x classes x models) of rankings that are counted: about a second each
# 100 million.
RANKED_VALUES = 200_000_000
CHUNK_VALUES = 2_000_000  # weights at a time: 16 MB
POWER = 0.8  # chance to see the difference with `images_needed` images
# Images added to each side of the disagreement before it is drawn from. Without them the interval
# of two models that disagree on few images is too short: it holds the truth in 59 % of cases for
# 30 images of which 3 % differ, with them in 95 to 99 % (benchmarks/comparison.py coverage).
ADDED = 0.5


@dataclass(frozen=True)
class PairSide:
    """What one model said of each image, in the order of the other side.

    Args:
        values: For `acc` 1 where it was right and 0 where it was wrong, (N,); for `mae` the
            absolute errors, (N,); for `map` the probabilities, (N, C).
        truth: For `map` alone: whether the image has the label, (N, C).
    """

    values: Floats
    truth: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class PairResult:
    """What the images say of two models, a and b.

    Args:
        images: That both have judged.
        a: Headline of a.
        b: Headline of b.
        difference: a - b; where the metric is an error, less than 0 means that a is better.
        low: Lower end of the interval of the difference.
        high: Upper end.
        p_value: Chance of a difference as large where there is none. For `acc` of McNemar's exact
            test, for `mae` of the paired t-test, for `map` of the normal distribution with the
            bootstrap's standard error.
        only_a: For `acc`: images that a alone has right.
        only_b: For `acc`: images that b alone has right.
        images_needed: Images that would show this difference in `POWER` of cases, were it the true
            one; None where there is none at all.
        detectable: Smallest difference that as many images as these show in `POWER` of cases.
        verdict: Which is better, by `p_value` and the confidence that was asked for; or `none`:
            no difference can be shown.
    """

    images: int
    a: float
    b: float
    difference: float
    low: float
    high: float
    p_value: float
    only_a: int | None
    only_b: int | None
    images_needed: int | None
    detectable: float
    verdict: Verdict


def compare_pair(
    a: PairSide, b: PairSide, *, metric: str, confidence: float = 0.95, seed: int = 0
) -> PairResult:
    """Compare two models on the same images.

    Args:
        a: One model.
        b: The other; the same images in the same order.
        metric: `acc`, `map` or `mae`.
        confidence: Of the interval and the verdict, in (0, 1).
        seed: Of the resamples.

    Raises:
        ValueError: They have not judged the same number of images, or none.

    Sources: Q. McNemar, Psychometrika 12 (1947); B. Efron, Ann. Statist. 7 (1979); the half image
    on each side as in A. Agresti, Y. Min, Statistics in Medicine 24 (2005).

    Example:
        >>> right = PairSide(np.array([1.0] * 90 + [0.0] * 10))
        >>> half = PairSide(np.array([1.0] * 75 + [0.0] * 25))
        >>> found = compare_pair(right, half, metric="acc")
        >>> found.verdict, found.only_a, found.only_b, round(found.p_value, 5)
        ('a', 15, 0, 6e-05)
    """
    if metric == "acc":
        return _compare_right(a, b, confidence, seed)
    drawn = draws([a, b], metric, seed=seed)
    return compare_drawn(a, b, drawn[:, 0], drawn[:, 1], metric=metric, confidence=confidence)


def not_worse(
    a: PairSide,
    b: PairSide,
    margin: float,
    *,
    metric: str,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[bool, PairResult]:
    """Whether a can take the place of b: it is worse by no more than a margin.

    Args:
        a: The challenger.
        b: The champion.
        margin: For `acc` and `map` in the units of the metric, 0.01 is one point in a hundred; for
            `mae` as a share of b's error.
        metric: `acc`, `map` or `mae`.
        confidence: One-sided, in (0.5, 1).
        seed: Of the resamples.

    Returns:
        Whether the end of the one-sided interval that is worse for a is within the margin; and the
        comparison, whose `low` and `high` are both ends of that kind (so together they are an
        interval of twice the doubt: 90 % for 95 %).

    Source: G. Piaggio et al., "Reporting of noninferiority and equivalence randomized trials",
    JAMA 308 (2012).
    """
    found = compare_pair(a, b, metric=metric, confidence=2 * confidence - 1, seed=seed)
    if metric == "mae":
        return found.high <= margin * found.b, found
    return found.low >= -margin, found


def holm(p_values: ArrayLike) -> Floats:
    """P-values that stay honest although several are looked at: one in 20 families has a false one.

    Args:
        p_values: Shape (M,).

    Returns:
        Adjusted, (M,), in [0, 1].

    Source: S. Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statist.
    6 (1979).

    Example:
        >>> holm([0.01, 0.04, 0.03]).round(2).tolist()
        [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    factors = np.arange(len(p), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * factors), 1)
    return adjusted


def p_values(sides: Sequence[PairSide], metric: str, drawn: Floats | None = None) -> Floats:
    """P-values of every pair of models, as `compare_pair` gives them, all at once.

    Args:
        sides: The K models, all on the same images.
        metric: `acc`, `map` or `mae`.
        drawn: For `map`: what `draws` gives.

    Returns:
        Shape (K, K), symmetric; 1 on the diagonal.
    """
    if metric == "acc":
        right = np.stack([side.values for side in sides]).astype(np.float32)
        both = right.astype(np.float64) @ right.T
        only = np.rint(both.diagonal()[:, None] - both)
        differ = only + only.T
        p = 2 * binom.cdf(np.minimum(only, only.T), differ, 0.5)
        return np.asarray(np.minimum(np.where(differ > 0, p, 1), 1), dtype=np.float64)
    if metric == "mae":
        values = np.stack([side.values for side in sides])
        images = values.shape[1]
        covariance, middle = np.cov(values) / images, values.mean(axis=1)
        distribution = t_distribution(max(images - 1, 1))
    else:
        assert drawn is not None
        covariance, middle = np.cov(drawn.T), np.array([figure(side, metric) for side in sides])
        distribution = norm
    covariance = np.atleast_2d(covariance)
    variance = covariance.diagonal()[:, None] + covariance.diagonal() - 2 * covariance
    error = np.sqrt(np.maximum(variance, 1e-14 * covariance.diagonal().max()))
    with np.errstate(invalid="ignore", divide="ignore"):
        p = 2 * distribution.sf(np.abs(middle[:, None] - middle) / error)
    return np.where(np.isfinite(p), p, 1)


def draws(
    sides: Sequence[PairSide], metric: str, *, seed: int = 0, resamples: int | None = None
) -> Floats:
    """The headline of several models over the same resamples of their images.

    Args:
        sides: The models, all on the same images.
        metric: `acc` (for an interval counts say the same faster, see `compare_pair`), `map` or
            `mae`.
        seed: Of the resamples.
        resamples: How many; default: as many as take a second or two.

    Returns:
        Shape (R, models); fewer resamples where there is more to count.

    Raises:
        ValueError: They have not judged the same number of images, or none.
    """
    images = len(sides[0])
    if images == 0 or any(len(side) != images for side in sides):
        raise ValueError(f"expected the same images, got {sorted({len(s) for s in sides})}")
    count = resamples or RESAMPLES
    if metric == "map" and resamples is None:
        values = images * sides[0].values.shape[1] * len(sides)
        count = min(max(RANKED_VALUES // values, FEWEST_RANKED), MOST_RANKED)
    drawn = drawn_weights(images, count, seed=seed, values=CHUNK_VALUES)
    if metric == "map":
        return np.concatenate([_figures(sides, weights) for weights in drawn])
    each = np.stack([side.values for side in sides], axis=1)
    return np.concatenate([weights @ each for weights in drawn]) / images


def compare_drawn(
    a: PairSide, b: PairSide, drawn_a: Floats, drawn_b: Floats, *, metric: str, confidence: float
) -> PairResult:
    """`compare_pair` for `map` and `mae` where the resamples are drawn already; see `draws`."""
    value_a, value_b = figure(a, metric), figure(b, metric)
    difference, images = value_a - value_b, len(a)
    spread = drawn_a - drawn_b
    tail = (1 - confidence) / 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # no difference at all: 0 of 0
        if metric == "mae":
            each = a.values - b.values
            error = float(each.std(ddof=1) / math.sqrt(images)) if images > 1 else math.inf
            p_value = float(ttest_1samp(each, 0).pvalue) if images > 1 else 1.0
        else:
            error = float(np.nanstd(spread, ddof=1))
            p_value = float(2 * norm.sf(abs(np.divide(difference, error))))
        if len(spread) < MOST_RANKED:  # too few for percentiles
            reach = norm.ppf(1 - tail) * error
            low, high = difference - reach, difference + reach
        else:
            low, high = np.nanquantile(spread, [tail, 1 - tail])
    p_value = p_value if math.isfinite(p_value) else 1.0
    reach = _reach(confidence) * error
    needed = math.ceil(images * (reach / difference) ** 2) if difference and error else None
    return PairResult(
        images=images,
        a=value_a,
        b=value_b,
        difference=difference,
        low=float(low),
        high=float(high),
        p_value=p_value,
        only_a=None,
        only_b=None,
        images_needed=needed,
        detectable=reach,
        verdict=judged(difference, p_value, metric, confidence),
    )


def judged(difference: float, p_value: float, metric: str, confidence: float) -> Verdict:
    """Which of a and b is better, from a - b and a p-value, adjusted or not."""
    if p_value > 1 - confidence or difference == 0:
        return "none"
    return "a" if (difference < 0) == (metric == "mae") else "b"


def figure(side: PairSide, metric: str) -> float:
    """The headline of a model on its images."""
    if metric == "map":
        return float(_mean_precision(side, np.ones((1, len(side))))[0])
    return float(side.values.mean())


def _compare_right(a: PairSide, b: PairSide, confidence: float, seed: int) -> PairResult:
    images = len(a)
    if images == 0 or len(b) != images:
        raise ValueError(f"expected the same images, got {images} and {len(b)}")
    only_a = int(np.count_nonzero((a.values > 0.5) & (b.values < 0.5)))
    only_b = int(np.count_nonzero((a.values < 0.5) & (b.values > 0.5)))
    differ = only_a + only_b
    low, high = _interval_of_counts(only_a, only_b, images, confidence, seed)
    p_value = float(binomtest(only_a, differ).pvalue) if differ else 1.0
    difference = (only_a - only_b) / images
    return PairResult(
        images=images,
        a=float(a.values.mean()),
        b=float(b.values.mean()),
        difference=difference,
        low=low,
        high=high,
        p_value=p_value,
        only_a=only_a,
        only_b=only_b,
        images_needed=_needed(difference, differ / images, confidence),
        detectable=_reach(confidence) * math.sqrt((differ + 2 * ADDED) / images / images),
        verdict=judged(difference, p_value, "acc", confidence),
    )


def _interval_of_counts(
    only_a: int, only_b: int, images: int, confidence: float, seed: int
) -> tuple[float, float]:
    """Drawing images with replacement is drawing how many are of each of three kinds."""
    shares = np.array([only_a + ADDED, only_b + ADDED, images - only_a - only_b])
    drawn = np.random.default_rng(seed).multinomial(images, shares / shares.sum(), size=RESAMPLES)
    tail = (1 - confidence) / 2
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / images, [tail, 1 - tail])
    return float(low), float(high)


def _reach(confidence: float) -> float:
    """Standard errors that a difference must have to be seen in `POWER` of cases."""
    return float(norm.ppf((1 + confidence) / 2) + norm.ppf(POWER))


def _needed(difference: float, differ: float, confidence: float) -> int | None:
    """Images for McNemar's test, from the share on which two models differ.

    Source: R. J. Connor, "Sample size for testing differences in proportions for the paired-sample
    design", Biometrics 43 (1987).
    """
    if difference == 0:
        return None
    root = float(norm.ppf((1 + confidence) / 2)) * math.sqrt(differ)
    root += float(norm.ppf(POWER)) * math.sqrt(max(differ - difference**2, 0))
    return math.ceil((root / difference) ** 2)


def _figures(sides: Sequence[PairSide], weights: Floats) -> Floats:
    """Mean precisions of the models under weights of the images: (R, N) -> (R, models)."""
    return np.stack([_mean_precision(side, weights) for side in sides], axis=1)


def _mean_precision(side: PairSide, weights: Floats) -> Floats:
    """Mean over the classes of the average precision, under weights of the images."""
    p, y = side.values, side.truth
    if y is None:
        raise ValueError("map needs the labels of the images")
    there = np.flatnonzero(y.any(axis=0))
    each = np.stack([average_precision(p[:, k], y[:, k], weights) for k in there])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a draw without any labelled image
        result: Floats = np.nanmean(each, axis=0)
    return result
