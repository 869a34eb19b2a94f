"""A linear head on embeddings: an epoch of gradient descent without autograd and its overhead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tl.losses import Objective


@torch.no_grad()
def train_epoch(
    head: nn.Linear,
    optimizer: torch.optim.Optimizer,
    embeddings: Tensor,
    targets: Tensor,
    *,
    batch_size: int,
    objective: Objective | None = None,
    weights: Tensor | None = None,
    order: Tensor | None = None,
    rate: Callable[[int], float] = lambda _: 1.0,
    first_step: int = 0,
    label_smoothing: float = 0.0,
    gradient_clip: float = 0.0,
    after_step: Callable[[], None] | None = None,
) -> Tensor:
    """Pass over embeddings in mini-batches, with the mean loss of an objective.

    The gradient of a linear head is written out, for softmax regression `(p - y)^T x / n` (Bishop
    2006, Pattern Recognition and Machine Learning, section 4.3.4): the same steps as through
    autograd and Lightning's loop, at a small part of their cost. A step takes a tenth of a
    millisecond, so what belongs to the epoch is made before the first one, in buffers that every
    step uses again.

    Args:
        head: Trained in place.
        optimizer: Holds the weight and the bias, if there is one; each group has `initial_lr`, as
            a scheduler leaves it.
        embeddings: float32 (rows, features).
        targets: Of all rows, as `Objective.encode` gives them.
        batch_size: Rows a step.
        objective: Loss; default: cross-entropy.
        weights: Of all rows in the loss (rows,).
        order: Rows of the epoch, (N,); default: all, as they come. They are copied step by step,
            which is twice as fast as a copy of the whole.
        rate: Share of the initial learning rate at a step.
        first_step: Steps that were taken before.
        label_smoothing: Share of the target that is spread over all classes, in [0, 1).
        gradient_clip: Largest norm of the gradient; 0: no clipping.
        after_step: Called after each step.

    Returns:
        Mean loss of each mini-batch before its step (steps,), on the device of the embeddings.

    Example:
        >>> head = nn.Linear(2, 2)
        >>> sgd = torch.optim.SGD([{"params": head.parameters(), "initial_lr": 0.1}], lr=0.1)
        >>> train_epoch(head, sgd, torch.randn(10, 2), torch.tensor([0, 1] * 5), batch_size=4).shape
        torch.Size([3])
    """
    objective = objective or Objective()
    if order is None:
        order = torch.arange(len(targets), device=targets.device)
    weight, bias = head.weight, head.bias
    dot, shared = _products(weight)
    wanted = objective.soft(targets[order], head.out_features, label_smoothing)
    shares = objective.row_weights(wanted, None if weights is None else weights[order])
    buffer = embeddings.new_empty(batch_size, embeddings.shape[1])
    logits = embeddings.new_empty(wanted.shape)
    for parameter in head.parameters():
        parameter.grad = torch.empty_like(parameter)
    gradients = [p.grad for p in head.parameters() if p.grad is not None]
    flat = [g.view(-1) for g in gradients]
    step = _Step(optimizer)
    columns, gradient = shared(weight.t()), shared(gradients[0])
    parts = zip(*(torch.split(t, batch_size) for t in (order, logits, wanted)), strict=True)
    for number, (rows, z, y) in enumerate(parts):
        x = buffer[: len(rows)]
        torch.index_select(embeddings, 0, rows, out=x)
        values = shared(x)
        dot(values, columns, out=shared(z))
        if bias is not None:
            z += bias
        if objective.shift is not None:
            z += objective.shift
        error = objective.slope(z, y).div_(len(rows))
        if shares is not None:
            error *= shares[number * batch_size :][: len(rows), None]
        dot(shared(error.t()), values, out=gradient)
        if bias is not None:
            torch.sum(error, dim=0, out=gradients[1])
        if gradient_clip:
            _clip(flat, gradient_clip)
        step(rate(first_step + number))
        if after_step is not None:
            after_step()
    losses = objective.losses(logits, wanted)
    losses = losses if shares is None else losses * shares
    return torch.stack([part.mean() for part in torch.split(losses, batch_size)])


def _products(weight: Tensor) -> tuple[Callable[..., Any], Callable[[Tensor], Any]]:
    """Matrix product with `out=`, and what makes its arguments of tensors without a copy.

    On a CPU numpy's: for products this small its library takes half the time of torch's.
    """
    if weight.device.type == "cpu":
        return np.dot, lambda tensor: tensor.detach().numpy()
    return torch.mm, lambda tensor: tensor


def _clip(gradients: list[Tensor], limit: float) -> None:
    """As `nn.utils.clip_grad_norm_` of flat ones, which costs as much as the rest of the step."""
    norm = float(sum(torch.dot(g, g) for g in gradients)) ** 0.5
    if norm > limit:
        for gradient in gradients:
            gradient.mul_(limit / (norm + 1e-6))


class _Step:
    """Steps of an optimizer, by torch's fused operator alone where it would end in it, too.

    `AdamW.step` spends nine tenths of its time on finding that out again in each step.

    Args:
        optimizer: The gradients of its parameters stay the same tensors from step to step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.fused = isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults.get("fused")
        self._lists: list[list[list[Tensor]]] = []

    def __call__(self, share: float) -> None:
        """One step with a share of the initial rates."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * share
        if not self.fused or not self.optimizer.state:
            self.optimizer.step()
            return
        self._lists = self._lists or [self._tensors(g) for g in self.optimizer.param_groups]
        for group, (params, grads, means, squares, counts) in zip(
            self.optimizer.param_groups, self._lists, strict=True
        ):
            for count in counts:
                count.add_(1)
            torch._fused_adamw_(
                params,
                grads,
                means,
                squares,
                [],
                counts,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )

    def _tensors(self, group: dict[str, list[Tensor]]) -> list[list[Tensor]]:
        states = [self.optimizer.state[p] for p in group["params"]]
        moments = [[s[name] for s in states] for name in ("exp_avg", "exp_avg_sq", "step")]
        return [group["params"], [p.grad for p in group["params"] if p.grad is not None], *moments]
