"""Make the images of the benchmarks: folders with train/ and val/, the same for every tool.

    python benchmarks/images.py four

`hymenoptera` (397 photographs, 2 classes) is taken as given, `four` is the four sets of TL_ASSETS
read as one (6,009 images, 23 classes), `tiny` is 24 images made on the fly. The sets without a
split of their own are split 80/20 by the content of each image.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image

REPO = Path(__file__).resolve().parents[1]
WORK = REPO / "build" / "benchmarks"
ASSETS = Path(os.environ.get("TL_ASSETS", REPO / ".." / "shared" / "assets")).resolve()
FOUR = ("hymenoptera", "flowers5", "sign_digits", "neu_surface")
NAMES = ("hymenoptera", "four", "tiny")
SUFFIXES = {".jpg", ".jpeg", ".png"}


def prepare(name: str, work: Path = WORK, assets: Path = ASSETS) -> Path:
    """Folder of the data set `name`, made below `work` where it is not there yet."""
    if name == "hymenoptera":
        return assets / "data" / name
    folder = work / name
    if not folder.is_dir():
        unfinished = work / f"{name}.unfinished"
        {"four": read_as_one, "tiny": tiny}[name](unfinished, assets)
        unfinished.rename(folder)
    return folder


def read_as_one(folder: Path, assets: Path) -> None:
    """Link all images of the four sets to `<split>/<set>_<class>/`, their own names kept."""
    for name in FOUR:
        root = assets / "data" / name
        for file in sorted(root.rglob("*")):
            if file.suffix.lower() not in SUFFIXES:
                continue
            inside = file.relative_to(root).parts
            split = inside[0] if inside[0] in {"train", "val"} else split_of(file)
            link = folder / split / f"{name}_{inside[-2]}" / f"{file.stem}{file.suffix.lower()}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(file)


def split_of(file: Path) -> str:
    """`val` for a fifth of all contents, so that copies of an image are never in both."""
    return "train" if hashlib.sha256(file.read_bytes()).digest()[0] % 5 else "val"


def tiny(folder: Path, _assets: Path) -> None:
    """Two colours, eight images each to train and four to judge."""
    rng = np.random.default_rng(0)
    for split, number in (("train", 8), ("val", 4)):
        for label, colour in (("blue", (40, 60, 200)), ("red", (200, 50, 40))):
            target = folder / split / label
            target.mkdir(parents=True, exist_ok=True)
            for i in range(number):
                pixels = np.clip(colour + rng.normal(0, 30, (48, 48, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(target / f"{i}.png")


def every_image(folder: Path) -> list[Path]:
    """All image files below a folder."""
    return sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES)


if __name__ == "__main__":
    for chosen in sys.argv[1:]:
        made = prepare(chosen)
        print(f"{made}: {len(every_image(made)):,} images")
