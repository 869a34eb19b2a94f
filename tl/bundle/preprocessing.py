"""The preprocessing that belongs to a set of weights, in Pillow and numpy alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
CROP_MODES = ("center", "squash", "border")


@dataclass(frozen=True)
class Preprocessing:
    """The exact preprocessing of a set of weights; equals timm's evaluation transform.

    Args:
        input_size: Channels (3), height and width in pixels.
        mean: Per channel, of values in [0, 1].
        std: Per channel, of values in [0, 1]; above 0.
        interpolation: One of `INTERPOLATIONS`.
        crop_pct: Share of the resized side that the crop keeps.
        crop_mode: `center` cuts the longer side, `squash` ignores the aspect ratio, `border` pads
            with the mean colour.

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
        """Plain values, as in `preprocessing.json`; also arguments of timm's `create_transform`."""
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
        scaled = image.resize(self.scaled_size(*image.size), INTERPOLATIONS[self.interpolation])
        return _center_crop(scaled, width, height, self.border)

    def __call__(self, image: Image.Image) -> NDArray[np.float32]:
        """Input of the network, (3, height, width), from an RGB image of any size."""
        pixels = np.asarray(self.resize(image), dtype=np.float32) / np.float32(255)
        normal = (pixels - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return np.ascontiguousarray(normal.transpose(2, 0, 1))

    @property
    def border(self) -> tuple[int, ...]:
        """Colour beside an image that does not fill the input, of 0 to 255."""
        if self.crop_mode == "border":
            return tuple(round(255 * m) for m in self.mean)
        return (0, 0, 0)

    def scaled_size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of an image before the crop, rounded as torchvision and timm round."""
        rows, columns = (math.floor(side / self.crop_pct) for side in self.input_size[1:])
        if self.crop_mode == "squash":
            return columns, rows
        if self.crop_mode == "center" and rows == columns:
            short = min(width, height)
            return tuple(rows if s == short else int(rows * s / short) for s in (width, height))  # type: ignore[return-value]
        ratios = (width / columns, height / rows)
        ratio = max(ratios) if self.crop_mode == "border" else min(ratios)
        return max(round(width / ratio), 1), max(round(height / ratio), 1)


def _center_crop(image: Image.Image, width: int, height: int, fill: tuple[int, ...]) -> Image.Image:
    pad_x, pad_y = max(width - image.width, 0), max(height - image.height, 0)
    if pad_x or pad_y:
        canvas = Image.new("RGB", (image.width + pad_x, image.height + pad_y), fill)
        canvas.paste(image, (pad_x // 2, pad_y // 2))
        image = canvas
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))
