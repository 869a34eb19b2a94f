"""The state of a fit is written within long epochs, too, so that a crash costs minutes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from tl import display, stopping
from tl.data.loading import ImageLoader
from tl.training.together import together

if TYPE_CHECKING:
    from tl.training.lightning import Checkpoints

MEAN = "training_step.train/loss"  # where Lightning sums the loss of an epoch
# Between two questions to the other processes whether it is time, or one of them must stop.
ASK_SECONDS, ASK_EVERY = 1.0, 50


class WithinEpochs(Callback):
    """Writes `last.ckpt` in the middle of an epoch when the last one is old.

    A fit that must stop writes it after the step that runs. Both only where the images themselves
    are read, by a loader that can go on in the middle of an epoch: a pass over cached values is
    short. What Lightning leaves out of a checkpoint, the mean loss of the epoch so far, is kept
    here, so that a resumed fit ends with the same figures.

    Args:
        checkpoints: Writes the state after the epochs.
        minutes: Between two states; 0: after epochs only. A state is not written more often than
            its share of the time allows, either.
    """

    def __init__(self, checkpoints: Checkpoints, minutes: float) -> None:
        self.checkpoints, self.minutes = checkpoints, minutes
        self._began = self._asked = 0.0
        self._every = 1  # steps
        self._state: dict[str, Any] = {}
        self._restore: dict[str, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock; go on in the epoch that was interrupted, and say where."""
        self._began = self._asked = time.perf_counter()
        if self._restore:
            # Lightning hands on the states of loaders too early: asked for the number of steps, it
            # makes them before it reads the checkpoint.
            assert isinstance(trainer.train_dataloader, ImageLoader)
            trainer.train_dataloader.load_state_dict(self._restore["loader"])
            done = self._restore["loader"]["batches"]
            display.say(
                f"going on in epoch {trainer.current_epoch + 1}, after {done:,} of "
                f"{trainer.num_training_batches:,} batches"
            )

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Write the state if it is time, and if the fit can go on from here."""
        if self._restore:
            mean = trainer.fit_loop.epoch_loop._results[MEAN]
            mean.value += self._restore["sum"]
            mean.cumulated_batch_size += self._restore["images"]
            self._restore = {}
        if not isinstance(trainer.train_dataloader, ImageLoader):
            return
        steps = trainer.accumulate_grad_batches
        last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if last or (batch_idx + 1) % steps:
            return
        due, stops = self._due(trainer, (batch_idx + 1) // steps)
        if not due and not stops:
            return
        found = trainer.fit_loop.epoch_loop._results[MEAN]
        self._state = {
            "sum": float(found.value),
            "images": int(found.cumulated_batch_size),
            "loader": trainer.train_dataloader.state_dict(),
        }
        self.checkpoints.save(trainer, stops=stops)
        self._state = {}

    def _due(self, trainer: pl.Trainer, step: int) -> tuple[bool, bool]:
        """Whether it is time, and whether the job must stop; all processes say the same."""
        if trainer.world_size > 1 and step % self._every:
            return False, False
        age = self.checkpoints.age(since=self._began)
        due = bool(self.minutes) and age >= 60 * self.minutes and self.checkpoints.affordable()
        now = time.perf_counter()
        seconds, self._asked = (now - self._asked) / self._every, now
        due, stops, seconds = together(trainer, due, stopping.requested(), seconds)
        self._every = min(max(int(ASK_SECONDS / max(seconds, 1e-9)), 1), ASK_EVERY)
        return due, stops

    def state_dict(self) -> dict[str, Any]:
        """Sum of the losses of the running epoch, images, and batches; empty between epochs."""
        return self._state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What the interrupted fit had summed and read."""
        self._restore = dict(state_dict)
