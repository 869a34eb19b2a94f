"""What the validation of each epoch tells beside its loss: the headline score of the task first."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError, R2Score
from torchmetrics.classification import (
    MulticlassStatScores,
    MultilabelAveragePrecision,
    MultilabelStatScores,
)

from tl.config import Task
from tl.losses import Objective

NAMES = {
    Task.single: ("acc", "f1_macro"),
    Task.multi: ("map",),
    Task.regression: ("mae", "r2"),
}


class Scores(nn.Module):
    """Scores over the batches of a validation, in the units of `tl.evaluation`.

    Args:
        objective: Says what the outputs mean.
        outputs: Of the network.

    Attributes:
        names: Keys of `compute`, the headline first.
    """

    def __init__(self, objective: Objective, outputs: int) -> None:
        super().__init__()
        self.objective = objective
        self.names = NAMES[objective.task]
        if objective.task is Task.single:
            self.counts = MulticlassStatScores(outputs, average=None, validate_args=False)
        elif objective.task is Task.multi:
            self.ranking = MultilabelAveragePrecision(
                outputs, average="none", thresholds=None, validate_args=False
            )
            self.marks = MultilabelStatScores(outputs, average=None, validate_args=False)
        else:
            self.error, self.share = MeanAbsoluteError(), R2Score()

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        """Take in a batch: outputs (N, C) and labels as the table holds them."""
        task, outputs = self.objective.task, outputs.float()
        if task is Task.single:
            self.counts.update(outputs, labels)
        elif task is Task.multi:
            probabilities, marks = self.objective.activate(outputs), labels.int()
            self.ranking.update(probabilities, marks)
            self.marks.update(probabilities, marks)
        else:
            # Standardised: sums of squares of years or prices would lose their digits.
            wanted = self.objective.encode(labels)
            self.error.update(outputs, wanted)
            self.share.update(outputs[:, 0], wanted[:, 0])

    def compute(self) -> dict[str, Tensor]:
        """Scores of all batches since the last call."""
        task = self.objective.task
        if task is Task.single:
            found = self._classes(self.counts.compute())
            self.counts.reset()
        elif task is Task.multi:
            found = {"map": self._mean_precision()}
            self.ranking.reset()
            self.marks.reset()
        else:
            enough = int(self.share.total) > 1  # one number has no variance
            share = self.share.compute() if enough else torch.tensor(float("nan"))
            found = {"mae": self.error.compute() * self.objective.std, "r2": share}
            self.error.reset()
            self.share.reset()
        return found

    def _mean_precision(self) -> Tensor:
        """Mean of the average precision over the labels that some image has."""
        seen = self.marks.compute()[:, -1] > 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the labels that no image has
            each: Tensor = self.ranking.compute()
        return each[seen].mean()

    @staticmethod
    def _classes(counts: Tensor) -> dict[str, Tensor]:
        """Accuracy, and F1 as the mean over the classes that occur or were predicted."""
        right, wrong, _, missed, images = counts.double().unbind(dim=1)
        seen = (images + wrong) > 0
        f1 = 2 * right[seen] / (2 * right + wrong + missed)[seen]
        return {"acc": (right.sum() / images.sum()).float(), "f1_macro": f1.mean().float()}
