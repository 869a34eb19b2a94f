"""Batches of cached values instead of images, in the order and with the seeds of the images."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tl.cache import Rows
from tl.data.datamodule import ImageDataModule
from tl.data.sampling import EpochSampler
from tl.engine import Engine
from tl.graph import Split

BATCH_BYTES = 64 << 20  # of values in memory at once
HELD_BYTES = 512 << 20  # of all that a linear head reads in a phase: up to here it stays in memory


class CachedDataset(Dataset[dict[str, Any]]):
    """Values of the images of one split; each epoch reads one view of them.

    Args:
        views: Rows of each view, in the order of the split's images.
        names: Of the values, in the order of the suffix.
        targets: Of each image, as `ImageTable.targets` gives them.
        weights: Of each image in the loss.
        first_epoch: Of the phase, as the sampler counts.
    """

    def __init__(
        self,
        views: Sequence[Rows],
        names: Sequence[str],
        targets: NDArray[Any],
        weights: NDArray[np.float32] | None = None,
        first_epoch: int = 0,
    ) -> None:
        self.views = tuple(views)
        self.names = tuple(names)
        self.known = _known(targets, weights)
        self.first_epoch = first_epoch

    def __len__(self) -> int:
        return len(self.known["label"])

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """A whole batch at once, as torch's loader asks for it: keys are (epoch, index)."""
        view = self.views[(keys[0][0] - self.first_epoch) % len(self.views)]
        indices = np.fromiter((index for _, index in keys), np.int64, len(keys))
        rows = torch.from_numpy(indices)
        values = [view.gather(name, indices) for name in self.names]
        return {"values": values, **{k: v[rows] for k, v in self.known.items()}, "index": rows}


def _known(targets: NDArray[Any], weights: NDArray[np.float32] | None) -> dict[str, Tensor]:
    """What batches say of images beside their values: `label`, and `weight` where there is one."""
    found = {"label": torch.tensor(targets)}
    return found if weights is None else {**found, "weight": torch.tensor(weights)}


def _as_it_is(batch: Any) -> Any:
    return batch


class HeldDataset(Dataset[dict[str, Any]]):
    """What a linear layer reads of the images of one split, in memory; a batch is an epoch.

    Args:
        views: float32 (images, features) of each view.
        targets: Of each image, as `ImageTable.targets` gives them.
        weights: Of each image in the loss.
        first_epoch: Of the phase, as the sampler counts.
    """

    def __init__(
        self,
        views: Sequence[Tensor],
        targets: NDArray[Any],
        weights: NDArray[np.float32] | None,
        first_epoch: int,
    ) -> None:
        self.views = tuple(views)
        self.known = _known(targets, weights)
        self.first_epoch = first_epoch

    def __len__(self) -> int:
        return len(self.known["label"])

    def __getitem__(self, key: tuple[int, Tensor]) -> dict[str, Any]:
        """The rows of an epoch as they lie in memory, and their order."""
        epoch, order = key
        view = self.views[(epoch - self.first_epoch) % len(self.views)]
        return {"rows": view, "order": order, **self.known}


class WholeEpochs(EpochSampler):
    """Yields (epoch, order of the images) once an epoch."""

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:  # type: ignore[override]
        yield self.order()  # not earlier: Lightning sets the epoch of a resumed fit after `iter()`

    def __len__(self) -> int:
        return 1


@dataclass(frozen=True)
class Reading:
    """What a phase needs to train on cached values.

    Args:
        split: The model, cut at the frontier of the phase.
        rows: Split of the data -> rows of each view; view 0 is the clean one.
        step_rows: Rows of an optimizer step where a batch holds many of them (`tl.heads`); 0: a
            batch is a step.
    """

    split: Split
    rows: dict[str, list[Rows]]
    step_rows: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Fields of what the suffix reads."""
        values = [value_name(i) for i in range(len(self.split.nodes))]
        fields = [*values, *(pooled_name(stage) for stage in self.split.pooled)]
        return tuple(fields[place] for place in self.split.inputs)

    def linear_rows(self, view: Rows) -> Tensor:
        """What the linear layer reads of all images of a view, (images, features)."""
        step = max(BATCH_BYTES // self.split.bytes_per_image, 1)
        parts = [
            self.split.rows(
                [view.gather(name, np.arange(i, min(i + step, len(view)))) for name in self.names]
            )
            for i in range(0, len(view), step)
        ]
        return torch.cat(parts)


@dataclass(frozen=True)
class Clean:
    """Values of clean images at a frontier.

    Args:
        cut: The model, cut at that frontier.
        rows: What the cache holds of the images, in their order.
        engine: Computes the same for other images.
    """

    cut: Split
    rows: Rows
    engine: Engine

    @property
    def values(self) -> tuple[str, ...]:
        """Fields of the values."""
        return tuple(value_name(i) for i in range(len(self.cut.shapes)))

    @property
    def pooled(self) -> dict[str, str]:
        """Stage -> field of its pooled features."""
        return {stage: pooled_name(stage) for stage in self.cut.pooled}


class CachedDataModule(pl.LightningDataModule):
    """Batches `{"values": [...], "label", "index"}`; the counterpart of `ImageDataModule`.

    Where the table has weights, there is `weight`, too.

    A head that learns whole epochs gets `{"rows", "order", "label"}` where that fits into memory:
    what its linear layer reads of all images, and the order of the epoch.

    Args:
        images: Gives table, seed, batch size and the epochs' offset.
        reading: Rows and frontier.
    """

    def __init__(self, images: ImageDataModule, reading: Reading) -> None:
        super().__init__()
        self.images = images
        self.reading = reading
        self._held: dict[str, list[Tensor]] = {}

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Rows of train in the order that the images would have; each epoch another view."""
        return self._loader("train", shuffle=True, hold=True)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Clean rows of val in the order of the table."""
        return self._loader("val", shuffle=False, hold=True)

    def loader(self, split: str, part: tuple[int, int] = (0, 1)) -> DataLoader[dict[str, Any]]:
        """Clean rows of a split in the order of the table, as `ImageDataModule.loader`."""
        return self._loader(split, shuffle=False, hold=False, part=part)

    def one_step_a_batch(self) -> None:
        """No batches of many steps: no process has the whole head."""
        self.reading = replace(self.reading, step_rows=0)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps where a batch holds many of them, else 0."""
        rows, step = len(self.images.table.split("train")), self.reading.step_rows
        return math.ceil(rows / step) if step else 0

    def rows_per_batch(self) -> int:
        """Rows of a batch: where they are not a step, as many as memory should hold."""
        step = self.reading.step_rows
        if not step:
            return self.images.batch_size
        return max(BATCH_BYTES // self.reading.split.bytes_per_image // step, 1) * step

    def _may_hold(self) -> bool:
        """Whether a linear head reads all of it from memory."""
        rows = sum(len(view) for name in ("train", "val") for view in self.reading.rows[name])
        fits = rows * self.reading.split.bytes_per_image <= HELD_BYTES
        return bool(self.reading.step_rows) and fits

    def _hold(self, split: str, views: Sequence[Rows]) -> list[Tensor]:
        """What the linear layer reads of some views, computed once in a phase."""
        if split not in self._held:
            with torch.no_grad():
                self._held[split] = [self.reading.linear_rows(view) for view in views]
        return self._held[split]

    def _loader(
        self, split: str, *, shuffle: bool, hold: bool, part: tuple[int, int] | None = None
    ) -> DataLoader[dict[str, Any]]:
        views = self.reading.rows[split]
        views = views if shuffle else views[:1]
        offset = self.images.epoch_offset if shuffle else 0
        table = self.images.table.split(split)
        targets = self.images.table.targets(table)
        weights = table["weight"].to_numpy(np.float32) if "weight" in table else None
        draws = self.images.draws if shuffle else None
        if hold and self._may_hold():
            order = WholeEpochs(
                len(targets),
                seed=self.images.seed,
                shuffle=shuffle,
                epoch_offset=offset,
                weights=draws,
            )
            held = HeldDataset(self._hold(split, views), targets, weights, offset)
            return DataLoader(held, batch_size=None, sampler=order, collate_fn=_as_it_is)
        dataset = CachedDataset(views, self.reading.names, targets, weights, offset)
        # A head that learns whole epochs does so in each process alike: its steps are shorter than
        # a word with another one.
        rank, devices = part or (0, 1)
        if part is None and self.trainer and not self.reading.step_rows:
            devices = self.trainer.world_size
            rank = self.trainer.global_rank if devices > 1 else 0
        batch = self.rows_per_batch()
        sampler = EpochSampler(
            len(dataset),
            seed=self.images.seed,
            shuffle=shuffle,
            epoch_offset=offset,
            weights=draws,
            batch_size=batch,
            drop_last=shuffle and not self.reading.step_rows,
            num_replicas=devices,
            rank=rank,
        )
        return DataLoader(
            dataset,
            batch_size=sampler.batch_size,
            sampler=sampler,
            collate_fn=_as_it_is,
            pin_memory=torch.cuda.is_available(),
        )


def value_name(number: int) -> str:
    """Field of a frontier value on its shelf."""
    return f"value{number}"


def pooled_name(stage: str) -> str:
    """Field of the pooled output of a stage on its shelf."""
    return f"pooled_{stage}"
