"""Batches on this machine: jobs and calls that are killed, calls that begin together, a budget."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from batch_jobs import (
    FAILING,
    FAILURE,
    LASTING,
    ONE_CORE,
    assert_one_run_a_job,
    assert_undisturbed,
    entries,
    has_checkpoint,
    write_presets,
)
from commands import SCRIPT

from tl.batches.jobs import DONE, FAILED, INTERRUPTED, LOST, RUNNING, WAITING
from tl.batches.ledger import Ledger

pytestmark = pytest.mark.cluster
SECONDS = 900  # on a busy machine
QUICK = "seed: %d\n"


def begin(folder, jobs, data, *settings):
    """Start `tl train -m` with jobs as presets of the user's own."""
    if not folder.exists():
        write_presets(folder, jobs)
    names = ",".join(f"job{number}" for number in jobs)
    command = [SCRIPT, "train", "-m", "--config-dir", folder, f"experiment={names}"]
    command += [f"data.root={data}", "output_dir=batch", "hydra/launcher=local", *settings]
    return subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **ONE_CORE, "TL_CORES": "2"},
    )


def end(process, code=0):
    out, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == code, out
    return out


def wait_for(condition, process=None):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert process is None or process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def states(place=Path("batch")):
    return {number: Ledger(place).state(entry) for number, entry in entries(place).items()}


def tries(place=Path("batch")):
    return {n: [a.state for a in entry.attempts] for n, entry in entries(place).items()}


def test_a_killed_job_goes_on_and_a_failing_one_stops_nothing_else(tmp_path, image_folder):
    data, conf, place = image_folder(), tmp_path / "conf", Path("batch")
    jobs = {0: LASTING % 3, 1: FAILING, 2: QUICK % 2, 3: QUICK % 3}
    process = begin(conf, jobs, data, "batch.backoff=1", "batch.jobs=2")
    wait_for(lambda: has_checkpoint(place, 0), process)
    victim = entries(place)[0].attempts[-1].pid
    os.kill(victim, signal.SIGKILL)
    out = end(process, 1)
    assert states() == {0: DONE, 1: FAILED, 2: DONE, 3: DONE}
    assert tries() == {0: [LOST, DONE], 1: [FAILED, FAILED], 2: [DONE], 3: [DONE]}
    assert "job 0 lost" in out
    assert "killed by signal 9 (SIGKILL): out of memory, or killed by hand; tried again" in out
    assert out.strip().splitlines()[-1].startswith(f"job 1 failed (experiment=job1): {FAILURE}")
    assert_undisturbed(place, 0, conf, data)
    assert_one_run_a_job(place, {"FINISHED": 3, "FAILED": 1})
    again = end(begin(conf, jobs, data, "batch.attempts=1"), 1)
    assert "batch of 4 jobs, 3 of them done before" in again
    assert tries() == {0: [LOST, DONE], 1: [FAILED] * 3, 2: [DONE], 3: [DONE]}
    left = end(begin(conf, jobs, data, "batch.retry=none"), 1)
    assert f"job 1 failed (experiment=job1): {FAILURE}" in left
    assert len(tries()[1]) == 3


def test_two_calls_that_begin_together_run_each_job_once(tmp_path, image_folder):
    data, conf = image_folder(), tmp_path / "conf"
    jobs = {number: QUICK % number for number in range(6)}
    calls = [begin(conf, jobs, data) for _ in range(2)]
    for call in calls:
        end(call)
    assert tries() == {number: [DONE] for number in jobs}
    assert_one_run_a_job(Path("batch"), {"FINISHED": 6})


def test_nothing_is_lost_with_a_killed_call(tmp_path, image_folder):
    data, conf, place = image_folder(), tmp_path / "conf", Path("batch")
    jobs = {0: LASTING % 3, 1: LASTING % 4, **{n: QUICK % n for n in range(2, 5)}}
    process = begin(conf, jobs, data, "batch.jobs=2")
    wait_for(lambda: has_checkpoint(place, 0) or has_checkpoint(place, 1), process)
    process.kill()
    process.wait()  # its output stays open: the workers live
    assert RUNNING in states().values()
    assert WAITING in states().values()
    end(begin(conf, jobs, data, "batch.jobs=2"))
    # What ran when the call was killed ran on, and what was done was left alone.
    assert tries() == {number: [DONE] for number in jobs}
    assert_one_run_a_job(place, {"FINISHED": 5})


def test_a_spent_budget_checkpoints_what_runs_and_lists_the_rest(tmp_path, image_folder):
    data, conf, place = image_folder(), tmp_path / "conf", Path("batch")
    jobs = {0: LASTING % 3, 1: QUICK % 1, 2: QUICK % 2}
    process = begin(conf, jobs, data, "batch.jobs=1")
    wait_for(lambda: has_checkpoint(place, 0), process)
    process.send_signal(signal.SIGTERM)  # as at the end of a budget, at a known moment
    out = end(process, 130)
    assert states() == {0: INTERRUPTED, 1: WAITING, 2: WAITING}
    assert "job 0 is checkpointed (experiment=job0)" in out
    assert "job 2 did not begin (experiment=job2)" in out
    assert f"interrupted; the same command goes on: {place.absolute()}" in out
    short = end(begin(conf, jobs, data, "batch.jobs=1", "batch.budget=1s"), 130)
    assert "the budget is spent; the same command goes on" in short
    end(begin(conf, jobs, data, "batch.jobs=2"))
    assert set(states().values()) == {DONE}
    assert_undisturbed(place, 0, conf, data)
    assert_one_run_a_job(place, {"FINISHED": 3})


def test_shards_share_a_batch(tmp_path, image_folder):
    data, conf = image_folder(), tmp_path / "conf"
    jobs = {number: QUICK % number for number in range(3)}
    calls = [begin(conf, jobs, data, f"batch.shard={n}/2", "batch.jobs=1") for n in range(2)]
    outs = [end(call) for call in calls]
    assert [out.count(" began") for out in outs] == [2, 1]
    assert tries() == {number: [DONE] for number in jobs}
