"""Folders become tables: layouts, classes, bad input, the remembered check."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tl.config import BadImages, DataConfig
from tl.data import DataError, read_table
from tl.data.check import cache_path


def write_image(path, number=0, size=(24, 20), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, **options)
    return path


def write_flat(root, counts):
    numbers = iter(range(10_000))
    for name, count in counts.items():
        for i in range(count):
            write_image(root / name / f"{i}.png", next(numbers))
    return root


def read(root, cache_dir=None, **options):
    names = ("required_splits", "classes", "progress")
    arguments = {name: options.pop(name) for name in names if name in options}
    config = DataConfig(root=str(root), **options)
    return read_table(config, seed=0, cache_dir=cache_dir, **arguments)


def problems_of(root, **options):
    with pytest.raises(DataError) as caught:
        read(root, **options)
    assert caught.value.exit_code == 2
    return str(caught.value)


# --- layouts ------------------------------------------------------------------------------------


def test_split_folders(image_folder):
    root = image_folder(splits={"train": 4, "valid": 3, "test": 2}, size=(40, 32))
    table = read(root)
    per_class = {"train": 4, "val": 3, "test": 2}
    names = ("blue", "green", "red")
    assert table.classes == names
    assert table.counts() == {split: dict.fromkeys(names, n) for split, n in per_class.items()}
    assert list(table.rows["split"].unique()) == ["train", "val", "test"]
    assert set(table.rows["width"]) == {40}
    assert set(table.rows["height"]) == {32}
    assert table.notes == []
    assert len(table.quarantined) == 0
    first = table.split("val").iloc[0]
    assert first["path"].startswith("valid/blue/")
    assert table.paths("val")[0] == root / first["path"]
    assert table.paths("val")[0].is_file()
    assert list(table.split("all").index) == list(range(27))


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Validation"])
def test_names_of_val(image_folder, name):
    table = read(image_folder(splits={"train": 2, name: 2}))
    assert len(table.split("val")) == 6


def test_flat_folder_is_split_by_content(tmp_path):
    root = write_flat(tmp_path / "pets", {"cat": 40, "dog": 40})
    table = read(root, val_fraction=0.25)
    counts = table.counts()
    assert counts["train"]["cat"] + counts["val"]["cat"] == 40
    assert 4 <= counts["val"]["cat"] <= 16
    taken = len(table.split("val"))
    expected = f"no val: took {taken} of 80 images ({taken / 80:.1%}) for val, chosen by"
    assert table.notes == [f"{expected} content and seed 0"]


def test_split_outlives_new_and_renamed_images(tmp_path):
    root = write_flat(tmp_path / "pets", {"cat": 20, "dog": 20})
    before = read(root).rows.set_index("sha256")["split"]
    (root / "cat/0.png").rename(root / "cat/renamed.png")
    for i in range(15):
        write_image(root / "cat" / f"new{i}.png", 1000 + i)
    after = read(root).rows.set_index("sha256")["split"]
    assert len(after) == 55
    assert (after[before.index] == before).all()


def test_no_val_is_taken_where_none_is_required(tmp_path):
    root = write_flat(tmp_path / "pets", {"cat": 3, "dog": 3})
    table = read(root, required_splits=())
    assert table.counts() == {"train": {"cat": 3, "dog": 3}}
    assert table.notes == []


def test_nested_folders_and_hidden_files(tmp_path):
    root = write_flat(tmp_path / "pets", {"cat": 4, "dog/young": 2, "dog/old/very": 2})
    for hidden in (".DS_Store", "cat/._0.png", ".git/x.png", "__MACOSX/cat/0.png"):
        (root / hidden).parent.mkdir(parents=True, exist_ok=True)
        (root / hidden).write_bytes(b"no image")
    table = read(root)
    assert table.classes == ("cat", "dog")
    assert len(table.rows) == 8
    assert not any("ignored" in note for note in table.notes)


def test_number_names_are_in_natural_order(tmp_path):
    root = write_flat(tmp_path / "digits", {"10": 2, "2": 2, "1": 2})
    assert read(root).classes == ("1", "2", "10")


def test_links_are_followed_without_loops(tmp_path):
    root = write_flat(tmp_path / "pets", {"cat": 3, "dog": 3})
    write_image(tmp_path / "elsewhere" / "far.png", 99)
    (root / "cat/link").symlink_to(tmp_path / "elsewhere")
    (root / "cat/loop").symlink_to(root / "cat")
    (root / "dog/up").symlink_to(root)
    table = read(root)
    in_cat = [path for path in sorted(table.rows["path"]) if path.startswith("cat")]
    assert in_cat == ["cat/0.png", "cat/1.png", "cat/2.png", "cat/link/far.png"]
    assert len(table.rows) == 7
    assert f"1 link leads out of {root}: cat/link" in table.notes


def test_links_inside_the_folder_are_not_worth_a_word(tmp_path):
    root = write_flat(tmp_path / "pets", {"cat": 3, "dog": 3})
    (root / "dog/same.png").symlink_to(root / "dog/0.png")
    (tmp_path / "alias").symlink_to(root)
    table = read(tmp_path / "alias")
    assert len(table.rows) == 7
    assert not any("link" in note for note in table.notes)


def test_odd_class_names_are_said(tmp_path):
    root = write_flat(tmp_path / "pets", {"ab": 2, "Cat": 2, "cat": 2, "🐈": 2})
    notes = " ".join(read(root).notes)
    assert "class names that differ in upper and lower case only: Cat = cat" in notes
    write_image(root / "b\nc" / "0.png")
    text = problems_of(root)
    assert "1 class name with line breaks, control characters or nothing but spaces" in text


def test_class_called_train_is_a_class_where_it_holds_images(tmp_path):
    root = write_flat(tmp_path / "vehicles", {"train": 3, "plane": 3})
    assert read(root).classes == ("plane", "train")


def test_same_letters_in_two_unicode_spellings_are_one_class(tmp_path):
    root = write_flat(tmp_path, {"train/caf\u00e9": 2, "train/tea": 2})
    for i, name in enumerate(("val/cafe\u0301", "val/tea")):
        write_image(root / name / "0.png", 50 + i)
    assert read(root).counts()["val"] == {"caf\u00e9": 1, "tea": 1}


def test_what_is_ignored_is_said(image_folder):
    root = image_folder()
    (root / "README.md").write_text("hello")
    (root / "train/blue/notes.txt").write_text("hello")
    write_image(root / "train/stray.png")
    write_image(root / "masks/0.png")
    assert read(root).notes == [
        "ignored 1 folder beside train and val: masks/",
        "ignored 1 image in no class folder: train/stray.png",
        "ignored 2 files without the name of an image: README.md, train/blue/notes.txt",
    ]


# --- wrong folders ------------------------------------------------------------------------------


def test_missing_folder_names_the_nearest(tmp_path):
    (tmp_path / "hymenoptera").mkdir()
    text = problems_of(tmp_path / "hymenopterra" / "train")
    assert text == (
        f"data.root: there is no folder {tmp_path}/hymenopterra/train "
        f"({tmp_path} has no hymenopterra; did you mean hymenoptera?)"
    )


def test_file_instead_of_folder(tmp_path):
    (tmp_path / "data.zip").write_bytes(b"PK")
    assert "is a file, not a folder; unpack it" in problems_of(tmp_path / "data.zip")


def test_empty_folder(tmp_path):
    assert problems_of(tmp_path) == (
        f"data.root: {tmp_path} is empty: put the images into "
        "<class>/* or train/<class>/* and val/<class>/*"
    )


def test_folders_without_images(tmp_path):
    (tmp_path / "cat").mkdir()
    assert "has folders, but no images in them" in problems_of(tmp_path)


def test_images_without_class_folders(tmp_path):
    for i in range(5):
        write_image(tmp_path / f"{i}.png", i)
    expected = (
        "has no class folders with images, only 5 other files (0.png, 1.png, 2.png and 2 more):"
    )
    assert expected in problems_of(tmp_path)


def test_one_class_only(tmp_path):
    root = write_flat(tmp_path / "pets", {"cat": 4})
    expected = f"{root} has only one class, cat; a classifier needs two or more"
    assert problems_of(root) == expected


def test_one_class_only_because_the_folder_lies_deeper(image_folder, tmp_path):
    root = image_folder(root=tmp_path / "outer" / "inner")
    text = problems_of(root.parent)
    assert text.endswith(f"The classes seem to lie one folder deeper: data.root={root}")


def test_classes_missing_in_train_and_val_are_reported_together(image_folder):
    root = image_folder()
    (root / "val/blue").rename(root / "val/bleu")
    (root / "train/green/00.png").write_bytes(b"")
    assert problems_of(root).splitlines() == [
        "val/bleu is a class that train does not have; did you mean blue?",
        "val has no readable image of the class blue: add images, or delete that class everywhere",
        "1 of 27 images cannot be read:",
        "  train/green/00.png: 0 bytes",
        "  replace or delete them, or leave them out with data.bad_images=skip",
    ]


def test_class_missing_in_val(image_folder):
    root = image_folder()
    shutil.rmtree(root / "val/blue")
    expected = "val has no readable image of the class blue: add images, or delete that class"
    assert problems_of(root) == f"{expected} everywhere"


def test_class_folder_empty_in_train(image_folder):
    root = image_folder()
    for file in (root / "train/red").iterdir():
        file.unlink()
    assert problems_of(root).startswith("train has no readable image of the class red:")


def test_class_missing_in_test_only_is_allowed(image_folder):
    root = image_folder(splits={"train": 2, "val": 2, "test": 2})
    shutil.rmtree(root / "test/blue")
    assert read(root).counts()["test"] == {"blue": 0, "green": 2, "red": 2}


def test_val_without_train(image_folder):
    root = image_folder(splits={"val": 2, "test": 2})
    assert problems_of(root) == f"data.root: {root} has val and test, but no folder train"


def test_required_split_missing(image_folder):
    root = image_folder()
    text = problems_of(root, required_splits=("test",))
    assert text == f"data.root: {root} has no images for test (there is: train, val)"


def test_two_folders_for_one_split(image_folder):
    root = image_folder(splits={"train": 2, "val": 2, "valid": 2})
    assert f"{root} has both val and valid: keep one of them as val" in problems_of(root)


def test_class_too_small_to_split(tmp_path):
    root = write_flat(tmp_path / "pets", {"cat": 5, "dog": 1, "eel": 1})
    assert problems_of(root).startswith(
        "there is no val, and dog, eel cannot be split into train and"
    )


# --- bad images ---------------------------------------------------------------------------------


def break_images(root):
    """One of each kind in train/blue; returns path -> words of the reason."""
    folder = root / "train/blue"
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.png").write_text("this is no image")
    whole = write_image(folder / "cut.jpg", 5, size=(200, 150)).read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    whole = write_image(folder / "cut.png", 6, size=(200, 150)).read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "gone.png").symlink_to(root / "nowhere.png")
    os.mkfifo(folder / "pipe.png")
    write_image(folder / "huge.png", 7, size=(300, 200))
    return {
        "cut.jpg": "truncated",
        "cut.png": "truncated",
        "empty.jpg": "0 bytes",
        "gone.png": "a link to a file that is not there",
        "huge.png": "300 x 200 pixels",
        "pipe.png": "a pipe, socket or device",
        "text.png": "not an image",
    }


def test_each_bad_image_is_named_with_its_reason(image_folder):
    root = image_folder()
    reasons = break_images(root)
    lines = problems_of(root, max_pixels=40_000).splitlines()
    assert lines[0] == "7 of 34 images cannot be read:"
    for line, (name, words) in zip(lines[1:-1], reasons.items(), strict=True):
        assert line.startswith(f"  train/blue/{name}: {words}")
    assert lines[-1] == "  replace or delete them, or leave them out with data.bad_images=skip"


def test_bad_images_can_be_left_out_but_not_silently(image_folder):
    root = image_folder()
    reasons = break_images(root)
    reasons.pop("huge.png")  # within the default limit
    table = read(root, bad_images=BadImages.skip)
    assert len(table.rows) == 28
    assert list(table.quarantined["path"]) == [f"train/blue/{name}" for name in reasons]
    assert set(table.quarantined["split"]) == {"train"}
    for reason, words in zip(table.quarantined["reason"], reasons.values(), strict=True):
        assert words in reason
    assert table.notes[0].startswith("left out 6 images that cannot be read:\n  train/blue/cut.jpg")


def test_class_of_bad_images_only_is_missing_when_they_are_left_out(image_folder):
    root = image_folder()
    for file in (root / "val/red").iterdir():
        file.write_bytes(b"")
    text = problems_of(root, bad_images=BadImages.skip)
    assert text.startswith("val has no readable image of the class red:")


def test_ten_bad_images_are_named_the_rest_counted(image_folder):
    root = image_folder(splits={"train": 8, "val": 2})
    for file in [*(root / "train/red").iterdir(), *(root / "train/blue").iterdir()]:
        file.write_bytes(b"")
    lines = problems_of(root).splitlines()
    assert lines[0] == "16 of 30 images cannot be read:"
    assert len(lines) == 13
    assert lines[11] == "  and 6 more"


def test_name_that_is_no_utf8(image_folder):
    root = image_folder()
    try:
        shutil.copy(root / "train/red/00.png", os.fsencode(root / "train/red") + b"/bad\xff.png")
    except OSError:
        pytest.skip("this file system refuses names that are no UTF-8")
    assert "  train/red/bad\\xff.png: its name is not UTF-8: rename it" in problems_of(root)


def test_odd_modes_are_read(image_folder):
    root = image_folder()
    folder = root / "train/blue"
    picture = Image.open(folder / "00.png")
    for mode, name in (("L", "l.png"), ("LA", "la.png"), ("RGBA", "a.png"), ("P", "p.gif")):
        picture.convert(mode).save(folder / name)
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.arange(768, dtype=np.uint16).reshape(24, 32) * 80).save(folder / "16.png")
    lying = Image.Exif()
    lying[0x0112] = 6
    for ending in ("jpg", "png"):
        picture.save(folder / f"turned.{ending}", exif=lying)
    picture.save(folder / "moving.gif", save_all=True, append_images=[picture.rotate(90)])
    table = read(root)
    assert len(table.rows) == 27 + 9
    sizes = table.rows.set_index("path")[["width", "height"]]
    assert tuple(sizes.loc["train/blue/turned.jpg"]) == (32, 40)
    assert tuple(sizes.loc["train/blue/turned.png"]) == (32, 40)
    assert tuple(sizes.loc["train/blue/cmyk.jpg"]) == (40, 32)


def test_without_check_no_file_is_opened(image_folder):
    root = image_folder()
    break_images(root)
    table = read(root, check=False, bad_images=BadImages.skip)
    left_out = {Path(path).name for path in table.quarantined["path"]}
    assert left_out == {"empty.jpg", "gone.png", "pipe.png"}
    assert table.rows["sha256"].str.len().eq(64).all()
    assert table.rows["sha256"].is_unique
    assert (table.rows["width"] == 0).all()
    assert (table.rows["bytes"] > 0).all()


def test_without_check_names_decide_about_val(tmp_path):
    root = write_flat(tmp_path / "pets", {"cat": 20, "dog": 20})
    before = read(root, check=False)
    for file in root.rglob("*.png"):
        os.utime(file, (1, 1))
    after = read(root, check=False)
    assert (before.rows["path"] == after.rows["path"]).all()
    assert not (before.rows["sha256"] == after.rows["sha256"]).any()


# --- copies -------------------------------------------------------------------------------------


def test_copies_in_two_classes_or_splits_are_said(image_folder):
    root = image_folder()
    shutil.copy(root / "train/red/00.png", root / "train/green/copy.png")
    shutil.copy(root / "train/red/01.png", root / "val/red/copy.png")
    shutil.copy(root / "train/blue/01.png", root / "train/blue/copy.png")
    assert read(root).notes == [
        "1 image lies in two class folders (correct the labels): "
        "train/green/copy.png = train/red/00.png",
        "1 image lies in two splits (figures on val and test are too good): "
        "train/red/01.png = val/red/copy.png",
    ]


# --- a model's classes --------------------------------------------------------------------------


def test_given_classes_fix_the_order(image_folder):
    root = image_folder(splits={"test": 2}, classes=("green", "red"))
    table = read(root, required_splits=("test",), classes=("red", "blue", "green"))
    assert table.classes == ("red", "blue", "green")
    assert table.counts() == {"test": {"red": 2, "blue": 0, "green": 2}}
    assert list(table.rows["label"]) == [0, 0, 2, 2]


def test_folder_that_the_model_does_not_know(image_folder):
    root = image_folder(splits={"test": 2}, classes=("gren", "red"))
    text = problems_of(root, required_splits=("test",), classes=("red", "green"))
    assert text == "test/gren is a class that the model does not have; did you mean green?"
    text = problems_of(root, required_splits=("test",), classes=("black", "white"))
    assert text.splitlines() == [
        f"test/{name} is a class that the model does not have (known: black, white)"
        for name in ("gren", "red")
    ]


def test_val_of_a_flat_folder_can_be_evaluated_again(tmp_path):
    root = write_flat(tmp_path / "pets", {"cat": 9, "dog": 9})
    trained = read(root)
    table = read(root, required_splits=("val",), classes=("dog", "cat"))
    assert set(table.split("val")["sha256"]) == set(trained.split("val")["sha256"])
    assert set(table.split("val")["label"]) == {0, 1}


def test_evaluation_needs_neither_train_nor_two_images_a_class(image_folder, tmp_path):
    root = image_folder(splits={"test": 2})
    classes = ("blue", "green", "red")
    text = problems_of(root, required_splits=("val",), classes=classes)
    assert text == f"data.root: {root} has no images for val (there is: test)"
    root = write_flat(tmp_path / "few", {"blue": 1, "green": 6})
    assert len(read(root, required_splits=("val",), classes=classes).rows) == 7


# --- fingerprint and cache ----------------------------------------------------------------------


def test_fingerprint_follows_contents_not_names(image_folder, tmp_path):
    one = read(image_folder(root=tmp_path / "one")).fingerprint()
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "two/train/red/00.png").rename(tmp_path / "two/train/red/zz.png")
    two = read(tmp_path / "two").fingerprint()
    assert one.pop("root") == str(tmp_path / "one")
    assert two.pop("root") == str(tmp_path / "two")
    assert one == two
    assert one["images"] == 27
    assert one["val_sha256"] != one["train_sha256"]
    assert "test_sha256" not in one
    assert one["bytes"] == sum(f.stat().st_size for f in (tmp_path / "one").rglob("*.png"))
    (tmp_path / "two/train/red/zz.png").rename(tmp_path / "two/val/red/zz.png")
    moved = read(tmp_path / "two").fingerprint()
    changed = {name for name in one if moved[name] != one[name]}
    assert changed == {"sha256", "train_sha256", "val_sha256", "splits", "counts"}


def test_check_is_remembered_until_a_file_changes(image_folder, tmp_path):
    root, cache = image_folder(), tmp_path / "cache"
    seen = []
    first = read(root, cache_dir=cache, progress=lambda *step: seen.append(step))
    assert seen == [(i, 27) for i in range(1, 28)]
    assert cache_path(cache, root).is_file()
    assert len(list(cache.rglob("*"))) == 2  # the folder and one file, nothing half-written
    seen.clear()
    second = read(root, cache_dir=cache, progress=lambda *step: seen.append(step))
    assert seen == []
    pd.testing.assert_frame_equal(first.rows, second.rows)
    (root / "train/red/00.png").write_bytes(b"not an image any more")
    assert "1 of 27 images" in problems_of(root, cache_dir=cache)
    # A bad file is looked at each time: it may have been replaced within one tick of the clock.
    read(root, cache_dir=cache, bad_images=BadImages.skip, progress=lambda *s: seen.append(s))
    assert seen == [(1, 1)]


def test_header_check_does_not_count_as_decoding(image_folder, tmp_path):
    root, cache = image_folder(), tmp_path / "cache"
    cut = write_image(root / "train/red/cut.jpg", 3, size=(200, 150))
    cut.write_bytes(cut.read_bytes()[:9000])
    assert len(read(root, cache_dir=cache, check=False).rows) == 28
    assert "train/red/cut.jpg: truncated" in problems_of(root, cache_dir=cache)


def test_lower_limit_reaches_remembered_images(image_folder, tmp_path):
    root = image_folder()
    read(root, cache_dir=tmp_path / "cache")
    text = problems_of(root, cache_dir=tmp_path / "cache", max_pixels=100)
    assert text.startswith("27 of 27 images cannot be read:")


def test_damaged_cache_costs_a_second_look_only(image_folder, tmp_path, caplog):
    root, cache = image_folder(), tmp_path / "cache"
    read(root, cache_dir=cache)
    cache_path(cache, root).write_bytes(b"PAR1 rubbish")
    assert len(read(root, cache_dir=cache).rows) == 27
    assert "checking again" in caplog.text
    assert len(pd.read_parquet(cache_path(cache, root))) == 27


def test_cache_that_cannot_be_written_is_said(image_folder, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert len(read(image_folder(), cache_dir=tmp_path / "cache").rows) == 27
    assert "cannot be remembered" in caplog.text


# --- real folders -------------------------------------------------------------------------------


def test_ants_and_bees(assets, tmp_path):
    start = time.perf_counter()
    table = read(assets / "data/hymenoptera", cache_dir=tmp_path)
    first = time.perf_counter() - start
    start = time.perf_counter()
    again = read(assets / "data/hymenoptera", cache_dir=tmp_path)
    second = time.perf_counter() - start
    assert table.counts() == {
        "train": {"ants": 123, "bees": 121},
        "val": {"ants": 70, "bees": 83},
    }
    assert table.fingerprint() == again.fingerprint()
    assert table.fingerprint()["bytes"] == 47_380_420
    assert (table.rows["width"].min(), table.rows["width"].max()) == (193, 2592)
    assert first < 10
    assert second < 1


def test_flowers_keep_copies_with_two_labels_together(assets):
    table = read(assets / "data/flowers5")
    assert len(table.rows) == 1750
    assert table.rows.groupby("sha256")["split"].nunique().max() == 1
    assert table.rows.groupby("sha256")["label"].nunique().max() == 2
    assert "2 images lie in two class folders (correct the labels)" in table.notes[-1]
    share = table.rows.groupby("label")["split"].agg(lambda splits: (splits == "val").mean())
    assert share.between(0.11, 0.29).all()
