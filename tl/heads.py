"""A linear head on embeddings: an epoch of gradient descent without autograd and its overhead."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@torch.no_grad()
def train_epoch(
    head: nn.Linear,
    optimizer: torch.optim.Optimizer,
    embeddings: Tensor,
    labels: Tensor,
    *,
    batch_size: int,
    rate: Callable[[int], float] = lambda _: 1.0,
    first_step: int = 0,
    label_smoothing: float = 0.0,
    gradient_clip: float = 0.0,
    after_step: Callable[[], None] | None = None,
) -> Tensor:
    """Pass over embeddings in mini-batches, in their order, with the mean cross-entropy as loss.

    The gradient of softmax regression is written out, `(p - y)^T x / n` (Bishop 2006, Pattern
    Recognition and Machine Learning, section 4.3.4): the same steps as through autograd and
    Lightning's loop, at a small part of their cost.

    Args:
        head: Trained in place.
        optimizer: Holds the weight and the bias, if there is one; each group has `initial_lr`, as
            a scheduler leaves it.
        embeddings: float32 (N, features), already in the order of the epoch.
        labels: Class indices (N,).
        batch_size: Rows a step.
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
    weight, bias = head.weight, head.bias
    targets = F.one_hot(labels, head.out_features).to(embeddings.dtype)
    if label_smoothing:
        targets = targets * (1 - label_smoothing) + label_smoothing / head.out_features
    batches = list(
        zip(torch.split(embeddings, batch_size), torch.split(targets, batch_size), strict=True)
    )
    losses = []
    for number, (x, y) in enumerate(batches):
        scores = F.linear(x, weight, bias).log_softmax(dim=1)
        losses.append(torch.dot(scores.flatten(), y.flatten()))
        error = scores.exp_().sub_(y).div_(len(x))
        weight.grad = error.t() @ x
        if bias is not None:
            bias.grad = error.sum(dim=0)
        if gradient_clip:
            _clip(
                [p.grad for p in (weight, bias) if p is not None and p.grad is not None],
                gradient_clip,
            )
        share = rate(first_step + number)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * share
        _step(optimizer)
        if after_step is not None:
            after_step()
    sizes = torch.tensor([len(x) for x, _ in batches], device=embeddings.device)
    return -torch.stack(losses) / sizes


def _clip(gradients: list[Tensor], limit: float) -> None:
    """As `nn.utils.clip_grad_norm_`, which costs as much as the rest of the step."""
    norm = float(sum(torch.dot(g.flatten(), g.flatten()) for g in gradients)) ** 0.5
    if norm > limit:
        for gradient in gradients:
            gradient.mul_(limit / (norm + 1e-6))


def _step(optimizer: torch.optim.Optimizer) -> None:
    """One step, by torch's fused operator alone where the optimizer would end in it, too.

    `AdamW.step` spends nine tenths of its time on finding that out again in each step.
    """
    fused = isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults.get("fused")
    if not fused or not optimizer.state:
        optimizer.step()
        return
    for group in optimizer.param_groups:
        states = [optimizer.state[p] for p in group["params"]]
        steps = [state["step"].add_(1) for state in states]
        torch._fused_adamw_(
            group["params"],
            [p.grad for p in group["params"]],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            steps,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
