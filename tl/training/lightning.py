"""What tl adds to Lightning: a guarded constructor, a history of epochs, atomic checkpoints."""

from __future__ import annotations

import difflib
import inspect
import logging
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.utils import get_object, instantiate
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.loggers import Logger
from pytorch_lightning.trainer.connectors.signal_connector import _SignalConnector

from tl import display, ranks, stopping
from tl.config import TRUSTED_TARGETS, ConfigError, Select
from tl.data.loading import ImageLoader
from tl.files import replacing
from tl.finetuning import Phase
from tl.module import TrainingError, TransferModule
from tl.training.averaging import MovingAverage
from tl.training.processes import for_processes
from tl.training.state import read_checkpoint
from tl.training.together import together


def build(node: Mapping[str, Any], key: str) -> Any:
    """Construct a third-party object of the config; the only place that does.

    Raises:
        ConfigError: `_target_` is not Lightning's or ours, or refuses its arguments.
    """
    target = str(node.get("_target_", ""))
    if not target.startswith(TRUSTED_TARGETS):
        trusted = " or ".join(f"{t}*" for t in TRUSTED_TARGETS)
        msg = f"{key}._target_ must name {trusted}, got {target}"
        raise ConfigError(msg)
    try:
        with warnings.catch_warnings():  # hints about what tl sets itself
            warnings.simplefilter("ignore")
            return instantiate(dict(node), _convert_="all")
    except Exception as error:
        text = str(error.__cause__ or error)
        if text.startswith("Error loading"):
            msg = f"{key}._target_: there is no {target}"
            raise ConfigError(msg) from error
        reason = text.split("\n")[0] + _nearest_argument(text, target)
        msg = f"{key}: {target} refuses its arguments: {reason}"
        raise ConfigError(msg) from error


def _nearest_argument(text: str, target: str) -> str:
    unknown = re.search(r"unexpected keyword argument '(\w+)'", text)
    names = inspect.signature(get_object(target)).parameters if unknown else {}
    near = difflib.get_close_matches(unknown[1], list(names), n=1) if unknown else []
    return f"; did you mean {near[0]}?" if near else ""


def prepare(
    trainer: Mapping[str, Any],
    seed: int,
    callbacks: Mapping[str, Any] | None = None,
    logger: Mapping[str, Any] | None = None,
) -> None:
    """Seed everything, and have Lightning check its arguments before anything is written.

    Raises:
        ConfigError: Lightning refuses an argument of `trainer`, `callbacks` or `logger`.
    """
    callbacks_of(callbacks or {})
    loggers(logger or {}, Path())
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    build({**for_processes(trainer), "logger": False, "enable_progress_bar": False}, "trainer")
    pl.seed_everything(seed, workers=True, verbose=False)
    # Comes with `deterministic: warn` and costs a tenth of a step; nothing here reads such memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def callbacks_of(nodes: Mapping[str, Any]) -> list[Callback]:
    """Further callbacks of the config."""
    return [build(node, f"callbacks.{name}") for name, node in nodes.items() if node]


def loggers(nodes: Mapping[str, Any], folder: Path, step: int = 0) -> list[Logger]:
    """Further loggers of the config, for a phase that begins at an optimizer step.

    Each writes into the run's folder, and into a place of its own for each phase: Lightning's CSV
    logger empties the one that it finds.
    """
    place = {"save_dir": str(folder), "version": f"from_step_{step}"}
    return [build({**place, **node}, f"logger.{name}") for name, node in nodes.items() if node]


def make_trainer(
    args: Mapping[str, Any],
    phase: Phase,
    *,
    loggers: Sequence[Logger] = (),
    callbacks: Sequence[Callback] = (),
) -> pl.Trainer:
    """Trainer of one phase from the config's arguments and the phase's own.

    Raises:
        ConfigError: Lightning refuses an argument (a GPU where there is none, an unknown name).
    """
    args = for_processes(args)
    plugins = args.get("plugins") or []
    own = {
        "max_epochs": phase.epochs,
        "accumulate_grad_batches": phase.accumulate,
        "gradient_clip_val": phase.gradient_clip or None,
        "precision": phase.precision,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "logger": list(loggers) or False,
        "callbacks": list(callbacks),
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "plugins": [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()],
    }
    trainer = build({**args, **own}, "trainer")
    assert isinstance(trainer, pl.Trainer)
    trainer._signal_connector = _Signals(trainer)
    return trainer


class _Signals(_SignalConnector):
    """Leaves SIGTERM to `tl.stopping`.

    Lightning's own handler ends the fit without a checkpoint, and talks to other processes wherever
    this one stands.
    """

    def _sigterm_notifier_fn(self, signum: Any, _: Any) -> None:
        pass


def quiet_fit(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    data: pl.LightningDataModule,
    resume: Path | None,
) -> None:
    """Fit, from a checkpoint where one is given, without hints about what tl sets itself."""
    with warnings.catch_warnings():
        # Hints about workers and logging intervals.
        warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric")
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
        warnings.filterwarnings("ignore", message=".*epoch parameter in `scheduler.step.*")
        with stopping.after_step():
            trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)


class History(Callback):
    """Keeps one row an epoch, prints it, and survives a resume in the checkpoint."""

    def __init__(self, phase: Phase) -> None:
        self.phase = phase
        self.rows: list[dict[str, Any]] = []
        self._start = self._before = 0.0
        self._validated = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock, or let it go on."""
        self._start = time.perf_counter() - self._before

    def on_validation_end(self, *_: Any) -> None:
        """Lightning keeps the figures of an earlier epoch where this one was not validated."""
        self._validated = True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the row of this epoch; runs before the checkpoint is written."""
        assert isinstance(pl_module, TransferModule)
        metrics = {
            k: float(v)
            for k, v in trainer.callback_metrics.items()
            if self._validated or not k.startswith("val/")
        }
        self._validated = False
        now = time.perf_counter()
        rates = {
            f"lr/{group['name']}": group["lr"]
            for group in trainer.optimizers[0].param_groups
            if not group["name"].endswith("/no_decay")
        }
        losses = [row["val/loss"] for row in self.rows]
        best = min((loss for loss in losses if not math.isnan(loss)), default=float("inf"))
        scores = [f"val/{name}" for name in pl_module.scores.names]
        row = {
            "phase": self.phase.name,
            "epoch": trainer.current_epoch + 1,
            "seconds": now - self._start,
            **{k: metrics.get(k, float("nan")) for k in ("train/loss", "val/loss", *scores)},
            **rates,
        }
        self._start = now
        self.rows.append(row)
        chosen = self.phase.select == Select.best.value
        mark = "  best so far" if chosen and row["val/loss"] < best else ""
        display.say(
            f"{row['phase']} {row['epoch']:>3}/{self.phase.epochs}  "
            f"train loss {row['train/loss']:.4f}  val loss {row['val/loss']:.4f}  "
            f"{scores[0].replace('/', ' ')} {row[scores[0]]:.4f}  {row['seconds']:.1f} s{mark}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Rows so far, and seconds of the running epoch."""
        return {"rows": self.rows, "seconds": time.perf_counter() - self._start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Rows of the interrupted run."""
        self.rows = list(state_dict["rows"])
        self._before = float(state_dict.get("seconds", 0.0))


class Checkpoints(Callback):
    """Keeps the best weights in memory, or the last ones, and the state of the fit on disk.

    `last.ckpt` holds all that a resumed fit needs, the best weights so far among it. It is written
    after an epoch unless that would take more than a share of the time: what a crash may cost is
    then bounded by time, and an epoch of a millisecond does not write a file.

    Args:
        folder: Of the phase.
        select: `best`: weights of the epoch of the least val/loss; `last`: of the last one.
        average: Where a moving average is kept instead of the weights.
    """

    SHARE = 0.01

    def __init__(
        self,
        folder: Path,
        select: str = Select.best.value,
        average: MovingAverage | None = None,
    ) -> None:
        self.folder, self.select, self.average = folder, select, average
        self.best: dict[str, torch.Tensor] = {}
        self.best_loss = float("inf")
        self._stopped = False
        self._written = self._seconds = 0.0

    @property
    def last(self) -> Path:
        """State of the fit."""
        return self.folder / "last.ckpt"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A fit that had stopped early before it was interrupted does not go on."""
        if self._stopped:
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the weights of the epoch if it is their turn, and write the state if it is time."""
        assert isinstance(pl_module, TransferModule)
        # None before the first validation, where the user wants one every few epochs only.
        found = trainer.callback_metrics.get("val/loss")
        loss = float("inf") if found is None else float(found)
        sound = found is None or math.isfinite(loss)
        if loss < self.best_loss or (self.select == Select.last.value and sound):
            self.best_loss = loss
            state = (self.average or pl_module).trained_state()
            self.best = {name: value.detach().cpu().clone() for name, value in state.items()}
        self._stopped = trainer.should_stop
        due, stops, _ = together(trainer, self.affordable(), stopping.requested())
        if due or stops:
            self.save(trainer, stops=bool(stops))

    def save(self, trainer: pl.Trainer, *, stops: bool = False) -> None:
        """Write the state of the fit, and end the job where that was asked.

        Raises:
            Interrupted: `stops`.
        """
        stopping.in_time()
        began = time.perf_counter()
        trainer.save_checkpoint(self.last)
        self._written = time.perf_counter()
        self._seconds = self._written - began
        if stops:
            epoch, step = trainer.current_epoch + 1, trainer.global_step
            display.say(f"checkpoint saved at epoch {epoch}, step {step:,}")
            stopping.stop()

    def age(self, since: float) -> float:
        """Seconds since the state was written, or since the fit began."""
        return time.perf_counter() - max(self._written, since)

    def affordable(self) -> bool:
        """Whether writing the state now stays within its share of the time."""
        return (time.perf_counter() - self._written) * self.SHARE >= self._seconds

    def write(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Write the weights that the finished phase leaves behind, in the first process."""
        if ranks.rank():
            return
        state = {f"model.{name}": value for name, value in weights.items()}
        AtomicCheckpointIO().save_checkpoint({"state_dict": state}, self.folder / "best.ckpt")

    def state_dict(self) -> dict[str, Any]:
        """What a resumed fit needs to know."""
        return {"best": self.best, "best_loss": self.best_loss, "stopped": self._stopped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What the interrupted fit knew."""
        self.best = dict(state_dict["best"])
        self.best_loss = float(state_dict["best_loss"])
        self._stopped = bool(state_dict["stopped"])


class EpochBar(Callback):
    """Progress within an epoch, its training and its validation batches together.

    Lightning's own bars write past the console that prints the lines of the epochs.
    """

    def __init__(self, phase: Phase) -> None:
        self.phase = phase
        self._open = ExitStack()
        self._update: Callable[[int, int], None] | None = None
        self._done = 0
        self._said = ""

    def _advance(self, trainer: pl.Trainer) -> None:
        if self._update is None:
            title = f"{self.phase.name} {trainer.current_epoch + 1:>3}/{self.phase.epochs}"
            self._update = self._open.enter_context(display.bar(title, unit="batches"))
            self._done = 0
        self._done += 1
        total = trainer.num_training_batches + sum(trainer.num_val_batches)
        self._update(self._done, int(total))

    def _close(self) -> None:
        self._open.close()
        self._update = None

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        """Count a batch."""
        self._advance(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        """Count a batch."""
        self._advance(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make room for the line of the epoch; say once what the epochs wait for."""
        self._close()
        loader = trainer.train_dataloader
        if isinstance(loader, ImageLoader) and loader.meter and not self._said:
            self._said = loader.meter.bottleneck()
            if self._said:
                display.say(self._said)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Leave the terminal as it was."""
        self._close()


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there: the last good one survives."""

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            TrainingError: The file is damaged.
        """
        return read_checkpoint(Path(path))

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint.

        Raises:
            TrainingError: The disk is full or not writable; what was there before is intact.
        """
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as part, part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except (
            OSError,
            RuntimeError,
        ) as error:  # torch's writer turns a full disk into RuntimeError
            # torch's writer hides why the file underneath did not take its bytes.
            reason = error.__context__ if isinstance(error.__context__, OSError) else error
            state = (
                "the last good one is still there" if path.exists() else "there is none before it"
            )
            msg = (
                f"cannot write the checkpoint {path} ({str(reason).splitlines()[0]}); {state}. "
                "Free some space, then continue with resume=<the run's folder>."
            )
            raise TrainingError(msg) from error
