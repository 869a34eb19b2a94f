"""Read a bundle and predict with ONNX Runtime: images in, class probabilities out.

One file on purpose: it needs only numpy and Pillow, and onnxruntime and pandas when they are used.
A copy travels inside every bundle as its MLflow code, so a bundle serves without tl and without torch.
The decoding and the preprocessing here are those of training and evaluation too.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 178_956_970
# Pillow opens these, but draws them with another program or holds no pixels of them.
NO_PICTURES = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "PDF"}
INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
CROP_MODES = ("center", "squash", "border")
WHITE = (255, 255, 255)


class BundleError(Exception):
    """The bundle, or what was asked of it, is wrong; the text says what and how to mend it."""

    exit_code = 2


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


# --- decoding -----------------------------------------------------------------------------------


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
        ImageError: Missing, empty, truncated, too large, or no image; names the file and the reason.
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
            return _rgb(_upright(image), name)
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
    if isinstance(source, (str, os.PathLike)) and Path(source).stat().st_size == 0:
        return "0 bytes"
    return "not an image, or of a format that Pillow cannot read"


def _damage(error: Exception) -> str:
    text = str(error)
    if isinstance(error, IsADirectoryError):
        return "a folder, not an image"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if "truncated" in text.lower() or isinstance(error, EOFError):
        return f"truncated ({text})" if text else "truncated"
    return f"damaged ({text or type(error).__name__})"


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        # Cameras and editors write broken EXIF blocks round good pixels: the pixels then stand as they are.
        return image


def _rgb(image: Image.Image, name: str) -> Image.Image:
    """8-bit RGB of any mode; the caller closes `image`, so the result shares nothing with it."""
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
    return image.convert("RGB")


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


# --- preprocessing ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preprocessing:
    """The exact preprocessing of a set of weights; equals timm's evaluation transform.

    Args:
        input_size: Channels (3), height and width in pixels.
        mean: Per channel, of values in [0, 1].
        std: Per channel, of values in [0, 1]; above 0.
        interpolation: One of `INTERPOLATIONS`.
        crop_pct: Share of the resized side that the crop keeps.
        crop_mode: `center` cuts the longer side, `squash` ignores the aspect ratio, `border` pads with
            the mean colour.

    Raises:
        ValueError: A value that no weights can have.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        size = self.input_size
        if len(size) != 3 or size[0] != 3 or min(size) < 1:
            raise ValueError(f"input_size must be 3 channels, height, width, got {size}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(
                f"mean and std must have 3 values, std above 0: {self.mean}, {self.std}"
            )
        if self.interpolation not in INTERPOLATIONS:
            known = ", ".join(INTERPOLATIONS)
            raise ValueError(f"interpolation must be one of {known}, got {self.interpolation}")
        if self.crop_mode not in CROP_MODES:
            raise ValueError(
                f"crop_mode must be one of {', '.join(CROP_MODES)}, got {self.crop_mode}"
            )
        if not 0 < self.crop_pct <= 2:
            raise ValueError(f"crop_pct must be in (0, 2], got {self.crop_pct}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in `preprocessing.json`; also keyword arguments of timm's `create_transform`."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """From `preprocessing.json`, a timm data config, or the json beside a weights file.

        Keys that are no preprocessing are left alone; `crop_pct`, `crop_mode` and `interpolation`
        have timm's defaults.

        Raises:
            ValueError: A key is missing, or a value is out of range.
        """
        missing = [key for key in ("input_size", "mean", "std") if key not in values]
        if missing:
            raise ValueError(f"preprocessing lacks {', '.join(missing)}")
        try:
            return cls(
                input_size=tuple(int(v) for v in values["input_size"]),  # type: ignore[arg-type]
                mean=tuple(float(v) for v in values["mean"]),
                std=tuple(float(v) for v in values["std"]),
                interpolation=str(values.get("interpolation") or cls.interpolation),
                crop_pct=float(values.get("crop_pct") or cls.crop_pct),
                crop_mode=str(values.get("crop_mode") or cls.crop_mode),
            )
        except TypeError as error:
            raise ValueError(f"preprocessing does not fit: {error}") from error

    def resize(self, image: Image.Image) -> Image.Image:
        """Resize and crop an RGB image to exactly `input_size`."""
        height, width = self.input_size[1:]
        scaled = image.resize(self._scaled_size(image), INTERPOLATIONS[self.interpolation])
        fill = tuple(round(255 * m) for m in self.mean) if self.crop_mode == "border" else (0, 0, 0)
        return _center_crop(scaled, width, height, fill)

    def __call__(self, image: Image.Image) -> NDArray[np.float32]:
        """Input of the network, (3, height, width), from an RGB image of any size."""
        pixels = np.asarray(self.resize(image), dtype=np.float32) / np.float32(255)
        normal = (pixels - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return np.ascontiguousarray(normal.transpose(2, 0, 1))

    def _scaled_size(self, image: Image.Image) -> tuple[int, int]:
        """Width and height before the crop, rounded as torchvision and timm round."""
        height, width = (math.floor(side / self.crop_pct) for side in self.input_size[1:])
        if self.crop_mode == "squash":
            return width, height
        if self.crop_mode == "center" and height == width:
            short = min(image.size)
            return tuple(height if s == short else int(height * s / short) for s in image.size)  # type: ignore[return-value]
        ratios = (image.width / width, image.height / height)
        ratio = max(ratios) if self.crop_mode == "border" else min(ratios)
        return max(round(image.width / ratio), 1), max(round(image.height / ratio), 1)


def _center_crop(image: Image.Image, width: int, height: int, fill: tuple[int, ...]) -> Image.Image:
    pad_x, pad_y = max(width - image.width, 0), max(height - image.height, 0)
    if pad_x or pad_y:
        canvas = Image.new("RGB", (image.width + pad_x, image.height + pad_y), fill)
        canvas.paste(image, (pad_x // 2, pad_y // 2))
        image = canvas
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))
