"""From an upright RGB image to the tensor that a network sees, with or without augmentation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torchvision.transforms import InterpolationMode, v2

from tl.bundle import Preprocessing
from tl.config import AugmentConfig, AutoAugment

Transform: TypeAlias = Callable[[Image.Image], torch.Tensor]
BatchMix: TypeAlias = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

RAND_BINS = 31  # torchvision's magnitudes 0 to 30
HUE_SHARE = 0.25  # hue turns colours into others, so it moves less than brightness


def eval_transform(preprocessing: Preprocessing) -> Transform:
    """The weights' own preprocessing, by timm: resize, crop, normalise.

    Returns:
        A function from an RGB image to a float32 tensor (3, H, W).
    """
    transform: Transform = create_transform(**preprocessing.to_dict(), is_training=False)
    return transform


def train_transform(augment: AugmentConfig, preprocessing: Preprocessing) -> Transform:
    """Random changes of one image, then the normalisation of the weights.

    Crop, flips, TrivialAugment/RandAugment, colour and affine act on 8-bit images in this order,
    erasing on the normalised tensor: so the corners that affine uncovers and the patch that erasing
    takes away have the mean colour, whatever came before. Randomness comes from torch's CPU
    generator alone. Mixup and cutmix act on batches: `batch_mix`.

    Args:
        augment: What to change and how much; all off gives `eval_transform`.
        preprocessing: Size, mean, std and interpolation of the weights.

    Returns:
        A function from an RGB image to a float32 tensor (3, H, W).
    """
    fill = [round(255 * value) for value in preprocessing.mean]
    changes = [*_flips(augment), *_colour(augment, fill), *_geometry(augment, fill)]
    if not changes and not augment.erasing and augment.crop_scale is None:
        return eval_transform(preprocessing)
    steps: list[Callable[..., object]] = [
        _frame(augment, preprocessing),
        *changes,
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(list(preprocessing.mean), list(preprocessing.std), inplace=True),
    ]
    if augment.erasing:
        steps.append(v2.RandomErasing(p=augment.erasing))
    transform: Transform = v2.Compose([*steps, v2.ToPureTensor()])
    return transform


def _frame(augment: AugmentConfig, preprocessing: Preprocessing) -> Callable[..., object]:
    """What part of the image fills the network's input."""
    if augment.crop_scale is None:
        return preprocessing.resize
    crop: Callable[..., object] = v2.RandomResizedCrop(
        size=list(preprocessing.input_size[1:]),
        scale=tuple(augment.crop_scale),
        ratio=tuple(augment.crop_ratio),
        interpolation=InterpolationMode(preprocessing.interpolation),
    )
    return crop


def _flips(augment: AugmentConfig) -> list[v2.Transform]:
    flips: list[v2.Transform] = []
    if augment.hflip:
        flips.append(v2.RandomHorizontalFlip(augment.hflip))
    if augment.vflip:
        flips.append(v2.RandomVerticalFlip(augment.vflip))
    return flips


def _geometry(augment: AugmentConfig, fill: list[int]) -> list[v2.Transform]:
    if not (augment.rotate or augment.translate or augment.zoom or augment.shear):
        return []
    return [
        v2.RandomAffine(
            degrees=augment.rotate,
            translate=(augment.translate, augment.translate) if augment.translate else None,
            scale=(1 - augment.zoom, 1 + augment.zoom) if augment.zoom else None,
            shear=augment.shear or None,
            interpolation=InterpolationMode.BILINEAR,
            fill=fill,
        )
    ]


def _colour(augment: AugmentConfig, fill: list[int]) -> list[v2.Transform]:
    changes: list[v2.Transform] = []
    if augment.auto is AutoAugment.trivial:
        changes.append(v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR, fill=fill))
    elif augment.auto is AutoAugment.rand:
        changes.append(
            v2.RandAugment(
                magnitude=augment.rand_magnitude,
                num_magnitude_bins=RAND_BINS,
                interpolation=InterpolationMode.BILINEAR,
                fill=fill,
            )
        )
    if augment.color_jitter:
        strength = augment.color_jitter
        changes.append(v2.ColorJitter(strength, strength, strength, min(HUE_SHARE * strength, 0.5)))
    return changes


def batch_mix(augment: AugmentConfig, num_classes: int) -> BatchMix | None:
    """Mixup, cutmix, or one of both at random for each batch; None when both are off.

    Randomness comes from torch's global CPU generator.

    Returns:
        A function from images (B, 3, H, W) and labels (B,) to mixed images of the same shape and
        soft labels (B, num_classes) that sum to 1.
    """
    mixes: list[v2.Transform] = []
    if augment.mixup:
        mixes.append(v2.MixUp(alpha=augment.mixup, num_classes=num_classes))
    if augment.cutmix:
        mixes.append(v2.CutMix(alpha=augment.cutmix, num_classes=num_classes))
    if not mixes:
        return None
    mix: BatchMix = mixes[0] if len(mixes) == 1 else v2.RandomChoice(mixes)
    return mix
