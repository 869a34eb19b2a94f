"""Schemas and command lines: what is refused, in which words, and all at once."""

from __future__ import annotations

from dataclasses import replace

import pytest
from omegaconf import OmegaConf

from tl.config import (
    DECIDED,
    AugmentConfig,
    BatchNormMode,
    ConfigError,
    DataConfig,
    FinetuneConfig,
    ModelConfig,
    PhaseConfig,
    PredictConfig,
    TrainConfig,
    compose,
    schema_keys,
    to_yaml,
    validate,
)
from tl.pipelines.commandline import check_overrides, help_text


def problems(*overrides: str, pipeline: str = "train") -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check_overrides(pipeline, list(overrides))
    return caught.value.problems


def test_compose_fills_presets_and_overrides():
    config = compose("train", ["data.root=x", "finetune=gradual", "finetune.phases.head.epochs=2"])
    assert list(config.finetune.phases) == ["head", "last_1", "last_2", "last_3", "last_4", "all"]
    assert config.finetune.phases["head"].epochs == 2
    assert config.finetune.phases["all"] == PhaseConfig(train_stages=-1, head_lr=3e-4)
    assert config.finetune.batch_norm is BatchNormMode.auto


def test_compose_sets_values_as_they_are():
    config = compose("train", [], {"data.root": "a b=c,d", "finetune.epochs": 3})
    assert (config.data.root, config.finetune.epochs) == ("a b=c,d", 3)


def test_compose_works_inside_hydra(tmp_path):
    from hydra import initialize_config_module

    with initialize_config_module("tl.conf", version_base="1.3"):
        assert compose("predict", ["bundle=b", "source=s"]).top_k == 3
        assert compose("train", ["data.root=x"]).data.root == "x"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sed=3", "unknown key sed; did you mean seed?"),
        ("+sed=3", "unknown key sed; did you mean seed?"),
        ("data.batch_siz=3", "unknown key data.batch_siz; did you mean data.batch_size?"),
        ("finetune.epochs=0", "finetune.epochs must be at least 1, got 0"),
        ("finetune.lr_ratio=0.5", "finetune.lr_ratio must be in [1, 100], got 0.5"),
        ("finetune.head_lr=nan", "finetune.head_lr must be in (0, 100], got nan"),
        ("data.val_fraction=foo", "data.val_fraction must be a number, got 'foo'"),
        ("data.num_workers=2.5", "data.num_workers must be a whole number or null, got 2.5"),
        (
            "finetune.optimizer=adm",
            "finetune.optimizer must be one of adamw, sgd or null, got 'adm'",
        ),
        ("finetune.phases.head.epoch=1", "did you mean finetune.phases.head.epochs?"),
        ("finetune.phases.head.train_stages=9", "train_stages must be in [-1, 5], got 9"),
        ("augment.crop_scale=[0.9,1.2]", "augment.crop_scale must be in (0, 1], got 1.2"),
        ("finetune.precision=8-bit", "finetune.precision must be one of 32-true, 16-mixed"),
        ("model=resnet19", "no preset model=resnet19; did you mean model=resnet18?"),
        ("finetune=lpft", "no preset finetune=lpft; did you mean finetune=lp_ft?"),
        ("data=x", "data is a group of keys: root, table"),
        ("seed=1,x", "seed must be a whole number, got 'x'"),
        ("data.root='", 'cannot read "data.root=\'": write key=value'),
    ],
)
def test_a_wrong_override_is_named_with_its_remedy(override, message):
    assert message in "\n".join(problems(override))


def test_all_problems_come_at_once():
    found = problems("sed=3", "finetune.epochs=0", "model=resnet19", "augment.crop_scale=[0.9,0.1]")
    assert len(found) == 5
    assert any(p.startswith("data.root is required") for p in found)
    assert "augment.crop_scale must be two numbers [low, high], got [0.9, 0.1]" in found


def test_right_overrides_pass():
    check_overrides(
        "train",
        [
            "data.root=a b",
            "model=resnet18,resnet50",
            "finetune.phases.head.epochs=2",
            "+finetune.phases.more.train_stages=1",
            "trainer.max_steps=3",
            "callbacks=device_stats",
            "+tracking.tags.team=vision",
            "hydra.sweep.dir=x",
            "-m",
            "data.num_workers=null",
        ],
    )


def test_validate_names_what_hydra_lets_through():
    config = OmegaConf.create({"data": {"root": "x", "rot": 1}, "model": {"name": "m"}, "sed": 3})
    with pytest.raises(ConfigError) as caught:
        validate(config, TrainConfig)
    assert caught.value.problems == [
        "unknown key data.rot; did you mean data.root?",
        "unknown key sed; did you mean seed?",
        "finetune.phases is empty: choose a method, such as finetune=lp_ft",
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["finetune=lp_ft", "finetune.epochs=null"],
            "finetune.epochs must be given; null is for finetune=auto, which decides it",
        ),
        (
            ["finetune=lp_ft", "amount=tiny"],
            "amount=tiny is for finetune=auto; finetune=lp_ft says the method already",
        ),
        (["finetune=full", "similarity=similar"], "similarity=similar is for finetune=auto"),
        (["finetune=full", "finetune.confirm=true"], "finetune.confirm=true is for finetune=auto"),
        (["finetune=auto", "amount=huge"], "amount must be one of tiny, small, medium, large"),
        (
            ["finetune=auto", "finetune.phases.head.epochs=2"],
            "finetune.phases.head.epochs: this method has no phase head (finetune=auto decides its",
        ),
        (
            ["finetune=lp_ft", "+finetune.phases.last.epochs=2"],
            "finetune.phases.last.epochs: this method has no phase last",
        ),
        (
            ["finetune=lp_ft", "finetune.phases.head.average=true"],
            "finetune.phases.head.average: there is no phase before the first one",
        ),
        (
            ["finetune=linear_probe", "finetune.phases.head.trains=norm"],
            "finetune.phases.head.trains=norm is about stages that train",
        ),
        (
            ["finetune=lp_ft", "finetune.head=stages"],
            "finetune.phases.all: finetune.head=stages trains the head alone",
        ),
    ],
)
def test_methods_refuse_what_they_cannot_do(overrides, message):
    with pytest.raises(ConfigError) as caught:
        compose("train", ["data.root=x", *overrides])
    assert message in "\n".join(caught.value.problems)


def test_auto_takes_no_phases():
    with pytest.raises(ConfigError, match="phases: finetune=auto decides them, got head"):
        FinetuneConfig(method="auto", phases={"head": PhaseConfig()})


def test_auto_leaves_open_what_it_decides():
    config = compose("train", ["data.root=x", "finetune=auto", "finetune.patience=3"]).finetune
    assert [key for key in DECIDED if getattr(config, key) is not None] == ["patience"]
    assert config.phases == {}


def test_what_was_decided_keeps_what_was_forced():
    config = compose("train", ["data.root=x", "finetune=lp_ft"])
    finetune = replace(config.finetune, method="auto: lp_ft")
    assert replace(config, finetune=finetune, amount="tiny").amount == "tiny"


def test_required_keys_are_listed_together():
    with pytest.raises(ConfigError) as caught:
        PredictConfig()
    assert [p.split(" ")[0] for p in caught.value.problems] == ["bundle", "source"]


def test_limits_hold_for_python_users_too():
    with pytest.raises(ConfigError, match=r"hflip must be in \[0, 1\], got 2"):
        AugmentConfig(hflip=2)
    with pytest.raises(ConfigError, match="batch_size must be at least 1, got 0"):
        DataConfig(root="x", batch_size=0)


@pytest.mark.parametrize("target", ["os.system", "torch.load", "pytorch_lightningx.Trainer"])
def test_only_lightning_and_tl_are_constructed(target):
    with pytest.raises(ConfigError, match=r"callbacks.bad._target_ must name pytorch_lightning"):
        TrainConfig(
            data=DataConfig(root="x"),
            model=ModelConfig(name="m"),
            finetune=FinetuneConfig(phases={"head": PhaseConfig()}),
            callbacks={"bad": {"_target_": target}},
        )


def test_a_config_survives_yaml():
    config = compose("train", ["data.root=x", "finetune=partial", "augment=strong"])
    assert validate(OmegaConf.create(to_yaml(config)), TrainConfig) == config


def test_every_key_has_a_help_text():
    for key, _, field in schema_keys(TrainConfig):
        assert field.metadata.get("help"), key


def test_help_names_presets_and_keys():
    text = help_text("train", "summary")
    for word in (
        "lp_ft",
        "mobilenetv2_100",
        "data.root",
        "finetune.head_lr",
        "methods 0.001]",
        "resume",
    ):
        assert word in text
