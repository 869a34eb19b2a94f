"""Figures of features and labels that rank backbones; none of them chooses how to transfer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax
from sklearn.covariance import ledoit_wolf_shrinkage

from tl.evidence.ridge import Array, Indices

ROUNDS = 100
CONVERGED = 1e-4
TINY = 1e-12


def effective_rank(values: Array) -> float:
    """exp(entropy) of the singular values (Garrido et al. 2023, RankMe, arXiv:2210.02885).

    Args:
        values: Squares of the singular values, 0 or more.
    """
    roots = np.sqrt(np.clip(values, 0, None))
    if not roots.sum():
        return 0.0
    share = roots[roots > 0] / roots.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def spectrum(centred: Array) -> tuple[Array, Array]:
    """Left singular vectors (N, r) and squared singular values (r,) of rows (N, D)."""
    wide = centred.shape[1] > centred.shape[0]
    values, vectors = np.linalg.eigh(centred @ centred.T if wide else centred.T @ centred)
    kept = values > max(values[-1], 0) * 1e-9
    values, vectors = values[kept], vectors[:, kept]
    return (vectors if wide else centred @ vectors / np.sqrt(values)), values


def rank_scores(features: NDArray[np.floating], labels: Indices) -> dict[str, float]:
    """LogME and the shrunk H-score of the same features, from one decomposition.

    Args:
        features: (N, D).
        labels: (N,), class indices.
    """
    rows = features.astype(np.float64)
    rows -= rows.mean(axis=0)
    vectors, values = spectrum(rows)
    if not len(values):
        return {}
    targets = np.eye(labels.max() + 1)[labels][:, np.unique(labels)]
    return {
        "logme": logme(vectors, values, targets - targets.mean(axis=0)),
        "h_score": h_score(rows, vectors, values, targets),
    }


def logme(vectors: Array, values: Array, targets: Array) -> float:
    """Largest log evidence of a Bayesian linear regression, mean over targets and rows.

    You et al. 2021 (LogME, ICML, arXiv:2102.11005), by the fixed point of their section 4. A weight
    has prior precision a, the noise precision b: b = (N - gamma) / residual, a = gamma / |w|^2.

    Args:
        vectors: Left singular vectors of the features (N, r).
        values: Squares of their singular values (r,).
        targets: (N, outputs).
    """
    rows = len(vectors)
    z = (vectors.T @ targets) ** 2  # (r, outputs)
    outside = np.maximum((targets**2).sum(axis=0) - z.sum(axis=0), 0.0)
    s = values[:, None]
    a, b = np.ones(targets.shape[1]), np.ones(targets.shape[1])
    for _ in range(ROUNDS):
        before, precision = a / b, a + b * s
        weights = (b**2 * s * z / precision**2).sum(axis=0)
        residual = outside + (z * (a / precision) ** 2).sum(axis=0)
        gamma = (b * s / precision).sum(axis=0)
        a, b = gamma / np.maximum(weights, TINY), (rows - gamma) / np.maximum(residual, TINY)
        if np.all(np.abs(a / b - before) <= CONVERGED * before):
            break
    precision = a + b * s
    weights = (b**2 * s * z / precision**2).sum(axis=0)
    residual = outside + (z * (a / precision) ** 2).sum(axis=0)
    fit = rows * np.log(b / (2 * np.pi)) - b * residual - a * weights
    evidence = 0.5 * (fit + (np.log(a) - np.log(precision)).sum(axis=0))
    return float(evidence.mean() / rows)


def h_score(centred: Array, vectors: Array, values: Array, targets: Array) -> float:
    """tr(cov(f)^-1 cov(E[f|y])) with a shrunk covariance, 0 or more; it grows with the classes.

    Bao et al. 2019 (ICIP); shrunk by Ledoit and Wolf as in Ibrahim et al. 2021 (arXiv:2110.06893).

    Args:
        centred: Features (N, D), mean 0.
        vectors: Their left singular vectors (N, r).
        values: Squares of their singular values (r,).
        targets: One-hot labels (N, classes).
    """
    shrinkage = float(ledoit_wolf_shrinkage(centred, assume_centered=True))
    rows, size = centred.shape
    between = (((targets / np.sqrt(targets.sum(axis=0))).T @ vectors) ** 2).sum(axis=0)
    variances = values / rows
    shrunk = (1 - shrinkage) * variances + shrinkage * values.sum() / rows / size
    return float(((1 - shrinkage) * between * variances / shrunk).sum())


def leep(logits: NDArray[np.floating], labels: Indices) -> float:
    """Log expected empirical prediction, in nats, at most 0 (Nguyen et al. 2020, arXiv:2002.12462).

    Args:
        logits: Of the pretraining's own head, (N, source classes).
        labels: (N,), class indices.
    """
    theta = np.exp(log_softmax(logits.astype(np.float64), axis=1))
    targets = np.eye(labels.max() + 1)[labels][:, np.unique(labels)]
    joint = targets.T @ theta / len(labels)
    conditional = joint / np.maximum(joint.sum(axis=0), 1e-300)
    own = np.searchsorted(np.unique(labels), labels)
    return float(np.log(np.maximum((theta * conditional[own]).sum(axis=1), 1e-300)).mean())
