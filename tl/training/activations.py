"""Compute the frozen part of a phase once per image, where that pays; else say why not."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch

from tl import display, ranks
from tl.cache import ActivationCache, CacheError, Field, free_bytes
from tl.config import ActivationsConfig, CacheMode, HeadKind, Trains
from tl.cores import usable_cores
from tl.data.datamodule import ImageDataModule
from tl.data.loading import FEW_IMAGES
from tl.data.views import CLEAN, ViewDataset, is_random, view_key
from tl.engine import Engine, choose_engine, workers_and_threads
from tl.finetuning import Phase
from tl.graph import Split, SplitError, prove
from tl.graph.stage_head import cut_model
from tl.models import BuiltModel
from tl.training.cached import CachedDataModule, Clean, Reading, pooled_name, value_name
from tl.training.costs import Decision, decide, human_seconds, worth_finding
from tl.training.filling import EngineFor, Images, Store
from tl.training.probing import Probe, Stored, harmless
from tl.training.proofs import Proofs

LINEAR = HeadKind.linear.value
# By measurement (docs/cache.md): a linear head gains next to nothing from a second view, but stages
# that saw one view only were less accurate than with new changes in each epoch.
HEAD_VIEWS, VIEWS = 1, 4
FIRST = 8  # views that the engines are compared on
LONG_SECONDS = 30.0


@dataclass(frozen=True)
class Prepared:
    """What a phase reads: cached values, or images where `data` is None; and why.

    Args:
        data: Batches of cached values.
        facts: What a person should know: why, what is kept, what it took.
    """

    data: CachedDataModule | None
    facts: dict[str, str]

    @classmethod
    def off(cls, reason: str) -> Prepared:
        """The phase reads images."""
        return cls(None, {"why": reason})

    @property
    def title(self) -> str:
        """Whether the cache is used."""
        return f"activation cache: {'on' if self.data else 'off'}"


class Activations:
    """Decides for each phase what it reads, and fills the cache.

    Args:
        config: `cache.*`.
        built: The model that all phases share.
        data: Images.
    """

    def __init__(self, config: ActivationsConfig, built: BuiltModel, data: ImageDataModule) -> None:
        self.config, self.built, self.data = config, built, data
        self.cache = ActivationCache(
            config.path() / "activations", limit_bytes=int(config.max_gb * 1e9)
        )
        self.proofs = Proofs(config.path() / "proofs.json")
        self._stores: list[Store] = []

    def close(self) -> None:
        """Let others evict what was read."""
        for store in self._stores:
            store.close()

    def prepare(self, phase: Phase, device: torch.device, *, as_before: bool | None) -> Prepared:
        """What a phase reads. The model is frozen for that phase already.

        Args:
            phase: About to begin.
            device: Where it trains.
            as_before: What an interrupted run decided for this phase; None decides anew.
        """
        reason = self._excluded(phase)
        if as_before is False:
            reason = "as before the interruption"
        if reason:
            return Prepared.off(reason)
        try:
            return self._prepare(phase, device, forced=bool(as_before))
        except SplitError as error:
            return Prepared.off(str(error))
        except CacheError as error:
            display.say(f"warning: {error}")
            return Prepared.off("the cache cannot be used")

    def read(self, cached: CachedDataModule, name: str, device: torch.device) -> None:
        """Let a data module read a further split of the data, clean; as little as is missing.

        Raises:
            CacheError: It cannot be kept.
        """
        store = next(s for s in self._stores if s.cut is cached.reading.split)
        store.fill(self._images([name], views=1), self._engine(store.cut, device))
        cached.reading.rows[name] = ranks.alike(
            lambda: store.rows(self.data, name, views=1), CacheError
        )

    def clean(self, phase: Phase, device: torch.device, rows: pd.DataFrame, more: int = 0) -> Clean:
        """Clean values and pooled stages of some images; what is missing is computed now.

        Args:
            phase: That would read the values; the model is frozen for it already.
            device: Where to compute.
            rows: Of the table, each content once.
            more: How many other images the engine will be asked for afterwards.

        Raises:
            SplitError: The model cannot be cut.
            CacheError: They cannot be kept.
        """
        probe = Probe(self.built.model, self.data, device)
        cut, stored = self._cut(phase, probe)
        store = self._store(cut, stored.dtypes, views=1)
        wanted = np.ones((len(rows), 1), bool)
        images = Images(rows["sha256"].to_numpy(), rows, wanted)
        number = int(store.missing(images).sum()) + more
        dataset = store.dataset(images.rows, images.digests, [CLEAN])
        engine, workers = self._engine(cut, device)(dataset, number)
        store.fill(images, lambda _dataset, _number: (engine, workers))
        kept = ranks.alike(lambda: store.shelves[CLEAN].rows(images.digests.tolist()), CacheError)
        return Clean(cut, kept, engine)

    def _excluded(self, phase: Phase) -> str:
        if self.config.mode is CacheMode.off:
            return "cache.mode is off"
        if self.data.mix is not None:
            return "mixup and cutmix mix the pixels of images, so nothing can be kept per image"
        if len(phase.trainable) == len(self.built.stages):
            if phase.trains == Trains.all.value:
                return "every stage trains, nothing is frozen"
            return "every stage trains in part, so next to nothing stays the same"
        return ""

    def _prepare(self, phase: Phase, device: torch.device, *, forced: bool) -> Prepared:
        # A head on all stages reads the whole of train once in any case, to select its features.
        forced = forced or self.config.mode is CacheMode.on or self.built.head != LINEAR
        probe = Probe(self.built.model, self.data, device)
        if text := ranks.on_first(self._too_short)(phase, probe, forced):
            return Prepared.off(text)
        cut, stored = self._cut(phase, probe)
        views = 1 + self._augmented_views(cut)
        store = self._store(cut, stored.dtypes, views)
        images = self._images(("train", "val"), views)
        if store.missing(self._images(("train", "val", "test"), views)).any():
            _ = cut.prefix  # later on the model may be in other modes
        missing = max(ranks.gather(int(store.missing(images).sum())))
        decision = ranks.on_first(self._decision)(phase, probe, store, views, missing, forced)
        if not decision.use:
            return Prepared.off(decision.reason)
        facts = {"why": decision.reason, "kept": _kept_text(cut, stored, store)}
        facts |= store.fill(images, self._engine(cut, device))
        kept = {"train": views, "val": 1}
        rows = ranks.alike(
            lambda: {name: store.rows(self.data, name, n) for name, n in kept.items()}, CacheError
        )
        whole_epochs = cut.linear is not None and phase.precision == "32-true"
        step = self.data.batch_size * phase.accumulate if whole_epochs else 0
        reading = Reading(cut, rows, step)
        return Prepared(CachedDataModule(self.data, reading), facts)

    def _too_short(self, phase: Phase, probe: Probe, forced: bool) -> str:
        """Why nothing can be gained; empty where it may."""
        if forced or self.proofs.know(self.built, phase):
            return ""
        seconds = probe.least_seconds * phase.epochs
        if worth_finding(seconds):
            return ""
        return f"{phase.epochs} epochs of the whole model take only {human_seconds(seconds)}"

    def _decision(
        self, phase: Phase, probe: Probe, store: Store, views: int, missing: int, forced: bool
    ) -> Decision:
        """Whether the phase reads the cache, which lacks so many views."""
        if not missing:
            return Decision(True, "all of it is there")
        costs = probe.costs(
            phase,
            store.cut,
            views=views,
            missing=missing,
            bytes_per_view=store.bytes_per_view,
            limit=self.cache.limit_bytes,
            disk_free=free_bytes(self.cache.folder),
        )
        return decide(costs, forced=forced)

    def _augmented_views(self, cut: Split) -> int:
        if not is_random(self.data.augment) or self.built.head != LINEAR:
            return 0  # stages are pooled in the clean view only
        if self.config.views is not None:
            return self.config.views
        return HEAD_VIEWS if cut.linear is not None else VIEWS

    def _cut(self, phase: Phase, probe: Probe) -> tuple[Split, Stored]:
        make = partial(cut_model, self.built, probe.noise)

        @ranks.in_turn
        def proven() -> tuple[Split, Stored]:
            return self.proofs.cut(self.built, phase, make, lambda cut: self._prove(cut, probe))

        cut, stored = ranks.alike(proven, SplitError)
        return cut, ranks.agree(stored)

    def _prove(self, cut: Split, probe: Probe) -> Stored:
        proof = prove(cut, self.built.model, probe.images())
        return harmless(cut, self.built.model, proof.values)

    def _store(self, cut: Split, dtypes: Sequence[str], views: int) -> Store:
        values = [
            Field(value_name(i), shape, dtype)
            for i, (shape, dtype) in enumerate(zip(cut.shapes, dtypes, strict=True))
        ]
        pooled = [
            Field(pooled_name(name), (size,), "float32")
            for name, size in zip(cut.pooled, cut.pooled_sizes, strict=True)
        ]
        shelves = []
        for view in range(views):
            key = {
                "model": self.built.name,
                "weights": cut.sha256,
                "preprocessing": self.data.preprocessing.to_dict(),
                "frontier": ", ".join(cut.nodes),
                "view": view_key(view, self.data.augment, self.data.seed),
                "tolerance": self.config.tolerance,
            }
            fields = [*values, *pooled] if view == CLEAN else values
            shelves.append(self.cache.shelf(key, fields))
        store = Store(cut, shelves, self.data)
        self._stores.append(store)
        return store

    def _images(self, splits: Sequence[str], views: int) -> Images:
        """Each image content of some splits once; train is read in all views, the rest clean."""
        table = self.data.table
        rows = pd.concat([table.split(name) for name in splits], ignore_index=True)
        in_train = rows.loc[rows["split"] == "train", "sha256"]
        rows = rows.drop_duplicates("sha256")
        wanted = np.ones((len(rows), views), bool)
        wanted[:, CLEAN + 1 :] = rows["sha256"].isin(in_train).to_numpy()[:, None]
        return Images(rows["sha256"].to_numpy(), rows, wanted)

    def _engine(self, cut: Split, device: torch.device) -> EngineFor:
        """How to find the engine for a data set of so many views, and its loader processes."""

        def choose(dataset: ViewDataset, number: int) -> tuple[Engine, int]:
            began = time.perf_counter()
            some = range(min(max(FIRST // len(dataset.views), 2), len(dataset)))
            first = torch.cat([dataset[i]["images"] for i in some])
            decode = (time.perf_counter() - began) / len(first)
            cores = usable_cores()

            def engine_of(threads: int, choice: str) -> Engine:
                return choose_engine(
                    cut.prefix,
                    first,
                    device=device,
                    images_to_run=number,
                    choice=choice,
                    tolerance=self.config.tolerance,
                    memory=self.config.path() / "engines.json",
                    threads=threads,
                    loading_seconds=decode / cores,
                )

            engine = engine_of(cores, self.config.engine)
            on_cpu = device.type == "cpu"
            core_seconds = engine.seconds_per_image * cores if on_cpu else 0.0
            workers, threads = workers_and_threads(decode, core_seconds, cores)
            # Making it again pays only where threads would stand in each other's way for long.
            if on_cpu and threads < cores and number * engine.seconds_per_image > LONG_SECONDS:
                engine = engine_of(threads, engine.name)
            if number < FEW_IMAGES:
                workers = 0
            return engine, workers if self.data.num_workers is None else self.data.num_workers

        return choose


def _kept_text(cut: Split, stored: Stored, store: Store) -> str:
    shapes = ", ".join(" x ".join(map(str, shape)) for shape in cut.shapes)
    number = len(store.shelves) - 1
    views = f"{number} augmented view{'s' * (number != 1)} beside the clean one"
    return f"{shapes} at {', '.join(cut.nodes)} as {stored.text}; {views}"
