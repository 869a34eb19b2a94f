"""The space of a search: what may stand in it, what is refused, and what a point means."""

from __future__ import annotations

from dataclasses import replace

import pytest
from commands import Command

from tl.config import ConfigError, Sampler, SearchSettings, compose
from tl.search.setup import without_repeats
from tl.search.space import Dimension, applied, job_of, limits, parse, value_of
from tl.search.usual import default_space

HEAD_LR = {"finetune.head_lr": {"low": 0.001, "high": 0.1}}


def job(*overrides):
    return job_of(compose("search", ["data.root=x", "finetune=lp_partial", *overrides]))


def test_dotted_and_nested_keys_are_the_same():
    nested = {"finetune": {"head_lr": {"low": 0.001, "high": 0.1}}}
    (one,), (two,) = parse(HEAD_LR, job()), parse(nested, job())
    assert one == two == Dimension("finetune.head_lr", (), 0.001, 0.1, log=True)
    assert parse({**HEAD_LR, "augment": None}, job()) == (one,)  # null takes one out


def test_a_range_is_logarithmic_where_its_ends_are_far_apart():
    near = {
        "finetune.head_lr": {"low": 0.01, "high": 0.05},
        "finetune.epochs": {"low": 2, "high": 40},
    }
    rate, epochs = parse(near, job())
    assert (rate.log, epochs.log, epochs.whole) == (False, False, True)
    assert epochs.at(0.5) == 21
    assert Dimension("x", (), 1e-4, 1.0, log=True).at(0.5) == pytest.approx(0.01)


def test_several_values_on_the_command_line_are_a_part_of_the_space():
    words = ["search=methods", "augment=light,medium", "model.drop_rate=interval(0.1,0.3)"]
    config = compose("search", ["data.root=x", *words, "search.space.finetune=null"])
    found = {d.key: d for d in parse(config.search.space, job_of(config))}
    assert set(found) == {"augment", "model.drop_rate", "finetune.head_lr", "finetune.lr_ratio"}
    assert found["augment"].choices == ("light", "medium")
    assert (found["model.drop_rate"].low, found["model.drop_rate"].high) == (0.1, 0.3)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (
            {"finetune.haed_lr": {"low": 1, "high": 2}},
            "search.space.finetune.haed_lr: unknown key finetune.haed_lr; did you mean "
            "finetune.head_lr?",
        ),
        (
            {"augment": ["light", "mdium"]},
            "search.space.augment: no preset augment=mdium; there are auto, light, medium, none",
        ),
        ({"data.val_fraction": [0.1, 0.2]}, "all trials must be judged on the same images"),
        ({"seed": [1, 2]}, "search.space.seed: cannot be searched"),
        ({"finetune.head_lr": {"low": -1, "high": 2}}, "head_lr must be in (0, 100], got -1"),
        ({"finetune.head_lr": {"low": 1, "high": 0.1}}, "low must be below high, got 1 and 0.1"),
        ({"finetune.head_lr": {"low": 0.1}}, "a range needs low and high; high is missing"),
        ({"finetune.head_lr": {"low": 0.1, "hihg": 1}}, "unknown key hihg; did you mean high?"),
        ({"finetune.head_lr": 0.1}, "write [0.1, …] or {low: …, high: …, log: true}, got 0.1"),
        ({"finetune.head_lr": [0.1]}, "needs at least two different choices, got [0.1]"),
        ({"finetune.optimizer": {"low": 1, "high": 2}}, "is no number: give choices"),
        ({"finetune.optimizer": ["adamw", "adam"]}, "optimizer must be one of adamw, sgd"),
        (
            {"finetune.label_smoothing": {"low": 0, "high": 0.1, "log": True}},
            "log needs a low above 0, got 0",
        ),
        (
            {"finetune.phases.all.head_lr": {"low": 0.1, "high": 1}},
            "finetune=lp_partial has no phase all; it has head, last",
        ),
        ({"finetune": ["auto", "lp_ft"]}, "auto decides a method; name the methods to compare"),
        (
            {"finetune": ["lp_ft", "full"], "finetune.phases.head.epochs": [2, 3]},
            "search.space.finetune.phases.head.epochs: full has no phase head",
        ),
        (
            {"model": ["resnet18", "resnet50"], "model.name": ["a", "b"]},
            "search.space.model and search.space.model.name are the same thing",
        ),
    ],
)
def test_what_is_wrong_is_said(space, message):
    with pytest.raises(ConfigError) as caught:
        parse(space, job())
    assert message in str(caught.value)


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(ConfigError) as caught:
        parse({"seed": [1, 2], "augment": ["a", "b"], **HEAD_LR}, job())
    assert len(caught.value.problems) == 3


def test_several_models_need_a_folder_of_weights():
    config = job("model.weights=one.safetensors")
    with pytest.raises(ConfigError, match="name the folder that holds"):
        parse({"model": ["resnet18", "resnet50"]}, config)


def test_a_preset_takes_the_place_of_another_and_what_the_user_set_stays():
    config = job("finetune.epochs=7", "augment.rotate=5", "augment=light")
    found = applied(config, {"finetune": "lp_ft", "augment": "strong", "finetune.head_lr": 0.02})
    assert (found.finetune.method, list(found.finetune.phases)) == ("lp_ft", ["head", "all"])
    assert (found.finetune.epochs, found.finetune.head_lr) == (7, 0.02)
    assert (found.augment.name, found.augment.rotate) == ("strong", 5)
    assert config.finetune.method == "lp_partial"
    other = applied(config, {"model": "resnet18", "finetune.phases.last.head_lr": 0.3})
    assert other.model.name.startswith("resnet18.")
    assert other.finetune.phases["last"].head_lr == 0.3
    assert applied(config, {"finetune.optimizer": "sgd"}).finetune.optimizer.value == "sgd"


def test_a_point_outside_of_the_limits_is_refused():
    with pytest.raises(ConfigError, match="there is no phase all; there are head, last"):
        applied(job(), {"finetune.phases.all.epochs": 3})
    with pytest.raises(ConfigError, match="weight_decay must be at least 0"):
        applied(job(), {"finetune.weight_decay": -1.0})


def test_the_settings_as_given_are_a_point_of_the_space_or_not():
    config = job("augment=light")
    space = parse(
        {"augment": ["light", "medium"], **HEAD_LR, "finetune": ["lp_ft", "full"]}, config
    )
    assert [value_of(config, d) for d in space] == ["light", 0.001, None]


def test_the_space_of_those_who_name_none():
    keys = [d.key for d in default_space(job("finetune=linear_probe"), labels=True)]
    assert keys == ["finetune.head_lr", "finetune.weight_decay", "finetune.label_smoothing"]
    keys = [d.key for d in default_space(job(), labels=False)]
    assert keys == [
        *("finetune.head_lr", "finetune.phases.last.head_lr", "finetune.lr_ratio"),
        "finetune.weight_decay",
    ]
    slow, fast = (
        default_space(job(f"finetune.optimizer={name}"), labels=False)[0]
        for name in ("adamw", "sgd")
    )
    assert fast.high > slow.high


def test_each_setting_is_tried_once_where_there_are_few():
    asked = SearchSettings(trials=20)
    few = without_repeats(asked, [Dimension("augment", ("none", "light", "strong"))])
    assert (few.trials, few.sampler) == (3, Sampler.grid)
    rate = Dimension("finetune.head_lr", (), 0.001, 0.1, log=True)
    assert without_repeats(asked, [rate]) == asked
    assert without_repeats(replace(asked, sampler=Sampler.grid), [rate]).trials == 4


def test_limits_beyond_which_nothing_can_be_searched():
    assert limits("finetune.lr_ratio") == (1, 100)
    assert limits("finetune.phases.all.head_lr") == (0, 100)


@pytest.fixture
def command(capfd, monkeypatch) -> Command:
    return Command(capfd, monkeypatch)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("search.trials=0", "trials must be in [1, 100000], got 0"),
        ("search.folds=1", "folds must be 0 (none) or at least 2"),
        ("search.storage=redis://x", "storage must be journal or"),
        ("data.folds=5", "search.folds=5 judges each trial by"),
        ("resume=x", "a search goes on by the same command"),
    ],
)
def test_wrong_settings_are_refused(words, message):
    with pytest.raises(ConfigError) as caught:
        compose("search", ["data.root=x", words])
    assert message in str(caught.value)


def test_wrong_commands_are_refused_before_anything_is_written(command, image_folder, tmp_path):
    out = tmp_path / "s"
    words = [f"data.root={image_folder()}", f"output_dir={out}", "experiment=smoke"]
    command("search", *words, "-m").refused("leave -m out")
    command("train", "data.root=x", "search=quick").refused("unknown key search")
    command("search", *words, "search.space.finetune.haed_lr={low:1e-3,high:1}").refused(
        "ConfigError: search.space.finetune.haed_lr: unknown key"
    )
    assert not (out / "search.yaml").exists()


@pytest.mark.slow
def test_what_only_images_and_models_tell_is_refused(command, image_folder, tmp_path):
    out = tmp_path / "s"
    words = [f"data.root={image_folder()}", f"output_dir={out}", "experiment=smoke"]
    command("search", *words, "model=resnet18,resnext").refused(
        "search.space.model: model.name: timm has no model resnext"
    )
    command("search", *words, "search.folds=50").refused("search.folds=50:")
    command(
        "search", *words, "finetune=lp_ft", "search.space.finetune.phases.last.epochs=[1,2]"
    ).refused("finetune=lp_ft has no phase last; it has head, all")
    assert not (out / "search.yaml").exists()
