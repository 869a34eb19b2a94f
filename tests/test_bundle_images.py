from __future__ import annotations

import io
import json
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from timm.data import create_transform

from tl.bundle import ImageError, Preprocessing, open_image
from tl.bundle.preprocessing import INTERPOLATIONS


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


# --- open_image ---------------------------------------------------------------------------------


def grey16(values, dtype="<u2"):
    return Image.fromarray(np.array([values], dtype))


def palette_with_hole():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 0])
    image.putpixel((1, 0), 1)
    return encoded(image, transparency=0)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encoded(Image.new("RGB", (1, 1), (1, 2, 3))), [(1, 2, 3)]),
        (encoded(Image.new("L", (1, 1), 77)), [(77, 77, 77)]),
        (encoded(Image.new("1", (1, 1), 1)), [(255, 255, 255)]),
        (encoded(Image.new("LA", (1, 1), (0, 51))), [(204, 204, 204)]),
        (encoded(Image.new("RGBA", (1, 1), (255, 0, 0, 0))), [(255, 255, 255)]),
        (encoded(Image.new("RGBA", (1, 1), (0, 100, 255, 255))), [(0, 100, 255)]),
        (palette_with_hole(), [(255, 255, 255), (200, 100, 0)]),
        (encoded(Image.new("L", (1, 1), 9), transparency=9), [(255, 255, 255)]),
        (encoded(Image.new("CMYK", (1, 1), (255, 0, 0, 0)), "TIFF"), [(0, 255, 255)]),
        (encoded(Image.new("LAB", (1, 1), (255, 128, 128)), "TIFF"), [(255, 255, 255)]),
        (encoded(grey16([0, 257, 32896, 65535])), [(0,) * 3, (1,) * 3, (128,) * 3, (255,) * 3]),
        (encoded(grey16([0, 65535], ">u2"), "TIFF"), [(0,) * 3, (255,) * 3]),
        (encoded(grey16([0, 65535], "<i4"), "TIFF"), [(0,) * 3, (255,) * 3]),
        (encoded(grey16([-10, 0, 10], "<i4"), "TIFF"), [(0,) * 3, (128,) * 3, (255,) * 3]),
        (encoded(grey16([0, 0.2, 1], "<f4"), "TIFF"), [(0,) * 3, (51,) * 3, (255,) * 3]),
        (encoded(grey16([0, 51, 200], "<f4"), "TIFF"), [(0,) * 3, (51,) * 3, (200,) * 3]),
        (encoded(grey16([-1, 1, 7], "<f4"), "TIFF"), [(0,) * 3, (64,) * 3, (255,) * 3]),
        (encoded(grey16([0, 0], "<f4"), "TIFF"), [(0,) * 3, (0,) * 3]),
    ],
    ids=str,
)
def test_every_mode_becomes_rgb(data, expected):
    image = open_image(data)
    assert image.mode == "RGB"
    pixels = np.asarray(image).reshape(-1, 3)
    np.testing.assert_allclose(pixels, expected, atol=1)
    np.testing.assert_array_equal(np.asarray(open_image(io.BytesIO(data))).reshape(-1, 3), pixels)


def test_16_bit_colour_keeps_its_values():
    rows = b"\0" + struct.pack(">6H", 0, 257 * 128, 65535, 65535, 257 * 10, 0)
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    pixels = np.asarray(open_image(png(header, zlib.compress(rows))))
    np.testing.assert_array_equal(pixels, [[[0, 128, 255], [255, 10, 0]]])


def png(header: bytes, data: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + crc

    chunks = (chunk(b"IHDR", header), chunk(b"IDAT", data), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_exif_rotation_is_applied():
    image = Image.new("RGB", (40, 20), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 20, 20))  # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    turned = open_image(encoded(image, "JPEG", exif=exif, quality=95))
    assert turned.size == (20, 40)
    assert np.asarray(turned)[5].mean() > 250
    assert np.asarray(turned)[35].mean() < 5


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_leaves_the_pixels_as_they_stand():
    data = encoded(
        Image.new("RGB", (8, 4), (9, 9, 9)), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"
    )
    assert open_image(data).size == (8, 4)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_first_frame_of_an_animation(format):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert open_image(data).getpixel((1, 1)) == (255, 0, 0)


def bad(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "0 bytes"),
        (b"hello, I am text", "not an image that Pillow can read"),
        (encoded(noise(64, 64), "JPEG")[:900], "truncated"),
        (encoded(noise(64, 64))[:4000], "truncated"),
        (encoded(noise(64, 64), "GIF")[:500], "cut off"),
        (encoded(noise(64, 64), "GIF")[:2000], "truncated"),
        (encoded(noise(8, 8), "EPS"), "EPS files hold no pixels"),
        (encoded(grey16([np.nan, 1], "<f4"), "TIFF"), "pixels that are not finite numbers"),
        (
            png(struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0), b""),
            "over the limit of 178.957 megapixels",
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_unusable_files_are_named_with_the_reason(tmp_path, content, reason):
    path = bad(tmp_path, "bad.img", content)
    for source in (path, str(path), content, io.BytesIO(content)):
        with pytest.raises(ImageError) as caught:
            open_image(source)
        assert reason in caught.value.reason
    with pytest.raises(ImageError) as caught:
        open_image(path)
    assert str(caught.value) == f"{path}: {caught.value.reason}"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert caught.value.exit_code == 2


def test_missing_file_folder_and_limit(tmp_path):
    with pytest.raises(ImageError, match=r"none\.png: no such file"):
        open_image(tmp_path / "none.png")
    with pytest.raises(ImageError, match="a folder, not an image"):
        open_image(tmp_path)
    with pytest.raises(ImageError, match=r"10 x 20 pixels .* over the limit of 0\.0001 megapixels"):
        open_image(encoded(noise(10, 20)), max_pixels=100)
    assert open_image(encoded(noise(10, 20)), max_pixels=200).size == (10, 20)


# --- Preprocessing ------------------------------------------------------------------------------


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(3, 64, 64), (3, 40, 57)])
@pytest.mark.parametrize("crop_pct", [0.875, 1.0, 0.5, 1.1])
def test_preprocessing_equals_the_evaluation_transform_of_timm(crop_mode, size, crop_pct):
    for interpolation in INTERPOLATIONS:
        spec = Preprocessing(
            size, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), interpolation, crop_pct, crop_mode
        )
        transform = create_transform(**spec.to_dict(), is_training=False)
        for width, height in ((90, 61), (31, 77), (20, 20), (64, 65), (300, 9)):
            image = noise(width, height)
            found = spec(image)
            assert found.dtype == np.float32
            assert found.shape == size
            np.testing.assert_allclose(found, transform(image).numpy(), rtol=0, atol=1e-6)
            assert spec.resize(image).size == (size[2], size[1])


def test_preprocessing_survives_json_and_has_the_defaults_of_timm():
    spec = Preprocessing((3, 8, 9), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "box", 0.9, "squash")
    assert Preprocessing.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    values = {"input_size": [3, 8, 8], "mean": [0, 0, 0], "std": [1, 1, 1], "crop_mode": None}
    spec = Preprocessing.from_dict({**values, "licence": "MIT"})
    assert (spec.interpolation, spec.crop_pct, spec.crop_mode) == ("bicubic", 0.875, "center")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": None}, "preprocessing does not fit"),
        ({"std": [1, 1, 0]}, "std above 0"),
        ({"std": [1, 1]}, "must have 3 values"),
        ({"input_size": [1, 8, 8]}, "input_size must be 3 channels"),
        ({"interpolation": "area"}, "interpolation must be one of nearest, box"),
        ({"crop_mode": "middle"}, "crop_mode must be one of center, squash, border, got middle"),
        ({"crop_pct": 3}, r"crop_pct must be in \(0, 2\], got 3"),
    ],
)
def test_impossible_preprocessing_is_refused(change, message):
    values = {"input_size": [3, 8, 8], "mean": [0, 0, 0], "std": [1, 1, 1], **change}
    with pytest.raises(ValueError, match=message):
        Preprocessing.from_dict(values)
    with pytest.raises(ValueError, match="preprocessing lacks input_size, std"):
        Preprocessing.from_dict({"mean": [0, 0, 0]})
