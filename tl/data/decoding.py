"""Bytes of an image file to the pixels that transforms take, without a copy too many."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tl.bundle import open_image
from tl.bundle.images import MAX_PIXELS

# Pillow hands pixels over through two buffers; of this size they stay in the processor's cache,
# which takes a quarter of the time on photographs of 12 megapixels.
STRIP_BYTES = 1 << 20


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Upright RGB pixels, uint8 (3, H, W), laid out in memory as (H, W, 3).

    They are those of `tl.bundle.open_image`, which decodes. Ways that are faster or read less were
    measured (`benchmarks/decoding.py`, docs/performance.md).

    Args:
        data: The file.
        max_pixels: Larger images are refused before they are decoded.

    Raises:
        ImageError: It is no image that can be used; says why.
    """
    image = open_image(data, max_pixels=max_pixels)
    width, height = image.size
    rows = max(1, STRIP_BYTES // (4 * width))
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        strip = image.crop((0, top, width, bottom)) if rows < height else image
        pixels[top:bottom] = np.asarray(strip)
    return torch.from_numpy(pixels).permute(2, 0, 1)
