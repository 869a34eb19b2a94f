"""Tables, texts and pictures of several labels an image, and of one number an image."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tl import display
from tl.config import Task
from tl.evaluation import evaluate
from tl.figures import save_report
from tl.predictions import write_predictions


def test_each_format_holds_labels_and_numbers(tmp_path):
    labels = pd.DataFrame(
        {
            "source": ["a.png", "b.png"],
            "labels": [["cat", "dog"], []],
            "scores": [[0.9, 0.6], []],
            "top": [[["cat", 0.9]], [["dog", 0.2]]],
            "error": [None, None],
        }
    )
    numbers = pd.DataFrame({"source": ["a.png"], "value": [2.5], "error": [None]})
    for end in (".parquet", ".csv", ".json"):
        write_predictions(labels, tmp_path / f"labels{end}")
        write_predictions(numbers, tmp_path / f"numbers{end}")
    csv = pd.read_csv(tmp_path / "labels.csv", keep_default_na=False)
    assert csv["labels"].tolist() == ["cat|dog", ""]
    assert csv["scores"].tolist() == ["0.900000|0.600000", ""]
    assert csv["top"].tolist() == ["cat:0.900000", "dog:0.200000"]
    parquet = pd.read_parquet(tmp_path / "labels.parquet")
    assert [list(names) for names in parquet["labels"]] == [["cat", "dog"], []]
    assert json.loads((tmp_path / "labels.json").read_text())[0]["labels"] == ["cat", "dog"]
    assert pd.read_csv(tmp_path / "numbers.csv")["value"].tolist() == [2.5]
    assert pd.read_parquet(tmp_path / "numbers.parquet")["value"].tolist() == [2.5]


def test_predictions_of_each_task_are_shown(capsys):
    labels = pd.DataFrame(
        {
            "source": [f"{i}.png" for i in range(12)],
            "labels": [["cat", "dog"]] + [["cat"]] * 10 + [[]],
            "scores": [[0.9, 0.625]] + [[0.5]] * 10 + [[]],
            "top": [[]] * 12,
            "error": [None, None, "no image"] + [None] * 9,
        }
    )
    display.predictions(labels)
    text = capsys.readouterr().out
    assert "cat 0.900, dog 0.625" in text
    assert "no image" in text
    assert "… and 2 more" in text
    assert [s.split() for s in text.split("\n") if s.startswith(("cat ", "dog "))] == [
        ["cat", "11"],
        ["dog", "1"],
    ]
    numbers = pd.DataFrame(
        {"source": ["a", "b"], "value": [2.5, math.nan], "error": [None, "no image"]}
    )
    display.predictions(numbers)
    text = capsys.readouterr().out
    assert "2.50" in text
    assert "no image" in text


def multi_report(classes: int = 5):
    rng = np.random.default_rng(0)
    y = rng.random((200, classes)) < np.linspace(0.1, 0.5, classes)
    p = 1 / (1 + np.exp(-(rng.normal(size=y.shape) + 2 * y - 1)))
    return evaluate(p, y, [f"label {i}" for i in range(classes)], "val", task=Task.multi)


def number_report(images: int = 150):
    rng = np.random.default_rng(0)
    t = rng.normal(50, 10, images)
    return evaluate(t + rng.normal(0, 4, images), t, ["age"], "test", task=Task.regression)


def many_classes_report():
    """More classes than a confusion matrix has room for."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2001, 400)
    p = rng.random((400, 2001)) * 1e-4
    p[np.arange(400), np.where(rng.random(400) < 0.7, y, 5)] += 1
    p /= p.sum(axis=1, keepdims=True)
    return evaluate(p, y, [f"class {i}" for i in range(2001)], "val")


def test_reports_of_each_task_are_shown(capsys):
    report = multi_report()
    display.report(report)
    text = capsys.readouterr().out
    assert text.startswith(f"val: mAP {report.metrics['map']:.3f} (95 % interval ")
    assert "with the thresholds chosen on these images: macro F1" in text
    assert "confusion" not in text
    head = next(line for line in text.split("\n") if line.startswith("class"))
    names = ["class", "images", "ap", "threshold", "precision", "recall", "f1", "95", "%", "of"]
    assert head.split() == [*names, "ap"]
    display.report(multi_report(30))
    assert "the 20 with the lowest AP (10 more are not shown)" in capsys.readouterr().out
    display.report(many_classes_report())
    assert "confusion" not in capsys.readouterr().out
    report = number_report()
    display.report(report)
    text = capsys.readouterr().out
    assert text.startswith(f"test: mean absolute error of age {report.metrics['mae']:.4g} (95 %")
    assert "R²" in text
    assert "test: error by range of age" in text


@pytest.mark.parametrize(
    ("report", "name"),
    [
        (multi_report(), "average_precision_val.png"),
        (multi_report(90), "average_precision_val.png"),
        (many_classes_report(), "f1_val.png"),
        (number_report(), "predicted_test.png"),
        (number_report(5000), "predicted_test.png"),
    ],
)
def test_pictures_of_each_task_are_drawn(tmp_path, report, name):
    path = save_report(report, tmp_path / "pictures")
    assert path == tmp_path / "pictures" / name
    with Image.open(path) as picture:
        assert min(picture.size) > 300
        assert len(picture.convert("P", palette=Image.Palette.ADAPTIVE).getcolors()) > 10
