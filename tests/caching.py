"""Fill and check a cache of activations, in the tests' process and in others beside it."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tl.cache import ActivationCache, Field, Shelf

KEY = {"model": "resnet18.a1_in1k", "weights": "0" * 64, "frontier": "layer4", "view": "clean"}
WIDTH = 64
FIELDS = [Field("pooled", (WIDTH,)), Field("map", (3, 2, 2), "float16")]
IMAGE = WIDTH * 4 + 12 * 2 + 36  # bytes of one image on disk
LARGE = 10**9


def digests(numbers: Sequence[int]) -> list[str]:
    return [hashlib.sha256(str(i).encode()).hexdigest() for i in numbers]


def arrays(numbers: Sequence[int]) -> dict[str, np.ndarray]:
    """Rows that tell of which image they are."""
    n = np.asarray(numbers, np.float32).reshape(-1, 1)
    return {
        "pooled": n + np.arange(WIDTH, dtype=np.float32) / 128,
        "map": (n % 500 + np.arange(12, dtype=np.float32) / 4).reshape(-1, 3, 2, 2),
    }


def store(
    place: Path, limit_bytes: int = LARGE, segment_bytes: int = 40 * IMAGE
) -> ActivationCache:
    folder = place / "activations"
    return ActivationCache(folder, limit_bytes=limit_bytes, segment_bytes=segment_bytes)


def fill(shelf: Shelf, numbers: Sequence[int], batch: int = 10, *, announce: bool = True) -> int:
    """What a job does; returns how many images it had to compute."""
    wanted = np.asarray(numbers)
    number = np.count_nonzero(~shelf.present(digests(wanted))) if announce else 0
    with shelf.writing(images=number) as writer:
        missing = wanted[~shelf.present(digests(wanted))]
        for i in range(0, len(missing), batch):
            part = missing[i : i + batch]
            writer.append(digests(part), arrays(part))
    return len(missing)


def assert_right(shelf: Shelf, numbers: Sequence[int]) -> None:
    """All these images are there with their own values."""
    rows, wanted = shelf.rows(digests(numbers)), arrays(numbers)
    for name, values in wanted.items():
        assert np.array_equal(rows.gather(name, np.arange(len(rows))).numpy(), values)


def right_images(shelf: Shelf, most: int = 1000) -> int:
    """How many of the first images are there; asserts that their values are their own."""
    numbers = np.flatnonzero(shelf.present(digests(range(most))))
    assert_right(shelf, numbers)
    return len(numbers)


def job(place: Path, *lines: str) -> subprocess.Popen[str]:
    """Another process with `shelf` open, which runs these lines."""
    code = [
        "import sys, time",
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})",
        "from caching import *",
        f"cache = store(Path({str(place)!r}))",
        "shelf = cache.shelf(KEY, FIELDS)",
        *lines,
    ]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", "\n".join(code)], stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )
