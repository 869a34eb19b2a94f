"""Phases, freezing, learning rates by stage, and the audit."""

from __future__ import annotations

import pytest
import timm
import torch
from methods import SIZE
from torch import nn

from tl.bundle import Preprocessing
from tl.config import compose
from tl.finetuning import (
    FreezeError,
    Plan,
    audit,
    build_plan,
    freeze,
    parameter_groups,
    stage_hashes,
    stage_rates,
    stage_rows,
    trainable_stages,
)
from tl.models import BuiltModel, Stage, Weights, find_stages


def plan_for(model, *overrides, images=5000, batch=32, source="some.safetensors"):
    config = compose("train", ["data.root=x", *overrides]).finetune
    weights = Weights(source, sha256="0")
    built = BuiltModel("net", model, find_stages(model), Preprocessing.from_dict(SIZE), weights)
    return build_plan(config, built, train_images=images, batch_size=batch)


@pytest.fixture(scope="module")
def resnet():
    return timm.create_model("test_resnet", num_classes=4, drop_rate=0.5)


ALL = ("stage0", "stage1", "stage2", "stage3", "stage4", "head")


@pytest.mark.parametrize(
    ("method", "trainable"),
    [
        ("linear_probe", [ALL[5:]]),
        ("partial", [ALL[4:]]),
        ("full", [ALL]),
        ("lp_ft", [ALL[5:], ALL]),
        ("gradual", [ALL[5:], ALL[4:], ALL[3:], ALL[2:], ALL[1:], ALL]),
        ("scratch", [ALL]),
    ],
)
def test_methods_are_lists_of_phases(resnet, method, trainable):
    plan = plan_for(resnet, f"finetune={method}")
    assert plan.method == method
    assert [phase.trainable for phase in plan.phases] == trainable


def test_last_k_stages(resnet):
    plan = plan_for(resnet, "finetune=partial", "finetune.phases.last.train_stages=2")
    assert plan.phases[0].trainable == ("stage3", "stage4", "head")


def test_a_backbone_with_fewer_stages_skips_phases_and_says_so():
    plan = plan_for(timm.create_model("levit_128s", num_classes=2), "finetune=gradual")
    assert [phase.name for phase in plan.phases] == ["head", "last_1", "last_2", "last_3", "last_4"]
    assert plan.notes == ("phase all is left out: it trains the same stages as last_4",)


def test_a_phase_inherits_what_it_does_not_say(resnet):
    plan = plan_for(resnet, "finetune=lp_ft", "finetune.epochs=7", "finetune.phases.all.epochs=3")
    assert [phase.epochs for phase in plan.phases] == [7, 3]
    assert Plan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize(
    ("overrides", "images", "batch", "frozen"),
    [
        ([], 5000, 32, False),
        ([], 999, 32, True),
        ([], 5000, 8, True),
        (["finetune.batch_norm=frozen"], 5000, 32, True),
        (["finetune.batch_norm=train"], 100, 8, False),
    ],
)
def test_batch_norm_mode(resnet, overrides, images, batch, frozen):
    plan = plan_for(resnet, "finetune=lp_ft", *overrides, images=images, batch=batch)
    assert {phase.freeze_batch_norm for phase in plan.phases} == {frozen}


def test_random_weights_have_no_statistics_to_keep(resnet):
    plan = plan_for(resnet, "finetune=scratch", images=100, batch=8, source="random")
    assert not plan.phases[0].freeze_batch_norm


def test_trainable_stages_never_ask_for_more_than_there_are():
    stages = [Stage(name, ("w",)) for name in ("stage0", "stage1", "head")]
    assert trainable_stages(stages, 5) == ("stage0", "stage1", "head")
    assert trainable_stages(stages, 0) == ("head",)


def test_frozen_means_no_gradient_and_eval_mode(resnet):
    phase = plan_for(resnet, "finetune=partial").phases[0]
    freeze(resnet, find_stages(resnet), phase)
    assert {n.split(".")[0] for n, p in resnet.named_parameters() if p.requires_grad} == {
        "layer4",
        "fc",
    }
    assert not resnet.layer3.training
    assert not any(m.training for m in resnet.layer3.modules())
    assert resnet.layer4.training
    assert all(m.training for m in resnet.layer4.modules() if isinstance(m, nn.BatchNorm2d))
    phase = plan_for(resnet, "finetune=full", "finetune.batch_norm=frozen").phases[0]
    freeze(resnet, find_stages(resnet), phase)
    assert all(p.requires_grad for p in resnet.parameters())
    assert not any(m.training for m in resnet.modules() if isinstance(m, nn.BatchNorm2d))
    assert resnet.layer4.training


def test_frozen_dropout_is_still():
    model = timm.create_model("test_vit", num_classes=2, drop_path_rate=0.5, proj_drop_rate=0.5)
    phase = plan_for(model, "finetune=linear_probe").phases[0]
    freeze(model, find_stages(model), phase)
    images = torch.randn(2, 3, 160, 160)
    assert torch.equal(model.forward_features(images), model.forward_features(images))


def test_rates_fall_by_the_ratio_from_stage_to_stage(resnet):
    plan = plan_for(resnet, "finetune=full", "finetune.head_lr=0.01", "finetune.lr_ratio=10")
    rates = stage_rates(find_stages(resnet), plan.phases[0])
    assert list(rates) == list(ALL)
    assert list(rates.values()) == pytest.approx([1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2])
    one = plan_for(resnet, "finetune=full", "finetune.lr_ratio=1").phases[0]
    assert set(stage_rates(find_stages(resnet), one).values()) == {1e-3}


def test_default_ratio_is_within_the_fields_range(resnet):
    assert 3 <= plan_for(resnet, "finetune=full").phases[0].lr_ratio <= 10


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_groups_hold_each_parameter_once_and_decay_matrices_only(name):
    model = timm.create_model(name, num_classes=4)
    stages = find_stages(model)
    phase = plan_for(model, "finetune=full", "finetune.weight_decay=0.05").phases[0]
    freeze(model, stages, phase)
    groups = parameter_groups(model, stages, phase)
    grouped = [id(p) for g in groups for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    for group in groups:
        if group["name"].endswith("/no_decay"):
            assert group["weight_decay"] == 0
        else:
            assert group["weight_decay"] == 0.05
            assert all(p.ndim > 1 for p in group["params"])
    if name == "test_vit":
        stem = next(g for g in groups if g["name"] == "stage0/no_decay")
        assert any(p is model.pos_embed for p in stem["params"])


def test_a_parameter_outside_the_stages_is_an_error(resnet):
    stages = find_stages(resnet)
    phase = plan_for(resnet, "finetune=full").phases[0]
    freeze(resnet, stages, phase)
    with pytest.raises(FreezeError, match=r"exactly one optimizer group: fc.weight, fc.bias"):
        parameter_groups(resnet, stages[:-1], phase)


def test_rows_of_the_table(resnet):
    phase = plan_for(resnet, "finetune=partial", "finetune.lr_ratio=10").phases[0]
    rows = stage_rows(resnet, find_stages(resnet), phase)
    assert [r["trainable"] for r in rows[:4]] == [0] * 4
    assert [r["trainable"] for r in rows[4:]] == [r["parameters"] for r in rows[4:]]
    assert [r["lr"] for r in rows[:4]] == [None] * 4
    assert [r["lr"] for r in rows[4:]] == pytest.approx([1e-4, 1e-3])
    assert sum(r["parameters"] for r in rows) == sum(p.numel() for p in resnet.parameters())


def test_audit_sees_weights_and_buffers_move():
    model = timm.create_model("test_resnet", num_classes=4)
    stages = find_stages(model)
    phase = plan_for(model, "finetune=partial").phases[0]
    before = stage_hashes(model, stages)
    with torch.no_grad():
        model.fc.bias += 1
        model.layer4[0].bn1.running_mean += 1
    rows = {r["stage"]: r for r in audit(before, stage_hashes(model, stages), phase, stages)}
    assert rows["head"]["weights"] == "moved"
    assert rows["head"]["buffers"] == "none"
    assert (rows["stage4"]["weights"], rows["stage4"]["buffers"]) == ("still", "moved")
    assert rows["stage0"]["weights"] == "still"


@pytest.mark.parametrize("kind", ["weights", "buffers"])
def test_audit_refuses_a_frozen_stage_that_moved(kind):
    model = timm.create_model("test_resnet", num_classes=4)
    stages = find_stages(model)
    phase = plan_for(model, "finetune=partial").phases[0]
    before = stage_hashes(model, stages)
    with torch.no_grad():
        (model.layer1[0].conv1.weight if kind == "weights" else model.bn1.running_var).mul_(1.01)
    with pytest.raises(FreezeError, match=rf"phase last: stage\d was frozen, but its {kind} moved"):
        audit(before, stage_hashes(model, stages), phase, stages)
