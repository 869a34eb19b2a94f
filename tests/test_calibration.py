"""Temperatures, sure answers, groups, rankings: what scores are worth beyond being right."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, softmax
from scipy.stats import binom
from sklearn import metrics as reference

from tl.config import Task
from tl.evaluation import (
    Temperature,
    accuracy_interval,
    calibration_error,
    choose_abstain,
    evaluate,
    fit_temperature,
    probabilities,
    wilson,
)
from tl.evaluation.groups import by_group, worst_group
from tl.evaluation.ranking import rank


def drawn(images: int, classes: int, heat: float, seed: int = 0, *, spread: float = 4.0):
    """Logits that are `heat` times too large for the labels that are drawn by them."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(images, classes)) * spread
    p = softmax(z, axis=1)
    return heat * z, (p.cumsum(axis=1) > rng.random((images, 1))).argmax(axis=1)


def names(count: int) -> list[str]:
    return [f"class {i}" for i in range(count)]


@pytest.mark.parametrize("heat", [0.6, 1.0, 2.0])
def test_the_temperature_is_what_the_logits_were_multiplied_by(heat):
    z, y = drawn(3000, 5, heat)
    assert fit_temperature(z, y, Task.single).value == pytest.approx(heat, rel=0.1)


@pytest.mark.parametrize("heat", [0.6, 2.0])
def test_the_temperature_of_several_labels_is_found_too(heat):
    rng = np.random.default_rng(0)
    z = 2 * rng.normal(size=(1000, 4))
    y = (rng.random((1000, 4)) < expit(z)).astype(int)
    assert fit_temperature(heat * z, y, Task.multi).value == pytest.approx(heat, rel=0.1)


def test_a_temperature_makes_the_scores_of_other_images_true():
    z, y = drawn(500, 5, 2.5)
    found = fit_temperature(z, y, Task.single)
    z, y = drawn(4000, 5, 2.5, seed=1)
    p = probabilities(z, Task.single, found.value)
    m = evaluate(p, y, names(5), "test", temperature=found).metrics
    raw = probabilities(z, Task.single)
    assert m["ece"] < 0.03 < 0.1 < m["ece_uncalibrated"]
    assert m["ece_uncalibrated"] == pytest.approx(
        calibration_error(raw.max(axis=1), raw.argmax(axis=1) == y), abs=1e-9
    )
    assert m["loss"] == pytest.approx(reference.log_loss(y, raw, labels=range(5)), rel=1e-6)
    assert m["log_loss"] == pytest.approx(reference.log_loss(y, p, labels=range(5)), rel=1e-6)
    assert m["log_loss_high"] < m["loss"]
    assert m["brier"] == pytest.approx(np.square(p - np.eye(5)[y]).sum(axis=1).mean())


def test_few_images_and_numbers_have_no_temperature():
    z, y = drawn(29, 3, 3.0)
    found = fit_temperature(z, y, Task.single)
    assert found.value == 1
    assert found.note == "not fitted: 29 images of val are too few, 30 are needed"
    assert fit_temperature(z[:, :1], y, Task.regression).value == 1


def test_a_network_that_is_right_on_all_of_val_is_not_made_sure_without_end():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 40)
    z = 2.0 * np.eye(2)[y] + 0.1 * rng.normal(size=(40, 2))
    assert 0.2 < fit_temperature(z, y, Task.single).value < 1


def test_no_temperature_is_used_where_it_does_not_help_left_out_images():
    used = 0
    for seed in range(20):
        z, y = drawn(60, 3, 1.0, seed)
        found = fit_temperature(z, y, Task.single)
        used += found.value != 1
        if found.value == 1:
            assert found.note == "not used: no temperature makes the 60 images of val more likely"
    assert used < 15


def test_val_is_judged_by_temperatures_that_did_not_see_the_image():
    z, y = drawn(200, 5, 2.0)
    found = fit_temperature(z, y, Task.single)
    assert len(set(found.per_image.round(9))) == 5
    p = probabilities(z, Task.single, found.value)
    settings = {"temperature": found, "chose_temperature": True}
    m = evaluate(p, y, names(5), "val", **settings).metrics
    honest = probabilities(z, Task.single, found.per_image)
    assert m["log_loss"] == pytest.approx(reference.log_loss(y, honest, labels=range(5)), rel=1e-6)
    # What a person sees of an image, its class, is that of the bundle.
    assert m["acc"] == evaluate(p, y, names(5), "val").metrics["acc"]
    assert m["auc"] == pytest.approx(evaluate(p, y, names(5), "val").metrics["auc"], abs=1e-12)


@pytest.mark.parametrize(("spread", "precision"), [(6, 0.95), (4, 0.9), (2, 0.8)])
def test_sure_answers_have_the_precision_that_was_promised(spread, precision):
    """Over many draws of val the promise is broken in at most 5 of 100."""
    big, labels = drawn(40_000, 3, 1.0, 99, spread=spread)
    p = probabilities(big, Task.single)
    scores, right = p.max(axis=1), p.argmax(axis=1) == labels
    rng = np.random.default_rng(0)
    broken, found = 0, 0
    for _ in range(200):
        i = rng.integers(len(big), size=300)
        chosen = choose_abstain(scores[i], right[i], precision)
        if chosen.threshold is None:
            continue
        found += 1
        broken += right[scores >= chosen.threshold].mean() < precision
    assert found > 20
    assert broken <= binom.ppf(0.999, 200, 0.05)


def test_a_threshold_takes_all_images_of_one_score_and_says_how_many():
    scores = np.repeat([0.9, 0.6, 0.4], [120, 60, 20])
    right = np.ones(200, bool)
    right[120:] = False
    found = choose_abstain(scores, right, 0.95)
    assert found.threshold == 0.75
    assert "right in at least 95 % of images like those of val" in found.note
    assert found.note.endswith("60 % of val")
    assert choose_abstain(scores, np.ones(200, bool), 0.95).threshold == 0


def test_no_threshold_is_promised_by_few_images():
    found = choose_abstain(np.linspace(0.5, 1, 40), np.ones(40, bool), 0.95)
    assert found.threshold is None
    words = "40 images of val guarantee 95 % for no score (of the surest half 100.0 % are right)"
    assert found.note == words


def test_the_report_counts_sure_answers():
    p = np.array([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.3, 0.7]])
    found = choose_abstain(np.linspace(0.5, 1, 40), np.ones(40, bool), 0.95)
    none = evaluate(p, [0, 1, 1, 1], ["ant", "bee"], "test", abstain=found)
    assert none.metrics["sure_share"] == 0
    assert "sure_acc" not in none.metrics
    found = type(found)(0.5, 0.7)
    some = evaluate(p, [0, 1, 1, 1], ["ant", "bee"], "test", abstain=found).metrics
    assert (some["sure_share"], some["sure_acc"]) == (3 / 4, 2 / 3)
    assert (some["sure_acc_low"], some["sure_acc_high"]) == accuracy_interval(2, 3)


def test_wilsons_formula_gives_what_scipy_gives():
    hits, images = np.array([0, 3, 10, 144, 0]), np.array([5, 7, 10, 153, 0])
    low, high = wilson(hits, images)
    for place in range(4):
        wanted = accuracy_interval(int(hits[place]), int(images[place]))
        assert (low[place], high[place]) == pytest.approx(wanted)
    assert np.isnan([low[4], high[4]]).all()


def test_the_worst_group_has_an_interval_for_all_groups_and_is_not_a_small_one():
    right = np.repeat([1.0, 0.0, 1.0, 0.0], [45, 5, 12, 8])
    groups = ["cow 1"] * 50 + ["cow 2"] * 20 + [None] * 0
    table = by_group(np.append(right, 0.0), [*groups, "cow 3"])
    assert table["group"].tolist() == ["cow 1", "cow 2", "cow 3"]
    assert table["images"].tolist() == [50, 20, 1]
    assert table["small"].tolist() == [False, False, True]
    found = worst_group(table, "acc", lowest=True)
    assert found["worst_group_acc"] == 0.6
    assert (found["worst_group_images"], found["groups"]) == (20, 3)
    low, high = accuracy_interval(12, 20, 1 - 0.05 / 3)
    assert (found["worst_group_acc_low"], found["worst_group_acc_high"]) == pytest.approx(
        (low, high)
    )


def test_groups_of_each_task_are_judged():
    rng = np.random.default_rng(0)
    groups = pd.Series(np.repeat(["a", "b"], 50))
    error = np.where(groups == "b", 3.0, 1.0) * rng.normal(size=100)
    t = rng.normal(size=100)
    m = evaluate(t + error, t, ["age"], "test", task=Task.regression, groups=groups).metrics
    assert m["worst_group_mae"] == pytest.approx(np.abs(error[50:]).mean())
    assert m["worst_group_mae_low"] < m["worst_group_mae"] < m["worst_group_mae_high"]
    y = rng.random((100, 3)) < 0.3
    p = np.where(y, 0.9, 0.1)
    p[50:60] = 1 - p[50:60]
    report = evaluate(p, y, names(3), "test", task=Task.multi, groups=groups, thresholds=[0.5] * 3)
    assert report.metrics["worst_group_hamming"] == pytest.approx(0.2)
    nobody = pd.Series([None] * 100, dtype=object)
    assert evaluate(p, y, names(3), "test", task=Task.multi, groups=nobody).groups is None


def test_rankings_are_those_of_scikit_learn_and_their_intervals_those_of_draws():
    rng = np.random.default_rng(3)
    y = rng.integers(0, 4, 200)
    scores = np.round(rng.normal(size=(200, 4)) + np.eye(4)[y], 1)  # with ties
    present = np.eye(4, dtype=bool)[y]
    found = rank(scores, present)
    assert found.means["auc"] == pytest.approx(reference.roc_auc_score(present, scores))
    assert found.means["ap"] == pytest.approx(reference.average_precision_score(present, scores))
    draws = []
    for _ in range(400):
        i = rng.integers(200, size=200)
        area = reference.roc_auc_score(present[i], scores[i])
        draws.append((area, reference.average_precision_score(present[i], scores[i])))
    for place, name in enumerate(("auc", "ap")):
        low, high = np.quantile([draw[place] for draw in draws], [0.025, 0.975])
        width = found.means[f"{name}_high"] - found.means[f"{name}_low"]
        assert width == pytest.approx(high - low, rel=0.2)
        assert found.means[f"{name}_low"] == pytest.approx(low, abs=0.025)


def test_intervals_of_a_report_are_those_of_draws():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 7, 300)
    p = softmax(rng.normal(size=(300, 7)) + 2 * np.eye(7)[y], axis=1)
    report = evaluate(p, y, names(7), "test")
    m, predicted = report.metrics, p.argmax(axis=1)
    figures = {
        "f1_macro": lambda i: reference.f1_score(y[i], predicted[i], average="macro"),
        "f1_weighted": lambda i: reference.f1_score(y[i], predicted[i], average="weighted"),
        "balanced_acc": lambda i: reference.balanced_accuracy_score(y[i], predicted[i]),
        "log_loss": lambda i: reference.log_loss(y[i], p[i], labels=range(7)),
        "top5": lambda i: reference.top_k_accuracy_score(y[i], p[i], k=5, labels=range(7)),
    }
    drawn_images = [rng.integers(300, size=300) for _ in range(300)]
    for name, figure in figures.items():
        assert m[name] == pytest.approx(figure(np.arange(300)))
        low, high = np.quantile([figure(i) for i in drawn_images], [0.025, 0.975])
        assert (m[f"{name}_low"], m[f"{name}_high"]) == pytest.approx((low, high), abs=0.02)
    assert m["ece_low"] <= m["ece"] <= m["ece_high"]
    row = report.per_class.iloc[2]
    hits, images = int((predicted[y == 2] == 2).sum()), int((y == 2).sum())
    assert (row["recall_low"], row["recall_high"]) == pytest.approx(accuracy_interval(hits, images))
    assert row["f1_low"] < row["f1"] < row["f1_high"]


def test_ten_thousand_images_of_a_hundred_classes_are_judged_within_seconds():
    import time

    rng = np.random.default_rng(0)
    y = rng.integers(0, 100, 10_000)
    p = softmax(rng.normal(size=(10_000, 100)) + 2 * np.eye(100)[y], axis=1)
    began = time.process_time()
    evaluate(p, y, names(100), "test", temperature=Temperature(1.2, "as asked"))
    # Of processor time, of all threads: 2 s of it are about 1 s on an idle machine.
    assert time.process_time() - began < 6
