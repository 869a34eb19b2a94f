"""The LightningModule of one phase: loss, metrics, optimizer and schedule."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from tl.config import TlError
from tl.finetuning import Phase, freeze, parameter_groups, set_modes
from tl.models import Stage

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class TrainingError(TlError):
    """Training cannot go on; says what happened and what to change."""


class ClassificationModule(pl.LightningModule):
    """Trains the stages of one phase of a plan by cross-entropy.

    Args:
        model: Takes images (N, 3, H, W), gives logits (N, classes); shared by all phases of a plan.
        stages: Stages of the model, the head last.
        phase: What trains, and how.
        num_classes: Outputs of the head.
        mix: Mixup or cutmix of a batch: images (N, 3, H, W) and labels (N,) to images and
            soft labels (N, classes).
        seed: Makes dropout, stochastic depth and mixing of a step a function of the seed and the
            step alone, so that a resumed run repeats them.
    """

    def __init__(
        self,
        model: nn.Module,
        stages: Sequence[Stage],
        phase: Phase,
        num_classes: int,
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
        self._finite: Tensor
        self.register_buffer("_finite", torch.tensor(True), persistent=False)
        self.val_metrics = MetricCollection(
            {
                "acc": MulticlassAccuracy(num_classes, average="micro"),
                "f1_macro": MulticlassF1Score(num_classes, average="macro"),
            },
            prefix="val/",
        )
        freeze(model, self.stages, phase)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, 3, H, W)."""
        logits: Tensor = self.model(images.contiguous(memory_format=torch.channels_last))
        return logits

    def on_train_start(self) -> None:
        """Set the modes; a resumed fit may skip the first `on_train_epoch_start`."""
        set_modes(self.model, freeze_batch_norm=self.phase.freeze_batch_norm)

    def on_train_epoch_start(self) -> None:
        """Set the modes again, whatever a callback did to them."""
        set_modes(self.model, freeze_batch_norm=self.phase.freeze_batch_norm)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed this step."""
        key = f"{self.seed} {self.phase.name} {self.current_epoch} {batch_idx}".encode()
        torch.manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) >> 1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean cross-entropy of a batch."""
        images, target = batch["image"], batch["label"]
        if self.mix is not None:
            images, target = self.mix(images, target)
        loss = F.cross_entropy(self(images), target, label_smoothing=self.phase.label_smoothing)
        self._finite &= torch.isfinite(loss.detach())  # no synchronisation with a GPU here
        size = len(images)
        self.log("train/loss_step", loss, on_step=True, on_epoch=False, batch_size=size)
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=size, sync_dist=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Loss without label smoothing, accuracy and macro F1."""
        logits = self(batch["image"])
        size = len(logits)
        loss = F.cross_entropy(logits, batch["label"])
        self.log("val/loss", loss, on_epoch=True, batch_size=size, sync_dist=True)
        self.val_metrics.update(logits, batch["label"])
        self.log_dict(dict(self.val_metrics.items()), on_epoch=True, batch_size=size)

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
            optimizer = torch.optim.AdamW(groups, lr=self.phase.head_lr)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = warmup_cosine(optimizer, steps, self.phase.warmup)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def warmup_cosine(optimizer: torch.optim.Optimizer, steps: int, warmup: float) -> LRScheduler:
    """Schedule over `steps` optimizer steps: the first `warmup` share linear, the rest a cosine.

    All groups keep their ratio, since each starts from its own rate.
    """
    first = round(steps * warmup)
    cosine = CosineAnnealingLR(optimizer, T_max=max(steps - first, 1))
    if first == 0:
        return cosine
    linear = LinearLR(optimizer, start_factor=1 / (first + 1), total_iters=first)
    return SequentialLR(optimizer, [linear, cosine], milestones=[first])
