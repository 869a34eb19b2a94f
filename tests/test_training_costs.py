"""Whether the activation cache pays is a sum that can be checked by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tl.training.costs import PhaseCosts, decide, human_seconds, worth_finding

COSTS = PhaseCosts(
    epochs=10,
    train_images=100,
    val_images=50,
    views=3,
    missing=350,
    whole_train=0.05,
    whole_eval=0.04,
    prefix=0.03,
    suffix_train=0.02,
    suffix_eval=0.01,
    bytes_per_view=1000,
    disk_free=10**9,
    limit=10**9,
)


def test_seconds_and_bytes():
    assert COSTS.uncached == pytest.approx(10 * (100 * 0.05 + 50 * 0.04))
    assert COSTS.cached == pytest.approx(350 * 0.03 + 10 * (100 * 0.02 + 50 * 0.01))
    assert COSTS.bytes == 350_000
    assert COSTS.new_bytes == 350_000
    assert replace(COSTS, missing=0).new_bytes == 0


@pytest.mark.parametrize(
    ("changes", "use", "text"),
    [
        ({}, True, "35.5 s instead of 1 min 10 s for 10 epochs"),
        ({"epochs": 2}, False, "it would take 15.5 s instead of 14.0 s"),
        ({"epochs": 2, "missing": 0}, True, "5.0 s instead of 14.0 s"),
        ({"disk_free": 100_000}, False, "the disk has 100 kB free"),
        ({"limit": 100_000}, False, "more than cache.max_gb allows (100 kB)"),
        ({"disk_free": 100_000, "missing": 0}, True, "instead of"),
        # norm layers alone: the frontier is early, and nearly all is above it
        ({"suffix_train": 0.049, "suffix_eval": 0.039}, False, "it would take"),
    ],
)
def test_the_decision_and_its_reason(changes, use, text):
    decision = decide(replace(COSTS, **changes), forced=False)
    assert decision.use is use
    assert text in decision.reason


def test_forced_the_seconds_do_not_matter_but_the_bytes_do():
    assert decide(replace(COSTS, epochs=1), forced=True).use
    assert not decide(replace(COSTS, disk_free=10), forced=True).use


def test_short_phases_are_not_worth_the_search():
    assert not worth_finding(1.0)
    assert worth_finding(60.0)
    assert human_seconds(250) == "4 min 10 s"
