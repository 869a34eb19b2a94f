"""Runs in a store, as trainings leave them, to be registered and promoted."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from exporting import CLASSES, export, make_photos, network

from tl.bundle import Outputs
from tl.config import TrackingConfig, compose, to_yaml
from tl.evaluation import predictions_table
from tl.registry import open_registry, promote, register
from tl.tracking import start_run

IMAGES = 400


def hashes(number, prefix="image"):
    return [hashlib.sha256(f"{prefix} {i}".encode()).hexdigest() for i in range(number)]


def table(right, *, split="test", seed=0, classes=CLASSES, digests=None, names=None):
    """Predictions of a split of which a share is right; the same images for every seed."""
    digests = hashes(IMAGES) if digests is None else digests
    truth = np.array([int(digest[:8], 16) for digest in digests]) % len(classes)
    wrong = np.random.default_rng(seed).permutation(len(digests)) >= round(right * len(digests))
    said = np.where(wrong, (truth + 1) % len(classes), truth)
    shares = np.full((len(digests), len(classes)), 0.1 / (len(classes) - 1))
    shares[np.arange(len(digests)), said] = 0.9
    paths = names or [f"{split}/{i}.png" for i in range(len(digests))]
    rows = pd.DataFrame({"path": paths, "split": split, "sha256": digests, "label": truth})
    return predictions_table(rows, shares, classes)


def record(uri, folder, bundle, predictions, *, name="a run", trained=(), root="photos", data=()):
    """What a finished training leaves in its folder and in the store."""
    folder.mkdir(parents=True)
    predictions.to_parquet(folder / "predictions.parquet", index=False)
    pd.DataFrame({"sha256": list(trained) or hashes(50, "train")}).to_parquet(
        folder / "train_images.parquet", index=False
    )
    if "correct" in predictions:
        metrics = {"test/acc": float(predictions["correct"].mean())}
    else:
        metrics = {"test/mae": float(predictions["error"].abs().mean())}
    config = TrackingConfig(uri=uri, system_metrics=False, run_name=name)
    with start_run(
        config, experiment="flowers", run_name=name, output_dir=folder, resume=False
    ) as run:
        run.log_tags({"model.name": "test_resnet", "data.name": "insects"})
        run.log_config(to_yaml(compose("train", [f"data.root={root}", *data])))
        run.log_results(metrics, 3, folder)
        run.log_bundle(bundle)
        assert run.drain(120)
    return json.loads((folder / "run.json").read_text())["run_id"]


@pytest.fixture(scope="session")
def sample_photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="session")
def run_bundles(tmp_path_factory, sample_photos):
    """Three bundles that answer the same question, and one of other classes."""
    root = tmp_path_factory.mktemp("bundles")
    for number, name in enumerate(("one", "two", "three")):
        model = network("test_resnet")
        model.get_classifier().bias.data += 0.1 * number
        export(root / name, model, sample_photos)
    export(root / "other", network("test_resnet"), sample_photos, classes=("ant", "bee", "fly"))
    model = network("test_resnet")
    several = Outputs("multi", thresholds=(0.2, 0.3, 0.3))
    export(root / "multi", model, sample_photos, outputs=several)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="session")
def recorded(tmp_path_factory, run_bundles):
    """A store with runs: folders by name, and its database, from which each test has a copy."""
    root = tmp_path_factory.mktemp("recorded")
    uri = f"sqlite:///{root / 'mlflow.db'}"
    seen = hashes(IMAGES)[: IMAGES // 4]
    runs = {
        "good": ("one", table(0.80, seed=1), ()),
        "better": ("two", table(0.90, seed=2), ()),
        "worse": ("three", table(0.60, seed=3), ()),
        "leaky": ("three", table(0.85, seed=4, digests=hashes(IMAGES)[IMAGES // 4 :]), seen),
        "known": ("three", table(0.99, seed=4, digests=hashes(9, "else")), hashes(IMAGES)),
        "other": ("other", table(0.99, classes=("ant", "bee", "fly")), ()),
        "bare": (None, table(0.8), ()),
    }
    for name, (bundle, predictions, trained) in runs.items():
        path = run_bundles[bundle] if bundle else None
        record(uri, root / name, path, predictions, name=name, trained=trained)
    shutil.copyfile(root / "mlflow.db", root / "crowned.db")
    with open_registry(f"sqlite:///{root / 'crowned.db'}") as registry:
        register(registry, "good", "flowers", "challenger")
        promote(registry, "flowers", "challenger", margin=0.01)
    return root


@pytest.fixture
def run_store(recorded, tmp_path, monkeypatch):
    """A store of this test alone, which has these runs; their files are shared."""
    return own_store(recorded / "mlflow.db", tmp_path, monkeypatch)


@pytest.fixture
def crowned(recorded, tmp_path, monkeypatch):
    """Such a store in which the run `good` is the champion of `flowers`, as its version 1."""
    return mlflow.MlflowClient(own_store(recorded / "crowned.db", tmp_path, monkeypatch))


def own_store(database, folder, monkeypatch):
    shutil.copyfile(database, folder / "mlflow.db")
    address = f"sqlite:///{folder / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    return address


@pytest.fixture
def store_client(run_store):
    return mlflow.MlflowClient(run_store)


def aliases(client, name="flowers"):
    found = client.get_registered_model(name).aliases
    return {alias: int(version) for alias, version in found.items()}


def everything(client, name="flowers"):
    """All that a promotion may change, to see that it did not."""
    versions = client.search_model_versions(f"name = '{name}'")
    kept = sorted((v.version, v.description, tuple(sorted(v.tags.items()))) for v in versions)
    return aliases(client, name), kept, client.get_registered_model(name).tags


def spoil(client, folder, what="classes.txt"):
    """Change a file of the bundle of a run, in the store."""
    run_id = json.loads((folder / "run.json").read_text())["run_id"]
    run = client.get_run(run_id)
    (found,) = client.search_logged_models(
        [run.info.experiment_id], filter_string=f"source_run_id = '{run_id}'"
    )
    (file,) = Path(found.artifact_location.removeprefix("file://")).glob(f"data/*/{what}")
    file.write_text("bee\nant\nwood wasp\n")
