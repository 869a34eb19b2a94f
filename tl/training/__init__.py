"""Run a plan: each phase is one `Trainer.fit`, the next starts from the best weights so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    Callback,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
)
from pytorch_lightning.loggers import Logger

from tl import display
from tl.data.datamodule import ImageDataModule
from tl.finetuning import Phase, Plan, audit, stage_hashes, stage_rows
from tl.models import BuiltModel
from tl.module import ClassificationModule, TrainingError
from tl.training.judging import judge, predict
from tl.training.lightning import (
    AtomicCheckpointIO,
    EpochBar,
    History,
    callbacks_of,
    loggers,
    make_trainer,
    prepare,
    quiet_fit,
)
from tl.training.state import (
    PhaseResult,
    load_kept,
    load_model,
    read_progress,
    save_weights,
    write_progress,
)

__all__ = [
    "AtomicCheckpointIO",
    "FitResult",
    "PhaseResult",
    "TrainingError",
    "judge",
    "loggers",
    "make_trainer",
    "predict",
    "prepare",
    "run_plan",
]

MONITOR = "val/loss"


@dataclass(frozen=True)
class FitResult:
    """Outcome of a plan; the model holds the best weights.

    Args:
        phases: One result a phase.
        history: One row an epoch: phase, epoch (from 1), seconds, train/loss, val/loss, val/acc,
            val/f1_macro and `lr/<stage>`.
        device: Where the model was trained.
    """

    phases: tuple[PhaseResult, ...]
    history: pd.DataFrame
    device: torch.device

    @property
    def seconds(self) -> float:
        """Wall time of all fits."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def steps(self) -> int:
        """Optimizer steps of all phases."""
        return sum(phase.steps for phase in self.phases)

    @property
    def trainable_parameters(self) -> int:
        """Most parameters that any phase trained."""
        return max(phase.trainable_parameters for phase in self.phases)


def run_plan(
    plan: Plan,
    built: BuiltModel,
    data: ImageDataModule,
    *,
    folder: Path,
    trainer: Mapping[str, Any],
    callbacks: Mapping[str, Any] | None = None,
    loggers_from: Callable[[int], Sequence[Logger]] = lambda _: (),
    log_rows: Callable[[list[dict[str, Any]], str], None] = lambda _rows, _name: None,
    seed: int = 0,
) -> FitResult:
    """Train a model by a plan, or go on where an earlier call with the same folder was interrupted.

    Args:
        plan: Phases in order.
        built: Model in its starting weights; holds the best weights at the end.
        data: Images; `train` and `val` are used.
        folder: `checkpoints/` of the run: one folder a phase with `best.ckpt` and `last.ckpt`.
        trainer: Arguments of `pytorch_lightning.Trainer`, with `_target_`.
        callbacks: Further callbacks, name -> arguments with `_target_`.
        loggers_from: Loggers of a phase, for the number of optimizer steps that ran before it.
        log_rows: Receives the tables before and after each phase (rows, name).
        seed: Seed of the run.

    Raises:
        ConfigError: Lightning refuses `trainer` or `callbacks`.
        TrainingError: The loss is not finite, or a checkpoint cannot be written.
        FreezeError: Something frozen moved.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done, rows = read_progress(folder)
    load_kept(built.model, folder, done)
    device = torch.device("cpu")
    for number, phase in enumerate(plan.phases):
        if number < len(done):
            display.say(
                f"phase {phase.name} is done already (val/loss {done[number].best_loss:.4f})"
            )
            continue
        fit = _Fit(
            phase,
            number,
            built,
            data,
            folder / f"{number + 1}-{phase.name}",
            seed=seed,
            title=f"phase {number + 1} of {len(plan.phases)}: {phase.name}",
        )
        steps = sum(result.steps for result in done)
        best_before = min((r.best_loss for r in done), default=float("inf"))
        result, history, device = fit.run(
            trainer, callbacks or {}, loggers_from(steps), log_rows, best_before=best_before
        )
        done.append(result)
        rows += history
        write_progress(folder, done, rows)
        load_kept(built.model, folder, done)
    built.model.eval()
    save_weights(built.model, folder)
    return FitResult(tuple(done), pd.DataFrame(rows), device)


class _Fit:
    """One phase: its module, its callbacks, its folder."""

    def __init__(
        self,
        phase: Phase,
        number: int,
        built: BuiltModel,
        data: ImageDataModule,
        folder: Path,
        *,
        seed: int,
        title: str,
    ) -> None:
        self.phase, self.built, self.data, self.folder = phase, built, data, folder
        self.title = title
        # Epochs of different phases read different augmentations and orders.
        data.epoch_offset = number * 100_000
        self.module = ClassificationModule(
            built.model, built.stages, phase, len(data.table.classes), mix=data.mix, seed=seed
        )

    def run(
        self,
        trainer_args: Mapping[str, Any],
        callbacks: Mapping[str, Any],
        loggers: Sequence[Logger],
        log_rows: Callable[[list[dict[str, Any]], str], None],
        *,
        best_before: float,
    ) -> tuple[PhaseResult, list[dict[str, Any]], torch.device]:
        phase, stages = self.phase, self.built.stages
        rows = stage_rows(self.built.model, stages, phase)
        display.stage_table(self.title, rows)
        log_rows(rows, f"{self.folder.name}-before")
        before = stage_hashes(self.built.model, stages)
        history = History(phase)
        checkpoint = ModelCheckpoint(
            self.folder, "best", monitor=MONITOR, save_last=True, save_on_train_epoch_end=True
        )
        checkpoint._enable_version_counter = False
        trainer = make_trainer(
            trainer_args,
            phase,
            loggers=loggers,
            callbacks=[
                *callbacks_of(callbacks),
                *_own_callbacks(phase, history, loggers),
                checkpoint,
            ],
        )
        last = self.folder / "last.ckpt"
        quiet_fit(trainer, self.module, self.data, last if last.is_file() else None)
        best = self.folder / "best.ckpt"
        load_model(self.built.model, best)
        for row, moved in zip(
            rows, audit(before, stage_hashes(self.built.model, stages), phase, stages), strict=True
        ):
            row |= moved
        display.stage_table(f"{self.title}, after", rows)
        log_rows(rows, f"{self.folder.name}-after")
        result = self._result(history.rows, trainer, rows, best_before)
        return result, history.rows, trainer.strategy.root_device

    def _result(
        self,
        history: list[dict[str, Any]],
        trainer: pl.Trainer,
        rows: list[dict[str, Any]],
        best_before: float,
    ) -> PhaseResult:
        best = min(history, key=lambda row: float(row["val/loss"]))
        kept = best["val/loss"] <= best_before
        still = [r["stage"] for r in rows if r["trainable"] and r["weights"] == "still"]
        if still:
            display.say(f"{', '.join(still)} did not move: the best epoch came before they learned")
        if not kept:
            display.say(
                f"phase {self.phase.name} did not improve val/loss ({best['val/loss']:.4f} after "
                f"{best_before:.4f}): the weights of the phase before stay"
            )
        return PhaseResult(
            name=self.phase.name,
            epochs=len(history),
            best_epoch=int(best["epoch"]),
            best_loss=best["val/loss"],
            best_acc=best["val/acc"],
            kept=kept,
            steps=trainer.global_step,
            seconds=sum(row["seconds"] for row in history),
            trainable_parameters=sum(r["parameters"] for r in rows if r["trainable"]),
            checkpoint=f"{self.folder.name}/best.ckpt",
        )


def _own_callbacks(phase: Phase, history: History, loggers: Sequence[Logger]) -> list[Callback]:
    found: list[Callback] = [EpochBar(phase), history]
    if phase.patience:
        found.append(EarlyStopping(MONITOR, patience=phase.patience, check_on_train_epoch_end=True))
    if loggers:
        found.append(LearningRateMonitor("step"))
    return found
