"""Every file under conf/ is composed, validated and, where it names a class, instantiated."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from tl.config import PIPELINES, compose
from tl.config.launchers import launcher_config
from tl.config.ray import RayConfig
from tl.config.slurm import SlurmConfig
from tl.training.lightning import build, callbacks_of, loggers
from tl.training.processes import for_processes

CONF = Path(__file__).parents[1] / "conf"
NEEDED = {
    "train": ["data.root=x"],
    "predict": ["bundle=b", "source=s"],
    "evaluate": ["bundle=b", "data.root=x"],
    "export": ["run=r"],
    "demo": [],
    "cache": [],
    "advise": ["data.root=x"],
    "audit": ["data.root=x"],
    "report": ["run=r"],
    "register": ["run=r", "name=flowers"],
    "promote": ["name=flowers"],
    "sync": ["run=r"],
    "compare": ["tracking.experiment=x"],
    "search": ["data.root=x"],
}
OPTIONS = [
    (file.parent.relative_to(CONF).as_posix(), file.stem)
    for file in sorted(CONF.rglob("*.yaml"))
    if file.parent != CONF
]
LAUNCHERS = {"local": None, "slurm": SlurmConfig, "ray": RayConfig}


def test_the_glob_finds_the_files():
    assert len(OPTIONS) >= 25
    assert {group.split("/")[0] for group, _ in OPTIONS} == {
        p.name for p in CONF.iterdir() if p.is_dir() and not p.name.startswith("_")
    }


def test_every_pipeline_has_its_primary_config():
    assert {file.stem for file in CONF.glob("*.yaml")} == set(PIPELINES) == set(NEEDED)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_primary_configs_compose(pipeline):
    assert isinstance(compose(pipeline, NEEDED[pipeline]), PIPELINES[pipeline])


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_options_compose_and_build(group, option, tmp_path):
    pipeline = "search" if group == "search" else "train"
    config = compose(pipeline, ["data.root=x", f"{group}={option}"], {"output_dir": "out"})
    if group == "search":
        assert config.search.name == option
    if group == "model":
        assert config.model.name.startswith(option)
    if group in {"finetune", "augment"}:
        assert getattr(config.finetune, "method", None) == option or config.augment.name == option
    if group == "trainer":
        if option == "gpu":
            import torch

            if not torch.cuda.is_available():
                pytest.skip("trainer=gpu composes; building it needs a GPU")
        build({**for_processes(config.trainer), "logger": False}, "trainer")
    built = [*callbacks_of(config.callbacks), *loggers(config.logger, tmp_path)]
    wanted = [*config.callbacks.values(), *config.logger.values()]
    assert [type(b).__name__ for b in built] == [w["_target_"].split(".")[-1] for w in wanted]


def test_presets_of_launchers_have_all_settings_at_their_defaults():
    files = sorted((CONF / "hydra/launcher").glob("*.yaml"))
    assert {file.stem for file in files} == set(LAUNCHERS)
    for file in files:
        settings = yaml.safe_load(file.read_text())
        assert settings.pop("_target_") == "hydra_plugins.tl.BatchLauncher"
        assert settings.pop("engine") == file.stem
        schema = LAUNCHERS[file.stem]
        assert not settings or launcher_config(schema, settings) == schema()
        assert not schema or settings.keys() == {f.name for f in fields(schema)}


@pytest.mark.parametrize("file", sorted(CONF.rglob("*.yaml")), ids=lambda f: f.stem)
def test_the_first_line_says_what_it_is_and_how_to_use_it(file):
    head = "".join(file.read_text().splitlines(keepends=True)[:3])
    assert head.startswith("# ")
    assert "tl " in head or file.parent.name in {"trainer", "callbacks", "logger", "augment"}
