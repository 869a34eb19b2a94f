"""One pass over images gives evidence: through the cache, without it, and without a trace."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import tl
from tl import data, models, training
from tl.finetuning import build_plan, freeze
from tl.training.activations import Activations
from tl.training.drift import layer_drift

NET = "test_resnet"


@pytest.fixture
def weights(tmp_path):
    """Factory of weights files of timm's tiny networks, with a head for 7 classes."""

    def make(name=NET):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=7).eval()
        save_file(model.state_dict(), file := tmp_path / f"{name}.safetensors")
        return file

    return make


def gather(root, *, name=NET, weights="none", mode="auto", cache=None, seed=0):
    overrides = [f"data.root={root}", f"model.name={name}", f"model.weights={weights}"]
    overrides += [f"cache.mode={mode}", "data.num_workers=0"]
    config = tl.compose("train", overrides + ([f"cache.dir={cache}"] if cache else []))
    table = data.read_table(config.data, seed=0, cache_dir=config.cache.path())
    built = models.build_model(config.model, table.classes)
    images = data.ImageDataModule.from_config(table, built.preprocessing, config)
    return training.gather_evidence(built, images, config.cache, seed=seed), built, images


def test_a_pass_through_the_cache_measures_every_stage_and_leaves_the_model(
    image_folder, weights, tmp_path
):
    root, file = image_folder(splits={"train": 8, "val": 3}), weights()
    found, built, _ = gather(root, weights=file, cache=tmp_path / "cache")
    assert found.amount.images == 24
    assert (found.amount.per_class, found.amount.least, found.amount.val_least) == (8, 8, 3)
    assert found.backbone.pretrained
    assert found.backbone.batch_norm
    assert not found.backbone.attention
    assert found.native_side == pytest.approx(np.sqrt(40 * 32))
    similarity = found.similarity
    names = [stage.stage for stage in similarity.stages]
    assert names[0] == "stage0"
    assert names[-1] == "features"
    assert similarity.stages[-1].size == built.model.num_features
    assert similarity.quality.value > 0.8  # plain colours
    assert similarity.source_energy is not None  # the file's own head
    assert set(found.scores) == {"logme", "h_score", "leep"}
    assert found.flips.horizontal.value == pytest.approx(0, abs=0.3)
    assert {"pass", "drift", "probes"} <= set(found.seconds)
    assert built.model.training  # as it was built
    assert all(p.requires_grad for p in built.model.parameters())


def test_a_second_job_measures_nothing_and_another_seed_does(image_folder, weights, tmp_path):
    root, file = image_folder(), weights()
    first, *_ = gather(root, weights=file, cache=tmp_path / "cache")
    again, *_ = gather(root, weights=file, cache=tmp_path / "cache")
    assert again == first  # with its seconds
    other, *_ = gather(root, weights=file, cache=tmp_path / "cache", seed=1)
    assert other != first
    Image.new("RGB", (40, 32), (1, 2, 3)).save(root / "train" / "red" / "new.png")
    more, *_ = gather(root, weights=file, cache=tmp_path / "cache")
    assert more.amount.images == first.amount.images + 1


def test_a_first_phase_finds_what_the_evidence_computed(image_folder, weights, tmp_path):
    root, file = image_folder(), weights()
    _, built, images = gather(root, weights=file, cache=tmp_path / "cache")
    overrides = [f"data.root={root}", f"model.name={NET}", f"model.weights={file}"]
    overrides += ["finetune=linear_probe", "augment=none", f"cache.dir={tmp_path / 'cache'}"]
    config = tl.compose("train", [*overrides, "cache.mode=on"])
    plan = build_plan(config.finetune, built, train_images=18, batch_size=images.batch_size)
    freeze(built.model, built.stages, plan.phases[0])
    images.augment = config.augment
    activations = Activations(config.cache, built, images)
    prepared = activations.prepare(plan.phases[0], torch.device("cpu"), as_before=None)
    assert prepared.data is not None
    assert "9 views" in prepared.facts["computed"]  # those of val; train was there
    activations.close()


def test_without_a_cache_hooks_see_the_same(image_folder, weights, tmp_path):
    root, file = image_folder(splits={"train": 8, "val": 3}), weights()
    cached, *_ = gather(root, weights=file, cache=tmp_path / "cache")
    hooked, *_ = gather(root, weights=file, mode="off")
    assert hooked.similarity.quality.value == pytest.approx(
        cached.similarity.quality.value, abs=0.06
    )
    assert hooked.similarity.source_energy.value == pytest.approx(
        cached.similarity.source_energy.value, rel=1e-3
    )
    assert hooked.similarity.drift == pytest.approx(cached.similarity.drift, rel=1e-4)
    assert len(hooked.similarity.stages) >= 4


def test_a_network_that_cannot_be_traced_is_measured_all_the_same(image_folder, weights, tmp_path):
    root, file = image_folder(splits={"train": 8, "val": 3}), weights()
    cached, built, images = gather(root, weights=file, cache=tmp_path / "cache")

    class Looks(type(built.model)):
        def forward(self, x):
            return super().forward(x if x.mean() > -1e9 else -x)

    built.model.__class__ = Looks
    config = tl.compose("train", [f"data.root={root}", f"cache.dir={tmp_path / 'other'}"])
    found = training.gather_evidence(built, images, config.cache, seed=0)
    assert found.similarity.quality.value == pytest.approx(
        cached.similarity.quality.value, abs=0.06
    )
    assert found.similarity.drift == pytest.approx(cached.similarity.drift, rel=1e-4)


def test_the_pretrainings_own_head_is_that_of_the_file(image_folder, weights):
    file = weights()
    _, built, images = gather(image_folder(), weights=file)
    whole = timm.create_model(NET, num_classes=7).eval()
    whole.load_state_dict(load_file(file))
    weight, bias = models.pretrained_head(built)
    batch = torch.stack([images.dataset("train", augment=False)[i]["image"] for i in range(4)])
    with torch.inference_mode():
        features = built.model.eval().forward_head(built.model.forward_features(batch), True)
        torch.testing.assert_close(features @ weight.T + bias, whole(batch), atol=1e-5, rtol=1e-4)


def test_random_weights_are_counted_and_not_measured(image_folder):
    found, *_ = gather(image_folder())
    assert found.similarity is None
    assert "random" in found.unmeasured
    assert found.amount.images == 18
    assert found.seconds == {}


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_networks_without_batch_norm_have_energy_and_no_drift(name, image_folder, weights):
    found, *_ = gather(image_folder(), name=name, weights=weights(name))
    assert found.similarity.drift is None
    assert found.similarity.source_energy is not None
    assert found.backbone.attention == (name == "test_vit")
    assert len(found.similarity.stages) >= 4


def test_copies_are_counted_once_and_named(image_folder, weights):
    root = image_folder()
    first = root / "train" / "red" / "00.png"
    (root / "train" / "red" / "copy.png").write_bytes(first.read_bytes())
    (root / "val" / "red" / "copy.png").write_bytes(first.read_bytes())
    found, *_ = gather(root, weights=weights())
    assert found.amount.images == 18
    assert any("1 of 19 training images are exact copies" in w for w in found.warnings)
    assert any("1 of 10 validation images are training images" in w for w in found.warnings)


@pytest.mark.parametrize("mode", ["L", "I;16", "all alike", "one a class"])
def test_odd_images_end_in_figures_or_in_a_reason(mode, tmp_path, weights):
    rng = np.random.default_rng(0)
    for split, number in {"train": 1 if mode == "one a class" else 5, "val": 2}.items():
        for label in range(3):
            folder = tmp_path / "odd" / split / f"class{label}"
            folder.mkdir(parents=True)
            for n in range(number):
                pixels = rng.integers(0, 256, (40, 40)).astype(np.uint8)
                if mode == "I;16":
                    Image.fromarray(pixels.astype(np.uint16) * 257).save(folder / f"{n}.png")
                elif mode == "all alike":
                    Image.new("RGB", (40, 40), (9, 9, 9)).save(folder / f"{n}.png")
                else:
                    Image.fromarray(pixels, "L").save(folder / f"{n}.png")
    found, *_ = gather(tmp_path / "odd", weights=weights())
    if mode in {"all alike", "one a class"}:
        assert found.similarity is None
        assert "fewer than two classes have two different images" in found.unmeasured
    else:
        assert np.isfinite(found.similarity.quality.value)
        assert found.similarity.quality.error > 0


def test_drift_is_small_where_the_statistics_are_those_of_the_images():
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm2d(8).eval()
    per_image = torch.randn(64, 8, 1, 1)  # images differ, as real ones do
    values = per_image + torch.randn(64, 8, 6, 6)
    norm.running_mean.copy_(torch.zeros(8))
    norm.running_var.copy_(torch.full((8,), 2.0))
    seen = torch.stack([values.mean((2, 3)), values.var((2, 3), correction=0)]).double()
    drift, floor, without = layer_drift(norm, seen)
    assert drift < 3 * floor
    assert without[0] == layer_drift(norm, seen[:, 1:])[0]
    assert 0.2 / 64 < floor < 1.5 / 64
    assert layer_drift(norm, seen + torch.tensor([3.0, 0.0])[:, None, None])[0] == pytest.approx(
        9 / 2, rel=0.2
    )
