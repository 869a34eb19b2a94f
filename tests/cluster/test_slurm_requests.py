"""Batches on a real Slurm: requests that are refused, limits of time, Ctrl-C, jobs on two hosts."""

from __future__ import annotations

import json
import os
import pickle
import signal
import time
from pathlib import Path

import pandas as pd
import pytest
from batch_jobs import ONE_CORE
from commands import SCRIPT, TINY, Done, script
from processes import timeless

from tl.batches.engines.slurm_site import minutes
from tl.batches.jobs import DONE, INTERRUPTED, RUNNING
from tl.batches.ledger import Ledger

pytestmark = pytest.mark.cluster
SECONDS = 1200  # on a busy machine
LONG = ["finetune=full", "augment=light", "finetune.epochs=400", "finetune.patience=0"]


@pytest.fixture
def batch(cluster, image_folder, tmp_path):
    """Start `tl train -m` on the login host; `place` is the folder of the batch."""
    data = image_folder(splits={"train": 12, "val": 6})
    place = tmp_path / "batch"

    def start(*args, host="ctl"):
        given = [f"data.root={data}", f"output_dir={place}", "hydra/launcher=slurm"]
        few = ["hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=2"]
        command = [SCRIPT, "train", "-m", *given, *few, *TINY, *map(str, args)]
        return cluster[host].start(command, stdout=-1, stderr=-1)

    start.place, start.data = place, data
    return start


def done(process) -> Done:
    out, err = process.communicate(timeout=SECONDS)
    return Done(process.returncode, out, err)


def entry(place: Path, number: int = 0):
    return next((e for e in Ledger(place).all() if e.number == number), None)


def wait_for(what, process, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "too long"
        time.sleep(0.2)


# --- refused before there is a job --------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (
            "partition=mein",
            "hydra.launcher.partition=mein: the cluster has no partition mein; did you mean main? "
            "there are main (the default)",
        ),
        ("mem_gb=9", "hydra.launcher.mem_gb=9: the largest node of partition main has 7.8 GB"),
        ("cpus_per_task=64", "Slurm refuses these jobs: Requested node configuration is not"),
        ("gpus_per_node=1", "Slurm refuses these jobs: Invalid generic resource (gres)"),
        ("constraint=a100", "Slurm refuses these jobs: Invalid feature specification"),
        ("options={nodelist: n9}", "Slurm refuses these jobs: Invalid node name specified"),
    ],
)
def test_what_the_cluster_does_not_have_is_refused(cluster, batch, setting, words):
    before = cluster.queue()
    done(batch("seed=1,2", f"hydra.launcher.{setting}")).refused(words)
    assert cluster.queue() == before
    assert not (batch.place / "0").exists()


def test_a_cluster_that_does_not_answer_is_said_within_seconds(cluster, batch):
    cluster["n1"].unplug()
    try:
        began = time.monotonic()
        done(batch("seed=1,2", host="n1")).refused(
            "hydra/launcher=slurm: no cluster can be reached", "Unable to contact slurm controller"
        )
        assert time.monotonic() - began < 60  # 9 s of them Slurm's own
    finally:
        cluster["n1"].plug()
    cluster.wait_for("idle", "n1", 120)


# --- limits and ends ----------------------------------------------------------------------------


def test_a_job_at_its_limit_of_time_goes_on_in_a_new_one(cluster, batch):
    process = batch("seed=3", *LONG, "hydra.launcher.timeout_min=60")
    wait_for(lambda: list(batch.place.glob("0/checkpoints/*/last.ckpt")), process)
    worker = entry(batch.place).attempts[0].worker
    number = worker.removeprefix("slurm-")
    ran = cluster.run(["squeue", "--noheader", "--format=%M", f"--jobs={number}"])
    soon = minutes(ran.rpartition("-")[2]) + 2  # nearer than the two minutes of signal_s
    cluster.run(["scontrol", "update", f"JobId={number}", f"TimeLimit={soon}"])
    finished = done(process)
    assert finished.code == 0, finished.out + finished.err
    first, second = entry(batch.place).attempts
    assert (first.state, second.state) == (INTERRUPTED, DONE)
    assert second.worker != worker
    submitted = (batch.place / f"ledger/slurm/{number}_submission.sh").read_text()
    assert "#SBATCH --signal=TERM@120\n" in submitted
    whole = batch.place.parent / "whole"
    alone = script(
        *("train", f"data.root={batch.data}", f"output_dir={whole}", "seed=3", *TINY, *LONG),
        **ONE_CORE,
    )
    assert alone.code == 0, alone.out + alone.err
    left, right = (json.loads((r / "metrics.json").read_text()) for r in (whole, batch.place / "0"))
    assert timeless(left) == timeless(right)
    assert len(pd.read_csv(batch.place / "0/history.csv")) == 400


def test_ctrl_c_empties_the_queue_and_the_same_command_goes_on(cluster, batch):
    jobs = ["seed=1,2,3,4,5,6", *LONG, "batch.jobs=5"]
    process = batch(*jobs)
    history = batch.place / "0/checkpoints"
    wait_for(lambda: list(history.glob("*/last.ckpt")), process)
    assert sum(state == "PENDING" for state in cluster.queue().values()) == 1
    os.kill(process.pid, signal.SIGINT)
    stopped = done(process)
    assert stopped.code == 130, stopped.out + stopped.err
    deadline = time.monotonic() + 60
    while cluster.queue():
        assert time.monotonic() < deadline, cluster.queue()
        time.sleep(0.5)
    states = {e.number: e.state for e in Ledger(batch.place).all()}
    assert states[0] == INTERRUPTED
    assert RUNNING not in states.values()
    assert all(e.attempts == () for e in Ledger(batch.place).all() if e.number >= 4)


def test_the_death_of_the_call_costs_no_job(cluster, batch):
    jobs = ["seed=1,2", "finetune.epochs=30", "finetune.patience=0"]
    first = batch(*jobs)
    wait_for(lambda: all((e := entry(batch.place, n)) and e.attempts for n in (0, 1)), first)
    first.kill()
    first.communicate()
    again = done(batch(*jobs))
    assert again.code == 0, again.out + again.err
    assert [len(e.attempts) for e in Ledger(batch.place).all()] == [1, 1]
    assert [e.state for e in Ledger(batch.place).all()] == [DONE, DONE]


# --- one job on two hosts -----------------------------------------------------------------------


def test_a_job_of_a_batch_trains_on_two_hosts(batch):
    wide = ["trainer=ddp", "trainer.accelerator=cpu", "hydra.launcher.nodes=2"]
    finished = done(batch("seed=3,4", *wide))
    assert finished.code == 0, finished.out + finished.err
    for number in (0, 1):
        assert [a.state for a in entry(batch.place, number).attempts] == [DONE]
    logs = batch.place / "ledger/slurm"
    ran = [pickle.loads(file.read_bytes()) for file in logs.glob("*_result.pkl")]
    assert ran == [("success", 1)] * 4  # two processes for each of two jobs
    for number in (0, 1):
        worker = entry(batch.place, number).attempts[-1].worker.removeprefix("slurm-")
        said = "".join(file.read_text() for file in logs.glob(f"{worker}_?_log.out"))
        assert {host for host in ("n1", "n2") if f"hostname={host}," in said} == {"n1", "n2"}
    whole = batch.place.parent / "whole"
    alone = script("train", f"data.root={batch.data}", f"output_dir={whole}", "seed=3", *TINY)
    assert alone.code == 0, alone.out + alone.err
    left, right = (json.loads((r / "metrics.json").read_text()) for r in (whole, batch.place / "0"))
    assert right["val/loss"] == pytest.approx(left["val/loss"], abs=1e-4)
    assert right["val/acc"] == left["val/acc"]


def test_srun_trains_one_job_on_two_hosts(cluster, image_folder, tmp_path):
    data = image_folder(splits={"train": 12, "val": 6})
    wide, alone = tmp_path / "wide", tmp_path / "alone"
    step = ["srun", "--nodes=2", "--ntasks-per-node=1", "--mem=2G", SCRIPT, "train", *TINY]
    ddp = ["trainer=ddp", "trainer.accelerator=cpu"]
    given = [f"data.root={data}", "seed=3"]
    cluster.run([*step, *ddp, *given, f"output_dir={wide}"], timeout=SECONDS)
    one = script("train", *TINY, *given, f"output_dir={alone}")
    assert one.code == 0, one.out + one.err
    left, right = (json.loads((r / "metrics.json").read_text()) for r in (alone, wide))
    assert right["val/loss"] == pytest.approx(left["val/loss"], abs=1e-4)
    assert right["val/acc"] == left["val/acc"]
