"""The folder of a run: names, what is written when, golden images, and what resuming allows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tl
from tl.config import ConfigError, DataConfig, ModelConfig, compose
from tl.data import read_table
from tl.finetuning import build_plan
from tl.models import build_model
from tl.runs import (
    RunError,
    RunFolder,
    create,
    golden_images,
    job_params,
    open_run,
    read_config,
    refuse_changes,
    run_name,
)


@pytest.fixture
def job(image_folder):
    """Config, table, model and plan of a small job."""
    root = image_folder()
    config = compose(
        "train",
        ["experiment=smoke", "finetune=partial", "model=test_efficientnet"],
        {"data.root": str(root)},
    )
    table = read_table(DataConfig(root=str(root)), seed=0, cache_dir=None)
    built = build_model(ModelConfig(name="test_efficientnet", weights="none"), 3)
    plan = build_plan(config.finetune, built, train_images=18, batch_size=8)
    return config, table, built, plan


def test_the_default_folder_names_date_data_model_and_method(job):
    folder, _ = open_run(job[0])
    assert folder.path.parent == Path("runs").absolute()
    assert folder.path.name.endswith("_images_test_efficientnet_partial")
    assert run_name(job[0]) == "images · test_efficientnet · partial"
    assert not folder.path.exists(), "nothing is written before the request is known to be right"


def test_a_new_run_holds_its_config_plan_and_model(job, tmp_path):
    config, table, built, plan = job
    folder = RunFolder(tmp_path / "run")
    create(folder, config, table, built, plan)
    assert read_config(folder.path) == config
    assert json.loads((folder.path / "plan.json").read_text())["phases"][0]["name"] == "last"
    facts = folder.read_model()
    assert facts["classes"] == ["blue", "green", "red"]
    assert facts["data"]["images"] == 27
    assert facts["weights"]["source"] == "random"
    assert len(facts["golden"]) == 18


def test_a_folder_with_a_run_is_not_begun_again(job, tmp_path):
    config, table, built, plan = job
    create(RunFolder(tmp_path / "run"), config, table, built, plan)
    config.output_dir = str(tmp_path / "run")
    with pytest.raises(RunError, match=r"run holds a run already: resume= continues it"):
        open_run(config)


def test_golden_images_take_turns_among_the_classes(job):
    names = golden_images(job[1], 5)
    assert len(set(names)) == 5
    classes = [name.split("/")[1] for name in names]
    assert classes == ["blue", "green", "red", "blue", "green"]
    assert all(name.startswith("train/") for name in names)
    assert golden_images(job[1], 64) == golden_images(job[1], 18)


def test_parameters_are_flat_and_say_what_the_phases_are(job):
    params = job_params(*job)
    assert params["finetune.method"] == "partial"
    assert params["phase.last.head_lr"] == 0.001
    assert params["phase.last.optimizer"] == "adamw"
    assert params["augment.auto"] == "none"
    assert params["data.images"] == 27
    assert params["model.weights_sha256"] == job[2].weights.sha256
    assert not any(isinstance(value, dict) for value in params.values())
    assert not any(key.startswith(("resume", "output_dir", "finetune.phases")) for key in params)


def resumed(job, tmp_path, *overrides, **values):
    config, table, built, plan = job
    create(RunFolder(tmp_path / "run"), config, table, built, plan)
    return compose("train", list(overrides), {"resume": str(tmp_path / "run"), **values})


def test_resume_takes_the_config_of_the_run(job, tmp_path):
    folder, config = open_run(resumed(job, tmp_path))
    assert folder.resumed
    assert config.finetune == job[0].finetune
    assert config.data == job[0].data


def test_resume_refuses_what_would_make_it_another_run(job, tmp_path):
    config = resumed(job, tmp_path, "finetune=full", "seed=4", "data.batch_size=8")
    with pytest.raises(ConfigError) as caught:
        refuse_changes(["finetune", "seed", "data.batch_size", "resume"], config)
    problems = caught.value.problems
    assert len(problems) == 3
    assert problems[0].startswith("resume: finetune was ")
    assert problems[1] == "resume: seed was 0 when the run began, and is 4 now"
    assert "leave these out, or begin a new run" in problems[2]


def test_resume_accepts_what_is_as_it_was(job, tmp_path):
    config = resumed(job, tmp_path, "data.batch_size=8", **{"data.root": job[0].data.root})
    refuse_changes(["data.root", "data.batch_size", "resume", "output_dir"], config)


def test_resume_needs_a_run(tmp_path):
    config = compose("train", [], {"resume": str(tmp_path)})
    with pytest.raises(RunError, match=r"is no run: it has no config.yaml"):
        tl.train(config)
