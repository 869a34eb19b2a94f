"""Which images of a folder without `val` become val: decided by content, not by name or place."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def content_share(sha256: str, seed: int) -> float:
    """A number in [0, 1) that depends on nothing but the content and the seed."""
    digest = hashlib.sha256(f"{seed}:{sha256}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_by_content(
    sha256: Sequence[str], labels: Sequence[int], fraction: float, seed: int
) -> NDArray[np.bool_]:
    """Mark the images that go to val.

    An image goes to val when `content_share` is below `fraction`, in every class alike. So images
    keep their split when others arrive, leave or are renamed, copies of one file always stay
    together (also when they have different labels), and val holds about `fraction` of each class.
    The one exception: a class that would have nothing in val, or nothing left in train, gives up
    its nearest image; that image may return when more of its class arrive.

    Args:
        sha256: Hash of the contents of each image.
        labels: Class index of each image.
        fraction: Share of the images for val, in (0, 1).
        seed: Another seed gives another split.

    Returns:
        True where an image belongs to val, (N,). `unsplittable` names the classes that even so lack
        val or train.
    """
    share = {digest: content_share(digest, seed) for digest in set(sha256)}
    val = {digest for digest, value in share.items() if value < fraction}
    classes: dict[str, set[int]] = defaultdict(set)
    members: dict[int, set[str]] = defaultdict(set)
    for digest, label in zip(sha256, labels, strict=True):
        classes[digest].add(label)
        members[label].add(digest)
    for label in sorted(members):
        # An image that stands in two classes is not moved: that could empty the other class.
        movable = sorted((d for d in members[label] if len(classes[d]) == 1), key=share.__getitem__)
        if len(members[label]) < 2 or not movable:
            continue
        if not members[label] & val:
            val.add(movable[0])
        elif members[label] <= val:
            val.remove(movable[-1])
    return np.array([digest in val for digest in sha256], dtype=np.bool_)


def unsplittable(in_val: NDArray[np.bool_], labels: Sequence[int]) -> list[int]:
    """Classes that have images on one side of the split only, in order."""
    label_array = np.asarray(labels)
    sides = {label: set(in_val[label_array == label].tolist()) for label in set(labels)}
    return sorted(label for label, side in sides.items() if len(side) < 2)
