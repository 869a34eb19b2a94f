"""Train one cell of the regret benchmark by every transfer method, through tl's own parts."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from images import ASSETS
from regret_cells import SIDE, Cell, read_set, sample
from regret_rates import method_config
from torch.utils.data import Dataset

import tl
from tl import training
from tl.config import FinetuneConfig, HeadKind, TlError, TrainConfig
from tl.data import ImageDataModule, ImageTable
from tl.data.datamodule import ImageDataset
from tl.decision.evidence import Evidence
from tl.finetuning import Phase, Plan, build_plan
from tl.models import BuiltModel, build_model
from tl.training.averaging import UNCHOSEN, mix
from tl.training.state import load_kept, read_checkpoint, read_progress

IMAGE_SIZE = 96  # three sevenths of a side of the pretraining: a fifth of the time
LEAST_EPOCHS = 2
SELDOM = 20  # epochs between two looks at val where it chooses nothing
ALIKE = 2e-3  # rates that differ by less than this share are one


@dataclass(frozen=True)
class Limits:
    """What a fit may cost.

    Args:
        budget: Of `tl.decision.recipe`.
        views: Most images that a phase sees which trains more than a head, all epochs together;
            it has `LEAST_EPOCHS` in any case.
    """

    budget: str = "quick"
    views: int = 1_000


class _HeldImages(ImageDataModule):
    """Keeps what it has read: all fits of a cell see the same changes of the same images.

    Attributes:
        held: Split, whether it is augmented, and key -> item.
    """

    held: dict[Any, dict[str, Any]]

    def dataset(self, split: str, *, augment: bool) -> Any:
        """As without memory."""
        return _Held(super().dataset(split, augment=augment), self.held, (split, augment))


class _Held(Dataset[dict[str, Any]]):
    """Items of a data set that are read once.

    Args:
        dataset: Of one split.
        held: What was read of all splits.
        of: The split, and whether it is augmented.
    """

    def __init__(
        self, dataset: ImageDataset, held: dict[Any, dict[str, Any]], of: tuple[str, bool]
    ) -> None:
        self.dataset, self.held, self.of = dataset, held, of
        self.images = dataset.images

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int] | int) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not self.of[1]:  # nothing is random in a clean image, whatever the epoch
            epoch = 0
        name = (*self.of, epoch, index)
        if name not in self.held:
            self.held[name] = self.dataset[epoch, index]
        return self.held[name]


@dataclass(frozen=True)
class Setting:
    """What the fits of a cell share."""

    cell: Cell
    table: ImageTable
    config: TrainConfig
    work: Path
    held: dict[Any, dict[str, Any]] = field(default_factory=dict)

    def built(self, finetune: FinetuneConfig | None = None) -> BuiltModel:
        """The backbone in its pretrained weights, with a head that the seed decides."""
        training.prepare(self.config.trainer, self.cell.seed)
        built = build_model(self.config.model, self.table.classes)
        return training.with_head(built, finetune.head) if finetune else built

    def sizes(self) -> dict[str, int]:
        """Images of each split."""
        return {name: len(self.table.split(name)) for name in ("train", "val", "test")}

    def images(self, built: BuiltModel) -> ImageDataModule:
        """The images; all seeds share the views, and so what is cached of them."""
        images = _HeldImages.from_config(self.table, built.preprocessing, self.config)
        images.held = self.held
        return images


def setting(
    cell: Cell,
    work: Path,
    assets: Path = ASSETS,
    *,
    image_size: int = IMAGE_SIZE,
    side: int = SIDE,
) -> Setting:
    """Images, and the settings that all methods have in common.

    Args:
        cell: What to train.
        work: Folder of copies, caches and fits.
        assets: Folder of weights and image sets.
        image_size: Side of the input in pixels.
        side: Shorter side of the copies, at most.
    """
    table = sample(_read_set(cell.set, work, assets, side), cell)
    config = tl.compose(
        "train",
        ["finetune=linear_probe", "augment=light", "trainer=cpu", "cache=on"],
        {
            "data.root": str(table.root),
            "data.num_workers": 0,
            "model.name": cell.backbone,
            "model.weights": str(assets / "weights"),
            "model.image_size": image_size,
            "cache.dir": str(work / "cache"),
        },
    )
    return Setting(cell, table, config, work)


@cache
def _read_set(name: str, work: Path, assets: Path, side: int) -> ImageTable:
    return read_set(name, work, assets, side)


def measure(given: Setting) -> tuple[Evidence, float]:
    """The evidence of a cell and the seconds that it took."""
    began = time.perf_counter()
    built = given.built()
    evidence = training.gather_evidence(
        built, given.images(built), given.config.cache, seed=given.cell.seed
    )
    return evidence, time.perf_counter() - began


def fits(
    given: Setting,
    evidence: Evidence,
    limits: Limits,
    wanted: Sequence[tuple[str, float]],
) -> Iterator[dict[str, Any]]:
    """One row a fit: accuracy on test, which images were right, and how it was trained.

    A method that cannot be had for this backbone gives a row with `error`.

    Args:
        given: The cell.
        evidence: Of the cell.
        limits: What a fit may cost.
        wanted: Keys of `regret_rates.METHODS` with rates.
    """
    folder = given.work / "fits" / "-".join(map(str, given.cell.key().values()))
    shutil.rmtree(folder, ignore_errors=True)
    fit = CellTrainer(given, limits, folder)
    try:
        for method, rate in wanted:
            began, cpu = time.perf_counter(), time.process_time()
            row: dict[str, Any] = {"method": method, "rate": rate}
            try:
                config = method_config(
                    method, evidence, limits.budget, given.config.data.batch_size
                )
                row |= fit.run(config, rate, folder / f"{method}-{rate}")
            except TlError as error:
                row["error"] = str(error)
            row["cpu_seconds"] = round(time.process_time() - cpu, 2)
            yield row | {"seconds": round(time.perf_counter() - began, 2)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def limited(plan: Plan, train_images: int, rate: float, limits: Limits) -> Plan:
    """The plan with the last phase at another rate, and epochs within the limits."""
    most = max(LEAST_EPOCHS, limits.views // train_images)
    phases = [
        # The ratio between stages says nothing where the head is alone: so all heads are alike.
        replace(phase, lr_ratio=1.0)
        if len(phase.trainable) == 1
        else replace(phase, epochs=min(phase.epochs, most))
        for phase in plan.phases
    ]
    phases[-1] = replace(phases[-1], head_lr=phases[-1].head_lr * rate)
    return replace(plan, phases=tuple(phases))


@dataclass(frozen=True)
class _Fit:
    """A fit that was trained, and what others need that take the same steps."""

    head: HeadKind
    plan: Plan
    folder: Path
    row: dict[str, Any]

    def same_steps(self, head: HeadKind, plan: Plan) -> bool:
        """Whether another plan differs in nothing but whether it averages at the end."""
        (*first, last), (*others, own) = plan.phases, self.plan.phases
        near = abs(last.head_lr / own.head_lr - 1) < ALIKE
        alike = replace(own, head_lr=last.head_lr, average=last.average) == last
        return head == self.head and first == others and near and alike

    @property
    def averages(self) -> bool:
        """Whether what is kept lies between the weights before and after the last phase."""
        return self.plan.phases[-1].average


class CellTrainer:
    """Trains methods on a cell; those that begin alike share their first phase.

    `wise_ft` at its rate takes the steps of `lp_ft` at a third of its own, and is trained once.

    Args:
        given: The cell.
        limits: What a fit may cost.
        folder: Empty.
    """

    def __init__(self, given: Setting, limits: Limits, folder: Path) -> None:
        self.given, self.limits, self.folder = given, limits, folder
        self._begun: dict[tuple[HeadKind, Phase], Path] = {}
        self._trained: list[_Fit] = []

    def run(self, config: FinetuneConfig, rate: float, folder: Path) -> dict[str, Any]:
        """Train by a config at a share of its last rate, and look at test."""
        built = self.given.built(config)
        number = len(self.given.table.split("train"))
        batch = self.given.config.data.batch_size
        plan = build_plan(config, built, train_images=number, batch_size=batch)
        plan = limited(plan, number, rate, self.limits)
        averages = plan.phases[-1].average
        alike = [fit for fit in self._trained if fit.same_steps(config.head, plan)]
        known = {fit.averages: fit for fit in alike}
        if averages in known:
            return known[averages].row | {"phases": [asdict(p) for p in plan.phases]}
        if known and averages:
            self._average(known[False], built, folder)
        elif len(plan.phases) > 1:
            # As after an interruption: `run_plan` finds the first phase done, and goes on.
            shutil.copytree(self._first_phase(config, plan), folder)
        result = self._train(plan, built, folder)
        if len(plan.phases) == 1:
            self._begun[config.head, plan.phases[0]] = folder
        probabilities, labels = result.predict("test")
        on_val, val_labels = result.predict("val")
        result.predict.close()
        right = (probabilities.argmax(1) == labels).numpy()
        row = {
            "acc": float(right.mean()),
            "hits": np.packbits(right).tobytes().hex(),
            "val_acc": float((on_val.argmax(1) == val_labels).float().mean()),
            "batch_size": batch,
            "phases": [asdict(p) for p in plan.phases],
            "epochs": [p.epochs for p in result.phases],
            "kept": [p.kept for p in result.phases],
        }
        self._trained.append(_Fit(config.head, plan, folder, row))
        return row

    def _average(self, fit: _Fit, built: BuiltModel, folder: Path) -> None:
        """Copy a fit whose last phase chose nothing on val, and mix that as the library would.

        Where val chooses, each plan averages, and none differs from another in that alone.
        """
        assert fit.plan.phases[-1].select == "last"
        shutil.copytree(fit.folder, folder)
        done, _ = read_progress(folder)
        load_kept(built.model, folder, done[:-1])
        file = folder / done[-1].checkpoint
        after = read_checkpoint(file)["state_dict"]
        before = {f"model.{name}": value for name, value in built.model.state_dict().items()}
        torch.save({"state_dict": mix(before, after, UNCHOSEN)}, file)

    def _first_phase(self, config: FinetuneConfig, plan: Plan) -> Path:
        key = config.head, plan.phases[0]
        if key not in self._begun:
            folder = self.folder / f"first-{len(self._begun)}"
            self._train(replace(plan, phases=plan.phases[:1]), self.given.built(config), folder)
            self._begun[key] = folder
        return self._begun[key]

    def _train(self, plan: Plan, built: BuiltModel, folder: Path) -> training.FitResult:
        config = self.given.config
        trainer = dict(config.trainer)
        if not any(phase.patience for phase in plan.phases):
            trainer["check_val_every_n_epoch"] = SELDOM
        return training.run_plan(
            plan,
            built,
            self.given.images(built),
            folder=folder,
            trainer=trainer,
            cache=config.cache,
            seed=self.given.cell.seed,
        )
