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


def family_values(family: Family, values: Mapping[str, float], confidence: float) -> dict[str, Any]:
    """Mean, spread and interval of a family, as `compare.json` has them.

    The interval is Student's, of the mean over seeds on these images: with two or three seeds it
    is wide, and rightly so.
    """
    numbers = np.array([values[run] for run in family.ids if run in values])
    mean = std = low = high = None
    if len(numbers):
        mean = float(numbers.mean())
    if len(numbers) > 1:
        std = float(numbers.std(ddof=1))
        reach = std * float(t.ppf((1 + confidence) / 2, len(numbers) - 1)) / math.sqrt(len(numbers))
        low, high = numbers.mean() - reach, numbers.mean() + reach
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
    """Images and seeds as two crossed samples; the part that both count is taken out once.

    Source: S. R. Searle, G. Casella, C. E. McCulloch, "Variance components", 1992, section 4.7;
    degrees of freedom: F. E. Satterthwaite, Biometrics Bulletin 2 (1946).
    """
    sides = [np.array([group.values[i] for i in rows]) for rows in (a, b)]
    difference = float(sides[0].mean() - sides[1].mean())
    seeds = [float(side.var(ddof=1) / len(side)) for side in sides]
    images, both = _of_images(group, a, b)
    parts = [*seeds, images, both]
    variance = max(sum(seeds) + images - both, sum(seeds), images)
    many = max(len(group.truth) - 1, 1)
    free = [len(a) - 1, len(b) - 1, many, many * (len(a) + len(b) - 2)]
    if variance <= 0:
        return {"difference": difference, "low": difference, "high": difference, "p": 1.0}
    degrees = max(variance**2 / sum(v**2 / n for v, n in zip(parts, free, strict=True)), 1.0)
    error = math.sqrt(variance)
    reach = float(t.ppf((1 + confidence) / 2, degrees)) * error
    return {
        "difference": difference,
        "low": difference - reach,
        "high": difference + reach,
        "p": float(2 * t.sf(abs(difference) / error, degrees)),
    }


def _of_images(group: Group, a: list[int], b: list[int]) -> tuple[float, float]:
    """Variance of the difference by the draw of images, and what seeds have counted of it."""
    if group.drawn is not None and group.metric == "map":  # no figure of one image: nothing twice
        drawn = group.drawn[:, a].mean(axis=1) - group.drawn[:, b].mean(axis=1)
        return float(np.nanvar(drawn, ddof=1)), 0.0
    one, other = (np.stack([group.sides[i].values for i in rows]) for rows in (a, b))
    images = one.shape[1]
    each = one.mean(axis=0) - other.mean(axis=0)
    spread = float(each.var(ddof=1)) if images > 1 else 0.0
    return spread / images, _interaction(one) + _interaction(other)


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
