"""Test is touched once: how many models were judged on the same images is remembered and said."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from commands import UNTRACKED, Command

from tl.config import DataConfig
from tl.data import read_table
from tl.runs import note_test


def table_of(root):
    return read_table(DataConfig(root=str(root)), seed=0, cache_dir=None)


def test_other_models_are_counted_once_each(image_folder, tmp_path):
    table = table_of(image_folder(splits={"train": 3, "val": 2, "test": 2}))
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    assert note_test(table, tmp_path, one) == {}
    assert note_test(table, tmp_path, one) == {}, "the same model again says nothing new"
    assert note_test(table, tmp_path, two)["test"].startswith("1 other model was judged on these")
    assert note_test(table, tmp_path, three)["test"].startswith("2 other models were judged")
    assert note_test(table, tmp_path, one)["test"].startswith("2 other models were judged")


def test_a_bundle_is_the_model_of_its_run(image_folder, tmp_path, monkeypatch):
    table = table_of(image_folder(splits={"train": 3, "val": 2, "test": 2}))
    run = tmp_path / "run"
    (run / "bundle").mkdir(parents=True)
    (run / "config.yaml").touch()
    assert note_test(table, tmp_path, run) == {}
    assert note_test(table, tmp_path, run / "bundle") == {}
    monkeypatch.chdir(run)
    assert note_test(table, tmp_path, Path("bundle")) == {}
    shutil.copytree(run / "bundle", tmp_path / "elsewhere")
    assert "1 other model" in note_test(table, tmp_path, tmp_path / "elsewhere")["test"]


def test_a_test_is_known_by_its_contents(image_folder, tmp_path):
    root = image_folder(splits={"train": 3, "val": 2, "test": 2})
    assert note_test(table_of(root), tmp_path, tmp_path / "one") == {}
    moved = shutil.copytree(root, tmp_path / "moved")
    (moved / "train/blue/00.png").unlink()
    assert note_test(table_of(moved), tmp_path, tmp_path / "two") != {}
    (moved / "test/blue/00.png").unlink()
    assert note_test(table_of(moved), tmp_path, tmp_path / "three") == {}, "another test"


def test_no_test_and_no_place_to_remember_stop_nothing(image_folder, tmp_path, caplog):
    root = image_folder(splits={"train": 3, "val": 2})
    assert note_test(table_of(root), tmp_path, tmp_path / "one") == {}
    assert not (tmp_path / "tests").exists()
    image_folder(root, splits={"test": 2})
    (tmp_path / "tests").write_text("a file, not a folder")
    assert note_test(table_of(root), tmp_path, tmp_path / "one") == {}
    assert "cannot be read and written" in caplog.text


@pytest.mark.parametrize("given", [True, False], ids=["given", "taken"])
def test_train_says_it(capfd, monkeypatch, image_folder, tmp_path, given):
    tl = Command(capfd, monkeypatch)
    splits = {"train": 4, "val": 2, "test": 2} if given else {"": 12}
    job = [*UNTRACKED, "finetune=linear_probe", f"data.root={image_folder(splits=splits)}"]
    job += [] if given else ["data.test_fraction=0.2"]
    first = tl("train", *job, f"output_dir={tmp_path / 'one'}")
    assert first.code == 0, first.err
    assert "judged on these test images" not in first.out
    # Another seed has another val, and the same test.
    second = tl("train", *job, "seed=1", f"output_dir={tmp_path / 'two'}")
    assert "1 other model was judged on these test images" in second.out
