"""Several labels and numbers through the commands: train, evaluate, predict, export."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from commands import TINY, UNTRACKED, Command
from PIL import Image

from tl.bundle import Bundle
from tl.config import Task

COLOURS = ("red", "green", "blue")


def pictures(count: int = 60) -> tuple[list[Image.Image], np.ndarray, np.ndarray]:
    """Noisy pictures, which of their channels are bright (N, 3), and their brightness (N,)."""
    rng = np.random.default_rng(0)
    bright = rng.random((count, 3)) < 0.5
    bright[:3] = np.eye(3)
    found = []
    for marks in bright:
        noise = rng.normal(60 + 130 * marks, 12, (32, 40, 3))
        found.append(Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8)))
    values = np.array([np.asarray(picture).mean() for picture in found])
    return found, bright, 1900 + values


def splits(count: int) -> list[str]:
    return ["val" if i % 5 == 3 else "test" if i % 5 == 4 else "train" for i in range(count)]


@pytest.fixture
def command(capfd, monkeypatch) -> Command:
    return Command(capfd, monkeypatch)


@pytest.fixture
def several_labels(tmp_path):
    """A CSV file with several labels an image, beside its images."""
    found, bright, _ = pictures()
    rows = []
    for i, (picture, marks) in enumerate(zip(found, bright, strict=True)):
        picture.save(tmp_path / f"{i:02d}.png")
        names = "|".join(np.array(COLOURS)[marks])
        rows.append({"path": f"{i:02d}.png", "labels": names, "split": splits(60)[i]})
    pd.DataFrame(rows).to_csv(tmp_path / "labels.csv", index=False)
    return tmp_path / "labels.csv"


@pytest.fixture
def numbers(tmp_path):
    """A Parquet file with the bytes of the images and a number each."""
    found, _, values = pictures()
    contents = []
    for i, picture in enumerate(found):
        picture.save(tmp_path / f"{i}.jpg", quality=95)
        contents.append((tmp_path / f"{i}.jpg").read_bytes())
        (tmp_path / f"{i}.jpg").unlink()
    table = pd.DataFrame({"image": contents, "year": values, "split": splits(60)})
    table.to_parquet(tmp_path / "years.parquet")
    return tmp_path / "years.parquet"


def train(command, root, out, *more, tiny=TINY):
    done = command(
        "train",
        *tiny,
        "export.enabled=true",
        "finetune=linear_probe",
        "finetune.epochs=40",
        "finetune.head_lr=0.05",
        "augment=none",
        f"data.root={root}",
        f"output_dir={out}",
        *more,
    )
    assert done.code == 0, done.err
    return done


def test_several_labels_from_a_table_to_predictions(command, several_labels, tmp_path):
    out = tmp_path / "run"
    done = train(command, several_labels, out)
    assert "with 3 labels, 1." in done.out
    assert "test: mAP " in done.out
    metrics = json.loads((out / "metrics.json").read_text())
    assert {"val/map", "val/map_low", "test/f1_macro", "test/exact_match"} <= set(metrics)
    assert metrics["val/map"] > 0.6
    assert (out / "pictures/average_precision_test.png").is_file()
    thresholds = json.loads((out / "thresholds.json").read_text())
    bundle = Bundle.load(out / "bundle")
    assert bundle.task == Task.multi.value
    assert dict(zip(bundle.classes, bundle.outputs.thresholds, strict=True)) == thresholds
    table = pd.read_parquet(out / "predictions.parquet")
    assert {"labels", "predicted", "correct", "p_red"} <= set(table.columns)

    judged = tmp_path / "judged"
    done = command(
        "evaluate", f"bundle={out / 'bundle'}", f"data.root={several_labels}",
        f"output_dir={judged}",
    )  # fmt: skip
    assert done.code == 0, done.err
    again = json.loads((judged / "metrics.json").read_text())
    # The training resizes by torchvision, the bundle by Pillow: up to two levels of 255 apart.
    for name in ("test/map", "test/loss"):
        assert again[name] == pytest.approx(metrics[name], abs=0.02)
    file = tmp_path / "found.csv"
    done = command(
        "predict", f"bundle={out / 'bundle'}", f"source={tmp_path}/0*.png", f"output={file}"
    )
    assert done.code == 0, done.err
    found = pd.read_csv(file, keep_default_na=False)
    assert list(found.columns) == ["source", "labels", "scores", "top", "error"]
    p = bundle.probabilities([found["source"][0]])[0]
    wanted = {
        n for n, v, t in zip(bundle.classes, p, bundle.outputs.thresholds, strict=True) if v >= t
    }
    assert set(found["labels"][0].split("|")) - {""} == wanted


def test_numbers_from_bytes_in_a_table_to_predictions(command, numbers, tmp_path):
    out = tmp_path / "run"
    done = train(command, numbers, out, "data.columns.label=year", tiny=UNTRACKED)
    assert "with a number each, year, 1" in done.out
    metrics = json.loads((out / "metrics.json").read_text())
    assert {"val/mae", "val/mae_low", "val/r2", "test/rmse", "test/rmse_high"} <= set(metrics)
    truth = pd.read_parquet(numbers).query("split == 'test'")["year"]
    assert metrics["test/rmse"] < truth.std()  # better than the mean
    assert (out / "pictures/predicted_test.png").is_file()
    table = pd.read_parquet(out / "predictions.parquet")
    assert table["target"].between(1900, 2200).all()
    assert (table["predicted"] - table["target"]).abs().mean() < 40
    # The images are no files: the run keeps some for its bundle, and an export finds them again.
    kept = sorted(p.name for p in (out / "checkpoints/golden").iterdir())
    assert kept[0] == "00.jpg"
    numbers.rename(tmp_path / "moved.parquet")
    done = command("export", f"run={out}", f"output_dir={tmp_path / 'again'}")
    assert done.code == 0, done.err
    assert "largest difference of a number (in standard deviations)" in done.out
    golden = sorted(p.name for p in (tmp_path / "again/golden").iterdir())
    assert golden == [*kept, "expected.json"]

    done = command(
        "evaluate", f"bundle={tmp_path / 'again'}", f"data.root={tmp_path / 'moved.parquet'}",
        "data.columns.label=year", f"output_dir={tmp_path / 'judged'}",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "test: mean absolute error of year" in done.out
    again = json.loads((tmp_path / "judged/metrics.json").read_text())
    assert again["test/mae"] == pytest.approx(metrics["test/mae"], rel=0.05)
