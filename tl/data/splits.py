"""Which images become train, val and test, or one of several folds: by content, never by place.

A split that keeps every image in its place while others arrive or leave can only look at the image
itself. So a hash of the contents (or of the group) is compared with the share that is asked for, in
every class alike; only classes that would lack a part are repaired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import csr_array

from tl.config import Task
from tl.data.folder import count, some
from tl.data.units import Units, units_of

SPLITS = ("train", "val", "test")
TRAIN, VAL, TEST = range(3)
DTYPE = pd.CategoricalDtype(list(SPLITS), ordered=True)
FREE = -1  # code of a row that nobody has given a split
TEST_SEED = "test"  # one test for all seeds: another seed must not train on what was test before
SHOWN_CLASSES = 10


class Assigned(NamedTuple):
    """What `assign_splits` decided.

    Args:
        splits: train, val or test of each row.
        notes: Sentences that a person should see.
        problems: Why training is impossible with it.
    """

    splits: pd.Categorical
    notes: list[str]
    problems: list[str]


def assign_splits(
    frame: pd.DataFrame,
    *,
    task: Task,
    classes: Sequence[str],
    val_fraction: float,
    test_fraction: float = 0.0,
    folds: int | None = None,
    fold: int | None = None,
    seed: int,
    need_val: bool = True,
) -> Assigned:
    """Keep the splits that are given, and decide about the other images.

    First test is taken (`test_fraction`, by content alone, whatever the seed), then val from what
    is left: `val_fraction` of it, or one of `folds` parts. They are taken from the rows without a
    split; where each row has one, from train. With `folds`, a val that is given joins train.

    Args:
        frame: `split` (train, val, test; empty or null where it is free), and the columns of
            `tl.data.units.units_of`.
        task: What a class is: with several labels, each label; in regression there are none.
        classes: Names of the labels.
        val_fraction: In (0, 1).
        test_fraction: In [0, 1); 0 takes no test.
        folds: Number of parts; each image is val in one of them.
        fold: The part that is val, from 0; None is 0.
        seed: Decides about val and the folds.
        need_val: False takes neither val nor folds (a model is judged, not trained).
    """
    codes = _given(frame["split"])
    notes: list[str] = []
    problems: list[str] = []
    if folds and need_val and (codes == VAL).any():
        moved = count(int((codes == VAL).sum()), "image")
        notes.append(f"data.folds={folds}: val ({moved}) joins train, as each part is val in turn")
        codes[codes == VAL] = TRAIN
    takes_val = need_val and not (codes == VAL).any()
    takes_test = test_fraction > 0 and not (codes == TEST).any()
    if test_fraction > 0 and not takes_test:
        notes.append("data.test_fraction is not used: the data have a test of their own")
    if takes_val or takes_test or (codes == FREE).any():
        units = units_of(frame, task, len(classes))
        _follow(codes, units, notes)
        pool = codes == (FREE if (codes == FREE).any() else TRAIN)
        taking = _Taking(units, task, classes, codes, notes, problems)
        if takes_test and pool.any():
            taking.test(pool, test_fraction)
        pool &= codes != TEST
        if takes_val and pool.any() and folds:
            taking.fold(pool, folds, fold or 0, seed)
        elif takes_val and pool.any():
            taking.val(pool, val_fraction, seed)
    codes[codes == FREE] = TRAIN
    return Assigned(pd.Categorical.from_codes(codes, dtype=DTYPE), notes, problems)


def without_test(rows: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Rows of train and val, and a sentence: folds are for choosing, test for what is chosen."""
    test = rows["split"] == "test"
    if not test.any():
        return rows, []
    stay = "stays" if test.sum() == 1 else "stay"
    aside = f"data.folds: {count(int(test.sum()), 'image')} of test {stay} out of it"
    return rows[~test], [f"{aside}: no fold looks at them"]


def _given(split: pd.Series[Any]) -> NDArray[np.int8]:
    """Code of the split of each row; `FREE` where none is given."""
    if not isinstance(split.dtype, pd.CategoricalDtype):
        names = split.astype("string")
        split = names.mask(names == "").astype("category")
    unknown = sorted(set(split.cat.categories) - set(SPLITS))
    if unknown:
        raise ValueError(f"splits must be among {', '.join(SPLITS)}; got {', '.join(unknown)}")
    return np.array(split.cat.set_categories(SPLITS).cat.codes, dtype=np.int8)


def _follow(codes: NDArray[np.int8], units: Units, notes: list[str]) -> None:
    """Rows without a split go where a copy, or the rest of their group, was put already."""
    given = np.full(len(units), len(SPLITS), np.int64)
    fixed = codes != FREE
    # Where a unit stands in several splits already, train: that makes no figure more flattering.
    np.minimum.at(given, units.of_row[fixed], codes[fixed])
    place = given[units.of_row]
    follow = ~fixed & (place < len(SPLITS))
    codes[follow] = place[follow]
    if follow.any():
        one = follow.sum() == 1
        what = "follows" if one else "follow"
        followed = f"{count(int(follow.sum()), 'image')} without a split {what}"
        notes.append(f"{followed} a copy or a group that has one")


@dataclass
class _Taking:
    """Takes parts of a pool of rows: changes `codes`, `notes` and `problems` in place."""

    units: Units
    task: Task
    classes: Sequence[str]
    codes: NDArray[np.int8]
    notes: list[str]
    problems: list[str]

    def test(self, pool: NDArray[np.bool_], fraction: float) -> None:
        """Test, decided by content alone; each label keeps two units for train and val."""
        taken = self._parts(pool, TEST_SEED, (fraction, 1.0), need=(1, 2), first=1) == 0
        self._take(taken, pool, TEST)
        self._note("no test", pool, TEST, "whatever the seed")
        if lacking := self._lacking(pool, taken):
            self.notes.append(f"test has nothing of {self._names(lacking)}: too few images")

    def val(self, pool: NDArray[np.bool_], fraction: float, seed: int) -> None:
        """Val."""
        taken = self._parts(pool, seed, (fraction, 1.0), need=(1, 1)) == 0
        self._take(taken, pool, VAL)
        self._note("no val", pool, VAL, f"and seed {seed}")
        lacking = self._lacking(pool, taken, ~taken)
        if self._stops(lacking):
            self.problems.append(
                f"there is no val, and {self._names(lacking)} cannot be split into train and val: "
                f"{self._each} needs at least two different {self._kind} of its own"
            )
        elif lacking:
            self.notes.append(f"train or val has nothing of {self._names(lacking)}: too few images")

    def fold(self, pool: NDArray[np.bool_], folds: int, fold: int, seed: int) -> None:
        """One of several parts, of about the same size, becomes val."""
        ends = tuple((part + 1) / folds for part in range(folds))
        parts = self._parts(pool, seed, ends, need=(1,) * folds)
        self._take(parts == fold, pool, VAL)
        self._note(f"data.fold={fold} of data.folds={folds}", pool, VAL, f"and seed {seed}")
        lacking = self._lacking(pool, *(parts == part for part in range(folds)))
        if self._stops(lacking):
            fewest = int(self.units.counts(pool)[lacking].min())
            remedy = f"data.folds={fewest}" if 2 <= fewest < folds else "fewer folds"
            self.problems.append(
                f"data.folds={folds}: {self._names(lacking)} cannot be in every fold: {self._each} "
                f"needs at least {folds} different {self._kind} of its own; add some, or {remedy}"
            )
        elif lacking:
            self.notes.append(f"some folds have nothing of {self._names(lacking)}: too few images")

    @property
    def _kind(self) -> str:
        return "groups" if self.units.by == "group" else "images"

    @property
    def _each(self) -> str:
        return "each class" if self.task is Task.single else "training"

    def _parts(
        self,
        pool: NDArray[np.bool_],
        seed: int | str,
        ends: tuple[float, ...],
        *,
        need: tuple[int, ...],
        first: int | None = None,
    ) -> NDArray[np.int64]:
        """Part of each unit of the pool, -1 for the others; arguments as `_repair` has them."""
        inside = self.units.among(pool)
        shares = self.units.shares(seed)[inside]
        chosen = np.minimum(np.searchsorted(ends, shares, side="right"), len(ends) - 1)
        _repair(chosen, shares, self.units.labels[inside], ends, need, first)
        parts = np.full(len(self.units), -1, np.int64)
        parts[inside] = chosen
        return parts

    def _take(self, units: NDArray[np.bool_], pool: NDArray[np.bool_], code: int) -> None:
        self.codes[pool & units[self.units.of_row]] = code

    def _lacking(self, pool: NDArray[np.bool_], *sides: NDArray[np.bool_]) -> list[int]:
        """Labels of the pool of which a side, given as units, has nothing."""
        there = self.units.counts(pool) > 0
        missing = np.zeros_like(there)
        for side in sides:
            missing |= self.units.counts(pool & side[self.units.of_row]) == 0
        found: list[int] = np.flatnonzero(there & missing).tolist()
        return found

    def _stops(self, lacking: Sequence[int]) -> bool:
        """Whether nothing can be trained or judged; a rare label among several is no reason."""
        return bool(lacking) and (self.task is Task.single or self.units.everything in lacking)

    def _names(self, labels: Sequence[int]) -> str:
        if self.units.everything in labels:
            return "the images"
        return some([self.classes[label] for label in labels], SHOWN_CLASSES)

    def _note(self, why: str, pool: NDArray[np.bool_], code: int, seed: str) -> None:
        """Say how many images, and how many groups, of the pool were taken."""
        taken = pool & (self.codes == code)
        share = taken.sum() / pool.sum()
        text = f"{why}: took {taken.sum():,} of {count(int(pool.sum()), 'image')} ({share:.1%})"
        if self.units.by == "group":
            some_, all_ = (len(self.units.among(rows)) for rows in (taken, pool))
            text += f", {some_:,} of {count(all_, 'group')},"
        self.notes.append(f"{text} for {SPLITS[code]}, chosen by {self.units.by} {seed}")
        if self.units.linked:
            linked = count(self.units.linked, "group")
            have = "shares" if self.units.linked == 1 else "share"
            text = f"{linked} {have} copies of images with another group: they stay together"
            self.notes += [text] if text not in self.notes else []


def _repair(
    parts: NDArray[np.int64],
    shares: NDArray[np.float64],
    labels: csr_array,
    ends: Sequence[float],
    need: Sequence[int],
    first: int | None,
) -> None:
    """Move as few units as it takes, the nearest ones, until each label is in each part.

    Args:
        parts: Part of each unit; changed in place.
        shares: Of each unit.
        labels: Which labels occur in a unit, (units, labels).
        ends: Upper end of each part within [0, 1].
        need: Units that a label should have in each part.
        first: A part that may take the last unit of another one.
    """
    counts = np.stack([np.asarray(labels[parts == p].sum(axis=0)) for p in range(len(ends))])
    if (counts >= np.array(need)[:, None]).all():
        return
    by_label = labels.tocsc()
    starts = (0.0, *ends[:-1])
    for part in sorted(range(len(ends)), key=lambda p: p != first):
        for label in np.flatnonzero((counts[part] < need[part]) & (counts.sum(axis=0) > 0)):
            members = by_label.indices[by_label.indptr[label] : by_label.indptr[label + 1]]
            away = np.maximum(starts[part] - shares[members], shares[members] - ends[part])
            held_by = labels.indptr[members + 1] - labels.indptr[members]
            # Those with the fewest labels first: others may be the last one of another label.
            for unit in members[np.lexsort((away, held_by))]:
                if counts[part, label] >= need[part]:
                    break
                held = labels.indices[labels.indptr[unit] : labels.indptr[unit + 1]]
                donor = parts[unit]
                least = 0 if part == first else need[donor]
                if donor != part and (counts[donor, held] > least).all():
                    counts[donor, held] -= 1
                    counts[part, held] += 1
                    parts[unit] = part
