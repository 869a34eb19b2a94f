"""From labels as a source has them to a task, a class list, and what is to be predicted."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tl.config import Task
from tl.data.folder import count, natural_order, some
from tl.data.sources.listing import NO_SPLIT, SPLITS, Listing

LONGEST_NAME = 250
SHOWN_ROWS = 3
SHOWN_NAMES = 5


@dataclass
class Labels:
    """What the labels of a listing mean.

    Args:
        task: What is predicted.
        classes: Class names in order; regression: the name of the number.
        first: Index of the class, or of the first label, of each image, int32 (N,); -1 where there
            is none, or one that `classes` does not have.
        lists: Several labels: indices of each image, `list<int32>` (N,).
        numbers: Regression: float32 (N,).
        unknown: Split -> names that `classes` does not have, with the first image of each.
        problems: All that is wrong, one sentence each.
        notes: Sentences that a person should see.
    """

    task: Task
    classes: tuple[str, ...]
    first: NDArray[np.int32]
    lists: pa.Array | None = None
    numbers: NDArray[np.float32] | None = None
    unknown: dict[str, dict[str, int]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def understand(listing: Listing, task: Task | None, given: Sequence[str] | None) -> Labels:
    """Find the task where none is asked for, the class list of train, and the index of each label.

    Args:
        listing: Its labels are names, ids, numbers or lists.
        task: What is asked for; None: several labels where the source has lists, a number where the
            labels have fractions, else one class.
        given: Class names in order, where a model fixes them.
    """
    raw = listing.labels
    if pa.types.is_boolean(raw.type) or pa.types.is_null(raw.type):
        raw = raw.cast(pa.large_string())
    found = _task_of(raw)
    asked = task or found
    if asked is Task.regression:
        return _numbers(listing, raw, given)
    labels = Labels(asked, tuple(given or ()), np.full(len(raw), -1, np.int32))
    if found is not task:
        labels.notes += _why(asked, listing) if task is None else []
    if found is Task.regression:
        labels.problems.append(_fractions(listing, raw))
        return labels
    if pa.types.is_floating(raw.type):  # ids beside missing ones
        raw = pc.if_else(pc.is_nan(raw), None, raw).cast(pa.int64())
    lengths = _lengths(raw)
    if asked is Task.single:
        _one_each(listing, raw, lengths, labels)
    elif (lengths == 0).all():
        labels.problems.append(f"{listing.origin}: no image has a label in {listing.label_name}")
    if not labels.problems:
        _index(listing, raw, lengths, labels, given)
    return labels


def _task_of(raw: pa.Array) -> Task:
    if pa.types.is_list(raw.type) or pa.types.is_large_list(raw.type):
        return Task.multi
    if pa.types.is_floating(raw.type):
        values = raw.drop_null().to_numpy()
        values = values[~np.isnan(values)]
        return Task.regression if (values != np.rint(values)).any() else Task.single
    return Task.single


def _why(task: Task, listing: Listing) -> list[str]:
    if task is Task.multi:
        return [f"{listing.label_name} has several labels an image: data.task=multi"]
    return []


def _numbers(listing: Listing, raw: pa.Array, given: Sequence[str] | None) -> Labels:
    """One number an image."""
    name = listing.label_name
    classes = tuple(given or (name.removeprefix("column "),))
    labels = Labels(Task.regression, classes, np.full(len(raw), -1, np.int32))
    if not (pa.types.is_integer(raw.type) or pa.types.is_floating(raw.type)):
        try:
            raw = raw.cast(pa.float64())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            labels.problems.append(
                f"{listing.origin}: {name} should be a number, but {_no_number(listing)}"
            )
            return labels
    values = raw.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    labels.numbers = values.astype(np.float32)
    missing = np.flatnonzero(~np.isfinite(labels.numbers))
    if len(missing):
        labels.problems.append(_missing(listing, missing, "number"))
    elif len(values) and (values == values[0]).all():
        labels.problems.append(f"{listing.origin}: {name} is {values[0]:g} in all rows")
    return labels


def _no_number(listing: Listing) -> str:
    for start in range(len(listing)):
        value = listing.labels[start].as_py()
        try:
            float(value or "nan")
        except (TypeError, ValueError):
            return f"{listing.row(start)} has {str(value)[:40]!r}"
    return "it has another type"


def _fractions(listing: Listing, raw: pa.Array) -> str:
    values = raw.to_numpy(zero_copy_only=False)
    rows = np.flatnonzero((values != np.rint(values)) & ~np.isnan(values))
    return (
        f"{listing.origin}: {listing.label_name} has numbers with fractions ({_rows(listing, rows)}"
        f": {values[rows[0]]:g}); a class is a name or a whole number, and data.task=regression "
        "predicts numbers"
    )


def _lengths(raw: pa.Array) -> NDArray[np.int64]:
    """Number of labels of each image."""
    if pa.types.is_list(raw.type) or pa.types.is_large_list(raw.type):
        lengths = pc.list_value_length(raw).fill_null(0)
        return np.asarray(lengths, np.int64)
    there = raw.is_valid()
    if pa.types.is_string(raw.type) or pa.types.is_large_string(raw.type):
        there = pc.and_(there, pc.not_equal(raw, "").fill_null(False))
    return np.asarray(there.cast(pa.int8()), np.int64)


def _one_each(listing: Listing, raw: pa.Array, lengths: NDArray[np.int64], labels: Labels) -> None:
    missing, several = np.flatnonzero(lengths == 0), np.flatnonzero(lengths > 1)
    if listing.classes and pa.types.is_integer(raw.type):  # -1 is how data sets hide labels of test
        ids = raw.fill_null(-1).to_numpy(zero_copy_only=False)
        missing = np.flatnonzero(ids == -1)
    if len(missing):
        labels.problems.append(_missing(listing, missing, "label"))
    if len(several):
        labels.problems.append(
            f"{listing.origin}: {count(len(several), 'image')} have several labels "
            f"({_rows(listing, several)}): data.task=multi"
        )


def _missing(listing: Listing, rows: NDArray[np.intp], thing: str) -> str:
    have = "has" if len(rows) == 1 else "have"
    return (
        f"{listing.origin}: {len(rows):,} of {count(len(listing), 'image')} {have} no {thing} in "
        f"{listing.label_name} ({_rows(listing, rows)}): fill it in, or delete those rows"
    )


def _rows(listing: Listing, rows: NDArray[np.intp]) -> str:
    return some([listing.row(int(r)) for r in rows[: SHOWN_ROWS + 1]], SHOWN_ROWS) + (
        f" of {len(rows):,}" if len(rows) > SHOWN_ROWS + 1 else ""
    )


def _index(
    listing: Listing,
    raw: pa.Array,
    lengths: NDArray[np.int64],
    labels: Labels,
    given: Sequence[str] | None,
) -> None:
    """Class list, and the index of each label in it."""
    is_list = pa.types.is_list(raw.type) or pa.types.is_large_list(raw.type)
    flat = raw.flatten() if is_list else raw.filter(pa.array(lengths > 0))
    owner = np.repeat(np.arange(len(raw)), lengths)
    if flat.null_count:
        rows = owner[flat.is_null().to_numpy(zero_copy_only=False)]
        labels.problems.append(_missing(listing, np.unique(rows), "name for a label"))
        return
    encoded = flat.dictionary_encode()
    names = _names(encoded.dictionary, listing.classes, given)
    codes = encoded.indices.to_numpy(zero_copy_only=False)
    splits = listing.splits[owner]
    in_train = set(np.unique(codes[(splits == NO_SPLIT) | (splits == 0)]).tolist())
    labels.classes = _class_list(listing, [names[c] for c in sorted(in_train)], given, labels.notes)
    labels.problems += _odd_names(listing, labels.classes, labels.notes)
    index = {name: i for i, name in enumerate(labels.classes)}
    translate = np.array([index.get(name, -1) for name in names], np.int32)
    own = translate[codes] if len(codes) else np.zeros(0, np.int32)
    known = own >= 0
    for at in _first_of_each(codes, splits, ~known):
        unknown = labels.unknown.setdefault(SPLITS[max(int(splits[at]), 0)], {})
        unknown.setdefault(names[codes[at]], int(owner[at]))
    own, owner = own[known], owner[known]
    if labels.task is Task.single:
        labels.first[owner] = own
        return
    # One label twice is one label; the indices of an image are in order.
    owner, own = np.divmod(np.unique(owner * len(labels.classes) + own), len(labels.classes) or 1)
    sizes = np.bincount(owner, minlength=len(raw))
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    labels.lists = pa.ListArray.from_arrays(offsets, pa.array(own.astype(np.int32)))
    labels.first[sizes > 0] = own[offsets[:-1][sizes > 0]]
    if none := int((sizes == 0).sum()):
        has = "has" if none == 1 else "have"
        labels.notes.append(f"{count(none, 'image')} {has} no label at all")


def _first_of_each(
    codes: NDArray[Any], splits: NDArray[np.int8], chosen: NDArray[np.bool_]
) -> list[int]:
    """Places of the first of each pair of code and split among the chosen ones, in their order."""
    at = np.flatnonzero(chosen)
    _, first = np.unique(codes[at] * 4 + splits[at] + 1, return_index=True)
    return sorted(at[first].tolist())


def _names(
    values: pa.Array, classes: tuple[str, ...] | None, given: Sequence[str] | None
) -> list[str]:
    """Names of distinct labels; ids are places in the class list of the source or of the model."""
    if not pa.types.is_integer(values.type):
        # The same accented letter has two spellings in Unicode.
        return [unicodedata.normalize("NFC", str(value)) for value in values.to_pylist()]
    ids = values.to_pylist()
    order: Sequence[str] = classes or ()
    if not order and given is not None and not {str(i) for i in ids} <= set(given):
        order = given
    return [order[i] if 0 <= i < len(order) else str(i) for i in ids]


def _class_list(
    listing: Listing, train: list[str], given: Sequence[str] | None, notes: list[str]
) -> tuple[str, ...]:
    if given is not None:
        return tuple(given)
    if listing.classes_of is not None:
        return tuple(sorted(listing.classes_of.get("train", []), key=natural_order))
    found = set(train)
    if listing.classes is None:
        return tuple(sorted(found, key=natural_order))
    spare = [name for name in listing.classes if name not in found]
    if spare:
        notes.append(f"no training image of {count(len(spare), 'class')}: {some(spare)}; left out")
    more = sorted(found - set(listing.classes), key=natural_order)
    return (*(name for name in listing.classes if name in found), *more)


def _odd_names(listing: Listing, classes: tuple[str, ...], notes: list[str]) -> list[str]:
    """Names that no table, file or line could hold are problems; look-alikes are notes."""
    problems = []
    torn = [name for name in classes if not name.isprintable() or not name.strip()]
    if torn:
        shown = ", ".join(ascii(name[:40]) for name in torn[:SHOWN_NAMES])
        problems.append(
            f"{listing.origin}: {count(len(torn), 'class name')} with line breaks, control "
            f"characters or nothing but spaces: {shown}; rename them"
        )
    long = [name for name in classes if len(name) > LONGEST_NAME]
    if long:
        problems.append(
            f"{listing.origin}: {count(len(long), 'class name')} of more than {LONGEST_NAME} "
            f"characters: {long[0][:40]}…; shorten them, or is {listing.label_name} not the label?"
        )
    folded: dict[str, list[str]] = {}
    for name in classes:
        folded.setdefault(name.casefold(), []).append(name)
    alike = [" = ".join(names) for names in folded.values() if len(names) > 1]
    alike = [text for text in alike if len(text) > len("a = A")]  # letters are meant so
    if alike:
        notes.append(f"class names that differ in upper and lower case only: {some(alike)}")
    return problems
