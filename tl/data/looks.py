"""What an image looks like, in a hundred bytes: taken while it is decoded, compared by the audit.

The perceptual hash is the sign of the 256 lowest frequencies of a cosine transform, the constant
part left out, of the image drawn into 64 x 64 grey pixels. It is the hash of PDQ (Facebook, 2019)
with zero instead of the median as the boundary, which is as stable and makes the hash of the
mirrored or turned image the same bits in another order. Of five hashes tried on four sets of
photographs (64-bit pHash and dHash, 256-bit dHash, PDQ) only the two 256-bit cosine hashes keep
copies (up to 40 bits) and different images (from 58 bits) apart on all of them; docs/audit.md has
the figures.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.fft import dct

SIDE, FREQUENCIES = 64, 16
BITS = FREQUENCIES * FREQUENCIES
BASIS = dct(np.eye(SIDE), axis=0, norm="ortho")[1 : FREQUENCIES + 1].astype(np.float32)
EXIF_ORIENTATION = 0x0112
LYING = (5, 6, 7, 8)  # values of that tag: width and height change places
# Formats whose further frames are an animation; those of TIFF are pages, of MPO other views.
ANIMATIONS = {"GIF", "PNG", "WEBP", "AVIF"}
ANIMATED, PAGES = 1, 2


@dataclass(frozen=True)
class Look:
    """What one decoded image looks like.

    Args:
        format: As Pillow calls it: JPEG, PNG; empty for an image that was not looked at.
        mode: Of the file, as Pillow calls it: RGB, L, CMYK, I;16.
        orientation: EXIF tag, 1 to 8; 1 is upright.
        frames: 0 for one, `ANIMATED`, `PAGES`.
        brightness: Mean over pixels and channels, 0 to 255.
        contrast: Standard deviation of the channel that varies most, in 64 x 64 pixels, 0 to 127.5.
        phash: 256 bits, hexadecimal.
    """

    format: str = ""
    mode: str = ""
    orientation: int = 1
    frames: int = 0
    brightness: float = 0.0
    contrast: float = 0.0
    phash: str = ""


LOOK = [*Look.__dataclass_fields__]
NO_LOOK = Look()


def header(image: Image.Image) -> dict[str, str | int]:
    """Format, mode, orientation and frames of an image that was opened, and not drawn on yet."""
    kind, frames, orientation = image.format or "", 0, 1
    with contextlib.suppress(Exception):  # a broken end or EXIF block round good pixels
        if getattr(image, "is_animated", False):
            frames = ANIMATED if kind in ANIMATIONS else PAGES if kind == "TIFF" else 0
        # Pillow decodes the whole of a PNG to look for an EXIF block behind the pixels.
        if kind != "PNG" or "exif" in image.info:
            turned = image.getexif().get(EXIF_ORIENTATION, 1)
            orientation = int(turned) if turned in range(1, 9) else 1
    return {"format": kind, "mode": image.mode, "orientation": orientation, "frames": frames}


def look(facts: dict[str, str | int] | None, image: Image.Image) -> Look:
    """Complete the facts of the header by those of the pixels.

    Args:
        facts: What `header` said; None where nobody could read it.
        image: Upright RGB or grey, of any size; 64 pixels a side or more are as good as all.
    """
    small = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    pixels = np.asarray(small, np.float32).reshape(SIDE * SIDE, -1)
    grey = small if small.mode == "L" else small.convert("L")
    return Look(
        **(facts or {}),  # type: ignore[arg-type] # four fields, of the types that they have there
        brightness=round(float(pixels.mean()), 1),
        contrast=round(float(pixels.std(axis=0).max()), 2),
        phash=perceptual_hash(np.asarray(grey, np.float32)),
    )


def perceptual_hash(grey: NDArray[np.float32]) -> str:
    """Hash of (64, 64) grey values: 64 hexadecimal digits."""
    signs = BASIS @ grey @ BASIS.T > 0
    return np.packbits(signs).tobytes().hex()


def hash_bits(hashes: list[str]) -> NDArray[np.uint8]:
    """Hashes as bytes, (N, 32)."""
    data = np.frombuffer(bytearray.fromhex("".join(hashes)), np.uint8)
    return data.reshape(len(hashes), BITS // 8)
