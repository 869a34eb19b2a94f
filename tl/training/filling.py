"""What is kept of images at one frontier, and how what is missing is computed: once in a job."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor

from tl import display, ranks
from tl.cache import CacheError, Rows, Shelf, Writer
from tl.data.datamodule import ImageDataModule
from tl.data.views import CLEAN, ViewDataset, view_loader
from tl.engine import Engine
from tl.graph import Split
from tl.training.costs import human_seconds

BATCH_VIEWS = 32

EngineFor = Callable[[ViewDataset, int], tuple[Engine, int]]


@dataclass(frozen=True)
class Images:
    """Contents (SHA-256), rows of the table, and which views of each are read."""

    digests: NDArray[Any]
    rows: pd.DataFrame
    wanted: NDArray[np.bool_]


class Store:
    """The shelves of one frontier, one a view; view 0 is clean and has the pooled stages, too."""

    def __init__(self, cut: Split, shelves: Sequence[Shelf], data: ImageDataModule) -> None:
        self.cut, self.shelves, self.data = cut, tuple(shelves), data

    @property
    def bytes_per_view(self) -> int:
        """Size of the clean view, the largest."""
        return sum(f.bytes for f in self.shelves[CLEAN].fields)

    def close(self) -> None:
        """Let others evict them."""
        for shelf in self.shelves:
            shelf.close()

    def rows(self, data: ImageDataModule, name: str, views: int) -> list[Rows]:
        """Rows of a split of the data in its order, a list entry a view."""
        digests = data.table.split(name)["sha256"].tolist()
        return [shelf.rows(digests) for shelf in self.shelves[:views]]

    def missing(self, images: Images) -> NDArray[np.bool_]:
        """What of `images.wanted` is not kept yet."""
        digests = images.digests.tolist()
        shelves = self.shelves[: images.wanted.shape[1]]
        kept = [shelf.present(digests) for shelf in shelves]
        return images.wanted & ~np.stack(kept, axis=1)

    def fill(self, images: Images, engine_for: EngineFor) -> dict[str, str]:
        """Compute what is missing; returns what a person should know about it.

        Processes that see the same cache share it out; one of them holds the locks for all.

        Raises:
            CacheError: It cannot be kept, in some process.
        """
        missing = self.missing(images)
        if not any(ranks.gather(bool(missing.any()))):
            return {"computed": "nothing: all of it was in the cache"}
        began = time.perf_counter()
        team = ranks.sharing(self.shelves[CLEAN].path.parent)
        place = team.index(ranks.rank())
        with ExitStack() as locks, display.bar("frozen part", unit="views") as update:
            writers = ranks.alike(
                lambda: {} if place else self._writers(missing, locks), CacheError
            )
            # Another job may have filled some meanwhile.
            missing = ranks.gather(self.missing(images) if place == 0 else missing)[team[0]]
            total = int(missing.sum())
            mine = np.zeros((len(missing), 1), bool)
            mine[np.flatnonzero(missing.any(axis=1))[place :: len(team)]] = True
            own = missing & mine
            part = _Part(self, images, own, lambda n: update(min(n * len(team), total), total))
            ranks.alike(lambda: part.compute(writers, engine_for), CacheError)
        ranks.wait()
        for shelf in self.shelves:
            shelf.refresh()
        if not total:
            return {"computed": "nothing: another job has done it meanwhile"}
        seconds = time.perf_counter() - began
        speed = (
            f"{total:,} views in {human_seconds(seconds)}, {total / seconds:.0f}/s with decoding"
        )
        return {"computed": speed, **part.facts}

    def _writers(self, missing: NDArray[np.bool_], locks: ExitStack) -> dict[int, Writer]:
        """Of each view that lacks something; no other job fills it until `locks` is closed."""
        numbers = enumerate(missing.sum(axis=0).tolist())
        return {v: locks.enter_context(self.shelves[v].writing(n)) for v, n in numbers if n}

    def dataset(
        self, rows: pd.DataFrame, digests: NDArray[Any], views: Sequence[int]
    ) -> ViewDataset:
        """Some views of images, to be computed."""
        return ViewDataset(
            self.data.table.images(rows),
            digests.tolist(),
            views,
            augment=self.data.augment,
            preprocessing=self.data.preprocessing,
            seed=self.data.seed,
            max_pixels=self.data.max_pixels,
        )


class _Part:
    """What one process computes of a frontier.

    Args:
        store: Keeps it.
        images: All that are read.
        own: Which views of them this process computes (images, views).
        update: Called with the number of views that are done.
    """

    def __init__(
        self,
        store: Store,
        images: Images,
        own: NDArray[np.bool_],
        update: Callable[[int], None],
    ) -> None:
        self.store, self.images, self.own, self.update = store, images, own, update
        self.facts: dict[str, str] = {}

    def compute(self, writers: Mapping[int, Writer], engine_for: EngineFor) -> None:
        """Compute and write.

        Args:
            writers: Of the process that holds the locks; the others write beside it.
            engine_for: Finds the engine for a data set and a number of views.
        """
        with ExitStack() as beside:
            if not writers:
                views = np.flatnonzero(self.own.any(axis=0)).tolist()
                shelves = self.store.shelves
                writers = {v: beside.enter_context(shelves[v].writing_beside()) for v in views}
            self._compute(writers, engine_for)
            for writer in writers.values():
                writer.flush()

    def _compute(self, writers: Mapping[int, Writer], engine_for: EngineFor) -> None:
        engine, workers, done, slow = None, 0, 0, ""
        shelves, own, total = self.store.shelves, self.own, int(self.own.sum())
        for pattern in np.unique(own[own.any(axis=1)], axis=0):
            views = np.flatnonzero(pattern).tolist()
            chosen = np.flatnonzero((own == pattern).all(axis=1))
            digests = self.images.digests[chosen]
            dataset = self.store.dataset(self.images.rows.iloc[chosen], digests, views)
            engine, workers = engine_for(dataset, total) if engine is None else (engine, workers)
            loader = view_loader(dataset, batch_views=BATCH_VIEWS, workers=workers)
            indices: deque[Tensor] = deque()
            for outputs in engine.run(_flat(loader, indices)):
                names = digests[indices.popleft().numpy()].tolist()
                by_view = [o.reshape(len(names), len(views), *o.shape[1:]) for o in outputs]
                for position, view in enumerate(views):
                    # The pooled stages, which come last, are kept of the clean view only.
                    fields = zip(shelves[view].fields, by_view, strict=False)
                    arrays = {f.name: values[:, position].numpy() for f, values in fields}
                    writers[view].append(names, arrays)
                done += len(names) * len(views)
                self.update(done)
            slow = (loader.meter.bottleneck() if loader.meter else "") or slow
        if engine is not None:
            self.facts = {"engine": engine.line()} | ({"loading": slow} if slow else {})


def _flat(loader: Iterable[dict[str, Tensor]], indices: deque[Tensor]) -> Iterator[Tensor]:
    """Images (B * views, 3, H, W) of each batch; the indices of its images are queued."""
    for batch in loader:
        indices.append(batch["index"])
        yield batch["images"].flatten(0, 1)
