"""Bundles whose scores were calibrated: every form says the same, and old bundles still load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from exporting import CLASSES, export, make_photos, network
from scipy.special import expit, softmax

from tl.bundle import Abstain, Bundle, BundleError, Outputs
from tl.predictions import write_predictions

HEAT = 1.7
CALIBRATED = {
    "single": Outputs("single", temperature=HEAT, abstain=Abstain(0.9, 0.5, "by hand")),
    "multi": Outputs("multi", thresholds=(0.2, 0.3, 0.4), temperature=HEAT),
}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("bundles")
    photos, model = make_photos(place), network("test_resnet")
    for task, outputs in CALIBRATED.items():
        export(place / task, model, photos, outputs=outputs)
    return {task: place / task for task in CALIBRATED}


def pictures(folder: Path) -> list[Path]:
    return sorted(p for p in (folder / "golden").iterdir() if p.name != "expected.json")


@pytest.mark.parametrize("task", ["single", "multi"])
def test_every_form_gives_the_calibrated_scores(bundles, task):
    folder = bundles[task]
    bundle = Bundle.load(folder)
    found = bundle.probabilities(pictures(folder))
    images = np.stack([bundle._input((str(p), p)) for p in pictures(folder)])
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    logits, direct = session.run(["logits", "probabilities"], {"images": images})
    wanted = softmax(logits / HEAT, axis=1) if task == "single" else expit(logits / HEAT)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    np.testing.assert_allclose(direct, wanted, atol=1e-6)
    assert (
        np.abs(found - (softmax(logits, axis=1) if task == "single" else expit(logits))).max()
        > 0.01
    )
    # The card says what a person who goes on in timm must write.
    card = (folder / "README.md").read_text()
    assert "(model(image[None]) / 1.7)" in card
    assert "calibrated: logits divided by 1.7, chosen on val" in card
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.inference_mode():
        raw = model(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(raw, logits, atol=1e-4)
    assert bundle.verify() < 1e-4


def test_a_prediction_says_whether_it_is_sure(bundles, tmp_path):
    bundle = Bundle.load(bundles["single"])
    (tmp_path / "bad.png").write_text("text")
    table = bundle.predict([*pictures(bundles["single"]), tmp_path / "bad.png"], skip_bad=True)
    assert list(table.columns) == ["source", "label", "score", "sure", "top", "error"]
    assert table["sure"].dtype == bool
    assert table["sure"].tolist() == [score >= 0.5 for score in table["score"]]
    assert not table["sure"].iloc[-1]
    write_predictions(table, tmp_path / "p.csv")
    assert ",sure," in (tmp_path / "p.csv").read_text()
    bundle.outputs = Outputs("single", abstain=Abstain(0.9, None))
    assert not bundle.predict(pictures(bundles["single"]))["sure"].any()
    bundle.outputs = Outputs("single")
    assert "sure" not in bundle.predict(pictures(bundles["single"]))


def test_a_bundle_of_before_there_were_temperatures_still_loads(bundles, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(bundles["single"], old)
    (old / "bundle.json").write_text('{"task": "single", "activation": "softmax"}')
    bundle = Bundle.load(old)
    assert (bundle.outputs.temperature, bundle.outputs.abstain) == (1.0, None)
    assert list(bundle.predict(pictures(old)).columns) == [
        *("source", "label", "score", "top", "error")
    ]
    (old / "bundle.json").unlink()
    assert Bundle.load(old).outputs == Outputs()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0}, r"temperature must be above 0, got 0"),
        ({"temperature": "warm"}, r"bundle.json: could not convert"),
        ({"abstain": {"precision": 0.9}}, r"single does not fit: no 'threshold'"),
        ({"abstain": {"precision": 2, "threshold": 0.5}}, r"abstain.precision must be in \(0, 1\)"),
        ({"abstain": {"precision": 0.9, "threshold": 5}}, r"abstain.threshold must be in \[0, 1\]"),
    ],
)
def test_a_promise_that_no_bundle_can_keep_is_named(bundles, tmp_path, change, message):
    bad = tmp_path / "bad"
    shutil.copytree(bundles["single"], bad)
    known = json.loads((bad / "bundle.json").read_text())
    (bad / "bundle.json").write_text(json.dumps({**known, **change}))
    with pytest.raises(BundleError, match=message):
        Bundle.load(bad)


def test_what_a_bundle_promises_survives_its_file(bundles):
    for task, outputs in CALIBRATED.items():
        values = json.loads((bundles[task] / "bundle.json").read_text())
        assert Outputs.from_dict(values, CLASSES) == outputs
