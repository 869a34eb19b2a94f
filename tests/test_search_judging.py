"""How far a ranking can be trusted: edges, noise, luck; and what the samplers propose."""

from __future__ import annotations

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from tl.config import Task
from tl.search.errors import TrialsError
from tl.search.judging import corrected, judge
from tl.search.packing import pack, unpack
from tl.search.samplers import RandomSampler, box, grid_cells
from tl.search.space import Dimension
from tl.search.trying import check

RATE = Dimension("finetune.head_lr", (), 1e-4, 1.0, log=True)
DECAY = Dimension("finetune.weight_decay", (), 0.0, 1.0)
SPACE = (RATE, DECAY)
UP = "maximize"


def study_of(trials, direction=UP):
    """A study in memory; each trial is (head_lr, weight_decay, accuracy, attributes)."""
    study = optuna.create_study(direction=direction)
    for rate, decay, right, attrs in trials:
        scores = np.zeros(1000)
        scores[: round(1000 * right)] = 1
        study.add_trial(
            create_trial(
                params={RATE.key: rate, DECAY.key: decay},
                distributions={
                    RATE.key: FloatDistribution(1e-4, 1.0, log=True),
                    DECAY.key: FloatDistribution(0.0, 1.0),
                },
                value=right,
                user_attrs={"scores": pack(scores), "loss": 1 - right, **attrs},
            )
        )
    return study


def judged(study, **options):
    done = study.get_trials()
    return judge(study, done, SPACE, metric="val/acc", task=Task.single, **options)


def test_a_clear_winner_in_the_middle_has_no_warnings():
    found = judged(study_of([(0.001, 0.5, 0.7, {"kind": "given"}), (0.01, 0.4, 0.9, {})]))
    assert (found.best.number, found.given.number) == (1, 0)
    assert found.tied == {0: False}
    assert found.against_given.verdict == "a"
    assert found.against_given.difference == pytest.approx(0.2)
    assert found.warnings == ()


def test_a_best_at_an_edge_is_told_with_the_way_beyond():
    found = judged(study_of([(0.001, 0.5, 0.7, {}), (0.9, 0.0, 0.9, {})]))
    (warning,) = found.warnings  # nothing is below no weight decay
    assert warning.startswith("finetune.head_lr=0.9 is at the upper edge of what was searched (1)")
    assert "search.space.finetune.head_lr={low:0.0001,high:10,log:true} looks there" in warning


def test_differences_within_the_noise_are_told():
    trials = [(0.001, 0.5, 0.9, {"kind": "given"}), (0.01, 0.4, 0.901, {}), (0.02, 0.4, 0.5, {})]
    found = judged(study_of(trials))
    assert found.tied == {0: True, 2: False}
    assert found.warnings[0].startswith("1 of 2 other trials cannot be told from the best one")
    assert "cannot be shown: difference +0.1 points" in found.warnings[1]
    assert "images would show it" in found.warnings[1]


def test_many_trials_on_few_images_are_told_and_corrected():
    rng = np.random.default_rng(0)
    study = optuna.create_study(direction=UP)
    for _ in range(30):
        scores = rng.integers(0, 2, 100).astype(float)  # all of them guess
        attrs = {"scores": pack(scores), "loss": 0.7}
        study.add_trial(create_trial(value=float(scores.mean()), user_attrs=attrs))
    found = judge(study, study.get_trials(), (), metric="val/acc", task=Task.single)
    assert found.best.value > 0.57
    assert found.corrected == pytest.approx(0.5, abs=0.04)
    (text,) = [w for w in found.warnings if "trials were compared on" in w]
    assert text.startswith("30 trials were compared on 100 images, one for each 3")
    assert "at most 5 trials would do, or more images" in text
    assert corrected([np.ones(4)]) is None


def test_ties_go_to_the_lower_loss_and_parts_of_the_epochs_do_not_win():
    trials = [
        (0.01, 0.5, 0.9, {"loss": 0.4}),
        (0.02, 0.5, 0.9, {"loss": 0.3}),
        (0.03, 0.5, 0.95, {"share": 0.5}),
    ]
    found = judged(study_of(trials))
    assert [t.number for t in found.ranked] == [1, 0]
    assert judged(optuna.create_study()) is None


def test_scores_as_text():
    right = np.array([1.0, 0, 0, 1, 1, 0, 1, 1, 1])
    assert unpack(pack(right)).tolist() == right.tolist()
    errors = np.array([-0.5, -2.25])
    assert unpack(pack(errors)).tolist() == errors.tolist()
    assert len(pack(np.ones(8000))) < 1400


def test_fine_trials_stay_around_the_best_coarse_ones():
    coarse = [(10.0**-n, 0.1 * n, 1 - 0.2 * abs(n - 2), {"kind": "coarse"}) for n in range(5)]
    study = study_of(coarse)
    sampler = RandomSampler(SPACE, seed=0)

    def draw(kind: str, number: int) -> float:
        trial = create_trial(state=TrialState.RUNNING, user_attrs={"kind": kind})
        trial.number = number
        return sampler.sample_independent(study, trial, RATE.key, FloatDistribution(1e-4, 1.0))

    low, high = box(RATE, [1e-2, 1e-1])
    fine = [draw("fine", n) for n in range(5, 60)]
    assert all(RATE.at(low) <= value <= RATE.at(high) for value in fine)
    assert max(fine) / min(fine) > 10
    anywhere = [draw("coarse", n) for n in range(200)]
    assert min(anywhere) < 5e-4
    assert max(anywhere) > 0.3
    assert np.median(anywhere) == pytest.approx(0.01, rel=0.6)  # by the logarithm
    # Another worker would draw the same.
    assert RandomSampler(SPACE, seed=0).space == sampler.space
    assert [draw("coarse", n) for n in range(5)] == anywhere[:5]


def test_a_box_is_never_wider_than_half_of_the_range():
    low, high = box(RATE, [1e-2, 1.0, 1e-4])
    assert (low, high) == pytest.approx((0.25, 0.75))
    assert box(RATE, [1.0, 1.0])[1] == 1.0
    assert box(RATE, []) == (0.0, 1.0)


def test_a_grid_has_each_cell_once():
    space = (RATE, Dimension("augment", ("none", "light")))
    cells = grid_cells(space, 3, seed=0)
    assert len(cells) == 6
    assert {c[RATE.key] for c in cells} == {1e-4, 0.01, 1.0}
    assert cells != sorted(cells, key=str)


def test_a_search_whose_trials_all_fail_stops():
    def failed(error: str):
        return create_trial(state=TrialState.FAIL, user_attrs={"error": error})

    trials = [failed("no memory"), failed("x")]
    check(trials)
    with pytest.raises(TrialsError, match="all of the first 3 trials failed; the first: no memory"):
        check([*trials, failed("x")])
    check([*trials, failed("x"), create_trial(value=1.0)])
