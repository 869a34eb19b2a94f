"""Let a trained model predict the images of a data module, and judge what it says."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from lightning_fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tl import display
from tl.cache import CacheError
from tl.data.datamodule import ImageDataModule
from tl.evaluation import Report, evaluate, predictions_table
from tl.training.activations import Activations
from tl.training.cached import CachedDataModule


@dataclass(frozen=True)
class Predictor:
    """Probabilities and labels of a split: of images, or of what the cache holds of them.

    Args:
        model: Images (N, 3, H, W) to logits (N, classes).
        data: Its splits are read without augmentation.
        device: Where to compute.
        activations: Fills the cache.
        cached: Of the last phase that changed the model, where that phase read the cache.
    """

    model: nn.Module
    data: ImageDataModule
    device: torch.device
    activations: Activations | None = None
    cached: CachedDataModule | None = None

    def __call__(self, split: str) -> tuple[Tensor, Tensor]:
        """Probabilities (N, classes) and labels (N,) of `train`, `val` or `test`, in its order."""
        logits, labels = self.logits(split)
        return logits.softmax(dim=1), labels

    def loss(self, split: str) -> tuple[float, float]:
        """Mean cross-entropy and accuracy, as `val/loss` and `val/acc` of a fit."""
        logits, labels = self.logits(split)
        right = (logits.argmax(dim=1) == labels).float().mean()
        return float(F.cross_entropy(logits, labels)), float(right)

    def logits(self, split: str) -> tuple[Tensor, Tensor]:
        """Logits (N, classes) and labels (N,) of a split, in its order."""
        if self.activations is not None and self.cached is not None:
            try:
                self.activations.read(self.cached, split, self.device)
            except CacheError as error:
                display.say(f"warning: {error}")
            else:
                suffix, loader = self.cached.reading.split.suffix, self.cached.loader(split)
                return _predict(self.model, lambda b: suffix(b["values"]), loader, self.device)
        return _predict(self.model, _forward(self.model), self.data.loader(split), self.device)

    def close(self) -> None:
        """Let other jobs evict what this one has read."""
        if self.activations is not None:
            self.activations.close()


def judge(predictions: Predictor, data: ImageDataModule) -> tuple[list[Report], pd.DataFrame]:
    """Reports and predictions of val and, where there is one, of test.

    Args:
        predictions: Of the trained model; lets go of the cache at the end.
        data: Names the images.

    Returns:
        One report a split, and the table of `tl.evaluation.predictions_table` over them.
    """
    reports, tables = [], []
    classes = data.table.classes
    with closing(predictions):
        for split in ("val", "test"):
            rows = data.table.split(split)
            if len(rows):
                probabilities, labels = predictions(split)
                reports.append(evaluate(probabilities.numpy(), labels.numpy(), classes, split))
                tables.append(predictions_table(rows, probabilities.numpy(), classes))
    return reports, pd.concat(tables, ignore_index=True)


def predict(
    model: nn.Module, loader: DataLoader[Any], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Probabilities (N, classes) and labels (N,) of a loader of images, in its order.

    The model is on the CPU and in eval mode afterwards.
    """
    logits, labels = _predict(model, _forward(model), loader, device)
    return logits.softmax(dim=1), labels


def _forward(model: nn.Module) -> Callable[[dict[str, Any]], Tensor]:
    def forward(batch: dict[str, Any]) -> Tensor:
        logits: Tensor = model(batch["image"].contiguous(memory_format=torch.channels_last))
        return logits

    return forward


@torch.inference_mode()
def _predict(
    model: nn.Module,
    forward: Callable[[dict[str, Any]], Tensor],
    loader: DataLoader[Any],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Logits (N, classes) and labels (N,); the model is on the CPU and in eval mode afterwards."""
    model.to(device).eval()
    logits, labels = [], []
    for batch in loader:
        inputs = move_data_to_device(batch, device)
        logits.append(forward(inputs).float().cpu())
        labels.append(batch["label"])
    model.cpu()
    return torch.cat(logits), torch.cat(labels)
