"""Data sets of Hugging Face: saved folders, Parquet files, names of the hub."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tl.config import ColumnsConfig, DataConfig, DataFormat, Task
from tl.data import DataError, read_table
from tl.data.sources import source_format

datasets = pytest.importorskip("datasets")
CLASSES = ("blue", "green", "red")


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    """No progress bars, and the caches of the library in a folder of the test."""
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


@pytest.fixture
def photos(image_folder):
    """`<class>/<number>.png`, 8 each."""
    return image_folder(splits={"": 8})


def data_set(root, numbers=range(8), *, keep=False, **more):
    """Images of a folder as a data set, each class in turn."""
    rows = [(f"{root}/{name}/{n:02d}.png", i) for n in numbers for i, name in enumerate(CLASSES)]
    images = [{"bytes": Path(path).read_bytes(), "path": path[-10:]} if keep else path
              for path, _ in rows]  # fmt: skip
    columns = {"image": images, "label": [label for _, label in rows]}
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}
    for name, (values, feature) in more.items():
        columns[name], features[name] = values[: len(rows)], feature
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def read(root, cache_dir=None, columns=None, **options):
    config = DataConfig(root=str(root), columns=ColumnsConfig(**(columns or {})), **options)
    return read_table(config, seed=0, cache_dir=cache_dir)


def problems_of(root, **options):
    with pytest.raises(DataError) as caught:
        read(root, **options)
    return str(caught.value)


def test_saved_data_set_is_the_table_of_the_folder(photos, tmp_path):
    data_set(photos).save_to_disk(tmp_path / "saved", num_shards=2)
    table = read(tmp_path / "saved", cache_dir=tmp_path / "cache")
    by_folder = read(photos)
    assert table.classes == CLASSES
    assert table.fingerprint()["sha256"] == by_folder.fingerprint()["sha256"]
    assert {name.partition("#")[0] for name in table.rows["path"]} == {
        "data-00000-of-00002.arrow", "data-00001-of-00002.arrow",
    }  # fmt: skip
    images = pickle.loads(pickle.dumps(table.images("train")))
    assert images.open(3).size == (40, 32)
    assert not (tmp_path / "cache/unpacked").exists()


def test_saved_splits_are_kept(photos, tmp_path):
    parts = {"train": range(4), "validation": range(4, 6), "test": range(6, 8)}
    saved = datasets.DatasetDict({name: data_set(photos, n) for name, n in parts.items()})
    saved.save_to_disk(tmp_path / "saved")
    table = read(tmp_path / "saved")
    assert {s: sum(n.values()) for s, n in table.counts().items()} == {
        "train": 12, "val": 6, "test": 6,
    }  # fmt: skip
    assert table.split("val")["path"][0].startswith("validation/data-00000-of-00001.arrow#")


def test_no_library_is_needed_to_read_what_it_saved(photos, tmp_path):
    data_set(photos).save_to_disk(tmp_path / "saved")
    code = (
        "import sys; from tl.config import DataConfig; from tl.data import read_table;"
        f"t = read_table(DataConfig(root={str(tmp_path / 'saved')!r}), seed=0, cache_dir=None);"
        "print(len(t.rows), t.classes, {'datasets', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"24 {CLASSES} set()"


@pytest.mark.parametrize("folder", ["", "data"])
def test_parquet_files_with_splits_in_their_names(photos, tmp_path, folder):
    place = tmp_path / "copied" / folder
    place.mkdir(parents=True)
    data_set(photos, range(3), keep=True).to_parquet(place / "train-00000-of-00002.parquet")
    data_set(photos, range(3, 6), keep=True).to_parquet(place / "train-00001-of-00002.parquet")
    data_set(photos, range(6, 8), keep=True).to_parquet(place / "validation.parquet")
    (tmp_path / "copied/README.md").write_text("---\n---\n")
    table = read(tmp_path / "copied", cache_dir=tmp_path / "cache")
    assert table.classes == CLASSES
    assert {s: sum(n.values()) for s, n in table.counts().items()} == {"train": 18, "val": 6}
    assert table.images("val").read(0) == (photos / "blue/06.png").read_bytes()


def test_one_parquet_file_with_image_features_is_a_manifest(photos, tmp_path):
    data_set(photos, keep=True).to_parquet(tmp_path / "all.parquet")
    assert read(tmp_path / "all.parquet").classes == CLASSES


def test_several_labels_and_numbers(photos, tmp_path):
    several = datasets.Sequence(datasets.ClassLabel(names=["x", "y", "z"]))
    more = {
        "tags": ([[0, 2], [1], []] * 8, several),
        "price": ([n / 4 for n in range(24)], datasets.Value("float32")),
    }
    data_set(photos, **more).save_to_disk(tmp_path / "saved")
    table = read(tmp_path / "saved", columns={"label": "tags"})
    assert (table.task, table.classes) == (Task.multi, ("x", "y", "z"))
    assert table.targets("all").sum(axis=0).tolist() == [8, 8, 8]
    priced = read(tmp_path / "saved", columns={"label": "price"})
    assert (priced.task, priced.classes) == (Task.regression, ("price",))


def test_hidden_labels_are_named(photos, tmp_path):
    hidden = data_set(photos)
    hidden = hidden.map(lambda row, i: {**row, "label": -1 if i == 5 else row["label"]},
                        with_indices=True)  # fmt: skip
    hidden.save_to_disk(tmp_path / "saved")
    text = problems_of(tmp_path / "saved")
    assert "1 of 24 images has no label in column label (data-00000-of-00001.arrow, row 5)" in text


def test_classes_without_images_are_left_out(photos, tmp_path):
    data_set(photos).filter(lambda row: row["label"] != 1).save_to_disk(tmp_path / "saved")
    table = read(tmp_path / "saved")
    assert table.classes == ("blue", "red")
    assert "no training image of 1 class: green; left out" in table.notes
    assert sorted(set(table.rows["label"])) == [0, 1]


def test_imagefolder_with_metadata(photos):
    lines = [
        {"file_name": f"{name}/{n:02d}.png", "label": name} for name in CLASSES for n in range(8)
    ]
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    table = read(photos)
    assert (
        table.fingerprint()["sha256"]
        == read(photos, format=DataFormat.folder).fingerprint()["sha256"]
    )


def test_split_folders_are_splits_not_classes(image_folder):
    """A folder is read by our own rules: `imagefolder` may make classes of its splits."""
    assert read(image_folder()).classes == CLASSES


def test_formats_are_told_by_names(photos, tmp_path):
    data_set(photos, range(2)).save_to_disk(tmp_path / "saved")
    for root, expected in {
        tmp_path / "saved": "datasets",
        "hub:owner/name": "datasets",
        "s3://bucket/{000..009}.tar": "shards",
        photos: "folder",
    }.items():
        assert source_format(DataConfig(root=str(root))).value == expected


def test_damaged_data_sets_are_said(photos, tmp_path):
    data_set(photos).save_to_disk(tmp_path / "saved")
    arrow = tmp_path / "saved/data-00000-of-00001.arrow"
    shutil.copytree(tmp_path / "saved", tmp_path / "cut")
    whole = arrow.read_bytes()
    (tmp_path / "cut/data-00000-of-00001.arrow").write_bytes(whole[: len(whole) // 2])
    assert "is no Arrow file, or is cut off" in problems_of(tmp_path / "cut")
    arrow.unlink()
    text = problems_of(tmp_path / "saved")
    assert "state.json names files that are not there: data-00000-of-00001.arrow" in text
    (tmp_path / "saved/state.json").write_text("{")
    assert "state.json cannot be read" in problems_of(tmp_path / "saved")


def test_names_of_files_cannot_lead_out_of_the_folder(photos, tmp_path):
    data_set(photos).save_to_disk(tmp_path / "saved")
    state = tmp_path / "saved/state.json"
    noted = json.loads(state.read_text())
    noted["_data_files"] = [{"filename": "../../etc/passwd"}]
    state.write_text(json.dumps(noted))
    assert "names files that are not there: ../../etc/passwd" in problems_of(tmp_path / "saved")


def test_paths_without_bytes_must_stay_in_the_folder(photos, tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    data_set(photos).to_parquet(place / "paths.parquet")
    text = problems_of(place / "paths.parquet")
    assert "paths.parquet#0: no bytes, only a path out of the data folder" in text
    assert "datasets.save_to_disk keeps the images themselves" in text
    data_set(photos).to_parquet(photos / "paths.parquet")
    assert len(read(photos / "paths.parquet").rows) == 24


def test_unknown_splits_are_said(photos, tmp_path):
    parts = {"train": range(4), "unlabelled": range(4, 8)}
    saved = datasets.DatasetDict({name: data_set(photos, n) for name, n in parts.items()})
    saved.save_to_disk(tmp_path / "saved")
    assert "neither train, val nor test: 'unlabelled'" in problems_of(tmp_path / "saved")
    assert len(read(tmp_path / "saved/train").rows) == 12


def test_the_hub_out_of_reach_is_one_clear_message(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = problems_of("hub:nobody/nothing-at-all")
    assert text.startswith("data.root=hub:nobody/nothing-at-all cannot be loaded: ")
    assert text.endswith("with datasets.save_to_disk and name that folder")
    assert "\n" not in text
    assert "a name is hub:owner/name" in problems_of("hub:../../etc")


def test_a_data_set_by_name(photos, tmp_path, monkeypatch):
    """A name that the library finds here: its loading, and our reading of what it made."""
    place = tmp_path / "place" / "pets"
    place.mkdir(parents=True)
    data_set(photos).to_parquet(place / "train.parquet")
    monkeypatch.chdir(place.parent)
    table = read("hub:pets")
    assert table.classes == CLASSES
    assert table.fingerprint()["sha256"] == read(photos).fingerprint()["sha256"]


def test_files_that_a_loaded_data_set_names_are_read(photos, tmp_path, monkeypatch):
    """`imagefolder` keeps paths, not bytes; a name of the hub may be one."""
    place = tmp_path / "place"
    shutil.copytree(photos, place / "pets")
    monkeypatch.chdir(place)
    table = read("hub:pets")
    assert table.classes == CLASSES
    assert table.fingerprint()["sha256"] == read(photos).fingerprint()["sha256"]
