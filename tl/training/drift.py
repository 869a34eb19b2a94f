"""How far images are from what a network was pretrained on, by the statistics of BatchNorm."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tl.evidence import Drift
from tl.training.probing import evaluating


@torch.inference_mode()
def batch_norm_drift(
    model: nn.Module, batches: Iterable[Tensor], device: torch.device
) -> Drift | None:
    """Distance between the channels of images and the running statistics, mean over the layers.

    Args:
        model: Left as it is.
        batches: Clean images (B, 3, H, W).
        device: Where to compute.

    Returns:
        The distance, its error, and what chance would give for so many images; None without
        BatchNorm, or for a single image.
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
    found = [layer_drift(norms[name], m) for name, m in moments.items() if m.shape[1] > 1]
    if not found:
        return None
    distance, floor, without = (
        torch.stack(values).mean(dim=0) for values in zip(*found, strict=True)
    )
    return Drift(float(distance), jackknife_error(without), float(floor))


def _moments_into(seen: list[Tensor]) -> Callable[..., None]:
    """A hook that keeps mean and variance of each image and channel: (2, B, C)."""

    def hook(_: nn.Module, args: Sequence[Tensor]) -> None:
        values = args[0].flatten(2) if args[0].ndim > 2 else args[0][..., None]
        variance, mean = torch.var_mean(values, dim=-1, correction=0)
        seen.append(torch.stack([mean, variance]).double().cpu())

    return hook


def layer_drift(norm: _BatchNorm, moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Squared distance of means and deviations in units of the pretraining's, mean over channels.

    Args:
        norm: With the statistics of the pretraining.
        moments: Mean and variance of each image and channel, (2, N, C).

    Returns:
        The distance (); what it would be for images of the pretraining, the sampling variance of
        the mean and that of the deviation by the delta method (); and the distance without each of
        the images (N,).
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, deviation = norm.running_mean.double(), (norm.running_var.double() + norm.eps).sqrt()
    means, number = moments[0], moments.shape[1]
    powers = moments[1] + means**2

    def distance(first: Tensor, second: Tensor) -> Tensor:
        """From mean and mean square of each channel (…, C)."""
        spread = ((second - first**2).clamp_min(0) + norm.eps).sqrt()
        found: Tensor = ((first - mean) ** 2 + (spread - deviation) ** 2) / deviation**2
        return found.mean(dim=-1)

    first, second = means.mean(dim=0), powers.mean(dim=0)
    others = number - 1
    without = distance((number * first - means) / others, (number * second - powers) / others)
    squares = moments[1] + (means - first) ** 2  # about the common mean
    noise = means.var(dim=0) + squares.var(dim=0) / (4 * (squares.mean(dim=0) + norm.eps))
    return distance(first, second), (noise / number / deviation**2).mean(), without


def jackknife_error(without: Tensor) -> float:
    """Standard error of a statistic from its values without each of the images (N,).

    Efron 1982, The Jackknife, the Bootstrap and Other Resampling Plans, chapter 3. Channels and
    layers move together where an image is odd, so the images are what is left out.

    Example:
        >>> values = torch.tensor([1.0, 2.0, 3.0, 6.0])  # of a mean: its usual standard error
        >>> round(jackknife_error((values.sum() - values) / 3), 4) == round(
        ...     float(values.std()) / 2, 4
        ... )
        True
    """
    number = len(without)
    return float(((number - 1) / number * (without - without.mean()).square().sum()).sqrt())
