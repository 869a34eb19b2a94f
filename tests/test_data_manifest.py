"""Manifests become tables: formats, columns, labels of every form, paths, bad input."""

from __future__ import annotations

import gzip
import json
import pickle
import shutil

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tl.config import (
    BadImages,
    ColumnsConfig,
    ConfigError,
    DataConfig,
    Task,
    absolute_data,
    compose,
)
from tl.data import DataError, read_table
from tl.data.stores import FileStore

CLASSES = ("blue", "green", "red")


@pytest.fixture
def photos(image_folder):
    """24 images `<class>/<number>.png` and a frame with one row of each."""
    root = image_folder(splits={"": 8})
    rows = [
        {"image": f"{name}/{number:02d}.png", "label": name}
        for number in range(8)
        for name in CLASSES
    ]
    return root, pd.DataFrame(rows)


def read(root, cache_dir=None, columns=None, **options):
    names = ("required_splits", "classes", "task_given")
    arguments = {name: options.pop(name) for name in names if name in options}
    if "task_given" in arguments:
        arguments["task"] = arguments.pop("task_given")
    config = DataConfig(root=str(root), columns=ColumnsConfig(**(columns or {})), **options)
    return read_table(config, seed=0, cache_dir=cache_dir, **arguments)


def problems_of(root, **options):
    with pytest.raises(DataError) as caught:
        read(root, **options)
    assert caught.value.exit_code == 2
    return str(caught.value)


def write(frame, file):
    kind = "".join(file.suffixes)
    if kind == ".parquet":
        frame.to_parquet(file, index=False)
    elif kind == ".jsonl":
        frame.to_json(file, orient="records", lines=True)
    else:
        frame.to_csv(file, index=False, sep="\t" if "tsv" in kind else ",")
    return file


# --- forms --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["m.csv", "m.tsv", "m.jsonl", "m.parquet", "m.csv.gz"])
def test_forms_give_the_table_of_the_folder(photos, name):
    root, frame = photos
    by_folder = read(root)
    table = read(write(frame, root / name))
    assert table.classes == by_folder.classes
    assert table.fingerprint()["sha256"] == by_folder.fingerprint()["sha256"]
    assert table.counts() == by_folder.counts()
    assert table.root == root
    assert table.images("val").open(0).size == (40, 32)
    assert table.notes[0] == (
        f"{name}: image from column image, label from column label (data.columns says otherwise)"
    )


def test_semicolons_tabs_and_a_byte_order_mark_are_read(photos):
    root, frame = photos
    text = frame.to_csv(index=False, sep=";")
    (root / "m.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read(root / "m.csv").classes == CLASSES


def test_columns_are_guessed_by_name_and_by_content(photos):
    root, frame = photos
    frame["Split"], frame["Patient ID"], frame["sample weight"] = "train", range(24), 0.5
    frame = frame.rename(columns={"image": "photograph", "label": "what it shows"})
    table = read(write(frame, root / "m.csv"), columns={"label": "what it shows"})
    assert "image from column photograph" in table.notes[0]
    assert "split from column Split, group from column Patient ID" in table.notes[0]
    assert set(table.rows["weight"]) == {0.5}
    assert table.rows["weight"].dtype == np.float32
    assert sorted(table.rows["group"], key=int) == [str(i) for i in range(24)]


def test_paths_may_be_relative_to_another_folder(photos, tmp_path):
    root, frame = photos
    elsewhere = write(frame, tmp_path / "list.csv")
    assert "none of the first 24 files" in problems_of(elsewhere)
    table = read(root, table=str(elsewhere))
    assert len(table.rows) == 24
    assert table.root == root


def test_absolute_paths_inside_the_folder_are_paths(photos):
    root, frame = photos
    frame["image"] = [f"{root}/{name}" if i % 2 else f"./x/../{name}" for i, name in
                      enumerate(frame["image"])]  # fmt: skip
    table = read(write(frame, root / "m.csv"))
    assert set(table.rows["path"]) == {f"{c}/{n:02d}.png" for c in CLASSES for n in range(8)}


def test_splits_are_kept_under_any_of_their_names(photos):
    root, frame = photos
    frame["split"] = ["train", "Valid", "testing", "training"] * 6
    table = read(write(frame, root / "m.csv"))
    assert {s: sum(n.values()) for s, n in table.counts().items()} == {
        "train": 12, "val": 6, "test": 6,
    }  # fmt: skip


def test_rows_without_a_split_are_split(photos):
    root, frame = photos
    frame["split"] = ["train"] * 12 + [None] * 12
    counts = read(write(frame, root / "m.csv")).counts()
    assert sum(counts["val"].values()) > 0
    assert sum(counts["train"].values()) >= 12


def test_names_of_rows_survive_in_a_loader_worker(photos):
    root, frame = photos
    table = read(write(frame, root / "m.csv"))
    images = pickle.loads(pickle.dumps(table.images("train")))
    assert [images.name(i) for i in range(len(images))] == list(table.split("train")["path"])
    assert images.read(0) == (root / images.name(0)).read_bytes()
    assert table.store == FileStore(root, confined=True)


# --- labels -------------------------------------------------------------------------------------


def test_ids_are_names_unless_a_model_has_names(photos):
    root, frame = photos
    frame["label"] = [CLASSES.index(name) + 9 for name in frame["label"]]
    file = write(frame, root / "m.csv")
    assert read(file).classes == ("9", "10", "11")
    frame["label"] -= 9
    table = read(write(frame, file), classes=("b", "g", "r"), required_splits=())
    assert table.classes == ("b", "g", "r")
    assert set(table.rows.loc[table.rows["path"].str.startswith("red"), "label"]) == {2}
    named = read(file, classes=("2", "1", "0"), required_splits=())
    assert set(named.rows.loc[named.rows["path"].str.startswith("red"), "label"]) == {0}


def test_leading_zeros_are_kept(photos):
    root, frame = photos
    frame["label"] = frame["label"].map({"blue": "007", "green": "7", "red": "070"})
    assert set(read(write(frame, root / "m.csv")).classes) == {"007", "7", "070"}


def test_several_labels_in_one_cell(photos):
    root, frame = photos
    marks = ["a|b", " b ", "c | a", ""]
    frame["label"] = [marks[i % 4] for i in range(24)]
    table = read(write(frame, root / "m.csv"))
    assert table.task is Task.multi
    assert table.classes == ("a", "b", "c")
    by_path = dict(zip(table.rows["path"], table.targets("all").tolist(), strict=True))
    for name, mark in zip(frame["image"], frame["label"], strict=True):
        assert by_path[name] == [float(c in mark) for c in "abc"]
    assert table.targets("train").dtype == np.float32
    assert "column label has several labels an image: data.task=multi" in table.notes
    assert "6 images have no label at all" in table.notes
    total = {c: sum(n[c] for n in table.counts().values()) for c in "abc"}
    assert total == {"a": 12, "b": 12, "c": 6}


def test_a_separator_is_a_letter_where_one_class_is_asked_for(photos):
    root, frame = photos
    frame["label"] = frame["label"].map({"blue": "a|b", "green": "a", "red": "b"})
    assert read(write(frame, root / "m.csv"), task="single").classes == ("a", "a|b", "b")
    multi = read(root / "m.csv", label_separator="|")
    assert multi.classes == ("a", "b")


@pytest.mark.parametrize("name", ["m.jsonl", "m.parquet"])
def test_lists_of_labels(photos, name):
    root, frame = photos
    frame["label"] = [["x", "y"] if i % 3 else ["z"] for i in range(24)]
    table = read(write(frame, root / name))
    assert (table.task, table.classes) == (Task.multi, ("x", "y", "z"))
    assert table.targets("all").sum(axis=0).tolist() == [16, 16, 8]


def test_one_column_a_class(photos):
    root, frame = photos
    for name in CLASSES:
        frame[name] = (frame["label"] == name).astype(int)
    frame = frame.drop(columns="label")
    table = read(write(frame, root / "m.csv"))
    assert (table.task, table.classes) == (Task.single, CLASSES)
    assert "each row has one label: data.task=single" in " ".join(table.notes)
    assert (table.targets("all") == table.rows["label"]).all()
    frame["green"] = 1
    several = read(write(frame, root / "m.csv"), columns={"label": ["red", "green"]})
    assert (several.task, several.classes) == (Task.multi, ("red", "green"))
    assert several.targets("all").sum(axis=0).tolist() == [8, 24]
    frame.loc[4, "green"] = 7
    text = problems_of(write(frame, root / "m.csv"), columns={"label": ["red", "green"]})
    assert "column green is one of the label columns, but row 6 has '7' there" in text


def test_a_number_to_predict(photos):
    root, frame = photos
    frame["label"] = np.arange(24) / 10
    frame = frame.rename(columns={"label": "price in euro"})
    table = read(write(frame, root / "m.csv"))
    assert (table.task, table.classes) == (Task.regression, ("price in euro",))
    by_path = dict(zip(table.rows["path"], table.targets("all").tolist(), strict=True))
    assert by_path[frame["image"][13]] == pytest.approx(1.3)
    assert table.counts()["train"].keys() == {"price in euro"}
    frame["price in euro"] = range(24)
    whole = read(write(frame, root / "m.csv"), task="regression")
    assert whole.targets("all").dtype == np.float32
    assert set(whole.rows["label"]) == {-1}


def test_targets_make_the_fingerprint(photos):
    root, frame = photos
    frame["label"] = np.arange(24) / 10
    one = read(write(frame, root / "m.csv")).fingerprint()["sha256"]
    frame.loc[3, "label"] = 9.5
    assert read(write(frame, root / "m.csv")).fingerprint()["sha256"] != one
    frame["label"] = ["a|b"] * 23 + ["a"]
    one = read(write(frame, root / "m.csv")).fingerprint()["sha256"]
    frame["label"] = ["a|b"] * 24
    assert read(write(frame, root / "m.csv")).fingerprint()["sha256"] != one


def test_ten_thousand_classes(photos):
    root, _ = photos
    file = root / "blue/00.png"
    for number in range(10_000):
        (root / "many").mkdir(exist_ok=True)
        (root / "many" / f"{number}.png").hardlink_to(file)
    rows = {"image": [f"many/{n}.png" for n in range(10_000)],
            "label": [f"class {n}" for n in range(10_000)],
            "split": ["train"] * 10_000}  # fmt: skip
    table = read(write(pd.DataFrame(rows), root / "m.csv"), check=False, required_splits=("train",))
    assert len(table.classes) == 10_000
    assert table.classes[2:4] == ("class 2", "class 3")


def test_emoji_and_slashes_are_names(photos):
    root, frame = photos
    frame["label"] = frame["label"].map({"blue": "🐈/cat", "green": "animals/dog", "red": "café"})
    assert set(read(write(frame, root / "m.csv")).classes) == {"🐈/cat", "animals/dog", "café"}


def test_names_that_differ_in_case_only_are_said(photos):
    root, frame = photos
    frame["label"] = frame["label"].map({"blue": "Cat", "green": "cat", "red": "dog"})
    notes = read(write(frame, root / "m.csv")).notes
    assert "class names that differ in upper and lower case only: Cat = cat" in notes


# --- images as bytes ----------------------------------------------------------------------------


def with_bytes(root, frame, file, *, struct=False):
    data = [(root / name).read_bytes() for name in frame["image"]]
    if struct:
        column = pa.array(
            [{"bytes": b, "path": n} for b, n in zip(data, frame["image"], strict=True)]
        )
    else:
        column = pa.array(data, pa.binary())
    names = pa.array(frame["label"])
    pq.write_table(pa.table({"picture": column, "label": names}), file, row_group_size=5)
    return file


@pytest.mark.parametrize("struct", [False, True])
def test_bytes_in_parquet_give_the_table_of_the_folder(photos, tmp_path, struct):
    root, frame = photos
    file = with_bytes(root, frame, tmp_path / "m.parquet", struct=struct)
    cache, seen = tmp_path / "cache", []
    config = DataConfig(root=str(file))
    table = read_table(config, seed=0, cache_dir=cache, progress=lambda *s: seen.append(s))
    by_folder = read(root)
    checked = [(done, 24) for done in range(1, 25)]
    assert seen[-24:] == checked
    assert seen[:-24][-1] == (24, 24)  # of unpacking
    assert table.fingerprint()["sha256"] == by_folder.fingerprint()["sha256"]
    assert sorted(table.rows["path"])[:2] == ["m.parquet#0", "m.parquet#1"]
    images = pickle.loads(pickle.dumps(table.images("val")))
    row = int(images.name(0).partition("#")[2])
    assert images.read(0) == (root / frame["image"][row]).read_bytes()
    with pytest.raises(DataError, match="no files of their own"):
        table.paths("train")
    # It is unpacked once, and the check is remembered.
    unpacked = list((cache / "unpacked").rglob("*.arrow"))
    before = unpacked[0].stat().st_mtime_ns
    seen.clear()
    again = read_table(config, seed=0, cache_dir=cache, progress=lambda *s: seen.append(s))
    assert seen == []
    assert unpacked[0].stat().st_mtime_ns == before
    pd.testing.assert_frame_equal(again.rows, table.rows)


def test_unpacked_images_follow_the_file(photos, tmp_path):
    root, frame = photos
    cache = tmp_path / "cache"
    read(with_bytes(root, frame, tmp_path / "m.parquet"), cache_dir=cache)
    with_bytes(root, frame.iloc[:21], tmp_path / "m.parquet")
    assert len(read(tmp_path / "m.parquet", cache_dir=cache).rows) == 21
    assert len(list((cache / "unpacked").rglob("*.arrow"))) == 1


def test_bad_bytes_are_named(photos, tmp_path):
    root, frame = photos
    (root / "blue/03.png").write_bytes(b"")
    (root / "red/03.png").write_bytes(b"<html>")
    file = with_bytes(root, frame, tmp_path / "m.parquet")
    text = problems_of(file)
    assert "  m.parquet#9: 0 bytes" in text
    assert "  m.parquet#11: a web page" in text
    assert len(read(file, bad_images=BadImages.skip).rows) == 22


def test_bytes_and_paths_exclude_each_other(photos, tmp_path):
    root, frame = photos
    file = with_bytes(root, frame, root / "m.parquet")
    table = pq.read_table(file).append_column("path", pa.array(frame["image"]))
    pq.write_table(table, file)
    text = problems_of(file)
    assert "has images (column picture) and paths (column path)" in text
    assert "data.columns.bytes=picture or data.columns.image=path" in text
    assert len(read(file, columns={"bytes": "picture"}).rows) == 24
    assert read(file, columns={"image": "path"}).paths("all")[0].is_file()
    with pytest.raises(ConfigError, match="image=a and bytes=b exclude each other"):
        compose("train", ["data.root=x", "data.columns.image=a", "data.columns.bytes=b"])


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f.rename(columns={"image": "a", "label": "b"}).assign(a=range(24)),
         "has no column that looks like paths of images (there are: a, b)"),
        (lambda f: f.assign(u="some", v="more").rename(columns={"label": "z"}),
         "has no column that looks like a label (there are: image, z, u, v)"),
        (lambda f: f.assign(label=[None, "", *f["label"][2:]]),
         "2 of 24 images have no label in column label (row 2, row 3)"),
        (lambda f: f.assign(label=[0.5, *[1.0] * 23]),
         "regression"),
        (lambda f: f.assign(split=["holdout", *["train"] * 23]),
         "column split has unknown split names: 'holdout'; a split is train, val"),
        (lambda f: f.assign(split=["test"] * 24), "has test, but no train"),
        (lambda f: f.assign(image=["../secret.png", "/etc/passwd", *f["image"][2:]]),
         "2 paths lead out of"),
        (lambda f: f.assign(image=["https://a.b/c.jpg", *f["image"][1:]]),
         "1 link to the internet instead of paths"),
        (lambda f: f.assign(image=[None, *f["image"][1:]]), "1 row without a path (row 2)"),
        (lambda f: pd.concat([f, f.iloc[[3, 5]]]), "2 images stand in several rows: "),
        (lambda f: f.assign(image=["gone.png", *f["image"][1:]]), "gone.png: no such file"),
        (lambda f: f.assign(label=["a\nb", *f["label"][1:]]), "line breaks"),
        (lambda f: f.assign(label=["x" * 300, *f["label"][1:]]), "more than 250 characters"),
        (lambda f: f.assign(label="cat"), "column label has only one class, cat"),
        (lambda f: f.assign(weight=[-1, *[1] * 23]), "row 2 has the weight -1: 0 or more"),
        (lambda f: f.assign(weight=["x", *[1] * 23]), "the weights are not all numbers"),
        (lambda f: f.iloc[:0], "has no rows"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(photos, change, words):
    root, frame = photos
    options = {"task": "single"} if words == "regression" else {}
    assert words in problems_of(write(change(frame), root / "m.csv"), **options)


def test_several_problems_are_said_at_once(photos):
    root, frame = photos
    frame["split"] = ["nowhere", *["train"] * 23]
    frame["image"] = ["../a.png", *frame["image"][1:]]
    frame["label"] = [None, *frame["label"][1:]]
    lines = problems_of(write(frame, root / "m.csv")).splitlines()
    for words in ("lead", "unknown split names", "1 of 24 images has no label"):
        assert any(words in line for line in lines), lines


def test_columns_that_are_not_there(photos):
    root, frame = photos
    file = write(frame, root / "m.csv")
    text = problems_of(file, columns={"image": "imgae", "split": "zzz"})
    assert f"data.columns.image: {file} has no column imgae; did you mean image?" in text
    assert f"data.columns.split: {file} has no column zzz (there are: image, label)" in text


def test_unknown_class_in_val_names_its_row(photos):
    root, frame = photos
    frame["split"] = ["train"] * 12 + ["val"] * 12
    frame.loc[20, "label"] = "gren"
    text = problems_of(write(frame, root / "m.csv"))
    assert "val/gren (row 22) is a class that train does not have; did you mean green?" in text


def test_links_out_of_the_folder_are_refused(photos, tmp_path):
    root, frame = photos
    shutil.copy(root / "blue/00.png", tmp_path / "secret.png")
    (root / "blue/01.png").unlink()
    (root / "blue/01.png").symlink_to(tmp_path / "secret.png")
    (root / "red").rename(tmp_path / "red")
    (root / "red").symlink_to(tmp_path / "red")
    (root / "green/01.png").unlink()
    (root / "green/01.png").symlink_to(root / "blue/00.png")
    text = problems_of(write(frame, root / "m.csv"))
    assert text.startswith("9 of 24 images cannot be read:")
    assert "  blue/01.png: a link that leads out of the data folder" in text
    assert "green/01.png" not in text


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("m.csv", b"", "is empty"),
        ("m.csv", b"image,label\n1.png,caf\xe9\n", "line 2 is not UTF-8 (byte 0xe9)"),
        ("m.csv", "image,label\n".encode("utf-16"), "is UTF-16: save it as UTF-8"),
        ("m.csv", b"a/1.png,cat\na/2.png,dog\n", "the first line is no header (a/1.png)"),
        ("m.csv", b"image,label\n1.png,a\n2.png,b,c\n", "line 3 has 3 columns, the header has 2"),
        ("m.csv", b"image,image,label\n1.png,2.png,a\n", "there are several columns image"),
        ("m.csv", b"image,label\n1.png," + b"x" * 10_000_000, "line 2 has more than 4 MB"),
        ("m.csv", b"PK\x03\x04\0\0\0", "is not text: is it really a csv file?"),
        ("m.jsonl", b'{"image": "1.png"}\n{"image": \n', "line 2 is no JSON"),
        ("m.jsonl", b'["1.png", "cat"]\n', "line 1 is no object"),
        ("m.jsonl", b'{"image": "\xe9"}\n', "line 1 is not UTF-8"),
        ("m.jsonl", b'{"a": "' + b"x" * 10_000_000 + b'"}\n', "line 1 has more than 4 MB"),
        ("m.parquet", b"PAR1 rubbish", "is no Parquet file, or is cut off"),
        ("m.csv.gz", b"image,label\n", "cannot be read: "),
        ("m.zip", b"PK", "is a file, not a folder; unpack it if it is an archive"),
    ],
)
def test_files_that_are_no_manifest(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    assert words in problems_of(tmp_path / name)


def test_a_bad_line_far_down_is_named(photos):
    root, _ = photos
    lines = [json.dumps({"image": f"{n}.png", "label": "a"}) for n in range(5000)]
    lines[4321] = lines[4321].replace('"label"', "label")
    (root / "m.jsonl").write_text("\n".join(lines))
    assert "line 4,322 is no JSON" in problems_of(root / "m.jsonl")
    text = "image,label\n" + "".join(f"{n}.png,a\n" for n in range(5000))
    (root / "m.csv").write_bytes(text.encode() + b"x.png,\xff\n")
    assert "line 5,002 is not UTF-8" in problems_of(root / "m.csv")


def test_missing_files_and_tables_are_said(photos, tmp_path):
    root, frame = photos
    write(frame, root / "photos.csv")
    assert f"there is no file {root}/photo.csv" in problems_of(root / "photo.csv")
    assert "did you mean photos.csv?" in problems_of(root / "photo.csv")
    assert "data.table: there is no file" in problems_of(root, table=str(root / "x.csv"))


def test_settings_of_the_data_travel(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = compose("train", ["data.root=x", "data.table=t.csv"])
    moved = absolute_data(here.data)
    assert (moved.root, moved.table) == (f"{tmp_path}/x", f"{tmp_path}/t.csv")
    far = compose("train", ["data.root=s3://b/{0..9}.tar"])
    assert absolute_data(far.data).root == "s3://b/{0..9}.tar"


@pytest.mark.parametrize(
    "root", ["b/{0..9}.tar", "s-{0,1}.tar", "https://h/a=1.tar", "photos (1)", "a[1]", "'x{1}'"]
)
def test_names_with_signs_that_hydra_knows_need_no_quotes(root):
    assert compose("train", [f"data.root={root}"]).data.root == root.strip("'")


def test_interpolations_stay_what_they_are(monkeypatch):
    monkeypatch.setenv("PHOTOS", "/photos")
    assert compose("train", ["data.root=${oc.env:PHOTOS}/x"]).data.root == "/photos/x"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.columns.label=3"], "data.columns.label must be a column name or a list of them"),
        (["data.columns.label=[]"], "data.columns.label must be a column name or a list of them"),
        (["data.label_separator=''"], "data.label_separator must not be empty"),
        (["data.fold=3"], "data.fold=3, but there are no data.folds"),
        (["data.fold=5", "data.folds=5"], "data.fold=5, but data.folds=5; the first is 0"),
        (["data.val_fraction=0.5", "data.test_fraction=0.5"], "leave less than 5 % for train"),
        (["data.task=labels"], "data.task must be one of auto, single, multi, regression"),
        (["data.columns.lable=x"], "data.columns.lable"),
    ],
)
def test_settings_that_cannot_be_right(overrides, words):
    with pytest.raises(ConfigError) as caught:
        compose("train", ["data.root=x", *overrides])
    assert words in str(caught.value)


def test_packed_manifest(photos):
    root, frame = photos
    (root / "m.jsonl.gz").write_bytes(
        gzip.compress(frame.to_json(orient="records", lines=True).encode())
    )
    assert len(read(root / "m.jsonl.gz").rows) == 24
