"""Phases that read the activation cache train as those that read images, and say what they do."""

from __future__ import annotations

import json
import os
import stat

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from processes import finish, kill_when, start, timeless
from safetensors.torch import load_file

import tl
from tl.cache import ActivationCache
from tl.training.state import read_progress

SMALL = [
    "experiment=smoke",
    "model=test_efficientnet",
    "tracking.enabled=false",
    "export.enabled=false",
]
HEAD, LAST = "finetune=linear_probe", "finetune=partial"


@pytest.fixture
def train(tmp_path, monkeypatch, image_folder):
    """Train on the same images with one cache: settings to (run folder, result)."""
    monkeypatch.setenv("TL_CACHE_DIR", str(tmp_path / "cache"))
    data = image_folder(splits={"train": 13, "val": 5, "test": 4})

    def run(name, *overrides):
        settings = {"data.root": str(data), "output_dir": str(tmp_path / name)}
        small = [*SMALL, "model.image_size=64", "finetune.epochs=4", *overrides]
        config = tl.compose("train", small, settings)
        return tmp_path / name, tl.train(config)

    return run


def history(run):
    return pd.read_csv(run / "history.csv").drop(columns="seconds")


@pytest.mark.parametrize(
    "method",
    [
        [HEAD],
        [HEAD, "finetune.gradient_clip=0.01", "finetune.label_smoothing=0.1"],
        [HEAD, "finetune.optimizer=sgd"],
        [HEAD, "data.batch_size=13", "finetune.accumulate=3"],
        [HEAD, "model.drop_rate=0.3"],
        [LAST, "finetune.batch_norm=train"],
        ["finetune=lp_ft"],
    ],
    ids=lambda m: " ".join(m),
)
def test_without_augmentation_cached_and_uncached_phases_are_alike(train, method):
    off, plain = train("off", "augment=none", "cache=off", *method)
    on, cached = train("on", "augment=none", "cache=on", *method)
    phases, _ = read_progress(on / "checkpoints")
    assert [p.cached for p in phases] == [True, False][: len(phases)]
    assert [p.steps for p in phases] == [p.steps for p in read_progress(off / "checkpoints")[0]]
    left, right = history(off), history(on)
    rates = [name for name in left if name.startswith("lr/")]
    pd.testing.assert_frame_equal(left[rates], right[rates], rtol=1e-6, atol=1e-12)
    pd.testing.assert_frame_equal(left, right, rtol=2e-3, atol=1e-4)
    left, right = load_file(plain.weights), load_file(cached.weights)
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], rtol=1e-3, atol=1e-4)
    assert timeless(plain.metrics) == pytest.approx(timeless(cached.metrics), rel=1e-3, abs=1e-4)


def test_a_second_job_computes_nothing_and_finds_the_same(train, capsys):
    _, first = train("first", HEAD, "cache=on")
    assert "computed  " in capsys.readouterr().out
    _, second = train("second", HEAD, "cache=on")
    output = capsys.readouterr().out
    assert "nothing: all of it was in the cache" in output
    assert timeless(first.metrics) == timeless(second.metrics)
    _, third = train("third", HEAD, "cache=on", "finetune.head_lr=0.01")
    assert timeless(third.metrics) != timeless(first.metrics)


def test_a_head_learns_the_same_from_memory_and_from_the_files(train, monkeypatch):
    settings = (HEAD, "cache=on", "augment=light", "cache.views=2")
    held, first = train("held", *settings)
    monkeypatch.setattr("tl.training.cached.HELD_BYTES", 0)
    read, second = train("read", *settings)
    pd.testing.assert_frame_equal(history(held), history(read), rtol=1e-5)
    assert timeless(first.metrics) == pytest.approx(timeless(second.metrics), rel=1e-5)


def test_new_images_alone_are_computed(train, tmp_path, capsys):
    train("first", HEAD, "cache=on", "augment=none")
    for split in ("train", "val"):
        for path in sorted((tmp_path / "images" / split / "red").iterdir())[:2]:
            image = Image.open(path).transpose(Image.Transpose.ROTATE_180)
            image.save(path.with_name(f"turned_{path.name}"))
    capsys.readouterr()
    train("second", HEAD, "cache=on", "augment=none")
    assert "computed  4 views in" in capsys.readouterr().out
    kept = ActivationCache(tmp_path / "cache/activations", limit_bytes=10**9).shelves()
    assert [shelf.images for shelf in kept] == [3 * (13 + 5 + 4) + 4]


def test_views_are_kept_per_seed_and_each_epoch_reads_another(train, tmp_path):
    train("first", HEAD, "cache=on", "augment=light", "cache.views=2")
    cache = ActivationCache(tmp_path / "cache/activations", limit_bytes=10**9)
    assert sorted(shelf.images for shelf in cache.shelves()) == [39, 39, 66]
    train("other", HEAD, "cache=on", "augment=light", "cache.views=2", "seed=2")
    # Random weights are drawn from the seed, too, so the clean view is another one here.
    assert sorted(shelf.images for shelf in cache.shelves()) == [39, 39, 39, 39, 66, 66]
    train("clean", HEAD, "cache=on", "augment=light", "cache.views=0")
    assert len(cache.shelves()) == 6


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["cache=off", HEAD], "cache.mode is off"),
        (["cache=on", "finetune=full"], "every stage trains, nothing is frozen"),
        (["cache=on", HEAD, "augment.mixup=0.4"], "mixup and cutmix mix the pixels"),
        (["cache=auto", HEAD], "4 epochs of the whole model take only"),
        (["cache=on", HEAD, "cache.max_gb=0.000001"], "more than cache.max_gb allows"),
    ],
)
def test_why_a_phase_reads_images(train, capsys, overrides, reason):
    run, _ = train("run", *overrides)
    output = " ".join(capsys.readouterr().out.split())
    assert "activation cache: off why" in output
    assert reason in output
    assert not read_progress(run / "checkpoints")[0][0].cached


@pytest.mark.skipif(os.geteuid() == 0 and not hasattr(os, "chflags"), reason="root writes anywhere")
def test_a_cache_that_cannot_be_written_costs_one_warning(train, tmp_path, capsys):
    (tmp_path / "cache").mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    run, _ = train("run", HEAD, "cache=on")
    assert capsys.readouterr().out.count("warning: ") == 1
    assert not read_progress(run / "checkpoints")[0][0].cached


def test_a_file_where_the_cache_should_be_costs_one_warning(train, tmp_path, capsys):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/activations").write_text("not a folder")
    run, result = train("run", HEAD, "cache=on")
    output = capsys.readouterr().out
    assert output.count("warning: ") == 1
    assert "cannot be written" in output
    assert not read_progress(run / "checkpoints")[0][0].cached
    assert np.isfinite(result.metrics["val/loss"])


def test_frozen_batch_norm_and_dropout_stay_frozen(train):
    run, result = train(
        "run",
        LAST,
        "cache=on",
        "augment=light",
        "model.drop_rate=0.2",
        "model.drop_path_rate=0.1",
        "finetune.batch_norm=train",
    )
    assert read_progress(run / "checkpoints")[0][0].cached
    before = torch.load(run / "checkpoints/1-last/best.ckpt", weights_only=True)["state_dict"]
    state = load_file(result.weights)
    assert {name.split(".")[1] for name in before} == {"blocks", "conv_head", "bn2", "classifier"}
    assert all(torch.equal(value, state[name[6:]]) for name, value in before.items())


def test_kill_in_a_cached_phase_and_resume_equals_an_uninterrupted_run(image_folder, tmp_path):
    data = image_folder(splits={"train": 20, "val": 6})
    settings = [
        "experiment=smoke",
        "augment=light",
        "cache=on",
        "finetune=gradual",
        "finetune.epochs=6",
        "model.drop_rate=0.2",
        "model.image_size=64",
        "export.enabled=false",
        "tracking.enabled=false",
    ]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(start(f"data.root={data}", f"output_dir={whole}", *settings))
    victim = start(f"data.root={data}", f"output_dir={broken}", *settings)
    kill_when(victim, broken / "checkpoints/2-last_1/last.ckpt")
    assert not (broken / "metrics.json").exists()
    finish(start(f"resume={broken}"))
    left, right = (json.loads((run / "metrics.json").read_text()) for run in (whole, broken))
    assert timeless(left) == timeless(right)
    pd.testing.assert_frame_equal(history(whole), history(broken), check_exact=True)


def test_after_the_job_nothing_is_held(train, tmp_path):
    train("run", HEAD, "cache=on")
    kept = ActivationCache(tmp_path / "cache/activations", limit_bytes=10**9)
    assert kept.shelves()
    assert not any(shelf.in_use for shelf in kept.shelves())
