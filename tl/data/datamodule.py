"""Loaders whose batches depend on seed and epoch alone, whatever the number of workers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from tl.bundle import ImageError, Preprocessing
from tl.bundle.images import MAX_PIXELS
from tl.config import AdviseConfig, AugmentConfig, TrainConfig
from tl.data.blocks import sampler_of
from tl.data.decoding import decode
from tl.data.loading import ImageLoader, default_workers, loader_settings
from tl.data.sampling import ITEM, drawing_from, mixed_seed
from tl.data.stores import Images
from tl.data.table import ImageTable
from tl.data.transforms import Transform, batch_mix, eval_transform, train_transform


def read_pixels(images: Images, index: int, max_pixels: int) -> torch.Tensor:
    """Upright RGB pixels of an image that the check of the table has seen, uint8 (3, H, W).

    Raises:
        DataError: It went bad since.
    """
    try:
        return decode(images.read(index), max_pixels=max_pixels)
    except ImageError as error:
        raise images.changed(index, error.reason) from error


class ImageDataset(Dataset[dict[str, Any]]):
    """Images of one split.

    `dataset[epoch, index]` is `{"image": float32 (3, H, W), "label": …, "index": int}`, and
    `"weight"` where images have weights. What is random in the transform is a pure function of
    (seed, epoch, index); the state of torch's global generator is left as found. A plain index
    means epoch 0.

    Args:
        images: Those of a table.
        targets: What is to be predicted for each, (N,) or (N, classes); see `ImageTable.targets`.
        transform: From RGB pixels to a tensor; may draw from torch's CPU generator only.
        weights: Of each image in the loss, (N,).
        seed: Of the random transforms.
        max_pixels: Larger images are refused.

    Raises:
        DataError: When an item is read whose file went bad after the check.
    """

    def __init__(
        self,
        images: Images,
        targets: NDArray[Any],
        transform: Transform,
        *,
        weights: NDArray[np.float32] | None = None,
        seed: int,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.images = images
        self.known = {"label": targets} | ({} if weights is None else {"weight": weights})
        self.transform = transform
        self.seed = seed
        self.max_pixels = max_pixels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int] | int) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        pixels = read_pixels(self.images, index, self.max_pixels)
        with drawing_from(mixed_seed(ITEM, self.seed, epoch, index)):
            tensor = self.transform(pixels)
        return {"image": tensor, **{k: v[index] for k, v in self.known.items()}, "index": index}


class ImageDataModule(pl.LightningDataModule):
    """Batches `{"image": (B, 3, H, W), "label": …, "index": (B,)}` of an `ImageTable`.

    `label` is as `ImageTable.targets` has it, (B,) or (B, classes). A table with the column
    `weight` adds `"weight"` (B,).

    Args:
        table: Checked images.
        preprocessing: That of the weights.
        augment: Random changes of the training images.
        batch_size: Images per step, over all devices.
        num_workers: Processes per loader; None: `default_workers`.
        seed: Of order and augmentation.
        max_pixels: Larger images are refused.

    Attributes:
        mix: Mixup and cutmix of a batch, or None; see `tl.data.transforms.batch_mix`.
        epoch_offset: Added to the epochs of the training loaders made from now on, so that the
            phases of a plan see different orders and changes.
        draws: How often each image of train is drawn, against the others; None: all alike, once an
            epoch. See `EpochSampler`.
    """

    def __init__(
        self,
        table: ImageTable,
        preprocessing: Preprocessing,
        augment: AugmentConfig,
        *,
        batch_size: int,
        num_workers: int | None,
        seed: int,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        super().__init__()
        self.table = table
        self.preprocessing = preprocessing
        self.augment = augment
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.max_pixels = max_pixels
        self.mix = batch_mix(augment)
        self.epoch_offset = 0
        self.draws: NDArray[np.floating] | None = None

    @classmethod
    def from_config(
        cls, table: ImageTable, preprocessing: Preprocessing, config: TrainConfig | AdviseConfig
    ) -> ImageDataModule:
        """Data module of a training job, or of an advice about one."""
        return cls(
            table,
            preprocessing,
            config.augment,
            batch_size=config.data.batch_size,
            num_workers=config.data.num_workers,
            seed=config.seed,
            max_pixels=config.data.max_pixels,
        )

    def dataset(self, split: str, *, augment: bool) -> ImageDataset:
        """Images of `train`, `val`, `test` or `all`, in the order of the table."""
        if augment:
            transform = train_transform(self.augment, self.preprocessing)
        else:
            transform = eval_transform(self.preprocessing)
        rows = self.table.split(split)
        return ImageDataset(
            self.table.images(rows),
            self.table.targets(rows),
            transform,
            seed=self.seed,
            max_pixels=self.max_pixels,
            weights=rows["weight"].to_numpy(np.float32) if "weight" in rows else None,
        )

    def train_dataloader(self) -> ImageLoader:
        """Augmented images of train in an order that each epoch has to itself.

        A last batch of one image is dropped: BatchNorm has no variance of it.
        """
        return self._loader("train", augment=True, shuffle=True)

    def val_dataloader(self) -> ImageLoader:
        """Images of val in the order of the table."""
        return self._loader("val", augment=False, shuffle=False)

    def test_dataloader(self) -> ImageLoader:
        """Images of test in the order of the table."""
        return self._loader("test", augment=False, shuffle=False)

    def predict_dataloader(self) -> ImageLoader:
        """All images in the order of the table."""
        return self._loader("all", augment=False, shuffle=False)

    def loader(
        self, split: str, augment: bool = False, part: tuple[int, int] = (0, 1)
    ) -> ImageLoader:
        """Images of a split in the order of the table, none left out.

        Args:
            split: `train`, `val`, `test` or `all`.
            augment: Change them as in epoch 0 of training.
            part: Which one (from 0) of how many parts; the last images of a part may stand in for
                those that it lacks, as its sampler says (`EpochSampler.own`).
        """
        return self._loader(split, augment=augment, shuffle=False, part=part)

    def _loader(
        self, split: str, *, augment: bool, shuffle: bool, part: tuple[int, int] | None = None
    ) -> ImageLoader:
        dataset = self.dataset(split, augment=augment)
        rank, devices = part or (0, 1)
        if part is None and self.trainer:
            devices = self.trainer.world_size
            rank = self.trainer.global_rank if devices > 1 else 0
        sampler = sampler_of(
            dataset.images,
            seed=self.seed,
            shuffle=shuffle,
            epoch_offset=self.epoch_offset if shuffle else 0,
            weights=self.draws if shuffle else None,
            batch_size=self.batch_size,
            drop_last=shuffle,
            num_replicas=devices,
            rank=rank,
        )
        batch_size = sampler.batch_size
        workers = self.num_workers
        if workers is None:
            image_bytes = 4 * int(np.prod(self.preprocessing.input_size))
            workers = default_workers(len(dataset), batch_size * image_bytes)
        return ImageLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            persistent_workers=workers > 0,
            **loader_settings(workers),
        )
