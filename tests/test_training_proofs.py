"""Proofs of cut models are remembered, and made again for anything that is new or damaged."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from tl.config import compose
from tl.finetuning import build_plan, freeze
from tl.graph import SplitError, split
from tl.models import build_model
from tl.training.probing import Stored, harmless
from tl.training.proofs import Proofs


@pytest.fixture
def cut():
    """Model, phase of a linear probe, and the cut below it."""
    settings = ["data.root=x", "model=test_resnet", "model.weights=none", "finetune=linear_probe"]
    config = compose("train", settings)
    torch.manual_seed(0)
    built = build_model(config.model, 3)
    phase = build_plan(config.finetune, built, train_images=10, batch_size=4).phases[0]
    freeze(built.model, built.stages, phase)
    return built, phase, split(built.model, built.stages, torch.zeros(2, 3, 32, 32))


def test_it_is_cut_and_proven_once(cut, tmp_path):
    built, phase, parts = cut
    cuts, proofs = [], []

    def make():
        cuts.append(1)
        return split(built.model, built.stages, torch.zeros(2, 3, 32, 32))

    def prove(found):
        proofs.append(found.sha256)
        return Stored(("float32",), "float32")

    def known():
        return Proofs(file).cut(built, phase, make, prove)

    file = tmp_path / "cache/proofs.json"
    assert not Proofs(file).know(built, phase)
    (first, stored), (second, again) = known(), known()
    assert stored == again == Stored(("float32",), "float32")
    assert (len(cuts), proofs) == (1, [parts.sha256])
    assert Proofs(file).know(built, phase)
    for name in ("nodes", "shapes", "pooled", "pooled_sizes", "sha256", "linear", "inputs"):
        assert getattr(second, name) == getattr(first, name)
    images = torch.rand(2, 3, 32, 32)
    values = first.prefix(images)
    torch.testing.assert_close(second.suffix(first.values(values)), built.model(images))
    assert len(cuts) == 1
    torch.testing.assert_close(second.prefix(images), values)
    assert len(cuts) == 2
    Proofs(file).cut(built, replace(phase, freeze_batch_norm=True), make, prove)
    assert len(cuts) == 3 - phase.freeze_batch_norm


def test_other_frozen_weights_are_cut_and_proven_anew(cut, tmp_path):
    built, phase, _ = cut
    make = partial(split, built.model, built.stages, torch.zeros(2, 3, 32, 32))
    stored = Stored(("float32",), "float32")
    first, _ = Proofs(tmp_path / "proofs.json").cut(built, phase, make, lambda _: stored)
    with torch.no_grad():
        built.model.get_classifier().weight.add_(1)  # trains: it changes nothing
    same, _ = Proofs(tmp_path / "proofs.json").cut(built, phase, make, lambda _: stored)
    with torch.no_grad():
        next(built.model.parameters()).mul_(2)
    other, _ = Proofs(tmp_path / "proofs.json").cut(built, phase, make, lambda _: stored)
    assert same.sha256 == first.sha256 != other.sha256
    with pytest.raises(SplitError, match="not the one that was remembered"):
        _ = same.prefix


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"x": 3}', "damaged entry"])
def test_a_damaged_file_is_written_anew(cut, tmp_path, text):
    built, phase, parts = cut
    file = tmp_path / "proofs.json"
    stored = Stored(("float16",), "float16")
    if text == "damaged entry":
        Proofs(file).cut(built, phase, lambda: parts, lambda _: stored)
        known = json.loads(file.read_text())
        text = json.dumps({key: {"stored": {}, "cut": 3} for key in known})
    file.write_text(text)
    assert not Proofs(file).know(built, phase)
    assert Proofs(file).cut(built, phase, lambda: parts, lambda _: stored) == (parts, stored)
    assert Proofs(file).know(built, phase)


def test_embeddings_stay_in_float32_and_maps_are_rounded_where_it_is_harmless(cut):
    built, phase, parts = cut
    images = torch.rand(4, 3, 32, 32)
    values = parts.prefix(images)[: len(parts.shapes)]
    assert harmless(parts, built.model, values).dtypes == ("float32",)
    stages = tuple(s.name for s in built.stages[-2:])
    freeze(built.model, built.stages, replace(phase, trainable=stages))
    maps = split(built.model, built.stages, images[:2])
    values = maps.prefix(images)[: len(maps.shapes)]
    before = {name: value.clone() for name, value in built.model.state_dict().items()}
    found = harmless(maps, built.model, values)
    assert found.dtypes == ("float16",)
    assert "gradients change by" in found.text
    huge = harmless(maps, built.model, [value * 1e6 for value in values])
    assert huge.dtypes == ("float32",), "float16 ends at 65,504"
    assert all(torch.equal(v, before[k]) for k, v in built.model.state_dict().items())
