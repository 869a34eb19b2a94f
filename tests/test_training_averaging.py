"""Which weights a phase leaves behind: best or last, a moving average, a mixture."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import pytorch_lightning as pl
import timm
import torch
from methods import CrashError, Run, assert_alike, assert_same, crash_after, plan_for, run
from pytorch_lightning.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader

from tl.heads import train_epoch
from tl.losses import Objective
from tl.models import find_stages
from tl.module import TransferModule
from tl.training.averaging import MovingAverage, choose_mixture, decay_of, mix

HEAD = "finetune=linear_probe"
LAST = ["finetune=partial", "finetune.optimizer=sgd", "finetune.head_lr=0.05"]


@pytest.fixture
def data(image_folder):
    return image_folder(splits={"train": 13, "val": 5})


# --- the last epoch -----------------------------------------------------------------------------

# So fast that the loss on val soon rises.
TOO_FAST = ["finetune=lp_ft", "finetune.head_lr=0.01", "finetune.phases.all.head_lr=0.3"]


@pytest.mark.parametrize("cache", ["on", "off"])
def test_the_last_weights_stay_even_where_an_earlier_epoch_was_better(data, tmp_path, cache):
    last = run(data, tmp_path / "last", *TOO_FAST, f"cache={cache}", "finetune.select=last")
    assert [phase.kept for phase in last.phases] == [True, True]
    assert [phase.best_epoch for phase in last.phases] == [4, 4]
    final = last.history.iloc[-1]
    assert final["val/loss"] > last.history["val/loss"].min()
    assert last.phases[1].best_loss == final["val/loss"]
    assert last.result.predict.loss("val")[0] == pytest.approx(final["val/loss"], rel=1e-4)
    best = run(data, tmp_path / "best", *TOO_FAST, f"cache={cache}")
    assert best.phases[1].best_loss < final["val/loss"]


def test_a_later_phase_is_compared_with_the_weights_that_it_began_with(data, tmp_path):
    method = ["finetune=gradual", "finetune.head_lr=0.05", "finetune.phases.last_1.select=last"]
    # What is smooth has a larger loss on val, where nothing is smoothed.
    method += ["finetune.phases.last_1.label_smoothing=0.9", "finetune.phases.last_1.head_lr=0.05"]
    method += ["finetune.phases.last_2.head_lr=0.000001"]
    found = run(data, tmp_path / "run", *method)
    head, worse, after = found.phases[:3]
    assert head.best_loss < after.best_loss < worse.best_loss
    assert after.kept


# --- moving average -----------------------------------------------------------------------------


class _Watch(Callback):
    """Writes down what trains: at the beginning, after each batch, and as validation sees it."""

    def __init__(self) -> None:
        self.steps, self.validated = [], []

    def _state(self, module):
        return {name: value.clone() for name, value in module.trained_state().items()}

    def on_train_start(self, trainer, pl_module):
        self.steps.append(self._state(pl_module))

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.steps.append(self._state(pl_module))

    def on_validation_batch_end(self, trainer, pl_module, *_):
        self.validated.append(self._state(pl_module))


def test_the_average_is_that_by_hand_and_validation_sees_it():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3)
    settings = ["finetune.epochs=2", "finetune.optimizer=sgd", "finetune.head_lr=0.01"]
    phase = plan_for(model, "finetune=partial", "finetune.batch_norm=train", *settings).phases[0]
    module = TransferModule(model, find_stages(model), phase, Objective(), 3)
    batches = [
        {"image": torch.randn(4, 3, 32, 32), "label": torch.tensor([0, 1, 2, 0])} for _ in range(6)
    ]
    average, watch = MovingAverage(), _Watch()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        accumulate_grad_batches=2,
        callbacks=[average, watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    train, val = (DataLoader(part, batch_size=None) for part in (batches, batches[:1]))
    trainer.fit(module, train, val)
    assert average.decay == 0.9, "six steps: as short as an average may be"
    by_hand = watch.steps[0]
    for number, state in enumerate(watch.steps[1:], 1):
        if number % 2 == 0:  # only then the optimizer made a step
            by_hand = {
                n: 0.9 * value + 0.1 * state[n] if value.is_floating_point() else state[n]
                for n, value in by_hand.items()
            }
        if number == 6:
            for name, value in by_hand.items():
                torch.testing.assert_close(watch.validated[0][name], value)
    kept = average.trained_state()
    assert kept.keys() == by_hand.keys()
    for name, value in by_hand.items():
        torch.testing.assert_close(kept[name], value)
        torch.testing.assert_close(watch.validated[1][name], value)
    live = model.state_dict()
    assert all(torch.equal(live[n], v) for n, v in watch.steps[-1].items()), "training goes on"
    assert not torch.equal(kept["layer4.0.conv1.weight"], live["layer4.0.conv1.weight"])


def test_a_head_that_learns_whole_epochs_tells_of_each_step():
    head = nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(
        [{"params": head.parameters(), "initial_lr": 0.1}], lr=0.1, fused=True
    )
    seen = []
    rows, labels = torch.randn(10, 4), torch.tensor([0, 1] * 5)
    train_epoch(
        head,
        optimizer,
        rows,
        labels,
        batch_size=4,
        after_step=lambda: seen.append(head.weight.detach().clone()),
    )
    assert len(seen) == 3
    assert len({value.sum().item() for value in seen}) == 3
    assert torch.equal(seen[-1], head.weight)


def test_decay_reaches_back_over_a_tenth_of_the_steps():
    found = [decay_of(steps) for steps in (1, 100, 400, 10_000, 10**7)]
    assert found == pytest.approx([0.9, 0.9, 0.975, 0.999, 0.9999])


@pytest.mark.parametrize("method", [[HEAD], LAST, [*LAST, "finetune.batch_norm=train"]])
def test_cached_and_uncached_averages_are_alike(data, tmp_path, method):
    off, on, plain = (
        run(data, tmp_path / name, *method, "augment=none", f"cache={cache}", f"finetune.ema={ema}")
        for name, cache, ema in (("a", "off", "true"), ("b", "on", "true"), ("c", "on", "false"))
    )
    assert [phase.cached for phase in (*off.phases, *on.phases)] == [False, True]
    assert_alike(off, on)
    losses = [found.history["val/loss"].iloc[-1] for found in (on, plain)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3), "an average is another model"
    assert on.result.predict.loss("val")[0] == pytest.approx(on.phases[0].best_loss, rel=1e-4)


# --- mixture ------------------------------------------------------------------------------------


def test_a_mixture_lies_between_its_ends():
    before = {"w": torch.tensor([0.0, 2.0]), "n": torch.tensor(3)}
    after = {"w": torch.tensor([4.0, 1.0]), "n": torch.tensor(5)}
    assert torch.equal(mix(before, after, 0.25)["w"], torch.tensor([1.0, 1.75]))
    assert torch.equal(mix(before, after, 0.0)["w"], before["w"])
    assert torch.equal(mix(before, after, 1.0)["w"], after["w"])
    assert mix(before, after, 0.25)["n"] == 5


@pytest.mark.parametrize(
    ("target", "alpha"), [(-1.0, 0.0), (1.1, 0.25), (2.2, 0.5), (2.9, 0.75), (9.0, 1.0)]
)
def test_the_share_is_that_of_the_least_loss(target, alpha):
    model = nn.Linear(1, 1, bias=False)
    ends = [{"weight": torch.full((1, 1), value)} for value in (0.0, 4.0)]
    phase = plan_for(timm.create_model("test_resnet", num_classes=2), HEAD).phases[0]
    loss = lambda: (abs(float(model.weight) - target), 0.5)  # noqa: E731
    found = choose_mixture(model, phase, *ends, loss)
    assert (found.alpha, float(model.weight)) == (alpha, 4 * alpha)
    assert found.loss == found.losses[alpha] == min(found.losses.values())
    fixed = choose_mixture(model, replace(phase, select="last"), *ends, loss)
    assert (fixed.alpha, float(model.weight), len(fixed.losses)) == (0.5, 2.0, 1)


def test_of_equal_losses_the_phase_stays_as_it_is():
    model = nn.Linear(1, 1, bias=False)
    ends = [copy.deepcopy(model.state_dict()) for _ in range(2)]
    phase = plan_for(timm.create_model("test_resnet", num_classes=2), HEAD).phases[0]
    assert choose_mixture(model, phase, *ends, lambda: (1.0, 1.0)).alpha == 1.0


MIXED = ["finetune=lp_ft", "finetune.head_lr=0.01", "finetune.phases.all.average=true"]


def _mixture(found: Run) -> dict:
    return next(v for k, v in found.facts.items() if k.endswith("-average"))


@pytest.mark.parametrize("rate", [0.003, 0.3])
def test_a_phase_leaves_the_mixture_behind(data, tmp_path, rate):
    found = run(data, tmp_path / "run", *MIXED, f"finetune.phases.all.head_lr={rate}", "cache=on")
    head, both = found.phases
    facts = _mixture(found)
    assert head.alpha == 1.0
    assert both.alpha == facts["alpha"]
    assert both.best_loss == min(facts["losses"].values()) == facts["losses"][both.alpha]
    assert facts["losses"][0.0] == pytest.approx(head.best_loss, rel=1e-4)
    end = found.history.iloc[4:]["val/loss"].min()
    assert facts["losses"][1.0] == pytest.approx(end, rel=1e-4)
    assert both.kept == (both.alpha > 0)
    assert found.result.predict.loss("val")[0] == pytest.approx(both.best_loss, rel=1e-4)
    left = found.kept("2-all") if both.kept else found.kept("1-head")
    assert all(torch.equal(found.state[name], value) for name, value in left.items())


def test_cached_and_uncached_mixtures_are_alike(data, tmp_path):
    method = ["finetune=gradual", "finetune.average=true", "finetune.optimizer=sgd"]
    method += ["finetune.phases.head.average=false", "finetune.head_lr=0.05"]
    off, on = (run(data, tmp_path / name, *method, f"cache={name}") for name in ("off", "on"))
    assert any(phase.cached for phase in on.phases[1:])
    assert [p.alpha for p in off.phases] == [p.alpha for p in on.phases]
    assert_alike(off, on)


@pytest.mark.parametrize("cache", ["on", "off"])
def test_resumed_phases_end_as_uninterrupted_ones(data, tmp_path, cache, monkeypatch):
    method = [*MIXED, "finetune.ema=true", "finetune.phases.all.select=last", f"cache={cache}"]
    whole = run(data, tmp_path / "whole", *method)
    for epoch in (2, 7):
        broken = tmp_path / f"broken{epoch}"
        with monkeypatch.context() as patch:
            crash_after(patch, epoch)
            with pytest.raises(CrashError):
                run(data, broken, *method)
        assert_same(whole, run(data, broken, *method))
