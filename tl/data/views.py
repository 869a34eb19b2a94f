"""Views of images for the activation cache: the clean one, and augmented ones drawn per image."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL
import torch
import torchvision
from torch.utils.data import Dataset

from tl.bundle import Preprocessing
from tl.config import AugmentConfig
from tl.data.datamodule import read_pixels
from tl.data.loading import ImageLoader, default_workers, loader_settings
from tl.data.sampling import drawing_from, mixed_seed
from tl.data.stores import Images
from tl.data.transforms import eval_transform, train_transform

CLEAN = 0
RESIZE = 2  # raise it when the same versions of the libraries begin to give other pixels
VIEW = 2  # beside ORDER and ITEM of the data module: the three never share a stream


class ViewDataset(Dataset[dict[str, Any]]):
    """Some views of each image, decoded once for all of them.

    An item is `{"images": float32 (views, 3, H, W), "index": int}`. View 0 is the evaluation's own
    preprocessing; what is random in view v > 0 is a pure function of (seed, v, content of the
    image), so that it stays the same in another folder, another split and among other images.

    Args:
        images: Those of a table.
        digests: SHA-256 of each, hexadecimal.
        views: Numbers of the views.
        augment: Random changes of views above 0.
        preprocessing: That of the weights.
        seed: Of the random changes.
        max_pixels: Larger images are refused.

    Raises:
        DataError: When an item is read whose file went bad after the check.
    """

    def __init__(
        self,
        images: Images,
        digests: Sequence[str],
        views: Sequence[int],
        *,
        augment: AugmentConfig,
        preprocessing: Preprocessing,
        seed: int,
        max_pixels: int,
    ) -> None:
        self.images = images
        # Numbers, not text: a million of them go to loader processes as they are.
        self.contents = np.array([int(digest[:16], 16) for digest in digests], np.uint64)
        self.views = tuple(views)
        self.clean = eval_transform(preprocessing)
        self.changed = train_transform(augment, preprocessing)
        self.input_size = preprocessing.input_size
        self.seed = seed
        self.max_pixels = max_pixels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = read_pixels(self.images, index, self.max_pixels)
        content = int(self.contents[index])
        tensors = []
        for view in self.views:
            with drawing_from(mixed_seed(VIEW, self.seed, view, content)):
                tensors.append((self.clean if view == CLEAN else self.changed)(image))
        return {"images": torch.stack(tensors), "index": index}


def view_key(view: int, augment: AugmentConfig, seed: int) -> dict[str, Any]:
    """What makes the pixels of a view: plain values, equal where the pixels are equal."""
    made_by = {"pillow": PIL.__version__, "torchvision": torchvision.__version__, "resize": RESIZE}
    if view == CLEAN:
        return {"number": CLEAN, **made_by}
    changes = {
        key: getattr(value, "value", value)
        for key, value in dataclasses.asdict(augment).items()
        if key not in {"name", "mixup", "cutmix"}
    }
    return {"number": view, "seed": seed, "augment": changes, **made_by}


def is_random(augment: AugmentConfig) -> bool:
    """Whether an augmentation changes single images at all."""
    still = dataclasses.asdict(AugmentConfig())
    off = {"name", "mixup", "cutmix", "crop_ratio", "rand_magnitude"}
    return any(v != still[k] for k, v in dataclasses.asdict(augment).items() if k not in off)


def view_loader(
    dataset: ViewDataset, *, batch_views: int, workers: int | None = None
) -> ImageLoader:
    """Batches `{"images": (B, views, 3, H, W), "index": (B,)}` in the order of the dataset.

    Args:
        dataset: Images and their views.
        batch_views: Views in a batch, about.
        workers: Loader processes; None: `default_workers`.
    """
    size = max(1, batch_views // len(dataset.views))
    if workers is None:
        image_bytes = 4 * int(np.prod(dataset.input_size))
        workers = default_workers(len(dataset), size * len(dataset.views) * image_bytes)
    return ImageLoader(dataset, **loader_settings(workers), batch_size=size)
