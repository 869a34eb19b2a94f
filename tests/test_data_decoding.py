"""Decoding for loaders: the pixels and the errors of the bundle's own decoder."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from tl.bundle import ImageError, open_image
from tl.data.decoding import STRIP_BYTES, decode


def photo(width: int = 161, height: int = 97) -> Image.Image:
    """Smooth colours and edges of random places."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(photo(), exif=exif)


FILES = {
    **{f"orientation {i}": turned(i) for i in range(10)},
    **{f"subsampling {i}": encoded(photo(), subsampling=i) for i in range(3)},
    "progressive": encoded(photo(), progressive=True),
    "grey": encoded(photo().convert("L")),
    "CMYK": encoded(photo().convert("CMYK")),
    "RGB inside": encoded(photo(), keep_rgb=True),
    "poor": encoded(photo(), quality=5),
    "one pixel": encoded(photo(1, 1)),
    "broken EXIF": encoded(photo(), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff broken"),
    "PNG": encoded(photo(), "PNG"),
    "transparent PNG": encoded(photo().convert("RGBA"), "PNG"),
    "16 bit": encoded(Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30)), "PNG"),
    "palette": encoded(photo().quantize(16), "GIF"),
    "WebP": encoded(photo(), "WEBP"),
}


@pytest.mark.parametrize("name", FILES)
def test_pixels_are_those_of_the_bundle(name):
    pixels = decode(FILES[name])
    expected = np.asarray(open_image(FILES[name]))
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, *expected.shape[:2])
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), expected)


def test_pixels_lie_in_memory_as_they_are_resized_fastest():
    assert decode(FILES["poor"]).stride() == (1, 161 * 3, 3)


@pytest.mark.parametrize("width", [1000, 1023, STRIP_BYTES // 2])
def test_large_images_come_in_strips(width):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (700 * 1000 // width, width, 3), dtype=np.uint8))
    pixels = decode(encoded(image, "PNG", compress_level=1))
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(image))


GOOD = FILES["subsampling 0"]
BAD = {
    "empty": b"",
    "start only": GOOD[:4],
    "header only": GOOD[:200],
    "half": GOOD[: len(GOOD) // 2],
    "without its end": GOOD[:-30],
    "HTML": b"<!DOCTYPE html><html><body>404 not found</body></html>",
    "start of a JPEG, then text": GOOD[:3] + b"hello" * 100,
}


@pytest.mark.parametrize("name", BAD)
def test_errors_are_those_of_the_bundle(name):
    with pytest.raises(ImageError) as expected:
        open_image(BAD[name])
    with pytest.raises(ImageError) as found:
        decode(BAD[name])
    assert found.value.reason == expected.value.reason


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_large_images_are_refused_before_they_are_decoded(kind):
    data = encoded(photo(100, 200), kind)
    assert decode(data, max_pixels=20_000).shape == (3, 200, 100)
    with pytest.raises(ImageError, match=r"100 x 200 pixels .* over the limit of 0.019999 mega"):
        decode(data, max_pixels=19_999)
