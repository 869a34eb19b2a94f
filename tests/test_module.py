"""The Lightning module of a phase: loss, schedule, guard against a loss that is no number."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

from tl.config import ModelConfig, compose
from tl.finetuning import build_plan
from tl.losses import Objective
from tl.models import build_model, find_stages
from tl.module import TrainingError, TransferModule, warmup_cosine


def phase_for(*overrides):
    config = compose("train", ["data.root=x", *overrides]).finetune
    built = build_model(ModelConfig(name="test_resnet", weights="none"), 3)
    return build_plan(config, built, train_images=5000, batch_size=32).phases[0]


@pytest.fixture
def module():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3)
    phase = phase_for("finetune=full", "finetune.label_smoothing=0.1")
    return TransferModule(model, find_stages(model), phase, Objective(), 3)


def batch():
    return {"image": torch.randn(4, 3, 32, 32), "label": torch.tensor([0, 1, 2, 0])}


def silence(module):
    module.log = module.log_dict = lambda *_, **__: None
    return module


def test_training_loss_is_cross_entropy_with_label_smoothing(module):
    silence(module).eval()
    data = batch()
    loss = module.training_step(data, 0)
    logits = module.model(data["image"])
    smooth = torch.full((4, 3), 0.1 / 3)
    smooth[range(4), data["label"]] += 0.9
    expected = -(smooth * logits.log_softmax(1)).sum(1).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_mix_gives_soft_labels(module):
    silence(module).eval()
    module.mix = lambda images, _: (images * 0, torch.full((4, 3), 1 / 3))
    module.phase = replace(module.phase, label_smoothing=0.0)
    loss = module.training_step(batch(), 0)
    logits = module.model(torch.zeros(4, 3, 32, 32))
    assert loss.item() == pytest.approx(-logits.log_softmax(1).mean().item(), rel=1e-5)


def test_a_step_depends_on_seed_phase_epoch_and_batch_alone(module):
    def draw(number):
        module.on_train_batch_start({}, number)
        return torch.rand(3)

    first = draw(0)
    torch.manual_seed(99)
    assert torch.equal(first, draw(0))
    assert not torch.equal(first, draw(1))
    module.seed = 1
    assert not torch.equal(first, draw(0))


def rates(steps, warmup, lrs=(1.0, 0.1)):
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs]
    optimizer = torch.optim.SGD(groups)
    schedule = warmup_cosine(optimizer, steps, warmup)
    seen = []
    for _ in range(steps):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return torch.tensor(seen)


def test_warmup_rises_and_cosine_falls_to_zero():
    seen = rates(100, 0.1)[:, 0]
    assert torch.all(seen[1:11] > seen[:10])
    assert seen.argmax() == 10
    assert seen[10] == pytest.approx(1.0)
    assert torch.all(seen[11:] < seen[10:-1])
    assert seen[55] == pytest.approx(0.5, abs=0.02)
    assert seen[-1] < 0.001


@pytest.mark.parametrize(("steps", "warmup"), [(100, 0.1), (10, 0.0), (1, 0.1), (3, 1.0)])
def test_the_ratio_between_stages_stays(steps, warmup):
    seen = rates(steps, warmup)
    assert torch.all(seen > 0)
    assert torch.allclose(seen[:, 0] / seen[:, 1], torch.tensor(10.0))


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_optimizers(name):
    model = timm.create_model("test_resnet", num_classes=3)
    phase = phase_for("finetune=lp_ft", f"finetune.optimizer={name}")
    module = TransferModule(model, find_stages(model), phase, Objective(), 3)
    module._trainer = type("T", (), {"estimated_stepping_batches": 10, "barebones": False})()
    optimizer = module.configure_optimizers()["optimizer"]
    assert type(optimizer).__name__.lower() == name
    assert [g["name"] for g in optimizer.param_groups] == ["head", "head/no_decay"]
    if name == "sgd":
        assert optimizer.param_groups[0]["nesterov"]


def test_a_loss_that_is_no_number_stops_with_a_remedy(module):
    silence(module)
    bad = batch()
    bad["image"][0] = float("nan")
    module.training_step(bad, 0)
    module._trainer = type("T", (), {"callback_metrics": {}, "current_epoch": 4})()
    with pytest.raises(TrainingError) as caught:
        module.on_train_epoch_end()
    assert "phase all, epoch 5: the loss is not finite" in str(caught.value)
    assert "finetune.head_lr (now 0.001)" in str(caught.value)
