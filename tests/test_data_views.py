"""Views of images: decoded once, drawn from seed, number and content, and from nothing else."""

from __future__ import annotations

import shutil

import pytest
import torch

from tl.bundle import Preprocessing
from tl.config import AugmentConfig, DataConfig
from tl.data import read_table
from tl.data.stores import Images
from tl.data.transforms import eval_transform
from tl.data.views import ViewDataset, is_random, view_key, view_loader

PREPROCESSING = Preprocessing(input_size=(3, 24, 24), mean=(0.5,) * 3, std=(0.25,) * 3)
LIGHT = AugmentConfig(hflip=0.5, crop_scale=[0.5, 1.0])


@pytest.fixture
def table(image_folder):
    return read_table(DataConfig(root=str(image_folder())), seed=0, cache_dir=None)


def views_of(table, numbers, *, seed=0, order=slice(None), root=None, augment=LIGHT):
    rows = table.split("train")[order]
    return ViewDataset(
        Images.of_files(root or table.root, rows["path"]),
        rows["sha256"].tolist(),
        numbers,
        augment=augment,
        preprocessing=PREPROCESSING,
        seed=seed,
        max_pixels=10**6,
    )


def test_view_0_is_what_the_evaluation_sees(table):
    found = views_of(table, [0, 1])[3]["images"][0]
    with_timm = eval_transform(PREPROCESSING)
    from PIL import Image

    path = table.paths("train")[3]
    assert torch.equal(found, with_timm(Image.open(path).convert("RGB")))


def test_views_differ_and_repeat(table):
    first, again = (views_of(table, [0, 1, 2])[0]["images"] for _ in range(2))
    assert torch.equal(first, again)
    assert len({tuple(view.flatten().tolist()) for view in first}) == 3
    assert torch.equal(views_of(table, [2])[0]["images"][0], first[2])
    assert not torch.equal(views_of(table, [1], seed=1)[0]["images"][0], first[1])


def test_a_view_depends_on_the_content_alone(table, tmp_path):
    shutil.copytree(table.root, tmp_path / "moved")
    there = views_of(table, [1], root=tmp_path / "moved", order=slice(4, None))[0]["images"]
    assert torch.equal(there, views_of(table, [1])[4]["images"])


def test_torchs_generator_is_left_as_found(table):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    views_of(table, [1, 2])[0]
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_keeps_the_order(table, workers):
    dataset = views_of(table, [0, 1])
    batches = list(view_loader(dataset, batch_views=8, workers=workers))
    assert [len(b["images"]) for b in batches] == [4, 4, 4, 4, 2]
    assert torch.cat([b["index"] for b in batches]).tolist() == list(range(18))
    assert torch.equal(batches[1]["images"][2], dataset[6]["images"])


def test_keys_tell_views_apart():
    keys = [
        view_key(0, LIGHT, 0),
        view_key(1, LIGHT, 0),
        view_key(2, LIGHT, 0),
        view_key(1, LIGHT, 1),
        view_key(1, AugmentConfig(hflip=0.4), 0),
    ]
    assert len({str(key) for key in keys}) == 5
    assert view_key(0, LIGHT, 0) == view_key(0, AugmentConfig(), 7), "clean is clean"
    assert view_key(1, LIGHT, 0) == view_key(1, AugmentConfig("x", 0.5, crop_scale=[0.5, 1.0]), 0)


def test_what_is_random():
    assert is_random(LIGHT)
    assert not is_random(AugmentConfig())
    assert not is_random(AugmentConfig("none", mixup=0.4)), "that mixes batches, not single images"
