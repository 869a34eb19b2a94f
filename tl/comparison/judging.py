"""Which run is better than which: groups with the same images, and a verdict for each pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tl.comparison.words import pair_words
from tl.evaluation import PairResult, PairSide, Sheet, accuracy_interval, compare_pair, holm
from tl.evaluation.paired import compare_drawn, draws, figure, judged, p_values
from tl.evaluation.sheets import Truth

MOST_FOR_ALL_PAIRS = 20
OPTIMISM_RESAMPLES = 500


@dataclass(frozen=True)
class Pair:
    """Two runs and what the images say of them.

    Args:
        a: Place of the first run in its group.
        b: Of the second.
        result: Of the comparison, by itself.
        p_adjusted: With the other comparisons counted.
    """

    a: int
    b: int
    result: PairResult
    p_adjusted: float


@dataclass(frozen=True)
class Group:
    """Runs that answered the same questions.

    Args:
        truth: Images and labels.
        metric: `acc`, `map` or `mae`.
        ids: Of the runs, the best first.
        sides: What each said, for `tl.evaluation.paired`.
        values: Headline of each.
        lows: Lower ends of their intervals.
        highs: Upper ends.
        reference: Place of the run that the others are compared with.
        pairs: The reference with each, and all pairs where there are few runs.
        optimism: How much being the best of these flatters the best; in units of the metric.
        drawn: Headlines over the same resamples, (R, runs); None for accuracies.
    """

    truth: Truth
    metric: str
    ids: tuple[str, ...]
    sides: tuple[PairSide, ...]
    values: tuple[float, ...]
    lows: tuple[float, ...]
    highs: tuple[float, ...]
    reference: int
    pairs: tuple[Pair, ...]
    optimism: float
    drawn: NDArray[np.float64] | None


def groups_of(sheets: Mapping[str, Sheet], baseline: str | None, confidence: float) -> list[Group]:
    """Compare runs where they can be compared.

    Args:
        sheets: Id of a run -> what it said of the images of the split.
        baseline: Id of the run that others are compared with; None: the best of each group.
        confidence: Of intervals and verdicts.

    Returns:
        The group with the baseline first, else the largest; among equals as they come.
    """
    together: dict[str, list[str]] = {}
    for run, sheet in sheets.items():
        together.setdefault(sheet.truth.fingerprint, []).append(run)
    found = [
        _group([(run, sheets[run]) for run in runs], baseline, confidence)
        for runs in together.values()
    ]
    return sorted(
        found, key=lambda g: (baseline is not None and baseline not in g.ids, -len(g.ids))
    )


def _group(runs: Sequence[tuple[str, Sheet]], baseline: str | None, confidence: float) -> Group:
    metric = runs[0][1].metric
    sides = {run: sheet.side() for run, sheet in runs}
    drawn = None if metric == "acc" else draws([*sides.values()], metric)
    values, lows, highs = _headlines([*sides.values()], metric, drawn, confidence)
    order = np.argsort(values if metric == "mae" else -values, kind="stable")
    ids = [runs[i][0] for i in order]
    ordered = [sides[run] for run in ids]
    drawn = drawn[:, order] if drawn is not None else None
    reference = ids.index(baseline) if baseline in ids else 0
    return Group(
        truth=runs[0][1].truth,
        metric=metric,
        ids=tuple(ids),
        sides=tuple(ordered),
        values=tuple(values[order].tolist()),
        lows=tuple(lows[order].tolist()),
        highs=tuple(highs[order].tolist()),
        reference=reference,
        pairs=_pairs(ordered, metric, drawn, reference, baseline in ids, confidence),
        optimism=_optimism(ordered, metric, drawn),
        drawn=drawn,
    )


def _headlines(
    sides: Sequence[PairSide], metric: str, drawn: Any, confidence: float
) -> tuple[Any, Any, Any]:
    if metric == "acc":
        right = [int(side.values.sum()) for side in sides]
        images = len(sides[0])
        ends = {n: accuracy_interval(n, images, confidence) for n in set(right)}
        low, high = np.array([ends[n] for n in right]).T
        return np.array(right) / images, low, high
    values = np.array([figure(side, metric) for side in sides])
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(drawn, [tail, 1 - tail], axis=0)
    return values, low, high


def _pairs(
    sides: Sequence[PairSide],
    metric: str,
    drawn: Any,
    reference: int,
    asked: bool,
    confidence: float,
) -> tuple[Pair, ...]:
    """All pairs count where the reference was chosen by the figures themselves.

    The best of many is the best by luck, too: against it each other one looks bad. A baseline that
    was named before is compared with each other run, and with nothing else.
    """
    count = len(sides)
    if count < 2:
        return ()
    p = p_values(sides, metric, drawn)
    with_reference = [(reference, i) for i in range(count) if i != reference]
    if asked:
        counted = with_reference
    else:
        counted = [*zip(*(ends.tolist() for ends in np.triu_indices(count, 1)), strict=True)]
    rows, columns = np.array(counted).T
    adjusted = np.ones((count, count))
    adjusted[rows, columns] = adjusted[columns, rows] = holm(p[rows, columns])
    shown = with_reference
    if not asked and count <= MOST_FOR_ALL_PAIRS:
        shown = [*combinations(range(count), 2)]

    def result(a: int, b: int) -> PairResult:
        if metric == "acc":
            return compare_pair(sides[a], sides[b], metric=metric, confidence=confidence)
        ends = drawn[:, a], drawn[:, b]
        return compare_drawn(sides[a], sides[b], *ends, metric=metric, confidence=confidence)

    return tuple(Pair(a, b, result(a, b), float(adjusted[a, b])) for a, b in shown)


def _optimism(sides: Sequence[PairSide], metric: str, drawn: Any) -> float:
    """What the winner of a draw of images is better in that draw than in truth, on average.

    Source: R. J. Tibshirani, R. Tibshirani, "A bias correction for the minimum error rate in
    cross-validation", Ann. Appl. Statist. 3 (2009), whose folds are draws here.
    """
    if len(sides) < 2:
        return 0.0
    if drawn is None:
        drawn = draws(sides, metric, resamples=OPTIMISM_RESAMPLES)
        truth = np.array([side.values.mean() for side in sides])
    else:
        truth = np.nanmean(drawn, axis=0)
    sign = -1 if metric == "mae" else 1
    winner = np.nanargmax(sign * drawn, axis=1)
    gain = sign * (drawn[np.arange(len(drawn)), winner] - truth[winner])
    return float(max(np.nanmean(gain), 0))


def pair_values(
    group: Group, pair: Pair, names: Mapping[str, str], confidence: float
) -> dict[str, Any]:
    """A pair as `compare.json` has it."""
    r = pair.result
    verdict = judged(r.difference, pair.p_adjusted, group.metric, confidence)
    a, b = group.ids[pair.a], group.ids[pair.b]
    return {
        "a": a,
        "b": b,
        "images": r.images,
        "difference": r.difference,
        "low": r.low,
        "high": r.high,
        "p": r.p_value,
        "p_adjusted": pair.p_adjusted,
        "only_a": r.only_a,
        "only_b": r.only_b,
        "images_needed": r.images_needed,
        "detectable": r.detectable,
        "verdict": verdict,
        "words": pair_words(
            names[a], names[b], r, verdict, group.metric, pair.p_adjusted, confidence
        ),
    }
