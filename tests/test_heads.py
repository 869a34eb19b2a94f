"""Whole epochs of a linear head: the same steps as through autograd, one by one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tl.heads import train_epoch


def plain_epoch(head, optimizer, embeddings, labels, *, batch_size, rates, smoothing, clip):
    """What every tutorial does."""
    losses = []
    for x, y, rate in zip(
        embeddings.split(batch_size), labels.split(batch_size), rates, strict=True
    ):
        loss = F.cross_entropy(head(x), y, label_smoothing=smoothing)
        optimizer.zero_grad()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(head.parameters(), clip)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def make(kind, head, **options):
    groups = [
        {"params": [head.weight], "weight_decay": 0.1, "lr": 0.01, "initial_lr": 0.01},
        *(
            [{"params": [head.bias], "weight_decay": 0.0, "lr": 0.02, "initial_lr": 0.02}]
            if head.bias is not None
            else []
        ),
    ]
    if kind == "adamw":
        return torch.optim.AdamW(groups, **options)
    return torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("smoothing", "clip"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.05), (0.1, 0.5)])
def test_it_takes_the_steps_of_autograd(kind, bias, smoothing, clip):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(203, 40, generator=generator)
    y = torch.randint(0, 7, (203,), generator=generator)
    ours = nn.Linear(40, 7, bias=bias)
    theirs = copy.deepcopy(ours)
    options = {"fused": True} if kind == "adamw" else {}
    fast, slow = make(kind, ours, **options), make(kind, theirs)
    for epoch in range(3):
        rates = [1 / (1 + 7 * epoch + i) for i in range(7)]
        found = train_epoch(
            ours,
            fast,
            x,
            y,
            batch_size=32,
            rate=lambda step: 1 / (1 + step),
            first_step=7 * epoch,
            label_smoothing=smoothing,
            gradient_clip=clip,
        )
        wanted = plain_epoch(
            theirs, slow, x, y, batch_size=32, rates=rates, smoothing=smoothing, clip=clip
        )
        torch.testing.assert_close(found, wanted, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-5, atol=1e-6)


def test_the_state_of_the_optimizer_can_be_kept_and_taken_up():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 5, generator=generator), torch.arange(64) % 3
    whole, broken = nn.Linear(5, 3), nn.Linear(5, 3)
    broken.load_state_dict(whole.state_dict())
    first, second = make("adamw", whole, fused=True), make("adamw", broken, fused=True)
    for _ in range(2):
        train_epoch(whole, first, x, y, batch_size=16)
    train_epoch(broken, second, x, y, batch_size=16)
    third = make("adamw", broken, fused=True)
    third.load_state_dict(copy.deepcopy(second.state_dict()))
    train_epoch(broken, third, x, y, batch_size=16)
    assert torch.equal(whole.weight, broken.weight)
    assert third.state[broken.weight]["step"] == 8
