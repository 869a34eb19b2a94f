"""Let a trained model predict the images of a data module, and judge what it says."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tl.data.datamodule import ImageDataModule
from tl.evaluation import Report, evaluate, predictions_table


def judge(
    model: nn.Module, data: ImageDataModule, device: torch.device
) -> tuple[list[Report], pd.DataFrame]:
    """Reports and predictions of val and, where there is one, of test.

    Args:
        model: Images (N, 3, H, W) to logits (N, classes).
        data: Its splits are read without augmentation.
        device: Where to compute.

    Returns:
        One report a split, and the table of `tl.evaluation.predictions_table` over them.
    """
    reports, tables = [], []
    classes = data.table.classes
    for split in ("val", "test"):
        rows = data.table.split(split)
        if len(rows):
            probabilities, labels = predict(model, data.loader(split), device)
            reports.append(evaluate(probabilities.numpy(), labels.numpy(), classes, split))
            tables.append(predictions_table(rows, probabilities.numpy(), classes))
    return reports, pd.concat(tables, ignore_index=True)


@torch.inference_mode()
def predict(
    model: nn.Module, loader: DataLoader[Any], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Probabilities (N, classes) and labels (N,) of a loader, in its order, in eval mode.

    The model is on the CPU afterwards.
    """
    model.to(device).eval()
    probabilities, labels = [], []
    for batch in loader:
        images = batch["image"].to(device, memory_format=torch.channels_last)
        logits = model(images)
        probabilities.append(logits.float().softmax(dim=1).cpu())
        labels.append(batch["label"])
    model.cpu()
    return torch.cat(probabilities), torch.cat(labels)
