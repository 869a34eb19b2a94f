"""What a run said of each image of a split, in an order that does not depend on the run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tl.config import Task, TlError
from tl.evaluation.paired import PairSide
from tl.evaluation.report import headline

if TYPE_CHECKING:
    import pyarrow as pa

SHARE = "p_"  # of the columns with the probability of a class
NAMED = 5  # images or classes that a message names


class PairingError(TlError):
    """Two tables of predictions cannot be laid beside each other."""

    exit_code = 2


@dataclass(frozen=True)
class Truth:
    """Images of a split and what is true of them; runs on the same data share it.

    Args:
        task: What the images are labelled with.
        classes: Sorted names; for regression empty.
        sha256: Of the bytes of each image, sorted, none twice, (N,).
        path: Name of the image in the data of the first run that had it, (N,).
        truth: Index into `classes`, (N,); for several labels 0 or 1, (N, C); or the target, (N,).
        order: Rows of the split that these are.
        fingerprint: Hash of task, classes, images and labels: where two are the same, so are the
            questions that two runs have answered.
        images: Hash of the images alone.
        copies: Rows that are left out, as another row has the same image.
    """

    task: Task
    classes: tuple[str, ...]
    sha256: NDArray[np.str_]
    path: NDArray[np.object_]
    truth: NDArray[Any]
    order: NDArray[np.int64]
    fingerprint: str
    images: str
    copies: int

    def __len__(self) -> int:
        return len(self.sha256)


@dataclass(frozen=True)
class Sheet:
    """What one run said of the images of a split.

    Args:
        split: Which.
        truth: The images, and what is true of them.
        said: Index of the class that it named, (N,); for several labels the probabilities, (N, C);
            for regression the value, (N,).
        score: Probability of the class that it named, (N,); None for other tasks.
    """

    split: str
    truth: Truth
    said: NDArray[Any]
    score: NDArray[np.float32] | None = None

    @property
    def metric(self) -> str:
        """The headline of the task: `acc`, `map` or `mae`."""
        return headline(self.truth.task)

    def side(self, rows: NDArray[np.int64] | None = None) -> PairSide:
        """The sheet for `tl.evaluation.paired`, of all images or of some."""
        at: Any = slice(None) if rows is None else rows
        said, truth = self.said[at], self.truth.truth[at]
        if self.truth.task is Task.single:
            return PairSide((said == truth).astype(np.float64))
        if self.truth.task is Task.multi:
            return PairSide(said.astype(np.float64), truth.astype(bool))
        return PairSide(np.abs(said - truth).astype(np.float64))


def columns_needed(names: Sequence[str]) -> list[str]:
    """The columns of `predictions.parquet` that a sheet is made of.

    Args:
        names: All columns of the file.
    """
    wanted = {"path", "split", "sha256", "label", "labels", "predicted", "score", "target"}
    several = "labels" in names
    return [n for n in names if n in wanted or (several and n.startswith(SHARE))]


def sheets(
    table: pa.Table, names: Sequence[str], known: MutableMapping[str, Truth] | None = None
) -> dict[str, Sheet]:
    """The sheet of each split that a table of predictions has.

    Args:
        table: `columns_needed` of `predictions.parquet`, one row an image.
        names: All columns of the file.
        known: Remembers the images of runs before, which many runs share.

    Raises:
        PairingError: The table has no hashes of the images, or is no table of predictions.
    """
    missing = sorted({"path", "split"} - set(table.column_names))
    task = _task(table.column_names)
    if missing or task is None:
        raise PairingError(f"it is no table of predictions of tl ({', '.join(names[:NAMED])}, …)")
    if "sha256" not in table.column_names:
        raise PairingError(
            "its predictions have no column sha256, as those of earlier versions of tl, so that "
            "its images cannot be told: judge it again with tl evaluate, or train it again"
        )
    classes = tuple(sorted(n.removeprefix(SHARE) for n in names if n.startswith(SHARE)))
    splits = np.asarray(table["split"].to_pylist(), dtype=object)
    found = {}
    for split in dict.fromkeys(splits.tolist()):
        rows = table.take(np.flatnonzero(splits == split))
        found[str(split)] = _sheet(rows, str(split), task, classes, {} if known is None else known)
    return found


def sheet_of(frame: pd.DataFrame, split: str) -> Sheet:
    """The sheet of one split of a table of predictions.

    Raises:
        PairingError: It has no such split; or as `sheets`.
    """
    import pyarrow as pa

    names = [str(name) for name in frame.columns]
    table = pa.Table.from_pandas(frame[columns_needed(names)], preserve_index=False)
    found = sheets(table, names)
    if split not in found:
        raise PairingError(f"its predictions have no {split} images, only {', '.join(found)}")
    return found[split]


@dataclass(frozen=True)
class Aligned:
    """Two sheets, image by image.

    Args:
        metric: `acc`, `map` or `mae`.
        sha256: Images that both have, sorted, (N,).
        a: One side, in that order.
        b: The other.
        only_a: Hashes of images that only a has.
        only_b: Hashes of images that only b has.
    """

    metric: str
    sha256: NDArray[np.str_]
    a: PairSide
    b: PairSide
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]


def aligned(a: pd.DataFrame, b: pd.DataFrame, split: str) -> Aligned:
    """Lay two tables of predictions beside each other by the hashes of their images.

    Copies of one image count once. Images that only one of them has are named in the result.

    Args:
        a: As `predictions_table` makes it.
        b: The other.
        split: Which rows.

    Raises:
        PairingError: Other tasks, other classes, or other labels of the same images; or no image
            in common.
    """
    one, other = sheet_of(a, split), sheet_of(b, split)
    if why := why_not(one.truth, other.truth):
        raise PairingError(why)
    both, at, to = np.intersect1d(one.truth.sha256, other.truth.sha256, return_indices=True)
    if not len(both):
        raise PairingError(f"they have no {split} image in common")
    return Aligned(
        metric=one.metric,
        sha256=both,
        a=one.side(at),
        b=other.side(to),
        only_a=tuple(np.setdiff1d(one.truth.sha256, both).tolist()),
        only_b=tuple(np.setdiff1d(other.truth.sha256, both).tolist()),
    )


def why_not(a: Truth, b: Truth) -> str | None:
    """Why what two runs said cannot be compared, in words; None where it can on common images."""
    if a.fingerprint == b.fingerprint:
        return None
    if a.task is not b.task:
        return f"another task: {a.task.value} and {b.task.value}"
    if a.classes != b.classes:
        parts = [
            f"{word} {_some(sorted(set(x) - set(y)))}"
            for word, x, y in (("only one has", a.classes, b.classes),
                               ("only the other has", b.classes, a.classes))
            if set(x) - set(y)
        ]  # fmt: skip
        return f"another class list: {'; '.join(parts)}"
    _, at, to = np.intersect1d(a.sha256, b.sha256, return_indices=True)
    unlike = a.truth[at] != b.truth[to]
    unlike = unlike.any(axis=1) if unlike.ndim > 1 else unlike
    if unlike.any():
        paths = sorted(str(path) for path in a.path[at][unlike])
        return f"other labels of the same images: {_some(paths)}"
    return None


def _some(names: Sequence[str]) -> str:
    left = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {left:,} more" if left > 0 else "")


def _task(columns: Sequence[str]) -> Task | None:
    kinds = {"label": Task.single, "labels": Task.multi, "target": Task.regression}
    return next((task for name, task in kinds.items() if name in columns), None)


def _sheet(
    rows: pa.Table,
    split: str,
    task: Task,
    classes: tuple[str, ...],
    known: MutableMapping[str, Truth],
) -> Sheet:
    digests, told = rows["sha256"].to_pylist(), rows[_truth_column(task)].to_pylist()
    if not all(digests):
        raise PairingError(
            f"{sum(not d for d in digests):,} of its {split} images have no hash, as nobody looked "
            "at them (data.check=false): train or judge it again with data.check=true"
        )
    key = _sha256([task.value, *classes, "", *digests, "", *map(str, told)])
    if key not in known:
        known[key] = _truth(rows["path"].to_pylist(), digests, told, task, classes)
    truth = known[key]
    if task is Task.single:
        said = _codes(rows["predicted"].to_pylist(), classes)[truth.order]
        score = rows["score"].to_numpy().astype(np.float32)[truth.order]
        return Sheet(split, truth, said, score)
    if task is Task.regression:
        return Sheet(split, truth, rows["predicted"].to_numpy().astype(np.float64)[truth.order])
    shares = [rows[f"{SHARE}{name}"].to_numpy().astype(np.float32) for name in classes]
    return Sheet(split, truth, np.stack(shares, axis=1)[truth.order])


def _truth_column(task: Task) -> str:
    return {Task.single: "label", Task.multi: "labels", Task.regression: "target"}[task]


def _truth(
    paths: list[str], digests: list[str], told: list[Any], task: Task, classes: tuple[str, ...]
) -> Truth:
    """Sort by hash, then by label: where copies disagree, all runs count the same one of them."""
    texts = [_text(value, task) for value in told]
    order = sorted(range(len(digests)), key=lambda i: (digests[i], texts[i], paths[i]))
    kept = [i for at, i in enumerate(order) if at == 0 or digests[i] != digests[order[at - 1]]]
    hashes = [digests[i] for i in kept]
    lines = [task.value, *classes, "", *(f"{digests[i]} {texts[i]}" for i in kept)]
    return Truth(
        task=task,
        classes=() if task is Task.regression else classes,
        sha256=np.asarray(hashes),
        path=np.asarray([paths[i] for i in kept], dtype=object),
        truth=_values([told[i] for i in kept], task, classes),
        order=np.asarray(kept, dtype=np.int64),
        fingerprint=_sha256(lines),
        images=_sha256(hashes),
        copies=len(digests) - len(kept),
    )


def _text(value: Any, task: Task) -> str:
    if task is Task.regression:
        return repr(np.float32(value))
    return "|".join(sorted(value)) if task is Task.multi else str(value)


def _values(told: list[Any], task: Task, classes: tuple[str, ...]) -> NDArray[Any]:
    if task is Task.single:
        return _codes(told, classes)
    if task is Task.regression:
        return np.asarray(told, dtype=np.float64)
    index = {name: k for k, name in enumerate(classes)}
    present = np.zeros((len(told), len(classes)), dtype=bool)
    for row, labels in enumerate(told):
        present[row, [index[name] for name in labels]] = True
    return present


def _codes(names: Sequence[str], classes: Sequence[str]) -> NDArray[np.int32]:
    index: Mapping[str, int] = {name: k for k, name in enumerate(classes)}
    try:
        return np.fromiter((index[name] for name in names), dtype=np.int32, count=len(names))
    except KeyError as error:
        raise PairingError(
            f"its predictions name class {error}, of which they have no p_"
        ) from error


def _sha256(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
