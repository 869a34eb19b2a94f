"""What a task asks of a network: its loss, the gradient of it, and what the outputs mean."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tl.config import Task
from tl.imbalance import Balance


class Objective(nn.Module):
    """Loss and reading of the outputs (N, C) of a network.

    One class: cross-entropy of a softmax. Several labels: binary cross-entropy of sigmoids, mean
    over the labels. A number: squared error, in units of the standard deviation of train.

    Targets are what `encode` makes of labels: class indices (N,), or soft ones (N, C), of which
    every row sums to 1; marks in [0, 1] (N, C); standardised numbers (N, 1).

    Args:
        task: What is predicted.
        balance: How classes of different sizes are treated.
        mean: A number: mean of train.
        std: A number: standard deviation of train, above 0.
        usual_weight: Mean of the weights of the training images, above 0: the loss is divided by
            it, so that learning rates mean the same with weights as without.
    """

    def __init__(
        self,
        task: Task = Task.single,
        balance: Balance | None = None,
        *,
        mean: float = 0.0,
        std: float = 1.0,
        usual_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.task = task
        self.balance = balance or Balance()
        self.mean, self.std = mean, std
        self.usual_weight = usual_weight
        self.positive: Tensor | None
        self.negative: Tensor | None
        self.shift: Tensor | None
        for name in ("positive", "negative", "shift"):
            values = getattr(self.balance, name)
            tensor = None if values is None else torch.tensor(values, dtype=torch.float32)
            self.register_buffer(name, tensor, persistent=False)

    def encode(self, labels: Tensor) -> Tensor:
        """Targets of what a table holds: class indices (N,), marks (N, C), or numbers (N,)."""
        if self.task is Task.regression:
            return ((labels - self.mean) / self.std).float()[:, None]
        return labels if self.task is Task.single else labels.float()

    def activate(self, outputs: Tensor) -> Tensor:
        """What the outputs say: probabilities (N, C), or numbers in the unit of the table (N,)."""
        if self.task is Task.regression:
            return outputs[:, 0] * self.std + self.mean
        return outputs.softmax(dim=1) if self.task is Task.single else outputs.sigmoid()

    def forward(
        self,
        outputs: Tensor,
        targets: Tensor,
        weights: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Mean loss, as it is minimised.

        Args:
            outputs: (N, C).
            targets: As of `encode`.
            weights: Of each image (N,), as in the table.
            label_smoothing: Share of the target that is spread over all classes, in [0, 1); a
                number has none.
        """
        plain = self.shift is None and self.positive is None and not self.balance.gamma
        if self.task is Task.single and plain and weights is None:
            return F.cross_entropy(outputs, targets, label_smoothing=label_smoothing)
        soft = self.soft(targets, outputs.shape[1], label_smoothing)
        losses = self.losses(outputs if self.shift is None else outputs + self.shift, soft)
        rows = self.row_weights(soft, weights)
        return (losses if rows is None else losses * rows).mean()

    # --- in parts, for `tl.heads` -------------------------------------------------------------

    def soft(self, targets: Tensor, outputs: int, smoothing: float = 0.0) -> Tensor:
        """Targets as a table (N, outputs), smoothed."""
        if self.task is Task.regression:
            return targets
        if targets.ndim == 1:
            targets = F.one_hot(targets, outputs).float()
        if not smoothing:
            return targets
        classes = outputs if self.task is Task.single else 2
        return targets * (1 - smoothing) + smoothing / classes

    def row_weights(self, soft: Tensor, weights: Tensor | None) -> Tensor | None:
        """Weight of each row in the mean (N,); None: all count the same."""
        rows = None if weights is None else weights / self.usual_weight
        if self.task is Task.single and self.positive is not None:
            of_class = soft @ self.positive
            rows = of_class if rows is None else rows * of_class
        return rows

    def losses(self, logits: Tensor, soft: Tensor) -> Tensor:
        """Loss of each row (N,), of logits that have the shift already."""
        if self.task is Task.regression:
            return (logits - soft).square().mean(dim=1)
        gamma = self.balance.gamma
        if self.task is Task.single:
            logs = logits.log_softmax(dim=1)
            parts = -logs * soft
            return (parts * (1 - logs.exp()) ** gamma if gamma else parts).sum(dim=1)
        yes, no = -F.logsigmoid(logits) * soft, -F.logsigmoid(-logits) * (1 - soft)
        if gamma:
            p = logits.sigmoid()
            yes, no = yes * (1 - p) ** gamma, no * p**gamma
        if self.positive is not None and self.negative is not None:
            yes, no = yes * self.positive, no * self.negative
        return (yes + no).mean(dim=1)

    def slope(self, logits: Tensor, soft: Tensor) -> Tensor:
        """Derivative of each row's loss by its logits (N, C); those have the shift already."""
        if self.task is Task.regression:
            return (logits - soft) * (2 / logits.shape[1])
        if self.balance.gamma:  # no short form: backwards through the outputs alone
            with torch.enable_grad():
                inputs = logits.detach().requires_grad_()
                (found,) = torch.autograd.grad(self.losses(inputs, soft).sum(), inputs)
            return found
        if self.task is Task.single:
            return logits.softmax(dim=1).sub_(soft)
        p = logits.sigmoid()
        if self.positive is None or self.negative is None:
            return p.sub_(soft).div_(logits.shape[1])
        yes, no = soft * self.positive, (1 - soft) * self.negative
        return (p * (yes + no)).sub_(yes).div_(logits.shape[1])
