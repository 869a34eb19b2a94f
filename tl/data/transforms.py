"""From an upright RGB image to the tensor that a network sees, with or without augmentation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from tl.bundle import Preprocessing
from tl.config import AugmentConfig, AutoAugment

# Of Pillow, or uint8 (3, H, W), which is faster; the result is the same to the bit.
Picture: TypeAlias = Image.Image | torch.Tensor
Transform: TypeAlias = Callable[[Picture], torch.Tensor]
BatchMix: TypeAlias = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

RAND_BINS = 31  # torchvision's magnitudes 0 to 30
HUE_SHARE = 0.25  # hue turns colours into others, so it moves less than brightness


def eval_transform(preprocessing: Preprocessing) -> Transform:
    """The weights' own preprocessing: resize, crop, normalise.

    Torchvision resizes 8-bit pixels here, in a third of Pillow's time. It rounds otherwise than
    Pillow, which timm and the bundle use: by 2 levels of 255 at most, by 0.01 on average
    (`RESIZE_TOLERANCE` of the tests; docs/performance.md).

    Returns:
        A function from an RGB image to a float32 tensor (3, H, W).
    """
    transform: Transform = v2.Compose([_Fit(preprocessing), _Normalise(preprocessing)])
    return transform


class _Fit(torch.nn.Module):
    """`Preprocessing.resize` on tensors: uint8 (3, any size) to (3, H, W)."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.preprocessing = preprocessing

    def forward(self, picture: Picture) -> torch.Tensor:
        if not _resizes_tensors(self.preprocessing):
            return _pixels(self.preprocessing.resize(_image(picture)))
        pixels = _pixels(picture)
        rows, columns = pixels.shape[1:]
        width, height = self.preprocessing.scaled_size(columns, rows)
        mode = InterpolationMode(self.preprocessing.interpolation)
        scaled = functional.resize(pixels, [height, width], mode, antialias=True)
        return self._cut(scaled)

    def _cut(self, pixels: torch.Tensor) -> torch.Tensor:
        """The centre, as the bundle cuts it; what is too small gets a border."""
        height, width = self.preprocessing.input_size[1:]
        pad_x, pad_y = max(width - pixels.shape[2], 0), max(height - pixels.shape[1], 0)
        if pad_x or pad_y:
            sides = [pad_x // 2, pad_y // 2, pad_x - pad_x // 2, pad_y - pad_y // 2]
            pixels = functional.pad(pixels, sides, fill=list(self.preprocessing.border))
        top, left = round((pixels.shape[1] - height) / 2), round((pixels.shape[2] - width) / 2)
        return pixels[:, top : top + height, left : left + width]


class _Normalise(torch.nn.Module):
    """Float32 in the range and the order of memory that networks read."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.mean, self.std = list(preprocessing.mean), list(preprocessing.std)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        values = functional.to_dtype(pixels.contiguous(), torch.float32, scale=True)
        normal: torch.Tensor = functional.normalize(values, self.mean, self.std, inplace=True)
        return normal


def _resizes_tensors(preprocessing: Preprocessing) -> bool:
    """Whether torchvision resizes tensors by this filter as Pillow resizes its images."""
    return preprocessing.interpolation in ("bilinear", "bicubic")


def _pixels(picture: Picture) -> torch.Tensor:
    """Uint8 (3, H, W); from Pillow with (H, W, 3) in memory, which is resized fastest."""
    return picture if isinstance(picture, torch.Tensor) else functional.pil_to_tensor(picture)


def _image(picture: Picture) -> Image.Image:
    return picture if isinstance(picture, Image.Image) else functional.to_pil_image(picture)


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
    changes = [*_colour(augment, fill), *_geometry(augment, fill)]
    if changes:  # of images as small as the input; Pillow is faster at these
        changes = [v2.Lambda(_image), *changes, v2.Lambda(_pixels)]
    steps: list[Callable[..., object]] = [
        _frame(augment, preprocessing),
        *_flips(augment),
        *changes,
        _Normalise(preprocessing),
    ]
    if augment.erasing:
        steps.append(v2.RandomErasing(p=augment.erasing))
    transform: Transform = v2.Compose(steps)
    return transform


def _frame(augment: AugmentConfig, preprocessing: Preprocessing) -> Callable[..., object]:
    """What part of the image fills the network's input."""
    if augment.crop_scale is None:
        return _Fit(preprocessing)
    crop: Callable[..., object] = v2.RandomResizedCrop(
        size=list(preprocessing.input_size[1:]),
        scale=tuple(augment.crop_scale),
        ratio=tuple(augment.crop_ratio),
        interpolation=InterpolationMode(preprocessing.interpolation),
    )
    as_resized_best = _pixels if _resizes_tensors(preprocessing) else _image
    frame: Callable[..., object] = v2.Compose(
        [v2.Lambda(as_resized_best), crop, v2.Lambda(_pixels)]
    )
    return frame


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


def batch_mix(augment: AugmentConfig, num_classes: int | None = None) -> BatchMix | None:
    """Mixup, cutmix, or one of both at random for each batch; None when both are off.

    Randomness comes from torch's global CPU generator.

    Args:
        augment: Its `mixup` and `cutmix`.
        num_classes: Needed for labels (B,); tables (B, D) of targets are mixed as they are.

    Returns:
        A function from images (B, 3, H, W) and labels (B,) or targets (B, D) to mixed images of the
        same shape and soft labels (B, num_classes or D), mixed in the same shares.
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
