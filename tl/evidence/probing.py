"""How well simple classifiers tell the classes apart, judged on rows that they did not see."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tl.decision.evidence import Score
from tl.evidence.ridge import (
    Array,
    Indices,
    Ridge,
    Scaling,
    Smoother,
    class_weights,
    held_out,
)

FEW = 200  # rows; below, more folds and several ways to cut them
FOLDS, MORE_FOLDS, REPEATS = 5, 10, 4
NEIGHBOURS, TEMPERATURE = 5, 0.07
HALVES, QUARTERS = 3, 1  # how often the rows are cut in two, and in four
# Rows that were judged by classifiers with training rows in common are not independent. Over draws
# of synthetic sets (N = 20 to 240) qualities vary by 1.0 to 1.4 times what independence would give.
SHARED = 1.25
PERMUTED_ROWS, PERMUTATIONS, PERMUTED_PENALTY = 600, 99, 1.0
LEAST_ROWS = 2  # of a class that is judged

Each = Callable[..., Iterator[Any]]  # as `map`


@dataclass(frozen=True)
class Judged:
    """Whether each row was told right.

    Args:
        right: (N,) in [0, 1]: share of the repeats that were right.
        labels: (N,), from 0 without gaps.
        penalties: One for each fold of the first repeat.
    """

    right: Array
    labels: Indices
    penalties: tuple[float, ...] = ()

    @property
    def quality(self) -> Score:
        """Balanced accuracy corrected for chance: 0 is chance, 1 is perfect."""
        found = balanced_mean(self.right, self.labels, (0.0, 1.0))
        return _corrected(found, self.labels, shift=True)

    def minus(self, other: Judged) -> Score:
        """Difference of the qualities, with the error of the paired difference."""
        return paired(self.right - other.right, self.labels)


def paired(differences: Array, labels: Indices) -> Score:
    """Difference of two qualities from that of each row, in [-1, 1]."""
    found = balanced_mean(differences, labels, (-1.0, 1.0))
    return _corrected(found, labels, shift=False)


def _corrected(score: Score, labels: Indices, *, shift: bool) -> Score:
    chance = 1 / len(np.unique(labels))
    value = score.value - chance if shift else score.value
    return Score(value / (1 - chance), SHARED * score.error / (1 - chance))


def balanced_mean(values: Array, labels: Indices, ends: tuple[float, float]) -> Score:
    """Mean over the classes of the means of their rows, and its standard error.

    A few rows that happen to agree would have no error at all. So the common variance of all rows
    counts one more row at either end of the scale (as Agresti and Coull 1998 do for shares), and
    the larger of two errors is given: by the common variance, and by that of each class.

    Args:
        values: (N,).
        labels: (N,), class indices.
        ends: Least and largest possible value.
    """
    _, own, counts = np.unique(labels, return_inverse=True, return_counts=True)
    means = np.bincount(own, values) / counts
    common = float(np.append(values, ends).var())
    within = np.bincount(own, (values - means[own]) ** 2)
    alone = (within + common) / counts
    error = max(common * (1 / counts).sum(), (alone / counts).sum()) ** 0.5 / len(counts)
    return Score(float(means.mean()), float(error))


def cut_folds(labels: Indices, number: int, rng: np.random.Generator) -> list[Indices]:
    """Rows of each fold; each class is spread over the folds as evenly as it goes.

    Classes begin at different folds, so that classes with few rows do not all lie in the first one.
    """
    fold = np.empty(len(labels), np.int64)
    begin = 0
    for label in rng.permutation(np.unique(labels)):
        rows = rng.permutation(np.flatnonzero(labels == label))
        fold[rows] = (begin + np.arange(len(rows))) % number
        begin += len(rows)
    folds = [np.flatnonzero(fold == i) for i in range(number)]
    return [rows for rows in folds if len(rows)]


def folds_for(labels: Indices) -> int:
    """How many folds: with few images more, but no more than the usual class has images.

    Beyond that, a row that is left out would make its class smaller than the others, and a
    classifier without any signal would look worse than chance.
    """
    usual = int(np.median(np.bincount(labels)[np.unique(labels)]))
    most = MORE_FOLDS if len(labels) < FEW else FOLDS
    return int(np.clip(usual, 2, most))


class Prober:
    """Judges groups of features by the same rows, folds and rules.

    Args:
        groups: Name -> features (N, D) of the same rows.
        labels: (N,), from 0 without gaps; each class has two rows at least.
        seed: Of the folds.
        each: `map`, or what does the same on several cores.
    """

    def __init__(
        self,
        groups: Mapping[str, NDArray[np.floating]],
        labels: Indices,
        seed: int,
        each: Each = map,
    ) -> None:
        self.groups, self.labels, self.seed, self.each = dict(groups), labels, seed, each
        self.weights = class_weights(labels)
        rng = np.random.default_rng([seed, 0])
        repeats = REPEATS if len(labels) < FEW else 1
        self.folds = [cut_folds(labels, folds_for(labels), rng) for _ in range(repeats)]
        self.scaled = {
            name: Scaling.of(values, self.weights)(values) for name, values in groups.items()
        }
        self.smoothers: dict[str, Smoother] = {}

    def ridge(self, names: Sequence[str]) -> Judged:
        """Ridge classifier on the features of one group, or of several that weigh the same."""
        rows = np.concatenate([self.scaled[n] for n in names], axis=1) / np.sqrt(len(names))
        smoother = Smoother.of(rows, self.weights)
        if len(names) == 1:
            self.smoothers[names[0]] = smoother
        targets = np.eye(self.labels.max() + 1)[self.labels]
        right = []
        penalties: tuple[float, ...] = ()
        for folds in self.folds:
            outputs, chosen = held_out(smoother, targets, folds)
            penalties = penalties or chosen
            right.append(outputs.argmax(axis=1) == self.labels)
        return Judged(np.mean(right, axis=0), self.labels, penalties)

    def neighbours(self, name: str) -> Judged:
        """Nearest neighbours by cosine, each row among all others; near ones count more."""
        rows = self.scaled[name]
        rows = (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)).astype("f4")
        cosine = rows @ rows.T
        np.fill_diagonal(cosine, -np.inf)
        number = min(NEIGHBOURS, len(rows) - 1)
        near = np.argpartition(-cosine, number - 1, axis=1)[:, :number]
        votes = np.zeros((len(rows), self.labels.max() + 1))
        weight = np.exp((np.take_along_axis(cosine, near, axis=1) - 1) / TEMPERATURE)
        np.add.at(votes, (np.arange(len(rows))[:, None], self.labels[near]), weight)
        return Judged((votes.argmax(axis=1) == self.labels).astype(float), self.labels)

    def depth_gap(self, judged: Mapping[str, Judged], last: str) -> Score:
        """The best earlier group minus the last one.

        The best of several noisy figures is too good. So the rows of each fold are judged by the
        group that is best for the rows of all other folds.
        """
        gaps = []
        earlier = [name for name in judged if name != last]
        for folds in self.folds:
            gap = np.zeros(len(self.labels))
            for fold in folds:
                others = np.setdiff1d(np.arange(len(gap)), fold)
                best = max(
                    earlier,
                    key=lambda n: (
                        balanced_mean(
                            judged[n].right[others], self.labels[others], (0.0, 1.0)
                        ).value
                    ),
                )
                gap[fold] = judged[best].right[fold] - judged[last].right[fold]
            gaps.append(gap)
        return paired(np.mean(gaps, axis=0), self.labels)

    def more_data(self, name: str, whole: Judged) -> tuple[Score | None, Score | None]:
        """Quality with all rows minus that with half of them, and with half minus a quarter.

        Args:
            name: Group of the features.
            whole: What `ridge` found for it.

        Returns:
            None where most rows are of classes with fewer than four (eight, for quarters): a part
            of them is too little.
        """
        kept = np.bincount(self.labels)[self.labels] >= 2 * LEAST_ROWS
        if kept.mean() < 0.5 or len(np.unique(self.labels[kept])) < 2:
            return None, None
        rng = np.random.default_rng([self.seed, 1])
        features, labels = self.groups[name][kept], self.labels[kept]
        if not kept.all():
            _, labels = np.unique(labels, return_inverse=True)
            whole = Prober({name: features}, labels, self.seed).ridge([name])
        half = self._in_parts(name, features, labels, 2, HALVES, rng)
        gain = paired(whole.right - half, labels)
        if np.bincount(labels).min() < 4 * LEAST_ROWS:
            return gain, None
        quarter = self._in_parts(name, features, labels, 4, QUARTERS, rng)
        return gain, paired(half - quarter, labels)

    def _in_parts(
        self,
        name: str,
        features: NDArray[np.floating],
        labels: Indices,
        parts: int,
        repeats: int,
        rng: np.random.Generator,
    ) -> Array:
        """Share of the repeats in which each row was told right within its part of all rows."""

        def right(part: tuple[Indices, int]) -> Array:
            rows, seed = part
            return Prober({name: features[rows]}, labels[rows], seed).ridge([name]).right

        cut = [
            (rows, int(rng.integers(2**31)))
            for _ in range(repeats)
            for rows in cut_folds(labels, parts, rng)
        ]
        found = np.zeros(len(labels))
        for (rows, _), told in zip(cut, self.each(right, cut), strict=True):
            found[rows] += told / repeats
        return found

    def flips(
        self,
        name: str,
        penalties: Sequence[float],
        rows: Indices,
        flipped: Sequence[NDArray[np.floating]],
    ) -> list[Score]:
        """Change of the quality on flipped images, each told by a classifier that never saw it.

        Args:
            name: Group of the features.
            penalties: One for each fold, as `ridge` chose them.
            rows: Which rows were flipped.
            flipped: Their features after each flip, (rows, D).
        """
        plain = np.zeros(len(rows))
        changed = np.zeros((len(flipped), len(rows)))
        for fold, penalty in zip(self.folds[0], penalties, strict=True):
            here = np.flatnonzero(np.isin(rows, fold))
            if not len(here):
                continue
            rest = np.setdiff1d(np.arange(len(self.labels)), fold)
            fitted = Ridge.fit(self.groups[name][rest], self.labels[rest], penalty)
            wanted = self.labels[rows[here]]
            plain[here] = fitted(self.groups[name][rows[here]]) == wanted
            for number, features in enumerate(flipped):
                changed[number, here] = fitted(features[here]) == wanted
        return [paired(right - plain, self.labels[rows]) for right in changed]

    def chance(self, names: Sequence[str]) -> float:
        """Share of label permutations that features explain at least as well as the labels.

        The figure is the held-out output for the row's own class, mean over the classes: it sees a
        signal that is too weak to change which output is largest. A part of the rows, as many of
        each class, is enough to see any signal.
        """
        rng = np.random.default_rng([self.seed, 2])
        rows = _even(self.labels, PERMUTED_ROWS, rng)
        _, labels = np.unique(self.labels[rows], return_inverse=True)
        features = [self.groups[name][rows] for name in names]
        weights = np.ones(len(rows))
        scaled = np.concatenate([Scaling.of(f, weights)(f) for f in features], axis=1)
        smoother = Smoother.of(scaled / np.sqrt(len(names)), weights)
        targets = np.eye(labels.max() + 1)[labels]
        orders = [np.arange(len(rows)), *(rng.permutation(len(rows)) for _ in range(PERMUTATIONS))]
        # Folds that know no labels: the true ones must have no advantage over those at random.
        folds = np.array_split(rng.permutation(len(rows)), min(2 * FOLDS, len(rows)))
        hat = smoother.hat(PERMUTED_PENALTY)
        inverses = [np.linalg.inv(np.eye(len(f)) - hat[np.ix_(f, f)]) for f in folds]
        figures = []
        for order in orders:
            outputs = targets[order]
            residuals = outputs - hat @ outputs
            for fold, inverse in zip(folds, inverses, strict=True):
                outputs[fold] -= inverse @ residuals[fold]
            figures.append(_explained(outputs, labels[order]))
        return sum(figure >= figures[0] for figure in figures) / len(figures)


def _explained(outputs: Array, labels: Indices) -> float:
    """How far the output for the own class is above the usual one, mean over the classes."""
    above = outputs[np.arange(len(labels)), labels] - outputs.mean(axis=0)[labels]
    counts = np.bincount(labels)
    return float((np.bincount(labels, above) / counts).mean())


def _even(labels: Indices, most: int, rng: np.random.Generator) -> Indices:
    """Rows of which each class has about as many, at most `most`; few of the classes if need be."""
    classes = rng.permutation(np.unique(labels))
    usual = int(np.median(np.bincount(labels)[classes]))
    each = max(min(usual, most // len(classes)), 2)
    rows = []
    for label in classes[: max(most // each, 2)]:
        own = np.flatnonzero(labels == label)
        rows.append(rng.permutation(own)[:each])
    return np.sort(np.concatenate(rows))
