"""One number an image: errors in the units of the target, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from tl.config import Task
from tl.evaluation.groups import by_group, worst_group
from tl.evaluation.report import Report, refuse_infinite
from tl.evaluation.resampling import interval

FIGURES = ("mae", "rmse", "r2")
RANGES = 5  # of the target, with as many images each, for which errors are shown


def judge_regression(
    values: ArrayLike,
    targets: ArrayLike,
    names: Sequence[str],
    split: str,
    scale: float,
    *,
    groups: Iterable[object] | None = None,
) -> Report:
    """Judge predicted numbers; see `tl.evaluation.evaluate`."""
    v, t = checked(values, targets)
    error = v - t
    figures = _figures(error, t)
    low, high = interval(figures, len(t))
    once = figures(np.ones((1, len(t))))[0]
    metrics: dict[str, float] = {}
    for name, value, lower, upper in zip(FIGURES, once, low, high, strict=True):
        if np.isfinite((value, lower, upper)).all():
            metrics |= {name: value, f"{name}_low": lower, f"{name}_high": upper}
    metrics["loss"] = np.square(error / scale).mean()
    found = by_group(np.abs(error), groups) if groups is not None else None
    metrics |= worst_group(found, "mae", lowest=False)
    metrics["images"] = len(t)
    return Report(
        split,
        {name: float(value) for name, value in metrics.items()},
        _by_range(error, t),
        None,
        tuple(names),
        Task.regression,
        truth=t,
        predicted=v,
        groups=found,
    )


def checked(
    values: ArrayLike, targets: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Predicted (N,) or (N, 1) and true numbers as arrays (N,).

    Raises:
        EvaluationError: A prediction is not finite.
        ValueError: They do not fit each other.
    """
    v, t = np.asarray(values, dtype=np.float64), np.asarray(targets, dtype=np.float64)
    v = v[:, 0] if v.ndim == 2 and v.shape[1] == 1 else v
    if v.ndim != 1 or len(v) == 0 or t.shape != v.shape:
        raise ValueError(f"expected values and targets (N,) with N > 0, got {v.shape}, {t.shape}")
    if not np.isfinite(t).all():
        raise ValueError("targets must be finite")
    refuse_infinite(v, "values")
    return v, t


def _figures(
    error: NDArray[np.float64], target: NDArray[np.float64]
) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """Weights (R, N) of images -> mean absolute error, root of the mean squared one, and R²."""
    around = target - target.mean()
    columns = np.stack([np.abs(error), error**2, around, around**2], axis=1)

    def figures(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        absolute, squared, middle, spread = (weights @ columns / len(error)).T
        variance = spread - middle**2
        with np.errstate(invalid="ignore", divide="ignore"):
            r2 = np.where(variance > 1e-12 * spread, 1 - squared / variance, np.nan)
        return np.stack([absolute, np.sqrt(squared), r2], axis=1)

    return figures


def _by_range(error: NDArray[np.float64], target: NDArray[np.float64]) -> pd.DataFrame:
    """Where on the target's axis the errors are: ranges with about as many images each."""
    edges = np.unique(np.quantile(target, np.linspace(0, 1, RANGES + 1)))
    index = np.clip(np.searchsorted(edges, target, side="right") - 1, 0, max(len(edges) - 2, 0))
    groups = pd.DataFrame({"target": target, "error": error, "range": index}).groupby("range")
    return pd.DataFrame(
        {
            "from": groups["target"].min(),
            "to": groups["target"].max(),
            "images": groups.size().astype(np.int64),
            "mae": groups["error"].agg(lambda e: e.abs().mean()),
            "bias": groups["error"].mean(),
        }
    ).reset_index(drop=True)
