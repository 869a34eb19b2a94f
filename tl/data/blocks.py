"""A random order that reads remote shards block by block."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tl.data.sampling import ORDER, EpochSampler, evenly, mixed_seed
from tl.data.stores import Images


def sampler_of(images: Images, **settings: Any) -> EpochSampler:
    """The sampler for some images: block by block where they are streamed from elsewhere.

    Args:
        images: Of one split.
        settings: Those of `EpochSampler`.
    """
    blocks = images.blocks()
    if blocks is None:
        return EpochSampler(len(images), **settings)
    window: int = getattr(images.store, "window", 1)
    return BlockSampler(blocks, window=window, **settings)


class BlockSampler(EpochSampler):
    """Yields (epoch, index) so that a block of a shard is fetched once an epoch, or twice.

    The blocks are put into a random order, and the images of `window` blocks at a time are mixed.
    Each process takes a piece of that order, so that it does not fetch what others read. The order
    is a pure function of (seed, epoch), as that of `EpochSampler`.

    Args:
        blocks: Number of the block of each image, (N,).
        window: Blocks whose images are mixed; all of them should fit on the disk.
        settings: Those of `EpochSampler`.
    """

    def __init__(self, blocks: NDArray[np.int64], *, window: int, **settings: Any) -> None:
        super().__init__(len(blocks), **settings)
        names, self.blocks = np.unique(blocks, return_inverse=True)
        self.number, self.window = len(names), window

    def order(self) -> tuple[int, torch.Tensor]:
        """The epoch as it is counted over all phases, and the images in it, one after the other."""
        epoch = self.epoch + self.epoch_offset
        if not self.shuffle:
            return epoch, torch.arange(self.images)
        random = np.random.default_rng(mixed_seed(ORDER, self.seed, epoch))
        turn = random.permutation(self.number)[self.blocks]
        order = np.argsort(turn, kind="stable")
        if self.weights is not None:
            order = order[evenly(self.weights[order], random.random())]
        mixed = np.lexsort((random.random(self.images), turn[order] // self.window))
        return epoch, torch.from_numpy(order[mixed])

    def _share(self, order: NDArray[np.int64]) -> NDArray[np.int64]:
        """A piece in one stretch: other processes read other blocks."""
        full = len(order) // self.step
        sizes = [
            full * len(range(rank, self.step, self.num_replicas))
            + len(range(rank, self.last, self.num_replicas))
            for rank in range(self.num_replicas)
        ]
        start = sum(sizes[: self.rank])
        return order[start : start + sizes[self.rank]]
