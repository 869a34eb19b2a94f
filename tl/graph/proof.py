"""The proof that prefix and suffix are the model: equal logits, and equal gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tl.graph.errors import SplitError, first_line

if TYPE_CHECKING:
    from tl.graph import Split

FORWARD, GRADIENT = 1e-6, 1e-5  # largest relative differences
FLOOR = 1e-6  # of the largest gradient: what is below counts as zero


@dataclass(frozen=True)
class Proof:
    """How close prefix and suffix come to the model.

    Args:
        forward: Largest difference of the logits in eval mode, relative to the largest logit.
        gradient: Largest difference of the gradients, relative to the largest entry of each tensor.
        values: Frontier values of the images.
    """

    forward: float
    gradient: float
    values: tuple[Tensor, ...]


def prove(split: Split, model: nn.Module, images: Tensor) -> Proof:
    """Compare the two parts with the model, on images in another order than they were cached in.

    Gradients are compared in the modes that the modules are in, with the same random numbers. The
    model, its gradients and modes, and the state of random numbers are afterwards as before.

    Raises:
        SplitError: They differ by more than rounding.
    """
    if len(images) < 2:
        images = images.repeat(2, 1, 1, 1)
    try:
        forward, gradient, values = _compare(split, split.prefix, model, images)
        if not (forward <= FORWARD and gradient <= GRADIENT):
            # Rounding, or really different? In double precision it shows.
            double = copy.deepcopy(split.prefix).double(), copy.deepcopy(model).double()
            forward, gradient, _ = _compare(split, *double, images.double())
    except Exception as error:  # anything: it is the model's own code
        raise SplitError(f"the split model does not run ({first_line(error)})") from error
    for name, difference, limit in (
        ("logits", forward, FORWARD),
        ("gradients", gradient, GRADIENT),
    ):
        if not difference <= limit:  # not-a-number, too
            msg = f"prefix and suffix give other {name} than the model ({difference:.1e} > {limit})"
            raise SplitError(msg)
    return Proof(forward, gradient, values)


def _compare(
    split: Split, prefix: nn.Module, model: nn.Module, images: Tensor
) -> tuple[float, float, tuple[Tensor, ...]]:
    values = _values(split, prefix, images)
    # What stores the parts of images in another order does not survive a new order.
    order = torch.arange(len(images), device=images.device).roll(1)
    images, rows = images[order], [value[order].contiguous() for value in values]

    def whole() -> Tensor:
        logits: Tensor = model(images)
        return logits

    def parts() -> Tensor:
        return split.run_suffix(model, rows)

    with _as_before(model, images.device):
        moved = [b.clone() for b in model.buffers()]
        expected = _gradients(whole, model)
        statistics = [b.clone() for b in model.buffers()]
        for buffer, before in zip(model.buffers(), moved, strict=True):
            buffer.copy_(before)
        found = _gradients(parts, model)
        floor = FLOOR * max((float(g.abs().max()) for g in expected if g.numel()), default=0.0)
        gradient = _difference(found, expected, floor)
        # Batch statistics that this step moved show a suffix that would not see them move.
        still = _difference(list(model.buffers()), statistics, 0.0)
        model.eval()
        with torch.no_grad():
            forward = _difference([parts()], [whole()], 0.0)
    return forward, max(gradient, still), values


def _values(split: Split, prefix: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    """Frontier values, each half of the images without the other one.

    A prefix that mixes the images of a batch does not survive the company of others. The batch is
    always as large as all images are: other sizes round differently.
    """
    number, half = len(images), len(images) // 2
    rows = torch.arange(number, device=images.device)
    with torch.no_grad():
        first = split.values(prefix(images[rows % half]))
        second = split.values(prefix(images[half + rows % (number - half)]))
    return tuple(
        torch.cat([a[:half], b[: number - half]]) for a, b in zip(first, second, strict=True)
    )


def _gradients(function: Callable[[], Tensor], model: nn.Module) -> list[Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(0)
    with torch.enable_grad():
        logits = function()
        towards = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
        loss = (logits * towards.to(logits)).sum()
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def _difference(found: Sequence[Tensor], expected: Sequence[Tensor], floor: float) -> float:
    """Largest difference of any tensor, relative to its largest entry."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if not b.numel():
            continue
        error = float((a.double() - b.double()).abs().max())
        if not error < float("inf"):
            return float("nan")
        scale = max(float(b.abs().max()), floor)
        worst = max(worst, error / scale if error else 0.0)
    return worst


@contextmanager
def _as_before(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Give zero weights that train small numbers; put everything back at the end."""
    modes = {module: module.training for module in model.modules()}
    buffers = [b.clone() for b in model.buffers()]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad(), without_zeros(model):
        try:
            yield
        finally:
            for buffer, before in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(before)
            model.train()  # some models forget in it what they computed of their weights
            for module, mode in modes.items():
                module.training = mode


@contextmanager
def without_zeros(model: nn.Module) -> Iterator[None]:
    """Trainable tensors of zeros (a new head) hold small random numbers meanwhile.

    Behind zeros every gradient is zero, and differences of gradients would not show.
    """
    zeros = [p for p in model.parameters() if p.requires_grad and not p.any()]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in zeros:
            p.copy_(torch.randn(p.shape, generator=generator) / max(p.shape[-1], 1) ** 0.5)
    try:
        yield
    finally:
        with torch.no_grad():
            for p in zeros:
                p.zero_()
