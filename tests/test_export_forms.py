"""Bundles of many model families, and a bundle as an MLflow model."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import timm
from exporting import CLASSES, export, make_photos, network, torch_reference
from mlflow.models import Model
from safetensors.torch import load_file

from tl.bundle import Bundle, Preprocessing


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[Path]:
    return make_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def bundle_folder(photos, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "bundle"
    export(folder, network("test_resnet"), photos)
    return folder


# --- families -----------------------------------------------------------------------------------

FAMILIES = [
    ("test_vit", {"img_size": 96}),
    ("test_convnext", {}),
    ("test_efficientnet", {}),
    *(
        pytest.param(name, {}, marks=pytest.mark.slow)
        for name in (
            "mobilenetv2_100",
            "regnetx_002",
            "vit_tiny_patch16_224",
            "swin_tiny_patch4_window7_224",
        )
    ),
]


@pytest.mark.parametrize(("name", "arguments"), FAMILIES)
def test_families_seal(name, arguments, photos, tmp_path, caplog):
    model = network(name, **arguments)
    report = export(tmp_path / "bundle", model, photos)
    assert report.largest_difference < 2e-5
    assert "traced" not in caplog.text
    expected = np.stack([torch_reference(model, p) for p in photos])
    assert expected.min() > 1e-4
    assert expected.max() < 0.999
    found = Bundle.load(tmp_path / "bundle").probabilities(photos, batch_size=2)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenetv2_100", "regnetx_002", "tf_mobilenetv3_small_100"])
def test_real_weights_seal(assets, name, tmp_path):
    weights = assets / "weights" / f"{name}.safetensors"
    photos = sorted((assets / "data" / "hymenoptera").rglob("*.jpg"))[:8]
    assert len(photos) == 8
    model = timm.create_model(name)
    model.load_state_dict(load_file(weights))
    spec = json.loads(weights.with_suffix(".json").read_text())["preprocessing"]
    classes = [f"class {i}" for i in range(1000)]
    preprocessing = Preprocessing.from_dict(spec)
    report = export(
        tmp_path / "bundle", model, photos, classes=classes, preprocessing=preprocessing
    )
    assert report.images == 8
    assert report.largest_difference < 1e-4
    top = Bundle.load(tmp_path / "bundle").predict(photos, top_k=5)
    assert top["score"].max() > 0.5  # the net recognises photographs, so the comparison is no farce


# --- MLflow -------------------------------------------------------------------------------------


def test_mlflow_loads_the_folder(bundle_folder, photos):
    folder = bundle_folder
    model = mlflow.pyfunc.load_model(str(folder))
    assert model.metadata.signature.inputs.input_names() == ["image"]
    assert model.metadata.signature.outputs.input_names() == ["label", "score", "probabilities"]
    example = Model.load(str(folder)).load_input_example(str(folder))
    assert model.predict(example)["label"][0] in CLASSES
    text = [base64.b64encode(p.read_bytes()).decode() for p in photos]
    table = model.predict(pd.DataFrame({"image": text}))
    expected = Bundle.load(folder).probabilities(photos)
    assert table["label"].tolist() == [CLASSES[i] for i in expected.argmax(axis=1)]
    np.testing.assert_allclose(table["score"], expected.max(axis=1), atol=1e-6)
    assert model.predict({"image": text})["label"].tolist() == table["label"].tolist()
    with pytest.raises(mlflow.MlflowException, match="Model is missing inputs"):
        model.predict({"picture": text})


BLOCKER = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "torchvision", "timm", "pytorch_lightning", "tl"}:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
"""


def post(port: int, body: dict) -> tuple[int, dict]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.fixture
def server(bundle_folder, tmp_path):
    """Port of `mlflow models serve` in a Python where torch and tl cannot be imported."""
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PATH": path}
    probe = [sys.executable, "-c", "import torch"]
    refused = subprocess.run(probe, env=environment, capture_output=True, text=True, check=False)
    assert "torch is blocked" in refused.stderr
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(bundle_folder)]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    log = tmp_path / "serve.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, env=environment, stdout=out, stderr=out, cwd=tmp_path, start_new_session=True
        )
    try:
        wait_for(port, process, log)
        yield port
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def wait_for(port: int, process: subprocess.Popen, log: Path) -> None:
    for _ in range(240):
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5).close()
        except OSError:
            time.sleep(0.25)
        else:
            return
    pytest.fail(f"no server after a minute:\n{log.read_text()}")


@pytest.mark.slow
def test_mlflow_serves_base64_without_torch(server, bundle_folder, photos):
    text = [base64.b64encode(p.read_bytes()).decode() for p in photos]
    expected = Bundle.load(bundle_folder).probabilities(photos)
    status, answer = post(server, {"dataframe_records": [{"image": t} for t in text]})
    assert status == 200
    for row, values in zip(answer["predictions"], expected, strict=True):
        assert row["label"] == CLASSES[int(values.argmax())]
        np.testing.assert_allclose([row["probabilities"][c] for c in CLASSES], values, atol=1e-6)
    example = json.loads((bundle_folder / "serving_input_example.json").read_text())
    assert post(server, example)[0] == 200
    status, answer = post(server, {"dataframe_records": [{"image": str(photos[0])}]})
    assert (status, "image 0: not base64 text" in answer["message"]) == (400, True)
    status, answer = post(server, {"dataframe_records": [{"image": "aGVsbG8="}]})
    assert (status, "image 0: not an image" in answer["message"]) == (400, True)
