"""What the counts say: classes that are missing, tiny or rare, groups on two sides of a split."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tl.audit.findings import Finding, Severity, images
from tl.config import Task
from tl.data.sources.listing import SPLITS
from tl.data.table import ImageTable
from tl.imbalance import RATIO

TINY = 5  # training images; below, the decision table calls a class tiny
FEW = 5  # images of a class in val or test, below which its figures say next to nothing
IMBALANCE = 3.0  # times as many images as the rarest class; from RATIO on imbalance=auto acts
SHOWN = 5  # names in a sentence
FAR = 6.0  # robust deviations of a target from the median


def class_counts(table: ImageTable) -> Iterator[Finding]:
    """Classes or labels by their number of images in each split."""
    present = [split for split in SPLITS if (table.rows["split"] == split).any()]
    counts = {split: _counts(table, split) for split in present}
    train = counts.get("train", np.zeros(len(table.classes), np.int64))
    for split in present:
        missing = _named(table, counts[split] == 0, counts[split])
        if missing:
            yield Finding(
                "class_missing",
                Severity.error,
                f"{_some(missing)} {'has' if len(missing) == 1 else 'have'} no image in {split}",
                f"add images to {split}, or delete the class everywhere",
                names=missing,
            )
    tiny = _named(table, (train > 0) & (train < TINY), train)
    if tiny:
        yield Finding(
            "tiny_class",
            Severity.warning,
            f"{_some(tiny)}: fewer than {TINY} training images",
            "add images: this is too little to learn from, and to judge by",
            names=tiny,
        )
    for split in present[1:]:
        few = _named(table, (counts[split] > 0) & (counts[split] < FEW), counts[split])
        if few:
            yield Finding(
                "few_to_judge",
                Severity.note,
                f"{_some(few)}: fewer than {FEW} images in {split}, so their own figures are rough",
                "look at the intervals of the report",
                names=few,
            )
    yield from _imbalance(table, train)


def _imbalance(table: ImageTable, train: NDArray[np.int64]) -> Iterator[Finding]:
    least, most = (int(f(train[train > 0])) for f in (np.min, np.max)) if train.any() else (1, 1)
    if most / least < IMBALANCE:
        return
    yield Finding(
        "imbalance",
        Severity.warning if most / least >= RATIO else Severity.note,
        f"{table.classes[int(train.argmax())]} has {images(most)} in train, "
        f"{table.classes[int(np.where(train > 0, train, most + 1).argmin())]} {least:,}: "
        f"{most / least:.3g} times as many",
        f"judge by f1_macro beside the accuracy; imbalance=auto acts from {RATIO:g} times on",
        names=_named(table, (train > 0) & (most >= IMBALANCE * train), train),
    )


def _counts(table: ImageTable, split: str) -> NDArray[np.int64]:
    targets = table.targets(split)
    found: NDArray[np.int64]
    if table.task is Task.multi:
        found = targets.sum(axis=0).astype(np.int64)
    else:
        found = np.bincount(targets[targets >= 0], minlength=len(table.classes))
    return found


def _named(table: ImageTable, mask: NDArray[np.bool_], counts: NDArray[np.int64]) -> list[str]:
    return [
        f"{name} ({number:,})" if number else name
        for name, number, wanted in zip(table.classes, counts, mask, strict=True)
        if wanted
    ]


def _some(names: list[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest:,} more" if rest > 0 else "")


def groups(rows: pd.DataFrame) -> Iterator[Finding]:
    """Groups (a patient, a product, a video) with images in several splits."""
    own = rows[["group", "split"]].dropna()
    own = own[own["group"] != ""]
    several = own.groupby("group", observed=True)["split"].nunique()
    several = several[several > 1]
    if not len(several):
        return
    members = own[own["group"].isin(several.index)].sort_values("group", kind="stable")
    found, code = members.index.to_numpy(np.int64), members["split"].cat.codes.to_numpy()
    numbers, _ = pd.factorize(members["group"])
    last = np.zeros(len(several), np.int64)
    np.maximum.at(last, numbers, code)
    fix = found[code < last[numbers]]
    yield Finding(
        "groups_across_splits",
        Severity.error,
        f"{len(several):,} of {own['group'].nunique():,} groups have images in several splits, "
        f"{images(len(found))} together: the figures are too good for new groups",
        "keep a group in one split (leave the split to tl); audit=fix takes "
        f"{len(fix):,} of them out of the earlier split",
        rows=found,
        notes=[f"group {name}" for name in members["group"]],
        sets=numbers.astype(np.int64) + 1,
        fix=fix,
    )


def target_values(table: ImageTable) -> Iterator[Finding]:
    """Numbers to be predicted that stand far from all others."""
    values = table.rows["target"].to_numpy(np.float64)
    middle = np.median(values)
    usual = 1.4826 * np.median(np.abs(values - middle))
    far = np.flatnonzero(np.abs(values - middle) > FAR * usual) if usual else np.empty(0, np.int64)
    if len(far):
        yield Finding(
            "target_outliers",
            Severity.warning,
            f"{images(len(far))} whose {table.classes[0]} is far from the usual {middle:.4g} "
            f"(± {usual:.3g})",
            "see whether the number is right: one wrong unit spoils a fit",
            rows=far,
            notes=[f"{value:.4g}" for value in values[far]],
        )
