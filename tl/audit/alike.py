"""Images that a network finds alike across splits: crops and turned copies that no hash sees."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tl.audit.findings import Finding, Rows, Severity, images
from tl.audit.near import PLAIN, TURNS, Pairs, groups_of

MOST = 20_000  # images whose every pair is compared
BLOCK = 1024
# Cosine of centred features. Photographs cut by 5 % a side or turned by 5 degrees keep 0.86 or more
# with their origin on two sets; different photographs reach 0.82. Where all images show one kind of
# thing they are nearer to each other: then a pair must be FACTOR times as near as is usual there.
LEAST, FACTOR = 0.85, 4.0


def alike_across_splits(
    features: NDArray[np.float32], rows: Rows, table: pd.DataFrame, known: set[int], model: str
) -> Iterator[Finding]:
    """Pairs of different contents in different splits whose features are nearly the same.

    Args:
        features: (N, D), each content once.
        rows: (N,) position of each in the table.
        table: Rows of the table.
        known: Rows that were found as copies already.
        model: Whose features they are.
    """
    if not 2 <= len(features) <= MOST:
        return
    centred = features - features.mean(axis=0)
    unit = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    split = table["split"].cat.codes.to_numpy()[rows]
    nearest = np.empty(len(unit), np.float32)
    found = []
    for start in range(0, len(unit), BLOCK):
        cosine = unit[start : start + BLOCK] @ unit.T
        own = np.arange(len(cosine))
        cosine[own, start + own] = -1
        nearest[start : start + BLOCK] = cosine.max(axis=1)
        first, second = np.nonzero(cosine >= LEAST)
        kept = (first + start < second) & (split[first + start] != split[second])
        values = cosine[first[kept], second[kept]]
        found.append(np.column_stack([first[kept] + start, second[kept], values]))
    limit = max(LEAST, 1 - (1 - float(np.median(nearest))) / FACTOR)
    pairs = np.concatenate(found)
    new = np.array([int(row) not in known for row in rows], bool)
    first, second = pairs[:, 0].astype(np.int64), pairs[:, 1].astype(np.int64)
    kept = (pairs[:, 2] >= limit) & (new[first] | new[second])
    if not kept.any():
        return
    first, second, cosines = first[kept], second[kept], pairs[kept, 2]
    plain = np.full(len(first), TURNS.index(PLAIN))
    sets = groups_of(Pairs(first, second, plain, plain, complete=True), len(rows))
    members = np.unique(np.concatenate([first, second]))
    members = members[np.argsort(sets[members], kind="stable")]
    best = np.zeros(len(rows))
    for ends in (first, second):
        np.maximum.at(best, ends, cosines)
    _, numbers = np.unique(sets[members], return_inverse=True)
    yield Finding(
        "alike_across_splits",
        Severity.note,
        f"{images(len(members))} in different splits are alike to {model} (cosine {limit:.2f} or "
        "more): one place or object, or copies that were cut",
        "look at them; put what shows the same thing into one split, or name groups",
        rows=rows[members],
        notes=[f"cosine {value:.2f}" for value in best[members]],
        sets=numbers.astype(np.int64) + 1,
    )
