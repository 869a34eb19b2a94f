"""Bootstrap intervals of figures that have no formula of their own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

MOST_RESAMPLES = 1000
FEWEST_RESAMPLES = 50
# Values (resamples x images x classes) up to which all resamples are drawn: about a second.
MOST_VALUES = 100_000_000
CHUNK_VALUES = 200_000  # weights at a time: they stay in the cache of a core


def interval(
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    images: int,
    *,
    width: int = 1,
    confidence: float = 0.95,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Bootstrap interval of one or more figures: over images that are drawn with replacement.

    By percentiles of the draws; where there are too many images for `MOST_RESAMPLES` draws, by
    their standard deviation, which fewer draws tell as well. The same images always give the same
    interval.

    Args:
        statistic: Takes weights (R, images), how often each image was drawn; gives figures
            (R, K), NaN where a draw leaves one undefined.
        images: Number of images.
        width: Values that the statistic makes of each weight; more of them mean fewer draws.
        confidence: Share of the draws inside.

    Returns:
        Lower and upper ends, (K,).

    Source: B. Efron, "Bootstrap methods: another look at the jackknife", Ann. Statist. 7 (1979).
    """
    draws = min(max(MOST_VALUES // (images * width), FEWEST_RESAMPLES), MOST_RESAMPLES)
    found = np.concatenate([statistic(weights) for weights in _weights(images, draws)])
    tail = (1 - confidence) / 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a figure that no draw defines stays NaN
        if draws == MOST_RESAMPLES:
            low, high = np.nanquantile(found, [tail, 1 - tail], axis=0)
            return low, high
        middle = statistic(np.ones((1, images)))[0]
        reach = norm.ppf(1 - tail) * np.nanstd(found, axis=0, ddof=1)
    return middle - reach, middle + reach


def _weights(images: int, draws: int) -> Iterator[NDArray[np.float64]]:
    rng = np.random.default_rng(0)
    rows = max(CHUNK_VALUES // images, 1)
    for start in range(0, draws, rows):
        count = min(rows, draws - start)
        drawn = rng.integers(images, size=(count, images)) + images * np.arange(count)[:, None]
        flat = np.bincount(drawn.ravel(), minlength=count * images)
        yield flat.reshape(count, images).astype(np.float64)
