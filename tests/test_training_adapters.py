"""Low-rank adapters: where they go, what they train, and that nothing of them stays."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import timm
import torch
from methods import CrashError, assert_alike, assert_same, built_of, crash_after, plan_for, run
from torch import nn

from tl.config import ConfigError
from tl.finetuning import audit, freeze, parameter_groups, stage_hashes, stage_rows
from tl.training.adapters import add_adapters, attention_layers, merge_adapters

LORA = ["finetune=partial", "finetune.phases.last.trains=lora", "finetune.phases.last.lora_rank=2"]
VIT = ["model=test_resnet", "model.name=test_vit", "model.image_size=64"]


def phase_for(model, stages=2):
    return plan_for(model, *LORA, f"finetune.phases.last.train_stages={stages}").phases[0]


@pytest.fixture
def vit():
    torch.manual_seed(0)
    return built_of(timm.create_model("test_vit", num_classes=4), size=160)


@pytest.mark.parametrize(
    ("name", "size", "parts"),
    [
        ("test_vit", 160, {"qkv", "proj"}),
        ("swin_tiny_patch4_window7_224", 224, {"qkv", "proj"}),
        # These read the weights of qkv without calling the layer.
        ("eva02_tiny_patch14_224", 224, {"proj"}),
        ("xcit_nano_12_p16_224", 224, {"q", "k", "v", "qkv", "proj"}),
        ("levit_128s", 224, {"linear"}),
    ],
)
def test_attention_is_found_in_any_family(name, size, parts):
    built = built_of(timm.create_model(name, num_classes=2), size)
    layers = attention_layers(built, phase_for(built.model, -1))
    assert {layer.rpartition(".")[2] for layer in layers} == parts
    assert all(isinstance(built.model.get_submodule(layer), nn.Linear) for layer in layers)


def test_only_stages_that_train_get_adapters(vit):
    layers = attention_layers(vit, phase_for(vit.model, 1))
    assert layers == ["blocks.5.attn.qkv", "blocks.5.attn.proj"]
    assert attention_layers(vit, replace(phase_for(vit.model), trains="all")) == []


def test_a_network_without_attention_is_refused_with_a_remedy():
    built = built_of(timm.create_model("test_resnet", num_classes=2))
    message = r"phases.last.trains=lora: .* no attention layers .* finetune=norm_affine"
    with pytest.raises(ConfigError, match=message):
        attention_layers(built, phase_for(built.model, -1))


def test_adapters_train_alone_beside_the_head_and_merge_into_what_they_computed(vit):
    model, phase = vit.model, phase_for(vit.model)
    plain = {n: v.clone() for n, v in model.state_dict().items()}
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        logits = model.eval()(images)
    stages = add_adapters(vit, phase, attention_layers(vit, phase), seed=1)
    assert sorted(n for s in stages for n in s.parameters) == sorted(
        n for n, _ in model.named_parameters()
    )
    freeze(model, stages, phase)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trained if "lora_" not in n} == {"head.weight", "head.bias"}
    assert all(".5." in n or ".4." in n or ".3." in n for n in trained if "lora_" in n)
    rows = {row["stage"]: row["trainable"] for row in stage_rows(model, stages, phase)}
    assert rows["stage4"] == 2 * (64 + 192 + 64 + 64) * sum(
        f"blocks.{n}.attn.qkv.base_layer.weight" in stages[4].parameters for n in range(6)
    )
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), logits, rtol=0, atol=1e-6)

    before = stage_hashes(model, stages, phase)
    groups = parameter_groups(model, stages, phase)
    assert sum(len(group["params"]) for group in groups) == len(trained)
    optimizer = torch.optim.SGD(groups, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(images).square().sum().backward()
        optimizer.step()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    audit(before, stage_hashes(model, stages, phase), phase, stages)
    with torch.no_grad():
        adapted = model.eval()(images)
    assert not torch.allclose(adapted, logits, atol=1e-3)

    merge_adapters(model)
    assert {n: v.shape for n, v in model.state_dict().items()} == {
        n: v.shape for n, v in plain.items()
    }
    assert not hasattr(model, "peft_config")
    moved = {n for n, v in model.state_dict().items() if not torch.equal(v, plain[n])}
    assert moved == {
        "head.weight",
        "head.bias",
        *(f"{n}.weight" for n in attention_layers(vit, phase)),
    }
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), adapted, rtol=1e-4, atol=1e-5)


def test_adapters_begin_alike_whatever_was_drawn_before(vit):
    states = []
    for draws in (0, 5):
        built = replace(vit, model=copy.deepcopy(vit.model))
        phase = phase_for(built.model)
        torch.rand(draws)
        state = torch.get_rng_state()
        add_adapters(built, phase, attention_layers(built, phase), seed=3)
        assert torch.equal(torch.get_rng_state(), state)
        states.append(built.model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.fixture
def data(image_folder):
    return image_folder(splits={"train": 6, "val": 3})


RUN = [*VIT, *LORA, "finetune.optimizer=sgd", "finetune.head_lr=0.05", "finetune.lr_ratio=1"]


def test_cached_and_uncached_phases_of_adapters_are_alike(data, tmp_path):
    off, on = (run(data, tmp_path / name, *RUN, f"cache={name}") for name in ("off", "on"))
    assert [phase.cached for phase in (*off.phases, *on.phases)] == [False, True]
    assert_alike(off, on)
    moved = {n for n, v in on.state.items() if not torch.equal(v, on.start[n])}
    assert moved == set(on.kept("1-last"))
    assert {n.rpartition(".")[0].rpartition(".")[2] for n in moved} == {"qkv", "proj", "head"}
    for found in (off, on):
        loss, _ = found.result.predict.loss("val")
        assert loss == pytest.approx(found.phases[0].best_loss, rel=1e-3)


@pytest.mark.parametrize("cache", ["on", "off"])
def test_a_resumed_phase_of_adapters_ends_as_an_uninterrupted_one(
    data, tmp_path, cache, monkeypatch
):
    method = [*VIT, "finetune=lp_ft", "finetune.phases.all.trains=lora", f"cache={cache}"]
    method += ["finetune.phases.all.train_stages=1", "finetune.ema=true", "finetune.average=true"]
    method += ["finetune.phases.head.average=false"]
    whole = run(data, tmp_path / "whole", *method)
    assert whole.phases[1].cached == (cache == "on")
    with monkeypatch.context() as patch:
        crash_after(patch, epochs=6)
        with pytest.raises(CrashError):
            run(data, tmp_path / "broken", *method)
    assert_same(whole, run(data, tmp_path / "broken", *method))
