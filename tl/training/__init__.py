"""Run a plan: each phase is one `Trainer.fit`, the next starts from the best weights so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    Callback,
    EarlyStopping,
    LearningRateMonitor,
)
from pytorch_lightning.loggers import Logger

from tl import display, ranks
from tl.config import ActivationsConfig, Imbalance, Select
from tl.data.datamodule import ImageDataModule
from tl.finetuning import Phase, Plan, audit, check_norms, stage_hashes, stage_rows, state_names
from tl.graph.stage_head import with_head
from tl.losses import Objective
from tl.models import BuiltModel, StageClassifier
from tl.module import TrainingError, TransferModule
from tl.training.activations import Activations, Prepared
from tl.training.adapters import adapter_facts, add_adapters, attention_layers, merge_adapters
from tl.training.averaging import Mixture, MovingAverage, choose_mixture
from tl.training.cached import CachedDataModule
from tl.training.evidence import gather_evidence
from tl.training.judging import Predictor, judge
from tl.training.lightning import (
    AtomicCheckpointIO,
    Checkpoints,
    EpochBar,
    History,
    callbacks_of,
    loggers,
    make_trainer,
    prepare,
    quiet_fit,
)
from tl.training.objectives import loss_facts, objective_for
from tl.training.selection import select_features
from tl.training.sharding import is_sharded, prepare_shards
from tl.training.speed import estimate
from tl.training.state import (
    PhaseResult,
    load_kept,
    read_decision,
    read_progress,
    save_weights,
    write_decision,
    write_progress,
)
from tl.training.within import WithinEpochs

__all__ = [
    "AtomicCheckpointIO",
    "FitResult",
    "PhaseResult",
    "TrainingError",
    "estimate",
    "gather_evidence",
    "judge",
    "loggers",
    "make_trainer",
    "prepare",
    "run_plan",
    "with_head",
]

MONITOR = "val/loss"


@dataclass(frozen=True)
class FitResult:
    """Outcome of a plan; the model holds the best weights.

    Args:
        phases: One result a phase.
        history: One row an epoch: phase, epoch (from 1), seconds, train/loss, val/loss, the scores
            of the task (val/acc, val/f1_macro; val/map; val/mae, val/r2) and `lr/<stage>`.
        predict: What the trained model says of a split of the data.
    """

    phases: tuple[PhaseResult, ...]
    history: pd.DataFrame
    predict: Predictor

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
    log_facts: Callable[[dict[str, Any], str], None] = lambda _facts, _name: None,
    cache: ActivationsConfig | None = None,
    imbalance: Imbalance = Imbalance.auto,
    seed: int = 0,
    checkpoint_minutes: float = 5.0,
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
        log_facts: Receives what a phase should leave in the records (values, name).
        cache: When the frozen part of a phase is computed once per image; default: its defaults.
        imbalance: What to do about classes of different sizes.
        seed: Seed of the run.
        checkpoint_minutes: How old the state of the fit may be within an epoch; 0: any age.

    Raises:
        ConfigError: The task has no classes to balance, Lightning refuses `trainer` or `callbacks`,
            or the model lacks the layers that a phase would train.
        TrainingError: The loss is not finite, or a checkpoint cannot be written.
        FreezeError: Something frozen moved.
    """
    objective = objective_for(data.table, imbalance)
    data.draws = objective.balance.draws
    for phase in plan.phases:
        check_norms(built.model, built.stages, phase)
    adapted = {phase.name: attention_layers(built, phase) for phase in plan.phases}
    folder.mkdir(parents=True, exist_ok=True)
    done, rows = ranks.on_first(read_progress)(folder)
    load_kept(built.model, folder, done)
    facts = loss_facts(objective, data.table)
    display.facts("loss", facts)
    log_facts(facts, "loss")
    activations = Activations(cache or ActivationsConfig(), built, data)
    predictor = Predictor(built.model, data, objective, torch.device("cpu"), activations)
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
            objective,
            activations,
            folder / f"{number + 1}-{phase.name}",
            adapted=adapted[phase.name],
            seed=seed,
            title=f"phase {number + 1} of {len(plan.phases)}: {phase.name}",
            checkpoint_minutes=checkpoint_minutes,
        )
        steps = sum(result.steps for result in done)
        begin = {"number": number + 1, "phase": phase.name, "first_step": steps}
        log_facts(begin, f"{number + 1}-{phase.name}")
        best_before = next((r.best_loss for r in reversed(done) if r.kept), float("inf"))
        try:
            result, history = fit.run(
                trainer, callbacks or {}, loggers_from(steps), log_facts, best_before=best_before
            )
        except BaseException:
            activations.close()
            raise
        done.append(result)
        rows += history
        ranks.on_first(write_progress)(folder, done, rows)
        if result.kept:
            predictor = Predictor(built.model, data, objective, fit.device, activations, fit.cached)
    built.model.eval()
    ranks.on_first(save_weights)(built.model, folder)
    return FitResult(tuple(done), pd.DataFrame(rows), predictor)


class _Fit:
    """One phase: its module, its callbacks, its folder."""

    def __init__(
        self,
        phase: Phase,
        number: int,
        built: BuiltModel,
        objective: Objective,
        activations: Activations,
        folder: Path,
        *,
        adapted: Sequence[str],
        seed: int,
        title: str,
        checkpoint_minutes: float,
    ) -> None:
        self.checkpoint_minutes = checkpoint_minutes
        self.phase, self.built, self.folder, self.title = phase, built, folder, title
        self.activations, self.data = activations, activations.data
        # Epochs of different phases read different augmentations and orders.
        self.data.epoch_offset = number * 100_000
        names = state_names(built.model, built.stages, phase) | {f"{n}.weight" for n in adapted}
        state = built.model.state_dict()
        self.start = {n: value.clone() for n, value in state.items() if n in names}
        self.adapted, self.stages = adapted, built.stages
        if adapted:
            self.stages = add_adapters(built, phase, adapted, seed=seed)
        self.module = TransferModule(
            built.model,
            self.stages,
            phase,
            objective,
            len(self.data.table.classes),
            mix=self.data.mix,
            seed=seed,
        )
        self.device = torch.device("cpu")
        self.cached: CachedDataModule | None = None

    def run(
        self,
        trainer_args: Mapping[str, Any],
        callbacks: Mapping[str, Any],
        loggers: Sequence[Logger],
        log_facts: Callable[[dict[str, Any], str], None],
        *,
        best_before: float,
    ) -> tuple[PhaseResult, list[dict[str, Any]]]:
        """Train; the model then holds the weights that the phase should leave behind."""
        model, phase, stages, start = self.built.model, self.phase, self.stages, self.start
        name = self.folder.name
        rows = stage_rows(model, stages, phase)
        display.stage_table(self.title, rows)
        log_facts({"stages": rows}, f"{name}-before")
        if self.adapted:
            display.facts("low-rank adapters", adapter_facts(phase, self.adapted))
        before = stage_hashes(model, stages, phase)
        average = MovingAverage() if phase.ema else None
        history = History(phase)
        checkpoints = Checkpoints(self.folder, phase.select, average)
        trainer = make_trainer(
            trainer_args,
            phase,
            loggers=loggers,
            callbacks=[
                *callbacks_of(callbacks),
                *_own_callbacks(phase, history, loggers, trainer_args),
                *([average] if average else []),
                checkpoints,
                WithinEpochs(checkpoints, self.checkpoint_minutes),
            ],
        )
        self.device = trainer.strategy.root_device
        if is_sharded(trainer):
            prepare_shards(self.module)
        prepared = self._prepare(trainer)
        display.facts(prepared.title, prepared.facts)
        log_facts({prepared.title: prepared.facts}, f"{name}-cache")
        if isinstance(model, StageClassifier):
            found = select_features(model, self.data, self.cached, self.device, self.folder.parent)
            display.facts("features that the head reads", found.facts())
            log_facts({"features": found.facts()}, f"{name}-features")
        resume = checkpoints.last if ranks.agree(checkpoints.last.is_file()) else None
        quiet_fit(trainer, self.module, self.cached or self.data, resume)
        model.load_state_dict(ranks.agree(checkpoints.best), strict=False)
        moved = audit(before, stage_hashes(model, stages, phase), phase, stages)
        for row, facts in zip(rows, moved, strict=True):
            row |= facts
        display.stage_table(f"{self.title}, after", rows)
        log_facts({"stages": rows}, f"{name}-after")
        if self.adapted:
            merge_adapters(model)
        mixture = self._mix(log_facts) if phase.average else None
        checkpoints.write({k: v for k, v in model.state_dict().items() if k in start})
        result = self._result(history.rows, trainer, rows, prepared, best_before, mixture)
        if not result.kept:
            model.load_state_dict(start, strict=False)
        return result, history.rows

    def _mix(self, log_facts: Callable[[dict[str, Any], str], None]) -> Mixture:
        """Mix the weights before the phase and after it; the model holds the mixture."""
        model, start = self.built.model, self.start
        end = {k: v.clone() for k, v in model.state_dict().items() if k in start}
        objective = self.module.objective
        val = Predictor(model, self.data, objective, self.device, self.activations, self.cached)
        mixture = choose_mixture(model, self.phase, start, end, lambda: val.loss("val"))
        display.facts("weights before and after the phase mixed", mixture.facts())
        log_facts(asdict(mixture), f"{self.folder.name}-average")
        return mixture

    def _prepare(self, trainer: pl.Trainer) -> Prepared:
        """Decide what the phase reads, or do as before an interruption."""
        decided = ranks.on_first(read_decision)(self.folder)
        prepared = self.activations.prepare(self.phase, self.device, as_before=decided)
        ranks.on_first(write_decision)(self.folder, cached=prepared.data is not None)
        self.cached = prepared.data
        if self.cached is not None:
            if is_sharded(trainer):
                self.cached.one_step_a_batch()
            steps = self.cached.steps_per_epoch * self.phase.epochs
            reading = self.cached.reading
            self.module.read_values(reading.split, head_steps=steps, batch_size=reading.step_rows)
            if steps:  # Lightning clips and accumulates only what it steps itself
                trainer.gradient_clip_val, trainer.accumulate_grad_batches = None, 1
        return prepared

    def _result(
        self,
        history: list[dict[str, Any]],
        trainer: pl.Trainer,
        rows: list[dict[str, Any]],
        prepared: Prepared,
        best_before: float,
        mixture: Mixture | None,
    ) -> PhaseResult:
        last = self.phase.select == Select.last.value
        # Not each epoch is validated where the user wants it every few epochs only.
        validated = [row for row in history if not math.isnan(row["val/loss"])] or history[-1:]
        best = validated[-1] if last else min(validated, key=lambda row: float(row["val/loss"]))
        loss, score = best["val/loss"], best[f"val/{self.module.scores.names[0]}"]
        if mixture:
            loss, score = mixture.loss, mixture.score
        kept = last or (mixture.alpha > 0 if mixture else loss <= best_before)
        still = [r["stage"] for r in rows if r["trainable"] and r["weights"] == "still"]
        if still:
            display.say(f"{', '.join(still)} did not move: the best epoch came before they learned")
        if not kept:
            display.say(
                f"phase {self.phase.name} did not improve val/loss ({best['val/loss']:.4f} after "
                f"{mixture.loss if mixture else best_before:.4f}): the weights of the phase before "
                "stay"
            )
        return PhaseResult(
            name=self.phase.name,
            epochs=len(history),
            best_epoch=int((history[-1] if last else best)["epoch"]),
            best_loss=loss,
            best_score=score,
            kept=kept,
            steps=trainer.global_step,
            seconds=sum(row["seconds"] for row in history),
            trainable_parameters=sum(r["trainable"] for r in rows),
            checkpoint=f"{self.folder.name}/best.ckpt",
            cached=prepared.data is not None,
            alpha=mixture.alpha if mixture else 1.0,
        )


def _own_callbacks(
    phase: Phase, history: History, loggers: Sequence[Logger], trainer_args: Mapping[str, Any]
) -> list[Callback]:
    found: list[Callback] = [EpochBar(phase), history]
    if phase.patience:
        # An epoch that is not validated has nothing to say.
        each = trainer_args.get("check_val_every_n_epoch", 1) == 1
        found.append(EarlyStopping(MONITOR, patience=phase.patience, check_on_train_epoch_end=each))
    if loggers:
        found.append(LearningRateMonitor("step"))
    return found
