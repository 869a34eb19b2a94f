"""Calls of a batch on an own Ray of this machine that are stopped or killed: nothing is lost."""

from __future__ import annotations

import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
from batch_jobs import LASTING, assert_undisturbed, entries, has_checkpoint, write_presets
from commands import SCRIPT
from hosts import Host, hosts
from ray_cluster import VARIABLES, missing

from tl.batches.jobs import DONE, INTERRUPTED, LOST, RUNNING, WAITING

pytestmark = pytest.mark.cluster
SECONDS = 600
JOBS = {0: LASTING % 0, 1: LASTING % 1, **{number: f"seed: {number}\n" for number in (2, 3)}}


@pytest.fixture
def host(tmp_path):
    if reason := missing():
        pytest.skip(reason)
    # Ray keeps the token of a Ray of its own at home.
    with hosts(["one"], {**VARIABLES, "HOME": str(tmp_path), "TL_CORES": "2"}) as found:
        yield found["one"]


def begin(host: Host, tmp_path: Path, data: Path) -> subprocess.Popen[str]:
    names = ",".join(f"job{number}" for number in JOBS)
    own = [f"data.root={data}", f"output_dir={tmp_path / 'batch'}", "batch.backoff=1"]
    ray = ["hydra/launcher=ray", "hydra.launcher.num_cpus=1"]
    presets = ["--config-dir", tmp_path / "conf", f"experiment={names}"]
    return host.start(
        [SCRIPT, "train", "-m", *presets, *own, *ray],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_a_call_that_ends_is_taken_up_by_the_same_command(signum, host, image_folder, tmp_path):
    data, place = image_folder(splits={"train": 12, "val": 6}), tmp_path / "batch"
    write_presets(tmp_path / "conf", JOBS)
    call = begin(host, tmp_path, data)
    deadline = time.monotonic() + SECONDS
    while not (has_checkpoint(place, 0) and has_checkpoint(place, 1)):
        assert call.poll() is None, call.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    call.send_signal(signum)
    said, _ = call.communicate(timeout=SECONDS)
    killed = signum is signal.SIGKILL
    if not killed:
        assert call.returncode == 130, said
        assert "job 0 is checkpointed" in said
        assert "job 3 did not begin" in said
        assert f"interrupted; the same command goes on: {place}" in said
    while host.pids():  # Ray ends its processes, and the jobs, when who started it is gone
        assert time.monotonic() < deadline, host.pids()
        time.sleep(0.5)
    found = entries(place)
    state = RUNNING if killed else INTERRUPTED
    assert Counter(entry.state for entry in found.values()) == {state: 2, WAITING: 2}

    again = begin(host, tmp_path, data)
    said, _ = again.communicate(timeout=SECONDS)
    assert again.returncode == 0, said
    tries = {n: [attempt.state for attempt in e.attempts] for n, e in entries(place).items()}
    first = LOST if killed else INTERRUPTED
    assert tries == {0: [first, DONE], 1: [first, DONE], 2: [DONE], 3: [DONE]}
    assert_undisturbed(place, 0, tmp_path / "conf", data)
