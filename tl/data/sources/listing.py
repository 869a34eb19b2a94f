"""What a source says of its images, in arrays; `tl.data.reading` makes the table of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tl.data.folder import SPLIT_NAMES
from tl.data.stores import Images, ImageStore

SPLITS = ("train", "val", "test")
NO_SPLIT = -1
# Names of splits that manifests use beside those of folders.
SPLIT_WORDS = {**SPLIT_NAMES, "training": "train", "dev": "val", "testing": "test"}


@dataclass
class Listing:
    """Images of a source by name, with what it says of each; no image is opened for it.

    Args:
        origin: What a person calls the source, for messages: the folder, file or address.
        root: The data folder, or that of the manifest; for an address a path that looks like it.
        store: Reads the images.
        names: Name of each image, `large_string` (N,); no two are the same.
        labels: `large_string` (class names), integers (class ids), floats (numbers), or lists of
            names or ids, (N,); null where one is missing.
        splits: Index into `SPLITS` or `NO_SPLIT`, int8 (N,). A source without splits says
            `NO_SPLIT` everywhere.
        places: Private columns of the store, int64 (N,) each.
        groups: Group of each image, `large_string` (N,), null where it has none; None: no groups.
        weights: float32 (N,), finite and at least 0; None: all weigh the same.
        classes: Class names in order, where the source fixes them (ids are indices into them).
        classes_of: Split -> classes that the source has there, with or without images; None: those
            of the labels.
        split_names: Split -> what the source calls it.
        label_name: What the label is called in messages, and a number that is predicted.
        row_name: From the index of an image to its place, for messages.
        unnamed: Name and split of images whose name cannot be printed.
        few: What to say where there are fewer than two classes.
        problems: All that is wrong, one sentence each.
        notes: Sentences that a person should see.
        key: What identifies the source for the remembered check.
    """

    origin: str
    root: Path
    store: ImageStore
    names: pa.Array
    labels: pa.Array
    splits: NDArray[np.int8]
    places: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    groups: pa.Array | None = None
    weights: NDArray[np.float32] | None = None
    classes: tuple[str, ...] | None = None
    classes_of: dict[str, list[str]] | None = None
    split_names: dict[str, str] = field(default_factory=dict)
    label_name: str = "label"
    row_name: Callable[[int], str] | None = None
    unnamed: list[tuple[str, str]] = field(default_factory=list)
    few: str = ""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    key: str = ""

    def __len__(self) -> int:
        return len(self.names)

    def images(self) -> Images:
        """All images, in the order of the listing."""
        return Images(self.store, self.names, [self.places[c] for c in self.store.columns])

    def in_place(self) -> tuple[str, ...]:
        """Columns to order the rows by where a pass in another order would fetch all many times."""
        return self.store.columns if getattr(self.store, "streamed", False) else ()

    def row(self, index: int) -> str:
        """Where an image stands in the source."""
        return self.row_name(index) if self.row_name else str(self.names[index].as_py())

    def where(self, split: str) -> str:
        """What to call a split in messages."""
        return self.split_names.get(split, self.root.name or self.origin)


def split_codes(words: pa.Array, column: str) -> tuple[NDArray[np.int8], dict[str, str], list[str]]:
    """Splits from what people call them: train, val, valid, validation, dev, test, in any case.

    Args:
        words: Text of each row; null or empty where no split is given.
        column: How to call the column in messages.

    Returns:
        Index into `SPLITS` or `NO_SPLIT`, what each split is called, and problems.
    """
    encoded = words.cast(pa.large_string()).dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.unify_dictionaries().combine_chunks()
    known: list[int] = []
    names: dict[str, str] = {}
    unknown: list[str] = []
    for word in encoded.dictionary.to_pylist():
        split = SPLIT_WORDS.get(word.strip().lower())
        known.append(NO_SPLIT if split is None else SPLITS.index(split))
        if split is not None:
            names.setdefault(split, word.strip())
        elif word.strip():
            unknown.append(word)
    codes = encoded.indices.fill_null(len(known)).to_numpy(zero_copy_only=False)
    problems = []
    if unknown:
        shown = ", ".join(repr(word[:40]) for word in sorted(unknown)[:5])
        more = f" and {len(unknown) - 5:,} more" if len(unknown) > 5 else ""
        problems.append(
            f"{column} has unknown split names: {shown}{more}; a split is train, val (valid, "
            "validation, dev) or test, or empty"
        )
    return np.array([*known, NO_SPLIT], np.int8)[codes], names, problems


def plain(array: Any) -> pa.Array:
    """One Arrow array of a column that may have several chunks."""
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
