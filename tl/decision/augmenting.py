"""From the preset of a decision to the random changes of the training images."""

from __future__ import annotations

from dataclasses import fields, replace
from importlib.resources import files
from typing import Any, Protocol

from omegaconf import DictConfig, OmegaConf

from tl.config import AugmentConfig, validate

AUTO = "auto"
VERTICAL = 0.5  # probability of an up-down flip where one is safe


class Flippable(Protocol):
    """What a `Decision` says about augmentation."""

    @property
    def augment(self) -> str:
        """Preset: none, light, medium or strong."""

    @property
    def hflip(self) -> bool:
        """Whether a left-right flip keeps the classes apart."""

    @property
    def vflip(self) -> bool:
        """Whether an up-down flip does."""


def preset(name: str) -> AugmentConfig:
    """The settings of `augment=NAME`, as tl brings it.

    Example:
        >>> preset("light").hflip
        0.5
    """
    file = files("tl.conf") / "augment" / f"{name}.yaml"
    # Not by Hydra: composing a whole config for it takes as long as measuring the images.
    return validate(DictConfig(OmegaConf.create(file.read_text())), AugmentConfig)


def augmentation(decision: Flippable, given: AugmentConfig) -> AugmentConfig:
    """Augmentation of a job.

    Args:
        decision: Preset and the flips that are safe.
        given: As the user asked. Another preset than `augment=auto` stays as it is; of that preset
            every setting that the user changed stays.
    """
    if given.name != AUTO:
        return given
    usual = preset(AUTO)
    own = {f.name: getattr(given, f.name) for f in fields(given)}
    forced = {name: value for name, value in own.items() if value != getattr(usual, name)}
    chosen = preset(decision.augment)
    flips: dict[str, Any] = {"hflip": chosen.hflip if decision.hflip else 0.0}
    if decision.augment != "none":
        flips["vflip"] = VERTICAL if decision.vflip else chosen.vflip
    named = {"name": f"{AUTO}: {decision.augment}"}
    return replace(chosen, **{**flips, **forced, **named})
