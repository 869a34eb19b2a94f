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
import pytest
import timm
import torch
from exporting import CLASSES, export, make_photos, network

from tl.bundle import Bundle, Outputs, open_image

MLFLOW = Path(sys.executable).with_name("mlflow")
# What a machine that only serves does not have.
ABSENT = ("torch", "torchvision", "timm", "pytorch_lightning", "tl")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory, photos):
    """A bundle of each task."""
    root = tmp_path_factory.mktemp("bundles")
    several = Outputs("multi", thresholds=(0.2, 0.3, 0.3))
    export(root / "single", network("test_resnet"), photos)
    export(root / "multi", network("test_resnet"), photos, outputs=several)
    torch.manual_seed(0)
    number = timm.create_model("test_resnet", num_classes=1)
    age = Outputs("regression", mean=30.0, std=9.0)
    export(root / "regression", number, photos, classes=["age"], outputs=age)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def environ(tmp_path_factory):
    """Environment of a process in which neither torch nor tl can be imported."""
    folder = tmp_path_factory.mktemp("absent")
    lines = f"import sys\nfor name in {ABSENT}:\n    sys.modules[name] = None\n"
    (folder / "sitecustomize.py").write_text(lines)
    own = {"PYTHONPATH": str(folder), "PATH": f"{MLFLOW.parent}:{os.environ['PATH']}"}
    return {**os.environ, **own}


class Server:
    """`mlflow models serve`, as a user starts it."""

    def __init__(self, bundle, environ, *options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        where = ("--host", "127.0.0.1", "--port", str(self.port), "--env-manager", "local")
        self.process = subprocess.Popen(
            [MLFLOW, "models", "serve", "-m", bundle, *where, *options],
            env=environ,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def wait(self):
        deadline = time.monotonic() + 120
        while not self.answers():
            assert self.process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        return self

    def answers(self):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/ping", timeout=5) as reply:
                return reply.status == 200
        except OSError:
            return False

    def ask(self, values):
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/invocations",
            json.dumps(values).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return reply.status, json.load(reply)["predictions"]
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)["message"]

    def descendants(self):
        """Process ids of all that the server has started."""
        found, parents = [], [self.process.pid]
        while parents:
            parent = parents.pop()
            children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
            found += map(int, children)
            parents += map(int, children)
        return found

    def stop(self, signum=signal.SIGTERM):
        self.process.send_signal(signum)
        self.process.wait(30)


@pytest.fixture(scope="module")
def servers(bundles, environ, photos):
    """A server of each task, without torch; that of `single` may open the photos."""
    allowed = {**environ, "TL_SERVE_FILES": str(photos[0].parent)}
    started = {
        task: Server(bundle, allowed if task == "single" else environ)
        for task, bundle in bundles.items()
    }
    try:
        yield {task: server.wait() for task, server in started.items()}
    finally:
        for server in started.values():
            server.stop()


def text(path):
    return base64.b64encode(path.read_bytes()).decode()


def pixels(path):
    return np.asarray(open_image(path).resize((20, 16)))


def same(found, expected):
    """Whether answers of a server are those of the bundle."""
    rows = [[row["probabilities"][name] for name in CLASSES] for row in found]
    np.testing.assert_allclose(rows, expected, atol=1e-6)
    assert [row["label"] for row in found] == [CLASSES[i] for i in expected.argmax(axis=1)]
    return True


# --- what a server takes ------------------------------------------------------------------------


def test_a_server_takes_base64_text_singly_and_in_batches(servers, bundles, photos):
    ask = servers["single"].ask
    texts = [text(photo) for photo in photos]
    expected = Bundle.load(bundles["single"]).probabilities(photos)
    for request in (
        {"dataframe_records": [{"image": t} for t in texts]},
        {"dataframe_split": {"columns": ["image"], "data": [[t] for t in texts]}},
        {"instances": texts},
        {"instances": [{"image": t} for t in texts]},
        {"inputs": texts},
        {"inputs": {"image": texts}},
    ):
        status, found = ask(request)
        assert status == 200
        assert same(found, expected)
        first = {"inputs": {"image": texts[0]}} if "inputs" in request else None
        if first:
            assert same(ask(first)[1], expected[:1])


def test_a_server_takes_arrays_as_nested_lists(servers, bundles, photos):
    ask = servers["single"].ask
    arrays = [pixels(photo) for photo in photos]
    lists = [array.tolist() for array in arrays]
    expected = Bundle.load(bundles["single"]).probabilities(arrays)
    for request in (
        {"dataframe_records": [{"image": cell} for cell in lists]},
        {"dataframe_split": {"columns": ["image"], "data": [[cell] for cell in lists]}},
        {"instances": lists},
        {"instances": [{"image": cell} for cell in lists]},
        {"inputs": lists},
        {"inputs": {"image": lists}},
    ):
        assert same(ask(request)[1], expected)
    for request in ({"inputs": lists[0]}, {"inputs": {"image": lists[0]}}):
        assert same(ask(request)[1], expected[:1])
    mixed = {"dataframe_records": [{"image": lists[0]}, {"image": text(photos[1])}]}
    whole = Bundle.load(bundles["single"]).probabilities([arrays[0], photos[1]])
    assert same(ask(mixed)[1], whole)


def test_a_server_opens_files_of_the_folder_that_it_was_given_only(
    servers, bundles, photos, tmp_path
):
    ask = servers["single"].ask
    expected = Bundle.load(bundles["single"]).probabilities(photos[:1])
    for name in (str(photos[0]), photos[0].name):
        assert same(ask({"inputs": [name]})[1], expected)
    outside = tmp_path / "secret.png"
    outside.write_bytes(photos[0].read_bytes())
    link = photos[0].parent / "link.png"
    link.symlink_to(outside)
    for name in (str(outside), f"../{outside.parent.name}/secret.png", "link.png", "no such.png"):
        status, message = ask({"inputs": [name]})
        assert status == 400
        assert "image 0: neither base64 text nor a file in the folder" in message


def test_a_server_without_such_a_folder_opens_none(servers, photos):
    status, message = servers["multi"].ask({"inputs": [str(photos[0])]})
    assert status == 400
    assert "image 0: not base64 text, and a server without TL_SERVE_FILES opens no fil" in message


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("xyz!", "image 1: neither base64 text nor a file"),
        ("QUJD", "image 1: not an image that Pillow can read"),
        (None, "image 1: a path, bytes, picture or array is wanted"),
        (5, "image 1: a path, bytes, picture or array is wanted"),
        ([[[0.5, 0.1, 0.2]]], "image 1: an array must hold whole numbers from 0 to 255"),
        ([[[300, 0, -1]]], "image 1: an array must hold numbers from 0 to 255, got -1 to 300"),
        ([[1, 2], [3, 4]], "image 1: an array must be (height, width, 3), got (2, 2)"),
        ([[[1, 2, 3]], [[1, 2, 3], [4, 5, 6]]], "an array whose rows differ in length"),
    ],
)
def test_a_bad_image_is_a_bad_request_with_words(servers, photos, cell, message):
    records = [{"image": text(photos[0])}, {"image": cell}]
    status, said = servers["single"].ask({"dataframe_records": records})
    assert status == 400
    assert message in said
    assert servers["single"].ask({"inputs": [text(photos[0])]})[0] == 200  # it lives on


def test_a_table_without_images_is_a_bad_request(servers):
    status, said = servers["single"].ask({"dataframe_records": [{"picture": "x"}]})
    assert status == 400
    assert "Model is missing inputs ['image']" in said


def test_servers_of_several_labels_and_of_numbers_answer_alike(servers, bundles, photos):
    texts = [text(photo) for photo in photos]
    bundle = Bundle.load(bundles["multi"])
    status, found = servers["multi"].ask({"inputs": texts})
    wanted = bundle.predict(photos)
    assert status == 200
    assert [row["labels"] for row in found] == wanted["labels"].tolist()
    assert any(len(row["labels"]) > 1 for row in found)
    rows = [[row["probabilities"][name] for name in CLASSES] for row in found]
    np.testing.assert_allclose(rows, bundle.probabilities(photos), atol=1e-6)
    arrays = [pixels(photo) for photo in photos]
    status, found = servers["regression"].ask({"inputs": [a.tolist() for a in arrays]})
    values = Bundle.load(bundles["regression"]).values(arrays)
    assert status == 200
    np.testing.assert_allclose([row["value"] for row in found], values, rtol=1e-5)
    assert servers["regression"].ask({"inputs": ["?"]})[0] == 400


# --- processes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_stopping_a_server_stops_its_children(bundles, environ, signum):
    server = Server(bundles["single"], environ).wait()
    children = server.descendants()
    assert children
    server.stop(signum)
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in children) or server.answers():
        assert time.monotonic() < deadline, f"{children} live on"
        time.sleep(0.1)


def test_the_command_predict_takes_paths_text_and_arrays(bundles, environ, photos, tmp_path):
    array = pixels(photos[2])
    cells = [str(photos[0]), text(photos[1]), array.tolist()]
    given = tmp_path / "in.json"
    given.write_text(json.dumps({"dataframe_records": [{"image": cell} for cell in cells]}))
    options = ("-i", given, "-o", tmp_path / "out.json", "--env-manager", "local")
    done = subprocess.run(
        [MLFLOW, "models", "predict", "-m", bundles["single"], *options],
        env=environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())["predictions"]
    whole = Bundle.load(bundles["single"]).probabilities([photos[0], photos[1], array])
    assert same(found, whole)


# --- in Python ----------------------------------------------------------------------------------


def test_in_python_the_model_takes_what_a_bundle_takes(bundles, photos):
    model = mlflow.pyfunc.load_model(str(bundles["single"]))
    bundle = Bundle.load(bundles["single"])
    arrays = [pixels(photo) for photo in photos]
    of_files = bundle.probabilities(photos)
    for cells in ([str(p) for p in photos], [p.read_bytes() for p in photos]):
        assert same(model.predict({"image": cells}).to_dict("records"), of_files)
    of_arrays = bundle.probabilities(arrays)
    for cells in (arrays, np.stack(arrays)):
        assert same(model.predict({"image": cells}).to_dict("records"), of_arrays)
    assert same(model.predict({"image": arrays[0]}).to_dict("records"), of_arrays[:1])


def test_the_signature_names_one_column_of_any_kind_and_an_example(bundles):
    for task, columns in {
        "single": ["label", "score", "probabilities"],
        "multi": ["labels", "scores", "probabilities"],
        "regression": ["value"],
    }.items():
        model = mlflow.pyfunc.load_model(str(bundles[task]))
        (column,) = model.metadata.signature.inputs
        assert (column.name, str(column.type)) == ("image", "Any")
        assert model.metadata.signature.outputs.input_names() == columns
        example = model.input_example
        assert len(model.predict(example)) == len(example) == 1
