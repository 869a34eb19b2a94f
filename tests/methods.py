"""Plans and short trainings for the tests of transfer methods."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from tl.bundle import Preprocessing
from tl.config import compose
from tl.data import read_table
from tl.data.datamodule import ImageDataModule
from tl.finetuning import Plan, build_plan
from tl.models import BuiltModel, Weights, build_model, find_stages
from tl.module import TransferModule
from tl.training import FitResult, PhaseResult, prepare, run_plan
from tl.training.lightning import Checkpoints

SMALL = ["experiment=smoke", "model=test_efficientnet", "augment=none", "finetune.epochs=4"]
SIZE = {
    "input_size": (3, 32, 32),
    "mean": (0.5,) * 3,
    "std": (0.5,) * 3,
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
}


def built_of(model: nn.Module, size: int = 32) -> BuiltModel:
    """A model with random weights as `build_model` would hand it out."""
    preprocessing = Preprocessing.from_dict({**SIZE, "input_size": (3, size, size)})
    weights = Weights("some.safetensors", sha256="0")
    return BuiltModel("net", model, find_stages(model), preprocessing, weights)


def plan_for(model: nn.Module, *overrides: str, images: int = 5000) -> Plan:
    """The plan of some settings for a model."""
    config = compose("train", ["data.root=x", *overrides]).finetune
    return build_plan(config, built_of(model), train_images=images, batch_size=32)


class CrashError(Exception):
    """The process ends here, as far as a run can tell."""


def crash_after(patch: pytest.MonkeyPatch, epochs: int) -> None:
    """Let a run end after so many epochs of all its phases; the state of each is written."""
    patch.setattr(Checkpoints, "SHARE", float("inf"))
    as_always, seen = TransferModule.on_train_epoch_end, []

    def on_train_epoch_end(module: TransferModule) -> None:
        as_always(module)
        seen.append(module)
        if len(seen) == epochs:
            raise CrashError

    patch.setattr(TransferModule, "on_train_epoch_end", on_train_epoch_end)


@dataclass(frozen=True)
class Run:
    """A finished plan: its folder, its outcome, the model before and after."""

    folder: Path
    result: FitResult
    start: dict[str, Tensor]
    state: dict[str, Tensor]
    phases: tuple[PhaseResult, ...]
    facts: dict[str, dict[str, Any]]

    @property
    def history(self) -> pd.DataFrame:
        """Epochs, but for their times."""
        return self.result.history.drop(columns="seconds")

    def kept(self, phase: str) -> dict[str, Tensor]:
        """Weights that a phase left behind."""
        path = self.folder / phase / "best.ckpt"
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        return {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}


def run(data: Path, folder: Path, *overrides: str, classes: int = 3) -> Run:
    """Train by a plan, or go on with it, as `tl train` does between reading and judging."""
    config = compose("train", [*SMALL, *overrides], {"data.root": str(data)})
    prepare(config.trainer, config.seed)
    table = read_table(config.data, seed=config.seed, cache_dir=config.cache.path())
    built = build_model(config.model, classes)
    start = {name: value.clone() for name, value in built.model.state_dict().items()}
    images = ImageDataModule.from_config(table, built.preprocessing, config)
    size = len(table.split("train"))
    plan = build_plan(config.finetune, built, train_images=size, batch_size=config.data.batch_size)
    facts: dict[str, dict[str, Any]] = {}
    result = run_plan(
        plan,
        built,
        images,
        folder=folder,
        trainer=config.trainer,
        log_facts=lambda values, name: facts.update({name: values}),
        cache=config.cache,
        seed=config.seed,
        checkpoint_minutes=config.checkpoint_minutes,
    )
    state = {name: value.clone() for name, value in built.model.state_dict().items()}
    return Run(folder, result, start, state, result.phases, facts)


def assert_alike(left: Run, right: Run) -> None:
    """Two runs found the same, but for rounding."""
    assert [p.steps for p in left.phases] == [p.steps for p in right.phases]
    pd.testing.assert_frame_equal(left.history, right.history, rtol=2e-3, atol=1e-4)
    for name, value in left.state.items():
        torch.testing.assert_close(value, right.state[name], rtol=1e-3, atol=1e-4)


def assert_same(left: Run, right: Run) -> None:
    """Two runs found exactly the same."""
    pd.testing.assert_frame_equal(left.history, right.history, check_exact=True)
    for name, value in left.state.items():
        assert torch.equal(value, right.state[name]), name
    for a, b in zip(left.phases, right.phases, strict=True):
        assert replace(a, seconds=0.0) == replace(b, seconds=0.0)
