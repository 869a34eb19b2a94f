"""Choice and neighbour, compared image by image: which stays, and what is left of the attempt."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tl.config import ActivationsConfig, DataConfig, ModelConfig, compose
from tl.data import ImageDataModule, read_table
from tl.finetuning import build_plan
from tl.models import build_model
from tl.module import TrainingError
from tl.training.confirming import RESULT, Tried, clear_away, compare, try_plan, uncompared

TRAINER = {"_target_": "pytorch_lightning.Trainer", "accelerator": "cpu", "logger": False}


def tried(correct: str, trained: int, method: str = "method") -> Tried:
    return Tried(method, trained, 1.0, tuple(c == "+" for c in correct))


def test_the_better_by_more_than_one_standard_error_stays():
    choice, neighbour = tried("+" * 18 + "--", 100, "big"), tried("+" * 12 + "-" * 8, 10, "small")
    found = compare(choice, neighbour)
    # Six of twenty differ, all in one direction: mean 0.3, error sqrt(0.3 * 0.7 / 19).
    assert (found.difference, found.error) == pytest.approx((0.3, np.sqrt(0.3 * 0.7 / 19)))
    assert (found.kept, found.images) == ("choice", 20)
    assert found.why == (
        "big was better than small: 90.0 % against 60.0 % of 20 validation images, "
        "standard error of the difference 10.5 points"
    )
    assert compare(neighbour, choice).kept == "neighbour"
    assert compare(neighbour, choice).difference == pytest.approx(-0.3)


@pytest.mark.parametrize("one", ["+" * 19 + "-", "-" + "+" * 19, "+" * 20])
def test_one_image_decides_nothing_and_the_cheaper_stays(one):
    same = "+" * 20
    assert compare(tried(one, 100), tried(same, 10)).kept == "neighbour"
    assert compare(tried(one, 10), tried(same, 100)).kept == "choice"
    assert compare(tried(one, 10), tried(same, 10)).kept == "choice"
    assert "no clear difference" in compare(tried(one, 100), tried(same, 10)).why


def test_differences_are_paired():
    # Unpaired, 50 % against 60 % of 20 images would be within one standard error.
    base = "+" * 10 + "-" * 10
    better = "+" * 12 + "-" * 8
    mixed = "-" * 4 + "+" * 12 + "-" * 4 + "+" * 0
    assert compare(tried(better, 100), tried(base, 10)).kept == "choice"
    assert compare(tried(mixed, 100), tried(base, 10)).kept == "neighbour"


def test_one_validation_image_decides_nothing():
    assert compare(tried("+", 100), tried("-", 10)).kept == "neighbour"
    assert uncompared("a", "b", reason="why").kept == "choice"


@pytest.fixture
def job(image_folder):
    """Model, data and plan of a small job of eight epochs."""
    root = image_folder()
    config = compose("train", ["finetune=lp_ft", "finetune.epochs=8"], {"data.root": str(root)})
    table = read_table(DataConfig(root=str(root)), seed=0, cache_dir=None)
    built = build_model(ModelConfig(name="test_resnet", weights="none", image_size=32), 3)
    images = ImageDataModule(
        table, built.preprocessing, config.augment, batch_size=8, num_workers=0, seed=0
    )
    return built, images, build_plan(config.finetune, built, train_images=18, batch_size=8)


def attempt(job, folder: Path) -> Tried:
    built, images, plan = job
    return try_plan(
        "choice", plan, built, images, folder=folder,
        trainer=TRAINER, callbacks={}, cache=ActivationsConfig(), seed=0,
    )  # fmt: skip


def test_a_quarter_of_the_epochs_and_the_model_stays_as_it_was(job, tmp_path):
    built = job[0]
    before = {k: v.clone() for k, v in built.model.state_dict().items()}
    flags = [p.requires_grad for p in built.model.parameters()]
    found = attempt(job, tmp_path / "confirm-choice")
    progress = json.loads((tmp_path / "confirm-choice/progress.json").read_text())
    assert [phase["epochs"] for phase in progress["phases"]] == [2, 2]
    assert (len(found.scores), found.method) == (9, "lp_ft")
    assert found.trained == sum(p.numel() for p in built.model.parameters())
    after = built.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [p.requires_grad for p in built.model.parameters()] == flags


def test_what_was_tried_is_not_tried_again(job, tmp_path):
    first = attempt(job, tmp_path / "c")
    clear_away([tmp_path / "c"])
    left = {p.name for p in (tmp_path / "c").rglob("*") if p.is_file()}
    assert {RESULT, "progress.json"} <= left
    assert not any(name.endswith((".ckpt", ".safetensors")) for name in left)
    assert attempt(job, tmp_path / "c") == first
    (tmp_path / "c" / RESULT).write_text("{")
    with pytest.raises(TrainingError, match=r"confirm.json cannot be read .* resume= tries it"):
        attempt(job, tmp_path / "c")
