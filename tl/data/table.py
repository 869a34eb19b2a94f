"""A folder of images becomes one checked table of (image, label, split)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from tl.config import BadImages, DataConfig, Task
from tl.data.check import cache_path, check_images
from tl.data.errors import DataError
from tl.data.folder import (
    LAYOUT,
    Found,
    count,
    existing_folder,
    is_image_name,
    natural_order,
    nearest,
    scan,
    some,
)
from tl.data.splits import assign_splits, without_test
from tl.data.stores import FileStore, Images, ImageStore

SPLITS = ("train", "val", "test")
COLUMNS = ["path", "label", "split", "sha256", "width", "height", "bytes"]
SHOWN_BAD = 10


# Few types, and none with a Python object a row: a million rows are arrays of some megabytes.
TYPES: dict[str, Any] = {
    "path": pd.StringDtype("pyarrow"),
    "label": np.dtype(np.int32),
    "split": pd.CategoricalDtype(SPLITS, ordered=True),
    "sha256": pd.StringDtype("pyarrow"),
    "width": np.dtype(np.int32),
    "height": np.dtype(np.int32),
    "bytes": np.dtype(np.int64),
    "group": pd.StringDtype("pyarrow"),
    "weight": np.dtype(np.float32),
    "target": np.dtype(np.float32),
    "labels": pd.ArrowDtype(pa.list_(pa.int32())),
}


@dataclass(frozen=True)
class ImageTable:
    """Images with labels and splits; every row has been read once.

    Args:
        root: The data folder, or the folder of the manifest, absolute.
        classes: Class names; a label is an index into them. Regression: the name of the number.
        rows: path (a name for people that no two images share: the file relative to the root, or
            `table.parquet#17`, or `shard.tar/key.jpg`), label (class index; several labels: the
            first or -1; regression: -1), split (train, val or test), sha256 of the contents (empty
            where nobody looked), width and height of the upright image in pixels, bytes. Ordered by
            split, label and path. Where the data have them: group, weight, target (a number),
            labels (class indices), and columns of the store, whose names begin with `_`.
        notes: Sentences that a person should see.
        quarantined: path, split and reason of the images that were left out.
        task: What is predicted.
        store: Reads the bytes of an image; None: files below the root.
    """

    root: Path
    classes: tuple[str, ...]
    rows: pd.DataFrame
    notes: list[str] = field(default_factory=list)
    quarantined: pd.DataFrame = field(
        default_factory=lambda: pd.DataFrame(columns=["path", "split", "reason"])
    )
    task: Task = Task.single
    store: ImageStore = None  # type: ignore[assignment] # set below

    def __post_init__(self) -> None:
        if self.store is None:
            object.__setattr__(self, "store", FileStore(self.root))
        types = {name: kind for name, kind in TYPES.items() if name in self.rows}
        object.__setattr__(self, "rows", self.rows.astype(types))

    def split(self, name: str) -> pd.DataFrame:
        """Rows of `train`, `val`, `test` or `all`, numbered from 0."""
        if name not in (*SPLITS, "all"):
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, all; got {name}")
        rows = self.rows if name == "all" else self.rows[self.rows["split"] == name]
        return rows.reset_index(drop=True)

    def require(self, name: str) -> pd.DataFrame:
        """Rows of a split that must have some.

        Raises:
            DataError: It has none.
        """
        rows = self.split(name)
        if not len(rows):
            have = ", ".join(self.counts()) or "none"
            raise DataError(f"split: {self.root} has no {name} images; it has {have}")
        return rows

    def images(self, rows: str | pd.DataFrame) -> Images:
        """Images of a split, or of some rows of this table, in their order; read when asked for."""
        return Images.of_rows(self.store, self.split(rows) if isinstance(rows, str) else rows)

    def targets(self, rows: str | pd.DataFrame) -> NDArray[Any]:
        """What is to be predicted for a split, or for some rows of this table.

        Returns:
            One class: class indices, int64 (N,). Several labels: 0 or 1, float32 (N, classes). A
            number: float32 (N,).
        """
        rows = self.split(rows) if isinstance(rows, str) else rows
        if self.task is Task.regression:
            return rows["target"].to_numpy(np.float32)
        if self.task is Task.single:
            return rows["label"].to_numpy(np.int64)
        lists = pa.Table.from_pandas(rows[["labels"]])["labels"].combine_chunks()
        numbers = np.repeat(np.arange(len(rows)), np.diff(lists.offsets))
        marks = np.zeros((len(rows), len(self.classes)), np.float32)
        marks[numbers, lists.flatten()] = 1
        return marks

    def target_scale(self) -> tuple[float, float]:
        """Mean and standard deviation of the numbers of train; 1 where all are the same."""
        targets = self.targets("train").astype(np.float64)
        std = float(targets.std()) if len(targets) else 0.0
        return float(targets.mean()) if len(targets) else 0.0, std if std > 0 else 1.0

    def paths(self, split: str) -> list[Path]:
        """Files of a split, in the order of its rows; for a table whose images are files.

        Raises:
            DataError: The images are not files: `images` reads them.
        """
        if not isinstance(self.store, FileStore):
            raise DataError(f"the images of {self.root} are no files of their own")
        return [self.store.root / path for path in self.split(split)["path"]]

    def counts(self) -> dict[str, dict[str, int]]:
        """Split -> class -> number of images; splits without images are left out."""
        found = self.rows.groupby(["split", "label"], observed=True).size().to_dict()
        present = [split for split in SPLITS if (self.rows["split"] == split).any()]
        return {
            split: {name: int(found.get((split, i), 0)) for i, name in enumerate(self.classes)}
            for split in present
        }

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the data: a hash that neither file names nor order change, and counts."""
        keys = zip(self.rows["split"], self.rows["sha256"], self.rows["label"], strict=True)
        text = "\n".join(sorted(f"{split} {digest} {label}" for split, digest, label in keys))
        return {
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "classes": list(self.classes),
            "counts": self.counts(),
            "images": len(self.rows),
            "bytes": int(self.rows["bytes"].sum()),
            "root": str(self.root),
        }


def read_table(
    config: DataConfig,
    *,
    seed: int,
    cache_dir: Path | None,
    required_splits: Sequence[str] = ("train", "val"),
    progress: Callable[[int, int], None] | None = None,
    classes: Sequence[str] | None = None,
    task: Task | None = None,
) -> ImageTable:
    """Read `<class>/*` or `train|val|test/<class>/*` (also valid, validation).

    The class list comes from train, in natural order. Where val is required and the folder has
    none, `val_fraction` of train becomes val by `assign_splits`.

    Args:
        config: Where the images are and how they are read.
        seed: Decides that split.
        cache_dir: Remembers the outcome of the check; None checks everything again.
        required_splits: Splits that must have images; in training every class in each of them.
        progress: Called with (done, total) while images are checked.
        classes: Class names in order, where a model fixes them (evaluation). Classes without images
            and splits without every class are then allowed.
        task: What is predicted, where a model fixes it; else as `config.task` says.

    Raises:
        DataError: All that is wrong with the folder, its classes and its images, in one message.

    Example:
        >>> from tl.config import DataConfig
        >>> table = read_table(DataConfig(root="photos"), seed=0, cache_dir=None)  # doctest: +SKIP
        >>> table.counts()["train"]  # doctest: +SKIP
        {'ants': 98, 'bees': 97}
    """
    root = existing_folder(config.root)
    found = scan(root)
    if not found.images and not found.problems:
        raise DataError(_nothing_found(found))
    names = tuple(classes) if classes is not None else _train_classes(found)
    facts = check_images(
        Images.of_files(root, [path for path, _, _ in found.images]),
        max_pixels=config.max_pixels,
        cache_file=cache_path(cache_dir, root) if cache_dir else None,
        progress=progress,
    ).to_pandas()
    return _assemble(
        config, found, facts, names, seed=seed, required=required_splits, given=classes is not None
    )


def _assemble(
    config: DataConfig,
    found: Found,
    facts: pd.DataFrame,
    classes: tuple[str, ...],
    *,
    seed: int,
    required: Sequence[str],
    given: bool,
) -> ImageTable:
    """The table, or everything that stands against it."""
    rows, quarantined = _rows(found, facts, classes)
    problems = found.problems + _class_problems(found, classes, given=given)
    listed = _listed(found, classes)
    if len(listed) and (given or len(classes) > 1):
        problems += _empty_cells(found, listed, classes, required, given=given)
    notes = _ignored_note(found)
    if len(quarantined) and config.bad_images is BadImages.fail:
        problems.append(_bad_images_text(quarantined, len(found.images) + len(found.unnamed)))
    elif len(quarantined):
        notes.append("left out " + _bad_images_text(quarantined, None))
    if not problems and len(rows):
        assigned = assign_splits(
            rows.astype({k: v for k, v in TYPES.items() if k in rows}),
            task=Task.single,
            classes=classes,
            val_fraction=config.val_fraction,
            test_fraction=config.test_fraction,
            folds=config.folds,
            fold=config.fold,
            seed=seed,
            need_val="val" in required,
        )
        rows = rows.assign(split=assigned.splits.astype(str))
        notes += assigned.notes
        if config.folds and "val" in required:
            rows, aside = without_test(rows)
            notes += aside
        problems += [] if given else assigned.problems
    if not problems:  # all was there by name: what was left out may have been the last of its class
        problems = _empty_cells(found, rows, classes, required, given=given, val_taken=True)
    if problems:
        raise DataError(problems)
    rows = _ordered(rows)
    return ImageTable(found.root, classes, rows, notes + _duplicate_notes(rows), quarantined)


def _nothing_found(found: Found) -> str:
    shown = f"data.root: {found.root}"
    if not found.ignored and not any(found.class_folders.values()) and not found.unnamed:
        return f"{shown} is empty: put the images into {LAYOUT}"
    if found.ignored:
        files = f"{count(len(found.ignored), 'other file')} ({some(found.ignored)})"
        return (
            f"{shown} has no class folders with images, only {files}: put the images into {LAYOUT}"
        )
    return f"{shown} has folders, but no images in them: put the images into {LAYOUT}"


def _train_classes(found: Found) -> tuple[str, ...]:
    return tuple(sorted(found.class_folders.get("train", []), key=natural_order))


def _rows(
    found: Found, facts: pd.DataFrame, classes: tuple[str, ...]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Good images of known classes, and the bad ones."""
    index = {name: i for i, name in enumerate(classes)}
    table = facts.assign(
        label=[index.get(name, -1) for _, name, _ in found.images],
        split=[split for _, _, split in found.images],
    )
    bad = table["reason"] != ""
    unnamed = pd.DataFrame(found.unnamed, columns=["path", "split"])
    unnamed["reason"] = "its name is not UTF-8: rename it"
    quarantined = pd.concat(
        [table.loc[bad, ["path", "split", "reason"]], unnamed], ignore_index=True
    )
    return table.loc[~bad & (table["label"] >= 0), COLUMNS], quarantined


def _listed(found: Found, classes: tuple[str, ...]) -> pd.DataFrame:
    """Split and label of every image of a known class, readable or not."""
    index = {name: i for i, name in enumerate(classes)}
    cells = [(split, index[name]) for _, name, split in found.images if name in index]
    return pd.DataFrame(cells, columns=["split", "label"])


def _ordered(rows: pd.DataFrame) -> pd.DataFrame:
    rank = rows["split"].map(SPLITS.index)
    rows = rows.assign(rank=rank).sort_values(["rank", "label", "path"])
    return rows[COLUMNS].reset_index(drop=True)


def _bad_images_text(quarantined: pd.DataFrame, total: int | None) -> str:
    shown = quarantined.head(SHOWN_BAD)
    lines = [f"  {path}: {reason}" for path, reason in zip(shown.path, shown.reason, strict=True)]
    rest = len(quarantined) - len(shown)
    lines += [f"  and {rest:,} more"] if rest else []
    if total is None:
        return "\n".join([f"{count(len(quarantined), 'image')} that cannot be read:", *lines])
    head = f"{len(quarantined):,} of {count(total, 'image')} cannot be read:"
    remedy = "  replace or delete them, or leave them out with data.bad_images=skip"
    return "\n".join([head, *lines, remedy])


def _class_problems(found: Found, classes: tuple[str, ...], *, given: bool) -> list[str]:
    problems = []
    if not given and "train" not in found.class_folders:
        there = " and ".join(found.split_folders.values())
        return [f"data.root: {found.root} has {there}, but no folder train"]
    if not given and len(classes) < 2:
        problems.append(_too_few_classes(found, classes))
    owner = "the model" if given else found.where("train")
    for split, names in found.class_folders.items():
        for name in names if given or len(classes) > 1 else []:
            if name not in classes:
                known = f" (known: {some(classes, 10)})"
                place = f"{found.split_folders[split]}/{name}" if found.split_folders else name
                hint = nearest(name, classes) or known
                problems.append(f"{place} is a class that {owner} does not have{hint}")
    return problems


def _too_few_classes(found: Found, classes: tuple[str, ...]) -> str:
    place = found.root / found.split_folders["train"] if found.split_folders else found.root
    if not classes:
        return f"{place} has no class folders: put the images into {LAYOUT}"
    text = f"{place} has only one class, {classes[0]}; a classifier needs two or more"
    if not found.split_folders:
        inner = scan(found.root / classes[0])
        if len({name for _, name, _ in inner.images}) > 1:
            text += f". The classes seem to lie one folder deeper: data.root={inner.root}"
    return text


def _empty_cells(
    found: Found,
    rows: pd.DataFrame,
    classes: tuple[str, ...],
    required: Sequence[str],
    *,
    given: bool,
    val_taken: bool = False,
) -> list[str]:
    """Splits without images and, in training, classes without images in a required split.

    Before val is taken from train, only a val that has a folder is looked at.
    """
    problems = [] if len(rows) else [f"data.root: {found.root} has no readable image"]
    takes_val = "val" not in found.split_folders and (rows["split"] == "train").any()
    for split in required if len(rows) else []:
        if split == "val" and takes_val and not val_taken:
            continue
        labels = set(rows.loc[rows["split"] == split, "label"])
        lacking = [name for i, name in enumerate(classes) if i not in labels]
        if not labels:
            has = ", ".join(sorted(set(rows["split"]), key=SPLITS.index))
            problems.append(f"data.root: {found.root} has no images for {split} (there is: {has})")
        elif lacking and not given:
            thing = "class" if len(lacking) == 1 else "classes"
            problems.append(
                f"{found.where(split)} has no readable image of the {thing} {some(lacking, 10)}: "
                "add images, or delete that class everywhere"
            )
    return problems


def _ignored_note(found: Found) -> list[str]:
    folders = [name for name in found.ignored if name.endswith("/")]
    strays = [name for name in found.ignored if is_image_name(name)]
    others = [n for n in found.ignored if not n.endswith("/") and not is_image_name(n)]
    beside = f"beside {' and '.join(found.split_folders.values())}"
    return [
        f"ignored {count(len(names), thing)} {why}: {some(names, 5)}"
        for names, thing, why in (
            (folders, "folder", beside),
            (strays, "image", "in no class folder"),
            (others, "file", "without the name of an image"),
        )
        if names
    ]


def _duplicate_notes(rows: pd.DataFrame) -> list[str]:
    """Copies (same bytes) that stand in two classes, or on both sides of a split."""
    copies = rows[rows.duplicated("sha256", keep=False)].groupby("sha256")
    notes = []
    for column, text in (
        ("label", "in two class folders (correct the labels)"),
        ("split", "in two splits (figures on val and test are too good)"),
    ):
        groups = [" = ".join(g["path"]) for _, g in copies if g[column].nunique() > 1]
        if groups:
            lie = "lies" if len(groups) == 1 else "lie"
            notes.append(f"{count(len(groups), 'image')} {lie} {text}: {some(sorted(groups))}")
    return notes
