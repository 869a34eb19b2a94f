"""Trains a trial in a process that keeps images, table, model and cache for all of them."""

from __future__ import annotations

import copy
import random
import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray

from tl.config import AuditMode, ConfigError, Metric, Task, TrainConfig, Trains
from tl.data import ImageDataModule
from tl.display.tables import console
from tl.evaluation import EvaluationError
from tl.finetuning import Plan, build_plan
from tl.models import BuiltModel
from tl.module import TrainingError
from tl.runs import audited, fit_settings
from tl.runs.deciding import fitting
from tl.search.reporting import Reporter, reporting
from tl.training import run_plan
from tl.training.confirming import image_scores

if TYPE_CHECKING:
    from tl.data import ImageTable

HEADLINES = {Task.single: "acc", Task.multi: "map", Task.regression: "mae"}
MODELS_KEPT = 3  # in memory, in their starting weights


@dataclass(frozen=True)
class Outcome:
    """What a trial reached.

    Args:
        value: What the search is about: of val, or the mean over the folds.
        score: The headline of val, likewise.
        loss: val/loss, likewise.
        scores: Of each image that judged it, (N,); higher is better.
        curve: Epoch of the plan -> value of val; of folds -> mean so far.
        epochs: That ran, of all phases and folds.
        trained: Most parameters that a phase trained.
    """

    value: float
    score: float
    loss: float
    scores: NDArray[np.float64]
    curve: Mapping[int, float]
    epochs: int
    trained: int


@dataclass
class _Start:
    """A model in its starting weights, and the state of the random generators after it was made.

    Args:
        built: Stays as it is.
        state: Of the generators.
        used: A copy that a trial before trained, of the same structure.
    """

    built: BuiltModel
    state: tuple[Any, ...]
    used: BuiltModel | None = None

    def copy(self) -> BuiltModel:
        """A model in the starting weights; to fill one that is there is cheaper than a new one."""
        if self.used is None:
            return copy.deepcopy(self.built)
        self.used.model.load_state_dict(self.built.model.state_dict())
        return self.used


class Bench:
    """Where a process tries settings one after the other.

    Args:
        config: Of the job, decided; trials differ from it by their settings.
        table: Its images.
        folds: Parts that are val in turn; 0: the val of the table.
        metric: What is maximised or minimised.
    """

    def __init__(
        self, config: TrainConfig, table: ImageTable, *, folds: int, metric: Metric
    ) -> None:
        self.config, self.table, self.folds, self.metric = config, table, folds, metric
        self._tables: dict[int, ImageTable] = {}
        self._starts: dict[str, _Start] = {}

    @property
    def task(self) -> Task:
        """What the images are labelled with."""
        return self.table.task

    @property
    def headline(self) -> str:
        """`acc`, `map` or `mae`."""
        return HEADLINES[self.task]

    @property
    def monitor(self) -> str:
        """Name of what decides, as Lightning's metrics have it."""
        return "val/loss" if self.metric is Metric.loss else f"val/{self.headline}"

    @property
    def highest(self) -> bool:
        """Whether more of it is better."""
        return self.metric is Metric.score and self.headline != "mae"

    def table_of(self, fold: int | None) -> ImageTable:
        """The images, with one part of them as val."""
        if fold is None:
            return self.table
        if fold not in self._tables:
            audit = AuditMode.fix if self.config.audit is AuditMode.fix else AuditMode.off
            part = replace(self.config.data, folds=self.folds, fold=fold)
            config = replace(self.config, data=part, audit=audit)
            self._tables[fold] = audited(config, lambda _done, _total: None)[0]
        return self._tables[fold]

    def start(self, config: TrainConfig) -> BuiltModel:
        """A fresh copy of the model of a config in its starting weights, as `tl train` makes it."""
        key = self._key(config)
        if key not in self._starts:
            pl.seed_everything(config.seed, workers=True, verbose=False)
            from tl.models import build_model

            built = build_model(
                config.model, self.table.classes, pretrained=config.finetune.pretrained
            )
            built = fitting(built, config.model, config.finetune, self.table)
            while len(self._starts) >= MODELS_KEPT:
                del self._starts[next(iter(self._starts))]
            self._starts[key] = _Start(built, _random_state())
        start = self._starts[key]
        _set_random_state(start.state)
        found = start.copy()
        start.used = None  # until it is known that it came back whole
        return found

    def _give_back(self, config: TrainConfig, built: BuiltModel, plan: Plan) -> None:
        """Keep a trained model to be filled anew; adapters may have changed its structure."""
        if all(phase.trains != Trains.lora.value for phase in plan.phases):
            self._starts[self._key(config)].used = built

    @staticmethod
    def _key(config: TrainConfig) -> str:
        return repr((config.model, config.finetune.pretrained, config.finetune.head))

    def plan(self, config: TrainConfig, built: BuiltModel, share: float = 1.0) -> Plan:
        """The phases of a config, with a share of their epochs."""
        sizes = {
            "train_images": len(self.table_of(0 if self.folds else None).split("train")),
            "batch_size": config.data.batch_size,
        }
        plan = build_plan(config.finetune, built, **sizes)
        phases = (replace(p, epochs=max(1, round(share * p.epochs))) for p in plan.phases)
        return replace(plan, phases=tuple(phases))

    def train(
        self, config: TrainConfig, trial: optuna.Trial, folder: Path, *, share: float, prune: bool
    ) -> Outcome:
        """Train and judge the settings of a trial.

        Args:
            config: Those settings.
            trial: Is told how val is.
            folder: For checkpoints; it is empty again afterwards.
            share: Of the epochs.
            prune: Whether the trial may be given up.

        Raises:
            optuna.TrialPruned: It is given up.
            TrainingError: It diverged.
        """
        found: list[Outcome] = []
        curve: dict[int, float] = {}
        for fold in range(self.folds) if self.folds else (None,):
            within = prune and fold is None
            found.append(self._fit(config, trial, folder, fold, share=share, prune=within))
            if fold is None:
                return found[0]
            curve[fold + 1] = float(np.mean([o.value for o in found]))
            trial.report(curve[fold + 1], fold + 1)
            if prune and fold + 1 < self.folds and trial.should_prune():
                raise optuna.TrialPruned
        return Outcome(
            value=curve[self.folds],
            score=float(np.mean([o.score for o in found])),
            loss=float(np.mean([o.loss for o in found])),
            scores=np.concatenate([o.scores for o in found]),
            curve=curve,
            epochs=sum(o.epochs for o in found),
            trained=max(o.trained for o in found),
        )

    def _fit(
        self,
        config: TrainConfig,
        trial: optuna.Trial,
        folder: Path,
        fold: int | None,
        *,
        share: float,
        prune: bool,
    ) -> Outcome:
        table = self.table_of(fold)
        built = self.start(config)
        images = ImageDataModule.from_config(table, built.preprocessing, config)
        plan = self.plan(config, built, share)
        reporter = Reporter(trial, plan, self.monitor, highest=self.highest, prune=prune)
        place = folder / "checkpoints"
        try:
            with reporting(reporter) as node, quiet():
                settings = fit_settings(config)
                settings["callbacks"] = {**settings["callbacks"], "search": node}
                fit = run_plan(plan, built, images, folder=place, **settings)
                with closing(fit.predict):
                    loss, score = fit.predict.loss("val")
                    outputs, labels = (v.numpy() for v in fit.predict("val"))
        finally:
            shutil.rmtree(place, ignore_errors=True)
        self._give_back(config, built, plan)
        if not np.isfinite(outputs).all() or loss != loss:
            raise TrainingError("the outputs are not finite: it diverged")
        return Outcome(
            value=loss if self.metric is Metric.loss else score,
            score=score,
            loss=loss,
            scores=image_scores(outputs, labels, self.task),
            curve=reporter.curve,
            epochs=len(fit.history),
            trained=fit.trainable_parameters,
        )


# What settings may do to a trial without stopping the search.
FAILURES = (
    ConfigError,
    TrainingError,
    EvaluationError,
    RuntimeError,
    ValueError,
    FloatingPointError,
)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what a fit says off the screen: a trial is one line."""
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before


def _random_state() -> tuple[Any, ...]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def _set_random_state(state: tuple[Any, ...]) -> None:
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])
    random.setstate(state[2])
