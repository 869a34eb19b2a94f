"""Bad input of data, one table: what is wrong, and the words that a person must read about it.

The forms of manifests, data sets and shards have tables of their own beside their tests; this one
holds that each kind of damage ends in one error that names the thing and the remedy, whatever the
form.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from bad_data import (
    GOOD,
    Maker,
    config_of,
    folder,
    link_out,
    links_that_lead_nowhere,
    only,
    picture,
    pipe,
    png_of,
    put,
    settings,
    shard,
    table,
    with_bytes,
)

from tl.config import ConfigError
from tl.data import DataError, read_table

HEADED = "image,label\n"
CASES: dict[str, tuple[Maker, str]] = {
    # the place
    "no such folder": (lambda place: {"root": place / "phtos"}, "there is no folder {place}/phtos"),
    "an empty folder": (lambda place: {"root": place}, "{place} is empty: put the images into"),
    "no images": (only("notes.txt"), "only 1 other file (notes.txt): put the images into <class>"),
    "no class folders": (only("1.png", "2.png"), "has no class folders with images, only 2 other"),
    "an archive": (
        lambda place: {"root": put(place, {"p.zip": b"PK\x03\x04"}) / "p.zip"},
        "p.zip is a file, not a folder; unpack it if it is an archive (manifests end in .csv, ",
    ),
    "a folder read as a manifest": (
        lambda place: {**folder()(place), "format": "manifest"},
        "is a folder; data.format=manifest wants a file, or data.table=FILE beside the folder",
    ),
    "a folder read as shards": (
        lambda place: {**folder()(place), "format": "shards"},
        "names no .tar file",
    ),
    "a folder read as a data set": (
        lambda place: {**folder()(place), "format": "datasets"},
        "is no data set: it has neither dataset_dict.json or state.json (datasets.save_to_disk)",
    ),
    # classes and splits
    "one class": (only("ant/1.png", "ant/2.png"), "has only one class, ant; a classifier needs"),
    "no train": (only("val/ant/1.png", "val/bee/2.png"), "has val, but no folder train"),
    "an empty split": (
        only("train/ant/1.png", "train/bee/2.png", "val/notes.txt"),
        "has no images for val (there is: train)",
    ),
    "a class missing from val": (
        only("train/ant/1.png", "train/bee/2.png", "val/ant/3.png"),
        "val has no readable image of the class bee: add images, or delete that class everywhere",
    ),
    "a class that train lacks": (
        only(
            "train/ant/1.png", "train/bee/2.png", "val/ant/3.png", "val/bee/4.png", "val/fly/5.png"
        ),
        "val/fly is a class that train does not have (known: ant, bee)",
    ),
    "too few for the folds": (
        lambda place: {**folder()(place), "folds": 9},
        "data.folds=9: ant, bee cannot be in every fold: each class needs at least 9 different",
    ),
    "a line break in a class": (
        lambda place: {"root": put(place, {**GOOD, "a\nb/0.png": picture(50)})},
        "1 class name with line breaks, control characters or nothing but spaces: 'a\\nb'; rename",
    ),
    # images
    "zero bytes": (folder(**{"ant__x.jpg": b""}), "ant/x.jpg: 0 bytes"),
    "a web page": (
        folder(**{"ant__x.jpg": "<!DOCTYPE html>\n<html><body>404</body></html>"}),
        "ant/x.jpg: a web page (HTML) under the name of an image; download the image itself",
    ),
    "text": (folder(**{"ant__x.png": "hello"}), "ant/x.png: not an image that Pillow can read"),
    "a truncated JPEG": (
        folder(**{"ant__x.jpg": picture(1, "JPEG")[:-80]}),
        "ant/x.jpg: truncated (",
    ),
    "a truncated PNG": (folder(**{"ant__x.png": picture(1)[:300]}), "ant/x.png: truncated"),
    "a PostScript file": (
        folder(**{"ant__x.png": "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}),
        "ant/x.png: EPS files hold no pixels; convert it to PNG or JPEG",
    ),
    "100 megapixels": (
        lambda place: {
            **folder(**{"ant__x.png": png_of(10_000, 10_001)})(place),
            "max_pixels": 100_000_000,
        },
        "ant/x.png: 10000 x 10001 pixels (100 megapixels) are over the limit of 100 megapixels",
    ),
    "a decompression bomb": (
        folder(**{"ant__x.png": png_of(60_000, 60_000)}),
        "ant/x.png: over the limit of 178.957 megapixels",
    ),
    "a pipe": (pipe, "ant/pipe.png: a pipe, socket or device, not a regular file"),
    "a broken link": (links_that_lead_nowhere, "ant/x.png: a link to a file that is not there"),
    # columns
    "a wrong column": (
        settings(columns={"label": "lable"}),
        "data.columns.label: {place}/m.csv has no column lable; did you mean label?",
    ),
    "a wrong column of images": (
        settings(columns={"image": "file"}),
        "data.columns.image: {place}/m.csv has no column file (there are: image, label)",
    ),
    "both bytes and paths": (with_bytes, "image=image and bytes=jpeg exclude each other"),
    "no column of labels": (
        table(lambda f: f.rename(columns={"label": "a"}).assign(b="x", c="y")),
        "has no column that looks like a label (there are: image, a, b, c)",
    ),
    # paths
    "a path with ..": (
        table(lambda f: f.assign(image=["../x.png", *f.image[1:]])),
        "m.csv: 1 path leads out of {place} (row 2: ../x.png): name the folder that holds all",
    ),
    "a path with .. within": (
        table(lambda f: f.assign(image=["ant/../../x.png", *f.image[1:]])),
        "1 path leads out of {place} (row 2: ant/../../x.png)",
    ),
    "an absolute path": (
        table(lambda f: f.assign(image=["/etc/passwd", *f.image[1:]])),
        "1 path leads out of {place} (row 2: /etc/passwd)",
    ),
    "a link that leads out": (link_out, "ant/link.png: a link that leads out of the data folder"),
    "an address": (
        table(lambda f: f.assign(image=["https://a.b/c.png", *f.image[1:]])),
        "1 link to the internet instead of paths (row 2: https://a.b/c.png): images elsewhere are",
    ),
    "a missing file": (
        table(lambda f: f.assign(image=["gone.png", *f.image[1:]])),
        "gone.png: no such file",
    ),
    "no path": (table(lambda f: f.assign(image=["", *f.image[1:]])), "1 row without a path (row 2"),
    "a row twice": (
        table(lambda f: pd.concat([f, f.iloc[[3]]])),
        "1 image stands in several rows: ant/3.png (row 5, row 12); keep one row an image",
    ),
    # labels
    "no label": (
        table(lambda f: f.assign(label=["", *f.label[1:]])),
        "1 of 10 images has no label in column label (row 2): fill it in, or delete those rows",
    ),
    "labels with fractions": (
        table(lambda f: f.assign(label=np.linspace(0, 1, 10)), task="single"),
        "column label has numbers with fractions (row 3, row 4, row 5 and 1 more of 8: 0.111111); "
        "a class is a name or a whole number, and data.task=regression predicts numbers",
    ),
    "names where numbers are asked for": (
        table(lambda f: f, task="regression"),
        "column label should be a number, but row 2 has 'ant'",
    ),
    "an endless number": (
        table(lambda f: f.assign(label=[np.inf, *range(9)]), task="regression"),
        "1 of 10 images has no number in column label (row 2)",
    ),
    "a name of 300 characters": (
        table(lambda f: f.assign(label=["x" * 300, *f.label[1:]])),
        "1 class name of more than 250 characters: xxxx",
    ),
    "an unknown split": (
        table(lambda f: f.assign(split=["holdout", *["train"] * 9])),
        "column split has unknown split names: 'holdout'; a split is train, val (valid, validation,"
        " dev) or test, or empty",
    ),
    "a negative weight": (
        table(lambda f: f.assign(weight=[-1, *[1] * 9])),
        "column weight: row 2 has the weight -1: 0 or more is expected",
    ),
    "one group": (
        table(lambda f: f.assign(group="p1"), columns={"group": "group"}),
        "each class needs at least two different groups of its own",
    ),
    # files of text
    "an empty manifest": (table(lambda _: ""), "m.csv is empty"),
    "a header alone": (table(lambda _: HEADED), "m.csv has no rows"),
    "no header": (
        table(lambda _: "ant/0.png,ant\nbee/0.png,bee\n"),
        "the first line is no header (ant/0.png); put the names of the columns there",
    ),
    "not UTF-8": (
        table(lambda _: HEADED.encode() + b"ant/0.png,caf\xe9\n"),
        "line 2 is not UTF-8 (byte 0xe9): save the file as UTF-8",
    ),
    "UTF-16": (table(lambda _: HEADED.encode("utf-16")), "m.csv is UTF-16: save it as UTF-8"),
    "a line of 10 MB": (
        table(lambda _: HEADED + "x" * 10_000_000),
        "line 2 has more than 4 MB; a manifest has one short line an image",
    ),
    "a cell too many": (
        table(lambda _: HEADED + "ant/0.png,ant\nant/1.png,ant,x\n"),
        "line 3 has 3 columns, the header has 2; put quotes round cells with a comma",
    ),
    "no JSON": (
        table(lambda _: '{"image": "ant/0.png", "label": "a"}\n{"image"\n', "m.jsonl"),
        "m.jsonl: line 2 is no JSON",
    ),
    "no Parquet": (
        table(lambda _: "PAR1 nothing", "m.parquet"),
        "m.parquet is no Parquet file, or is cut off",
    ),
    # shards
    "a shard with ..": (
        shard([("../x.png", picture(1)), ("../x.cls", b"ant")]),
        "1.tar: the name ../x.png leads out of the archive",
    ),
    "a shard with absolute names": (
        shard([("/etc/x.png", picture(1)), ("/etc/x.cls", b"ant")]),
        "1.tar: the name /etc/x.png leads out of the archive",
    ),
    "a shard with a device": (
        shard([("x.png", None), ("x.cls", b"ant")]),
        "1.tar: x.png is a device or a pipe; only regular files are read",
    ),
    "a truncated shard": (
        shard([("x.png", picture(1)), ("x.cls", b"ant")], cut=700),
        "1.tar: truncated, damaged or no tar file",
    ),
    "a shard with a name twice": (
        shard([("x.png", picture(1)), ("x.png", picture(2)), ("x.cls", b"ant")]),
        "1.tar: 1 member",
    ),
    "a shard without a label": (shard([("x.png", picture(1))]), "1 of 11 images has no label in"),
    "a shard with bad JSON": (
        shard([("x.png", picture(1)), ("x.json", b"{nope")]),
        "1.tar: x.json is no JSON",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_data_are_one_clear_error(tmp_path, name):
    make, words = CASES[name]
    place = tmp_path.resolve()
    with pytest.raises(ConfigError if name == "both bytes and paths" else DataError) as caught:
        read_table(config_of(make(place)), seed=0, cache_dir=None)
    text = str(caught.value)
    assert words.replace("{place}", str(place)) in text
    assert caught.value.exit_code == 2
    assert "Traceback" not in text
    assert len(text) < 2000, "long things are cut"


def test_there_are_many_cases():
    assert len(CASES) >= 60


def test_all_of_it_is_said_at_once(tmp_path):
    rows = ["../x.png,ant,train", "gone.png,,train", "ant/1.png,bee,nowhere", "bee/1.png,bee,"]
    found = table(lambda _: "image,label,split\n" + "\n".join(rows))(tmp_path)
    with pytest.raises(DataError) as caught:
        read_table(config_of(found), seed=0, cache_dir=None)
    text = str(caught.value)
    for words in ("leads out of", "has no label", "unknown split names: 'nowhere'"):
        assert words in text


@pytest.mark.parametrize("name", ["a/b", "ants 🐜", "Ünïcode", "-x", "a=b, c", "x" * 250])
def test_odd_names_of_classes_are_read(tmp_path, name):
    found = table(lambda f: f.assign(label=[name] * 5 + ["bee"] * 5))(tmp_path)
    assert set(read_table(config_of(found), seed=0, cache_dir=None).classes) == {name, "bee"}


@pytest.mark.parametrize("form", ["folder", "manifest"])
def test_names_that_differ_in_case_only_are_said(tmp_path, form):
    more = {"Ant/5.png": picture(50), "Ant/6.png": picture(51)}
    if form == "folder":
        found = {"root": put(tmp_path, {**GOOD, **more})}
    else:
        found = table(lambda f: f.assign(label=["Ant"] * 2 + list(f.label[2:])))(tmp_path)
    notes = read_table(config_of(found), seed=0, cache_dir=None).notes
    assert "class names that differ in upper and lower case only: Ant = ant" in notes


def test_the_command_line_says_the_same_and_exits_with_2(tmp_path):
    found = CASES["a path with .."][0](tmp_path.resolve())
    script = Path(sys.executable).with_name("tl")
    done = subprocess.run(
        [script, "train", f"data.root={found['root']}", "model=mobilenetv2_100"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "1 path leads out of" in done.stderr
    assert "Traceback" not in done.stderr
