"""A batch from the command line, its jobs in processes of their own; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import UNTRACKED, files

from tl.batches import read_states


def test_jobs_run_beside_each_other_and_only_what_is_left_runs_again(tl, image_folder):
    data = image_folder()
    settings = ["train", "-m", f"data.root={data}", *UNTRACKED, "hydra/launcher=local"]
    settings += ["finetune=linear_probe", "finetune.epochs=1", "model.weights=none,missing.pth"]
    done = tl(*settings, "batch.backoff=0")
    assert done.code == 1, done.out
    (batch,) = Path("runs").iterdir()
    assert batch.name.startswith("images_")
    assert read_states(batch) == {0: "done", 1: "refused"}
    assert not files(batch / "1")
    assert json.loads((batch / "0/metrics.json").read_text())["val/acc"] >= 0
    last = done.err.strip().splitlines()[-1]
    assert last.startswith("job 1 failed (model.weights=missing.pth): model.weights: there is no")
    assert "audit" in (batch / "logs/0.txt").read_text()
    assert "audit" not in done.out, "jobs print into logs of their own"
    began = (batch / "0/config.yaml").stat().st_mtime_ns
    again = tl(*settings, "batch.jobs=1")
    assert again.code == 1
    assert "batch of 2 jobs, 1 of them done before" in again.out
    assert (batch / "0/config.yaml").stat().st_mtime_ns == began
    kept = tl(*settings, "batch.retry=none")
    assert kept.code == 1
    assert "began" not in kept.out


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (["seed=1,1"], ["jobs 0 and 1: ", "seed=1", "leave one of each out"]),
        (["seed=range(1,1)"], ["the batch has no jobs"]),
        (["seed=1,2", "output_dir=a,b"], ["output_dir=a,b: a batch has one folder"]),
        (["seed=1,2", "batch.budget=soon"], ["batch.budget must be a time such as 2h"]),
        (["seed=1,2", "batch.retri=all"], ["unknown key batch.retri; did you mean batch.retry?"]),
        (["seed=1,2", "hydra/launcher=joblib"], ["no preset hydra/launcher=joblib", "local, ray"]),
        (["resume=a,b"], ["resume: is for a single run"]),
    ],
)
def test_a_batch_that_makes_no_sense_is_refused(tl, image_folder, settings, parts):
    done = tl("train", "-m", f"data.root={image_folder()}", *UNTRACKED, *settings)
    done.refused(*parts)
    assert not list(Path().glob("*/ledger"))


def test_settings_of_a_batch_need_one(tl, image_folder):
    done = tl("train", f"data.root={image_folder()}", *UNTRACKED, "batch.jobs=2")
    done.refused("batch.jobs=2 is for a batch: it needs -m")


def test_the_folder_of_a_run_is_no_batch(tl, image_folder):
    Path("run").mkdir()
    Path("run/config.yaml").touch()
    done = tl("train", "-m", f"data.root={image_folder()}", *UNTRACKED, "output_dir=run")
    done.refused("holds a run, not a batch; choose another output_dir")


def test_a_batch_is_started_once(tl, image_folder, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    done = tl("train", "-m", f"data.root={image_folder()}", *UNTRACKED, "seed=1,2")
    done.refused("started 2 processes, and each of them would run the batch: start it once")
