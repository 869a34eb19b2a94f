"""Loaders whose batches depend on seed and epoch alone, whatever the number of workers."""

from __future__ import annotations

import itertools
import logging
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from tl.bundle import Preprocessing
from tl.bundle.images import MAX_PIXELS
from tl.config import AdviseConfig, AugmentConfig, TrainConfig
from tl.cores import usable_cores
from tl.data.errors import DataError
from tl.data.stores import Images
from tl.data.table import ImageTable
from tl.data.transforms import Transform, batch_mix, eval_transform, train_transform

log = logging.getLogger(__name__)

MAX_WORKERS = 8
FEW_IMAGES = 64  # starting workers costs more than they save below this
PREFETCH = 2
SHARED_MEMORY = Path("/dev/shm")
ORDER, ITEM = 0, 1  # what a seed is for: the two never share a stream


def mixed_seed(*parts: int) -> int:
    """One 64-bit seed from several whole numbers of 0 or more, well spread."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Let transforms draw from a seed; torch's CPU generator is left as found."""
    state = torch.get_rng_state()
    # The CPU generator only: torch.manual_seed would reseed every GPU too.
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


class ImageDataset(Dataset[dict[str, Any]]):
    """Images of one split.

    `dataset[epoch, index]` is `{"image": float32 (3, H, W), "label": int, "index": int}`. What is
    random in the transform is a pure function of (seed, epoch, index); the state of torch's global
    generator is left as found. A plain index means epoch 0.

    Args:
        images: Those of a table.
        targets: What is to be predicted for each, (N,) or (N, classes); see `ImageTable.targets`.
        transform: From an RGB image to a tensor; may draw from torch's CPU generator only.
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
        seed: int,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.images = images
        self.targets = targets
        self.transform = transform
        self.seed = seed
        self.max_pixels = max_pixels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int] | int) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image = self.images.open(index, self.max_pixels)
        with drawing_from(mixed_seed(ITEM, self.seed, epoch, index)):
            tensor = self.transform(image)
        return {"image": tensor, "label": self.targets[index], "index": index}


class EpochSampler(DistributedSampler[tuple[int, int]]):
    """Yields (epoch, index); the order is a pure function of (seed, epoch).

    A `DistributedSampler`, so that Lightning keeps it under DDP: each process takes every n-th
    image, and the last ones are repeated until all have the same number (`index` tells which).

    Args:
        images: How many there are.
        seed: Of the order.
        shuffle: False keeps the order of the table.
        epoch_offset: Added to the epoch that Lightning sets.
        num_replicas: Processes that share the images.
        rank: Which of them this is.
    """

    def __init__(
        self,
        images: int,
        *,
        seed: int,
        shuffle: bool,
        epoch_offset: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        super().__init__(
            range(images),  # type: ignore[arg-type] # only its length is used
            num_replicas=num_replicas,
            rank=rank,
            shuffle=shuffle,
            seed=seed,
        )
        self.images = images
        self.epoch_offset = epoch_offset

    def order(self) -> tuple[int, torch.Tensor]:
        """The epoch as it is counted over all phases, and the order of all images in it."""
        epoch = self.epoch + self.epoch_offset
        if not self.shuffle:
            return epoch, torch.arange(self.images)
        generator = torch.Generator().manual_seed(mixed_seed(ORDER, self.seed, epoch))
        return epoch, torch.randperm(self.images, generator=generator)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, order = self.order()
        padded = itertools.islice(itertools.cycle(order.tolist()), self.total_size)
        mine = itertools.islice(padded, self.rank, None, self.num_replicas)
        return ((epoch, index) for index in mine)


class ImageLoader(DataLoader[dict[str, Any]]):
    """A `DataLoader` that passes a `DataError` on at once, without the traceback of a worker."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override] # a generator round torch's
        batches = super().__iter__()
        try:
            yield from batches
        except DataError as error:
            message = str(error).split(f"{DataError.__name__}: ")[-1].strip()
        else:
            return
        # Workers that are left to the garbage collector, as a traceback does, take 5 seconds each.
        if isinstance(batches, _MultiProcessingDataLoaderIter):
            batches._shutdown_workers()
            self._iterator = None
        raise DataError(message)


def _start_worker(_: int) -> None:
    # Ctrl-C reaches the whole process group; the main process alone decides how to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def loader_settings(workers: int) -> dict[str, Any]:
    """What all loaders of images have in common."""
    return {
        "num_workers": workers,
        "worker_init_fn": _start_worker,
        "prefetch_factor": PREFETCH if workers else None,
        "pin_memory": torch.cuda.is_available(),
    }


def default_workers(images: int, batch_bytes: int) -> int:
    """Loader processes: the usable cores, fewer where images or shared memory are few.

    Args:
        images: How many a pass over the loader reads.
        batch_bytes: Size of one batch; batches wait in shared memory, which containers keep small.
    """
    if images < FEW_IMAGES:
        return 0
    workers = min(usable_cores(), MAX_WORKERS)
    if SHARED_MEMORY.is_dir():
        room = shutil.disk_usage(SHARED_MEMORY).free // (2 * (PREFETCH + 1) * batch_bytes)
        if room < workers:
            log.warning(
                "%s has room for the batches of %d workers only (docker run --shm-size)",
                SHARED_MEMORY,
                room,
            )
        workers = min(workers, int(room))
    return workers


class ImageDataModule(pl.LightningDataModule):
    """Batches `{"image": (B, 3, H, W), "label": (B,), "index": (B,)}` of an `ImageTable`.

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
        self.mix = batch_mix(augment, len(table.classes))
        self.epoch_offset = 0

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
        return ImageDataset(
            self.table.images(split),
            self.table.targets(split),
            transform,
            seed=self.seed,
            max_pixels=self.max_pixels,
        )

    def train_dataloader(self) -> ImageLoader:
        """Augmented images of train in an order that each epoch has to itself.

        A last batch of one image is dropped: BatchNorm has no variance of it.
        """
        return self._loader("train", augment=True, shuffle=True)

    def val_dataloader(self) -> ImageLoader:
        """Images of val in the order of the table."""
        return self.loader("val")

    def test_dataloader(self) -> ImageLoader:
        """Images of test in the order of the table."""
        return self.loader("test")

    def predict_dataloader(self) -> ImageLoader:
        """All images in the order of the table."""
        return self.loader("all")

    def loader(self, split: str, augment: bool = False) -> ImageLoader:
        """Images of a split in the order of the table, none left out.

        Args:
            split: `train`, `val`, `test` or `all`.
            augment: Change them as in epoch 0 of training.
        """
        return self._loader(split, augment=augment, shuffle=False)

    def _loader(self, split: str, *, augment: bool, shuffle: bool) -> ImageLoader:
        dataset = self.dataset(split, augment=augment)
        devices, rank = self.trainer.world_size if self.trainer else 1, 0
        if self.trainer and devices > 1:
            rank = self.trainer.global_rank
        sampler = EpochSampler(
            len(dataset),
            seed=self.seed,
            shuffle=shuffle,
            epoch_offset=self.epoch_offset if shuffle else 0,
            num_replicas=devices,
            rank=rank,
        )
        batch_size = max(1, self.batch_size // devices)
        workers = self.num_workers
        if workers is None:
            image_bytes = 4 * int(np.prod(self.preprocessing.input_size))
            workers = default_workers(len(dataset), batch_size * image_bytes)
        return ImageLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            drop_last=shuffle and len(sampler) > batch_size and len(sampler) % batch_size == 1,
            persistent_workers=workers > 0,
            **loader_settings(workers),
        )
