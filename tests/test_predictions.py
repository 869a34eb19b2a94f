"""Predictions of many images: what is found at a source, and the tables that are written."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from tl.predictions import PredictError, find_images, output_path, write_predictions


@pytest.fixture
def table():
    return pd.DataFrame(
        {
            "source": ["a.png", "b.png"],
            "label": ["ants", None],
            "score": [0.75, float("nan")],
            "top": [[["ants", 0.75], ["bees", 0.25]], []],
            "error": [None, "truncated"],
        }
    )


def names(paths):
    return [path.name for path in paths]


def test_a_folder_is_searched_in_depth_without_hidden_and_other_files(tmp_path):
    for name in ("b.PNG", "sub/a.jpg", ".hidden/c.png", ".d.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert sorted(names(find_images(str(tmp_path)))) == ["a.jpg", "b.PNG"]


def test_a_named_file_is_taken_whatever_its_ending(tmp_path):
    (tmp_path / "photo").touch()
    assert names(find_images(str(tmp_path / "photo"))) == ["photo"]


def test_a_pattern_is_expanded_and_sorted(tmp_path):
    for name in ("b.png", "a.png", "c.txt"):
        (tmp_path / name).touch()
    assert names(find_images(str(tmp_path / "*"))) == ["a.png", "b.png"]
    assert names(find_images(str(tmp_path / "**/a*"))) == ["a.png"]


@pytest.mark.parametrize("source", ["", "nix.png", "*.png"])
def test_nothing_found_is_said(tmp_path, source):
    with pytest.raises(PredictError, match=r"^source: no .*endings:.*\.png"):
        find_images(f"{tmp_path}/{source}")


def test_the_output_must_have_a_known_format_and_a_folder_that_can_be_made(tmp_path):
    assert output_path(None, None) is None
    assert output_path(None, str(tmp_path / "new")) == tmp_path / "new/predictions.parquet"
    assert output_path("p.csv", str(tmp_path)) == tmp_path / "p.csv"
    with pytest.raises(PredictError, match=r"output: p.txt must end in .parquet, .csv, .json"):
        output_path("p.txt", None)
    (tmp_path / "file").touch()
    with pytest.raises(PredictError, match="cannot make"):
        output_path("p.csv", str(tmp_path / "file/sub"))


def test_each_format_holds_the_same(table, tmp_path):
    for end in (".parquet", ".csv", ".json"):
        write_predictions(table, tmp_path / f"p{end}")
    parquet = pd.read_parquet(tmp_path / "p.parquet")
    csv = pd.read_csv(tmp_path / "p.csv")
    rows = json.loads((tmp_path / "p.json").read_text())
    assert parquet["label"].tolist()[0] == csv["label"][0] == rows[0]["label"] == "ants"
    assert parquet["top"][0][1] == {"label": "bees", "score": 0.25}
    assert csv["top"][0] == "ants:0.750000|bees:0.250000"
    assert rows[0]["top"] == [["ants", 0.75], ["bees", 0.25]]
    assert [row["error"] for row in rows] == [None, "truncated"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.csv", "p.json", "p.parquet"]


def test_a_file_that_cannot_be_written_is_named(table, tmp_path):
    with pytest.raises(PredictError, match=r"output: cannot write .*p.csv"):
        write_predictions(table, tmp_path / "gone/p.csv")
