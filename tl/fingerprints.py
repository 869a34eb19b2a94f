"""Hashes that say whether two runs saw the same images and the same classes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def images_sha256(digests: Iterable[str]) -> str:
    """Hash of a set of images.

    Neither order nor names nor copies of an image change it, so that two runs were judged on the
    same images exactly where it is the same.

    Args:
        digests: SHA-256 of the bytes of each image, as hex.
    """
    return _sha256(sorted(set(digests)))


def classes_sha256(classes: Iterable[str]) -> str:
    """Hash of a list of classes, whose order counts."""
    return _sha256(list(classes))


def _sha256(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
