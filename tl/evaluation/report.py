"""What an evaluation gives, whatever the task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tl.config import Task, TlError
from tl.evaluation.abstaining import Abstain
from tl.evaluation.calibration import Temperature

HEADLINES = {Task.single: "acc", Task.multi: "map", Task.regression: "mae"}


class EvaluationError(TlError):
    """The predictions cannot be judged, because the network gave no finite outputs."""


def headline(task: Task) -> str:
    """The metric that stands for a model in one number: `acc`, `map` or `mae`.

    It names an entry of `Report.metrics`; its 95 % interval has the same name with `_low` and
    `_high`.
    """
    return HEADLINES[task]


def lower_is_better(task: Task) -> bool:
    """Whether the headline metric of a task is an error."""
    return task is Task.regression


@dataclass(frozen=True)
class Report:
    """Result of one evaluation.

    `metrics` holds, for one label an image: `acc` with its 95 % Wilson interval; `f1_macro` and
    `balanced_acc` (means over the classes that occur), `f1_weighted`, `top5` (with more than five
    classes), `log_loss` (in nats), `brier` (sum of squares, in [0, 2]) and `ece` (expected
    calibration error) with 95 % bootstrap intervals; `auc` and `ap` (mean over the classes, each
    against all others) with intervals of the bootstrap's limit. An interval has the name of its
    figure with `_low` and `_high`. `loss` and `ece_uncalibrated` are of the network as it was
    trained, all others of what the bundle says. `sure_share` of the images have a score from
    the abstain threshold on, and `sure_acc` of these are right.

    For several labels an image: `map` (mean over the classes of the average precision), `auc`,
    `f1_macro`, `f1_micro`, `exact_match` (share of images with all labels right) and `hamming`
    (share of wrong decisions) at the thresholds, `log_loss` (mean of a label), `brier` and `ece`,
    all with 95 % intervals; `loss` and `ece_uncalibrated`.

    For regression: `mae`, `rmse` (in units of the target) and `r2` with 95 % bootstrap intervals,
    `loss` (squared error in units of the target's variance); no `r2` where all images have the
    same target.

    Always `images`; with groups `groups` and, of the worst with ten images or more, its `acc`,
    `hamming` or `mae` as `worst_group_…`, with an interval that holds for all groups together.

    Args:
        split: Prefix of the metrics.
        metrics: Name to value.
        per_class: One row a class [class, images, precision, recall, f1, ap, auc], the first three
            figures with `_low` and `_high`, for several labels also [threshold]; what is undefined
            (the recall of a class without images) is NaN. For regression one row a range of the
            target [from, to, images, mae, bias].
        confusion: Counts of images: true classes are the rows, predicted classes the columns; None
            with several labels or a number an image, and with more than 2,000 classes.
        classes: Names; for regression that of the target.
        task: What the images are labelled with.
        thresholds: For several labels: the probability from which each class counts as present.
        truth: What is true, as in `tl.evaluation.evaluate`.
        predicted: What the network says: probabilities or numbers.
        groups: One row a group of images; see `tl.evaluation.groups.by_group`.
        bins: Confidence against accuracy; see `tl.evaluation.calibration.reliability`. With
            several labels each decision counts: its probability against how often it is true.
        bins_uncalibrated: The same of the network as it was trained.
        temperature: What was fitted on val; None: nobody asked.
        abstain: What was chosen on val; None: nobody asked.
    """

    split: str
    metrics: dict[str, float]
    per_class: pd.DataFrame
    confusion: NDArray[np.int64] | None
    classes: tuple[str, ...]
    task: Task = Task.single
    thresholds: tuple[float, ...] | None = None
    truth: NDArray[Any] | None = None
    predicted: NDArray[np.float64] | None = None
    groups: pd.DataFrame | None = None
    bins: pd.DataFrame | None = None
    bins_uncalibrated: pd.DataFrame | None = None
    temperature: Temperature | None = None
    abstain: Abstain | None = None

    @property
    def headline(self) -> float:
        """The metric that stands for the model in one number; see `headline`."""
        return self.metrics[headline(self.task)]

    def flat(self) -> dict[str, float]:
        """The metrics under their names in `metrics.json` and MLflow, such as `val/acc`."""
        return {f"{self.split}/{name}": value for name, value in self.metrics.items()}


def refuse_infinite(outputs: NDArray[np.float64], what: str) -> None:
    """Refuse outputs of a network whose training went astray.

    Args:
        outputs: One row or one value an image.
        what: Name of an output in the message.

    Raises:
        EvaluationError: One of them is not finite.
    """
    finite = np.isfinite(outputs)
    bad = int((~(finite.all(axis=1) if finite.ndim > 1 else finite)).sum())
    if bad:
        msg = (
            f"the network gave no finite {what} for {bad} of {len(outputs)} images: its training "
            "has diverged; use a lower finetune.head_lr or finetune.precision=32-true"
        )
        raise EvaluationError(msg)
