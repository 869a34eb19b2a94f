"""Any source of images becomes one checked table of (image, label or labels, split)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tl.config import BadImages, DataConfig, Task
from tl.data.check import cache_path, check_images, identities, unlooked
from tl.data.errors import DataError
from tl.data.folder import count, nearest, some
from tl.data.labels import Labels, understand
from tl.data.looks import LOOK
from tl.data.sources import list_images
from tl.data.sources.listing import NO_SPLIT, SPLITS, Listing
from tl.data.splits import assign_splits, without_test
from tl.data.table import SPLIT_TYPE, TYPES, ImageTable, plain_type

SHOWN_BAD = 10
SHOWN_CLASSES = 10
SHOWN_COPIES = 5
# With more images, what is wrong with the labels is said before the images are looked at.
MANY = 20_000


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
    """Read the images and labels of `data.root`: a folder, manifest, data set or shards.

    The class list comes from train, in natural order. Splits that are given are kept; where val is
    required and there is none, `assign_splits` takes it.

    Args:
        config: Where the images are and how they are read.
        seed: Decides about val.
        cache_dir: Remembers the outcome of the check; None checks everything again.
        required_splits: Splits that must have images; in training every class in each of them.
        progress: Called with (done, total) while images are unpacked or checked.
        classes: Class names in order, where a model fixes them (evaluation). Classes without images
            and splits without every class are then allowed.
        task: What is predicted, where a model fixes it; else as `config.task` says.

    Raises:
        DataError: All that is wrong with the source, its classes and its images, in one message.

    Example:
        >>> from tl.config import DataConfig
        >>> table = read_table(DataConfig(root="photos"), seed=0, cache_dir=None)  # doctest: +SKIP
        >>> table.counts()["train"]  # doctest: +SKIP
        {'ants': 98, 'bees': 97}
    """
    listing = list_images(config, cache_dir, progress)
    asked = task or (None if config.task == "auto" else Task(config.task))
    labels = understand(listing, asked, classes)
    job = _Job(config, listing, labels, seed, required_splits, given=classes is not None)
    if len(listing) > MANY and job.known_problems:
        raise DataError(job.known_problems)
    if not config.check:
        return job.table([unlooked(listing.images(), config.max_pixels)])
    file = cache_path(cache_dir, listing.key) if cache_dir else None
    limit = config.max_pixels
    return job.table(
        [check_images(listing.images(), max_pixels=limit, cache_file=file, progress=progress)]
    )


@dataclass
class _Job:
    """What is known before the images were looked at.

    Args:
        config: How they are read.
        listing: What the source has.
        labels: What its labels mean.
        seed: Decides about val.
        required: Splits that must have images.
        given: Whether a model fixes the classes.
    """

    config: DataConfig
    listing: Listing
    labels: Labels
    seed: int
    required: Sequence[str]
    given: bool

    @cached_property
    def known_problems(self) -> list[str]:
        """All that is wrong with names, labels and splits."""
        problems = [*self.listing.problems, *self.labels.problems]
        if self.labels.problems:
            return problems
        problems += self._class_problems()
        splits = np.maximum(self.listing.splits, 0)
        if len(splits) and (self.given or len(self.labels.classes) >= self._least_classes):
            problems += self._empty_cells(splits, self.labels.first, taken=False)
        return problems

    def table(self, looked: list[pa.Table]) -> ImageTable:
        """The table, or everything that stands against it.

        Args:
            looked: The facts alone; they are taken out, as a million of them have 200 MB.
        """
        listing, labels, config, facts = self.listing, self.labels, self.config, looked.pop()
        problems, notes = [*self.known_problems], [*listing.notes, *labels.notes]
        bad = pc.not_equal(facts["reason"], "").to_numpy(zero_copy_only=False)
        # A row whose path cannot be used has no name, and stands among the problems already.
        named = pc.not_equal(facts["path"], "").to_numpy(zero_copy_only=False)
        quarantined = self._quarantined(facts, bad & named)
        if len(quarantined) and config.bad_images is BadImages.fail:
            problems.append(_bad_images_text(quarantined, len(listing) + len(listing.unnamed)))
        elif len(quarantined):
            notes.append("left out " + _bad_images_text(quarantined, None))
        if problems:
            raise DataError(problems)
        good = ~bad
        if labels.task is Task.single:
            good &= labels.first >= 0
        table = _chosen(self._columns(facts), good)
        splits, problems = self._splits(table, listing.splits[good], notes)
        keep = splits >= 0
        table, splits = _chosen(table, keep), splits[keep]
        first = table["label"].to_numpy()
        problems = problems or self._empty_cells(splits, first, taken=True)
        if problems:
            raise DataError(problems)
        if not config.check:
            digests = pa.array(identities(facts, listing.root), pa.large_string())
            digests = digests.filter(pa.array(good)).filter(pa.array(keep))
            table = table.set_column(table.schema.get_field_index("sha256"), "sha256", digests)
        del facts
        table = _sorted(table, splits, *listing.in_place())
        rows = _frame(table)
        del table
        if config.check:
            notes += _duplicate_notes(rows, folders=listing.classes_of is not None)
        return ImageTable(
            *(listing.root, labels.classes, rows, notes, quarantined),
            task=labels.task,
            store=listing.store,
        )

    def _columns(self, facts: pa.Table) -> pa.Table:
        """Everything that the table has, but the splits."""
        listing, labels = self.listing, self.labels
        looks = LOOK if self.config.check else []
        table = facts.select(["path", "sha256", "width", "height", "bytes", *looks])
        more: dict[str, Any] = {"label": labels.first}
        if listing.groups is not None:
            more["group"] = listing.groups
        if listing.weights is not None:
            more["weight"] = listing.weights
        if labels.numbers is not None:
            more["target"] = labels.numbers
        if labels.lists is not None:
            more["labels"] = labels.lists
        more |= {name: listing.places[name] for name in listing.store.columns}
        for name, values in more.items():
            table = table.append_column(name, pa.array(values))
        return table

    def _splits(
        self, table: pa.Table, codes: NDArray[np.int8], notes: list[str]
    ) -> tuple[NDArray[np.int64], list[str]]:
        """Index into `SPLITS` of each row, -1 for those that are set aside; and problems."""
        if not len(table):
            return np.zeros(0, np.int64), []
        wanted = ("path", "sha256", "label", "labels", "group")
        table = table.select([name for name in wanted if name in table.schema.names])
        frame = table.to_pandas(types_mapper=plain_type)
        frame["split"] = pd.Categorical.from_codes(codes, dtype=SPLIT_TYPE)
        assigned = assign_splits(
            frame,
            task=self.labels.task,
            classes=self.labels.classes,
            val_fraction=self.config.val_fraction,
            test_fraction=self.config.test_fraction,
            folds=self.config.folds,
            fold=self.config.fold,
            seed=self.seed,
            need_val="val" in self.required,
        )
        notes += assigned.notes
        splits = np.array(assigned.splits.codes, np.int64)
        if self.config.folds and "val" in self.required:
            kept, aside = without_test(pd.DataFrame({"split": assigned.splits}))
            notes += aside
            splits[np.setdiff1d(np.arange(len(splits)), kept.index)] = -1
        return splits, [] if self.given else assigned.problems

    def _quarantined(self, facts: pa.Table, bad: NDArray[np.bool_]) -> pd.DataFrame:
        at = np.flatnonzero(bad)
        listing = self.listing
        rows = {
            "path": facts["path"].take(at).to_pylist(),
            "split": [SPLITS[max(c, 0)] for c in listing.splits[at].tolist()],
            "reason": facts["reason"].take(at).to_pylist(),
        }
        unnamed = pd.DataFrame(listing.unnamed, columns=["path", "split"])
        unnamed["reason"] = "its name is not UTF-8: rename it"
        found = pd.DataFrame(rows)
        return pd.concat([found, unnamed], ignore_index=True) if len(unnamed) else found

    @property
    def _least_classes(self) -> int:
        return {Task.single: 2, Task.multi: 1, Task.regression: 0}[self.labels.task]

    @property
    def _shown(self) -> str:
        return f"data.root: {self.listing.origin}"

    def _class_problems(self) -> list[str]:
        listing, labels = self.listing, self.labels
        folders = listing.classes_of is not None
        if not self.given and not self._has_train():
            names = [listing.split_names.get(s, s) for s in SPLITS if self._has(s)]
            lacking = "folder train" if folders else "train"
            if not names:  # no image at all, which is said elsewhere
                return []
            return [f"{self._shown} has {' and '.join(names)}, but no {lacking}"]
        if labels.task is Task.regression:
            return []
        problems = []
        if not self.given and len(labels.classes) < self._least_classes:
            few = listing.few or (
                f"{listing.origin}: {listing.label_name} has only one class, "
                f"{some(labels.classes)}; a classifier needs two or more"
            )
            problems.append(few)
            return problems
        owner = "the model" if self.given else listing.where("train")
        for split, names in self._names_of().items():
            unknown = [name for name in names if name not in set(labels.classes)]
            for name in unknown[:SHOWN_CLASSES]:
                called = listing.split_names.get(split)
                place = f"{called}/{name}" if called else name
                first = labels.unknown.get(split, {}).get(name)
                if first is not None and listing.row_name:
                    place += f" ({listing.row(first)})"
                hint = nearest(name, labels.classes)
                hint = hint or f" (known: {some(labels.classes, SHOWN_CLASSES)})"
                problems.append(f"{place} is a class that {owner} does not have{hint}")
            if len(unknown) > SHOWN_CLASSES:
                problems.append(f"and {len(unknown) - SHOWN_CLASSES:,} more such classes")
        return problems

    def _names_of(self) -> dict[str, list[str]]:
        """Split -> class names that may be unknown there."""
        if self.listing.classes_of is not None:
            return self.listing.classes_of
        return {split: list(names) for split, names in self.labels.unknown.items()}

    def _has(self, split: str) -> bool:
        if self.listing.classes_of is not None:
            return split in self.listing.classes_of
        return bool((self.listing.splits == SPLITS.index(split)).any())

    def _has_train(self) -> bool:
        return self._has("train") or bool((self.listing.splits == NO_SPLIT).any())

    def _empty_cells(self, splits: NDArray[Any], first: NDArray[Any], *, taken: bool) -> list[str]:
        """Splits without images and, in training, classes without images in a required split.

        Args:
            splits: Index into `SPLITS` of each image.
            first: Its class.
            taken: Whether val was taken already; before, only a val that is given is looked at.
        """
        problems = [] if len(splits) else [f"{self._shown} has no readable image"]
        takes_val = bool((splits == 0).any()) and (
            not self._has("val") or self.config.folds is not None
        )
        for split in self.required if len(splits) else []:
            if split == "val" and takes_val and not taken:
                continue
            inside = splits == SPLITS.index(split)
            if not inside.any():
                has = ", ".join(SPLITS[code] for code in np.unique(splits))
                problems.append(f"{self._shown} has no images for {split} (there is: {has})")
            elif self.labels.task is Task.single and not self.given:
                problems += self._lacking(split, first[inside & (first >= 0)])
        return problems

    def _lacking(self, split: str, there: NDArray[Any]) -> list[str]:
        """A sentence where a split does not have all classes."""
        classes = self.labels.classes
        number = np.bincount(there, minlength=len(classes))
        lacking = [classes[i] for i in np.flatnonzero(number == 0)]
        if not lacking:
            return []
        thing = "class" if len(lacking) == 1 else "classes"
        return [
            f"{self.listing.where(split)} has no readable image of the {thing} "
            f"{some(lacking, SHOWN_CLASSES)}: add images, or delete that class everywhere"
        ]


def _chosen(table: pa.Table, mask: NDArray[np.bool_]) -> pa.Table:
    """Rows of a table; itself, not a copy, where all are chosen."""
    return table if mask.all() else table.filter(pa.array(mask))


def _sorted(table: pa.Table, splits: NDArray[np.int64], *places: str) -> pa.Table:
    """Rows by split, label and path, or by split and place."""
    keys = [(name, "ascending") for name in ("split", *(places or ("label", "path")))]
    table = table.append_column("split", pa.array(splits))
    order = pc.sort_indices(table, sort_keys=keys)
    in_order = bool((order.to_numpy() == np.arange(len(table))).all())
    return table if in_order else table.take(order)


def _frame(table: pa.Table) -> pd.DataFrame:
    """The same for pandas, without a Python object a row."""
    codes = table["split"].to_numpy()
    rows: pd.DataFrame = table.drop_columns(["split"]).to_pandas(
        types_mapper=plain_type, split_blocks=True
    )
    rows["split"] = pd.Categorical.from_codes(codes, dtype=SPLIT_TYPE)
    order = [name for name in TYPES if name in rows]
    return rows[[*order, *(name for name in rows if name not in TYPES)]]


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


def _duplicate_notes(rows: pd.DataFrame, *, folders: bool) -> list[str]:
    """Copies (same bytes) that stand in two classes, or on both sides of a split."""
    contents, found = pd.factorize(rows["sha256"])
    if len(found) == len(rows):
        return []
    notes = []
    two = "in two class folders" if folders else "under two labels"
    for values, text in (
        (rows["label"].to_numpy(np.int64), f"{two} (correct the labels)"),
        (
            rows["split"].cat.codes.to_numpy(np.int64),
            "in two splits (figures on val and test are too good)",
        ),
    ):
        least, most = np.full(len(found), values.max()), np.full(len(found), values.min())
        np.minimum.at(least, contents, values)
        np.maximum.at(most, contents, values)
        differ = np.flatnonzero(least != most)
        if not len(differ):
            continue
        copies = rows["path"][np.isin(contents, differ)]
        names = copies.groupby(contents[copies.index]).agg(_same)
        lie = "lies" if len(differ) == 1 else "lie"
        notes.append(f"{count(len(differ), 'image')} {lie} {text}: {some(sorted(names))}")
    return notes


def _same(paths: pd.Series[Any]) -> str:
    """`a = b = c`, the first few."""
    names = paths.head(SHOWN_COPIES).tolist()
    more = f" and {len(paths) - len(names):,} more" if len(paths) > len(names) else ""
    return " = ".join(names) + more
