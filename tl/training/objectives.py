"""What the images of a job ask of the loss: task, weights, classes of different sizes."""

from __future__ import annotations

import numpy as np

from tl.config import Imbalance, Task
from tl.data.errors import DataError
from tl.data.table import ImageTable
from tl.imbalance import choose_balance
from tl.losses import Objective

LOSSES = {
    Task.single: "cross-entropy of one class an image",
    Task.multi: "binary cross-entropy, mean over the labels",
    Task.regression: "squared error in units of the standard deviation of train",
}


def objective_for(table: ImageTable, imbalance: Imbalance) -> Objective:
    """Objective of a job, from the training images alone.

    Args:
        table: Images.
        imbalance: As asked.

    Raises:
        ConfigError: The task has no classes that could be balanced.
        DataError: No training image has any weight.
    """
    train = table.split("train")
    balance = choose_balance(imbalance, table.task, table.targets(train), table.classes)
    mean, std = table.target_scale() if table.task is Task.regression else (0.0, 1.0)
    usual = float(train["weight"].mean()) if "weight" in train else 1.0
    if not usual > 0:
        msg = (
            "column weight: all training images have the weight 0, so there is nothing to learn "
            "from; give those that count a weight above 0"
        )
        raise DataError(msg)
    return Objective(table.task, balance, mean=mean, std=std, usual_weight=usual)


def loss_facts(objective: Objective, table: ImageTable) -> dict[str, str]:
    """What a person should know of the loss."""
    balance = objective.balance
    facts = {"loss": LOSSES[objective.task]}
    if objective.task is Task.regression:
        facts["target"] = (
            f"{table.classes[0]}: mean {objective.mean:.4g}, standard deviation {objective.std:.4g}"
        )
    if "weight" in table.rows:
        weights = table.split("train")["weight"].to_numpy(np.float32)
        facts["weights"] = (
            f"column weight, {weights.min():.3g} to {weights.max():.3g}, as shares of their mean"
        )
    if objective.task is not Task.regression:
        facts["imbalance"] = f"{balance.method.value}: {balance.why}"
    return facts
