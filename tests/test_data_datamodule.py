"""Loaders: batches depend on seed and epoch alone; nothing is lost, and errors stay readable."""

from __future__ import annotations

import multiprocessing
import os
import signal

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import nn

from tl.bundle import Preprocessing
from tl.config import AugmentConfig, AutoAugment, DataConfig
from tl.data import DataError, ImageDataModule, ImageDataset, read_table, train_transform
from tl.data.datamodule import EpochSampler, default_workers, mixed_seed

PREPROCESSING = Preprocessing((3, 24, 24), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", 0.9)
STRONG = AugmentConfig(
    hflip=0.5,
    crop_scale=[0.3, 1.0],
    color_jitter=0.4,
    rotate=20,
    auto=AutoAugment.trivial,
    erasing=0.3,
)


def data_of(root, *, augment=STRONG, batch_size=4, num_workers=0, seed=0):
    table = read_table(DataConfig(root=str(root)), seed=seed, cache_dir=None)
    return ImageDataModule(
        table, PREPROCESSING, augment, batch_size=batch_size, num_workers=num_workers, seed=seed
    )


def epoch_of(loader, epoch=0):
    loader.sampler.set_epoch(epoch)
    return list(loader)


def images_by_index(batches):
    rows = [(i, x) for b in batches for i, x in zip(b["index"].tolist(), b["image"], strict=True)]
    return dict(rows)


def order(batches):
    return [i for batch in batches for i in batch["index"].tolist()]


# --- determinism --------------------------------------------------------------------------------


def test_item_is_a_function_of_seed_epoch_and_index(image_folder):
    table = read_table(DataConfig(root=str(image_folder())), seed=0, cache_dir=None)
    labels = table.targets("train")

    def make(seed):
        transform = train_transform(STRONG, PREPROCESSING)
        return ImageDataset(table.images("train"), labels, transform, seed=seed)

    one, other = make(0), make(1)
    first = one[2, 5]
    torch.manual_seed(123)  # the state of the world must not matter
    one[0, 1], one[2, 4]
    again = one[2, 5]
    assert torch.equal(first["image"], again["image"])
    assert (first["label"], first["index"]) == (labels[5], 5)
    assert not torch.equal(first["image"], one[3, 5]["image"])
    assert not torch.equal(first["image"], other[2, 5]["image"])
    assert torch.equal(one[0, 5]["image"], one[5]["image"])


def test_global_generators_are_left_as_found(image_folder):
    dataset = data_of(image_folder()).dataset("train", augment=True)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    numpy_state = np.random.get_state()[1].tobytes()
    dataset[0, 0], dataset[1, 3]
    assert torch.equal(torch.rand(3), expected)
    assert np.random.get_state()[1].tobytes() == numpy_state


def test_seeds_do_not_collide():
    seeds = {
        mixed_seed(d, s, e, i)
        for d in (0, 1)
        for s in range(5)
        for e in range(5)
        for i in range(99)
    }
    assert len(seeds) == 2 * 5 * 5 * 99
    assert mixed_seed(1, 0, 0, 0) == mixed_seed(1, 0, 0, 0)


def test_batches_do_not_depend_on_the_number_of_workers(image_folder):
    root = image_folder(splits={"train": 11, "val": 3})
    alone, helped = data_of(root, num_workers=0), data_of(root, num_workers=2)
    one, two = alone.train_dataloader(), helped.train_dataloader()
    for epoch in (0, 1, 3):
        for a, b in zip(epoch_of(one, epoch), epoch_of(two, epoch), strict=True):
            assert torch.equal(a["image"], b["image"])
            assert torch.equal(a["label"], b["label"])
            assert torch.equal(a["index"], b["index"])


def test_order_is_a_function_of_seed_and_epoch(image_folder):
    root = image_folder()
    loader = data_of(root).train_dataloader()
    first, second, back = (order(epoch_of(loader, epoch)) for epoch in (0, 1, 0))
    assert sorted(first) == list(range(18))
    assert first == back
    assert first != second
    assert first != order(epoch_of(data_of(root, seed=1).train_dataloader()))
    # Seed and epoch are not simply added up.
    assert second != order(epoch_of(data_of(root, seed=1).train_dataloader(), 0))


def test_phases_differ_by_the_epoch_offset(image_folder):
    data = data_of(image_folder())
    plain = epoch_of(data.train_dataloader(), epoch=5)
    data.epoch_offset = 3
    moved = epoch_of(data.train_dataloader(), epoch=2)
    assert order(plain) == order(moved)
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(plain, moved, strict=True))
    assert order(epoch_of(data.train_dataloader(), epoch=5)) != order(plain)


class Recorder(pl.LightningModule):
    """The smallest module that learns; writes down what it was given in each epoch."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3 * 24 * 24, 3)
        self.train_seen, self.val_seen = {}, {}

    def training_step(self, batch, _):
        seen = self.train_seen.setdefault(self.current_epoch, {})
        seen.update(images_by_index([batch]))
        return nn.functional.cross_entropy(self.net(batch["image"].flatten(1)), batch["label"])

    def validation_step(self, batch, _):
        self.val_seen.setdefault(self.current_epoch, []).extend(batch["index"].tolist())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(data, module=None, **options):
    module = module or Recorder()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "log_every_n_steps": 1}
    pl.Trainer(**quiet | {"max_epochs": 2} | options).fit(module, datamodule=data)
    return module


@pytest.mark.parametrize("num_workers", [0, 2])
def test_lightning_sets_the_epoch_before_the_first_batch(image_folder, num_workers):
    data = data_of(image_folder(), num_workers=num_workers)
    module = fit(data, max_epochs=3)
    dataset = data.dataset("train", augment=True)
    for epoch in range(3):
        assert list(module.train_seen[epoch]) == order(epoch_of(data.train_dataloader(), epoch))
        for index, image in module.train_seen[epoch].items():
            assert torch.equal(image, dataset[epoch, index]["image"])
        assert module.val_seen[epoch][-9:] == list(range(9))


def test_overfit_batches_of_lightning_work(image_folder):
    module = fit(data_of(image_folder()), overfit_batches=1)
    assert list(module.train_seen[0]) == list(module.train_seen[1])


# --- batches ------------------------------------------------------------------------------------


def test_shapes_and_types(image_folder):
    data = data_of(image_folder(splits={"train": 4, "val": 2, "test": 3}))
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (4, 3, 24, 24)
    assert batch["image"].dtype == torch.float32
    assert batch["label"].dtype == batch["index"].dtype == torch.int64
    sizes = [
        order(epoch_of(getattr(data, f"{name}_dataloader")()))
        for name in ("val", "test", "predict")
    ]
    assert [len(size) for size in sizes] == [6, 9, 27]


def test_evaluation_loader_has_all_rows_in_order_unchanged(image_folder):
    data = data_of(image_folder())
    batches = list(data.loader("train"))
    assert order(batches) == list(range(18))
    labels = torch.cat([batch["label"] for batch in batches]).tolist()
    assert labels == data.table.split("train")["label"].tolist()
    image = Image.open(data.table.paths("train")[7]).convert("RGB")
    torch.testing.assert_close(images_by_index(batches)[7], torch.tensor(PREPROCESSING(image)))


def test_augmented_loader_has_the_changes_of_training(image_folder):
    data = data_of(image_folder())
    changed, trained = data.loader("train", augment=True), data.train_dataloader()
    one, two = images_by_index(list(changed)), images_by_index(epoch_of(trained, 0))
    assert order(list(changed)) == list(range(18))
    assert all(torch.equal(one[i], two[i]) for i in range(18))


@pytest.mark.parametrize(
    ("images", "batch_size", "batches"),
    [
        (3, 4, [4, 4]),  # 9 images: the ninth would stand alone
        (3, 5, [5, 4]),
        (3, 9, [9]),
        (3, 100, [9]),
        (3, 1, [1] * 9),
        (3, 8, [8]),
        (3, 2, [2] * 4),
    ],
)
def test_last_batch_of_one_is_dropped_and_nothing_else(image_folder, images, batch_size, batches):
    data = data_of(image_folder(splits={"train": images, "val": images}), batch_size=batch_size)
    assert [len(batch["label"]) for batch in data.train_dataloader()] == batches
    assert sum(len(batch["label"]) for batch in data.val_dataloader()) == 9
    assert sum(len(batch["label"]) for batch in data.loader("train")) == 9


def test_mix_follows_the_config(image_folder):
    root = image_folder()
    assert data_of(root).mix is None
    data = data_of(root, augment=AugmentConfig(mixup=0.2))
    batch = next(iter(data.train_dataloader()))
    images, soft = data.mix(batch["image"], batch["label"])
    assert images.shape == (4, 3, 24, 24)
    assert soft.shape == (4, 3)


# --- processes ----------------------------------------------------------------------------------


def test_sampler_shares_images_between_processes():
    parts = [
        [index for _, index in EpochSampler(10, seed=0, shuffle=True, num_replicas=4, rank=rank)]
        for rank in range(4)
    ]
    assert [len(part) for part in parts] == [3, 3, 3, 3]
    together = [index for group in zip(*parts, strict=True) for index in group]
    assert sorted(together[:10]) == list(range(10))
    assert together[10:] == together[:2]


def test_few_images_or_little_shared_memory_need_no_workers(monkeypatch, caplog):
    assert default_workers(63, 1) == 0
    assert default_workers(64, 1) == min(8, len(os.sched_getaffinity(0)))
    assert default_workers(10_000, 2**60) == 0
    assert "has room for the batches of 0 workers only" in caplog.text


def test_workers_ignore_ctrl_c(image_folder):
    data = data_of(image_folder(splits={"train": 40, "val": 2}), num_workers=2)
    loader = data.train_dataloader()
    batches = iter(loader)
    first = next(batches)
    for worker in loader._iterator._workers:
        os.kill(worker.pid, signal.SIGINT)
    rest = list(batches)
    assert len(first["label"]) + sum(len(batch["label"]) for batch in rest) == 120
    assert all(worker.is_alive() for worker in loader._iterator._workers)


def test_failing_step_leaves_no_workers(image_folder):
    class Failing(Recorder):
        def training_step(self, batch, _):
            raise RuntimeError("no luck")

    with pytest.raises(RuntimeError, match="no luck"):
        fit(data_of(image_folder(), num_workers=2), module=Failing())
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("num_workers", [0, 2])
def test_image_that_went_bad_is_one_clear_message(image_folder, num_workers):
    data = data_of(image_folder(), num_workers=num_workers)
    victim = data.table.paths("val")[4]
    victim.write_bytes(victim.read_bytes()[:200])
    with pytest.raises(DataError) as caught:
        list(data.val_dataloader())
    text = str(caught.value)
    assert text.startswith(f"{victim}: truncated")
    assert text.endswith("Was it changed while the job ran?")
    assert "\n" not in text
    assert "Traceback" not in text
    assert multiprocessing.active_children() == []
