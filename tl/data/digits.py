"""The handwritten digits inside scikit-learn as image folders: a demo without a download."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def write_digits(
    folder: Path, digits: Sequence[int], counts: Mapping[str, int], *, seed: int
) -> Path:
    """Write some digits as `<split>/<digit>/*.png` of 8 x 8 pixels.

    The images are those of the UCI test set of E. Alpaydin and C. Kaynak, 1998, as
    `sklearn.datasets.load_digits` ships them: 1,797 in all, about 180 a digit.

    Args:
        folder: Where; files that are there are written again with the same content.
        digits: Which digits, in 0 to 9.
        counts: Split -> images of each digit; the last split takes what is left over.
        seed: Which image falls into which split.
    """
    from sklearn.datasets import load_digits

    source = load_digits()
    rng = np.random.default_rng(seed)
    for digit in digits:
        order = rng.permutation(np.flatnonzero(source.target == digit))
        ends = np.cumsum(list(counts.values()))[:-1]
        for split, indices in zip(counts, np.split(order, ends), strict=True):
            place = folder / split / str(digit)
            place.mkdir(parents=True, exist_ok=True)
            for index in indices:
                pixels = (source.images[index] * (255 / 16)).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{index:04d}.png")
    return folder
