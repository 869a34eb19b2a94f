"""A run that is killed and resumed ends as an uninterrupted one."""

from __future__ import annotations

import json
import os

import pandas as pd
import pytest
from methods import CrashError, assert_same, run
from mlflow.tracking import MlflowClient
from processes import finish, kill_when, start, timeless
from safetensors.torch import load_file

from tl.module import TransferModule
from tl.training.lightning import Checkpoints

SETTINGS = [
    "experiment=smoke",
    "augment=strong",
    "model.image_size=32",
    "model.drop_rate=0.2",
    "model.drop_path_rate=0.1",
    "finetune.epochs=6",
    "finetune.patience=4",
    "finetune.batch_norm=train",
    "export.enabled=false",
    "tracking.system_metrics=false",
    "seed=3",
]


def test_kill_in_phase_2_and_resume_equals_an_uninterrupted_run(image_folder, tmp_path):
    data = image_folder(splits={"train": 20, "val": 6})
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(start(f"data.root={data}", f"output_dir={whole}", *SETTINGS))

    victim = start(f"data.root={data}", f"output_dir={broken}", *SETTINGS)
    kill_when(victim, broken / "checkpoints/2-all/last.ckpt")
    assert not (broken / "metrics.json").exists()
    output = finish(start(f"resume={broken}"))

    assert "phase head is done already" in output
    left, right = (json.loads((run / "metrics.json").read_text()) for run in (whole, broken))
    assert timeless(left) == timeless(right)
    curves = [pd.read_csv(run / "history.csv").drop(columns="seconds") for run in (whole, broken)]
    pd.testing.assert_frame_equal(*curves, check_exact=True)
    weights = [load_file(run / "checkpoints/model.safetensors") for run in (whole, broken)]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    predictions = [pd.read_parquet(run / "predictions.parquet") for run in (whole, broken)]
    pd.testing.assert_frame_equal(*predictions, check_exact=True)


def test_a_crash_within_an_epoch_goes_on_there_and_ends_the_same(
    image_folder, tmp_path, monkeypatch, capsys
):
    data = image_folder(splits={"train": 14, "val": 4})
    settings = [
        "augment=strong", "model.image_size=32", "model.drop_rate=0.2", "cache=off",
        "finetune=full", "finetune.epochs=2", "finetune.ema=true", "finetune.accumulate=2",
        "finetune.batch_norm=train", "data.num_workers=2", "checkpoint_minutes=1e-9",
    ]  # fmt: skip
    whole = run(data, tmp_path / "whole", *settings, "checkpoint_minutes=0")
    with monkeypatch.context() as patch:
        as_always = TransferModule.on_train_batch_start

        def on_train_batch_start(module, batch, batch_idx):
            as_always(module, batch, batch_idx)
            if (module.current_epoch, batch_idx) == (1, 5):
                raise CrashError

        patch.setattr(Checkpoints, "SHARE", float("inf"))
        patch.setattr(TransferModule, "on_train_batch_start", on_train_batch_start)
        with pytest.raises(CrashError):
            run(data, tmp_path / "broken", *settings)
    capsys.readouterr()
    broken = run(data, tmp_path / "broken", *settings)
    # Not after batch 5: it is in the middle of an optimizer step.
    assert "going on in epoch 2, after 4 of 6 batches" in capsys.readouterr().out
    assert_same(whole, broken)


def test_resume_goes_on_in_the_same_mlflow_run(image_folder, tmp_path):
    data, run = image_folder(), tmp_path / "run"
    victim = start(f"data.root={data}", f"output_dir={run}", *SETTINGS)
    kill_when(victim, run / "checkpoints/1-head/last.ckpt")
    before = json.loads((run / "run.json").read_text())
    finish(start(f"resume={run}", f"data.root={data}", "seed=3"))

    after = json.loads((run / "run.json").read_text())
    assert after["run_id"] == before["run_id"]
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    found = client.search_runs([before["experiment_id"]])
    assert [r.info.status for r in found] == ["FINISHED"]
    assert found[0].data.metrics["val/acc"] == pytest.approx(
        json.loads((run / "metrics.json").read_text())["val/acc"]
    )
