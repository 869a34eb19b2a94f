"""From the preset of a decision and the flips that are safe to the augmentation of a job."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest

from tl.config import compose
from tl.decision.augmenting import augmentation, preset


class Says(NamedTuple):
    augment: str = "medium"
    hflip: bool = True
    vflip: bool = False


@pytest.fixture(scope="module")
def auto():
    return compose("train", ["data.root=x", "augment=auto"]).augment


@pytest.mark.parametrize("name", ["none", "light", "medium", "strong"])
def test_presets_are_those_of_the_command_line(name):
    assert preset(name) == compose("train", ["data.root=x", f"augment={name}"]).augment


def test_the_preset_is_taken_and_unsafe_flips_are_off(auto):
    usual = augmentation(Says(), auto)
    assert usual == replace(preset("medium"), name="auto: medium")
    assert augmentation(Says(hflip=False), auto) == replace(usual, hflip=0.0)
    assert augmentation(Says(vflip=True), auto) == replace(usual, vflip=0.5)
    still = augmentation(Says("none", vflip=True), auto)
    assert (still.hflip, still.vflip, still.crop_scale) == (0.0, 0.0, None)


def test_what_the_user_set_stays(auto):
    given = replace(auto, hflip=0.0, rotate=20.0)
    made = augmentation(Says("strong", vflip=True), given)
    assert (made.hflip, made.rotate, made.vflip) == (0.0, 20.0, 0.5)
    assert made.mixup == preset("strong").mixup
    other = replace(auto, name="mine")
    assert augmentation(Says(hflip=False), other) == other
