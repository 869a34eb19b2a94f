"""Which backbones are asked about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from typing import Any

import yaml

from tl.config import AdviseConfig, ModelConfig

KEYS = ("model", "model.name", "models")


def several(arguments: Sequence[str]) -> list[str]:
    """Command line in which `model=a,b` means both, to be compared, and not one job for each.

    Example:
        >>> several(["data.root=photos", "model=resnet18,resnet50"])
        ['data.root=photos', 'models=[resnet18,resnet50]']
        >>> several(["model=resnet18", "-m"])
        ['model=resnet18', '-m']
    """
    if {"-m", "--multirun"} & set(arguments):
        return list(arguments)
    found = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        listed = key in KEYS and "," in value and not value.startswith(("[", "'", '"'))
        found.append(f"models=[{value}]" if listed else argument)
    return found


def models(config: AdviseConfig) -> list[ModelConfig]:
    """One config for each backbone; each is a preset of `model` or a timm name."""
    if not config.models:
        return [config.model]
    presets = files("tl.conf").joinpath("model")
    found = []
    for name in dict.fromkeys(config.models):
        preset = presets.joinpath(f"{name}.yaml")
        own: dict[str, Any] = {"name": name}
        if preset.is_file():
            own = yaml.safe_load(preset.read_text(encoding="utf-8"))
        found.append(replace(config.model, **own))
    return found
