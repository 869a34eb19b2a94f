"""The split by content: stable, even over classes, whole groups, no class left empty."""

from __future__ import annotations

import hashlib

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from tl.config import DataConfig, Task
from tl.data import read_table
from tl.data.splits import assign_splits
from tl.data.units import content_share

LISTS = pd.ArrowDtype(pa.list_(pa.int32()))


def hashes(count, salt=""):
    return [hashlib.sha256(f"{salt}{i}".encode()).hexdigest() for i in range(count)]


def frame(digests, labels, splits=None, groups=None):
    """A table as the readers hand it over."""
    several = isinstance(labels, list) and any(isinstance(label, list) for label in labels)
    columns = {
        "path": [f"{i}.png" for i in range(len(digests))],
        "sha256": digests,
        "split": splits or [None] * len(digests),
        "label": np.array([label[0] if label else -1 for label in labels] if several else labels),
    }
    if several:
        columns["labels"] = pd.Series(labels, dtype=LISTS)
    if groups is not None:
        columns["group"] = groups
    return pd.DataFrame(columns)


def assign(table, task=Task.single, *, fraction=0.2, seed=0, **more):
    classes = [f"c{i}" for i in range(10)]
    return assign_splits(
        table, task=task, classes=classes, val_fraction=fraction, seed=seed, **more
    )


def in_val(digests, labels, fraction, seed=0, **more):
    return np.asarray(assign(frame(digests, labels), fraction=fraction, seed=seed, **more)[0]) == (
        "val"
    )


# --- val by content -----------------------------------------------------------------------------


def test_share_is_pinned():
    # Another value would move images between the splits of everyone's folders.
    assert content_share("00" * 32, seed=0) == pytest.approx(0.3902741210, abs=1e-9)
    assert content_share("00" * 32, seed=1) != content_share("00" * 32, seed=0)


def test_fraction_holds_in_every_class():
    labels = [i % 3 for i in range(6000)]
    val = in_val(hashes(6000), labels, 0.2)
    for label in range(3):
        # Four standard deviations of a binomial with n=2000, p=0.2.
        assert val[np.array(labels) == label].mean() == pytest.approx(0.2, abs=0.036)


def test_images_keep_their_split_when_others_arrive_leave_or_change_places():
    few, many = hashes(300), hashes(900)[::-1]
    before = dict(zip(few, in_val(few, [0] * 300, 0.3, 7), strict=True))
    after = dict(zip(many, in_val(many, [0] * 900, 0.3, 7), strict=True))
    assert all(after[digest] == before[digest] for digest in few)
    assert len(set(before.values())) == 2


def test_another_seed_gives_another_split():
    one, two = (in_val(hashes(200), [0] * 200, 0.5, seed) for seed in (0, 1))
    assert 50 < (one != two).sum() < 150


@pytest.mark.parametrize("seed", range(20))
def test_copies_with_different_labels_stay_together(seed):
    images = hashes(12)
    # Images 0 and 1 stand in both classes.
    digests, labels = [*images, images[0], images[1]], [0] * 6 + [1] * 6 + [1, 1]
    splits, _, problems = assign(frame(digests, labels), seed=seed)
    assert splits[0] == splits[12]
    assert splits[1] == splits[13]
    assert problems == []


@pytest.mark.parametrize("fraction", [1e-9, 0.9])
def test_small_classes_get_at_least_one_image_on_each_side(fraction):
    labels = [0, 0, 1, 1, 2, 2, 2]
    for seed in range(30):
        val = in_val(hashes(7), labels, fraction, seed)
        for label in range(3):
            assert set(val[np.array(labels) == label]) == {True, False}
    if fraction == 1e-9:
        assert val.sum() == 3


def test_classes_that_cannot_be_split_are_named():
    one, two, three = hashes(3)
    found = assign(frame([one, one, two, three], [0, 0, 1, 1]), fraction=0.5)
    assert found.problems == [
        "there is no val, and c0 cannot be split into train and val: each class needs at least two "
        "different images of its own"
    ]


def test_moving_an_image_never_empties_another_class():
    shared, one, two = hashes(3)
    table = frame([shared, one, shared, two], [0, 0, 1, 1])
    for seed in range(200):
        assert assign(table, fraction=0.5, seed=seed).problems == []


def test_without_contents_the_name_decides():
    table = frame([""] * 400, [0] * 400)
    found = assign(table)
    first = np.asarray(found.splits)
    assert found.notes[0].endswith("for val, chosen by name and seed 0")
    assert 50 < (first == "val").sum() < 110
    assert (np.asarray(assign(table[::-1]).splits)[::-1] == first).all()


def test_the_same_images_as_before_there_were_folds_and_groups():
    # The rule of the first version: a share below the fraction.
    digests = hashes(500)
    expected = [content_share(digest, 3) < 0.25 for digest in digests]
    assert in_val(digests, [i % 2 for i in range(500)], 0.25, 3).tolist() == expected


# --- given splits -------------------------------------------------------------------------------


def test_given_splits_are_kept():
    splits = ["train"] * 60 + ["val"] * 20 + ["test"] * 20
    found = assign(frame(hashes(100), [0, 1] * 50, splits), test_fraction=0.3)
    assert list(found.splits) == splits
    assert found.notes == [
        "data.test_fraction is not used: the data have a test of their own"
    ]  # and val is not taken


def test_only_rows_without_a_split_are_taken():
    splits = ["train"] * 100 + [None] * 100 + ["test"] * 20
    found = np.asarray(assign(frame(hashes(220), [0] * 220, splits), fraction=0.5).splits)
    assert set(found[:100]) == {"train"}
    assert 30 < (found[100:200] == "val").sum() < 70
    assert set(found[200:]) == {"test"}


def test_val_is_taken_from_train_where_all_rows_have_a_split():
    splits = ["train"] * 100 + ["test"] * 20
    found = assign(frame(hashes(120), [0] * 120, splits))
    val = np.asarray(found.splits) == "val"
    assert 8 < val[:100].sum() < 35
    assert not val[100:].any()
    share = val.sum() / 100
    assert found.notes == [
        f"no val: took {val.sum()} of 100 images ({share:.1%}) for val, chosen by content and "
        "seed 0"
    ]


def test_rows_without_a_split_are_train_where_val_is_given():
    found = assign(frame(hashes(20), [0] * 20, ["val"] * 5 + [""] * 15))
    assert list(found.splits) == ["val"] * 5 + ["train"] * 15


def test_rows_without_a_split_follow_copies_and_groups_that_have_one():
    copies = [*hashes(10), hashes(1)[0]]
    splits = ["test", "val", *["train"] * 7, None, None]
    groups = ["a", "b", *["c"] * 7, "b", "a"]
    found = assign(frame(copies, [0] * 11, splits, groups))
    assert found.splits[9] == "val"
    assert found.splits[10] == "test"
    assert "2 images without a split follow a copy or a group that has one" in found.notes


def test_a_model_that_is_judged_needs_no_val():
    found = assign(frame(hashes(50), [0] * 50), need_val=False, folds=5)
    assert set(found.splits) == {"train"}
    assert found.notes == []


# --- test ---------------------------------------------------------------------------------------


def test_test_is_the_same_for_every_seed_and_val_is_taken_from_the_rest():
    table = frame(hashes(1000), [i % 4 for i in range(1000)])
    one, two = (assign(table, seed=s, test_fraction=0.2) for s in (0, 1))
    first, second = (np.asarray(found.splits) for found in (one, two))
    assert ((first == "test") == (second == "test")).all()
    assert ((first == "val") != (second == "val")).any()
    assert (first == "test").mean() == pytest.approx(0.2, abs=0.05)
    assert (first == "val").sum() / (first != "test").sum() == pytest.approx(0.2, abs=0.05)
    # Without test, the same images are val, and more.
    without = np.asarray(assign(table).splits)
    assert (without[first == "val"] == "val").all()
    assert one.notes[0].endswith("for test, chosen by content whatever the seed")


def test_a_larger_test_holds_the_smaller_one():
    table = frame(hashes(500), [0] * 500)
    small, large = (np.asarray(assign(table, test_fraction=f).splits) == "test" for f in (0.1, 0.3))
    assert (small <= large).all()
    assert small.sum() < large.sum()


@pytest.mark.parametrize("salt", "abcdefgh")
def test_test_leaves_train_and_val_something_of_each_class(salt):
    labels = [0, 0, 1, 1, 1, 2, 2, 2, 2, 2]
    found = assign(frame(hashes(10, salt), labels), test_fraction=0.8, fraction=0.5)
    assert found.problems == []
    for label, parts in ((0, {"train", "val"}), (1, {"train", "val", "test"})):
        assert {s for s, own in zip(found.splits, labels, strict=True) if own == label} == parts
    assert any("test has nothing of c0" in note for note in found.notes)


# --- groups -------------------------------------------------------------------------------------


def grouped(number=60, each=7, salt=""):
    """Images of `number` groups, of two labels within a group."""
    groups = [f"p{i // each}" for i in range(number * each)]
    return frame(hashes(number * each, salt), [i % 2 for i in range(number * each)], groups=groups)


def sides(table, splits):
    return table.assign(split=np.asarray(splits)).groupby("group")["split"].nunique()


@pytest.mark.parametrize("more", [{}, {"test_fraction": 0.3}, {"folds": 4, "fold": 2}])
def test_a_group_is_never_on_two_sides(more):
    table = grouped()
    found = assign(table, **more)
    assert (sides(table, found.splits) == 1).all()
    assert 0.05 < (np.asarray(found.splits) == "val").mean() < 0.5
    assert "60 groups" in found.notes[0]


def test_images_that_join_a_group_change_nothing():
    table = grouped()
    more = pd.concat([grouped(salt="new"), table], ignore_index=True)
    before, after = (np.asarray(assign(t).splits) for t in (table, more))
    assert (after[len(table) :] == before).all()


def test_groups_that_share_an_image_stay_together():
    table = grouped()
    table.loc[0, "sha256"] = table.loc[7, "sha256"]  # in p0 and p1
    for seed in range(20):
        found = assign(table, seed=seed)
        assert found.splits[0] == found.splits[7] == found.splits[1] == found.splits[8]
        assert (
            "2 groups share copies of images with another group: they stay together" in found.notes
        )


def test_images_without_a_group_stand_alone():
    table = frame(hashes(100), [0] * 100, groups=["a"] * 50 + [None] * 25 + [""] * 25)
    splits = np.asarray(assign(table, fraction=0.5).splits)
    assert len(set(splits[:50])) == 1
    assert 10 < (splits[50:] == "val").sum() < 40


def test_a_class_of_one_group_cannot_be_split():
    table = frame(hashes(30), [0] * 10 + [1] * 20, groups=["a"] * 10 + list("bcde") * 5)
    assert assign(table).problems == [
        "there is no val, and c0 cannot be split into train and val: each class needs at least two "
        "different groups of its own"
    ]


# --- folds --------------------------------------------------------------------------------------


def folds_of(table, folds=5, task=Task.single, **more):
    """Fold in which each image is val, and that it is val once only."""
    marks = [
        np.asarray(assign(table, task, folds=folds, fold=k, **more).splits) == "val"
        for k in range(folds)
    ]
    assert (np.sum(marks, axis=0) == 1).all()
    return np.argmax(marks, axis=0)


def test_each_image_is_val_in_one_fold():
    found = folds_of(frame(hashes(2000), [i % 4 for i in range(2000)]))
    assert np.bincount(found) == pytest.approx(np.full(5, 400), abs=72)  # four deviations


def test_folds_keep_their_images_when_others_arrive():
    few, many = (frame(hashes(n), [i % 2 for i in range(n)]) for n in (300, 900))
    assert (folds_of(few) == folds_of(many)[:300]).all()


@pytest.mark.parametrize("seed", range(10))
def test_small_classes_are_in_every_fold(seed):
    labels = [0] * 5 + [1] * 8 + [2] * 60
    found = folds_of(frame(hashes(73), labels), seed=seed)
    for label in range(3):
        assert set(found[np.array(labels) == label]) == set(range(5))


def test_folds_with_too_few_images_of_a_class():
    found = assign(frame(hashes(23), [0] * 3 + [1] * 20), folds=5)
    assert found.problems == [
        "data.folds=5: c0 cannot be in every fold: each class needs at least 5 different images of "
        "its own; add some, or data.folds=3"
    ]


def test_folds_join_train_and_val_and_leave_test_alone():
    splits = ["train"] * 60 + ["val"] * 40 + ["test"] * 20
    found = assign(frame(hashes(120), [0] * 120, splits), folds=4, fold=1)
    assert (np.asarray(found.splits[100:]) == "test").all()
    assert (
        found.notes[0] == "data.folds=4: val (40 images) joins train, as each part is val in turn"
    )
    assert {"train", "val"} == set(found.splits[:60]) == set(found.splits[60:100])


# --- several labels, numbers --------------------------------------------------------------------


def several(number, salt=""):
    """Labels 0 (half of the images), 1 (a tenth), 2 (a hundredth); many have none."""
    rng = np.random.default_rng(0)
    has = rng.random((number, 3)) < [0.5, 0.1, 0.01]
    return frame(hashes(number, salt), [np.flatnonzero(row).tolist() for row in has]), has


def test_several_labels_have_the_share_of_each_label():
    table, has = several(4000)
    val = np.asarray(assign(table, Task.multi).splits) == "val"
    for label in range(3):
        size = has[:, label].sum()
        deviation = 4 * np.sqrt(0.2 * 0.8 / size)
        assert val[has[:, label]].mean() == pytest.approx(0.2, abs=deviation)


@pytest.mark.parametrize("seed", range(10))
def test_rare_labels_are_on_both_sides_and_in_every_fold(seed):
    table, has = several(60)
    table.loc[:9, "labels"] = pd.Series([[2]] * 5 + [[0, 2], [1, 2], [], [], []], dtype=LISTS)
    rare = np.arange(60) < 7
    has[:10, 2] = rare[:10]
    rare |= has[:, 2]
    splits = np.asarray(assign(table, Task.multi, fraction=0.02, seed=seed).splits)
    assert set(splits[rare]) == {"train", "val"}
    assert set(folds_of(table, 5, Task.multi, seed=seed)[rare]) == set(range(5))


def test_a_label_of_one_image_is_told_but_stops_nothing():
    table = frame(hashes(40), [[3]] + [[0, 1]] * 20 + [[]] * 19)
    found = assign(table, Task.multi)
    assert found.problems == []
    assert found.notes[1] == "train or val has nothing of c3: too few images"
    found = assign(table, Task.multi, folds=5)
    assert found.problems == []
    assert found.notes[1] == "some folds have nothing of c3: too few images"


@pytest.mark.parametrize("task", [Task.multi, Task.regression])
def test_one_image_cannot_be_split(task):
    table = frame(hashes(1) * 3, [[0], [1], [2]])
    (problem,) = assign(table, task).problems
    assert problem.startswith(
        "there is no val, and the images cannot be split into train and val: training"
    )
    (problem,) = assign(table, task, folds=2).problems
    assert problem.startswith("data.folds=2: the images cannot be in every fold")


def test_numbers_are_split_by_content_too():
    digests = hashes(2000)
    targets = np.linspace(-1, 1, 2000)
    val = np.asarray(assign(frame(digests, [-1] * 2000), Task.regression).splits) == "val"
    assert val.mean() == pytest.approx(0.2, abs=0.036)
    assert targets[val].mean() == pytest.approx(0, abs=0.12)  # four standard errors
    assert np.bincount(folds_of(frame(digests, [-1] * 2000), 5, Task.regression)).min() > 300


# --- through the table --------------------------------------------------------------------------


@pytest.fixture
def manifest(image_folder, tmp_path):
    """24 images of two classes in twelve groups, each of both classes."""
    image_folder(tmp_path, splits={"": 12}, classes=("blue", "red"))
    rows = [(f"{c}/{n:02d}.png", c, f"patient {n}") for c in ("blue", "red") for n in range(12)]
    pd.DataFrame(rows, columns=["path", "label", "group"]).to_csv(tmp_path / "t.csv", index=False)
    return tmp_path / "t.csv"


def read(root, *, seed=0, required=("train", "val"), classes=None, **data):
    return read_table(
        DataConfig(root=str(root), **data),
        seed=seed,
        cache_dir=None,
        required_splits=required,
        classes=classes,
    )


def test_groups_of_a_manifest_are_whole(manifest):
    table = read(manifest, test_fraction=0.3, val_fraction=0.3)
    assert (table.rows.groupby("group", observed=True)["split"].nunique() == 1).all()
    assert set(table.counts()) == {"train", "val", "test"}
    assert any("chosen by group" in note for note in table.notes)


def test_folds_of_a_manifest(manifest):
    seen = []
    for fold in range(4):
        table = read(manifest, folds=4, fold=fold)
        assert (table.rows.groupby("group", observed=True)["split"].nunique() == 1).all()
        seen += table.split("val")["path"].tolist()
    assert len(seen) == len(set(seen)) == 24


def test_the_test_of_training_is_that_of_evaluation(manifest):
    trained = read(manifest, seed=5, test_fraction=0.3)
    judged = read(manifest, test_fraction=0.3, required=(), classes=trained.classes)
    test = set(trained.split("test")["path"])
    assert test == set(judged.split("test")["path"])
    assert 2 <= len(test) <= 14
    assert "val" not in judged.counts()


def test_no_fold_has_a_test(image_folder):
    root = image_folder(splits={"train": 6, "test": 3})
    table = read(root, folds=3)
    assert set(table.counts()) == {"train", "val"}
    assert "data.folds: 9 images of test stay out of it: no fold looks at them" in table.notes
    taken = read(image_folder(root / "flat", splits={"": 12}), folds=3, test_fraction=0.2)
    assert set(taken.counts()) == {"train", "val"}
    assert len(taken.rows) < 36
