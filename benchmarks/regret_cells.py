"""What the regret benchmark is made of: small copies of the image sets, cells, and their samples.

A cell is one small job: a set, so many training images a class, a backbone, a seed. Its test images
depend on the set and the seed alone; train and val come from the rest, and a larger cell holds the
images of the smaller ones.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from images import ASSETS, FOUR, every_image
from PIL import Image, ImageOps

from tl.config import DataConfig
from tl.data import ImageTable, read_table

AMOUNTS = (2, 5, 10, 25, 100)  # training images a class
BACKBONES = ("tf_mobilenetv3_small_100", "regnetx_002", "mobilenetv2_100")
SEEDS = (0, 1)
SIDE = 110  # shorter side of the copies: 96 after a centre crop of 0.875
MOST_TEST = 400
VAL_SHARE = 0.2  # of train and val together, as `data.val_fraction`


@dataclass(frozen=True)
class Cell:
    """One job of the grid.

    Args:
        set: Name of the image set.
        per_class: Training images of each class.
        backbone: timm name; its weights are a file of that name.
        seed: Of the sample and of the training.
    """

    set: str
    per_class: int
    backbone: str
    seed: int

    def key(self) -> dict[str, Any]:
        """Plain values, as results keep them."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.set}, {self.per_class} a class, {self.backbone}, seed {self.seed}"


def grid(quick: bool = False, seeds: Sequence[int] = SEEDS) -> list[Cell]:
    """All cells, those first that tell most: one seed and few backbones cover every set and amount.

    Args:
        quick: A reduced grid: every set, two amounts, one backbone, one seed.
        seeds: Of the samples.
    """
    amounts = (5, 25) if quick else AMOUNTS
    backbones = BACKBONES[: 1 if quick else None]
    cells = [
        Cell(name, amount, backbone, seed)
        for seed in seeds[: 1 if quick else None]
        for backbone in backbones
        for amount in amounts
        for name in FOUR
    ]
    # The small amounts of every backbone come before the hours of 100 images a class.
    return sorted(cells, key=lambda c: (c.seed, BACKBONES.index(c.backbone) + (c.per_class > 25)))


def small_copies(name: str, work: Path, assets: Path = ASSETS, side: int = SIDE) -> Path:
    """Folder `<class>/*.bmp` with the images of a set, their shorter side at most `side` pixels.

    Without compression: reading them again and again should cost next to nothing. One `side` for a
    folder `work`: what lies there is taken as it is.
    """
    folder = work / "images" / name
    if folder.is_dir():
        return folder
    unfinished = folder.with_name(f"{name}.{os.getpid()}.unfinished")
    root = assets / "data" / name
    for file in every_image(root):
        place = unfinished / file.parent.name
        place.mkdir(parents=True, exist_ok=True)
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
        share = side / min(image.size)
        if share < 1:
            size = [max(round(length * share), side) for length in image.size]
            image = image.resize((size[0], size[1]), Image.Resampling.BICUBIC)
        image.save(place / f"{file.stem}.bmp")
    try:
        unfinished.rename(folder)
    except OSError:  # another process was faster
        if not folder.is_dir():
            raise
    return folder


def read_set(name: str, work: Path, assets: Path = ASSETS, side: int = SIDE) -> ImageTable:
    """The checked images of a set, copies of one image left out, splits not yet made."""
    folder = small_copies(name, work, assets, side)
    config = DataConfig(root=str(folder))
    table = read_table(config, seed=0, cache_dir=work / "cache", required_splits=("train",))
    rows = table.rows.drop_duplicates("sha256", keep=False).reset_index(drop=True)
    return ImageTable(table.root, table.classes, rows)


def sample(table: ImageTable, cell: Cell) -> ImageTable:
    """Train, val and test of a cell.

    Val has a quarter as many images as train, at least one a class: a fifth of both, as `tl` takes
    it. A class that has too few keeps that proportion.

    Args:
        table: Of the whole set.
        cell: What to draw.
    """
    rows = table.rows.assign(group=groups(cell.set, table.rows))
    rng = np.random.default_rng(cell.seed)
    order = {g: i for i, g in enumerate(rng.permutation(sorted(set(rows["group"]))))}
    rows = rows.assign(order=rows["group"].map(order)).sort_values(["order", "path"])
    needed = max(AMOUNTS) + val_images(max(AMOUNTS))
    chosen = []
    for _, members in rows.groupby("label"):
        most = min(MOST_TEST // len(table.classes), len(members) // 2)
        rest = len(members) - min(most, max(len(members) - needed, len(members) // 6))
        # The order of the groups is the same in every class, and test its end.
        begin = min(max(AMOUNTS), int((1 - VAL_SHARE) * rest))
        train = min(cell.per_class, begin)
        parts = {
            "train": members.iloc[:train],
            "val": members.iloc[begin : begin + val_images(train)],
            "test": members.iloc[rest:],
        }
        chosen += [part.assign(split=split) for split, part in parts.items()]
    result = pd.concat(chosen)
    apart = set(result.loc[result["split"] == "test", "group"])
    result = result[(result["split"] == "test") | ~result["group"].isin(apart)]
    rank = result["split"].map(["train", "val", "test"].index)
    result = result.assign(rank=rank).sort_values(["rank", "label", "path"])
    return ImageTable(table.root, table.classes, result[table.rows.columns].reset_index(drop=True))


def val_images(train: int) -> int:
    """Validation images of a class beside so many training images."""
    return max(1, round(train * VAL_SHARE / (1 - VAL_SHARE)))


def groups(name: str, rows: pd.DataFrame) -> Sequence[Any]:
    """What must not be on both sides of train and test: persons of sign_digits, else each image.

    The set does not name its persons. Its files are numbered by the camera, and each person shows
    0 to 9 in turn, so a person begins where the digit does not rise.
    """
    if name != "sign_digits":
        return list(rows["path"])
    return list(_persons(rows).reindex(rows.index))


def _persons(rows: pd.DataFrame) -> pd.Series:
    number = rows["path"].str.extract(r"(\d+)\.\w+$")[0].astype(int)
    in_order = rows.assign(number=number).sort_values("number")
    return (in_order["label"].diff() <= 0).cumsum()
