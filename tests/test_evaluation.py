from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import metrics as reference
from torchmetrics.functional.classification import multiclass_calibration_error

from tl.evaluation import EvaluationError, accuracy_interval, evaluate, predictions_table

CLASSES = ("ants", "bees", "wasps")


def random_predictions(
    images: int = 400, classes: int = 7, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, images)
    logits = rng.normal(size=(images, classes)) + 1.5 * np.eye(classes)[labels]
    p = np.exp(logits)
    return p / p.sum(axis=1, keepdims=True), labels


def names(count: int) -> list[str]:
    return [f"class {i}" for i in range(count)]


def test_metrics_equal_a_count_by_hand() -> None:
    # ants: 2 of 3 right; bees: 1 of 1 right, and one ant taken for a bee; wasps: 1 of 2 right.
    p = [
        [0.8, 0.1, 0.1],
        [0.6, 0.2, 0.2],
        [0.3, 0.5, 0.2],
        [0.1, 0.7, 0.2],
        [0.2, 0.2, 0.6],
        [0.5, 0.1, 0.4],
    ]
    report = evaluate(p, [0, 0, 0, 1, 2, 2], CLASSES, "val")
    assert report.confusion.tolist() == [[2, 1, 0], [0, 1, 0], [1, 0, 1]]
    assert report.metrics["acc"] == pytest.approx(4 / 6)
    assert report.metrics["balanced_acc"] == pytest.approx((2 / 3 + 1 + 1 / 2) / 3)
    assert report.metrics["f1_macro"] == pytest.approx((2 / 3 + 2 / 3 + 2 / 3) / 3)
    expected = -sum(math.log(x) for x in (0.8, 0.6, 0.3, 0.7, 0.6, 0.4)) / 6
    assert report.metrics["loss"] == pytest.approx(expected)
    # Confidences 0.8 | 0.6 0.6 | 0.5 0.5 | 0.7 fall into four of the fifteen bins.
    gaps = abs(0.8 - 1) + abs(1.2 - 2) + abs(1.0 - 0) + abs(0.7 - 1)
    assert report.metrics["ece"] == pytest.approx(gaps / 6)
    assert report.metrics["images"] == 6
    assert report.per_class["class"].tolist() == list(CLASSES)
    assert report.per_class["images"].tolist() == [3, 1, 2]
    assert report.per_class["precision"].tolist() == pytest.approx([2 / 3, 1 / 2, 1])
    assert report.per_class["recall"].tolist() == pytest.approx([2 / 3, 1, 1 / 2])


@pytest.mark.parametrize("classes", [2, 7, 40])
def test_metrics_equal_those_of_scikit_learn(classes: int) -> None:
    p, y = random_predictions(classes=classes)
    predicted = p.argmax(axis=1)
    m = evaluate(p, y, names(classes), "test").metrics
    assert m["acc"] == pytest.approx(reference.accuracy_score(y, predicted))
    assert m["f1_macro"] == pytest.approx(reference.f1_score(y, predicted, average="macro"))
    assert m["balanced_acc"] == pytest.approx(reference.balanced_accuracy_score(y, predicted))
    assert m["loss"] == pytest.approx(reference.log_loss(y, p, labels=range(classes)))


@pytest.mark.parametrize("seed", range(4))
def test_calibration_error_equals_that_of_torchmetrics(seed: int) -> None:
    p, y = random_predictions(seed=seed)
    expected = multiclass_calibration_error(
        torch.from_numpy(p), torch.from_numpy(y), num_classes=7, n_bins=15, norm="l1"
    )
    assert evaluate(p, y, names(7), "val").metrics["ece"] == pytest.approx(float(expected))


def test_calibration_error_of_certain_and_right_predictions_is_zero() -> None:
    assert evaluate(np.eye(3), [0, 1, 2], CLASSES, "val").metrics["ece"] == 0


@pytest.mark.parametrize(
    ("correct", "images", "low", "high"),
    # Wilson's formula written out: (k + z²/2 ± z·sqrt(k(n-k)/n + z²/4)) / (n + z²), z = 1.959964
    [
        (144, 153, 0.8919, 0.9687),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (1, 2, 0.0945, 0.9055),
    ],
)
def test_interval_is_that_of_wilson(correct: int, images: int, low: float, high: float) -> None:
    z = 1.959963985
    middle = correct + z * z / 2
    spread = z * math.sqrt(correct * (images - correct) / images + z * z / 4)
    interval = accuracy_interval(correct, images)
    assert interval == pytest.approx(
        ((middle - spread) / (images + z * z), (middle + spread) / (images + z * z)), abs=1e-9
    )
    assert interval == pytest.approx((low, high), abs=1e-4)


def test_metrics_carry_the_name_of_the_split() -> None:
    flat = evaluate(np.eye(3), [0, 1, 2], CLASSES, "test").flat()
    figures = ("acc", "f1_macro", "balanced_acc", "f1_weighted", "log_loss", "brier", "ece")
    with_intervals = [f"{n}{end}" for n in (*figures, "auc", "ap") for end in ("", "_low", "_high")]
    alone = ("loss", "ece_uncalibrated", "images")
    assert list(flat) == [f"test/{name}" for name in (*with_intervals, *alone)]
    assert flat["test/acc"] == flat["test/acc_high"] == 1
    assert all(type(value) is float for value in flat.values())


def test_a_class_without_images_is_left_out_of_the_means() -> None:
    report = evaluate([[0.7, 0.2, 0.1], [0.2, 0.7, 0.1]], [0, 1], CLASSES, "val")
    assert report.metrics["f1_macro"] == report.metrics["balanced_acc"] == 1
    wasps = report.per_class.iloc[2]
    assert wasps["images"] == 0
    assert math.isnan(wasps["recall"])
    assert report.confusion.shape == (3, 3)


def test_a_class_that_is_never_predicted_counts_as_zero_in_the_means() -> None:
    report = evaluate([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1]], [0, 1], CLASSES, "val")
    assert report.metrics["f1_macro"] == pytest.approx((2 / 3 + 0) / 2)
    assert report.metrics["balanced_acc"] == 0.5
    assert math.isnan(report.per_class.iloc[1]["precision"])


def test_certain_and_wrong_gives_a_large_finite_loss() -> None:
    loss = evaluate([[1.0, 0.0, 0.0]], [1], CLASSES, "val").metrics["loss"]
    assert loss == pytest.approx(-math.log(float(np.finfo(np.float32).tiny)))


def test_diverged_training_is_named_with_its_remedy() -> None:
    with pytest.raises(EvaluationError, match=r"1 of 2 images.*diverged.*lower finetune\.head_lr"):
        evaluate([[np.nan, 0.5, 0.5], [0.2, 0.3, 0.5]], [0, 1], CLASSES, "val")


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        (np.eye(3), [0, 1], r"got \(3, 3\) and \(2,\)"),
        (np.zeros((0, 3)), [], "N > 0"),
        (np.eye(3), [0, 1, 3], r"integers in \[0, 2\]"),
        (np.eye(3), [0.0, 1.0, 2.0], r"integers in \[0, 2\]"),
        (3 * np.eye(3), [0, 1, 2], "are these logits"),
    ],
)
def test_what_is_no_prediction_is_refused(
    probabilities: np.ndarray, labels: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(probabilities, labels, CLASSES, "val")


def test_predictions_table_keeps_the_order_of_the_rows() -> None:
    rows = pd.DataFrame(
        {"path": ["b.png", "a.png"], "split": "val", "label": [2, 0], "width": 1}, index=[7, 3]
    )
    table = predictions_table(rows, [[0.1, 0.2, 0.7], [0.3, 0.6, 0.1]], CLASSES)
    assert list(table.columns) == [
        *("path", "split", "label", "predicted", "correct", "score"),
        *("p_ants", "p_bees", "p_wasps"),
    ]
    assert table.iloc[0, :5].tolist() == ["b.png", "val", "wasps", "wasps", True]
    assert table.iloc[1, :5].tolist() == ["a.png", "val", "ants", "bees", False]
    assert table["score"].tolist() == pytest.approx([0.7, 0.6])
    assert table["p_bees"].tolist() == pytest.approx([0.2, 0.6])


def test_predictions_keep_what_pairs_and_groups_the_images(tmp_path: Path) -> None:
    digests, groups = pd.array(["a1", "b2"], "string"), pd.array(["cow 7", None], "string")
    rows = pd.DataFrame({"path": ["a.png", "b.png"], "split": "test", "label": [2, 0]})
    rows = rows.assign(sha256=digests, group=groups)
    table = predictions_table(rows, [[0.1, 0.2, 0.7], [0.3, 0.6, 0.1]], CLASSES)
    assert list(table.columns[:5]) == ["path", "split", "sha256", "group", "label"]
    table.to_parquet(tmp_path / "predictions.parquet")
    read = pd.read_parquet(tmp_path / "predictions.parquet")
    assert read["sha256"].tolist() == ["a1", "b2"]
    assert read["group"].fillna("none").tolist() == ["cow 7", "none"]


def test_predictions_table_survives_parquet(tmp_path: Path) -> None:
    rows = pd.DataFrame({"path": ["a.png"], "split": "val", "label": [0]})
    table = predictions_table(rows, [[0.5, 0.3, 0.2]], CLASSES)
    table.to_parquet(tmp_path / "predictions.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "predictions.parquet"), table)
