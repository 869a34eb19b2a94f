"""A job of two processes that Ray places: on two nodes, then both on the one that is left."""

from __future__ import annotations

import subprocess
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from batch_jobs import LASTING, entries, has_checkpoint, write_presets
from commands import SCRIPT
from ray_cluster import missing, ray_cluster

from tl.batches.jobs import DONE, WRONG

pytestmark = pytest.mark.cluster
SECONDS = 600


def test_processes_of_a_job_find_each_other_and_begin_again_together(image_folder, tmp_path):
    if reason := missing():
        pytest.skip(reason)
    data, place = image_folder(splits={"train": 12, "val": 6}), tmp_path / "batch"
    presets = write_presets(tmp_path / "conf", {0: LASTING % 0})
    with ray_cluster() as cluster:
        ray = [
            "hydra/launcher=ray",
            f"hydra.launcher.address={cluster.address}",
            "hydra.launcher.processes=2",
            "hydra.launcher.placement=SPREAD",
            "hydra.launcher.num_cpus=1",
        ]
        ddp = ["trainer=ddp", "trainer.accelerator=cpu"]
        own = [f"data.root={data}", f"output_dir={place}", "batch.backoff=1"]
        batch = cluster.one.start(
            [SCRIPT, "train", "-m", *presets, *own, *ddp, *ray],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        deadline = time.monotonic() + SECONDS
        while not has_checkpoint(place, 0):
            assert batch.poll() is None, batch.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert sorted(_hosts(place)) == ["one", "two"]
        assert cluster.two.kill()
        said, _ = batch.communicate(timeout=SECONDS)
    assert batch.returncode == 0, said
    first, last = entries(place)[0].attempts
    assert first.state in WRONG
    assert (last.state, last.host) == (DONE, "one")
    hosts = Counter(_hosts(place))
    assert (hosts["two"], hosts["one"] % 2, hosts["one"] >= 3) == (1, 1, True)
    assert len(pd.read_csv(place / "0/history.csv")) == 60
    text = (place / "logs/0.txt").read_text()
    assert text.count("all   1/60") == 1, text  # it did not begin again
    assert first.host == "two" or "a process of this job is gone" in first.error  # one job


def _hosts(place: Path) -> list[str]:
    """Where the processes of all attempts are, or were."""
    lines = [log.read_text().split("\n")[0] for log in (place / "ledger/ray").glob("*.txt")]
    return [line.split()[2] for line in lines]
