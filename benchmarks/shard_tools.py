"""Loaders of tar shards, one a tool, for `shards.py`: batches of keys, and states to resume from.

The tools are imported where they are used: each process needs one of them.
"""

from __future__ import annotations

import functools
import json
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BATCH, WORKERS = 64, 2
WINDOW = 2_048  # images of the shuffle buffers


class Loader(ABC):
    """Batches of (keys, bytes in all) in an order of the tool's own.

    Args:
        urls: Shards, paths or addresses.
        scratch: Folder for copies and indexes.
        rank: Of this process.
        world: Processes.
        state: What `state()` said in the process before; None: from the beginning.
    """

    def __init__(self, urls: list[str], scratch: Path, rank: int, world: int, state: Any) -> None:
        self.urls, self.scratch, self.rank, self.world = urls, scratch, rank, world
        self.loader = self.build()
        self.resumed = state is not None and self.load(state)

    @abstractmethod
    def build(self) -> Any:
        """A loader of the tool."""

    def state(self) -> Any:
        """Where it is, in the tool's own words; None where it has none."""
        return self.loader.state_dict() if hasattr(self.loader, "state_dict") else None

    def load(self, state: Any) -> bool:
        """Go on from a state; False where the tool cannot."""
        self.loader.load_state_dict(state)
        return True

    def __iter__(self) -> Iterator[tuple[list[str], int]]:
        return iter(self.loader)


def _collate(samples: list[tuple[str, bytes]]) -> tuple[list[str], int]:
    return [key for key, _ in samples], sum(len(data) for _, data in samples)


class WebDataset(Loader):
    """webdataset: an iterable pipeline; shards are dealt to ranks and workers."""

    def build(self) -> Any:
        """Its usual pipeline, shuffled."""
        import webdataset as wds

        data = wds.WebDataset(
            self.urls, shardshuffle=len(self.urls), seed=0, nodesplitter=wds.split_by_node
        ).shuffle(WINDOW).to_tuple("__key__", "jpg")  # fmt: skip
        return wds.WebLoader(data, batch_size=BATCH, num_workers=WORKERS, collate_fn=_collate)

    def load(self, state: Any) -> bool:  # noqa: ARG002
        """It has no state."""
        return False


class Wids(Loader):
    """wids: random access to shards, whole files copied to a folder; needs an index first."""

    def build(self) -> Any:
        """Its usual pipeline, shuffled."""
        import torch
        import wids

        index = self.scratch / "wids.json"
        if not index.exists():
            shards = [{"url": url, "nsamples": count_samples(url)} for url in self.urls]
            index.write_text(json.dumps(shards))
        cache = self.scratch / "copies"
        data = wids.ShardListDataset(
            json.loads(index.read_text()),
            transformations=[_as_it_is],
            keep=True,
            **({"cache_dir": str(cache)} if self.urls[0].startswith("http") else {}),
        )
        sampler = wids.DistributedChunkedSampler(data, chunksize=WINDOW, shuffle=True)
        take = functools.partial(_collate_wids)
        return torch.utils.data.DataLoader(
            data, BATCH, sampler=sampler, num_workers=WORKERS, collate_fn=take
        )

    def load(self, state: Any) -> bool:  # noqa: ARG002
        """It has no state."""
        return False


def _as_it_is(sample: Any) -> Any:
    return sample


def _collate_wids(samples: list[dict[str, Any]]) -> tuple[list[str], int]:
    return _collate([(sample["__key__"], sample[".jpg"].read()) for sample in samples])


def count_samples(url: str) -> int:
    """How many images a shard holds, by reading it once."""
    import fsspec

    with fsspec.open(url) as stream, tarfile.open(fileobj=stream, mode="r|") as shard:
        return sum(member.name.endswith(".jpg") for member in shard)


class LitData(Loader):
    """litdata: chunks of its own format; the shards are converted first."""

    def build(self) -> Any:
        """Its usual pipeline, shuffled."""
        import litdata

        folder = self.scratch / "litdata"
        if not folder.exists():
            litdata.optimize(
                read_for_litdata, self.urls, str(folder), chunk_bytes="2MB", num_workers=WORKERS
            )
        data = litdata.StreamingDataset(str(folder), shuffle=True, seed=0)
        return litdata.StreamingDataLoader(
            data, batch_size=BATCH, num_workers=WORKERS, collate_fn=_collate
        )


def read_for_litdata(url: str) -> Iterator[tuple[str, bytes]]:
    """Samples of a shard."""
    import fsspec

    with fsspec.open(url) as stream, tarfile.open(fileobj=stream, mode="r|") as shard:
        for member in shard:
            if member.name.endswith(".jpg"):
                yield member.name[:-4], shard.extractfile(member).read()  # type: ignore[union-attr]


class Datasets(Loader):
    """datasets: streaming=True; shards are dealt to ranks and workers."""

    def build(self) -> Any:
        """Its usual pipeline, shuffled."""
        import datasets
        from datasets.distributed import split_dataset_by_node
        from torchdata.stateful_dataloader import StatefulDataLoader

        data = datasets.load_dataset(
            "webdataset", data_files={"train": self.urls}, split="train", streaming=True
        )
        data = data.decode(False).shuffle(seed=0, buffer_size=WINDOW)
        data = split_dataset_by_node(data, self.rank, self.world)
        return StatefulDataLoader(
            data, batch_size=BATCH, num_workers=WORKERS, collate_fn=_collate_datasets
        )


def _collate_datasets(samples: list[dict[str, Any]]) -> tuple[list[str], int]:
    return _collate([(sample["__key__"], sample["jpg"]["bytes"]) for sample in samples])


class Ours(Loader):
    """tl: an index of places, any order; remote shards are kept on the disk in blocks."""

    remote_gb = 20.0

    def build(self) -> Any:
        """Its usual pipeline, shuffled."""
        from tl.config import DataConfig
        from tl.data.blocks import sampler_of
        from tl.data.loading import ImageLoader
        from tl.data.sources.shards import list_shards

        folder, _, first = self.urls[0].rpartition("/")
        last = self.urls[-1].rpartition("/")[2]
        root = f"{folder}/{{{first.removesuffix('.tar')}..{last.removesuffix('.tar')}}}.tar"
        config = DataConfig(root=root, remote_gb=self.remote_gb)
        images = list_shards(config, self.scratch / "cache").images()
        sampler = sampler_of(images, seed=0, shuffle=True, num_replicas=self.world, rank=self.rank)
        return ImageLoader(
            _Bytes(images), BATCH, sampler=sampler, num_workers=WORKERS, collate_fn=_collate_ours
        )

    def __iter__(self) -> Iterator[tuple[list[str], int]]:
        return ((batch["index"], batch["bytes"]) for batch in self.loader)


def _collate_ours(samples: list[tuple[str, bytes]]) -> dict[str, Any]:
    keys, size = _collate(samples)
    return {"index": keys, "bytes": size}


class Streamed(Ours):
    """tl where less is kept on the disk than there is."""

    remote_gb = 0.1


class _Bytes:
    """What is stored of each image, by name."""

    def __init__(self, images: Any) -> None:
        self.images = images

    def __getitem__(self, item: tuple[int, int]) -> tuple[str, bytes]:
        return Path(self.images.name(item[1])).stem, self.images.read(item[1])

    def __len__(self) -> int:
        return len(self.images)


LOADERS: dict[str, type[Loader]] = {
    "tl": Ours,
    "tl-streamed": Streamed,
    "webdataset": WebDataset,
    "wids": Wids,
    "litdata": LitData,
    "datasets": Datasets,
}
