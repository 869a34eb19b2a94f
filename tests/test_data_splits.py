"""The split by content: stable, even over classes, copies together, no class left empty."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from tl.data.splits import content_share, split_by_content, unsplittable


def hashes(count, salt=""):
    return [hashlib.sha256(f"{salt}{i}".encode()).hexdigest() for i in range(count)]


def test_share_is_pinned():
    # Another value would move images between the splits of everyone's folders.
    assert content_share("00" * 32, seed=0) == pytest.approx(0.3902741210, abs=1e-9)
    assert content_share("00" * 32, seed=1) != content_share("00" * 32, seed=0)


def test_fraction_holds_in_every_class():
    images = hashes(6000)
    labels = [i % 3 for i in range(6000)]
    val = split_by_content(images, labels, 0.2, seed=0)
    for label in range(3):
        # Four standard deviations of a binomial with n=2000, p=0.2.
        assert val[np.array(labels) == label].mean() == pytest.approx(0.2, abs=0.036)


def test_images_keep_their_split_when_others_arrive_leave_or_change_places():
    few, many = hashes(300), hashes(900)[::-1]
    before = dict(zip(few, split_by_content(few, [0] * 300, 0.3, 7), strict=True))
    after = dict(zip(many, split_by_content(many, [0] * 900, 0.3, 7), strict=True))
    assert all(after[digest] == before[digest] for digest in few)
    assert len(set(before.values())) == 2


def test_another_seed_gives_another_split():
    images = hashes(200)
    one, two = (split_by_content(images, [0] * 200, 0.5, seed) for seed in (0, 1))
    assert 50 < (one != two).sum() < 150


@pytest.mark.parametrize("seed", range(20))
def test_copies_with_different_labels_stay_together(seed):
    images = hashes(12)
    # Images 0 and 1 stand in both classes.
    digests, labels = [*images, images[0], images[1]], [0] * 6 + [1] * 6 + [1, 1]
    val = split_by_content(digests, labels, 0.2, seed)
    assert val[0] == val[12]
    assert val[1] == val[13]
    assert unsplittable(val, labels) == []


@pytest.mark.parametrize("fraction", [1e-9, 0.9])
def test_small_classes_get_at_least_one_image_on_each_side(fraction):
    labels = [0, 0, 1, 1, 2, 2, 2]
    for seed in range(30):
        val = split_by_content(hashes(7), labels, fraction, seed)
        for label in range(3):
            assert set(val[np.array(labels) == label]) == {True, False}
    if fraction == 1e-9:
        assert val.sum() == 3


def test_classes_that_cannot_be_split_are_named():
    one, two, three = hashes(3)
    digests, labels = [one, one, two, three], [0, 0, 1, 1]
    assert unsplittable(split_by_content(digests, labels, 0.5, 0), labels) == [0]


def test_moving_an_image_never_empties_another_class():
    shared, one, two = hashes(3)
    digests, labels = [shared, one, shared, two], [0, 0, 1, 1]
    for seed in range(200):
        assert unsplittable(split_by_content(digests, labels, 0.5, seed), labels) == []
