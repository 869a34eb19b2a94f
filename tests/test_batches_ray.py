"""Batches on Ray: what is refused before anything is started. Real clusters: tests/cluster."""

from __future__ import annotations

import pytest
from commands import TINY, script

from tl.batches.engines.ray_site import address_problem, options, plain
from tl.config import ConfigError
from tl.config.launchers import launcher_config
from tl.config.ray import RayConfig

BATCH = ["train", "-m", *TINY, "data.root=images", "seed=1,2", "output_dir=batch"]
RAY = "hydra/launcher=ray"


def test_without_ray_the_extra_to_install_is_named(tmp_path):
    (tmp_path / "ray.py").write_text("raise ModuleNotFoundError('no ray', name='ray')\n")
    done = script(*BATCH, RAY, PYTHONPATH=str(tmp_path))
    done.refused('hydra/launcher=ray needs ray: pip install "tl[ray]"')


def test_a_cluster_that_is_not_there_is_said_at_once():
    pytest.importorskip("ray")
    done = script(*BATCH, RAY, "hydra.launcher.address=127.0.0.1:1")
    done.refused("hydra.launcher.address=127.0.0.1:1: no cluster can be reached there", "refused")
    done.refused("ray start --head", "hydra.launcher.address=local")


def test_the_last_cluster_of_this_machine_may_be_gone(tmp_path):
    pytest.importorskip("ray")
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray/ray_current_cluster").write_text("127.0.0.1:1\n")
    done = script(*BATCH, RAY, "hydra.launcher.address=auto", RAY_TMPDIR=str(tmp_path))
    done.refused("hydra.launcher.address=127.0.0.1:1: no cluster can be reached there")


def test_all_wrong_settings_are_named_with_the_nearest_right_ones():
    wrong = {"adress": "auto", "num_cpus": "many", "num_gpus": "x"}
    with pytest.raises(ConfigError) as caught:
        launcher_config(RayConfig, wrong)
    text = str(caught.value)
    assert "hydra.launcher.adress is unknown; did you mean hydra.launcher.address?" in text
    assert "hydra.launcher.num_cpus must be a whole number, got 'many'" in text
    assert "hydra.launcher.num_gpus must be a number or null, got 'x'" in text
    with pytest.raises(ConfigError, match=r"hydra\.launcher\.num_cpus must be at least 1, got 0"):
        launcher_config(RayConfig, {"num_cpus": 0})


@pytest.mark.parametrize("address", ["head", "head:", "ray:/head:1", "http://head:1", "a b:1"])
def test_an_address_has_a_host_and_a_port(address):
    assert "write HOST:PORT, ray://HOST:PORT or auto" in address_problem(address)


def test_what_a_job_takes_is_what_ray_is_asked_for():
    asked = launcher_config(
        RayConfig,
        {"num_cpus": 3, "mem_gb": 1.5, "resources": {"a100": 1}, "options": {"name": "mine"}},
    )
    assert options(asked, gpus=0.5) == {
        "num_cpus": 3,
        "num_gpus": 0.5,
        "memory": 1610612736,
        "resources": {"a100": 1},
        "name": "mine",
    }


def test_errors_of_ray_are_cut_to_their_first_sentence():
    text = "Task failed because the node is dead. Node IP: 10.77.0.2, node ID: 9331\nmore"
    assert plain(RuntimeError(text)) == "Task failed because the node is dead"
    assert plain(RuntimeError("no such file: a.b. c")) == "no such file: a.b. c"
    assert plain(RuntimeError()) == "RuntimeError"
