"""Runs that differ in nothing but the seed: mean, spread, and what holds beyond one seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

from tl.comparison.judging import Group
from tl.comparison.words import difference_words
from tl.evaluation import holm
from tl.evaluation.paired import judged


@dataclass(frozen=True)
class Family:
    """Runs of several seeds.

    Args:
        name: What tells it from others.
        ids: Of its runs.
        seeds: Of its runs.
    """

    name: str
    ids: tuple[str, ...]
    seeds: tuple[int | None, ...]


def family_values(family: Family, groups: Sequence[Group], confidence: float) -> dict[str, Any]:
    """Mean, spread and interval of a family, as `compare.json` has them.

    The interval is of the mean over other seeds and other images: with two or three seeds that
    differ it is wide, and rightly so. Where the seeds have other images each, their spread alone
    says what both do.
    """
    values = {run: v for group in groups for run, v in zip(group.ids, group.values, strict=True)}
    numbers = np.array([values[run] for run in family.ids if run in values])
    mean = std = low = high = None
    if len(numbers):
        mean = float(numbers.mean())
    if len(numbers) > 1 and mean is not None:
        std = float(numbers.std(ddof=1))
        whole = [group for group in groups if {*family.ids} <= {*group.ids}]
        if whole:
            rows = [whole[0].ids.index(run) for run in family.ids]
            variance, degrees = _uncertainty(whole[0], rows)
        else:
            variance, degrees = std**2 / len(numbers), len(numbers) - 1.0
        reach = float(t.ppf((1 + confidence) / 2, degrees)) * math.sqrt(variance)
        low, high = mean - reach, mean + reach
    return {
        "name": family.name,
        "runs": [*family.ids],
        "seeds": [*family.seeds],
        "mean": mean,
        "std": std,
        "low": None if low is None else float(low),
        "high": None if high is None else float(high),
    }


def family_pairs(
    families: Sequence[Family], group: Group, confidence: float
) -> list[dict[str, Any]]:
    """The best family with each other one: would other seeds and other images say the same?

    Args:
        families: All; those with fewer than two runs in the group are left out.
        group: Runs on the same images.
        confidence: Of intervals and verdicts.
    """
    place = {run: i for i, run in enumerate(group.ids)}
    members = {
        number: [place[run] for run in family.ids if run in place]
        for number, family in enumerate(families)
    }
    members = {number: rows for number, rows in members.items() if len(rows) > 1}
    if len(members) < 2:
        return []
    means = {number: np.mean([group.values[i] for i in rows]) for number, rows in members.items()}
    sign = 1 if group.metric == "mae" else -1
    best, *others = sorted(members, key=lambda number: float(sign * means[number]))
    found = [_pair(group, members[best], members[other], confidence) for other in others]
    # The best was chosen by these figures: all pairs count, the others as no evidence.
    unseen = math.comb(len(members), 2) - len(found)
    adjusted = holm([*(pair["p"] for pair in found), *[1.0] * unseen])[: len(found)].tolist()
    for other, pair, p in zip(others, found, adjusted, strict=True):
        verdict = judged(pair["difference"], p, group.metric, confidence)
        pair |= {"a": best, "b": other, "p_adjusted": p, "verdict": verdict}
        pair["words"] = _words(families[best].name, families[other].name, pair, group.metric)
    return found


def _pair(group: Group, a: list[int], b: list[int], confidence: float) -> dict[str, Any]:
    means = [np.mean([group.values[i] for i in rows]) for rows in (a, b)]
    difference = float(means[0] - means[1])
    variance, degrees = _uncertainty(group, a, b)
    if variance <= 0:
        return {"difference": difference, "low": difference, "high": difference, "p": 1.0}
    error = math.sqrt(variance)
    reach = float(t.ppf((1 + confidence) / 2, degrees)) * error
    return {
        "difference": difference,
        "low": difference - reach,
        "high": difference + reach,
        "p": float(2 * t.sf(abs(difference) / error, degrees)),
    }


def _uncertainty(group: Group, *families: list[int]) -> tuple[float, float]:
    """Variance of the mean of one family, or of the difference of two, and degrees of freedom.

    Images and seeds are two crossed samples; the part that both count is taken out once.

    Source: S. R. Searle, G. Casella, C. E. McCulloch, "Variance components", 1992, section 4.7;
    degrees of freedom: F. E. Satterthwaite, Biometrics Bulletin 2 (1946).
    """
    values = [np.array([group.values[i] for i in rows]) for rows in families]
    seeds = [float(side.var(ddof=1) / len(side)) for side in values]
    images, both = _of_images(group, families)
    variance = max(sum(seeds) + images - both, sum(seeds), images)
    many = max(len(group.truth) - 1, 1)
    free = [len(rows) - 1 for rows in families]
    parts = zip([*seeds, images, both], [*free, many, many * sum(free)], strict=True)
    doubt = sum(part**2 / number for part, number in parts)
    return variance, max(variance**2 / doubt, 1.0) if doubt > 0 else 1.0


def _of_images(group: Group, families: Sequence[list[int]]) -> tuple[float, float]:
    """Variance by the draw of images, and what seeds have counted of it."""
    signs = (1, -1)[: len(families)]
    if group.drawn is not None and group.metric == "map":  # no figure of one image: nothing twice
        means = [group.drawn[:, rows].mean(axis=1) for rows in families]
        drawn = np.sum([sign * mean for sign, mean in zip(signs, means, strict=True)], axis=0)
        return float(np.nanvar(drawn, ddof=1)), 0.0
    sides = [np.stack([group.sides[i].values for i in rows]) for rows in families]
    each = np.sum([s * side.mean(axis=0) for s, side in zip(signs, sides, strict=True)], axis=0)
    images = len(group.truth)
    spread = float(each.var(ddof=1)) if images > 1 else 0.0
    return spread / images, sum(_interaction(side) for side in sides)


def _interaction(values: NDArray[np.float64]) -> float:
    """Mean square of what neither seed nor image explains, as part of the variance of a mean."""
    seeds, images = values.shape
    left = values - values.mean(axis=0) - values.mean(axis=1, keepdims=True) + values.mean()
    free = (seeds - 1) * (images - 1)
    return float((left**2).sum() / free / (seeds * images)) if free else 0.0


def _words(a: str, b: str, pair: Mapping[str, Any], metric: str) -> str:
    low = difference_words(pair["low"], metric).removesuffix(" points")
    size = (
        f"{difference_words(pair['difference'], metric)} on average over the seeds, interval {low} "
        f"to {difference_words(pair['high'], metric)}"
    )
    if pair["verdict"] == "none":
        return f"beyond these seeds no difference can be shown between {a} and {b} ({size})"
    better, worse = (a, b) if pair["verdict"] == "a" else (b, a)
    return f"{better} beats {worse}, also beyond these seeds ({size})"
