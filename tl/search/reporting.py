"""Tells a study after each epoch how val is, and ends a trial that the pruner gives up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import optuna
import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from tl.finetuning import Plan

TARGET = "tl.search.reporting.current"  # how a job's config names the callback of its trial


class Reporter(Callback):
    """Reports val after each epoch; a step is an epoch of the whole plan.

    A phase that stops early leaves out steps: the same step is the same place of the plan in every
    trial.

    Args:
        trial: That is under way.
        plan: Its phases.
        metric: Key of Lightning's metrics, such as `val/acc`.
        highest: Whether more is better.
        prune: Whether the trial may be given up here.
    """

    def __init__(
        self, trial: optuna.Trial, plan: Plan, metric: str, *, highest: bool, prune: bool
    ) -> None:
        self.trial, self.metric, self.highest, self.prune = trial, metric, highest, prune
        self.before = {
            phase.name: sum(p.epochs for p in plan.phases[:i])
            for i, phase in enumerate(plan.phases)
        }
        self.best: float | None = None
        self.curve: dict[int, float] = {}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report the best value so far; what is best later on is what the phase keeps.

        Raises:
            optuna.TrialPruned: The pruner gives the trial up.
        """
        if self.metric not in trainer.callback_metrics:
            return
        module: Any = pl_module
        value = float(trainer.callback_metrics[self.metric])
        step = self.before[module.phase.name] + trainer.current_epoch + 1
        self.curve[step] = value
        if value == value and (self.best is None or (value > self.best) == self.highest):
            self.best = value
        if not self.prune or self.best is None:
            return
        self.trial.report(self.best, step)
        if self.trial.should_prune():
            raise optuna.TrialPruned


_current: ContextVar[Reporter | None] = ContextVar("reporter of the trial under way", default=None)


def current() -> Reporter:
    """The callback of the trial that is under way."""
    found = _current.get()
    assert found is not None, "no trial is under way"
    return found


@contextmanager
def reporting(reporter: Reporter) -> Iterator[dict[str, Any]]:
    """The node of a config's `callbacks` that puts a reporter into a fit."""
    token = _current.set(reporter)
    try:
        yield {"_target_": TARGET}
    finally:
        _current.reset(token)
