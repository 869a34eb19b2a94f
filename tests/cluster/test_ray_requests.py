"""Batches that Ray cannot run: what is wrong, and what to do, is said in one message."""

from __future__ import annotations

import pytest
from commands import SCRIPT, UNTRACKED, Done
from hosts import Host, hosts
from ray_cluster import VARIABLES, missing, ray_cluster

pytestmark = pytest.mark.cluster
SECONDS = 600


@pytest.fixture(autouse=True)
def possible():
    if reason := missing():
        pytest.skip(reason)


def batch(host: Host, data, place, *args: object) -> Done:
    command = [SCRIPT, "train", "-m", *UNTRACKED, f"data.root={data}", "hydra/launcher=ray"]
    own = [f"output_dir={place}", "hydra.launcher.num_cpus=1", *map(str, args)]
    done = host.run([*command, *own], timeout=SECONDS)
    return Done(done.returncode, done.stdout, done.stderr)


def test_who_has_no_token_is_told_where_to_get_it(image_folder, tmp_path):
    data = image_folder()
    with ray_cluster() as cluster:
        at = f"hydra.launcher.address={cluster.address}"
        known = dict(cluster.one.environment)
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
            del cluster.one.environment[name]
        home = {"HOME": str(tmp_path)}
        cluster.one.environment.update(home)
        done = batch(cluster.one, data, tmp_path / "none", at)
        assert "it answers, but does not let us in" in done.err
        assert "this process has none: copy the file ~/.ray/auth_token of its head" in done.err
        assert (done.code, "Traceback" in done.err) == (2, False)
        assert not (tmp_path / "none/0").exists()

        cluster.one.environment["RAY_AUTH_MODE"] = "token"
        done = batch(cluster.one, data, tmp_path / "none", at)
        assert "asks for a token: copy the file ~/.ray/auth_token of its head" in done.err
        assert (done.code, "Traceback" in done.err) == (2, False)

        # A file that is there is enough: nobody must set the mode.
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray/auth_token").write_text(cluster.token.read_text())
        del cluster.one.environment["RAY_AUTH_MODE"]
        done = batch(cluster.one, data, tmp_path / "some", at, "seed=1")
        assert done.code == 0, done.out + done.err
        cluster.one.environment.update(known)


def test_nodes_need_tl(image_folder, tmp_path):
    data = image_folder()
    with ray_cluster(cpus=(0, 2), bare=True) as cluster:
        at = f"hydra.launcher.address={cluster.address}"
        done = batch(cluster.one, data, tmp_path / "batch", at, "seed=1,2")
        assert "workers ended without beginning a job" in done.err
        assert "two (" in done.err
        assert "cannot import tl (No module named 'tl'); install tl" in done.err
        assert (done.code, "Traceback" in done.err) == (1, False)


def test_nodes_need_the_folder_of_the_batch(image_folder, tmp_path):
    data, own = image_folder(), tmp_path / "own"
    own.mkdir()
    with ray_cluster(cpus=(0, 2)) as cluster:
        assert cluster.one.run(["mount", "-t", "tmpfs", "tmpfs", own]).returncode == 0
        at = f"hydra.launcher.address={cluster.address}"
        done = batch(cluster.one, data, own / "batch", at, "seed=1,2")
        place = f"two does not see {own / 'batch'}: output_dir must be on a disk of all nodes"
        assert place in done.err
        assert (done.code, "Traceback" in done.err) == (1, False)


def test_a_job_that_is_too_large_for_this_machine_is_refused(image_folder, tmp_path):
    data = image_folder()
    with hosts(["one"], {**VARIABLES, "HOME": str(tmp_path)}) as found:
        large = "hydra.launcher.num_cpus=500"
        done = batch(found["one"], data, tmp_path / "batch", large, "seed=1")
        done.refused("Ray has no room for a job that asks for 500 CPU; its nodes have")
        unknown = "hydra.launcher.options={colour: blue}"
        done = batch(found["one"], data, tmp_path / "batch", unknown, "seed=1")
        done.refused("Ray refuses what a job asks for: Invalid option keyword colour")
