from __future__ import annotations

import base64
import io
import json
import pickle
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from mlflow.exceptions import MlflowException
from onnx import TensorProto, helper
from PIL import Image
from timm.data import create_transform

import tl.bundle
from tl.bundle import (
    Bundle,
    BundleError,
    ImageError,
    Preprocessing,
    _load_pyfunc,
    open_image,
)
from tl.bundle.preprocessing import INTERPOLATIONS

CLASSES = ("red", "green", "blue")


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


# --- Bundle -------------------------------------------------------------------------------------


def write_onnx(path: Path, size: int = 16, classes: int = 3) -> None:
    """Softmax over twice the mean of each channel: the reddest image is surely red."""
    weight = 2 * np.eye(3, classes, dtype=np.float32)
    nodes = [
        helper.make_node("ReduceMean", ["images", "axes"], ["means"], keepdims=0),
        helper.make_node("MatMul", ["means", "weight"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=-1),
    ]
    graph = helper.make_graph(
        nodes,
        "mean colour",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, size, size])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", classes])
            for name in ("logits", "probabilities")
        ],
        [
            helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3]),
            helper.make_tensor("weight", TensorProto.FLOAT, weight.shape, weight.ravel()),
        ],
    )
    opset = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), path)


SPEC = Preprocessing((3, 16, 16), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", 1.0)


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "bundle"
    (path / "golden").mkdir(parents=True)
    write_onnx(path / "model.onnx")
    (path / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    (path / "preprocessing.json").write_text(json.dumps(SPEC.to_dict()))
    colours(path / "golden", 4)
    images = sorted((path / "golden").glob("*.png"))
    expected = {p.name: reference(open_image(p)).tolist() for p in images}
    record = {"tolerance": 1e-4, "images": expected}
    (path / "golden" / "expected.json").write_text(json.dumps(record))
    return path


def colours(folder: Path, count: int) -> list[Path]:
    rng = np.random.default_rng(1)
    paths = [folder / f"{i:02d}.png" for i in range(count)]
    for i, path in enumerate(paths):
        pixels = rng.integers(0, 80, (20, 24, 3), dtype=np.uint8)
        pixels[..., i % 3] += 150
        Image.fromarray(pixels).save(path)
    return paths


def reference(image: Image.Image) -> np.ndarray:
    """What the graph of `write_onnx` computes, by numpy alone."""
    logits = 2 * SPEC(image).mean(axis=(1, 2), dtype=np.float64)
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def test_probabilities_are_those_of_the_graph_whatever_the_source_and_the_batch(folder, tmp_path):
    paths = colours(tmp_path, 7)
    bundle = Bundle.load(folder, threads=2)
    expected = np.stack([reference(open_image(p)) for p in paths])
    found = bundle.probabilities(paths)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)
    pictures = [open_image(p) for p in paths]
    for sources in (
        [str(p) for p in paths],
        [p.read_bytes() for p in paths],
        pictures,
        [np.asarray(p) for p in pictures],
        np.stack([np.asarray(p) for p in pictures]),
    ):
        np.testing.assert_allclose(bundle.probabilities(sources, batch_size=3), expected, atol=1e-6)
    np.testing.assert_allclose(bundle.probabilities(paths[0]), expected[:1], atol=1e-6)
    np.testing.assert_allclose(
        bundle.probabilities(np.asarray(pictures[0])), expected[:1], atol=1e-6
    )
    assert bundle.probabilities([]).shape == (0, 3)


def test_predict_names_the_best_classes(folder, tmp_path):
    paths = colours(tmp_path, 3)
    table = Bundle.load(folder).predict([*paths, np.asarray(open_image(paths[2]))], top_k=2)
    assert list(table.columns) == ["source", "label", "score", "top", "error"]
    assert table["label"].tolist() == ["red", "green", "blue", "blue"]
    assert table["source"].tolist() == [*map(str, paths), "image 3"]
    assert table["error"].isna().all()
    values = reference(open_image(paths[1]))
    assert [name for name, _ in table["top"][1]] == [CLASSES[i] for i in np.argsort(-values)[:2]]
    assert table["top"][1][0][1] == table["score"][1] == pytest.approx(values.max(), abs=1e-6)
    assert len(Bundle.load(folder).predict(paths[:1], top_k=9)["top"][0]) == 3


def test_bad_images_stop_or_are_reported(folder, tmp_path):
    paths = [*colours(tmp_path, 2), bad(tmp_path, "empty.jpg", b""), tmp_path / "none.png"]
    bundle = Bundle.load(folder)
    with pytest.raises(ImageError, match=r"empty\.jpg: 0 bytes"):
        bundle.predict(paths)
    table = bundle.predict(paths, skip_bad=True, batch_size=2)
    assert table["label"].tolist()[:2] == ["red", "green"]
    assert table["label"].isna().tolist() == [False, False, True, True]
    assert table["score"].isna().tolist() == [False, False, True, True]
    assert table["error"].tolist()[2:] == ["0 bytes", "no such file"]
    assert table["top"].tolist()[2:] == [[], []]
    with pytest.raises(ImageError, match=r"image 1: an array must be uint8 .* got float64"):
        bundle.probabilities([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4, 3))])
    with pytest.raises(ImageError, match="image 0: a path, bytes, picture or array is wanted"):
        bundle.probabilities([None])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.onnx", None, r"is no bundle: lacks model\.onnx"),
        ("model.onnx", b"nonsense", r"model\.onnx cannot be read"),
        ("classes.txt", b"a\nb\n", "knows 3 classes, classes.txt has 2 different names in 2 lines"),
        ("classes.txt", b"a\nb\na\n", "classes.txt has 2 different names in 3 lines"),
        ("preprocessing.json", b"{", r"preprocessing\.json: "),
        ("preprocessing.json", b"{}", "preprocessing lacks input_size, mean, std"),
        (
            "preprocessing.json",
            json.dumps({**SPEC.to_dict(), "input_size": [3, 32, 32]}).encode(),
            r"takes images of \(3, 16, 16\), preprocessing.json makes \(3, 32, 32\)",
        ),
    ],
)
def test_a_bundle_that_does_not_fit_is_refused(folder, file, content, message):
    (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
    with pytest.raises(BundleError, match=message) as caught:
        Bundle.load(folder)
    assert caught.value.exit_code == 2


def test_missing_folder_and_run_folder_are_told_apart(folder):
    with pytest.raises(BundleError, match="is no bundle: no such folder"):
        Bundle.load(folder / "none")
    with pytest.raises(BundleError, match=r"lacks model\.onnx, .*; did you mean .*/bundle\?"):
        Bundle.load(folder.parent)


def test_verify_replays_the_golden_images(folder):
    assert Bundle.load(folder).verify() < 1e-6
    spec = {**SPEC.to_dict(), "mean": [0.6, 0.5, 0.5]}
    (folder / "preprocessing.json").write_text(json.dumps(spec))
    with pytest.raises(
        BundleError, match=r"probabilities of golden/0\d\.png differ by 0\.\d+ from"
    ):
        Bundle.load(folder).verify()
    assert Bundle.load(folder).verify(tolerance=1.0) > 0.01


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be replayed"),
        ('{"tolerance": 1e-4, "images": {"lost.png": [1, 0, 0]}}', r"lost\.png: no such file"),
        ('{"tolerance": 1e-4, "images": {}}', "names no images"),
        ('{"tolerance": 1e-4, "images": {"00.png": [NaN, 0, 0]}}', "differ by nan"),
        ("[]", "cannot be replayed"),
    ],
)
def test_verify_without_its_evidence_fails(folder, content, message):
    expected = folder / "golden" / "expected.json"
    expected.unlink() if content is None else expected.write_text(content)
    with pytest.raises(BundleError, match=message):
        Bundle.load(folder).verify()


# --- MLflow -------------------------------------------------------------------------------------


def test_pyfunc_takes_base64_bytes_paths_and_arrays(folder, tmp_path, monkeypatch):
    import pandas as pd

    paths = colours(tmp_path, 3)
    text = [base64.b64encode(p.read_bytes()).decode() for p in paths]
    model = _load_pyfunc(str(folder))
    expected = Bundle.load(folder).probabilities(paths)
    for cells in (
        text,
        [base64.encodebytes(p.read_bytes()).decode() for p in paths],
        [f"data:image/png;base64,{t}" for t in text],
        [p.read_bytes() for p in paths],
        [str(p) for p in paths],
    ):
        for given in (pd.DataFrame({"image": cells}), {"image": cells}, cells):
            table = model.predict(given)
            assert table["label"].tolist() == ["red", "green", "blue"]
            np.testing.assert_allclose(
                [[row[c] for c in CLASSES] for row in table["probabilities"]], expected, atol=1e-6
            )
            np.testing.assert_allclose(table["score"], expected.max(axis=1), atol=1e-6)
    arrays = np.stack([np.asarray(open_image(p)) for p in paths])
    assert model.predict(arrays)["label"].tolist() == ["red", "green", "blue"]
    assert model.predict(arrays[1], params={})["label"].tolist() == ["green"]

    monkeypatch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")
    with pytest.raises(MlflowException, match="image 0: not base64 text"):
        model.predict([str(paths[0])])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"picture": ["x"]}, "the input must have a column image, got picture"),
        ({"image": ["no such file"]}, "image 0: neither base64 text nor a file that exists"),
        ({"image": ["aGVsbG8="]}, "image 0: not an image"),
        ({"image": [None]}, "image 0: a path, bytes, picture or array is wanted"),
    ],
)
def test_pyfunc_answers_bad_input_as_a_bad_request(folder, given, message):
    with pytest.raises(MlflowException, match=message) as caught:
        _load_pyfunc(str(folder)).predict(given)
    assert caught.value.get_http_status_code() == 400


def test_a_copy_of_the_room_predicts_without_torch_and_tl(folder, tmp_path):
    source = Path(tl.bundle.__file__).parent
    shutil.copytree(source, tmp_path / "code" / "tl_bundle")
    (image,) = colours(tmp_path, 1)
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {{"torch", "torchvision", "timm", "mlflow", "tl"}}:
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
sys.path.insert(0, {str(tmp_path / "code")!r})
from tl_bundle import Bundle
print(Bundle.load({str(folder)!r}).predict([{str(image)!r}])["label"][0])
"""
    command = [sys.executable, "-I", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "red\n", done.stderr
    assert done.stderr == ""
