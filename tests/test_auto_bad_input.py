"""finetune=auto on data that tells little: a clear statement, no crash, no confident guess."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import timm
import torch
from commands import UNTRACKED
from PIL import Image

CLASSES = ("blue", "green", "red")


class Outcome(NamedTuple):
    """What a run said in one line, and the files it left."""

    said: str
    evidence: dict[str, object]
    decision: dict[str, object]


@pytest.fixture
def auto(tl) -> Callable[..., Outcome]:
    """Train with finetune=auto and weights of a file; it must end well."""
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet", num_classes=7).state_dict(), "weights.pth")

    def call(root: Path, *args: str) -> Outcome:
        settings = [*UNTRACKED, "model.weights=weights.pth", "finetune=auto", "output_dir=run"]
        done = tl("train", f"data.root={root}", *settings, *args)
        assert done.code == 0, done.out + done.err
        texts = [Path("run", name).read_text() for name in ("evidence.json", "decision.json")]
        assert not any("NaN" in text or "Infinity" in text for text in texts)
        assert "nan" not in Path("run/history.csv").read_text()
        said = " ".join(done.out.split())
        assert "Traceback" not in done.err + said
        return Outcome(said, *map(json.loads, texts))

    return call


def draw(folder: Path, number: int, pixels: Callable[[int], np.ndarray]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(number):
        Image.fromarray(pixels(n)).save(folder / f"{n:03d}.png")


def draw_all(root: Path, counts: dict[str, int], pixels: Callable[[int], np.ndarray]) -> Path:
    """The same kind of images for each class; `pixels` takes their running number."""
    running = itertools.count()
    for split, number in counts.items():
        for name in CLASSES:
            draw(root / split / name, number, lambda _: pixels(next(running)))
    return root


def test_one_image_a_class(auto, image_folder):
    found = auto(image_folder(splits={"train": 1, "val": 1}))
    assert found.evidence["similarity"] is None
    assert "have one image only: nothing can be measured of them" in found.said
    assert found.decision["measured"] == {"amount": "tiny", "similarity": "unknown"}
    assert found.decision["method"] == "linear_probe"
    assert "decided by the amount of data alone" in found.said


def test_one_image_a_class_without_val_and_one_class(tl, image_folder):
    settings = [*UNTRACKED, "finetune=auto", "output_dir=run"]
    single = image_folder(Path("single").absolute(), splits={"": 1})
    tl("train", f"data.root={single}", *settings).refused(
        "DataError: ", "each class needs at least two different images of its own"
    )
    alone = image_folder(Path("alone").absolute(), classes=("red",))
    tl("train", f"data.root={alone}", *settings).refused("DataError: ", "has only one class, red")
    assert not Path("run").exists()


def test_a_class_with_one_image_beside_large_ones(auto, image_folder):
    root = image_folder(splits={"train": 12, "val": 3})
    for path in sorted((root / "train/red").iterdir())[1:]:
        path.unlink()
    found = auto(root)
    assert "1 of 3 classes have one image only: nothing can be measured of them" in found.said
    assert found.evidence["similarity"] is not None
    assert found.evidence["amount"]["least"] == 1


@pytest.mark.slow
def test_a_thousand_classes_with_two_images(auto):
    rng = np.random.default_rng(0)
    for i in range(1000):
        colour = rng.integers(30, 225, 3)
        for split, number in {"train": 2, "val": 1}.items():
            draw(
                Path("images", split, f"{i:04d}"),
                number,
                lambda _, m=colour: rng.normal(m, 9, (16, 16, 3)).clip(0, 255).astype(np.uint8),
            )
    found = auto(Path("images").absolute())
    assert (found.evidence["amount"]["images"], found.evidence["amount"]["classes"]) == (2000, 1000)
    assert found.decision["amount"] == "tiny"
    assert found.decision["method"] in {"wise_ft", "stage_probe", "lp_ft"}


@pytest.mark.parametrize("kind", ["grey", "deep"])
def test_grey_and_16_bit_sets(auto, kind):
    rng = np.random.default_rng(0)
    for split, number in {"train": 8, "val": 3}.items():
        for i, name in enumerate(CLASSES):
            mean = 60 + 60 * i
            if kind == "grey":
                draw(
                    Path("images", split, name),
                    number,
                    lambda _, m=mean: rng.normal(m, 9, (32, 32)).clip(0, 255).astype(np.uint8),
                )
            else:
                draw(
                    Path("images", split, name),
                    number,
                    lambda _, m=mean: (257 * rng.normal(m, 9, (32, 32)).clip(0, 255)).astype(
                        np.uint16
                    ),
                )
    found = auto(Path("images").absolute())
    assert found.evidence["similarity"]["concat"]["value"] > 0.5, "brightness tells them apart"
    assert found.evidence["similarity"]["chance"] < 0.05


def test_images_that_are_all_alike(auto):
    root = draw_all(
        Path("images").absolute(),
        {"train": 14, "val": 3},
        # Of different sizes, so that no two files are copies of each other.
        lambda n: np.full((20 + n, 40, 3), 90, np.uint8),
    )
    found = auto(root)
    assert found.evidence["similarity"] is None
    assert "the backbone sees no difference between any two images" in found.said
    assert found.decision["similarity"] == "unknown"
    assert "decided by the amount of data alone" in found.said


def test_copies_of_one_image(auto):
    root = draw_all(
        Path("images").absolute(),
        {"train": 14, "val": 3},
        lambda _: np.full((24, 24, 3), 90, np.uint8),
    )
    found = auto(root)
    assert "1 image lies in two class folders (correct the labels)" in found.said
    assert found.decision["similarity"] == "unknown"


def test_labels_at_random(auto):
    rng = np.random.default_rng(3)
    root = draw_all(
        Path("images").absolute(),
        {"train": 20, "val": 5},
        lambda _: rng.integers(0, 255, (32, 32, 3), dtype=np.uint8),
    )
    found = auto(root)
    assert found.evidence["similarity"]["chance"] > 0.05
    assert "no signal" in found.said
    assert "check the labels" in found.said
    assert found.said.count("no signal: ") == 1, "said once"
    assert found.decision["method"] == "linear_probe", "the cheapest, where nothing can be learned"


def test_true_labels_are_no_chance(auto, image_folder):
    found = auto(image_folder(splits={"train": 20, "val": 5}))
    assert found.evidence["similarity"]["chance"] < 0.05
    assert "no signal" not in found.said
    assert "check the labels" not in found.said


def test_duplicates_across_train_and_val_are_said(auto, image_folder):
    root = image_folder(splits={"train": 12, "val": 3})
    for n in range(2):
        shutil.copy(root / "train/red" / f"{n:02d}.png", root / "val/red" / f"copy{n}.png")
    found = auto(root)
    assert "2 images lie in two splits (figures on val and test are too good)" in found.said
