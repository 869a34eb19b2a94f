"""Losses of four steps with a fixed seed: a change of any part of training shows here."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl

import tl

# Made by this very test on a CPU; a change must be explained in the commit that makes it.
GOLDEN = [1.01396, 0.96873, 1.07000, 0.93103]


class Steps(pl.Callback):
    """Collects the loss of every step."""

    losses: list[float] = []  # noqa: RUF012 - shared with the test on purpose

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))


def test_golden_losses(image_folder, tmp_path, monkeypatch):
    Steps.losses.clear()
    monkeypatch.setattr("tl.training._callbacks", lambda _: [Steps()])
    tl.train(
        tl.compose(
            "train",
            ["experiment=smoke", "augment=medium", "finetune=full"],
            {
                "data.root": str(image_folder(splits={"train": 8, "val": 2})),
                "data.batch_size": 6,
                "output_dir": str(tmp_path / "run"),
                "tracking.enabled": False,
                "export.enabled": False,
                "seed": 7,
            },
        )
    )
    assert Steps.losses == pytest.approx(GOLDEN, abs=2e-3)
