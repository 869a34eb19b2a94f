"""What a split must not tear apart: copies of one image, and the images of a group."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components

from tl.config import Task


def content_share(key: str, seed: int | str) -> float:
    """A number in [0, 1) that depends on nothing but the content and the seed."""
    return float(content_shares([key], seed)[0])


def content_shares(keys: Iterable[str], seed: int | str) -> NDArray[np.float64]:
    """`content_share` of each key; a second for a million of them."""
    texts = (f"{seed}:{key}".encode("utf-8", "surrogateescape") for key in keys)
    digests = b"".join(hashlib.sha256(text).digest()[:8] for text in texts)
    return np.frombuffer(digests, ">u8") / 2.0**64


@dataclass(frozen=True)
class Units:
    """Images that stay together.

    Args:
        of_row: Number of the unit of each row, (N,).
        keys: Hash or name that decides about each unit, (U,).
        labels: Which labels occur in a unit, (U, labels), 1 where one does.
        everything: Number of a label that all images have, where the task lets them have none.
        by: What decides: group, content, or name where contents were not read.
        linked: Groups that copies of an image bind to another one.
    """

    of_row: NDArray[np.int64]
    keys: NDArray[np.object_]
    labels: csr_array
    everything: int | None
    by: str
    linked: int

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    def shares(self, seed: int | str) -> NDArray[np.float64]:
        """`content_share` of each."""
        return content_shares(self.keys, seed)

    def among(self, rows: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Units that have images among some rows, in order."""
        present = np.zeros(len(self), np.bool_)  # ten times as fast as np.unique
        present[self.of_row[rows]] = True
        return np.flatnonzero(present)

    def counts(self, rows: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Units of each label among some rows, (labels,)."""
        inside = self.labels[self.among(rows)]
        return np.asarray(inside.sum(axis=0)).astype(np.int64)


def units_of(frame: pd.DataFrame, task: Task, classes: int) -> Units:
    """Units of a table.

    Args:
        frame: `sha256`, and `path`, which stands in where there is no hash; `label`, or `labels`
            (lists) with several labels; if there are any, `group`.
        task: With several labels, or in regression, one more label stands for all images.
        classes: Number of labels.
    """
    sha256 = frame["sha256"].astype("string[pyarrow]").fillna("")
    by = "content"
    if (sha256 == "").any():
        by = "name"
        sha256 = sha256.where(sha256 != "", "name " + frame["path"].astype("string[pyarrow]"))
    contents, found = pd.factorize(sha256)
    hashes = np.asarray(found, object)
    of_row, keys, linked = contents.astype(np.int64), hashes, 0
    if "group" in frame and (frame["group"].fillna("") != "").any():
        by = "group"
        of_row, keys, linked = _groups(frame["group"], of_row, hashes)
    everything = {Task.single: None, Task.multi: classes, Task.regression: 0}[task]
    rows, labels = _label_pairs(frame, task, everything)
    shape = (len(keys), classes if everything is None else everything + 1)
    table = coo_array((np.ones(len(rows), np.int32), (of_row[rows], labels)), shape).tocsr()
    table.data[:] = 1  # however many images of the unit have the label
    return Units(of_row, keys, table, everything, by, linked)


def _groups(
    group: pd.Series[Any], contents: NDArray[np.int64], hashes: NDArray[np.object_]
) -> tuple[NDArray[np.int64], NDArray[np.object_], int]:
    """Unit of each row, key of each unit, and how many groups copies bind to another one.

    A unit's key is its first group by name, so that images which join a group change nothing.
    """
    names = group.astype("string[pyarrow]")
    names = names.mask(names == "")
    groups, found = pd.factorize(names, sort=True)
    member = groups >= 0
    nodes = len(hashes) + len(found)
    edges = (contents[member], len(hashes) + groups[member])
    graph = coo_array((np.ones(len(edges[0]), np.int8), edges), (nodes, nodes))
    units, of_node = connected_components(graph, directed=False)
    of_content, of_group = of_node[: len(hashes)], of_node[len(hashes) :]
    first = np.full(units, len(found), np.int64)
    np.minimum.at(first, of_group, np.arange(len(found)))
    content = np.zeros(units, np.int64)
    content[of_content] = np.arange(len(hashes))
    keys = [
        f"group {found[g]}" if g < len(found) else hashes[c]
        for g, c in zip(first, content, strict=True)
    ]
    linked = int((np.bincount(of_group, minlength=units)[of_group] > 1).sum())
    return of_content[contents].astype(np.int64), np.array(keys, object), linked


def _label_pairs(
    frame: pd.DataFrame, task: Task, everything: int | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and their labels, as two arrays of the same length."""
    rows = np.arange(len(frame))
    if everything is None:
        labels = frame["label"].to_numpy(np.int64)
        return rows[labels >= 0], labels[labels >= 0]
    all_rows = np.full(len(frame), everything)
    if task is Task.regression:
        return rows, all_rows
    lists = frame["labels"].reset_index(drop=True)
    lengths = lists.list.len().fillna(0).to_numpy(np.int64)
    flat = lists.list.flatten().to_numpy(np.int64)
    return np.concatenate([np.repeat(rows, lengths), rows]), np.concatenate([flat, all_rows])
