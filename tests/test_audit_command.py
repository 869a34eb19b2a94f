from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from commands import TINY, UNTRACKED, files
from mlflow import MlflowClient
from PIL import Image


@pytest.fixture
def spoilt(image_folder) -> Path:
    """Images of three classes with one file cut off, one leak and one label in doubt."""
    root = image_folder(splits={"train": 8, "val": 4}, size=(64, 64))
    whole = (root / "train/red/00.png").read_bytes()
    (root / "train/red/cut.png").write_bytes(whole[: len(whole) // 2])
    shutil.copy(root / "train/blue/00.png", root / "val/blue/leak.png")
    shutil.copy(root / "train/green/01.png", root / "train/blue/both.png")
    return root


def test_audit_shows_writes_and_logs_what_it_found(tl, spoilt):
    done = tl("audit", f"data.root={spoilt}", "output_dir=found")
    assert done.code == 0, done.err
    for text in (
        "38 images of 3 classes: 3 errors",
        "error      truncated",
        "copies_across_splits: 2 images with the same bytes lie in several splits, in 1 set: "
        "figures on",
        "copies_with_other_labels: 1 image stands under several labels, as 2 copies",
        "label errors, cut copies: they need a network: tl audit model=NAME",
        str(Path("found/audit.html").absolute()),
    ):
        assert text in done.out
    assert files(Path("found")) == {"audit.html", "audit.json", "quarantined.csv", "run.json"}
    report = json.loads(Path("found/audit.json").read_text())
    assert report["counts"]["error"] == 3
    by_kind = {finding["kind"]: finding for finding in report["findings"]}
    assert by_kind["truncated"]["files"][0]["name"] == "train/red/cut.png"
    assert by_kind["truncated"]["files"][0]["note"].startswith("truncated")
    assert by_kind["copies_across_splits"]["files"] == [
        {"name": "train/blue/00.png", "set": 1, "fix": "take out"},
        {"name": "val/blue/leak.png", "set": 1},
    ]
    run_id = json.loads(Path("found/run.json").read_text())["run_id"]
    client = MlflowClient()
    metrics = client.get_run(run_id).data.metrics
    assert (metrics["audit/errors"], metrics["audit/copies_across_splits"]) == (3, 2)
    assert {f.path for f in client.list_artifacts(run_id)} >= {"audit.html", "audit.json"}


def test_the_page_needs_nothing_else_and_escapes_names(tl, image_folder):
    root = image_folder(splits={"": 6}, classes=("blue", "red & <b>bold</b>"))
    name = "<script>alert(1)</script>.png".replace("/", "_")
    Image.new("RGB", (40, 32), (9, 9, 9)).save(root / "blue" / name)
    done = tl("audit", f"data.root={root}", "output_dir=found", "tracking.enabled=false")
    assert done.code == 0, done.err
    page = Path("found/audit.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "red &amp; &lt;b&gt;bold" in page
    assert page.count("data:image/jpeg;base64,") >= 1
    addresses = set(re.findall(r"(?:src|href)=\"([^\"]{1,10})", page))
    assert all(a.startswith(("data:image", "#")) for a in addresses)
    assert "prefers-color-scheme: dark" in page


def test_fail_exits_with_2_and_names_every_error(tl, spoilt):
    done = tl(
        "audit", f"data.root={spoilt}", "audit=fail", "output_dir=o", "tracking.enabled=false"
    )
    done.refused(
        "AuditError", "found 3 errors", "truncated", "copies_across_splits", "audit=warn goes on"
    )
    assert (Path("o") / "audit.html").is_file()


def test_fix_lists_and_touches_no_file(tl, spoilt):
    before = {f: (spoilt / f).read_bytes() for f in files(spoilt)}
    done = tl("audit", f"data.root={spoilt}", "audit=fix", "output_dir=o", "tracking.enabled=false")
    assert done.code == 0, done.err
    listed = pd.read_csv("o/quarantined.csv").set_index("path")["reason"].to_dict()
    assert listed.pop("train/red/cut.png").startswith("truncated")
    assert listed == {
        "train/blue/00.png": "audit: copies_across_splits",
        "train/blue/both.png": "audit: copies_with_other_labels",
        "train/green/01.png": "audit: copies_with_other_labels",
    }
    assert {f: (spoilt / f).read_bytes() for f in files(spoilt)} == before


def test_train_says_what_is_wrong_and_goes_on(tl, spoilt):
    (spoilt / "train/red/cut.png").unlink()
    done = tl("train", f"data.root={spoilt}", *TINY, "output_dir=run")
    assert done.code == 0, done.err
    assert "audit: 38 images of 3 classes: 2 errors" in done.out
    assert "copies_across_splits: 2 images" in done.out
    assert {"audit.json", "audit.html"} <= files(Path("run"))
    run_id = json.loads(Path("run/run.json").read_text())["run_id"]
    client = MlflowClient()
    assert client.get_run(run_id).data.metrics["audit/errors"] == 2
    assert {f.path for f in client.list_artifacts(run_id)} >= {"audit.html", "audit.json"}


def test_train_refuses_before_anything_is_written(tl, spoilt):
    (spoilt / "train/red/cut.png").unlink()
    done = tl("train", f"data.root={spoilt}", *UNTRACKED, "audit=fail", "output_dir=run")
    done.refused(
        "AuditError", "copies_across_splits", f"tl audit data.root={spoilt} shows the images"
    )
    assert not Path("run").exists()


def test_train_leaves_out_what_fix_takes(tl, spoilt):
    done = tl("train", f"data.root={spoilt}", *UNTRACKED, "audit=fix", "output_dir=run")
    assert done.code == 0, done.err
    assert "audit=fix left out 3 images" in done.out.replace("\n", " ")
    assert "22 train, 13 val images" in done.out
    listed = pd.read_csv("run/quarantined.csv")
    assert len(listed) == 4
    predictions = pd.read_parquet("run/predictions.parquet")
    assert np.isin("val/blue/leak.png", predictions["path"])


def test_off_looks_at_nothing(tl, spoilt):
    (spoilt / "train/red/cut.png").unlink()
    done = tl("train", f"data.root={spoilt}", *UNTRACKED, "audit=off", "output_dir=run")
    assert done.code == 0, done.err
    assert "audit:" not in done.out
    assert not {"audit.json", "audit.html"} & files(Path("run"))


def test_a_class_without_val_is_reported_by_audit_and_refused_by_train(tl, image_folder):
    root = image_folder()
    shutil.rmtree(root / "val/red")
    done = tl("audit", f"data.root={root}", "output_dir=o", "tracking.enabled=false")
    assert done.code == 0, done.err
    assert "class_missing: red has no image in val" in done.out
    tl("train", f"data.root={root}", *UNTRACKED).refused("no readable image of the class red")


@pytest.mark.parametrize("state", [1, 2])
def test_label_errors_by_a_network(tl, image_folder, state):
    torch.manual_seed(state)  # what others drew before changes nothing
    root = image_folder(splits={"train": 15, "val": 12}, size=(48, 48))
    Image.open(root / "train/blue/03.png").save(root / "train/red/wrong.bmp")
    done = tl(
        *("audit", f"data.root={root}", "output_dir=o", "tracking.enabled=false"),
        *("model.name=test_resnet", "model.weights=none", "model.image_size=32"),
    )
    assert done.code == 0, done.err
    report = json.loads(Path("o/audit.json").read_text())
    found = {f["kind"]: [x["name"] for x in f["files"]] for f in report["findings"]}
    assert found["label_errors"][0] == "train/red/wrong.bmp"
    copies = {"train/blue/03.png", "train/red/wrong.bmp"}
    assert set(found["near_copies_with_other_labels"]) == copies


def test_images_inside_a_table_are_audited_too(tl, image_folder):
    root = image_folder(splits={"": 8}, size=(64, 64))
    files_ = sorted(root.rglob("*.png"))
    rows = [
        {"image": f.read_bytes(), "tags": [f.parent.name, "all"], "person": f"p{i % 5}", "split": s}
        for i, f in enumerate(files_)
        for s in (["train", "val"] if i == 0 else ["val" if i % 3 == 0 else "train"])
    ]
    pd.DataFrame(rows).to_parquet("photos.parquet")
    done = tl(
        *("audit", "data.root=photos.parquet", "output_dir=o", "tracking.enabled=false"),
        *("data.columns.bytes=image", "data.columns.label=tags", "data.columns.group=person"),
    )
    assert done.code == 0, done.err
    report = json.loads(Path("o/audit.json").read_text())
    assert (report["task"], report["images"]) == ("multi", 25)
    found = {f["kind"]: f for f in report["findings"]}
    assert found["copies_across_splits"]["count"] == 2
    assert found["copies_across_splits"]["files"][0]["name"] == "photos.parquet#0"
    assert found["groups_across_splits"]["severity"] == "error"
    page = Path("o/audit.html").read_text()
    assert page.count("data:image/jpeg;base64,") >= 4
    assert "all, blue" in page


def test_an_unknown_model_is_refused(tl, image_folder):
    done = tl(
        "audit", f"data.root={image_folder()}", "model.name=resnet9000", "tracking.enabled=false"
    )
    done.refused("resnet9000")
