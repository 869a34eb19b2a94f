"""A folder of images becomes one checked table of (image, label, split)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tl.config import Task
from tl.data.errors import DataError
from tl.data.sources.listing import SPLITS
from tl.data.stores import FileStore, Images, ImageStore
from tl.fingerprints import classes_sha256, images_sha256

HASHED_AT_ONCE = 65_536  # rows
SPLIT_TYPE = pd.CategoricalDtype(list(SPLITS), ordered=True)
# Few types, and none with a Python object a row: a million rows are arrays of some megabytes.
TYPES: dict[str, Any] = {
    "path": pd.StringDtype("pyarrow"),
    "label": np.dtype(np.int32),
    "split": SPLIT_TYPE,
    "sha256": pd.StringDtype("pyarrow"),
    "width": np.dtype(np.int32),
    "height": np.dtype(np.int32),
    "bytes": np.dtype(np.int64),
    "format": pd.StringDtype("pyarrow"),
    "mode": pd.StringDtype("pyarrow"),
    "orientation": np.dtype(np.int8),
    "frames": np.dtype(np.int8),
    "brightness": np.dtype(np.float32),
    "contrast": np.dtype(np.float32),
    "phash": pd.StringDtype("pyarrow"),
    "group": pd.StringDtype("pyarrow"),
    "weight": np.dtype(np.float32),
    "target": np.dtype(np.float32),
    "labels": pd.ArrowDtype(pa.list_(pa.int32())),
}


def plain_type(kind: pa.DataType) -> Any:
    """How pandas keeps a column of Arrow without a Python object a row; None: as NumPy does."""
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return TYPES["path"]
    return TYPES["labels"] if pa.types.is_list(kind) else None


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
            labels (class indices), and columns of the store, whose names begin with `_`. With
            `data.check` those of `tl.data.looks.Look`, too.
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
        if cast(Any, self.store) is None:
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
        owner, labels = self._pairs(rows)
        marks = np.zeros((len(rows), len(self.classes)), np.float32)
        marks[owner, labels] = 1
        return marks

    def _pairs(self, rows: pd.DataFrame) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Row and label, one pair for each label that a row has."""
        lists = pa.Table.from_pandas(rows[["labels"]])["labels"].combine_chunks()
        lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False)
        labels = lists.flatten().to_numpy(zero_copy_only=False)
        return np.repeat(np.arange(len(rows)), lengths), labels.astype(np.int64)

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
        found = {}
        for split in SPLITS:
            rows = self.split(split)
            if not len(rows):
                continue
            labels = rows["label"].to_numpy(np.int64)
            if self.task is Task.regression:
                labels = np.zeros(len(rows), np.int64)
            elif self.task is Task.multi:
                labels = self._pairs(rows)[1]
            numbers = np.bincount(labels[labels >= 0], minlength=len(self.classes)).tolist()
            found[split] = dict(zip(self.classes, numbers, strict=True))
        return found

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the data: hashes that neither file names nor order change, and counts.

        `sha256` is of splits, images and labels together, and so are those in `splits`;
        `test_sha256` and its like are of the images of one split, however they are labelled.
        """
        return {
            **self._hashes,
            "classes": list(self.classes),
            "counts": self.counts(),
            "images": len(self.rows),
            "bytes": int(self.rows["bytes"].sum()),
            "root": str(self.root),
        }

    @cached_property
    def _hashes(self) -> dict[str, Any]:
        """Once a table: a million images take four seconds."""
        known = {split: self.split(split) for split in SPLITS}
        known = {split: rows for split, rows in known.items() if len(rows)}
        images = {split: rows["sha256"] for split, rows in known.items()}
        seen = [split for split in images if (images[split] != "").all()]
        return {
            "sha256": self._sha256(self.rows),
            "classes_sha256": classes_sha256(self.classes),
            **{f"{split}_sha256": images_sha256(images[split]) for split in seen},
            "splits": {
                split: {"images": len(rows), "sha256": self._sha256(rows)}
                for split, rows in known.items()
            },
        }

    def _sha256(self, rows: pd.DataFrame) -> str:
        """Hash of split, contents and labels of images in any order."""
        labels = pa.array(rows["label"].to_numpy())
        if self.task is Task.regression:
            labels = pa.array(rows["target"].to_numpy())
        text = labels.cast(pa.large_string())
        if self.task is Task.multi:
            lists = pa.Table.from_pandas(rows[["labels"]])["labels"].combine_chunks()
            text = pc.binary_join(lists.cast(pa.list_(pa.string())), ",").cast(text.type)
        splits, digests = (
            pa.array(rows[name].astype(TYPES["path"]), pa.large_string())
            for name in ("split", "sha256")
        )
        lines = pc.binary_join_element_wise(splits, digests, text, pa.scalar(" ", splits.type))
        lines = lines.take(pc.sort_indices(lines))
        digest = hashlib.sha256()
        for start in range(0, len(lines), HASHED_AT_ONCE):
            part = "\n".join(lines.slice(start, HASHED_AT_ONCE).to_pylist())
            digest.update(("\n" if start else "").encode() + part.encode())
        return digest.hexdigest()
