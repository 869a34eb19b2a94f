"""Proofs of cut models are remembered, and made again for anything that is new or damaged."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tl.config import compose
from tl.finetuning import build_plan, freeze
from tl.graph import split
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


def test_it_is_proven_once(cut, tmp_path):
    built, phase, parts = cut
    calls = []

    def prove():
        calls.append(1)
        return Stored(("float32",), "float32")

    file = tmp_path / "cache/proofs.json"
    assert not Proofs(file).know(built, phase)
    found = [Proofs(file).of(parts, built, phase, prove) for _ in range(3)]
    assert calls == [1]
    assert found == [Stored(("float32",), "float32")] * 3
    assert Proofs(file).know(built, phase)
    Proofs(file).of(parts, built, replace(phase, freeze_batch_norm=True), prove)
    Proofs(file).of(replace(parts, sha256="other weights"), built, phase, prove)
    assert len(calls) == 2 + (not phase.freeze_batch_norm)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"x": 3}'])
def test_a_damaged_file_is_written_anew(cut, tmp_path, text):
    built, phase, parts = cut
    file = tmp_path / "proofs.json"
    file.write_text(text)
    stored = Stored(("float16",), "float16")
    assert not Proofs(file).know(built, phase)
    assert Proofs(file).of(parts, built, phase, lambda: stored) == stored
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
