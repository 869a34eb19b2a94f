"""Intervals: Wilson's for shares, the bootstrap for figures that have no formula of their own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

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
    centred: Sequence[int] = (),
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
        centred: Figures that are too large in every draw, as a sum of absolute gaps is: their
            interval is moved by what the mean of the draws is above the figure.

    Returns:
        Lower and upper ends, (K,).

    Source: B. Efron, "Bootstrap methods: another look at the jackknife", Ann. Statist. 7 (1979).
    """
    draws = min(max(MOST_VALUES // (images * width), FEWEST_RESAMPLES), MOST_RESAMPLES)
    found = np.concatenate([statistic(weights) for weights in drawn_weights(images, draws)])
    tail = (1 - confidence) / 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a figure that no draw defines stays NaN
        middle = statistic(np.ones((1, images)))[0]
        if draws == MOST_RESAMPLES:
            low, high = np.nanquantile(found, [tail, 1 - tail], axis=0)
            shift = np.zeros(len(middle))
            places = list(centred)
            shift[places] = np.nanmean(found[:, places], axis=0) - middle[places]
            return low - shift, high - shift
        reach = norm.ppf(1 - tail) * np.nanstd(found, axis=0, ddof=1)
    return middle - reach, middle + reach


class Figures(Protocol):
    """Figures of all classes together, then F1 of each class, for weights of the images (R, N)."""

    @property
    def names(self) -> Sequence[str]:
        """Of the figures of all classes; `ece` is one of them."""

    def __call__(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Shape (R, names and classes)."""


def figures_with_intervals(
    figures: Figures, images: int, *, width: int
) -> tuple[dict[str, float], dict[str, NDArray[np.float64]]]:
    """Figures with their 95 % intervals, `_low` and `_high`.

    Args:
        figures: What is counted.
        images: Number of images.
        width: As for `interval`.

    Returns:
        Those of all classes together; and columns f1, f1_low, f1_high with a value a class.
    """
    once = figures(np.ones((1, images)))[0]
    low, high = interval(figures, images, width=width, centred=[figures.names.index("ece")])
    low = np.maximum(low, 0)
    of_all: dict[str, float] = {}
    for place, name in enumerate(figures.names):
        of_all |= {name: float(once[place])}
        of_all |= {f"{name}_low": float(low[place]), f"{name}_high": float(high[place])}
    first = len(figures.names)
    return of_all, {"f1": once[first:], "f1_low": low[first:], "f1_high": high[first:]}


def drawn_weights(
    images: int, count: int, *, seed: int = 0, values: int = CHUNK_VALUES
) -> Iterator[NDArray[np.float64]]:
    """How often each image is drawn in so many draws with replacement, some draws at a time.

    Args:
        images: Number of images.
        count: Number of draws.
        seed: Of the draws.
        values: Weights at a time.

    Yields:
        Shape (R, images); the R add up to `count`.
    """
    rng = np.random.default_rng(seed)
    rows = max(values // images, 1)
    for start in range(0, count, rows):
        some = min(rows, count - start)
        drawn = rng.integers(images, size=(some, images)) + images * np.arange(some)[:, None]
        flat = np.bincount(drawn.ravel(), minlength=some * images)
        yield flat.reshape(some, images).astype(np.float64)


def shares(name: str, hits: NDArray[Any], of: NDArray[Any]) -> dict[str, NDArray[np.float64]]:
    """Columns of a share of each class with Wilson's interval, `_low` and `_high`; 0 of 0 is NaN.

    Args:
        name: Of the column.
        hits: How many of the images, (C,).
        of: How many there are, (C,).
    """
    with np.errstate(invalid="ignore"):
        share = hits / of
    low, high = wilson(hits, of)
    return {name: share, f"{name}_low": low, f"{name}_high": high}


def wilson(
    hits: NDArray[Any], images: NDArray[Any], confidence: float = 0.95
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Wilson's score intervals of many shares at once; NaN where there are no images.

    `tl.evaluation.accuracy_interval`, whose formula is SciPy's, without a call for each.

    Args:
        hits: How many of the images, (K,).
        images: How many there are, (K,).
        confidence: Of each interval.
    """
    z = norm.ppf((1 + confidence) / 2)
    n = np.where(images > 0, images, np.nan)
    middle = hits + z**2 / 2
    reach = z * np.sqrt(hits * (n - hits) / n + z**2 / 4)
    return np.maximum((middle - reach) / (n + z**2), 0), np.minimum(
        (middle + reach) / (n + z**2), 1
    )
