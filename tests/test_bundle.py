from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from onnx import TensorProto, helper
from PIL import Image

import tl.bundle
from tl.bundle import (
    Bundle,
    BundleError,
    ImageError,
    Preprocessing,
    _load_pyfunc,
    open_image,
)

CLASSES = ("red", "green", "blue")


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
    seen = []
    again = Bundle.load(folder).predict(
        paths, batch_size=2, top_k=9, progress=lambda done, total: seen.append((done, total))
    )
    assert again["label"].tolist() == ["red", "green", "blue"]
    assert len(again["top"][0]) == 3
    assert seen == [(2, 3), (3, 3)]


def test_bad_images_stop_or_are_reported(folder, tmp_path):
    paths = [*colours(tmp_path, 2), tmp_path / "empty.jpg", tmp_path / "none.png"]
    paths[2].touch()
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
