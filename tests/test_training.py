"""Plans at work: what trains moves, what is frozen does not, and the best weights stay."""

from __future__ import annotations

import json
import math

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import tl
from tl.config import ConfigError
from tl.module import TrainingError
from tl.training.lightning import AtomicCheckpointIO, build, make_trainer
from tl.training.state import read_progress

SMALL = [
    "experiment=smoke",
    "model=test_efficientnet",
    "augment=none",
    "tracking.enabled=false",
    "export.enabled=false",
]


def train(data, output, *overrides, **values):
    settings = {"data.root": str(data), "output_dir": str(output), "model.image_size": 32, **values}
    return tl.train(tl.compose("train", [*SMALL, *overrides], settings))


def weights(checkpoint):
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    return {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}


@pytest.fixture
def pretrained(image_folder, tmp_path):
    """Weights of a short training on other classes."""
    data = image_folder(tmp_path / "source", classes=("a", "b"))
    return train(data, tmp_path / "pretraining", "finetune=scratch", **{"finetune.epochs": 2})


def test_a_run_learns_and_writes_what_the_design_promises(image_folder, tmp_path):
    data = image_folder(splits={"train": 12, "val": 4, "test": 4})
    result = train(data, tmp_path / "run", "finetune=scratch", **{"finetune.epochs": 15})
    assert result.metrics["val/acc"] >= 0.75
    assert result.metrics["test/images"] == 12
    files = {str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").rglob("*.*")}
    assert files == {
        "config.yaml",
        "plan.json",
        "metrics.json",
        "history.csv",
        "predictions.parquet",
        "train_images.parquet",
        "per_class.csv",
        "calibration.json",
        *(
            f"pictures/{name}_{split}.png"
            for name in ("calibration", "confusion", "ranking")
            for split in ("val", "test")
        ),
        "pictures/learning_curves.png",
        "report.html",
        "audit.html",
        "audit.json",
        "checkpoints/1-all/activations.json",
        "checkpoints/1-all/best.ckpt",
        "checkpoints/1-all/last.ckpt",
        "checkpoints/model.json",
        "checkpoints/model.safetensors",
        "checkpoints/progress.json",
    }
    assert json.loads((tmp_path / "run/metrics.json").read_text()) == result.metrics


def test_a_linear_probe_moves_nothing_but_the_head(image_folder, tmp_path, pretrained):
    result = train(
        image_folder(),
        tmp_path / "run",
        "finetune=linear_probe",
        "augment=medium",
        **{"finetune.epochs": 3, "model.weights": str(pretrained.weights)},
    )
    before, after = load_file(pretrained.weights), load_file(result.weights)
    for name in before:
        if not name.startswith("classifier."):
            assert torch.equal(before[name], after[name]), name
    assert after["classifier.weight"].any()
    kept = weights(tmp_path / "run/checkpoints/1-head/best.ckpt")
    assert set(kept) == {"classifier.weight", "classifier.bias"}, "only what trains is kept"
    assert torch.equal(kept["classifier.weight"], after["classifier.weight"])
    assert result.trainable_parameters == 3 * 256 + 3


def test_phases_start_from_the_best_weights_of_the_one_before(image_folder, tmp_path, pretrained):
    train(
        image_folder(),
        tmp_path / "run",
        "finetune=lp_ft",
        **{"finetune.epochs": 3, "model.weights": str(pretrained.weights)},
    )
    start = load_file(pretrained.weights)
    final = weights(tmp_path / "run/checkpoints/2-all/best.ckpt")
    stem = "conv_stem.weight"
    moved = (start[stem] - final[stem]).abs().max().item()
    assert 0 < moved < 1e-3, "the stem learns, and slowly"
    phases, history = read_progress(tmp_path / "run/checkpoints")
    assert [p.name for p in phases] == ["head", "all"]
    assert [r["phase"] for r in history] == ["head"] * 3 + ["all"] * 3
    assert phases[0].trainable_parameters < phases[1].trainable_parameters
    assert phases[0].best_loss == min(r["val/loss"] for r in history[:3])


def test_a_phase_that_makes_it_worse_is_dropped(image_folder, tmp_path, pretrained, capsys):
    result = train(
        image_folder(),
        tmp_path / "run",
        "finetune=lp_ft",
        **{
            "finetune.epochs": 4,
            "finetune.head_lr": 0.02,
            "finetune.phases.all.head_lr": 1.0,
            "finetune.phases.all.lr_ratio": 1.0,
            "finetune.phases.all.epochs": 1,
            "finetune.phases.all.gradient_clip": 0.0,
            "model.weights": str(pretrained.weights),
        },
    )
    phases, _ = read_progress(tmp_path / "run/checkpoints")
    assert [p.kept for p in phases] == [True, False]
    assert "did not improve val/loss" in capsys.readouterr().out
    assert result.metrics["val/loss"] == pytest.approx(phases[0].best_loss, rel=1e-4)


@pytest.mark.parametrize("select", ["last", "best"])
def test_validation_every_few_epochs_chooses_among_those(image_folder, tmp_path, select):
    data = image_folder(splits={"train": 8, "val": 3})
    common = {"finetune.epochs": 7, "finetune.select": select, "finetune.patience": 5}
    seldom, always = (
        train(
            data,
            tmp_path / f"every-{number}",
            "finetune=scratch",
            f"+trainer.check_val_every_n_epoch={number}",
            **common,
        )
        for number in (3, 1)
    )
    losses = pd.read_csv(tmp_path / "every-3/history.csv")["val/loss"]
    assert [*losses.dropna().index] == [2, 5], "an epoch that was not validated has no figure"
    if select == "last":
        kept, wanted = load_file(seldom.weights), load_file(always.weights)
        assert all(torch.equal(kept[name], wanted[name]) for name in wanted)
    else:
        (phase,), _ = read_progress(tmp_path / "every-3/checkpoints")
        assert phase.best_loss == losses.min()
        assert seldom.metrics["val/loss"] == pytest.approx(losses.min(), rel=1e-4)


def test_early_stop_restores_the_best_epoch(image_folder, tmp_path):
    data = image_folder(splits={"train": 8, "val": 3})
    train(
        data,
        tmp_path / "run",
        "finetune=scratch",
        **{"finetune.epochs": 40, "finetune.patience": 2, "finetune.head_lr": 0.05},
    )
    (phase,), history = read_progress(tmp_path / "run/checkpoints")
    assert phase.epochs < 40, "it stopped early"
    assert phase.epochs == phase.best_epoch + 2
    assert phase.best_loss == min(r["val/loss"] for r in history)


def test_a_diverging_loss_fails_with_a_remedy(image_folder, tmp_path):
    with pytest.raises(TrainingError, match=r"phase all, epoch \d: the loss is not finite"):
        train(
            image_folder(),
            tmp_path / "run",
            "finetune=full",
            **{
                "finetune.head_lr": 100.0,
                "finetune.lr_ratio": 1.0,
                "finetune.gradient_clip": 0.0,
                "finetune.optimizer": "sgd",
                "finetune.epochs": 6,
            },
        )


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(image_folder, tmp_path):
    data = image_folder()
    runs = [
        train(data, tmp_path / name, "augment=strong", seed=seed)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    losses = [run.metrics["val/loss"] for run in runs]
    assert losses[0] == losses[1] != losses[2]


def test_every_phase_gets_its_own_settings(image_folder):
    config = tl.compose("train", [*SMALL, "data.root=x"])
    from tl.finetuning import Phase

    phase = Phase("p", ("head",), 7, 1e-3, 3, "sgd", 0.0, 0.1, True, 3, 0.0, 0.5, 4, "bf16-mixed")
    trainer = make_trainer(config.trainer, phase)
    assert trainer.max_epochs == 7
    assert trainer.accumulate_grad_batches == 4
    assert trainer.gradient_clip_val == 0.5
    assert trainer.precision == "bf16-mixed"


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"_target_": "os.system", "command": "true"}, "_target_ must name pytorch_lightning"),
        ({"_target_": "pytorch_lightning.Trainer", "max_epoch": 1}, "max_epoch"),
        ({"_target_": "pytorch_lightning.NoSuch"}, "there is no pytorch_lightning.NoSuch"),
    ],
)
def test_third_party_objects_are_guarded(node, message):
    with pytest.raises(ConfigError, match=message):
        build(node, "trainer")


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(tmp_path, monkeypatch):
    def full_disk(_, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    path = tmp_path / "best.ckpt"
    AtomicCheckpointIO().save_checkpoint({"epoch": 1}, path)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        with pytest.raises(TrainingError, match=r"No space left.*the last good one is still there"):
            AtomicCheckpointIO().save_checkpoint({"epoch": 2}, path)
    assert torch.load(path, weights_only=True) == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["best.ckpt"]


def test_accumulation_and_half_precision_train(image_folder, tmp_path):
    result = train(
        image_folder(),
        tmp_path / "run",
        **{"finetune.accumulate": 2, "finetune.precision": "bf16-mixed"},
    )
    assert math.isfinite(result.metrics["val/loss"])


def photographs(assets, folder, method):
    """Accuracy on ants and bees with MobileNetV2."""
    values = {
        "data.root": str(assets / "data/hymenoptera"),
        "model.weights": str(assets / "weights"),
        "finetune.epochs": 3,
        "finetune.phases.head.epochs": 15,
        "tracking.enabled": False,
        "export.enabled": False,
        "output_dir": str(folder),
    }
    config = tl.compose("train", ["model=mobilenetv2_100", f"finetune={method}"], values)
    return tl.train(config).metrics["val/acc"]


def test_real_photographs(assets, tmp_path):
    assert photographs(assets, tmp_path / "run", "linear_probe") >= 0.92


@pytest.mark.slow
def test_real_photographs_whole(assets, tmp_path):
    assert photographs(assets, tmp_path / "run", "lp_ft") >= 0.92
