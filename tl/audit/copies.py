"""One image in several places: by its bytes, or by its looks; on both sides of a split or not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tl.audit.files import BLANK
from tl.audit.findings import Finding, Rows, Severity, images, stand
from tl.audit.near import TURNS, Pairs, groups_of, near_pairs
from tl.data.looks import hash_bits

# Bits of 256. Of copies in another size, quality or brightness, or with a caption, 95 % are within
# NEAR on four sets of photographs; of their 6,009 images nine pairs are, and all nine show the same
# thing; the nearest of the others are 54 bits apart. Copies that were only scaled or stored anew
# are within SAME.
NEAR, SAME = 40, 12
# Where so many images look alike they show one scene: then only copies as near as SAME count.
ONE_SCENE = 0.2


@dataclass(frozen=True)
class Contents:
    """The different contents (bytes) among rows.

    Args:
        of: (N,) content of each row.
        first: (C,) first row of each content.
        splits: (C, 3) which splits it is in.
        label: (C,) a number for its label, -1 where its rows have several.
    """

    of: Rows
    first: Rows
    splits: NDArray[np.bool_]
    label: Rows

    @classmethod
    def among(cls, rows: pd.DataFrame, labels: Rows) -> Contents:
        """From the rows of a table and a number for the label of each."""
        of, _ = pd.factorize(rows["sha256"])
        size = int(of.max()) + 1 if len(of) else 0
        first = np.full(size, len(rows), np.int64)
        np.minimum.at(first, of, np.arange(len(rows)))
        splits = np.zeros((size, 3), bool)
        splits[of, rows["split"].cat.codes.to_numpy()] = True
        label = labels[first].copy()
        label[np.unique(of[labels != label[of]])] = -1
        return cls(of, first, splits, label)

    def rows_of(self, chosen: NDArray[np.bool_], sets: Rows) -> tuple[Rows, Rows]:
        """Rows of some contents, those of one set beside each other, and the number of the set.

        Args:
            chosen: (C,) which contents.
            sets: (C,) set of each content.
        """
        rows = np.flatnonzero(chosen[self.of])
        own = sets[self.of[rows]]
        order = np.argsort(own, kind="stable")
        _, numbers = np.unique(own[order], return_inverse=True)
        return rows[order], numbers.astype(np.int64) + 1


def copies(rows: pd.DataFrame, labels: Rows) -> Iterator[Finding]:
    """Files with the same bytes.

    Args:
        rows: Of the table.
        labels: A number for the label of each.
    """
    contents = Contents.among(rows, labels)
    several = np.bincount(contents.of, minlength=len(contents.first)) > 1
    own = np.arange(len(contents.first))
    across = several & (contents.splits.sum(axis=1) > 1)
    conflict = several & (contents.label < 0)
    if across.any():
        found, sets = contents.rows_of(across, own)
        yield _across("copies", "with the same bytes", rows, found, sets)
    if conflict.any():
        found, sets = contents.rows_of(conflict, own)
        yield Finding(
            "copies_with_other_labels",
            Severity.error,
            f"{stand(int(conflict.sum()))} under several labels, as {len(found):,} copies",
            "correct the labels; audit=fix leaves all of these copies out",
            rows=found, sets=sets, fix=found,
        )  # fmt: skip
    if (plain := several & ~across & ~conflict).any():
        found, sets = contents.rows_of(plain, own)
        yield Finding(
            "copies",
            Severity.warning,
            f"{_copies(len(found) - int(plain.sum()))} of others in the same split and class: "
            "what they show counts more than once",
            "delete all but one, unless the weight is meant",
            rows=found, sets=sets,
        )  # fmt: skip


def near_copies(rows: pd.DataFrame, labels: Rows) -> Iterator[Finding]:
    """Images that look the same and have other bytes; blank ones all look the same, and are left.

    Args:
        rows: Of the table, with `phash` and `contrast`.
        labels: A number for the label of each.
    """
    contents = Contents.among(rows, labels)
    useful = rows["phash"].ne("").to_numpy(bool) & (rows["contrast"].to_numpy(float) >= BLANK)
    seen = np.flatnonzero(useful[contents.first]).astype(np.int64)
    hashes = rows["phash"].iloc[contents.first[seen]].tolist()
    pairs = near_pairs(hash_bits(hashes), NEAR)
    alike = len(np.unique(np.concatenate([pairs.first, pairs.second]))) / max(len(seen), 1)
    one_scene = alike > ONE_SCENE
    if one_scene:
        pairs = pairs.where(pairs.bits <= SAME)
    pairs = Pairs(seen[pairs.first], seen[pairs.second], pairs.bits, pairs.turn, pairs.complete)
    how = f"that differ in at most {SAME if one_scene else NEAR} of 256 bits of how they look"
    if one_scene:
        how += f" (not {NEAR}, as {alike:.0%} of the images look alike)"
    splits = contents.splits[pairs.first] | contents.splits[pairs.second]
    across = splits.sum(axis=1) > 1
    same = contents.label[pairs.first] == contents.label[pairs.second]
    conflict = ~same & ~across
    for kind, chosen in (("across", across), ("other", conflict), ("plain", same & ~across)):
        if not chosen.any():
            continue
        some = pairs.where(chosen)
        sets = groups_of(some, len(contents.first))
        member = np.zeros(len(contents.first), bool)
        member[some.first] = member[some.second] = True
        found, numbers = contents.rows_of(member, sets)
        notes = _notes(some, contents, found)
        if kind == "across":
            yield _across("near_copies", how, rows, found, numbers, notes)
            continue
        text, remedy = {
            "other": ("and stand under different labels", "see which label is right"),
            "plain": ("in the same split and class", "delete all but one of each set"),
        }[kind]
        yield Finding(
            "near_copies_with_other_labels" if kind == "other" else "near_copies",
            Severity.warning if kind == "other" else Severity.note,
            f"{images(len(found))} in {_sets(numbers)} {how}, {text}",
            remedy, rows=found, sets=numbers, notes=notes,
        )  # fmt: skip


def _across(
    kind: str, how: str, rows: pd.DataFrame, found: Rows, sets: Rows, notes: list[str] | None = None
) -> Finding:
    """Copies in two splits; to fix it they leave train, and val where they are in test too."""
    code = rows["split"].cat.codes.to_numpy()[found]
    last = np.zeros(int(sets.max()) + 1, np.int64)
    np.maximum.at(last, sets, code)
    names = rows["split"].cat.categories
    kept, taken = sorted(set(names[last[sets]])), int((code < last[sets]).sum())
    return Finding(
        f"{kind}_across_splits",
        Severity.error,
        f"{images(len(found))} {how} lie in several splits, in {_sets(sets)}: "
        f"figures on {' and '.join(kept)} are too good",
        f"leave them in one split; audit=fix takes {taken:,} of them out of the earlier one",
        rows=found, sets=sets, notes=notes or (), fix=found[code < last[sets]],
    )  # fmt: skip


def _copies(number: int) -> str:
    return f"{images(number)} {'is a copy' if number == 1 else 'are copies'}"


def _sets(numbers: Rows) -> str:
    number = len(np.unique(numbers))
    return f"{number:,} set{'' if number == 1 else 's'}"


def _notes(pairs: Pairs, contents: Contents, found: Rows) -> list[str]:
    """How near the nearest other image is to each."""
    size = len(contents.first)
    bits, turn = np.full(size, 256), np.zeros(size, np.int64)
    for ends in (pairs.first, pairs.second):
        order = np.argsort(-pairs.bits, kind="stable")  # the nearest is written last
        nearer = pairs.bits[order] < bits[ends[order]]
        bits[ends[order][nearer]] = pairs.bits[order][nearer]
        turn[ends[order][nearer]] = pairs.turn[order][nearer]
    own = contents.of[found]
    return [
        f"{number} bits" + (f", {TURNS[how]}" if how else "")
        for number, how in zip(bits[own].tolist(), turn[own].tolist(), strict=True)
    ]
