"""A batch on a real Ray: a job that fails, one that is killed, a node that dies under another.

Seven are done, one is reported; what was killed goes on from its checkpoint and ends as if nothing
had happened; the same command again runs what failed, and nothing else.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
from batch_jobs import (
    FAILING,
    FAILURE,
    LASTING,
    assert_one_run_a_job,
    assert_undisturbed,
    entries,
    has_checkpoint,
    write_presets,
)
from commands import SCRIPT
from ray_cluster import RayCluster, missing, ray_cluster

from tl.batches.jobs import DONE, FAILED, LOST, RUNNING

pytestmark = pytest.mark.cluster
LASTS, FAILS = (0, 1, 2, 3), 4  # as many that last as there are cores
JOBS = {
    **{number: LASTING % number for number in LASTS},
    FAILS: FAILING,
    **{number: f"seed: {number}\n" for number in range(5, 8)},
}
SECONDS = 900  # of a batch on a busy machine


@pytest.fixture
def cluster():
    if reason := missing():
        pytest.skip(reason)
    with ray_cluster() as found:
        yield found


def command(cluster: RayCluster, place: Path, *args: object) -> list[str]:
    launcher = [
        "hydra/launcher=ray",
        f"hydra.launcher.address={cluster.address}",
        "hydra.launcher.num_cpus=1",
        "hydra.launcher.options={scheduling_strategy: SPREAD}",
    ]
    return [str(SCRIPT), "train", "-m", *map(str, args), *launcher, f"output_dir={place}"]


def test_failures_are_reported_and_lost_jobs_resumed(cluster, image_folder, tmp_path):
    data, place = image_folder(splits={"train": 12, "val": 6}), tmp_path / "batch"
    own = write_presets(tmp_path / "conf", JOBS)
    args = [*own, f"data.root={data}", "batch.backoff=1"]
    batch = cluster.one.start(
        command(cluster, place, *args, "batch.attempts=3"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    _await(lambda: all(_running(place, number) for number in LASTS), batch)
    _await(lambda: all(has_checkpoint(place, number) for number in LASTS), batch)
    on = {number: entries(place)[number].attempts[-1].host for number in LASTS}
    assert sorted(on.values()) == ["one", "one", "two", "two"]
    killed = next(number for number in LASTS if on[number] == "one")
    moved = [number for number in LASTS if on[number] == "two"]
    os.kill(entries(place)[killed].attempts[-1].pid, signal.SIGKILL)
    assert cluster.two.kill()
    said, _ = batch.communicate(timeout=SECONDS)
    found = entries(place)

    assert batch.returncode == 1, said
    assert Counter(entry.state for entry in found.values()) == {DONE: 7, FAILED: 1}, said
    assert [attempt.state for attempt in found[FAILS].attempts] == [FAILED] * 3
    reports = [line for line in said.splitlines() if line.startswith(f"job {FAILS} failed (")]
    assert len(reports) == 1
    assert FAILURE in reports[0]
    assert "Traceback" not in said

    first, last = found[killed].attempts
    assert (first.state, last.state) == (LOST, DONE)
    assert "killed by signal 9" in first.error
    for number in moved:
        first, last = found[number].attempts
        assert (first.state, first.host, last.state, last.host) == (LOST, "two", DONE, "one")
        assert first.error.startswith("Ray"), first.error
    for number in (killed, moved[0]):
        assert_undisturbed(place, number, tmp_path / "conf", data)
    assert_one_run_a_job(place, {"FINISHED": 7, "FAILED": 1})

    again = cluster.one.run(command(cluster, place, *args, "batch.attempts=1"), timeout=SECONDS)
    assert again.returncode == 1, again.stdout + again.stderr
    assert "batch of 8 jobs, 7 of them done before" in again.stdout
    tries = {number: len(entry.attempts) for number, entry in entries(place).items()}
    assert tries == {n: len(entry.attempts) + (n == FAILS) for n, entry in found.items()}


def _running(place: Path, number: int) -> bool:
    if not (place / "ledger").is_dir():
        return False
    entry = entries(place).get(number)
    return entry is not None and entry.state == RUNNING


def _await(what, batch: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + SECONDS
    while not what():
        assert batch.poll() is None, batch.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.2)
