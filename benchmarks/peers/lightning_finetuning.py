"""Lightning with `BackboneFinetuning`, as its documentation shows it."""

from __future__ import annotations

import time

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BackboneFinetuning
from shared import arguments, image_folders, loader, report, timm_model
from torch import Tensor, nn
from torch.nn import functional as F


class Transfer(pl.LightningModule):
    """A backbone that the callback freezes, and a head."""

    def __init__(self, backbone: nn.Module, features: int, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(features, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes)."""
        return self.head(self.backbone(images))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy."""
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Accuracy."""
        images, labels = batch
        hits = (self(images).argmax(1) == labels).float().mean()
        self.log("val_acc", hits, batch_size=len(labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam on the head; the callback adds the backbone when it unfreezes it."""
        return torch.optim.Adam(self.head.parameters(), lr=1e-3)


def main() -> None:
    """Train the head for `--frozen` epochs, and everything for `--unfrozen` more."""
    args = arguments(__doc__, frozen=5, unfrozen=0)
    pl.seed_everything(args.seed)
    backbone = timm_model(args, 0)
    train, val = image_folders(args, backbone, flip=True)
    width = int(backbone.head_hidden_size or backbone.num_features)
    model = Transfer(backbone, width, len(train.classes))
    trainer = pl.Trainer(
        max_epochs=args.frozen + args.unfrozen,
        callbacks=[BackboneFinetuning(unfreeze_backbone_at_epoch=args.frozen)],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
    )
    began = time.perf_counter()
    trainer.fit(model, loader(train, shuffle=True), loader(val, shuffle=False))
    seconds = {"fit": time.perf_counter() - began}
    accuracy = float(trainer.callback_metrics["val_acc"])
    report("Lightning BackboneFinetuning", len(train) + len(val), seconds, accuracy)


if __name__ == "__main__":
    main()
