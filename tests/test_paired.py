"""Paired statistics: agreement with formulas, coverage and false verdicts by simulation."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom, ttest_rel

from tl.config import Task
from tl.evaluation import (
    PairingError,
    PairSide,
    aligned,
    compare_pair,
    holm,
    not_worse,
    predictions_table,
    sheet_of,
)
from tl.evaluation.paired import draws, p_values


def sides(both: int, only_a: int, only_b: int, neither: int) -> tuple[PairSide, PairSide]:
    a = np.repeat([1.0, 1, 0, 0], [both, only_a, only_b, neither])
    b = np.repeat([1.0, 0, 1, 0], [both, only_a, only_b, neither])
    return PairSide(a), PairSide(b)


def test_mcnemar_is_the_binomial_test_of_the_images_on_which_two_models_differ():
    found = compare_pair(*sides(70, 15, 5, 10), metric="acc")
    assert (found.only_a, found.only_b, found.images) == (15, 5, 100)
    assert found.difference == pytest.approx(0.1)
    assert found.p_value == pytest.approx(2 * binom.cdf(5, 20, 0.5))
    assert found.verdict == "a"
    assert compare_pair(*sides(70, 5, 15, 10), metric="acc").verdict == "b"


def test_the_sample_size_is_that_of_connor():
    found = compare_pair(*sides(85, 7, 3, 5), metric="acc")
    wanted = (1.959964 * math.sqrt(0.1) + 0.841621 * math.sqrt(0.1 - 0.0016)) ** 2 / 0.0016
    assert found.verdict == "none"
    assert found.images_needed == math.ceil(wanted)
    # With as many images of these shares the test does find it in about 80 % of cases.
    rng = np.random.default_rng(0)
    n = found.images_needed
    draws_ = rng.multinomial(n, [0.07, 0.03, 0.9], size=2000)
    p = 2 * binom.cdf(draws_[:, :2].min(axis=1), draws_[:, :2].sum(axis=1), 0.5)
    assert 0.75 < (p < 0.05).mean() < 0.85


def test_models_that_agree_everywhere_have_an_interval_that_is_not_empty():
    found = compare_pair(*sides(30, 0, 0, 0), metric="acc")
    assert (found.p_value, found.verdict, found.images_needed) == (1.0, "none", None)
    assert found.low < 0 < found.high


@pytest.mark.parametrize(
    ("images", "a_alone", "b_alone"), [(30, 0.08, 0.02), (100, 0.05, 0.05), (400, 0.1, 0.05)]
)
def test_intervals_of_accuracy_hold_the_truth_as_often_as_they_say(images, a_alone, b_alone):
    rng, held = np.random.default_rng(1), 0
    for _ in range(600):
        only_a, only_b, rest = rng.multinomial(images, [a_alone, b_alone, 1 - a_alone - b_alone])
        found = compare_pair(*sides(rest, only_a, only_b, 0), metric="acc")
        held += found.low - 1e-9 <= a_alone - b_alone <= found.high + 1e-9
    assert 0.93 <= held / 600 <= 0.995


def test_equal_models_are_told_apart_no_more_often_than_promised():
    rng = np.random.default_rng(2)
    counts = rng.multinomial(300, [0.06, 0.06, 0.88], size=1500)
    told = [
        compare_pair(*sides(rest, a, b, 0), metric="acc").verdict != "none"
        for a, b, rest in counts[:500]
    ]
    assert np.mean(told) <= 0.05


def errors(seed: int, shift: float, images: int = 300) -> tuple[PairSide, PairSide]:
    rng = np.random.default_rng(seed)
    hard = rng.gamma(2, 1, images)
    return (
        PairSide(np.abs(hard + rng.normal(0, 0.5, images))),
        PairSide(np.abs(hard + rng.normal(shift, 0.5, images))),
    )


def test_errors_are_compared_by_the_paired_t_test_and_lower_wins():
    a, b = errors(0, 0.4)
    found = compare_pair(a, b, metric="mae")
    assert found.p_value == pytest.approx(ttest_rel(a.values, b.values).pvalue)
    assert found.verdict == "a"
    assert found.difference < 0
    assert found.low < found.difference < found.high < 0


def test_intervals_of_errors_hold_the_truth():
    many = [errors(seed, 0.1, 3000) for seed in range(40)]
    truth = np.mean([a.values.mean() - b.values.mean() for a, b in many])
    held = 0
    for seed in range(150):
        found = compare_pair(*errors(1000 + seed, 0.1, 100), metric="mae")
        held += found.low <= truth <= found.high
    assert 0.89 <= held / 150 <= 0.99


def ranked(seed: int, noise: float, images: int = 200) -> tuple[PairSide, PairSide]:
    rng = np.random.default_rng(seed)
    truth = rng.random((images, 4)) < 0.3
    scores = [truth * 2.0 + rng.normal(0, n, truth.shape) for n in (1.5, noise)]
    one, other = (PairSide(1 / (1 + np.exp(-s)), truth) for s in scores)
    return one, other


def test_rankings_are_compared_with_the_figure_of_the_report():
    from sklearn.metrics import average_precision_score

    a, b = ranked(0, 2.5)
    found = compare_pair(a, b, metric="map")
    assert found.a == pytest.approx(average_precision_score(a.truth, a.values, average="macro"))
    assert found.verdict == "a"
    assert found.low < found.difference < found.high


def test_equal_rankings_are_told_apart_no_more_often_than_promised():
    told = [compare_pair(*ranked(s, 1.5, 100), metric="map").verdict != "none" for s in range(100)]
    assert np.mean(told) <= 0.11


@pytest.mark.parametrize("metric", ["acc", "mae", "map"])
def test_p_values_of_all_pairs_are_those_of_each_pair(metric):
    made = {
        "acc": lambda s: sides(70 - s, 10 + s, 5, 15)[0],
        "mae": lambda s: errors(s, 0.2)[1],
        "map": lambda s: ranked(s, 2.0)[1],
    }[metric]
    models = [made(seed) for seed in range(3)]
    if metric == "map":
        models = [PairSide(m.values, models[0].truth) for m in models]
    drawn = draws(models, metric) if metric == "map" else None
    found = p_values(models, metric, drawn)
    for i in range(3):
        assert found[i, i] == 1
        for j in range(i):
            one = compare_pair(models[i], models[j], metric=metric)
            assert found[i, j] == found[j, i] == pytest.approx(one.p_value, rel=0.1, abs=1e-12)


def test_holm_is_its_textbook_example():
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]).tolist() == [1, 1]


def test_not_worse_counts_what_few_images_cannot_exclude():
    same = sides(180, 10, 10, 0)
    fits, found = not_worse(*same, 0.01, metric="acc")
    assert not fits  # 200 images leave room for a loss of 3 points
    assert -0.05 < found.low < -0.01
    assert not_worse(*same, 0.06, metric="acc")[0]
    assert not_worse(*sides(9000, 500, 450, 50), 0.01, metric="acc")[0]
    a, b = errors(0, 0.5)
    assert not_worse(a, b, 0.0, metric="mae")[0]
    assert not not_worse(b, a, 0.0, metric="mae")[0]


def test_a_worse_challenger_gets_through_no_more_often_than_promised():
    rng = np.random.default_rng(3)
    counts = rng.multinomial(500, [0.04, 0.05, 0.91], size=400)  # worse by the margin itself
    passed = [not_worse(*sides(r, a, b, 0), 0.01, metric="acc")[0] for a, b, r in counts]
    assert np.mean(passed) <= 0.08


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def table(names, said, truth, classes=("ant", "bee"), split="test") -> pd.DataFrame:
    rows = pd.DataFrame(
        {
            "path": [f"{n}.png" for n in names],
            "split": split,
            "label": truth,
            "sha256": [digest(n) for n in names],
        }
    )
    shares = np.full((len(names), len(classes)), 0.1 / max(len(classes) - 1, 1))
    shares[np.arange(len(names)), said] = 0.9
    return predictions_table(rows, shares, classes)


def test_tables_are_joined_by_images_and_not_by_rows_or_order_of_classes():
    a = table(["x", "y", "z"], [0, 1, 1], [0, 1, 0])
    b = table(["z", "w", "y", "x"], [1, 0, 0, 0], [1, 0, 0, 1], classes=("bee", "ant"))
    found = aligned(a, b, "test")
    order = [digest(n) for n in "xyz"]
    assert sorted(order) == found.sha256.tolist()
    by_name = {
        d: (p, q) for d, p, q in zip(found.sha256, found.a.values, found.b.values, strict=True)
    }
    assert [by_name[d] for d in order] == [(1, 0), (1, 1), (0, 1)]
    assert (found.only_a, found.only_b) == ((), (digest("w"),))


def test_copies_of_an_image_count_once():
    a = table(["x", "y", "x"], [0, 1, 0], [0, 1, 0])
    found = aligned(a, a, "test")
    assert len(found.a) == 2
    assert sheet_of(a, "test").truth.copies == 1


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: table(["x", "y"], [0, 1], [0, 1], classes=("ant", "wasp")), "another class list"),
        (lambda: table(["x", "y"], [0, 1], [1, 1]), "other labels of the same images: x.png"),
        (lambda: table(["v", "w"], [0, 1], [0, 1]), "no test image in common"),
        (lambda: table(["x", "y"], [0, 1], [0, 1], split="val"), "no test images, only val"),
        (lambda: table(["x", "y"], [0, 1], [0, 1]).drop(columns="sha256"), "tl evaluate"),
        (lambda: table(["x", "y"], [0, 1], [0, 1]).assign(sha256=""), "data.check=true"),
        (lambda: pd.DataFrame({"a": [1]}), "no table of predictions"),
    ],
)
def test_tables_that_cannot_be_joined_say_why(other, words):
    with pytest.raises(PairingError, match=words):
        aligned(table(["x", "y"], [0, 1], [0, 1]), other(), "test")


def test_other_tasks_are_joined_too():
    rows = pd.DataFrame({"path": ["x", "y"], "split": "val", "sha256": [digest("x"), digest("y")]})
    rows["label"] = 0
    labels = np.array([[1, 0, 1], [0, 0, 0]])
    shares = np.array([[0.9, 0.2, 0.6], [0.1, 0.3, 0.2]])
    several = predictions_table(
        rows, shares, ["c", "a", "b"], task=Task.multi, targets=labels, thresholds=[0.5] * 3
    )
    sheet = sheet_of(several, "val")
    order = np.argsort([digest("x"), digest("y")])
    assert sheet.truth.classes == ("a", "b", "c")
    assert sheet.side().truth.tolist() == labels[order][:, [1, 2, 0]].astype(bool).tolist()
    assert sheet.side().values == pytest.approx(shares[order][:, [1, 2, 0]])
    numbers = predictions_table(
        rows, np.array([3.0, 5.0]), ["age"], task=Task.regression, targets=np.array([1.0, 6.0])
    )
    found = aligned(numbers, numbers, "val")
    assert found.metric == "mae"
    assert found.a.values.tolist() == np.array([2.0, 1.0])[order].tolist()
