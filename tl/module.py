"""The LightningModule of one phase: loss, metrics, optimizer and schedule."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torchmetrics import SumMetric

from tl.config import TlError
from tl.finetuning import Phase, freeze, parameter_groups, set_modes, state_names
from tl.graph import Split
from tl.heads import train_epoch
from tl.losses import Objective
from tl.models import Stage
from tl.scores import Scores

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class TrainingError(TlError):
    """Training cannot go on; says what happened and what to change."""


class TransferModule(pl.LightningModule):
    """Trains the stages of one phase of a plan by the loss of a task.

    A batch holds `label` as the table does, perhaps the `weight` (B,) of its images, and `image`
    (B, 3, H, W), or, where `split` is set, `values`: what the frozen part of the model says about
    its images. A head that is one linear layer then learns whole epochs in a
    single `training_step` (`tl.heads`).

    Args:
        model: Takes images (N, 3, H, W), gives outputs (N, C); shared by all phases of a plan.
        stages: Stages of the model, the head last.
        phase: What trains, and how.
        objective: Loss of the task.
        outputs: Of the head.
        mix: Mixup or cutmix of a batch: images (N, 3, H, W) and a table (N, D) with a row for each,
            both mixed in the same shares.
        seed: Makes dropout, stochastic depth and mixing of a step a function of the seed and the
            step alone, so that a resumed run repeats them.
    """

    def __init__(
        self,
        model: nn.Module,
        stages: Sequence[Stage],
        phase: Phase,
        objective: Objective,
        outputs: int,
        *,
        mix: Mix | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.stages = tuple(stages)
        self.phase = phase
        self.mix = mix
        self.seed = seed
        self.split: Split | None = None
        self.head_steps = self.batch_size = 0
        self.after_step: Callable[[], None] | None = None  # called where a batch is many steps
        self.cut_up: Callable[[TransferModule], None] | None = None  # shares the weights out
        self.before_val: Callable[[TransferModule], None] | None = None
        self._modes: list[tuple[nn.Module, bool]] = []
        self._unread: int | None = None  # images of val to come; None: all that come
        self.strict_loading = False  # checkpoints hold what trains, and nothing else
        self._finite: Tensor
        self.register_buffer("_finite", torch.tensor(True), persistent=False)
        self.objective = objective
        self.outputs = outputs
        self.scores = Scores(objective, outputs)
        # Sums: torchmetrics' mean forgets its weights where it lets NaN through.
        self.val_loss = SumMetric(nan_strategy="disable")
        self.val_images = SumMetric(nan_strategy="disable")
        freeze(model, self.stages, phase)

    def read_values(self, split: Split, *, head_steps: int = 0, batch_size: int = 0) -> None:
        """Train the part above the frontier on its cached values from now on.

        Args:
            split: Of this very model, with what trains in this phase.
            head_steps: Optimizer steps of the phase where the suffix is one linear layer and each
                batch holds the rows of many steps; 0: a batch is a step.
            batch_size: Rows of each of those steps.
        """
        self.split = split
        self.head_steps = head_steps
        self.batch_size = batch_size
        self.automatic_optimization = not head_steps

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Outputs (N, C) of a batch."""
        if "image" not in batch:
            assert self.split is not None
            if "rows" in batch:
                assert self.split.linear is not None
                found: Tensor = self.split.linear(batch["rows"])
                return found
            return self.split.run_suffix(self.model, batch["values"])
        images = batch["image"].contiguous(memory_format=torch.channels_last)
        outputs: Tensor = self.model(images)
        return outputs

    def configure_model(self) -> None:
        """Cut the model up where processes share it out, once."""
        if self.cut_up is not None:
            cut_up, self.cut_up = self.cut_up, None
            cut_up(self)

    def trained_state(self) -> dict[str, Tensor]:
        """What the phase changes, by its names in the model: weights, and buffers of its stages.

        What processes share out is whole here: all must ask for it.
        """
        names = state_names(self.model, self.stages, self.phase)
        return {n: _whole(v) for n, v in self.model.state_dict().items() if n in names}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only what trains: the rest is what the phase began with."""
        checkpoint["state_dict"] = {f"model.{k}": v for k, v in self.trained_state().items()}

    def on_train_start(self) -> None:
        """Set the modes; a resumed fit may skip the first `on_train_epoch_start`."""
        set_modes(self.model, freeze_batch_norm=self.phase.freeze_batch_norm)
        self._modes = [(module, module.training) for module in self.model.modules()]

    def on_train_epoch_start(self) -> None:
        """Set the modes again, whatever a callback did to them."""
        for module, training in self._modes:
            module.training = training

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed this step."""
        key = f"{self.seed} {self.phase.name} {self.current_epoch} {batch_idx}"
        if rank := self.global_rank:  # its images have dropout and mixing of their own
            key += f" {rank}"
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        seed = int.from_bytes(digest) >> 1
        if self.device.type == "cpu":
            torch.default_generator.manual_seed(seed)
        else:  # asks for each kind of device by name: a millisecond
            torch.manual_seed(seed)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Mean loss of a batch; the mean over the processes is that over all images of the step."""
        size = len(batch["label"])
        if not self.automatic_optimization:
            loss = self._train_head(batch)
        else:
            processes, own = self._processes, size
            if processes > 1:
                sampler = self.trainer.train_dataloader.sampler  # type: ignore[union-attr]
                own, size = sampler.share(batch_idx), sampler.whole(batch_idx)
            loss = self._loss(batch, own) * (processes * own / size)
        self._finite &= torch.isfinite(loss.detach())  # no synchronisation with a GPU here
        known: dict[str, Any] = {"batch_size": size, "sync_dist": True}
        self.log("train/loss_step", loss, on_step=True, on_epoch=False, **known)
        self.log("train/loss", loss, on_step=False, on_epoch=True, **known)
        return loss

    @property
    def _processes(self) -> int:
        return self.trainer.world_size if self._trainer else 1

    def _loss(self, batch: dict[str, Any], own: int) -> Tensor:
        """Mean loss of the first images of a batch; the rest stands in for images of others."""
        targets, weights = self.objective.encode(batch["label"][:own]), batch.get("weight")
        weights = None if weights is None else weights[:own]
        if self.mix is not None and own:
            images, targets, weights = self._mixed(batch["image"][:own], targets, weights)
            batch = {"image": torch.cat([images, batch["image"][own:]])}
        outputs = self(batch)
        loss: Tensor = outputs.sum() * 0.0  # of a process that takes part with nothing of its own
        if own:
            loss = self.objective(outputs[:own], targets, weights, self.phase.label_smoothing)
        return loss

    def _mixed(
        self, images: Tensor, targets: Tensor, weights: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Images, targets (N, C) and weights, mixed in the same shares."""
        assert self.mix is not None
        soft = self.objective.soft(targets, self.outputs)
        if weights is None:
            return (*self.mix(images, soft), None)
        images, table = self.mix(images, torch.cat([soft, weights[:, None]], dim=1))
        return images, table[:, :-1], table[:, -1]

    def _train_head(self, batch: dict[str, Any]) -> Tensor:
        """All steps of a batch of many rows; returns their mean loss."""
        assert self.split is not None
        assert self.split.linear is not None
        loop = self.trainer.fit_loop.epoch_loop
        steps = loop.manual_optimization.optim_step_progress

        def rate(step: int) -> float:
            return warmup_cosine_share(step, self.head_steps, self.phase.warmup)

        labels = batch["label"]
        with _single_thread():
            losses = train_epoch(
                self.split.linear,
                self.optimizers(use_pl_optimizer=False),  # type: ignore[arg-type]
                batch["rows"] if "rows" in batch else self.split.rows(batch["values"]),
                self.objective.encode(labels),
                order=batch.get("order"),
                batch_size=self.batch_size,
                objective=self.objective,
                weights=batch.get("weight"),
                rate=rate,
                first_step=steps.total.completed,
                label_smoothing=self.phase.label_smoothing,
                gradient_clip=self.phase.gradient_clip,
                after_step=self.after_step,
            )
        # As a scheduler leaves it: the rate of the next step.
        for group in self.optimizers(use_pl_optimizer=False).param_groups:  # type: ignore[union-attr]
            group["lr"] = group["initial_lr"] * rate(steps.total.completed + len(losses))
        # Lightning counts one step a batch; the axis of the logs and `global_step` count them all.
        for count in (steps.total, steps.current):
            count.ready += len(losses)
            count.completed += len(losses)
        loop._batches_that_stepped += len(losses) - 1
        sizes = [len(part) for part in torch.split(labels, self.batch_size)]
        return losses @ torch.tensor(sizes, dtype=losses.dtype, device=losses.device) / len(labels)

    def on_validation_epoch_start(self) -> None:
        """Count the images of this process that are no repeats."""
        if self.before_val is not None:
            self.before_val(self)
        sampler = getattr(self.trainer.val_dataloaders, "sampler", None)
        self._unread = getattr(sampler, "own", None)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Loss without label smoothing, and scores.

        Processes that share val read as many batches each, the last of them filled up with images
        that others have read: those are no part of any figure.
        """
        outputs, labels, weights = self(batch), batch["label"], batch.get("weight")
        size = len(outputs)
        if self._unread is not None:
            size = min(size, self._unread)
            self._unread -= size
        if 0 < size < len(outputs):
            outputs, labels = outputs[:size], labels[:size]
            weights = None if weights is None else weights[:size]
        loss = self.objective(outputs, self.objective.encode(labels), weights)
        if size:
            self.val_loss.update(loss * size)
            self.val_images.update(size)
            self.scores.update(outputs, labels)

    def on_validation_epoch_end(self) -> None:
        """Loss and scores of the task over all of val."""
        # Lightning's own mean over processes rounds the number of images of each down.
        self.log("val/loss", self.val_loss.compute() / self.val_images.compute())
        self.val_loss.reset()
        self.val_images.reset()
        for name, value in self.scores.compute().items():
            self.log(f"val/{name}", value)

    def on_train_epoch_end(self) -> None:
        """Stop where the loss is no number any more.

        Raises:
            TrainingError: Names the phase, the epoch and what to change.
        """
        val_loss = self.trainer.callback_metrics.get("val/loss")
        if bool(self._finite) and (val_loss is None or bool(torch.isfinite(val_loss))):
            return
        msg = (
            f"phase {self.phase.name}, epoch {self.current_epoch + 1}: the loss is not finite. "
            f"Lower finetune.head_lr (now {self.phase.head_lr:g}) or raise finetune.lr_ratio (now "
            f"{self.phase.lr_ratio:g}); with SGD, finetune.batch_norm=train may help, too. "
            "The checkpoints before this epoch are intact."
        )
        raise TrainingError(msg)

    def configure_optimizers(self) -> Any:
        """Optimizer with one rate a stage; linear warm-up, then a cosine to zero, step by step."""
        groups = parameter_groups(self.model, self.stages, self.phase)
        if self.phase.optimizer == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(
                groups, lr=self.phase.head_lr, momentum=0.9, nesterov=True
            )
        else:
            # Fused: one operator updates all parameters of a group; see `tl.heads`.
            fused = not self.automatic_optimization
            optimizer = torch.optim.AdamW(groups, lr=self.phase.head_lr, fused=fused or None)
        steps = self.head_steps or int(self.trainer.estimated_stepping_batches)
        schedule = warmup_cosine(optimizer, steps, self.phase.warmup)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def _whole(value: Any) -> Tensor:
    """A tensor, put together where each process has a part of it."""
    found: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return found


def warmup_cosine(optimizer: torch.optim.Optimizer, steps: int, warmup: float) -> LRScheduler:
    """Schedule of `warmup_cosine_share`: all groups keep their ratio."""
    return LambdaLR(optimizer, lambda step: warmup_cosine_share(step, steps, warmup))


def warmup_cosine_share(step: int, steps: int, warmup: float) -> float:
    """Share of the peak rate at a step of `steps`: `warmup` of them linear, then a cosine.

    Example:
        >>> [round(warmup_cosine_share(step, 5, 0.4), 2) for step in range(5)]
        [0.33, 0.67, 1.0, 0.75, 0.25]
    """
    first = round(steps * warmup)
    if step < first:
        return (step + 1) / (first + 1)
    return (1 + math.cos(math.pi * (step - first) / max(steps - first, 1))) / 2


@contextmanager
def _single_thread() -> Iterator[None]:
    """One thread: waking a second one takes longer than a step of a linear head."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
