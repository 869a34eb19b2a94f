"""How far images are from what a network was pretrained on, by the statistics of BatchNorm."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tl.training.probing import evaluating


@torch.inference_mode()
def batch_norm_drift(
    model: nn.Module, batches: Iterable[Tensor], device: torch.device
) -> tuple[float, float] | None:
    """Distance between the channels of images and the running statistics, mean over the layers.

    Args:
        model: Left as it is.
        batches: Clean images (B, 3, H, W).
        device: Where to compute.

    Returns:
        The distance and what chance would give for so many images; None without BatchNorm, or for
        a single image.
    """
    norms = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm)}
    norms = {n: m for n, m in norms.items() if m.running_mean is not None}
    if not norms:
        return None
    seen: dict[str, list[Tensor]] = {name: [] for name in norms}
    hooks = [
        module.register_forward_pre_hook(_moments_into(seen[name]))
        for name, module in norms.items()
    ]
    try:
        with evaluating(model, device):
            for batch in batches:
                model(batch.to(device))
    finally:
        for handle in hooks:
            handle.remove()
    moments = {name: torch.cat(parts, dim=1) for name, parts in seen.items() if parts}
    pairs = [layer_drift(norms[name], m) for name, m in moments.items() if m.shape[1] > 1]
    if not pairs:
        return None
    drift, floor = np.mean(pairs, axis=0)
    return float(drift), float(floor)


def _moments_into(seen: list[Tensor]) -> Callable[..., None]:
    """A hook that keeps mean and variance of each image and channel: (2, B, C)."""

    def hook(_: nn.Module, args: Sequence[Tensor]) -> None:
        values = args[0].flatten(2) if args[0].ndim > 2 else args[0][..., None]
        variance, mean = torch.var_mean(values, dim=-1, correction=0)
        seen.append(torch.stack([mean, variance]).double().cpu())

    return hook


def layer_drift(norm: _BatchNorm, moments: Tensor) -> tuple[float, float]:
    """Squared distance of means and deviations in units of the pretraining's, mean over channels.

    Args:
        norm: With the statistics of the pretraining.
        moments: Mean and variance of each image and channel, (2, N, C).

    Returns:
        The distance, and what it would be for images of the pretraining: the sampling variance of
        the mean, and that of the deviation by the delta method.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, deviation = norm.running_mean.double(), (norm.running_var.double() + norm.eps).sqrt()
    means, number = moments[0], moments.shape[1]
    squares = moments[1] + (means - means.mean(dim=0)) ** 2  # about the common mean
    spread = (squares.mean(dim=0) + norm.eps).sqrt()
    distance = ((means.mean(dim=0) - mean) ** 2 + (spread - deviation) ** 2) / deviation**2
    noise = means.var(dim=0) + squares.var(dim=0) / (4 * spread**2)
    return float(distance.mean()), float((noise / number / deviation**2).mean())
