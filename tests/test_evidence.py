"""Evidence from features: probes without leaks, honest errors, scores from their definitions."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import multivariate_normal

from tl.decision.evidence import Amount, Backbone, Evidence
from tl.evidence import Drift, StageFeatures, measure, sample
from tl.evidence.probing import Prober, balanced_mean, cut_folds
from tl.evidence.ridge import Ridge, Scaling, Smoother, class_weights, held_out
from tl.evidence.scores import effective_rank, h_score, leep, logme, rank_scores, spectrum

BACKBONE = Backbone("net", 1, ("stage0", "head"), True, False, True, 64)


def blobs(labels, size, signal, rng):
    centres = rng.normal(size=(labels.max() + 1, size))
    return signal * centres[labels] + rng.normal(size=(len(labels), size))


def measured(labels, features, seed=0, **more):
    counts = np.bincount(labels)
    least, most = int(counts.min()), int(counts.max())
    amount = Amount(len(labels), len(counts), float(np.median(counts)), least, most, 0, 0)
    given = StageFeatures(labels, more.pop("stages", {}), features, **more)
    return measure(given, amount, BACKBONE, seed=seed)


# --- ridge ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [5, 100])
def test_held_out_outputs_are_those_of_a_fit_without_the_fold(size):
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [20, 12, 8])
    weights = class_weights(labels)
    rows = Scaling.of(features := blobs(labels, size, 1.0, rng), weights)(features)
    targets, folds = np.eye(3)[labels], cut_folds(labels, 5, rng)
    outputs, penalties = held_out(Smoother.of(rows, weights), targets, folds)
    for fold, penalty in zip(folds, penalties, strict=True):
        rest = np.setdiff1d(np.arange(40), fold)
        design = np.column_stack([np.ones(40), rows])
        penalties_of = penalty * np.diag([0.0, *np.ones(size)])
        gram = design[rest].T @ (weights[rest, None] * design[rest]) + penalties_of
        fit = np.linalg.solve(gram, design[rest].T @ (weights[rest, None] * targets[rest]))
        np.testing.assert_allclose(outputs[fold], design[fold] @ fit, atol=1e-6)


def test_rows_that_are_judged_have_no_say_in_their_own_outputs():
    rng = np.random.default_rng(1)
    labels = np.arange(60) % 3
    rows = Scaling.of(features := rng.normal(size=(60, 200)), np.ones(60))(features)
    smoother = Smoother.of(rows, np.ones(60))
    folds = cut_folds(labels, 5, rng)
    targets = np.eye(3)[labels]
    changed = targets.copy()
    changed[folds[0]] = changed[folds[0]][:, ::-1] * 7
    before, _ = held_out(smoother, targets, folds)
    after, _ = held_out(smoother, changed, folds)
    np.testing.assert_allclose(before[folds[0]], after[folds[0]], atol=1e-5)


def test_a_small_class_is_not_drowned_by_a_large_one():
    rng = np.random.default_rng(2)
    labels = np.repeat([0, 1], [400, 20])
    features = blobs(labels, 30, 0.5, rng)
    fitted = Ridge.fit(features, labels, 1.0)
    new = np.repeat([0, 1], 500)
    centres = np.random.default_rng(2).normal(size=(2, 30))
    right = fitted(0.5 * centres[new] + rng.normal(size=(1000, 30))) == new
    assert right[new == 1].mean() > 0.85
    assert right[new == 0].mean() > 0.85


# --- probes and their errors ----------------------------------------------------------------------


def test_quality_is_one_for_plain_classes_and_zero_for_noise():
    labels = np.arange(200) % 4
    rng = np.random.default_rng(3)
    clear = Prober({"x": blobs(labels, 20, 9.0, rng)}, labels, 0)
    assert clear.ridge(["x"]).quality.value == clear.neighbours("x").quality.value == 1.0
    assert 0 < clear.ridge(["x"]).quality.error < 0.03
    noise = Prober({"x": rng.normal(size=(200, 20))}, labels, 0)
    for judged in (noise.ridge(["x"]), noise.neighbours("x")):
        assert abs(judged.quality.value) < 3 * judged.quality.error


@pytest.mark.parametrize(("rows", "classes"), [(20, 2), (20, 10), (60, 3), (200, 10)])
def test_noise_is_within_two_errors_of_chance_as_often_as_promised(rows, classes):
    labels = np.arange(rows) % classes
    inside, values = [], []
    for seed in range(40):
        features = np.random.default_rng(seed).normal(size=(rows, 50))
        found = Prober({"x": features}, labels, seed).ridge(["x"]).quality
        inside.append(abs(found.value) <= 2 * found.error)
        values.append(found.value)
    assert np.mean(inside) >= 0.85
    assert abs(np.mean(values)) < 0.06  # no class looks worse than chance by being left out


def test_balanced_mean_counts_classes_and_not_rows():
    labels = np.repeat([0, 1], [90, 10])
    found = balanced_mean((labels == 0).astype(float), labels, (0.0, 1.0))
    assert found.value == 0.5
    few = balanced_mean(np.ones(20), np.arange(20) % 2, (0.0, 1.0))
    many = balanced_mean(np.ones(2000), np.arange(2000) % 2, (0.0, 1.0))
    assert few.value == many.value == 1.0
    assert few.error > 0.03  # twenty that agree are no proof
    assert many.error < 0.001


def test_the_best_of_many_stages_is_no_better_than_the_last_by_luck():
    labels = np.arange(60) % 3
    gaps, naive = [], []
    for seed in range(15):
        rng = np.random.default_rng(seed)
        prober = Prober({f"s{i}": rng.normal(size=(60, 10)) for i in range(6)}, labels, seed)
        judged = {name: prober.ridge([name]) for name in prober.groups}
        gaps.append(prober.depth_gap(judged, "s5").value)
        values = [j.quality.value for j in judged.values()]
        naive.append(max(values[:-1]) - values[-1])
    assert np.mean(naive) > 0.08
    assert abs(np.mean(gaps)) < 0.05


def test_an_earlier_stage_that_is_better_shows_in_gap_and_concat():
    labels = np.arange(300) % 5
    rng = np.random.default_rng(4)
    good, bad = blobs(labels, 16, 0.8, rng), blobs(labels, 64, 0.1, rng)
    found = measured(labels, bad, stages={"stage1": good}).similarity
    assert found.depth_gap.value > 4 * found.depth_gap.error > 0
    assert found.concat_gain.value > 4 * found.concat_gain.error > 0
    assert found.best_stage == "stage1"
    swapped = measured(labels, good, stages={"stage1": bad}).similarity
    assert swapped.depth_gap.value < -4 * swapped.depth_gap.error
    assert abs(swapped.concat_gain.value) < 0.15


def test_wide_stages_do_not_drown_narrow_ones():
    labels = np.arange(200) % 2
    rng = np.random.default_rng(5)
    narrow = blobs(labels, 4, 0.9, rng)
    alone = measured(labels, narrow).similarity.quality
    joined = measured(labels, narrow, stages={"wide": 1e3 * rng.normal(size=(200, 900))}).similarity
    assert joined.concat.value > 0.75 * alone.value > 0.3


def test_more_data_helps_where_features_are_many_and_not_where_classes_are_plain():
    labels = np.arange(400) % 4
    rng = np.random.default_rng(6)
    hard = measured(labels, blobs(labels, 200, 0.2, rng)).amount.more_data
    assert hard is not None
    assert hard.value > hard.error
    plain = measured(labels, blobs(labels, 20, 9.0, rng)).amount.more_data
    assert plain is not None
    assert abs(plain.value) <= plain.error
    assert measured(np.arange(9) % 3, rng.normal(size=(9, 4))).amount.more_data is None


def test_a_third_point_of_the_learning_curve_is_measured_where_a_quarter_is_enough():
    labels = np.arange(400) % 4
    rng = np.random.default_rng(6)
    amount = measured(labels, blobs(labels, 200, 0.2, rng)).amount
    assert amount.half_data.value > amount.half_data.error
    assert amount.half_data.value > amount.more_data.value  # the gains of doublings shrink
    few = np.arange(28) % 4  # seven of each class: a quarter has one
    amount = measured(few, blobs(few, 8, 2.0, rng)).amount
    assert (amount.more_data is None, amount.half_data is None) == (False, True), amount


def test_evidence_of_before_quarters_were_measured_can_be_read():
    labels = np.arange(80) % 4
    found = measured(labels, blobs(labels, 8, 2.0, np.random.default_rng(6)))
    assert found.amount.half_data is not None
    assert Evidence.from_dict(found.to_dict()) == found
    older = found.to_dict()
    del older["amount"]["half_data"]
    assert Evidence.from_dict(older).amount.half_data is None


def test_a_flip_that_swaps_the_classes_is_seen_and_one_that_does_nothing_is_not():
    labels = np.arange(240) % 2
    rng = np.random.default_rng(7)
    features = np.column_stack([np.where(labels, 2.0, -2.0), np.zeros(240)])
    features += rng.normal(size=features.shape)
    flips = {"horizontal": features * [-1, 1], "vertical": features * [1, -1]}
    found = measured(labels, features, flipped=flips).flips
    assert found.horizontal.value < -1
    assert found.horizontal.value < -5 * found.horizontal.error
    assert found.vertical.value == pytest.approx(0, abs=2 * found.vertical.error)


@pytest.mark.parametrize("signal", [0.0, 0.6])
def test_permutations_tell_random_labels_from_true_ones(signal):
    shares = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        labels = np.repeat([0, 1, 2], [50, 30, 10])
        shares.append(measured(labels, blobs(labels, 40, signal, rng), seed).similarity.chance)
    if signal:
        assert max(shares) <= 0.05
    else:
        assert np.mean(shares) > 0.2


# --- odd data -------------------------------------------------------------------------------------


def test_labels_at_random_end_in_a_plain_warning():
    rng = np.random.default_rng(1)
    found = measured(rng.integers(0, 3, 150), rng.normal(size=(150, 30)))
    assert found.similarity.chance > 0.05
    assert any("check the labels" in warning for warning in found.warnings)


@pytest.mark.parametrize(
    ("labels", "features", "reason"),
    [
        (np.arange(5), np.eye(5), "fewer than two classes"),
        (np.zeros(9, int), np.eye(9), "fewer than two classes"),
        (np.arange(12) % 2, np.ones((12, 6)), "no difference between any two images"),
        (np.arange(12) % 2, np.full((12, 6), np.nan), "not finite"),
    ],
)
def test_what_cannot_be_measured_says_why(labels, features, reason):
    found = measured(labels, features)
    assert found.similarity is None
    assert reason in found.unmeasured


@pytest.mark.parametrize(
    "labels",
    [
        np.array([0, 0, 1, 1]),
        np.array([0, 0, 1, 1, 2]),
        np.repeat(np.arange(40), 2),
        np.repeat([0, 1, 2, 5], [50, 2, 3, 1]),
        np.arange(21) % 2,
    ],
    ids=["two each", "one alone", "many classes", "imbalanced", "odd"],
)
def test_few_and_uneven_images_give_finite_figures(labels):
    rng = np.random.default_rng(8)
    features = blobs(labels, 24, 1.0, rng)
    features[:, 3] = 7.0  # a dead channel
    found = measured(
        labels,
        features,
        stages={"stage0": rng.normal(size=(len(labels), 3))},
        flipped={"horizontal": features, "vertical": features},
        logits=rng.normal(size=(len(labels), 11)),
        drift=Drift(0.1, 0.02, 0.01),
    )
    text = json.dumps(found.to_dict(), allow_nan=False)  # refuses NaN and infinities
    assert Evidence.from_dict(json.loads(text)) == found
    assert found.similarity.quality.error > 0
    assert found.similarity.drift == 0.1
    assert set(found.scores) == {"logme", "h_score", "leep"}


def test_cores_change_no_figure(monkeypatch):
    rng, labels = np.random.default_rng(23), np.arange(300) % 3
    features, stage = blobs(labels, 200, 0.2, rng), blobs(labels, 20, 0.3, rng)
    given = {
        "stages": {"stage1": stage},
        "flipped": dict.fromkeys(("horizontal", "vertical"), features[:64, ::-1]),
        "logits": rng.normal(size=(300, 10)),
    }
    several = measured(labels, features, **given)
    monkeypatch.setenv("TL_CORES", "1")
    assert replace(several, seconds={}) == replace(measured(labels, features, **given), seconds={})


# --- sample ---------------------------------------------------------------------------------------


def test_the_sample_keeps_small_classes_whole_and_large_ones_even():
    labels = np.repeat([0, 1, 2], [5000, 4000, 30])
    rows = sample(labels, seed=0, most=1000)
    counts = np.bincount(labels[rows])
    assert counts[2] == 30
    assert abs(counts[0] - counts[1]) <= 1
    assert 980 <= len(rows) <= 1000
    assert len(set(rows)) == len(rows)
    np.testing.assert_array_equal(rows, sample(labels, seed=0, most=1000))
    assert set(rows) != set(sample(labels, seed=1, most=1000))


def test_of_very_many_classes_some_are_measured_well():
    counts = np.bincount(np.repeat(np.arange(1000), 50)[sample(np.repeat(np.arange(1000), 50), 0)])
    assert set(counts[counts > 0]) == {5}
    every = np.repeat(np.arange(1000), 2)
    assert len(sample(every, 0)) == 2000


# --- scores ---------------------------------------------------------------------------------------


def test_logme_is_the_largest_evidence_that_a_search_finds():
    rng = np.random.default_rng(9)
    features = rng.normal(size=(40, 6))
    target = features @ rng.normal(size=6) * 0.3 + rng.normal(size=40)

    def negative(logs):
        a, b = np.exp(logs)
        covariance = np.eye(40) / b + features @ features.T / a
        return -multivariate_normal(np.zeros(40), covariance).logpdf(target)

    best = minimize(negative, [0.0, 0.0], method="Nelder-Mead")
    found = logme(*spectrum(features), target[:, None])
    assert found == pytest.approx(-best.fun / 40, abs=1e-4)


def test_h_score_is_the_shrunk_trace_of_its_definition():
    rng = np.random.default_rng(10)
    labels = np.arange(90) % 3
    rows = blobs(labels, 7, 1.0, rng)
    rows -= rows.mean(axis=0)
    targets = np.eye(3)[labels]
    from sklearn.covariance import LedoitWolf

    fitted = LedoitWolf(assume_centered=True).fit(rows)
    means = targets @ (targets.T @ rows / targets.sum(axis=0)[:, None])
    wanted = np.trace(np.linalg.pinv(fitted.covariance_) @ (means.T @ means / 90))
    vectors, values = spectrum(rows)
    found = h_score(rows, vectors, values, targets)
    assert found == pytest.approx((1 - fitted.shrinkage_) * wanted)


def test_leep_of_a_head_that_knows_the_classes_is_near_zero():
    labels = np.arange(30) % 3
    sure = 50 * np.eye(8)[labels + 4]
    assert leep(sure, labels) == pytest.approx(0, abs=1e-6)
    assert leep(np.zeros((30, 8)), labels) == pytest.approx(np.log(1 / 3))


def test_effective_rank_counts_directions():
    assert effective_rank(np.ones(7)) == pytest.approx(7)
    assert effective_rank(np.array([1.0, 0.0])) == pytest.approx(1)
    assert effective_rank(np.zeros(3)) == 0


def test_scores_rise_with_the_signal():
    labels = np.arange(300) % 5
    weak, strong = (
        rank_scores(blobs(labels, 40, signal, np.random.default_rng(0)), labels)
        for signal in (0.1, 1.0)
    )
    assert strong["logme"] > weak["logme"]
    assert strong["h_score"] > weak["h_score"]
