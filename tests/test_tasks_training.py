"""Training for one class, several labels and a number, on every path, with weights and balance."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from tl.config import ActivationsConfig, Imbalance, Task, compose
from tl.data import DataError, ImageDataModule
from tl.data.table import ImageTable
from tl.decision import decide
from tl.finetuning import build_plan
from tl.models import Weights, build_model
from tl.training import gather_evidence, judge, prepare, run_plan, with_head
from tl.training.confirming import compare, image_scores, try_plan
from tl.training.standins import class_counts, classes_of, middle

NAMES = ("red", "green", "blue")
SIZES = {"train": 40, "val": 20, "test": 12}
SMALL = ["experiment=smoke", "model=test_efficientnet", "augment=none", "imbalance=none"]
PROBE = ["finetune=linear_probe", "finetune.epochs=30", "finetune.head_lr=0.02"]
PARTIAL = ["finetune=partial", "finetune.epochs=3", "finetune.head_lr=0.02"]
FULL = ["finetune=full", "finetune.epochs=2", "finetune.head_lr=0.01"]


def tinted(folder: Path, task: Task, *, weights: bool = False) -> ImageTable:
    """Images whose channels are bright or dark; the labels say which, the number how bright."""
    rng = np.random.default_rng(0)
    rows = []
    for split, number in SIZES.items():
        for i in range(number):
            bright = rng.integers(0, 2, 3)
            if task is Task.single:
                bright = np.eye(3, dtype=int)[i % 3 if split != "train" else min(i // 12, 2)]
            level = rng.uniform(0, 1)
            colour = 60 + 130 * (bright if task is not Task.regression else np.full(3, level))
            pixels = np.clip(colour + rng.normal(0, 12, (32, 40, 3)), 0, 255).astype(np.uint8)
            path = folder / f"{split}{i:03d}.png"
            folder.mkdir(exist_ok=True)
            Image.fromarray(pixels).save(path)
            row = {"path": path.name, "split": split, "width": 40, "height": 32, "bytes": 1}
            row["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
            present = np.flatnonzero(bright).tolist()
            row["label"] = present[0] if present and task is not Task.regression else -1
            if task is Task.multi:
                row["labels"] = present
            if task is Task.regression:
                row["target"] = 1950 + 80 * level
            if weights:
                row["weight"] = rng.uniform(0.2, 3)
            rows.append(row)
    classes = ("year",) if task is Task.regression else NAMES
    return ImageTable(folder, classes, pd.DataFrame(rows), task=task)


def train(table: ImageTable, folder: Path, *overrides: str, mode: str = "auto"):
    config = compose("train", [*SMALL, *overrides, f"cache.mode={mode}"], {"data.root": "x"})
    prepare(config.trainer, config.seed)
    built = build_model(config.model, table.classes)
    if config.finetune.head.value != built.head:
        built = with_head(built, config.finetune.head)
    images = ImageDataModule.from_config(table, built.preprocessing, config)
    sizes = {"train_images": SIZES["train"], "batch_size": config.data.batch_size}
    facts: dict[str, dict[str, str]] = {}
    fit = run_plan(
        build_plan(config.finetune, built, **sizes),
        built,
        images,
        folder=folder,
        trainer=config.trainer,
        log_facts=lambda values, name: facts.update({name: values}),
        cache=config.cache,
        imbalance=config.imbalance,
        seed=config.seed,
    )
    return fit, images, facts


HEADLINE = {Task.single: "acc", Task.multi: "map", Task.regression: "mae"}
TASKS = pytest.mark.parametrize("task", Task)


@TASKS
def test_a_probe_learns_the_same_with_and_without_the_cache(task, tmp_path):
    table = tinted(tmp_path / "images", task, weights=True)
    plain, images, facts = train(table, tmp_path / "a", *PROBE, mode="off")
    held, *_ = train(table, tmp_path / "b", *PROBE, mode="on")
    assert [phase.cached for phase in (*plain.phases, *held.phases)] == [False, True]
    columns = ["train/loss", "val/loss", f"val/{HEADLINE[task]}"]
    pd.testing.assert_frame_equal(plain.history[columns], held.history[columns], rtol=2e-3)
    first, last = held.history["val/loss"].iloc[[0, -1]]
    assert last < 0.95 * first
    assert facts["loss"]["weights"].startswith("column weight, 0.2")
    reports, predictions = judge(held.predict, images)
    found, row = reports[0].metrics, held.history.sort_values("val/loss").iloc[0]
    assert found[HEADLINE[task]] == pytest.approx(row[f"val/{HEADLINE[task]}"], rel=1e-3)
    assert len(predictions) == SIZES["val"] + SIZES["test"]
    if task is Task.regression:
        assert found["r2"] > 0.5
        assert row["val/r2"] == pytest.approx(found["r2"], abs=1e-3)
        assert 1950 < predictions["predicted"].mean() < 2030
        assert facts["loss"]["target"].startswith("year: mean 19")
    else:
        assert found[HEADLINE[task]] > 0.75


@TASKS
def test_stages_train_on_cached_values_and_their_mixture_is_judged_by_the_task(task, tmp_path):
    table = tinted(tmp_path / "images", task)
    more = [
        "finetune=lp_partial",
        "finetune.epochs=3",
        "finetune.average=true",
        "finetune.ema=true",
    ]
    plain, *_ = train(table, tmp_path / "a", *more, mode="off")
    held, _, facts = train(table, tmp_path / "b", *more, "cache.views=0", mode="on")
    assert [p.cached for p in held.phases] == [True, True]
    columns = ["val/loss", f"val/{HEADLINE[task]}"]
    pd.testing.assert_frame_equal(
        plain.history[columns], held.history[columns], rtol=5e-3, atol=1e-3
    )
    mixed = next(values for name, values in facts.items() if name.endswith("-average"))
    assert held.predict.loss("val") == pytest.approx((mixed["loss"], mixed["score"]), rel=1e-3)
    assert held.phases[-1].best_score == pytest.approx(mixed["score"])


@TASKS
@pytest.mark.parametrize("weights", [False, True])
def test_mixed_images_have_mixed_targets(task, weights, tmp_path):
    table = tinted(tmp_path / "images", task, weights=weights)
    fit, *_ = train(table, tmp_path / "a", *FULL, "augment.mixup=0.4", "augment.cutmix=1")
    assert np.isfinite(fit.history[["train/loss", "val/loss"]]).all(axis=None)


@TASKS
def test_a_head_on_all_stages_chooses_its_features(task, tmp_path):
    table = tinted(tmp_path / "images", task)
    fit, _, facts = train(table, tmp_path / "a", "finetune=stage_probe", "finetune.epochs=10")
    assert "held-out Brier score" in facts["1-head-features"]["features"]["why"]
    history = fit.history["val/loss"]
    assert history.iloc[-1] < history.iloc[0]


# --- classes of different sizes -------------------------------------------------------------------


def recalls(table, folder, imbalance, mode):
    fit, images, facts = train(table, folder, *PROBE, f"imbalance={imbalance}", mode=mode)
    (report, _), _ = judge(fit.predict, images)
    return report.per_class["recall"].to_numpy(), fit, facts


@pytest.mark.parametrize("imbalance", ["weights", "sampler", "focal", "logit_adjustment"])
def test_what_is_done_about_classes_is_the_same_with_the_cache(imbalance, tmp_path):
    table = tinted(tmp_path / "images", Task.single)
    _, plain, facts = recalls(table, tmp_path / "a", imbalance, "off")
    _, held, _ = recalls(table, tmp_path / "b", imbalance, "on")
    columns = ["train/loss", "val/loss", "val/acc"]
    pd.testing.assert_frame_equal(plain.history[columns], held.history[columns], rtol=2e-3)
    assert facts["loss"]["imbalance"].startswith(f"{imbalance}: the largest class, blue, has 1.3")


def test_stages_see_the_classes_alike_with_the_cache_too(tmp_path):
    table = tinted(tmp_path / "images", Task.single)
    more = [*PARTIAL, "imbalance=sampler", "cache.views=0"]
    plain, *_ = train(table, tmp_path / "a", *more, mode="off")
    held, *_ = train(table, tmp_path / "b", *more, mode="on")
    assert held.phases[0].cached
    columns = ["train/loss", "val/loss"]
    pd.testing.assert_frame_equal(plain.history[columns], held.history[columns], rtol=5e-3)


def test_an_epoch_of_the_sampler_has_all_classes_alike(tmp_path):
    table = tinted(tmp_path / "images", Task.single)
    rows = table.rows.drop(
        np.flatnonzero((table.rows["label"] == 0) & (table.rows.split == "train"))[2:]
    )
    table = replace(table, rows=rows.reset_index(drop=True))
    fit, images, _ = train(table, tmp_path / "a", *PROBE, "imbalance=sampler", mode="off")
    assert len(fit.history) > 1
    batches = [batch["label"] for batch in images.train_dataloader()]
    counts = torch.bincount(torch.cat(batches), minlength=3)
    assert counts.sum() == 30
    assert counts.min() >= 8
    images.draws = None
    again = torch.bincount(torch.cat([b["label"] for b in images.train_dataloader()]))
    assert again.tolist() == [2, 12, 16]


def test_images_that_all_weigh_nothing_are_refused(tmp_path):
    table = tinted(tmp_path / "images", Task.single, weights=True)
    table.rows.loc[table.rows["split"] == "train", "weight"] = 0
    with pytest.raises(DataError, match="all training images have the weight 0"):
        train(table, tmp_path / "a", *PROBE)


# --- finetune=auto, and confirm -------------------------------------------------------------------


@pytest.mark.parametrize("task", [Task.multi, Task.regression])
def test_auto_measures_by_classes_in_their_place(task, tmp_path):
    table = tinted(tmp_path / "images", task)
    config = compose("train", SMALL, {"data.root": "x"})
    built = build_model(config.model, table.classes)
    built = replace(built, weights=Weights("some.safetensors", sha256="0"))
    images = ImageDataModule.from_config(table, built.preprocessing, config)
    evidence = gather_evidence(built, images, ActivationsConfig(), seed=0)
    assert evidence.similarity is not None
    assert evidence.similarity.quality.value > 0.3
    assert evidence.amount.images == SIZES["train"]
    assert evidence.amount.classes == (3 if task is Task.multi else 2)
    said = "rarest label" if task is Task.multi else "lower and upper half"
    decision = decide(evidence)
    assert any(said in text for text in (*evidence.warnings, *decision.warnings))


def test_classes_in_the_place_of_labels_and_numbers(tmp_path):
    table = tinted(tmp_path / "images", Task.multi)
    rows = table.split("train")
    marks = table.targets(rows)
    order = marks.sum(axis=0).argsort(kind="stable")
    found = classes_of(table, rows)
    for row, label in zip(marks, found, strict=True):
        wanted = next((c for c in order if row[c]), 3)
        assert label == wanted
    assert class_counts(table, rows).tolist() == marks.sum(axis=0).tolist()
    number = tinted(tmp_path / "numbers", Task.regression)
    assert class_counts(number, number.split("train")).tolist() == [20, 20]
    assert middle(np.array([0.0, 0, 0, 1])) == (0.0, False)
    assert middle(np.array([0.0, 1, 1, 1])) == (1.0, True)


@TASKS
def test_choice_and_neighbour_are_compared_by_the_scores_of_the_task(task, tmp_path):
    table = tinted(tmp_path / "images", task)
    config = compose("train", [*SMALL, *PROBE], {"data.root": "x"})
    prepare(config.trainer, config.seed)
    built = build_model(config.model, table.classes)
    images = ImageDataModule.from_config(table, built.preprocessing, config)
    tried = {}
    for lr in (0.02, 1e-6):
        finetune = replace(config.finetune, head_lr=lr, epochs=40)
        plan = build_plan(finetune, built, train_images=40, batch_size=8)
        tried[lr] = try_plan(
            "choice", plan, built, images, folder=tmp_path / f"{lr}", trainer=config.trainer,
            callbacks={}, cache=config.cache, imbalance=Imbalance.none, seed=0,
        )  # fmt: skip
    found = compare(tried[0.02], tried[1e-6])
    assert (found.kept, found.images) == ("choice", SIZES["val"])
    assert found.difference > 2 * found.error
    assert ("%" in found.why) == (task is not Task.regression)


def test_scores_of_an_image_are_higher_where_it_is_told_better():
    y = np.array([[1, 0, 0], [1, 1, 0]], np.float32)
    p = np.array([[0.9, 0.2, 0.1], [0.9, 0.2, 0.8]])
    assert image_scores(p, y, Task.multi).tolist() == pytest.approx([1, (1 + 2 / 3) / 2])
    assert image_scores(p, np.array([0, 2]), Task.single).tolist() == [1, 0]
    numbers = np.array([1.0, 4.0])
    assert image_scores(numbers, np.array([2.0, 4.5]), Task.regression).tolist() == [-1, -0.5]
    assert image_scores(np.array([[0.8]]), np.array([[1.0]]), Task.multi) == pytest.approx([0.8])
