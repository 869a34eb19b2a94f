"""In which order images are read, and what is random in them: functions of seed and epoch alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler

ORDER, ITEM = 0, 1  # what a seed is for: the two never share a stream
CHUNK = 4096  # images whose numbers are Python objects at a time


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


class EpochSampler(DistributedSampler[tuple[int, int]]):
    """Yields (epoch, index); the order is a pure function of (seed, epoch).

    A `DistributedSampler`, so that Lightning keeps it under DDP. The order is cut into steps of
    `batch_size` images, and each process takes every n-th image of a step: together they read in a
    step what a single process would. Where the last step has no image for a process, it reads some
    again, so that all take part (`own` tells how many are not read again).

    Args:
        images: How many there are.
        seed: Of the order.
        batch_size: Images of a step, over all processes; default: one for each.
        drop_last: Leave out a last step of a single image, if it is not the only one.
        shuffle: False keeps the order of the table.
        epoch_offset: Added to the epoch that Lightning sets.
        weights: How often each image is drawn, against the others: an epoch still has as many
            images, some of them several times, others not at all. Needs `shuffle`.
        num_replicas: Processes that share the images.
        rank: Which of them this is.

    Raises:
        ValueError: Weights that are not one number of 0 or more an image, some above 0.
    """

    def __init__(
        self,
        images: int,
        *,
        seed: int,
        shuffle: bool,
        epoch_offset: int = 0,
        weights: NDArray[Any] | None = None,
        batch_size: int | None = None,
        drop_last: bool = False,
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
        self.step = batch_size or num_replicas
        self.last = images % self.step  # images of a step that is not full
        if drop_last and self.last == 1 and images > self.step:
            self.last, self.images_read = 0, images - 1
        else:
            self.images_read = images
        # A BatchNorm has no variance of one image.
        least = min(2, self.batch_size) if self.last and num_replicas > 1 else 0
        self.repeated = max(least - self._of(self.last), 0)
        self.num_samples = self.own + self.repeated
        self.total_size = self.num_samples * num_replicas
        self.epoch_offset = epoch_offset
        self.weights = _weights(weights, images) if shuffle else None
        self.skip = 0  # images of the next epoch that were read before an interruption

    def _of(self, images: int) -> int:
        """How many of the images of a step this process takes."""
        return len(range(self.rank, images, self.num_replicas))

    def share(self, number: int) -> int:
        """Images of step `number` that this process takes, those that it repeats not counted."""
        return self._of(self.whole(number))

    def whole(self, number: int) -> int:
        """Images of step `number` over all processes."""
        return min(self.step, self.images_read - number * self.step)

    @property
    def batch_size(self) -> int:
        """Images of a full step that this process takes."""
        return self._of(self.step)

    @property
    def own(self) -> int:
        """How many images of an epoch this process reads first: what comes after them repeats."""
        return self.images_read // self.step * self._of(self.step) + self._of(self.last)

    def _share(self, order: NDArray[np.int64]) -> NDArray[np.int64]:
        """What this process reads of an epoch, nothing twice."""
        full = len(order) - len(order) % self.step
        steps = order[:full].reshape(-1, self.step)[:, self.rank :: self.num_replicas]
        return np.concatenate([steps.reshape(-1), order[full:][self.rank :: self.num_replicas]])

    def order(self) -> tuple[int, torch.Tensor]:
        """The epoch as it is counted over all phases, and the images in it, one after the other."""
        epoch = self.epoch + self.epoch_offset
        if not self.shuffle:
            return epoch, torch.arange(self.images)
        generator = torch.Generator().manual_seed(mixed_seed(ORDER, self.seed, epoch))
        shuffled = torch.randperm(self.images, generator=generator)
        if self.weights is None:
            return epoch, shuffled
        start = torch.rand(1, dtype=torch.float64, generator=generator).item()
        drawn = shuffled[torch.from_numpy(evenly(self.weights[shuffled.numpy()], start))]
        return epoch, drawn[torch.randperm(self.images, generator=generator)]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, order = self.order()
        whole = order.numpy()
        first = max(self.rank - self.last, 0)  # not the same for all
        again = np.resize(np.roll(whole, -first), self.repeated)
        mine = np.concatenate([self._share(whole[: self.images_read]), again])[self.skip :]
        self.skip = 0
        for start in range(0, len(mine), CHUNK):
            for index in mine[start : start + CHUNK].tolist():
                yield epoch, index


def _weights(weights: NDArray[Any] | None, images: int) -> NDArray[np.float64] | None:
    if weights is None:
        return None
    found = np.asarray(weights, np.float64)
    usable = found.shape == (images,) and bool(np.isfinite(found).all() and (found >= 0).all())
    if not usable or not found.sum() > 0:
        raise ValueError(f"weights must be {images} numbers of 0 or more, not all 0")
    return found


def evenly(weights: NDArray[np.float64], start: float) -> NDArray[np.int64]:
    """As many places as there are weights, each as often as its weight says; in order.

    Systematic sampling: equal steps through the added weights, from a random start. Each image
    comes as often as it should on average, rounded up or down, which keeps the sums of classes
    close, too; drawn one by one, the counts of images would differ by their square root.

    Args:
        weights: Of images that were shuffled, (N,).
        start: In [0, 1), of a step.
    """
    ends = weights.cumsum()
    steps = (np.arange(len(weights)) + start) * (ends[-1] / len(weights))
    places: NDArray[np.int64] = np.searchsorted(ends, steps, side="right")
    return np.minimum(places, len(weights) - 1)
