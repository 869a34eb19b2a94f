"""Losses of four steps with a fixed seed: a change of any part of training shows here."""

from __future__ import annotations

import pandas as pd
import pytest

import tl

# Made by this very test on a CPU; a change must be explained in the commit that makes it.
GOLDEN = [1.01396, 0.97501, 1.07000, 0.94520]


def test_golden_losses(image_folder, tmp_path):
    tl.train(
        tl.compose(
            "train",
            ["experiment=smoke", "augment=medium", "finetune=full", "logger=csv"],
            {
                "data.root": str(image_folder(splits={"train": 8, "val": 2})),
                "data.batch_size": 6,
                "output_dir": str(tmp_path / "run"),
                "trainer.log_every_n_steps": 1,
                "tracking.enabled": False,
                "export.enabled": False,
                "seed": 7,
            },
        )
    )
    logged = pd.read_csv(tmp_path / "run/csv/from_step_0/metrics.csv")
    assert logged["train/loss_step"].dropna().tolist() == pytest.approx(GOLDEN, abs=2e-3)
