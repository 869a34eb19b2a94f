"""Decode images: every mode and format into upright 8-bit RGB, or one clear reason why not."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 178_956_970
# Pillow opens these, but draws them with another program or holds no pixels of them.
NO_PICTURES = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "PDF"}
WHITE = (255, 255, 255)
EXIF_ORIENTATION = 0x0112
HTML_START = 512  # bytes in which a web page says that it is one
# What counts as an image when a folder is searched; a file that is named is opened in any case.
IMAGE_SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff"),
        *(".avif", ".jp2", ".ppm", ".pgm", ".pbm", ".tga"),
    )
)


class ImageError(Exception):
    """An image cannot be used.

    Args:
        source: Name of the file, or a description of what was given.
        reason: What is wrong with it.
    """

    exit_code = 2

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(source, reason)
        self.source = source
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


def open_image(
    source: str | os.PathLike[str] | bytes | BinaryIO, *, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Decode an image into what a network was trained on: 8-bit RGB, upright.

    Rotated as its EXIF tag says; the first frame of an animation; transparency on white; 16-bit and
    float images scaled to 8 bit over their range; CMYK and greyscale converted.

    Args:
        source: Path, file contents, or a binary stream.
        max_pixels: Larger images are refused before they are decoded.

    Raises:
        ImageError: Missing, empty, truncated, too large, no image; names the file and the reason.
    """
    name = _name(source)
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    if isinstance(source, io.BytesIO) and not source.getbuffer().nbytes:
        raise ImageError(name, "0 bytes")
    # Pillow warns at its own limit and fails at twice that; the limit that counts is ours, below.
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        with Image.open(source) as image:
            _check_header(image, name, max_pixels)
            image.load()
            return to_rgb(upright(image), name)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(name, f"over the limit of {max_pixels / 1e6:g} megapixels") from error
    except FileNotFoundError as error:
        raise ImageError(name, "no such file") from error
    except UnidentifiedImageError as error:
        raise ImageError(name, _unidentified(source)) from error
    except MemoryError as error:
        raise ImageError(name, "not enough memory to decode it") from error
    except Exception as error:  # decoders raise whatever they like on damaged files
        raise ImageError(name, _damage(error)) from error


def _name(source: object) -> str:
    if isinstance(source, (str, os.PathLike)):
        return str(source)
    if isinstance(source, bytes):
        return f"image of {len(source)} bytes"
    return str(getattr(source, "name", "image stream"))


def _check_header(image: Image.Image, name: str, max_pixels: int) -> None:
    if image.format in NO_PICTURES:
        raise ImageError(name, f"{image.format} files hold no pixels; convert it to PNG or JPEG")
    width, height = image.size
    if width * height > max_pixels:
        size = f"{width} x {height} pixels ({width * height / 1e6:.4g} megapixels)"
        raise ImageError(name, f"{size} are over the limit of {max_pixels / 1e6:g} megapixels")


def _unidentified(source: object) -> str:
    if isinstance(source, (str, os.PathLike)):
        with Path(source).open("rb") as file:
            start = file.read(HTML_START)
    else:
        start = source.getvalue()[:HTML_START] if isinstance(source, io.BytesIO) else b"?"
    if not start:
        return "0 bytes"
    if b"<html" in start.lower() or start.lstrip().lower().startswith(b"<!doctype html"):
        return "a web page (HTML) under the name of an image; download the image itself"
    return "not an image that Pillow can read (cut off, damaged, or another kind of file)"


def _damage(error: Exception) -> str:
    text = str(error)
    if isinstance(error, IsADirectoryError):
        return "a folder, not an image"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if "truncated" in text.lower() or isinstance(error, EOFError):
        return f"truncated ({text})" if text else "truncated"
    return f"damaged ({text or type(error).__name__})"


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF tag says; itself where there is nothing to turn."""
    try:
        turned = image.getexif().get(EXIF_ORIENTATION, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image
    except Exception:
        return image  # a broken EXIF block round good pixels: they stand as they are


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """8-bit RGB from an image of any mode; itself where it is that.

    Raises:
        ImageError: Pixels that are not finite numbers.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _scaled(image, name)
    if image.has_transparency_data:
        if image.mode == "La":
            image = image.convert("LA")
        rgba = image.convert("RGBA")
        flat = Image.new("RGB", rgba.size, WHITE)
        flat.paste(rgba, mask=rgba.getchannel("A"))
        return flat
    if image.mode == "LAB":
        from PIL import ImageCms

        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None
        return converted
    return image if image.mode == "RGB" else image.convert("RGB")


def _scaled(image: Image.Image, name: str) -> Image.Image:
    """Greyscale of more than 8 bits over the range of its type.

    Float and 32-bit files do not say their range: 1, 255 or 65535, whichever the values fit, else
    from the smallest to the largest value.
    """
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ImageError(name, "pixels that are not finite numbers")
    low, high = float(values.min()), float(values.max())
    if image.mode.startswith("I;16"):
        low, high = 0.0, 65535.0
    elif low >= 0 and high <= 65535:
        limits = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        low, high = 0.0, next(limit for limit in limits if high <= limit)
    scaled = (values - low) * (255.0 / (high - low or 1.0))
    return Image.fromarray(np.rint(scaled).astype(np.uint8)).convert("RGB")
