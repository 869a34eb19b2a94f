"""Cross-validation: one run a fold, one above them, their sum, and how it goes on after a stop."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commands import TINY, Command, start, wait_for
from mlflow import MlflowClient
from PIL import Image

import tl
from tl.config import ConfigError, DataConfig

JOB = [*TINY, "finetune=linear_probe"]
UNTRACKED = [*JOB, "tracking.enabled=false"]


@pytest.fixture
def command(capfd, monkeypatch) -> Command:
    return Command(capfd, monkeypatch)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Nine images of each of three classes, and a test that no fold may read."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, number in {"train": 9, "test": 2}.items():
        for name, colour in {
            "blue": (40, 60, 200),
            "green": (40, 180, 60),
            "red": (200, 50, 40),
        }.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for n in range(number):
                pixels = (rng.normal(0, 12, (32, 40, 3)) + colour).clip(0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{n}.png")
    return root


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory) -> tl.TrainResult:
    """A cross-validation by the library."""
    values = {"data.root": str(photos), "output_dir": str(tmp_path_factory.mktemp("whole") / "cv")}
    values["cache.dir"] = str(tmp_path_factory.mktemp("cache"))
    return tl.train(tl.compose("train", [*UNTRACKED, "data.folds=3"], values))


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_sum_of_the_folds(whole, photos):
    assert whole.bundle is None
    assert whole.run_id is None
    each = [read(whole.output_dir / f"fold-{k}/metrics.json") for k in range(3)]
    for name in ("val/acc", "val/loss"):
        values = [metrics[name] for metrics in each]
        summary = read(whole.output_dir / "folds.json")["metrics"][name]
        assert summary["values"] == values
        assert summary["mean"] == whole.metrics[name] == pytest.approx(np.mean(values))
        spread = pytest.approx(np.std(values, ddof=1))
        assert summary["std"] == whole.metrics[f"{name}_std"] == spread
    assert whole.metrics == read(whole.output_dir / "metrics.json")
    assert whole.metrics["val/images"] == sum(m["val/images"] for m in each) == 27
    assert whole.metrics["epochs"] == 3
    assert "val/acc_low" not in whole.metrics
    assert whole.row("val")["accuracy"] == whole.headline == whole.metrics["val/acc"]
    assert np.isnan(whole.row("val")["95 % low"]), "folds share images: a mean has no interval"
    # Each image of train once, by the model of its fold, and none of test.
    table = pd.read_parquet(whole.output_dir / "predictions.parquet")
    images = [path.relative_to(photos).as_posix() for path in (photos / "train").rglob("*.png")]
    assert sorted(table["path"]) == sorted(images)
    assert [int((table["fold"] == k).sum()) for k in range(3)] == [m["val/images"] for m in each]
    assert not [key for metrics in (whole.metrics, *each) for key in metrics if "test/" in key]


def test_folds_are_runs_below_one_run(command, photos, tmp_path):
    out = tmp_path / "cv"
    done = command("train", *JOB, "data.folds=2", f"data.root={photos}", f"output_dir={out}")
    assert done.code == 0, done.err
    assert "fold 1 of 0 to 1" in done.out
    assert "6 images of test stay out of it: no fold looks at them" in " ".join(done.out.split())
    assert "val over 2 folds" in done.out
    metrics = read(out / "metrics.json")
    client = MlflowClient()
    top = client.get_run(read(out / "run.json")["run_id"])
    assert top.info.status == "FINISHED"
    assert top.data.tags["tl.kind"] == "folds"
    for name in ("val/acc", "val/acc_std", "val/images"):
        assert top.data.metrics[name] == pytest.approx(metrics[name])
    assert top.data.params["data.folds"] == "2"
    names = {f.path for f in client.list_artifacts(top.info.run_id)}
    assert {"folds.json", "predictions.parquet", "config.yaml", "data.json"} <= names
    for k in range(2):
        run = client.get_run(read(out / f"fold-{k}/run.json")["run_id"])
        assert run.data.tags["mlflow.parentRunId"] == top.info.run_id
        assert f" · fold {k} · " in run.info.run_name
        assert run.data.tags["tl.kind"] == "train"
        assert run.info.status == "FINISHED"
        assert run.data.metrics["val/acc"] == read(out / f"fold-{k}/metrics.json")["val/acc"]


def test_a_fold_alone_is_the_same_run(command, photos, whole, tmp_path):
    out = f"output_dir={tmp_path / 'one'}"
    done = command("train", *UNTRACKED, "data.folds=3", "data.fold=1", f"data.root={photos}", out)
    assert done.code == 0, done.err
    one = read(tmp_path / "one/metrics.json")
    two = read(whole.output_dir / "fold-1/metrics.json")
    assert (one["val/loss"], one["val/images"]) == (two["val/loss"], two["val/images"])


def test_an_interrupted_cross_validation_goes_on(command, photos, whole, tmp_path):
    out = tmp_path / "cv"
    job = [*UNTRACKED, "data.folds=3", f"data.root={photos}", f"output_dir={out}"]
    process = start("train", *job)
    wait_for(out / "fold-1/config.yaml", process)
    process.terminate()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert f"continue with: tl train resume={out}\n" in err
    command("train", *job).refused("holds a run already: resume= continues it")
    first = (out / "fold-0/metrics.json").stat().st_mtime_ns
    done = command("train", f"resume={out}")
    assert done.code == 0, done.err
    assert "fold 0 of 0 to 2: done before" in done.out
    assert (out / "fold-0/metrics.json").stat().st_mtime_ns == first, "fold 0 was done"
    one, two = (read(folder / "folds.json")["metrics"] for folder in (whole.output_dir, out))
    assert one["val/loss"] == two["val/loss"]


def test_wrong_folds_are_refused_before_anything_is_written(command, photos, tmp_path):
    out = tmp_path / "cv"
    job = [*UNTRACKED, f"data.root={photos}", f"output_dir={out}"]
    command("train", *job, "data.folds=10").refused(
        "data.folds=10: blue, green, red cannot be in every fold: each class needs at least 10 "
        "different images of its own; add some, or data.folds=9"
    )
    command("train", *job, "data.folds=1").refused("data.folds must be")
    command("train", *job, "data.folds=3", "data.fold=3").refused("data.fold=3, but data.folds=3")
    command("train", *job, "data.fold=0").refused("data.fold=0, but there are no data.folds")
    assert not out.exists()
    with pytest.raises(ConfigError, match="fold=5"):
        DataConfig(root="x", folds=5, fold=5)


def test_auto_decides_in_each_fold(command, photos, tmp_path):
    out = tmp_path / "cv"
    done = command(
        "train", "model=test_resnet", "model.weights=none", "finetune=auto", "trainer=cpu",
        "data.folds=2", "data.num_workers=0", "export.enabled=false", "tracking.enabled=false",
        f"data.root={photos}", f"output_dir={out}", "finetune.epochs=1",
    )  # fmt: skip
    assert done.code == 0, done.err
    for k, run in enumerate(read(out / "folds.json")["runs"]):
        assert run["method"] == read(out / f"fold-{k}/plan.json")["method"]
        assert (out / f"fold-{k}/evidence.json").exists()
