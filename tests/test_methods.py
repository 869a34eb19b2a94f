"""Methods that train little: scale and shift of normalisation layers; frozen rests stay frozen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from methods import assert_alike, plan_for, run
from torch import nn

from tl.config import ConfigError
from tl.finetuning import (
    FreezeError,
    audit,
    check_norms,
    freeze,
    parameter_groups,
    stage_hashes,
    stage_rows,
    trained_names,
)
from tl.models import find_stages

NORM = ["finetune=partial", "finetune.phases.last.trains=norm", "finetune.head_lr=0.01"]


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_norm_trains_scale_and_shift_of_every_norm_layer_and_the_head(name):
    model = timm.create_model(name, num_classes=4)
    stages = find_stages(model)
    phase = plan_for(model, *NORM, "finetune.phases.last.train_stages=-1").phases[0]
    freeze(model, stages, phase)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    layers = {n for n, m in model.named_modules() if isinstance(m, (nn.BatchNorm2d, nn.LayerNorm))}
    head = set(stages[-1].parameters)
    assert head < trained
    assert trained - head == {f"{n}.{kind}" for n in layers for kind in ("weight", "bias")}
    grouped = [id(p) for g in parameter_groups(model, stages, phase) for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    rows = stage_rows(model, stages, phase)
    sizes = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(row["trainable"] for row in rows) == sizes
    assert all((row["lr"] is None) == (row["trainable"] == 0) for row in rows)


def test_stages_below_keep_their_norms():
    model = timm.create_model("test_resnet", num_classes=4)
    names = trained_names(model, find_stages(model), plan_for(model, *NORM).phases[0])
    assert {n.split(".")[0] for n in names} == {"layer4", "fc"}


def test_modes_of_a_stage_that_trains_in_part():
    model = timm.create_model("test_resnet", num_classes=4)
    phase = plan_for(model, *NORM, "finetune.batch_norm=train").phases[0]
    freeze(model, find_stages(model), phase)
    assert model.layer4[0].bn1.training
    assert not model.layer4[0].conv1.training
    assert not model.layer3[0].bn1.training
    freeze(model, find_stages(model), replace(phase, freeze_batch_norm=True))
    assert not model.layer4[0].bn1.training


@pytest.mark.parametrize("moved", ["layer4.0.conv1.weight", "layer3.0.bn1.weight"])
def test_the_audit_sees_frozen_weights_move_in_a_stage_that_trains_in_part(moved):
    model = timm.create_model("test_resnet", num_classes=4)
    stages = find_stages(model)
    phase = plan_for(model, *NORM).phases[0]
    before = stage_hashes(model, stages, phase)
    with torch.no_grad():
        model.layer4[0].bn1.weight.add_(1)
    rows = {r["stage"]: r for r in audit(before, stage_hashes(model, stages, phase), phase, stages)}
    assert rows["stage4"]["weights"] == "moved"
    with torch.no_grad():
        model.get_parameter(moved).add_(1)
    with pytest.raises(FreezeError, match=r"phase last: .*stage[34].*frozen.* moved"):
        audit(before, stage_hashes(model, stages, phase), phase, stages)


def test_a_network_without_norm_layers_is_refused_with_a_remedy():
    model = timm.create_model("vgg11", num_classes=2)
    phase = plan_for(model, *NORM).phases[0]
    with pytest.raises(ConfigError, match=r"phases.last.trains=norm: .* has no normalisation.*all"):
        check_norms(model, find_stages(model), phase)


@pytest.mark.parametrize("batch_norm", ["train", "frozen"])
def test_cached_and_uncached_phases_of_norms_are_alike(image_folder, tmp_path, batch_norm):
    data = image_folder(splits={"train": 13, "val": 5})
    # Not AdamW: it turns the rounding of a gradient that is next to zero into a whole step.
    method = [*NORM, f"finetune.batch_norm={batch_norm}", "finetune.optimizer=sgd"]
    off, on = (run(data, tmp_path / mode, *method, f"cache={mode}") for mode in ("off", "on"))
    assert [phase.cached for phase in (*off.phases, *on.phases)] == [False, True]
    assert_alike(off, on)
    moved = {n for n, value in on.state.items() if not torch.equal(value, on.start[n])}
    statistics = {n for n in moved if "running_" in n or "num_batches" in n}
    assert bool(statistics) == (batch_norm == "train")
    kept = {n for n in on.kept("1-last") if "running_" not in n and "num_batches" not in n}
    assert moved - statistics == kept
    assert not [n for n in moved if "conv" in n and n.endswith("weight")]
    trained = sum(on.state[n].numel() for n in moved - statistics)
    assert on.phases[0].trainable_parameters == trained < 20_000
