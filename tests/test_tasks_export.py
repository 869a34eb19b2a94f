"""Bundles of several labels an image, and of one number an image: sealed, read, asked."""

from __future__ import annotations

import base64
import io
import json
import math

import mlflow
import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch
from exporting import CARD, CLASSES, make_photos, network, preprocessing_of
from PIL import Image

from tl.bundle import Bundle, BundleError, ImageError, Outputs, open_image
from tl.data.stores import Images
from tl.data.table import ImageTable
from tl.export import ExportError, write_bundle
from tl.export.from_run import _golden
from tl.runs import RunFolder
from tl.runs.contents import keep_golden

MULTI = Outputs("multi", thresholds=(0.3, 0.5, 0.7))
# So far from zero that single precision would show in the numbers.
NUMBER = Outputs("regression", mean=2.0e6, std=3.0)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def nets():
    return {"multi": network("test_resnet"), "regression": regressor()}


def regressor():
    net = network("test_resnet")
    net.reset_classifier(1)
    with torch.no_grad():
        net.get_classifier().weight.mul_(20)
    return net


@pytest.fixture(scope="module")
def bundles(tmp_path_factory, photos, nets):
    """Task -> folder of its bundle and its seal."""
    found = {}
    for outputs, classes in ((MULTI, CLASSES), (NUMBER, ("price",))):
        folder = tmp_path_factory.mktemp(outputs.task) / "bundle"
        net = nets[outputs.task]
        report = write_bundle(
            folder,
            model=net,
            classes=classes,
            preprocessing=preprocessing_of(net),
            golden=photos,
            card=CARD,
            outputs=outputs,
        )
        found[outputs.task] = (folder, report)
    return found


def raw(net, path) -> np.ndarray:
    """Outputs of the network in PyTorch, (C,)."""
    image = torch.from_numpy(preprocessing_of(net)(open_image(path)))[None]
    with torch.inference_mode():
        return net.eval()(image)[0].double().numpy()


# --- several labels -----------------------------------------------------------------------------


def test_probabilities_of_several_labels_are_those_of_sigmoids(bundles, photos, nets):
    bundle = Bundle.load(bundles["multi"][0])
    assert bundle.task == "multi"
    found = bundle.probabilities(photos)
    expected = np.stack([1 / (1 + np.exp(-raw(nets["multi"], path))) for path in photos])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found.sum(axis=1) - 1).max() > 0.1  # no softmax
    with pytest.raises(BundleError, match=r"predicts classes: use probabilities\(\)"):
        bundle.values(photos)


def test_labels_are_those_above_their_thresholds_best_first(bundles, photos, tmp_path):
    folder = bundles["multi"][0]
    bundle = Bundle.load(folder)
    p = bundle.probabilities(photos).astype(float)
    bundle.outputs = Outputs("multi", thresholds=(p[0, 0] + 1e-6, p[0, 1] - 1e-6, 0.0))
    table = bundle.predict(photos, top_k=2)
    assert list(table.columns) == ["source", "labels", "scores", "top", "error"]
    order = np.argsort(-p[0])
    expected = [CLASSES[i] for i in order if i in (1, 2)]
    assert table["labels"][0] == expected
    assert table["scores"][0] == pytest.approx([p[0, CLASSES.index(name)] for name in expected])
    assert table["scores"][0] == sorted(table["scores"][0], reverse=True)
    assert [name for name, _ in table["top"][0]] == [CLASSES[i] for i in order[:2]]
    bundle.outputs = Outputs("multi", thresholds=(1.0, 1.0, 1.0))
    assert bundle.predict(photos)["labels"].tolist() == [[], [], []]


def test_a_bad_image_has_no_labels_and_no_number(bundles, photos, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"<html>")
    for task, column, empty in (("multi", "labels", []), ("regression", "value", None)):
        bundle = Bundle.load(bundles[task][0])
        table = bundle.predict([bad, photos[0]], skip_bad=True)
        assert isinstance(table["error"][0], str)
        assert table["error"][1] is None
        assert table[column][0] == empty if empty is not None else math.isnan(table[column][0])
        with pytest.raises(ImageError, match=r"bad\.jpg"):
            bundle.predict([bad])


def test_the_bundle_says_what_its_outputs_mean(bundles):
    folder, report = bundles["multi"]
    assert json.loads((folder / "bundle.json").read_text()) == {
        "task": "multi",
        "activation": "sigmoid",
        "thresholds": {"ant": 0.3, "bee": 0.5, "wood wasp": 0.7},
        "temperature": 1.0,
    }
    assert Bundle.load(folder).outputs == MULTI
    assert report.largest_difference < 1e-4
    assert Bundle.load(folder).verify() < 1e-4
    folder, _ = bundles["regression"]
    assert json.loads((folder / "bundle.json").read_text()) == {
        "task": "regression",
        "activation": "identity",
        "target": {"name": "price", "mean": 2.0e6, "std": 3.0},
    }
    assert Bundle.load(folder).outputs == NUMBER


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"task": "boxes"}, "task must be one of single, multi, regression, got boxes"),
        ({"task": "multi"}, "multi does not fit: no 'thresholds'"),
        ({"task": "multi", "thresholds": {"ant": 0.5, "bee": 0.5}}, "no 'wood wasp'"),
        (
            {"task": "multi", "thresholds": {"ant": 0.5, "bee": 0.5, "wood wasp": 5}},
            r"thresholds must be in \[0, 1\], got",
        ),
        ({"task": "regression", "target": {"name": "a", "mean": 1, "std": 0}}, "std must be above"),
        ({"task": "regression"}, "model.onnx must map images to values"),
    ],
)
def test_a_wrong_bundle_json_is_named(bundles, tmp_path, values, message):
    import shutil

    folder = shutil.copytree(bundles["multi"][0], tmp_path / "copy")
    if values == {"task": "regression"}:
        values["target"] = {"name": "a", "mean": 0, "std": 1}
    (folder / "bundle.json").write_text(json.dumps(values))
    with pytest.raises(BundleError, match=message):
        Bundle.load(folder)


# --- one number ---------------------------------------------------------------------------------


def test_numbers_are_in_units_of_the_target_without_rounding(bundles, photos, nets):
    bundle = Bundle.load(bundles["regression"][0])
    found = bundle.values(photos)
    standardised = np.array([raw(nets["regression"], path)[0] for path in photos])
    assert found.dtype == np.float64
    np.testing.assert_allclose((found - 2.0e6) / 3.0, standardised, atol=2e-5)
    assert np.ptp(standardised) > 1e-3  # the images differ
    with pytest.raises(BundleError, match=r"predicts a number \(price\): use values\(\)"):
        bundle.probabilities(photos)
    table = bundle.predict(photos)
    assert list(table.columns) == ["source", "value", "error"]
    assert table["value"].tolist() == found.tolist()
    assert bundle.values([]).shape == (0,)


def test_the_onnx_file_alone_gives_the_number_too(bundles, photos, nets):
    folder = bundles["regression"][0]
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    assert [node.name for node in session.get_outputs()] == ["standardised", "values"]
    images = np.stack([preprocessing_of(nets["regression"])(open_image(p)) for p in photos])
    standardised, values = session.run(None, {"images": images})
    np.testing.assert_allclose(values, 2.0e6 + 3.0 * standardised, atol=0.25)  # single precision
    assert values.shape == (3, 1)


def test_the_seal_breaks_where_a_number_differs(photos, nets, tmp_path):
    net = nets["regression"]
    with pytest.raises(ExportError, match=r"in a number \(in standard deviations\) of golden/0"):
        write_bundle(
            tmp_path / "bundle",
            model=net,
            classes=["price"],
            preprocessing=preprocessing_of(net),
            golden=photos,
            card=CARD,
            outputs=NUMBER,
            tolerance=1e-12,
        )


def test_a_number_that_moved_fails_the_verification(bundles, tmp_path):
    import shutil

    folder = shutil.copytree(bundles["regression"][0], tmp_path / "copy")
    expected = folder / "golden" / "expected.json"
    record = json.loads(expected.read_text())
    first = next(iter(record["images"]))
    record["images"][first][0] += 0.003  # a thousandth of a standard deviation
    expected.write_text(json.dumps(record))
    with pytest.raises(BundleError, match=rf"values of golden/{first} differ by 0\.001 from"):
        Bundle.load(folder).verify()


# --- the forms in which others use it -----------------------------------------------------------


def test_mlflow_answers_for_each_task(bundles, photos):
    text = base64.b64encode(photos[0].read_bytes()).decode()
    model = mlflow.pyfunc.load_model(str(bundles["multi"][0]))
    assert model.metadata.signature.outputs.input_names() == ["labels", "scores", "probabilities"]
    answer = model.predict({"image": [text]})
    p = Bundle.load(bundles["multi"][0]).probabilities(photos[:1])[0]
    assert answer["probabilities"][0] == pytest.approx(dict(zip(CLASSES, p, strict=True)))
    assert set(answer["labels"][0]) == {
        name for name, v, t in zip(CLASSES, p, MULTI.thresholds, strict=True) if v >= t
    }
    model = mlflow.pyfunc.load_model(str(bundles["regression"][0]))
    assert model.metadata.signature.outputs.input_names() == ["value"]
    answer = model.predict({"image": [text, text]})
    assert answer["value"].tolist() == pytest.approx(
        Bundle.load(bundles["regression"][0]).values([photos[0]] * 2).tolist(), abs=1e-6
    )


@pytest.mark.parametrize(
    ("task", "texts"),
    [
        (
            "multi",
            (
                "any number of labels an image: those above their thresholds",
                "| wood wasp | 0.700 |",
                "It knows 3 labels",
                "print(model(image[None]).sigmoid())  # order of classes.txt; thresholds",
                "largest difference of a probability",
            ),
        ),
        (
            "regression",
            (
                "one number an image: price",
                "mean 2e+06, standard deviation 3",
                "print(model(image[None]) * 3 + 2000000)  # in units of price",
                "largest difference of a number (in standard deviations)",
            ),
        ),
    ],
)
def test_the_card_speaks_of_the_task(bundles, task, texts):
    card = (bundles[task][0] / "README.md").read_text()
    for text in texts:
        assert text in card
    assert "softmax" not in card


def test_the_code_of_the_card_gives_the_number(bundles, photos, monkeypatch, capsys):
    folder = bundles["regression"][0]
    monkeypatch.chdir(folder)
    card = (folder / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("photo.jpg", str(photos[0]))
    exec(code, {})
    shown = float(capsys.readouterr().out.split("[[")[1].split("]]")[0])
    assert shown == pytest.approx(Bundle.load(folder).values([photos[0]])[0], abs=0.3)


# --- golden images of tables without files ------------------------------------------------------


class MemoryStore:
    """Images that are bytes in memory, as in a column of a table."""

    columns = ("_row",)

    def __init__(self, contents: list[bytes]) -> None:
        self.contents = contents

    def source(self, name: str, place: tuple[int, ...]) -> bytes:
        if not self.contents[place[0]]:
            raise OSError(5, "Input/output error")
        return self.contents[place[0]]


def stored_table(tmp_path, count: int = 6) -> ImageTable:
    contents = []
    for i in range(count):
        out = io.BytesIO()
        Image.new("RGB", (20, 16), (40 * i, 30, 200)).save(out, ("PNG", "JPEG")[i % 2])
        contents.append(out.getvalue())
    rows = pd.DataFrame(
        {
            "path": [f"table.parquet#{i}" for i in range(count)],
            "label": [i % 3 for i in range(count)],
            "split": "train",
            "sha256": [f"{i:02d}" for i in range(count)],
            "width": 20,
            "height": 16,
            "bytes": [len(c) for c in contents],
            "_row": range(count),
        }
    )
    return ImageTable(tmp_path, CLASSES, rows, store=MemoryStore(contents))


def test_a_run_keeps_golden_images_that_are_no_files(tmp_path):
    table = stored_table(tmp_path)
    folder = RunFolder(tmp_path / "run")
    keep_golden(folder, table, 4)
    kept = sorted(folder.golden.iterdir())
    assert [p.name for p in kept] == ["00.png", "01.jpg", "02.png", "03.jpg"]
    assert kept[3].read_bytes() == table.images("train").read(3)
    facts = {"data": {"root": str(tmp_path)}, "golden": ["table.parquet#0"]}
    assert _golden(folder, facts) == kept


def test_images_of_any_store_are_sources_of_a_bundle(bundles, tmp_path):
    table = stored_table(tmp_path)
    bundle = Bundle.load(bundles["multi"][0])
    images = table.images("train")
    expected = bundle.probabilities([images.read(i) for i in range(len(images))])
    np.testing.assert_array_equal(bundle.probabilities(images, batch_size=4), expected)
    assert bundle.predict(images)["source"].tolist() == table.rows["path"].tolist()
    table.store.contents[2] = b"<html>"
    table.store.contents[4] = b""
    with pytest.raises(ImageError, match=r"^table\.parquet#2: "):
        bundle.probabilities(images)
    errors = bundle.predict(images, skip_bad=True)["error"]
    assert errors[4] == "input/output error"
    assert isinstance(Images.of_files(tmp_path, ["a.png"]).source(0), type(tmp_path))
