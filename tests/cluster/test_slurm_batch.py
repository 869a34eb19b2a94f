"""A batch on a real Slurm: a job that fails, one out of memory, a node that dies under another.

Seven are done, one is reported; the job of the dead node goes on from its checkpoint and ends as if
nothing had happened; the same command again runs what failed, and nothing else.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from batch_jobs import ONE_CORE, write_presets
from commands import SCRIPT, Done, script
from mlflow.tracking import MlflowClient
from processes import timeless
from slurm import Slurm

from tl.batches.jobs import DONE, FAILED, LOST, Entry
from tl.batches.ledger import Ledger

pytestmark = pytest.mark.cluster
LAUNCHER = [
    "hydra/launcher=slurm",
    "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.mem_gb=2",
    "hydra.launcher.timeout_min=20",
]
SECONDS = 900  # of a batch on a busy machine
# Presets of the user's own: each is a job. 0 lasts, 1 fails, 2 takes 2.6 GB, the others are alike.
LASTS, FAILS, LARGE = 0, 1, 2
STOP = "pytorch_lightning.callbacks.EarlyStopping"  # fails after each epoch: there is no x
JOBS = {
    LASTS: "finetune: {epochs: 60, patience: 0}\nseed: 3\n",
    FAILS: f"finetune: {{epochs: 9}}\ncallbacks: {{stop: {{_target_: {STOP}, monitor: x}}}}\n",
    LARGE: "model: {image_size: 384}\ndata: {batch_size: 36}\n",
    **{number: f"seed: {number}\n" for number in range(3, 8)},
}


@pytest.fixture
def presets(tmp_path) -> Path:
    folder = tmp_path / "conf"
    write_presets(folder, JOBS)
    return folder


def batch(cluster: Slurm, place: Path, *args: object) -> Done:
    """`tl train -m` on the login host; returns when it ended."""
    process = cluster.login.run(
        [SCRIPT, "train", "-m", *map(str, args), f"output_dir={place}", *LAUNCHER], timeout=SECONDS
    )
    return Done(process.returncode, process.stdout, process.stderr)


def entries(place: Path) -> dict[int, Entry]:
    return {entry.number: entry for entry in Ledger(place).all()}


def test_failures_are_reported_and_lost_jobs_resumed(cluster, presets, image_folder, tmp_path):
    data, place = image_folder(splits={"train": 12, "val": 6}), tmp_path / "batch"
    names = ",".join(f"job{number}" for number in JOBS)
    args = ["--config-dir", presets, f"data.root={data}", f"experiment={names}"]
    args += ["batch.attempts=4", "batch.backoff=1"]
    command = [SCRIPT, "train", "-m", *args, f"output_dir={place}", *LAUNCHER]
    began = cluster.login.start(command, stdout=-1, stderr=-1)
    killed = _kill_host_of(LASTS, place, cluster, began)
    out, err = began.communicate(timeout=SECONDS)
    found = entries(place)

    assert began.returncode == 1, out + err
    assert Counter(entry.state for entry in found.values()) == {DONE: 7, FAILED: 1}
    assert found[FAILS].state == FAILED
    assert "7 done" in out or "7 of 8" in out, out
    assert "Early stopping conditioned on metric `x` which is not available" in out + err
    assert "Traceback" not in out + err
    assert [a.state for a in found[FAILS].attempts] == [FAILED] * 4

    first, *_, last = found[LARGE].attempts
    assert (first.state, last.state) == (LOST, DONE)
    assert first.error == "needed more memory than 2 GB; the next attempt asks for 4 GB"
    asked = Counter(_memory(script) for script in (place / "ledger/slurm").glob("*_submission.sh"))
    assert asked.keys() == {"2048M", "4096M"}

    lasted = found[LASTS].attempts
    assert lasted[0].host == killed != lasted[-1].host
    assert lasted[0].state == LOST
    _went_on_as_if_nothing_had_happened(place / str(LASTS), args[:3], place / f"logs/{LASTS}.txt")
    _one_run_a_job(place)

    again = batch(cluster, place, *args, "batch.attempts=1")
    assert again.code == 1, again.out + again.err
    assert "batch of 8 jobs, 7 of them done before" in again.out
    tries = {number: len(entry.attempts) for number, entry in entries(place).items()}
    assert tries == {n: len(e.attempts) + (n == FAILS) for n, e in found.items()}


def _kill_host_of(number: int, place: Path, cluster: Slurm, process) -> str:
    """Kill the host of a job when it has written checkpoints; returns its name."""
    deadline = time.monotonic() + SECONDS
    history = f"{number}/checkpoints/*/last.ckpt"
    while not list(place.glob(history)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, cluster.logs()
        time.sleep(0.1)
    time.sleep(2)
    entry = entries(place)[number]
    assert entry.state == "running"
    host = entry.attempts[-1].host
    cluster[host].kill()
    return host


def _memory(script: Path) -> str:
    return next(
        line.partition("--mem=")[2]
        for line in script.read_text().splitlines()
        if line.startswith("#SBATCH --mem=")
    )


def _went_on_as_if_nothing_had_happened(run: Path, args: list, log: Path) -> None:
    whole = run.parent.parent / "whole"
    done = script(
        *("train", *args, f"experiment=job{LASTS}", f"output_dir={whole}"),
        **{**ONE_CORE, "MLFLOW_TRACKING_URI": f"sqlite:///{whole}.db"},
    )
    assert done.code == 0, done.out + done.err
    left, right = (json.loads((r / "metrics.json").read_text()) for r in (whole, run))
    assert timeless(left) == timeless(right)
    curves = [pd.read_csv(r / "history.csv").drop(columns="seconds") for r in (whole, run)]
    pd.testing.assert_frame_equal(*curves, check_exact=True)
    assert len(curves[0]) == 60
    text = log.read_text()
    assert text.count("all   1/60") <= 1, text  # it did not begin again
    assert "60/60" in text


def _one_run_a_job(place: Path) -> None:
    client = MlflowClient()
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments)
    parent = json.loads((place / "run.json").read_text())["run_id"]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent]
    assert len(children) == len(JOBS)
    assert {run.info.run_id for run in runs} == {parent, *(run.info.run_id for run in children)}
    states = Counter(run.info.status for run in children)
    assert states == {"FINISHED": 7, "FAILED": 1}
