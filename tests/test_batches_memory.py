"""What a job takes of memory: estimated from what a step takes, and only where it matters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest

from tl.batches.memory import estimate, job_memory
from tl.batches.resources import Machine
from tl.batches.sharing import gpus_wanted, shares
from tl.config import BatchConfig, compose

GB, MB = 10**9, 10**6
LOAD = "tl.pipelines.batches:load"
# As measured: a process, mobilenetv2_100, its steps with everything training.
FIGURES = {
    "process": 1040 * MB, "weights": 9 * MB, "trained": 9 * MB, "train": 80 * MB,
    "score": 26 * MB, "image": 602112,
}  # fmt: skip


def config_of(*overrides, **values):
    return compose("train", ["model=test_resnet", *overrides], {"data.root": "x", **values})


def never(*_args, **_kw):
    raise AssertionError("measured")


# --- the arithmetic -----------------------------------------------------------------------------


def test_images_of_a_step_what_trains_and_loader_processes_add_up():
    small = estimate(FIGURES, config_of("data.batch_size=16", "data.num_workers=0"), 2)
    large = estimate(FIGURES, config_of("data.batch_size=64", "data.num_workers=0"), 2)
    assert large - small == pytest.approx(1.05 * 48 * 80 * MB, rel=0.01)
    # 6 times what trains, twice the model, a process, and a little: measured 2.7 to 3.2 GB
    assert small == pytest.approx(1.05 * (1040 + 100 + 18 + 54 + 16 * 80) * MB, rel=0.01)
    two = estimate(FIGURES, config_of("data.batch_size=16", "data.num_workers=2"), 8)
    assert two > small + 2 * 2 * 60 * MB
    assert two == estimate(FIGURES, config_of("data.batch_size=16"), 2)  # one a core
    assert estimate(FIGURES, config_of("data.batch_size=16"), 8) > two


def test_a_head_alone_takes_what_a_pass_over_the_images_takes():
    head = {**FIGURES, "trained": 51_240, "train": 14 * MB, "score": 16 * MB}
    found = estimate(head, config_of("data.batch_size=64", "data.num_workers=0"), 2)
    assert found == pytest.approx(1.05 * (1040 + 100 + 18 + 64 * 16) * MB, rel=0.01)


# --- measured once ------------------------------------------------------------------------------


@pytest.mark.slow
def test_figures_are_asked_for_once_for_each_kind_of_job(tmp_path):
    place = {"cache.dir": str(tmp_path)}
    jobs = [config_of("data.batch_size=16", **place), config_of("data.batch_size=64", **place)]
    jobs.append(config_of("seed=3", "augment=strong", **place))  # neither takes memory
    said = []
    found = job_memory(jobs, 2, load=LOAD, say=said.append)
    assert said == ["measuring what 1 kind of job takes of memory"]
    (figures,) = json.loads((tmp_path / "footprints.json").read_text()).values()
    assert 400 * MB < figures["process"] < 3 * GB
    assert figures["weights"] == pytest.approx(1.8 * MB, rel=0.2)
    assert found.bytes == estimate(figures, jobs[1], 2)
    what = f"{jobs[1].model.name}, 64 images a batch"
    assert found.text == f"about {found.bytes / GB:.2g} GB a job ({what})"
    assert job_memory(jobs, 2, load=LOAD, say=said.append) == found
    assert len(said) == 1
    other = [config_of("finetune=linear_probe", **place), config_of("model.image_size=64", **place)]
    job_memory([*jobs, *other], 2, load=LOAD, say=said.append)
    assert said[1:] == ["measuring what 2 kinds of job take of memory"]
    by_size = sorted(json.loads((tmp_path / "footprints.json").read_text()).values(),
                     key=lambda figures: figures["image"])  # fmt: skip
    assert [f["image"] for f in by_size] == [4 * 3 * 64**2, 4 * 3 * 160**2, 4 * 3 * 160**2]
    assert by_size[0]["train"] < by_size[1]["train"]
    assert min(f["trained"] for f in by_size) < 0.1 * figures["trained"]  # a head alone


def test_a_damaged_memory_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", never)
    (tmp_path / "footprints.json").write_text("{rubbish")
    with pytest.raises(AssertionError, match="measured"):
        job_memory([config_of(**{"cache.dir": str(tmp_path)})], 2, load=LOAD)


def test_what_cannot_be_measured_is_said(tmp_path):
    config = config_of(**{"cache.dir": str(tmp_path)})
    found = job_memory([config], 2, load="tl.nowhere:load")
    assert found.bytes == 0
    assert found.text == "what a job takes of memory could not be measured"
    assert not (tmp_path / "footprints.json").exists() or not json.loads(
        (tmp_path / "footprints.json").read_text()
    )


# --- only where it matters ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "overrides", "at", "count", "memory"),
    [
        (
            BatchConfig(),
            ("model.image_size=32",),
            Machine(2, 24 * GB),
            2,
            pytest.approx(3.2e9, 0.1),
        ),
        (BatchConfig(jobs=1), (), Machine(2, 24 * GB), 1, 0),
        (BatchConfig(), (), Machine(1, 24 * GB), 1, 0),
        (BatchConfig(memory_gb=9), (), Machine(8, 24 * GB), 2, 9 * GB),
    ],
)
def test_nothing_is_measured_where_memory_is_not_the_limit(
    monkeypatch, batch, overrides, at, count, memory
):
    monkeypatch.setattr(subprocess, "Popen", never)
    found = shares(batch, [config_of(*overrides)] * 5, LOAD, never, at)
    assert (found.count, found.memory) == (count, memory)


def test_gpus_that_a_job_wants():
    assert gpus_wanted(config_of("trainer=cpu")) == 0
    assert gpus_wanted(config_of()) == gpus_wanted(config_of("trainer=gpu")) == 1
    assert gpus_wanted(config_of("trainer.devices=2")) == 2
    assert gpus_wanted(config_of("trainer.devices=[0,3]")) == 2
    everything = replace(config_of(), trainer={"devices": -1})
    assert gpus_wanted(everything) > 1000


# --- real ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_estimate_is_above_what_a_real_job_takes_and_not_far(image_folder, tmp_path):
    data = image_folder(splits={"train": 24, "val": 4}, size=(240, 240))
    cache = tmp_path / "cache"
    settings = ["model=mobilenetv2_100", "model.weights=none", "data.batch_size=48", "cache=off"]
    settings += [
        "finetune=full",
        "finetune.epochs=1",
        "tracking.enabled=false",
        "data.num_workers=0",
    ]
    found = job_memory(
        [compose("train", settings, {"data.root": str(data), "cache.dir": str(cache)})],
        2,
        load=LOAD,
    )
    job = subprocess.Popen(
        [sys.executable, "-m", "tl", "train", f"data.root={data}", *settings,
         f"output_dir={tmp_path / 'run'}"],
        env=os.environ | {"TL_CACHE_DIR": str(cache)}, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    peak = 0
    while job.poll() is None:
        try:
            peak = max(peak, psutil.Process(job.pid).memory_info().rss)
        except psutil.Error:
            break
        time.sleep(0.05)
    assert job.wait() == 0
    assert peak > 3 * GB
    assert peak < found.bytes < 1.6 * peak
