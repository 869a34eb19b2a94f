"""Settings of the data: where the images are, what their columns mean, how they are read."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from tl.config.settings import Checked, setting

TASKS = ("auto", "single", "multi", "regression")


class BadImages(Enum):
    """What to do with a file that cannot be decoded."""

    fail = "fail"
    skip = "skip"


class AuditMode(Enum):
    """What to do with what the audit of the images finds."""

    warn = "warn"
    fail = "fail"
    fix = "fix"
    off = "off"


class DataFormat(Enum):
    """What lies at `data.root`; auto looks."""

    auto = "auto"
    folder = "folder"
    manifest = "manifest"
    datasets = "datasets"
    shards = "shards"


class Task(Enum):
    """What is predicted: one class of each image, any number of labels, or one number."""

    single = "single"
    multi = "multi"
    regression = "regression"


@dataclass
class ColumnsConfig(Checked):
    """Columns of a manifest or data set by name; what is null is guessed and shown."""

    image: str | None = setting(None, "column with the path of the image")
    bytes: str | None = setting(None, "column with the image itself, instead of a path")
    label: Any = setting(
        None, "column with the label or the number; a list: one column of 0 and 1 a class"
    )
    split: str | None = setting(None, "column with train, val or test")
    group: str | None = setting(
        None, "column with what must stay on one side of a split: patient, product, video"
    )
    weight: str | None = setting(None, "column with the weight of an image in the loss")

    def problems(self) -> list[str]:
        """An image is a path or bytes, and label names columns."""
        found = []
        if self.image is not None and self.bytes is not None:
            found.append(
                f"image={self.image} and bytes={self.bytes} exclude each other: name the column "
                "that holds the images, as a path or as bytes"
            )
        names = self.label if isinstance(self.label, list) else [self.label]
        if self.label is not None and not (names and all(isinstance(n, str) for n in names)):
            found.append(f"label must be a column name or a list of them, got {self.label}")
        return found


@dataclass
class DataConfig(Checked):
    """Where the images are and how they are read."""

    root: str = setting(
        MISSING,
        "folder with <class>/* or train|val[|test]/<class>/*; a manifest (.csv, .tsv, .jsonl, "
        ".parquet); a folder of datasets.save_to_disk; tar shards; hub:owner/name",
        common=True,
    )
    table: str | None = setting(None, "manifest whose paths are relative to data.root", common=True)
    format: DataFormat = setting(
        DataFormat.auto, "folder, manifest, datasets or shards; auto: what data.root looks like"
    )
    columns: ColumnsConfig = setting(factory=ColumnsConfig, help="columns")
    label_separator: str = setting("|", "what stands between several labels in one cell")
    task: str = setting(
        "auto",
        "single: one class an image; multi: any number of labels; regression: one number; "
        "auto: as the labels are written, single where in doubt",
        choices=TASKS,
        common=True,
    )
    val_fraction: float = setting(
        0.2,
        "share of train taken for val where the data have no val",
        above=0,
        high=0.9,
        common=True,
    )
    test_fraction: float = setting(
        0.0,
        "share taken for test where the data have no test, the same for every seed; 0: none",
        low=0,
        high=0.9,
    )
    folds: int | None = setting(
        None,
        "cross-validation: train so many times, each with another part as val",
        low=2,
        high=50,
        common=True,
    )
    fold: int | None = setting(None, "which of data.folds is val; null: all in turn", low=0)
    batch_size: int = setting(32, "images per step, over all devices", low=1, common=True)
    num_workers: int | None = setting(
        None, "loader processes; default: the cores that this process may use, at most 8", low=0
    )
    check: bool = setting(True, "decode every image once before training (remembered in the cache)")
    bad_images: BadImages = setting(
        BadImages.fail,
        "fail: stop and list unreadable files; skip: leave them out and list them",
        common=True,
    )
    remote_gb: float = setting(
        20.0,
        "remote shards: GB of them kept in the cache on the disk; more than that are streamed, "
        "shuffled in blocks",
        above=0,
    )
    max_pixels: int = setting(
        178_956_970, "refuse larger images (decompression bombs), pixels", low=1
    )

    def problems(self) -> list[str]:
        """Fractions leave something for train, and a fold is one of the folds."""
        found = []
        if self.val_fraction + self.test_fraction > 0.95:
            found.append(
                f"val_fraction {self.val_fraction:g} and test_fraction {self.test_fraction:g} "
                "leave less than 5 % for train"
            )
        if self.fold is not None and (self.folds is None or self.fold >= self.folds):
            of = "there are no data.folds" if self.folds is None else f"data.folds={self.folds}"
            found.append(f"fold={self.fold}, but {of}; the first is 0")
        if not self.label_separator:
            found.append("label_separator must not be empty")
        return found


def is_remote(root: str) -> bool:
    """Whether `data.root` names something that is no path of this machine."""
    return root.startswith("hub:") or "://" in root


def quoted_place(override: str) -> str:
    """An override of `data.root` or `data.table` with the quotes that Hydra wants.

    Its grammar knows braces, brackets and equals signs, which names of shards and addresses have,
    for something else. Interpolations (`${...}`) and values in quotes stay as they are.
    """
    match = re.fullmatch(r"(data\.(?:root|table)=)([^'\"]*[{}()\[\]=][^'\"]*)", override)
    return f'{match[1]}"{match[2]}"' if match and "${" not in override else override


def absolute_data(config: DataConfig) -> DataConfig:
    """The settings with absolute paths, so that they mean the same in any working folder."""

    def full(path: str) -> str:
        local = path != MISSING and not is_remote(path)
        return str(Path(path).expanduser().absolute()) if local else path

    table = None if config.table is None else full(config.table)
    return replace(config, root=full(config.root), table=table)
