"""What a model is worth: metrics with an interval, calibration, a table of predictions.

Pure functions from outputs to numbers for each task (one label an image, several labels, one
number); nothing here knows a network or a file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from tl.config import Task
from tl.evaluation.abstaining import Abstain, Limit, choose_abstain
from tl.evaluation.calibration import (
    Temperature,
    calibration_error,
    fit_temperature,
    logits_of,
    probabilities,
)
from tl.evaluation.multi import choose_thresholds, judge_multi
from tl.evaluation.paired import PairResult, PairSide, compare_pair, holm, not_worse
from tl.evaluation.regression import judge_regression
from tl.evaluation.report import EvaluationError, Report, headline, lower_is_better
from tl.evaluation.resampling import wilson
from tl.evaluation.sheets import Aligned, PairingError, Sheet, aligned, sheet_of
from tl.evaluation.single import (
    accuracy_interval,
    judge_single,
    negative_log_likelihood,
)
from tl.evaluation.tables import predictions_table

__all__ = [
    "Abstain",
    "Aligned",
    "EvaluationError",
    "PairResult",
    "PairSide",
    "PairingError",
    "Report",
    "Sheet",
    "Temperature",
    "accuracy_interval",
    "aligned",
    "calibration_error",
    "choose_abstain",
    "choose_thresholds",
    "compare_pair",
    "evaluate",
    "fit_temperature",
    "headline",
    "holm",
    "lower_is_better",
    "negative_log_likelihood",
    "not_worse",
    "predictions_table",
    "probabilities",
    "sheet_of",
    "wilson",
]


def evaluate(
    outputs: ArrayLike,
    targets: ArrayLike,
    classes: Sequence[str],
    split: str,
    *,
    task: Task = Task.single,
    thresholds: Sequence[float] | None = None,
    scale: float = 1.0,
    temperature: Temperature | float | None = None,
    chose_temperature: bool = False,
    abstain: Limit | None = None,
    groups: Iterable[object] | None = None,
) -> Report:
    """Judge the predictions for one split.

    Args:
        outputs: One label an image: probabilities (N, C), each row sums to 1. Several labels:
            probabilities (N, C), each of its own. Regression: values (N,) or (N, 1) in units of
            the target.
        targets: One label: index of the true class, (N,), in [0, C). Several: 0 or 1, (N, C).
            Regression: (N,).
        classes: The C class names; for regression the name of the target.
        split: Name of the split, which becomes the prefix of the metrics.
        task: What the images are labelled with.
        thresholds: For several labels: the probability from which each class counts as present;
            default: chosen on these very predictions (do that on val alone).
        scale: For regression: standard deviation of the targets of train, the unit of `loss`.
        temperature: What `outputs` were made with; default: none.
        chose_temperature: These very images did: log loss, Brier and calibration error are then
            those of each image with the temperature that others chose.
        abstain: For one label: from which score on an answer is sure.
        groups: Of each image, (N,), such as a camera or a patient; missing where it has none.

    Raises:
        EvaluationError: An output is not finite, as happens when a training diverges; or no image
            has any label.
        ValueError: The shapes do not fit each other, or the rows are no probabilities.

    Example:
        >>> p = [[0.9, 0.1], [0.4, 0.6], [0.7, 0.3]]
        >>> report = evaluate(p, [0, 1, 1], ["ant", "bee"], "val")
        >>> round(report.flat()["val/acc"], 3), report.confusion.tolist()
        (0.667, [[1, 0], [1, 1]])
    """
    more: dict[str, Any] = {"groups": groups}
    if task is Task.regression:
        return judge_regression(outputs, targets, classes, split, scale, **more)
    if isinstance(temperature, float):
        temperature = Temperature(temperature, "that of the bundle")
    limit = Abstain(abstain.precision, abstain.threshold, abstain.note) if abstain else None
    if temperature is not None and np.isfinite(outputs).all():
        more |= _at_other_temperatures(outputs, task, temperature, each=chose_temperature)
    if task is Task.multi:
        report = judge_multi(outputs, targets, classes, split, thresholds, **more)
    else:
        sure_from = None
        if limit is not None:
            sure_from = math.inf if limit.threshold is None else limit.threshold
        report = judge_single(outputs, targets, classes, split, sure_from=sure_from, **more)
    return replace(report, temperature=temperature, abstain=limit)


def _at_other_temperatures(
    outputs: ArrayLike, task: Task, temperature: Temperature, *, each: bool
) -> dict[str, Any]:
    """Probabilities without temperature and, where asked for, with that of each image."""
    raw = logits_of(outputs, task) * temperature.value
    found = {"uncalibrated": probabilities(raw, task)}
    return found | ({"held_out": probabilities(raw, task, temperature.per_image)} if each else {})
