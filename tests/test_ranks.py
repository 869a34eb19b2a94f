"""Where a process stands, who may start several, and what each of them reads of a step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tl import ranks
from tl.config import ConfigError, compose
from tl.data.blocks import BlockSampler
from tl.data.sampling import EpochSampler
from tl.launching import processes
from tl.ranks import Place, agree, alike, gather, in_turn, on_first, place
from tl.runs import RunError, end_job, open_run
from tl.runs.again import note_job

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_WORLD_SIZE": "2",
}
STEP = {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
}
KNOWN = [*TORCHRUN, *STEP, "SLURM_JOB_ID", "SLURM_CLUSTER_NAME", "TORCHELASTIC_RUN_ID", "TL_JOB_ID"]


@pytest.fixture(autouse=True)
def nobody_around(monkeypatch):
    for name in KNOWN:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def around(monkeypatch):
    """Sets what a launcher says of itself."""

    def put(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


# --- where it stands ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({}, Place()),
        (TORCHRUN, Place(3, 4, 1, 2, 2, "torchrun")),
        (STEP, Place(3, 4, 1, 2, 2, "srun")),
        # torchrun within a step; a batch script and a job of one task are alone
        ({**STEP, **TORCHRUN, "RANK": "0"}, Place(0, 4, 1, 2, 2, "torchrun")),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, Place()),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, Place()),
        ({"RANK": "1", "WORLD_SIZE": "2"}, Place(1, 2, 0, 2, 1, "torchrun")),
    ],
)
def test_the_environment_says_where_a_process_stands(variables, found, around):
    around(variables)
    assert place() == found


def test_one_process_talks_to_nobody():
    assert agree(3) == 3
    assert gather("a") == ["a"]
    assert on_first(lambda: 4)() == 4
    assert in_turn(lambda: 5)() == 5
    assert alike(lambda: 6, ValueError) == 6
    with pytest.raises(ValueError, match="as it is"):
        alike(lambda: (_ for _ in ()).throw(ValueError("as it is")), ValueError)
    with ranks.joined():
        assert (ranks.rank(), ranks.world(), ranks.grouped()) == (0, 1, False)


# --- who starts them ------------------------------------------------------------------------------

DDP = {"strategy": "ddp", "accelerator": "cpu", "devices": "auto", "num_nodes": None}


def test_without_a_launcher_a_job_starts_what_its_trainer_asks_for():
    assert processes({"devices": 1}, 8) == 1
    assert processes(DDP, 8) == 1
    assert processes({**DDP, "devices": 2}, 8) == 2
    assert processes({**DDP, "devices": [0, 2, 3]}, 8) == 3
    assert processes({**DDP, "devices": "0,1"}, 8) == 2


@pytest.mark.parametrize(
    ("trainer", "batch_size", "message"),
    [
        (
            {**DDP, "num_nodes": 2},
            8,
            "num_nodes=2 needs the command on each of the hosts",
        ),
        (
            {**DDP, "devices": 4},
            3,
            "data.batch_size=3 is that of all processes together",
        ),
        ({"devices": 2, "strategy": "ddp_spawn"}, 8, "ddp_spawn starts processes in the middle"),
        ({**DDP, "sync_batchnorm": True}, 8, "trainer.sync_batchnorm: torch's own layers would"),
    ],
)
def test_what_cannot_be_is_refused(trainer, batch_size, message):
    with pytest.raises(ConfigError, match=message):
        processes(trainer, batch_size)


@pytest.mark.parametrize(
    ("trainer", "problem"),
    [
        (DDP, ""),
        ({**DDP, "devices": 2, "num_nodes": 2}, ""),
        ({**DDP, "devices": 4}, "devices=4, but torchrun started 2 processes on each host"),
        (
            {**DDP, "num_nodes": 1},
            "num_nodes=1, but torchrun runs on 2 hosts: leave it out",
        ),
        (
            {"devices": 1},
            "devices=1, but torchrun started 2 .* trainer=ddp or trainer=fsdp",
        ),
    ],
)
def test_a_launcher_is_followed_or_contradicted(trainer, problem, around):
    around(TORCHRUN)
    if not problem:
        assert processes(trainer, 8) == 1
        return
    with pytest.raises(ConfigError, match=problem):
        processes(trainer, 8)


# --- what each reads ------------------------------------------------------------------------------


def steps_of(make, images, batch_size, world, **settings):
    """Own images of each step, for each process, and how many batches each has."""
    found, batches = [], []
    for rank in range(world):
        sampler = make(
            images, seed=3, batch_size=batch_size, num_replicas=world, rank=rank, **settings
        )
        read = [index for _, index in sampler]
        assert len(read) == len(sampler) == sampler.own + sampler.repeated
        size = sampler.batch_size
        parts = [read[i : i + size] for i in range(0, len(read), size)]
        batches.append(len(parts))
        own = [part[: sampler.share(step)] for step, part in enumerate(parts)]
        found.append(own)
        total = sum(sampler.whole(step) for step in range(len(parts)))
        assert total == sampler.images_read
    return found, batches


@pytest.mark.parametrize("images", [1, 2, 5, 16, 17, 33, 35, 64])
@pytest.mark.parametrize(("batch_size", "world"), [(16, 2), (16, 3), (5, 4), (4, 4), (7, 1)])
@pytest.mark.parametrize("drop_last", [False, True])
def test_a_step_is_that_of_one_process(images, batch_size, world, drop_last):
    settings = {"shuffle": True, "drop_last": drop_last}
    (alone,), _ = steps_of(EpochSampler, images, batch_size, 1, **settings)
    parts, batches = steps_of(EpochSampler, images, batch_size, world, **settings)
    assert set(batches) == {len(alone)}, "every process takes part in every step"
    for step, one in enumerate(alone):
        assert sorted(i for part in parts for i in part[step]) == sorted(one)
    assert not drop_last or images == 1 or len(alone[-1]) > 1


@pytest.mark.parametrize(("batch_size", "world"), [(16, 2), (16, 3), (5, 4)])
def test_gradients_are_the_mean_over_all_images_of_a_step(batch_size, world):
    values = np.random.default_rng(0).normal(size=35)  # gradient of each image
    samplers = [
        EpochSampler(35, seed=0, shuffle=True, batch_size=batch_size, num_replicas=world, rank=r)
        for r in range(world)
    ]
    (alone,), _ = steps_of(EpochSampler, 35, batch_size, 1, shuffle=True)
    parts, _ = steps_of(EpochSampler, 35, batch_size, world, shuffle=True)
    for step, one in enumerate(alone):
        # As `TransferModule.training_step` weighs its loss, and DDP takes the mean.
        mine = [
            world * s.share(step) / s.whole(step) * (values[p[step]].mean() if p[step] else 0.0)
            for s, p in zip(samplers, parts, strict=True)
        ]
        assert np.mean(mine) == pytest.approx(values[one].mean())


@pytest.mark.parametrize(("batch_size", "world"), [(16, 2), (16, 3), (5, 4)])
def test_streamed_blocks_are_read_by_one_process_each(batch_size, world):
    blocks = np.arange(77) // 7

    def make(_, **settings):
        return BlockSampler(blocks, window=2, **settings)

    parts, batches = steps_of(make, 77, batch_size, world, shuffle=True)
    assert len(set(batches)) == 1
    assert sorted(i for part in parts for step in part for i in step) == list(range(77))
    read = [{i // 7 for step in part for i in step} for part in parts]
    assert sum(map(len, read)) <= 11 + 2 * (world - 1), "two blocks are mixed at a border"


# --- a job that is started again ------------------------------------------------------------------


@pytest.fixture
def begun(image_folder, tmp_path, around):
    """A run that a job has begun, and the job's config."""
    around({"TORCHELASTIC_RUN_ID": "night-7"})
    config = compose("train", [f"data.root={image_folder()}", f"output_dir={tmp_path / 'run'}"])
    folder, asked = open_run(config)
    assert not folder.resumed
    folder.make()
    note_job(folder)
    folder.write_config(asked)
    return config, folder


def test_the_same_job_goes_on_with_its_run(begun, around):
    config, folder = begun
    again, asked = open_run(config)
    assert (again.path, again.resumed, asked.resume) == (folder.path, True, str(folder.path))
    around({"TORCHELASTIC_RESTART_COUNT": "0", "RANK": "1", "WORLD_SIZE": "2"})  # counts nothing
    assert open_run(config)[0].resumed


@pytest.mark.parametrize("change", ["job", "settings", "ended", "no launcher"])
def test_another_job_is_refused_as_ever(begun, change, around, monkeypatch):
    config, folder = begun
    if change == "job":
        around({"TORCHELASTIC_RUN_ID": "night-8"})
    elif change == "settings":
        config = replace(config, seed=config.seed + 1)
    elif change == "ended":
        end_job(folder.path)
    else:
        monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    with pytest.raises(RunError, match="holds a run already: resume= continues it"):
        open_run(config)


def test_a_job_finds_the_folder_that_it_named_itself(image_folder, around, monkeypatch):
    around({"SLURM_JOB_ID": "12"})
    config = compose("train", [f"data.root={image_folder()}"])
    folder, asked = open_run(config)
    folder.make()
    note_job(folder)
    folder.write_config(asked)
    assert open_run(config)[0].path == folder.path
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    assert open_run(config)[0].path != folder.path


def test_a_job_has_the_names_that_outlive_its_processes(around):
    assert ranks.job_ids() == []
    around({"TL_JOB_ID": "nightly", "TORCHELASTIC_RUN_ID": "a", "SLURM_JOB_ID": "5"})
    assert ranks.job_ids() == ["named nightly", "torchrun a", "slurm  5"]
    around({"TORCHELASTIC_RUN_ID": "none"})  # torchrun's own where it got none: the agent, then
    first = ranks.job_ids()[1]
    assert first == ranks.job_ids()[1] != "torchrun none"
