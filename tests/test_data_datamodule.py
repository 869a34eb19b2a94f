"""Loaders: batches depend on seed and epoch alone; nothing is lost, and errors stay readable."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import nn

from tl.bundle import Preprocessing
from tl.config import AugmentConfig, AutoAugment, DataConfig
from tl.data import DataError, ImageDataModule, ImageDataset, read_table, train_transform
from tl.data.loading import LoaderError, default_workers, explained
from tl.data.metering import Meter
from tl.data.sampling import EpochSampler, mixed_seed

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
    distance = images_by_index(batches)[7] - torch.tensor(PREPROCESSING(image))
    assert distance.abs().max() * 0.5 * 255 < 2.1  # levels; see test_data_transforms


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
    images, soft = data.mix(batch["image"], nn.functional.one_hot(batch["label"], 3).float())
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


@pytest.mark.parametrize("processes", [1, 3])
def test_weights_decide_how_often_an_image_is_drawn(processes):
    weights = np.array([0.0, 1, 1, 2, 4, 4])  # of 12

    def epoch(number, seed=0):
        found = []
        for rank in range(processes):
            sampler = EpochSampler(
                6, seed=seed, shuffle=True, weights=weights, num_replicas=processes, rank=rank
            )
            sampler.set_epoch(number)
            found.append([index for _, index in sampler])
        return found

    assert epoch(3) == epoch(3)
    assert epoch(3) != epoch(4)
    assert epoch(3) != epoch(3, seed=1)
    assert [len(part) for part in epoch(0)] == [6 // processes] * processes
    drawn = np.array([np.bincount(np.concatenate(epoch(n)), minlength=6) for n in range(400)])
    expected = weights / 12 * 6
    assert (np.abs(drawn - expected) < 1).all(), "rounded up or down, never further away"
    np.testing.assert_allclose(drawn.mean(0), expected, atol=0.1)


def test_weights_balance_classes_in_every_epoch():
    labels = np.array([0] * 900 + [1] * 90 + [2] * 10)
    weights = 1 / np.bincount(labels)[labels]
    sampler = EpochSampler(1000, seed=0, shuffle=True, weights=weights)
    order = sampler.order()[1].numpy()
    assert (np.abs(np.bincount(labels[order]) - 1000 / 3) < 20).all()
    assert np.bincount(order, minlength=1000)[:900].max() == 1, "no image twice without need"
    assert [index for _, index in sampler] == order.tolist(), "`order` is what is read"
    thirds = np.array([np.bincount(labels[order][i : i + 100], minlength=3) for i in (0, 450, 900)])
    assert (thirds > 15).all(), "classes are mixed"


@pytest.mark.parametrize("weights", [[1.0], [1, -1, 1], [1, np.nan, 1], [0, 0, 0]])
def test_weights_that_mean_nothing_are_refused(weights):
    with pytest.raises(ValueError, match="weights must be 3 numbers of 0 or more, not all 0"):
        EpochSampler(3, seed=0, shuffle=True, weights=np.array(weights))


def test_draws_reach_the_training_loader_alone(image_folder):
    data = data_of(image_folder())
    data.draws = np.array([1.0] * 6 + [0.0] * 12)
    assert sorted(order(data.train_dataloader())) == sorted([*range(6)] * 3)
    assert order(data.loader("train")) == list(range(18))


def test_weights_of_the_loss_are_in_the_batches(image_folder):
    data = data_of(image_folder())
    assert "weight" not in next(iter(data.train_dataloader()))
    data.table.rows["weight"] = np.arange(27, dtype=np.float32)
    batch = next(iter(data.train_dataloader()))
    assert batch["weight"].dtype == torch.float32
    assert batch["weight"].tolist() == batch["index"].tolist()
    assert next(iter(data.val_dataloader()))["weight"].tolist() == [18, 19, 20, 21]


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


# --- the bottleneck -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("meter", "words"),
    [
        (Meter(2, 1000, 6.0, 4.0), "100 images/s are read, the network could take 250; more cores"),
        (Meter(0, 1000, 5.0, 4.0), "200 images/s are read, the network could take 250"),
        (Meter(0, 1000, 4.0, 5.0), ""),  # they take turns: reading is the smaller part
        (Meter(2, 1000, 1.0, 9.0), ""),
        (Meter(2, 100, 0.5, 0.1), ""),  # not worth a word
    ],
)
def test_a_slow_loader_is_named_with_both_rates(meter, words):
    assert words in meter.bottleneck()
    assert bool(words) == bool(meter.bottleneck())


def test_a_loader_measures_who_waits(image_folder):
    data = data_of(image_folder(splits={"train": 20, "val": 2}), num_workers=2, batch_size=6)
    slow, fast = data.loader("train"), data.loader("train")
    slow.dataset.transform = lambda _: time.sleep(0.05) or torch.zeros(3, 4, 4)
    for _ in slow:
        pass
    for _ in fast:
        time.sleep(0.2)
    assert slow.meter.images == 54  # without the first batch
    assert slow.meter.waited > 5 * slow.meter.worked
    assert slow.meter.bottleneck().startswith("decoding is the bottleneck: ")
    assert fast.meter.worked > fast.meter.waited
    assert fast.meter.bottleneck() == ""


# --- loader processes that die --------------------------------------------------------------------


def none_left():
    """Whether all loader processes end, at once or soon."""
    for process in multiprocessing.active_children():
        process.join(5)
    return multiprocessing.active_children() == []


DEATHS = {
    signal.SIGKILL: (
        r"killed \(SIGKILL\), as the kernel does when memory runs out: .* GB of RAM are free now.*"
        r"data.num_workers=1 \(now 2\), a smaller data.batch_size, or give the job more RAM"
    ),
    signal.SIGBUS: (
        r"died of a bus error \(SIGBUS\): shared memory \(/dev/shm\).*--shm-size=2g.*"
        r"data.num_workers=0"
    ),
    signal.SIGSEGV: r"died \(Segmentation fault\). data.num_workers=0 reads in the main process",
}


@pytest.mark.parametrize("number", DEATHS)
def test_a_loader_process_that_dies_is_one_clear_message(image_folder, number):
    data = data_of(image_folder(splits={"train": 40, "val": 2}), num_workers=2)
    loader = data.train_dataloader()
    batches = iter(loader)
    next(batches)
    victim = loader._iterator._workers[1].pid

    def read_on():
        os.kill(victim, number)
        list(batches)

    with pytest.raises(LoaderError, match=DEATHS[number]) as caught:
        read_on()
    assert str(caught.value).startswith(f"a loader process (pid {victim}) ")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1
    assert none_left()


def test_a_loader_process_that_dies_ends_a_fit_with_that_message(image_folder):
    class Killing(Recorder):
        def training_step(self, batch, number):
            if number == 1:
                for worker in multiprocessing.active_children():
                    os.kill(worker.pid, signal.SIGKILL)
                time.sleep(0.5)  # the signal comes while the main process does something else
            return super().training_step(batch, number)

    with pytest.raises(LoaderError, match="memory runs out"):
        fit(data_of(image_folder(splits={"train": 40, "val": 2}), num_workers=2), Killing())
    assert none_left()


@pytest.mark.parametrize(
    ("of_torch", "words"),
    [
        (
            "unable to write to file </torch_12_34_0>: No space left on device (28)",
            "shared memory (/dev/shm), in which batches wait, is full or was",
        ),
        ("received 0 items of ancdata", "too many open files: raise the limit (ulimit -n 65536)"),
        (
            "DataLoader worker (pid(s) 7, 8) exited unexpectedly",
            "a loader process (pid 7, 8) died (exited unexpectedly)",
        ),
    ],
)
def test_what_torch_says_of_loaders_is_explained(of_torch, words):
    assert words in str(explained(of_torch, 4, {}))


def test_exit_codes_tell_what_torch_does_not():
    text = "DataLoader worker (pid(s) 7) exited unexpectedly"
    assert "(SIGKILL)" in str(explained(text, 4, {7: -9}))
    assert "data.num_workers=2 (now 4)" in str(explained(text, 4, {7: -9}))


def test_other_errors_are_not_of_loaders(image_folder):
    assert explained("mat1 and mat2 shapes cannot be multiplied", 2, {}) is None
    data = data_of(image_folder(), num_workers=2)
    loader = data.val_dataloader()
    loader.dataset.transform = lambda _: 1 / 0
    with pytest.raises(ZeroDivisionError):
        list(loader)
