"""Jobs of batches on clusters, and what is true of them however often they were killed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pandas as pd
from commands import script
from mlflow.tracking import MlflowClient
from omegaconf import OmegaConf
from processes import timeless

from tl.batches.ledger import Ledger

# As the jobs have it: sums are rounded alike.
ONE_CORE = {"TL_CORES": "1", "OMP_NUM_THREADS": "1"}
PRESET = """\
# @package _global_
defaults:
  - override /model: test_resnet
  - override /finetune: full
  - override /trainer: cpu
  - override /augment: light
{own}"""
COMMON = """\
model: {weights: none, image_size: 32}
data: {batch_size: 8, num_workers: 0}
finetune: {epochs: 1}
export: {enabled: false}
tracking: {system_metrics: false}
"""
LASTING = "finetune: {epochs: 60, patience: 0}\nseed: %d\n"
# At the end of an epoch, of which each attempt comes one further.
FAILING = """\
finetune: {epochs: 9, patience: 0}
callbacks: {x: {_target_: pytorch_lightning.callbacks.EarlyStopping, monitor: x}}
"""
FAILURE = "Early stopping conditioned on metric `x` which is not available"


def write_presets(folder: Path, jobs: dict[int, str]) -> list[str]:
    """Write jobs as presets of the user's own; returns the arguments of a command that takes all.

    Args:
        folder: For them.
        jobs: Number -> YAML of what is its own.
    """
    (folder / "experiment").mkdir(parents=True)
    for number, text in jobs.items():
        merged = OmegaConf.merge(OmegaConf.create(COMMON), OmegaConf.create(text))
        own = OmegaConf.to_yaml(merged)
        (folder / f"experiment/job{number}.yaml").write_text(PRESET.format(own=own))
    names = ",".join(f"job{number}" for number in jobs)
    return ["--config-dir", str(folder), f"experiment={names}"]


def entries(place: Path) -> dict:
    """Number -> what the ledger knows of a job."""
    return {entry.number: entry for entry in Ledger(place).all()}


def has_checkpoint(place: Path, number: int) -> bool:
    return bool(list(place.glob(f"{number}/checkpoints/*/last.ckpt")))


def assert_undisturbed(place: Path, number: int, folder: Path, data: Path) -> None:
    """A job that lasts went on where it was, and found what it finds in peace."""
    whole = folder.parent / f"whole{number}"
    done = script(
        *("train", "--config-dir", folder, f"experiment=job{number}"),
        *(f"data.root={data}", f"output_dir={whole}"),
        **{**ONE_CORE, "MLFLOW_TRACKING_URI": f"sqlite:///{whole}.db"},
    )
    assert done.code == 0, done.out + done.err
    runs = (whole, place / str(number))
    left, right = (json.loads((run / "metrics.json").read_text()) for run in runs)
    assert timeless(left) == timeless(right)
    curves = [pd.read_csv(run / "history.csv").drop(columns="seconds") for run in runs]
    pd.testing.assert_frame_equal(*curves, check_exact=True)
    assert len(curves[0]) == 60
    text = (place / f"logs/{number}.txt").read_text()
    assert text.count("all   1/60") == 1, text  # it did not begin again
    assert "60/60" in text


def assert_one_run_a_job(place: Path, states: dict[str, int]) -> None:
    """MLflow has one run for each job, below one for the batch, and nothing else."""
    client = MlflowClient()
    found = client.search_runs([e.experiment_id for e in client.search_experiments()])
    parent = json.loads((place / "run.json").read_text())["run_id"]
    children = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent]
    assert {run.info.run_id for run in found} == {parent, *(run.info.run_id for run in children)}
    assert Counter(run.info.status for run in children) == states
