"""The Slurm that other tests stand on: two nodes, a limit on memory, a node that dies."""

from __future__ import annotations

import time

import pytest
from slurm import slurm

pytestmark = pytest.mark.cluster
TAKE = "import time; taken = bytearray(b'x') * (200 << 20); time.sleep(10)"


def test_a_job_runs_on_two_hosts(cluster):
    names = cluster.run(["srun", "--nodes=2", "--ntasks-per-node=1", "hostname"])
    assert sorted(names.splitlines()) == ["n1", "n2"]


def test_a_job_that_takes_more_memory_than_asked_for_is_killed(cluster):
    done = cluster.login.run(["srun", "--mem=100M", "python3", "-c", TAKE])
    assert done.returncode == 137
    assert "exceeded memory limit" in done.stderr


def test_there_is_no_accounting(cluster):
    assert cluster.login.run(["sacct"]).returncode != 0


def test_the_job_of_a_dead_node_starts_again_on_another(cluster, tmp_path):
    script, out = tmp_path / "job.sh", tmp_path / "out"
    script.write_text("#!/bin/bash\nhostname\nwhile [ ! -e go ]; do sleep 0.1; done\n")
    asked = ["--nodelist=n2", "--requeue", f"--chdir={tmp_path}", f"--output={out}", "--mem=100M"]
    number = cluster.run(["sbatch", "--parsable", "--open-mode=append", *asked, script])
    deadline = time.monotonic() + 120
    while not out.exists() or not out.read_text():
        assert time.monotonic() < deadline, cluster.logs()
        time.sleep(0.1)
    cluster["n2"].kill()
    cluster.wait_for("down*", "n2", 120)
    # It asked for the dead node: any other will do now.
    cluster.run(["scontrol", "update", f"JobId={number}", "ReqNodeList="])
    while "n1" not in out.read_text().split():
        assert time.monotonic() < deadline, cluster.logs()
        time.sleep(0.1)
    assert out.read_text().split() == ["n2", "n1"]
    cluster.start("n2")
    cluster.wait_for("idle", "n2")
    (tmp_path / "go").touch()
    while cluster.queue():
        assert time.monotonic() < deadline, cluster.logs()
        time.sleep(0.1)


def test_nothing_is_left(tmp_path):
    with slurm(tmp_path / "a") as first, slurm(tmp_path / "b", nodes=["n1"]) as second:
        assert set(first.states()) == {"n1", "n2"}
        assert second.states() == {"n1": "idle"}
        hosts = [*first.found.values(), *second.found.values()]
        assert all(host.pids() for host in hosts)
    assert not any(host.holder.poll() is None for host in hosts)
