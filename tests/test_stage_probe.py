"""A head on the features of all stages: built, chosen, trained, resumed, sealed, served."""

from __future__ import annotations

import base64
import json
import shutil

import mlflow
import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from processes import timeless
from safetensors.torch import load_file

import tl
from tl.bundle import Bundle
from tl.cache import ActivationCache
from tl.config import ConfigError, HeadKind, ModelConfig
from tl.graph import prove
from tl.graph.stage_head import cut_model, with_head
from tl.models import BuiltModel, StageClassifier, build_model
from tl.training.selection import FEWEST, SPREAD, choose, relevance, scaling, select
from tl.training.state import read_progress

SMALL = ["experiment=smoke", "model=test_resnet", "tracking.enabled=false"]
BARE = "export.enabled=false"
STAGES = [*SMALL, "finetune=stage_probe", "finetune.epochs=8", "model.image_size=64"]


def build(name: str, **settings) -> BuiltModel:
    torch.manual_seed(0)
    return build_model(ModelConfig(name=name, weights="none", **settings), 3)


def backbone_features(model, images):
    """Mean of each stage's output, and what the classifier reads, by timm's own means."""
    model.eval()
    with torch.no_grad():
        maps = model.forward_intermediates(images, intermediates_only=True)
        last = model.forward_head(model.forward_features(images), pre_logits=True)
    return last, [m.mean(dim=(2, 3)) for m in maps]


# --- the network --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext"])
def test_the_head_reads_what_the_stages_of_the_network_give(name):
    built = build(name)
    images = torch.randn(3, *built.preprocessing.input_size)
    last, maps = backbone_features(built.model, images)
    model = with_head(built, HeadKind.stages).model.eval()
    assert isinstance(model, StageClassifier)
    with torch.no_grad():
        outputs = model.backbone(images)
    found = {n: outputs[p] for n, p in zip(model.sizes, model.places, strict=True)}
    torch.testing.assert_close(found["features"], last, rtol=1e-4, atol=1e-5)
    for stage in ("stage1", "stage2", "stage3"):
        near = [m for m in maps if m.shape == found[stage].shape]
        assert any(torch.allclose(m, found[stage], rtol=1e-4, atol=1e-5) for m in near), stage


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_nfnet", "test_byobnet"])
def test_prefix_and_suffix_are_the_classifier(name):
    staged = with_head(build(name), HeadKind.stages)
    torch.nn.init.normal_(staged.model.head.weight)
    for parameter in staged.model.head.parameters():
        parameter.requires_grad_()
    images = torch.randn(4, *staged.preprocessing.input_size)
    parts = cut_model(staged, images)
    proof = prove(parts, staged.model, images)
    assert proof.forward <= 1e-6
    assert parts.linear is staged.model.head
    assert parts.bytes_per_image == 4 * staged.model.head.in_features


def test_every_parameter_is_in_one_stage_and_the_rest_of_the_network_is_left_as_it_was():
    built = build("test_resnet", drop_rate=0.5)
    built.model.train()
    before = {n: p.requires_grad for n, p in built.model.named_parameters()}
    staged = with_head(built, HeadKind.stages)
    assert built.model.training
    assert {n: p.requires_grad for n, p in built.model.named_parameters()} == before
    names = [n for stage in staged.stages for n in stage.parameters]
    assert sorted(names) == sorted(n for n, _ in staged.model.named_parameters())
    buffers = [n for stage in staged.stages for n in stage.buffers]
    assert sorted(buffers) == sorted(n for n, _ in staged.model.named_buffers())
    assert [s.name for s in staged.stages] == [s.name for s in built.stages]
    assert staged.head == "stages"
    assert with_head(built, HeadKind.linear) is built
    assert with_head(staged, HeadKind.stages) is staged


def test_a_network_that_cannot_be_cut_is_refused_with_the_remedy():
    class Odd(torch.nn.Module):
        num_classes = 3

        def __init__(self):
            super().__init__()
            self.body, self.head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.body(x.mean((2, 3)))) if x.sum() > 0 else x

        def get_classifier(self):
            return self.head

    built = build("test_resnet")
    odd = BuiltModel("odd", Odd(), built.stages, built.preprocessing, built.weights)
    with pytest.raises(ConfigError, match=r"features of all stages of odd.*finetune=linear_probe"):
        with_head(odd, HeadKind.stages)


# --- the choice ---------------------------------------------------------------------------------


SIZES = {"features": 30, "stage0": 10, "stage1": 20}


def drawn(images: int, informative: slice, strength: float = 1.5, seed: int = 0):
    """Noise, in which some columns tell three classes apart."""
    rng = np.random.default_rng(seed)
    labels = np.arange(images) % 3
    values = rng.normal(size=(images, sum(SIZES.values())))
    centres = rng.normal(size=(3, values[:, informative].shape[1]))
    values[:, informative] += strength * centres[labels]
    return values * 7 + 3, labels


def test_an_earlier_stage_is_chosen_where_it_alone_knows_the_classes():
    values, labels = drawn(90, slice(40, 60))
    found = select(values, labels, SIZES)
    assert found.kept["stage1"][0] > 10
    assert found.losses["stage1"] < found.losses["features"] - 0.2
    assert "features" not in found.choice or "stage1" in found.choice
    assert found.facts()["why"].startswith(f"held-out Brier score {found.losses[found.choice]:.3f}")


def test_the_last_features_stay_where_nothing_else_helps():
    values, labels = drawn(90, slice(0, 30))
    found = select(values, labels, SIZES)
    assert found.kept["features"][0] >= FEWEST
    assert found.losses["features"] < min(found.losses["stage0"], found.losses["stage1"])


def test_what_is_read_is_standardised_and_has_the_same_spread_whatever_is_kept():
    for images, informative in ((90, slice(40, 60)), (12, slice(0, 30))):
        values, labels = drawn(images, informative)
        found = select(values, labels, SIZES)
        rows = (values - np.array(found.mean)) * np.array(found.scale)
        assert rows.std(axis=0).sum() == pytest.approx(SPREAD)
        np.testing.assert_allclose(rows.mean(axis=0), 0, atol=1e-9)


def test_few_images_say_little_of_the_spread_of_one_feature():
    rng = np.random.default_rng(0)
    blocks = {"features": slice(0, 200)}
    few, many = (scaling(rng.normal(size=(n, 200)), blocks)[1] for n in (4, 20_000))
    assert few.std() < 0.1 < np.std(rng.normal(size=(4, 200)).std(axis=0))
    np.testing.assert_allclose(many, 1, atol=0.03)
    _, spread = scaling(np.full((5, 4), 3.3), {"features": slice(0, 2), "stage0": slice(2, 4)})
    assert not spread.any()


def test_only_what_is_better_beyond_its_error_replaces_the_last_features():
    rng = np.random.default_rng(0)
    base = rng.uniform(0.2, 0.8, 100)
    noise = rng.normal(0, 0.1, 100)
    near = {"features": base, "features + stage1": base + noise - noise.mean() - 0.005}
    assert choose(near, first="features") == "features"
    clear = {**near, "features + stage1": base + noise - noise.mean() - 0.03}
    assert choose(clear, first="features") == "features + stage1"
    alone = {**near, "stage1": base + noise - noise.mean() - 0.015}  # 1.5 errors
    assert choose(alone, first="features") == "features"
    assert choose({**alone, "stage1": base - 0.1 + noise}, first="features") == "stage1"
    few = {name: loss[:20] for name, loss in {**alone, "stage1": base - 0.2 + noise}.items()}
    assert choose(few, first="features") == "features"


def test_relevance_ranks_by_the_variance_between_classes():
    values, labels = drawn(300, slice(0, 5), strength=3)
    order = np.argsort(-relevance(values, labels))
    assert set(order[:5].tolist()) == set(range(5))


@pytest.mark.parametrize("case", ["one image a class", "one class", "constant", "one is alone"])
def test_odd_data_chooses_the_last_features_and_no_numbers_are_lost(case):
    values, labels = drawn(30, slice(0, 30))
    if case == "one image a class":
        values, labels = values[:3], labels[:3]
    elif case == "one class":
        labels = np.zeros_like(labels)
    elif case == "constant":
        values = np.full_like(values, 2.5)
    else:
        labels = np.array([*labels[:-1], 7])
    found = select(values, labels, SIZES)
    assert found.choice == "features"
    assert found.facts()["choice"].startswith("features: ")
    assert np.isfinite(found.mean).all()
    assert np.isfinite(found.scale).all()


# --- a run --------------------------------------------------------------------------------------


@pytest.fixture
def train(tmp_path, monkeypatch, image_folder):
    """Train on the same images with one cache: settings to (run folder, result)."""
    monkeypatch.setenv("TL_CACHE_DIR", str(tmp_path / "cache"))
    data = image_folder(splits={"train": 12, "val": 4, "test": 4})

    def run(name, *overrides, **values):
        settings = {"data.root": str(data), "output_dir": str(tmp_path / name), **values}
        return tmp_path / name, tl.train(tl.compose("train", [*STAGES, *overrides], settings))

    return run


def history(run):
    return pd.read_csv(run / "history.csv").drop(columns="seconds")


def test_a_run_trains_the_head_alone_and_its_bundle_predicts(train, capsys):
    run, result = train("run", "cache=on")
    output = " ".join(capsys.readouterr().out.split())
    assert "features that the head reads" in output
    state = load_file(run / "checkpoints/model.safetensors")
    chosen = json.loads((run / "checkpoints/features.json").read_text())
    left_out = state["features.scale"] == 0
    assert not state["head.weight"][:, left_out].any()
    assert state["head.weight"][:, ~left_out].any()
    assert int((~left_out).sum()) == sum(n for n, _ in chosen["kept"].values())
    assert result.trainable_parameters == state["head.weight"].numel() + 3
    assert result.metrics["test/acc"] > 0.5

    bundle = Bundle.load(result.bundle)
    bundle.verify()
    predicted = pd.read_parquet(run / "predictions.parquet")
    test = predicted[predicted["split"] == "test"]
    root = run.parent / "images"
    found = bundle.probabilities([root / path for path in test["path"]])
    columns = [c for c in test if c.startswith("p_")] or list(bundle.classes)
    np.testing.assert_allclose(found, test[columns].to_numpy(), atol=1e-4)


def test_its_bundle_says_where_it_loads(train, tmp_path):
    _, result = train("run", "cache=on")
    names = {p.name for p in result.bundle.iterdir()}
    assert {"model.onnx", "model.safetensors", "model.json", "MLmodel"} <= names
    assert "config.json" not in names
    card = (result.bundle / "README.md").read_text()
    assert "does not load in timm" in card
    assert "local-dir" not in card
    assert "linear, on standardised features of all stages: " in card
    facts = json.loads((result.bundle / "model.json").read_text())
    assert facts["label_names"] == ["blue", "green", "red"]
    image = next((tmp_path / "images/test/red").iterdir())
    table = pd.DataFrame({"image": [base64.b64encode(image.read_bytes()).decode()]})
    found = mlflow.pyfunc.load_model(str(result.bundle)).predict(table)
    expected = Bundle.load(result.bundle).probabilities([image])[0].tolist()
    wanted = dict(zip(facts["label_names"], expected, strict=True))
    assert found["probabilities"][0] == pytest.approx(wanted, abs=1e-6)
    with pytest.raises(Exception, match="config"):
        timm.create_model(f"local-dir:{result.bundle}", pretrained=True)


def test_the_backbone_of_its_bundle_serves_another_run(train):
    _, first = train("first", "cache=on")
    weights = first.bundle / "model.safetensors"
    _, second = train("second", "finetune=linear_probe", BARE, **{"model.weights": str(weights)})
    state, plain = load_file(weights), load_file(second.weights)
    for name, value in plain.items():
        if not name.startswith("fc."):
            assert torch.equal(value, state[f"backbone.{name}"]), name


def test_without_augmentation_cached_and_uncached_runs_are_alike(train):
    off, plain = train("off", "augment=none", "cache=off", BARE)
    on, cached = train("on", "augment=none", "cache=on", BARE)
    assert [p.cached for p in read_progress(on / "checkpoints")[0]] == [True]
    assert [p.cached for p in read_progress(off / "checkpoints")[0]] == [False]
    pd.testing.assert_frame_equal(history(off), history(on), rtol=2e-3, atol=1e-4)
    assert timeless(plain.metrics) == pytest.approx(timeless(cached.metrics), rel=1e-3, abs=1e-4)


def test_it_reads_the_shelf_that_a_linear_probe_left(train, tmp_path, capsys):
    train("probe", "finetune=linear_probe", "cache=on", "augment=none", BARE)
    shelves = len(ActivationCache(tmp_path / "cache/activations", limit_bytes=10**9).shelves())
    capsys.readouterr()
    train("stages", "cache=on", "augment=medium", BARE)
    assert "nothing: all of it was in the cache" in capsys.readouterr().out
    kept = ActivationCache(tmp_path / "cache/activations", limit_bytes=10**9).shelves()
    assert len(kept) == shelves


def test_an_interrupted_run_ends_as_an_uninterrupted_one(train, tmp_path):
    whole, one = train("whole", "cache=on", BARE)
    half = tmp_path / "half"
    shutil.copytree(whole, half)
    # As after a crash in the first phase: its checkpoint is there, its result is not.
    for name in ("progress.json", "model.safetensors", "1-head/best.ckpt"):
        (half / "checkpoints" / name).unlink()
    config = half / "config.yaml"
    config.write_text(config.read_text().replace(str(whole), str(half)))
    two = tl.train(tl.compose("train", [f"resume={half}"]))
    left, right = (load_file(run / "checkpoints/model.safetensors") for run in (whole, half))
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=0, atol=0, msg=name)
    assert timeless(one.metrics) == timeless(two.metrics)


def test_grey_images_of_one_kind_train_too(tmp_path, monkeypatch):
    monkeypatch.setenv("TL_CACHE_DIR", str(tmp_path / "cache"))
    for split, number in (("train", 2), ("val", 1)):
        for name in ("a", "b"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(number):
                Image.new("L", (40, 40), 100 + i).save(folder / f"{split}{i}.png")
    settings = {"data.root": str(tmp_path / "images"), "output_dir": str(tmp_path / "run")}
    result = tl.train(tl.compose("train", [*STAGES, BARE], settings))
    assert np.isfinite(result.metrics["val/loss"])
