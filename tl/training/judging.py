"""Let a trained model predict the images of a data module, and judge what it says."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from lightning_fabric.utilities import move_data_to_device
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tl import display, ranks
from tl.cache import CacheError
from tl.config import EvaluationConfig, Task
from tl.data.datamodule import ImageDataModule
from tl.evaluation import (
    Abstain,
    Report,
    Temperature,
    choose_abstain,
    evaluate,
    fit_temperature,
    predictions_table,
)
from tl.losses import Objective
from tl.scores import Scores
from tl.training.activations import Activations
from tl.training.cached import CachedDataModule


@dataclass(frozen=True)
class Predictor:
    """What a model says of a split: of images, or of what the cache holds of them.

    Args:
        model: Images (N, 3, H, W) to outputs (N, C).
        data: Its splits are read without augmentation.
        objective: Says what the outputs mean.
        device: Where to compute.
        activations: Fills the cache.
        cached: Of the last phase that changed the model, where that phase read the cache.
    """

    model: nn.Module
    data: ImageDataModule
    objective: Objective
    device: torch.device
    activations: Activations | None = None
    cached: CachedDataModule | None = None

    def __call__(self, split: str) -> tuple[Tensor, Tensor]:
        """Probabilities (N, classes) or numbers (N,), and labels, of a split in its order.

        Args:
            split: `train`, `val` or `test`.

        Returns:
            What the table holds, too: class indices (N,), marks (N, classes) or numbers (N,).
        """
        outputs, labels = self.outputs(split)
        return self.objective.activate(outputs), labels

    def loss(self, split: str) -> tuple[float, float]:
        """Mean loss and headline score, as `val/loss` and, say, `val/acc` of a fit."""
        outputs, labels = self.outputs(split)
        objective, table = self.objective.cpu(), self.data.table.split(split)
        weights = torch.tensor(table["weight"].to_numpy()) if "weight" in table else None
        scores = Scores(objective, outputs.shape[1])
        scores.update(outputs, labels)
        found = float(scores.compute()[scores.names[0]])
        return float(objective(outputs, objective.encode(labels), weights)), found

    def outputs(self, split: str) -> tuple[Tensor, Tensor]:
        """Outputs (N, C) of the network for a split, and labels, in its order.

        Several processes share the images out, and each gets all outputs.
        """
        if self.activations is not None and self.cached is not None:
            try:
                self.activations.read(self.cached, split, self.device)
            except CacheError as error:
                display.say(f"warning: {error}")
            else:
                suffix = self.cached.reading.split.suffix
                return self._shared(split, self.cached.loader, lambda b: suffix(b["values"]))
        return self._shared(split, self.data.loader, _forward(self.model))

    def _shared(
        self,
        split: str,
        loader: Callable[..., DataLoader[Any]],
        forward: Callable[[dict[str, Any]], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Outputs and labels, of which each process computes a part."""
        images = len(self.data.table.split(split))
        parts = min(ranks.world(), images, self.data.batch_size)
        own = None
        if ranks.rank() < parts:
            batches = loader(split, part=(ranks.rank(), parts))
            own = _predict(self.model, forward, batches, self.device)
        found = [values for values in ranks.gather(own) if values is not None]
        order = torch.cat([rows for _, _, rows in found]).argsort()
        outputs, labels = (torch.cat([values[i] for values in found])[order] for i in (0, 1))
        return outputs, labels

    def close(self) -> None:
        """Let other jobs evict what this one has read."""
        if self.activations is not None:
            self.activations.close()


def judge(
    predictions: Predictor, data: ImageDataModule, config: EvaluationConfig | None = None
) -> tuple[list[Report], pd.DataFrame]:
    """Reports and predictions of val and, where there is one, of test.

    What is chosen on val (temperature, thresholds, the score of a sure answer) is used on test.
    The report of val judges each image with a temperature that was fitted on others; its table of
    predictions, like that of test, has what the bundle says.

    Args:
        predictions: Of the trained model; lets go of the cache at the end.
        data: Names the images.
        config: Whether to calibrate and to abstain; default: its defaults.

    Returns:
        One report a split, and the table of `tl.evaluation.predictions_table` over them.
    """
    splits = [split for split in ("val", "test") if len(data.table.split(split))]
    with closing(predictions):
        outputs = {split: predictions.outputs(split) for split in splits}
    return _judged(outputs, predictions.objective, data, config or EvaluationConfig())


@ranks.on_first
def _judged(
    found: dict[str, tuple[Tensor, Tensor]],
    objective: Objective,
    data: ImageDataModule,
    config: EvaluationConfig,
) -> tuple[list[Report], pd.DataFrame]:
    """As `judge`, of the outputs and labels of each split."""
    reports: list[Report] = []
    tables = []
    table = data.table
    classes, task = table.classes, table.task
    chosen = _Chosen(task, config)
    for split, (outputs, labels) in found.items():
        rows = table.split(split)
        if split == "val":
            chosen.choose(objective, outputs, labels)
        said = chosen.answers(objective, outputs)
        report = evaluate(
            said,
            labels.numpy(),
            classes,
            split,
            task=task,
            thresholds=chosen.thresholds,
            scale=objective.std,
            temperature=chosen.temperature,
            chose_temperature=split == "val",
            abstain=chosen.abstain,
            groups=rows.get("group"),
        )
        chosen.thresholds = report.thresholds
        reports.append(report)
        meant: dict[str, Any] = {"targets": labels.numpy(), "thresholds": report.thresholds}
        tables.append(predictions_table(rows, said, classes, task=task, **meant))
    return reports, pd.concat(tables, ignore_index=True)


class _Chosen:
    """What is chosen on val, once, and used from then on."""

    def __init__(self, task: Task, config: EvaluationConfig) -> None:
        self.task, self.config = task, config
        self.thresholds: tuple[float, ...] | None = None
        self.temperature: Temperature | None = None
        self.abstain: Abstain | None = None

    def choose(self, objective: Objective, outputs: Tensor, labels: Tensor) -> None:
        """Choose by the outputs (N, C) and labels of val."""
        if self.task is Task.regression or not bool(torch.isfinite(outputs).all()):
            return
        if self.config.calibrate:
            self.temperature = fit_temperature(outputs.numpy(), labels.numpy(), self.task)
        if self.task is Task.single and self.config.precision is not None:
            said = self.answers(objective, outputs)
            right = said.argmax(axis=1) == labels.numpy()
            self.abstain = choose_abstain(said.max(axis=1), right, self.config.precision)

    def answers(self, objective: Objective, outputs: Tensor) -> NDArray[Any]:
        """What the bundle will say for outputs (N, C): probabilities (N, C) or numbers (N,)."""
        value = self.temperature.value if self.temperature else 1.0
        found: NDArray[Any] = objective.activate(outputs / value).numpy()
        return found


def _forward(model: nn.Module) -> Callable[[dict[str, Any]], Tensor]:
    def forward(batch: dict[str, Any]) -> Tensor:
        outputs: Tensor = model(batch["image"].contiguous(memory_format=torch.channels_last))
        return outputs

    return forward


@torch.inference_mode()
def _predict(
    model: nn.Module,
    forward: Callable[[dict[str, Any]], Tensor],
    loader: DataLoader[Any],
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (N, C), labels, and places in the split.

    The model is on the CPU and in eval mode afterwards.
    """
    model.to(device).eval()
    outputs, labels, places = [], [], []
    for batch in loader:
        inputs = move_data_to_device(batch, device)
        outputs.append(forward(inputs).float().cpu())
        labels.append(batch["label"])
        places.append(batch["index"])
    model.cpu()
    own = loader.sampler.own  # type: ignore[attr-defined] # what comes after them stands in
    return torch.cat(outputs)[:own], torch.cat(labels)[:own], torch.cat(places)[:own]
