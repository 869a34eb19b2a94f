"""Ridge classifiers in closed form: one decomposition a penalty gives all folds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.linalg.lapack import dpotri
from scipy.sparse import csr_array

Array = NDArray[np.float64]
Indices = NDArray[np.int64]

# Of kernels whose diagonal is 1 on average: from hardly any to nearly the means of the classes.
PENALTIES = (1e-2, 1e-1, 1.0, 10.0)
TINY = 1e-9
TELLING = 400  # rows whose error tells the penalty, if there are so many


def class_weights(labels: Indices) -> Array:
    """A weight for each row; all classes weigh the same together, and the mean is 1."""
    counts = np.bincount(labels)
    weights: Array = (len(labels) / np.count_nonzero(counts) / counts[labels]).astype(np.float64)
    return weights


@dataclass(frozen=True)
class Scaling:
    """Mean and factor of each feature; rows have length 1 on average.

    A feature is divided by the root of the mean of its own variance and the usual one: with few
    images a feature that hardly ever varies would else count as much as those that tell the classes
    apart (with 2 images a class a probe on hymenoptera lost 7 points to that). Groups of features
    (stages) that are scaled on their own and then joined weigh the same.
    """

    mean: Array
    factor: Array

    @classmethod
    def of(cls, features: NDArray[np.floating], weights: Array) -> Scaling:
        """From the rows of (N, D); features that are constant become 0."""
        share = (weights / weights.sum()).astype(np.float64)
        mean = share @ features
        variance = share @ (features - mean) ** 2
        varies = variance > (1e-6 * np.maximum(np.abs(mean), TINY)) ** 2
        if not varies.any():
            return cls(mean, np.zeros_like(mean))
        leant = (variance + variance[varies].mean()) / 2
        length = (variance / leant)[varies].sum()
        return cls(mean, np.where(varies, 1 / np.sqrt(leant * length), 0.0))

    def __call__(self, features: NDArray[np.floating]) -> Array:
        """Scaled rows."""
        scaled: Array = (features - self.mean) * self.factor
        return scaled


@dataclass(frozen=True)
class Smoother:
    """What a weighted ridge regression with a free intercept makes of any targets.

    The fitted values are a linear map of the targets, and what a fit without some rows would say of
    them follows from the map, without another fit (the formula of PRESS, Allen 1974, for groups of
    rows).

    Args:
        gram: Inner products of the scaled rows (N, N), or of the features (D, D) where those are
            few; of rows that are centred and multiplied by the roots of their weights.
        rows: The rows (N, D) in the second case, else None.
        root: Roots of the weights of the rows.
    """

    gram: Array
    rows: Array | None
    root: Array

    @classmethod
    def of(cls, scaled: Array, weights: Array) -> Smoother:
        """From rows that are centred by these weights, (N, D)."""
        root = np.sqrt(weights)
        rows = scaled * root[:, None]
        if 2 * rows.shape[1] > rows.shape[0]:
            return cls(rows @ rows.T, None, root)
        return cls(rows.T @ rows, rows, root)

    def hat(self, penalty: float) -> Array:
        """The map from targets to fitted values, both times the roots of the weights: (N, N)."""
        lower = _shifted_cholesky(self.gram, penalty)
        if self.rows is None:
            inverse, _ = dpotri(lower, lower=True, overwrite_c=True)
            found: Array = (inverse + inverse.T) * -penalty
            found[np.diag_indices_from(found)] = 1 - penalty * np.diag(inverse)
        else:
            half = _solved(lower, self.rows.T)
            found = half.T @ half
        unit = self.root / np.linalg.norm(self.root)  # the intercept, which is not penalised
        found += np.outer(unit, unit)
        return found

    @property
    def eigenvalues(self) -> Array:
        """Squares of the singular values of the scaled rows."""
        found: Array = np.clip(np.linalg.eigvalsh(self.gram), 0, None)
        return found


class LeftOut(NamedTuple):
    """A fold that a regression was not fitted to.

    Args:
        number: Of the fold.
        penalty: Of the regression.
        residuals: Of the fold's rows (n, outputs), times the roots of their weights.
        press: Sum of the squared leave-one-out residuals of some of the other rows.
    """

    number: int
    penalty: float
    residuals: Array
    press: float


def held_out(
    smoother: Smoother, targets: Array, folds: Sequence[Indices]
) -> tuple[Array, tuple[float, ...]]:
    """What ridge regressions say of rows that they were not fitted to.

    Each fold's penalty is the one whose leave-one-out error among the other folds is least, so the
    rows that are judged have no say in it.

    Args:
        smoother: Of the features.
        targets: (N, outputs).
        folds: Rows that are left out together; each row in exactly one fold.

    Returns:
        Outputs (N, outputs), and the penalty of each fold.
    """
    best = np.full(len(folds), np.inf)
    chosen = [PENALTIES[-1]] * len(folds)
    outputs = np.zeros_like(targets)
    weighted = targets * smoother.root[:, None]
    if smoother.rows is None:
        every = _left_out_of_rows(smoother, weighted, folds)
    else:
        every = _left_out_of_features(smoother.rows, smoother.root, weighted, folds)
    for number, penalty, residuals, press in every:
        if press < best[number]:
            best[number], chosen[number] = press, penalty
            fold = folds[number]
            outputs[fold] = targets[fold] - residuals / smoother.root[fold, None]
    return outputs, tuple(chosen)


def _left_out_of_rows(
    smoother: Smoother, weighted: Array, folds: Sequence[Indices]
) -> Iterator[LeftOut]:
    """From the map of all rows: cheap where there are fewer rows than features."""
    sparse = csr_array(weighted.T)  # the targets are nearly all zeros
    for penalty in PENALTIES:
        hat = smoother.hat(penalty)
        residuals = weighted - (sparse @ hat).T
        for number, fold in enumerate(folds):
            rest = _rest(folds, number)
            keeps = np.eye(len(fold)) * (1 + TINY) - hat[np.ix_(fold, fold)]
            lower = _cholesky(keeps)
            across = _solved(lower, hat[np.ix_(fold, rest)])
            own = _solved(lower, residuals[fold])
            others = residuals[rest] + across.T @ own
            leverage = hat[rest, rest] + np.einsum("ij,ij->j", across, across)
            yield LeftOut(number, penalty, _solved(lower, own, trans=1), _press(others, leverage))


def _left_out_of_features(
    rows: Array, root: Array, weighted: Array, folds: Sequence[Indices]
) -> Iterator[LeftOut]:
    """From normal equations without the fold: cheap where there are few features."""
    design = np.column_stack([rows, root])
    both = design.T @ design
    toward = (csr_array(weighted.T) @ design).T
    for number, fold in enumerate(folds):
        rest, own = _rest(folds, number), design[fold]
        other, wanted = design[rest], weighted[rest]
        without = both - own.T @ own
        aims = toward - own.T @ weighted[fold]
        for penalty in PENALTIES:
            lower = _shifted_cholesky(without, np.append(np.full(rows.shape[1], penalty), 0.0))
            fitted = _solved(lower, _solved(lower, aims), trans=1)
            others = wanted - other @ fitted
            half = _solved(lower, other.T)
            leverage = np.einsum("ij,ij->j", half, half)
            left = weighted[fold] - own @ fitted
            yield LeftOut(number, penalty, left, _press(others, leverage))


def _rest(folds: Sequence[Indices], number: int) -> Indices:
    """Rows of the other folds, as many as are needed, those of the next fold first."""
    return np.concatenate([*folds[number + 1 :], *folds[:number]])[:TELLING]


def _press(residuals: Array, leverage: Array) -> float:
    return float(np.sum((residuals / np.maximum(1 - leverage, TINY)[:, None]) ** 2))


def _shifted_cholesky(gram: Array, shift: Array | float) -> Array:
    """Lower factor of a symmetric matrix (N, N) with `shift` added to its diagonal."""
    shifted = gram.copy()
    shifted[np.diag_indices_from(shifted)] += shift
    return _cholesky(shifted)


def _cholesky(matrix: Array) -> Array:
    # scipy's would not let other threads work.
    return np.asarray(np.linalg.cholesky(matrix), np.float64)


def _solved(lower: Array, right: Array, trans: int = 0) -> Array:
    found: Array = solve_triangular(lower, right, lower=True, trans=trans, check_finite=False)
    return found


@dataclass(frozen=True)
class Ridge:
    """A fitted classifier: one output a class, the largest wins."""

    scaling: Scaling
    coefficients: Array
    intercept: Array

    @classmethod
    def fit(cls, features: NDArray[np.floating], labels: Indices, penalty: float) -> Ridge:
        """From rows (N, D) and class indices; all classes weigh the same.

        Args:
            features: (N, D).
            labels: (N,), from 0; classes without rows get the output of no class.
            penalty: In the unit of `PENALTIES`.
        """
        weights = class_weights(labels)
        scaling = Scaling.of(features, weights)
        root = np.sqrt(weights)[:, None]
        rows = scaling(features) * root
        targets = np.eye(labels.max() + 1)[labels]
        mean = np.average(targets, axis=0, weights=weights)
        centred = (targets - mean) * root
        if rows.shape[1] > rows.shape[0]:
            kernel = rows @ rows.T + penalty * np.eye(len(rows))
            coefficients = rows.T @ cho_solve(cho_factor(kernel), centred)
        else:
            covariance = rows.T @ rows + penalty * np.eye(rows.shape[1])
            coefficients = cho_solve(cho_factor(covariance), rows.T @ centred)
        return cls(scaling, coefficients, mean)

    def __call__(self, features: NDArray[np.floating]) -> Indices:
        """Class index of each row."""
        scores = self.scaling(features) @ self.coefficients + self.intercept
        return np.asarray(scores.argmax(axis=1), np.int64)
