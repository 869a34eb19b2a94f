"""Judging several labels an image, and one number an image."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn import metrics as reference

from tl.config import Task
from tl.evaluation import (
    EvaluationError,
    Report,
    choose_thresholds,
    evaluate,
    headline,
    lower_is_better,
    predictions_table,
)

CLASSES = ("cat", "dog", "bird")


def random_labels(
    images: int = 300, classes: int = 6, seed: int = 0, decimals: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that know something about labels of different frequency; some are tied."""
    rng = np.random.default_rng(seed)
    y = rng.random((images, classes)) < np.linspace(0.05, 0.6, classes)
    logits = rng.normal(size=y.shape) + 2.0 * y - 1
    p = 1 / (1 + np.exp(-logits))
    return (p if decimals is None else p.round(decimals)), y.astype(np.float32)


def judge(p: np.ndarray, y: np.ndarray, **more: object) -> Report:
    names = [f"class {i}" for i in range(np.shape(p)[1])]
    return evaluate(p, y, names, "val", task=Task.multi, **more)


# --- several labels -----------------------------------------------------------------------------


def test_figures_of_several_labels_equal_a_count_by_hand() -> None:
    p = [[0.9, 0.2, 0.6], [0.8, 0.7, 0.3], [0.3, 0.6, 0.7], [0.1, 0.1, 0.2]]
    y = [[1, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, 0]]
    report = evaluate(p, y, CLASSES, "val", task=Task.multi, thresholds=[0.5, 0.5, 0.5])
    m = report.metrics
    # cat: ranks 1 and 3 of its scores are right; dog: 1 and 2; bird: only the second.
    ap = [(1 + 2 / 3) / 2, 1.0, 1 / 2]
    assert report.per_class["ap"].tolist() == pytest.approx(ap)
    assert m["map"] == pytest.approx(np.mean(ap))
    # Said: cat + bird, cat + dog, dog + bird, nothing. Wrong: one cat said, one missed, one bird.
    assert m["hamming"] == pytest.approx(3 / 12)
    assert m["exact_match"] == pytest.approx(2 / 4)
    assert m["f1_micro"] == pytest.approx(2 * 4 / (6 + 5))
    assert report.per_class["f1"].tolist() == pytest.approx([2 / 4, 1, 2 / 3])
    assert m["f1_macro"] == pytest.approx((1 / 2 + 1 + 2 / 3) / 3)
    rights = [0.9, 0.8, 0.6, 0.2, 0.7, 0.7, 0.3, 0.6, 0.3, 0.9, 0.9, 0.8]
    assert m["loss"] == pytest.approx(-np.log(rights).mean())
    assert report.confusion is None
    assert report.thresholds == (0.5, 0.5, 0.5)
    assert report.task is Task.multi
    assert report.per_class.columns.tolist() == [
        *("class", "images", "ap", "ap_low", "ap_high", "auc", "threshold"),
        *("precision", "precision_low", "precision_high"),
        *("recall", "recall_low", "recall_high", "f1", "f1_low", "f1_high"),
    ]


@pytest.mark.parametrize("decimals", [None, 1])
def test_figures_of_several_labels_equal_those_of_scikit_learn(decimals: int | None) -> None:
    p, y = random_labels(decimals=decimals)
    report = judge(p, y, thresholds=[0.4] * 6)
    m, said = report.metrics, p >= 0.4
    assert m["map"] == pytest.approx(reference.average_precision_score(y, p, average="macro"))
    assert m["f1_macro"] == pytest.approx(reference.f1_score(y, said, average="macro"))
    assert m["f1_micro"] == pytest.approx(reference.f1_score(y, said, average="micro"))
    assert m["exact_match"] == pytest.approx(reference.accuracy_score(y, said))
    assert m["hamming"] == pytest.approx(reference.hamming_loss(y, said))
    if decimals is None:
        losses = [reference.log_loss(y[:, k], p[:, k]) for k in range(6)]
        assert m["loss"] == pytest.approx(np.mean(losses))


def test_the_interval_of_the_map_is_that_of_scikit_learn_over_drawn_images() -> None:
    p, y = random_labels(images=150, classes=6)
    p, y = p[:, 2:], y[:, 2:]  # scikit-learn gives 0 where a draw has no image of a class
    m = judge(p, y).metrics
    rng = np.random.default_rng(5)
    drawn = [rng.integers(150, size=150) for _ in range(500)]
    found = [reference.average_precision_score(y[i], p[i], average="macro") for i in drawn]
    low, high = np.quantile(found, [0.025, 0.975])
    assert (m["map_low"], m["map_high"]) == pytest.approx((low, high), abs=0.015)
    assert m["map_low"] < m["map"] < m["map_high"]
    assert judge(p, y).metrics == m


def test_the_interval_of_many_images_is_as_wide_as_that_of_all_draws(monkeypatch) -> None:
    p, y = random_labels(images=400, classes=4)
    many = judge(p, y).metrics
    monkeypatch.setattr("tl.evaluation.resampling.MOST_VALUES", 160_000)
    few = judge(p, y).metrics
    width = many["map_high"] - many["map_low"]
    assert few["map_low"] == pytest.approx(many["map_low"], abs=0.1 * width)
    assert few["map_high"] == pytest.approx(many["map_high"], abs=0.1 * width)
    assert few["map_low"] != many["map_low"]


def test_the_interval_of_the_map_covers_the_truth_about_as_often_as_it_says() -> None:
    big, labels = random_labels(images=20_000, classes=3, seed=1)
    truth = reference.average_precision_score(labels, big, average="macro")
    rng = np.random.default_rng(2)
    inside = []
    for _ in range(60):
        i = rng.integers(len(big), size=200)
        m = judge(big[i], labels[i]).metrics
        inside.append(m["map_low"] <= truth <= m["map_high"])
    # 57 of 60 expected; below 50 has a chance of 2 in 10,000.
    assert sum(inside) >= 50


def test_a_class_without_images_has_no_average_precision_and_no_part_in_the_mean() -> None:
    p = [[0.9, 0.3, 0.1], [0.2, 0.8, 0.1]]
    report = evaluate(p, [[1, 0, 0], [0, 1, 0]], CLASSES, "val", task=Task.multi)
    assert report.metrics["map"] == 1
    assert math.isnan(report.per_class["ap"][2])
    assert math.isnan(report.per_class["recall"][2])
    assert report.metrics["f1_macro"] == 1
    assert all(type(v) is float and math.isfinite(v) for v in report.metrics.values())


def test_one_class_alone_is_judged_too() -> None:
    report = evaluate([[0.9], [0.2], [0.6]], [[1], [0], [1]], ["cat"], "val", task=Task.multi)
    assert report.metrics["map"] == report.metrics["f1_macro"] == 1
    assert report.per_class["images"].tolist() == [2]


def test_a_sure_and_wrong_label_gives_a_finite_loss() -> None:
    m = evaluate([[1.0, 0.0], [0.5, 1]], [[0, 1], [0, 1]], ["a", "b"], "val", task=Task.multi)
    assert m.metrics["loss"] == pytest.approx(
        (25 * math.log(2) - math.log(np.finfo(np.float32).tiny) + math.log(2)) / 4, rel=1e-6
    )


def test_thresholds_give_the_best_f1_that_any_cut_gives() -> None:
    p, y = random_labels(images=120, classes=5)
    chosen = choose_thresholds(p, y.astype(bool))
    for k, threshold in enumerate(chosen):
        best = max(reference.f1_score(y[:, k], p[:, k] >= cut) for cut in p[:, k])
        if y[:, k].sum() >= 5:
            assert reference.f1_score(y[:, k], p[:, k] >= threshold) == pytest.approx(best)
        assert 0 < threshold < 1
        assert threshold not in p[:, k]  # halfway: no rounding decides


def test_a_rare_class_takes_the_threshold_of_all() -> None:
    rng = np.random.default_rng(0)
    y = np.zeros((200, 2), bool)
    y[:100, 0] = True
    y[:2, 1] = True
    p = np.where(y, 0.7, 0.3) + rng.uniform(-0.05, 0.05, y.shape)
    p[:2, 1] = 0.99
    chosen = choose_thresholds(p, y)
    assert chosen == pytest.approx([0.5, 0.5], abs=0.15)  # not between 0.35 and 0.99 of two images
    y[:, 1] = False
    assert choose_thresholds(p, y)[1] == pytest.approx(0.5, abs=0.35)
    assert choose_thresholds(p, np.zeros_like(y)) == pytest.approx([0.5, 0.5], abs=0.01)


def test_a_class_that_is_not_told_is_not_put_on_every_image() -> None:
    rng = np.random.default_rng(0)
    y = np.stack([np.arange(200) < 100, np.arange(200) % 12 == 0], axis=1)
    p = np.stack([np.where(y[:, 0], 0.7, 0.3), np.full(200, 0.1)], axis=1)
    p += rng.uniform(-0.05, 0.05, p.shape)
    chosen = choose_thresholds(p, y)
    assert chosen[1] == pytest.approx(0.5, abs=0.15)
    assert (p[:, 1] >= chosen[1]).sum() == 0


def test_thresholds_of_val_hold_for_test() -> None:
    p, y = random_labels()
    val = judge(p[:200], y[:200])
    test = judge(p[200:], y[200:], thresholds=val.thresholds)
    assert test.thresholds == val.thresholds
    assert test.per_class["threshold"].tolist() == list(val.thresholds or ())
    own = judge(p[200:], y[200:])
    assert own.metrics["f1_macro"] >= test.metrics["f1_macro"]
    assert own.metrics["map"] == test.metrics["map"]


@pytest.mark.parametrize(
    ("p", "y", "message"),
    [
        (np.full((2, 3), 0.5), np.zeros((2, 2)), r"got \(2, 3\) and \(2, 2\)"),
        (np.full((2, 3), 0.5), np.full((2, 3), 2), "0 or 1"),
        (np.full((2, 3), 3.5), np.ones((2, 3)), "are these logits"),
        (np.zeros((0, 3)), np.zeros((0, 3)), "N > 0"),
    ],
)
def test_what_is_no_prediction_of_several_labels_is_refused(
    p: np.ndarray, y: np.ndarray, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        judge(p, y)


def test_a_split_without_any_label_is_named() -> None:
    with pytest.raises(EvaluationError, match="no image of val has any label"):
        judge(np.full((2, 3), 0.5), np.zeros((2, 3)))


def test_diverged_training_is_named_for_every_task() -> None:
    with pytest.raises(EvaluationError, match=r"probabilities for 1 of 2 images.*diverged"):
        judge(np.array([[np.nan, 0.5], [0.1, 0.2]]), np.ones((2, 2)))
    with pytest.raises(EvaluationError, match=r"values for 1 of 2 images.*diverged"):
        evaluate([np.inf, 1.0], [1.0, 2.0], ["age"], "val", task=Task.regression)


# --- one number ---------------------------------------------------------------------------------


def numbers(images: int = 200, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    t = rng.normal(50, 10, images)
    return t + rng.normal(1, 4, images), t


def test_figures_of_regression_equal_those_of_scikit_learn() -> None:
    v, t = numbers()
    report = evaluate(v, t, ["age"], "test", task=Task.regression, scale=10.0)
    m = report.metrics
    assert m["mae"] == pytest.approx(reference.mean_absolute_error(t, v))
    assert m["rmse"] == pytest.approx(reference.root_mean_squared_error(t, v))
    assert m["r2"] == pytest.approx(reference.r2_score(t, v))
    assert m["loss"] == pytest.approx(reference.mean_squared_error(t, v) / 100)
    assert list(report.flat()) == [
        f"test/{name}{end}" for name in ("mae", "rmse", "r2") for end in ("", "_low", "_high")
    ] + ["test/loss", "test/images"]
    assert report.classes == ("age",)
    assert report.confusion is None
    np.testing.assert_array_equal(report.predicted, v)


def test_intervals_of_regression_equal_those_of_scipy() -> None:
    v, t = numbers()
    m = evaluate(v, t, ["age"], "val", task=Task.regression).metrics

    def r2(a: np.ndarray, b: np.ndarray) -> float:
        return float(reference.r2_score(b, a))

    for name, statistic in (
        ("mae", lambda a, b: np.abs(a - b).mean()),
        ("rmse", lambda a, b: np.sqrt(np.square(a - b).mean())),
        ("r2", r2),
    ):
        ends = stats.bootstrap(
            (v, t), statistic, paired=True, vectorized=False, n_resamples=800,
            method="percentile", rng=np.random.default_rng(3),
        ).confidence_interval  # fmt: skip
        spread = ends.high - ends.low
        assert m[f"{name}_low"] == pytest.approx(ends.low, abs=0.1 * spread)
        assert m[f"{name}_high"] == pytest.approx(ends.high, abs=0.1 * spread)


def test_ranges_of_the_target_show_where_the_errors_are() -> None:
    t = np.arange(100.0)
    v = np.where(t < 80, t, t - 5)
    table = evaluate(v, t, ["age"], "val", task=Task.regression).per_class
    assert table.columns.tolist() == ["from", "to", "images", "mae", "bias"]
    assert table["images"].tolist() == [20] * 5
    assert table["mae"].tolist() == pytest.approx([0, 0, 0, 0, 5])
    assert table["bias"].tolist() == pytest.approx([0, 0, 0, 0, -5])
    assert table["from"].tolist() == [0, 20, 40, 60, 80]


@pytest.mark.parametrize("t", [[3.0], [3.0, 3.0, 3.0]])
def test_where_all_targets_are_the_same_there_is_no_r2(t: list[float]) -> None:
    report = evaluate(np.array(t) + 1, t, ["age"], "val", task=Task.regression)
    assert report.metrics["mae"] == report.metrics["rmse"] == 1
    assert not {name for name in report.metrics if name.startswith("r2")}
    assert report.per_class["images"].tolist() == [len(t)]


def test_a_target_far_from_zero_does_not_spoil_r2() -> None:
    v, t = numbers()
    near, far = (
        evaluate(v + shift, t + shift, ["year"], "val", task=Task.regression).metrics
        for shift in (0, 1e7)
    )
    assert far["r2"] == pytest.approx(near["r2"], rel=1e-6)
    assert far["r2_low"] == pytest.approx(near["r2_low"], rel=1e-6)


@pytest.mark.parametrize(
    ("v", "t", "message"),
    [
        ([[1.0, 3.0], [2.0, 4.0]], [1.0, 2.0], r"got \(2, 2\)"),
        ([], [], "N > 0"),
        ([1.0, 2.0], [1.0, np.nan], "targets must be finite"),
    ],
)
def test_what_is_no_prediction_of_a_number_is_refused(v, t, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(v, t, ["age"], "val", task=Task.regression)


# --- all tasks ----------------------------------------------------------------------------------


def test_the_headline_of_each_task_is_a_metric_with_an_interval() -> None:
    v, t = numbers()
    reports = [
        evaluate(np.eye(3), [0, 1, 2], CLASSES, "val"),
        judge(*random_labels()),
        evaluate(v, t, ["age"], "val", task=Task.regression),
    ]
    assert [headline(r.task) for r in reports] == ["acc", "map", "mae"]
    for report in reports:
        name = headline(report.task)
        m = report.metrics
        assert m[f"{name}_low"] <= m[name] <= m[f"{name}_high"]
    assert [lower_is_better(r.task) for r in reports] == [False, False, True]


def test_predictions_of_several_labels_survive_parquet(tmp_path) -> None:
    rows = pd.DataFrame({"path": ["a.png", "b.png"], "split": "val", "label": [0, -1]})
    p, y = [[0.9, 0.2, 0.6], [0.1, 0.1, 0.2]], [[1, 0, 0], [0, 0, 0]]
    table = predictions_table(
        rows, p, CLASSES, task=Task.multi, targets=y, thresholds=[0.5, 0.5, 0.5]
    )
    assert list(table.columns) == [
        *("path", "split", "labels", "predicted", "correct", "wrong"),
        *("p_cat", "p_dog", "p_bird"),
    ]
    table.to_parquet(tmp_path / "predictions.parquet")
    read = pd.read_parquet(tmp_path / "predictions.parquet")
    assert [list(labels) for labels in read["labels"]] == [["cat"], []]
    assert [list(labels) for labels in read["predicted"]] == [["cat", "bird"], []]
    assert read["correct"].tolist() == [False, True]
    assert read["wrong"].tolist() == [1, 0]
    assert read["p_bird"].tolist() == pytest.approx([0.6, 0.2])


def test_predictions_of_a_number_have_the_error() -> None:
    rows = pd.DataFrame({"path": ["a.png", "b.png"], "split": "test", "label": -1})
    table = predictions_table(rows, [2.5, 3.0], ["age"], task=Task.regression, targets=[2.0, 4.0])
    assert list(table.columns) == ["path", "split", "target", "predicted", "error"]
    assert table["error"].tolist() == [0.5, -1.0]
