"""Who a run is: its name, its tags, its data sets, its phases, and the run above it."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commands import TINY, Command
from mlflow import MlflowClient

from tl.config import TrackingConfig
from tl.fingerprints import classes_sha256, images_sha256
from tl.runs.batches import varied_keys
from tl.tracking import TrackingError, start_run
from tl.tracking.dataset import dataset_inputs


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two phases on images with a copy in test, and what MLflow has of it."""
    from PIL import Image

    place = tmp_path_factory.mktemp("identity")
    rng = np.random.default_rng(0)
    for split, number in (("train", 6), ("val", 3), ("test", 3)):
        for name in ("blue", "red"):
            folder = place / "birds" / split / name
            folder.mkdir(parents=True)
            for i in range(number):
                pixels = rng.integers(0, 256, (32, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    first = place / "birds/test/blue/0.png"
    (place / "birds/test/blue/copy.png").write_bytes(first.read_bytes())
    command = [sys.executable, "-c", "from tl.pipelines import main; main()", "train"]
    store = f"sqlite:///{place}/mlflow.db"
    given = [f"data.root={place / 'birds'}", f"output_dir={place / 'run'}", "finetune=lp_ft"]
    given += ["+tracking.tags.team=b", f"tracking.uri={store}", "seed=7"]
    done = subprocess.run(
        [*command, *TINY, *given], capture_output=True, text=True, cwd=place, timeout=300
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((place / "run/run.json").read_text())
    client = MlflowClient(store)
    return place, client, client.get_run(record["run_id"]), record


def test_the_name_tells_a_run_apart(trained):
    _, _, run, record = trained
    assert len(record["job"]) == 32
    assert run.info.run_name == f"birds · test_resnet · lp_ft · {record['job'][:4]}"


def test_tags_say_what_a_run_is(trained):
    place, _, run, record = trained
    tags = run.data.tags
    wanted = {
        "tl.job": record["job"],
        "tl.kind": "train",
        "tl.method": "lp_ft",
        "tl.plan": "head, all",
        "tl.host": os.uname().nodename,
        "tl.output_dir": str(place / "run"),
        "model.name": "test_resnet.r160_in1k",
        "data.name": "birds",
        "data.classes": "2",
        "data.images": "25",
        "seed": "7",
        "team": "b",
    }
    assert {name: tags.get(name) for name in wanted} == wanted
    assert tags["model.weights_sha256"] == run.data.params["model.weights_sha256"]
    assert tags["data.classes_sha256"] == classes_sha256(["blue", "red"])
    assert {"tl.version", "git.commit", "git.dirty", "device"} <= set(tags)
    assert "tl.cell" not in tags, "nothing was decided"


def test_the_fingerprint_of_test_is_that_of_the_predictions(trained):
    place, _, run, _ = trained
    table = pd.read_parquet(place / "run/predictions.parquet")
    for split in ("val", "test"):
        digests = table.loc[table["split"] == split, "sha256"]
        assert run.data.tags[f"data.{split}_sha256"] == images_sha256(digests)
    test = table[table["split"] == "test"]
    assert (len(test), test["sha256"].nunique()) == (7, 6)
    assert images_sha256(test["sha256"]) == images_sha256(sorted(set(test["sha256"]), reverse=True))
    assert images_sha256(test["sha256"][1:3]) != images_sha256(test["sha256"])


def test_data_sets_are_logged_with_digest_source_and_counts(trained):
    place, _, run, _ = trained
    found = {i.dataset.name: i for i in run.inputs.dataset_inputs}
    assert set(found) == {"birds · train", "birds · val", "birds · test"}
    data = json.loads((place / "run/checkpoints/model.json").read_text())["data"]
    contexts = {"train": "training", "val": "validation", "test": "testing"}
    for split, context in contexts.items():
        one = found[f"birds · {split}"]
        assert [tag.value for tag in one.tags] == [context]
        assert one.dataset.digest == data["splits"][split]["sha256"][:36]
        assert json.loads(one.dataset.source) == {"uri": str(place / "birds")}
        assert one.dataset.source_type == "local"
    profile = json.loads(found["birds · test"].dataset.profile)
    assert profile == {"images": 7, "classes": 2, "images_of_each_class": {"blue": 4, "red": 3}}


@pytest.mark.parametrize(
    ("root", "kind", "source"),
    [
        ("hub:owner/flowers", "hugging_face", {"path": "owner/flowers"}),
        ("s3://bucket/a-*.tar", "s3", {"uri": "s3://bucket/a-*.tar"}),
        ("https://host/a.tar", "http", {"url": "https://host/a.tar"}),
    ],
)
def test_sources_of_data_have_their_kind(root, kind, source):
    splits = {"train": {"images": 2, "sha256": "0" * 64}}
    (one,) = dataset_inputs({"root": root, "splits": splits, "counts": {"train": {"a": 2}}})
    assert (one["source_type"], json.loads(one["source"])) == (kind, source)
    assert len(one["digest"]) == 36


def test_phases_are_marked_on_one_axis_of_steps(trained):
    place, client, run, _ = trained
    marks = client.get_metric_history(run.info.run_id, "train/phase")
    history = pd.read_csv(place / "run/history.csv")
    steps = client.get_metric_history(run.info.run_id, "train/loss")
    assert len(steps) == len(history)
    begin, last = marks[1].step, max(m.step for m in steps)
    assert [(m.step, m.value) for m in marks] == [
        *((0, 1.0), (begin, 1.0), (begin, 2.0), (marks[-1].step, 2.0))
    ]
    assert 0 < begin <= last < marks[-1].step
    assert run.data.tags["tl.phase.1"] == "head, from step 0"
    assert run.data.tags["tl.phase.2"] == f"all, from step {begin}"


# --- a run above others -------------------------------------------------------------------------


def test_a_sweep_is_one_run_with_its_jobs_below_it(capfd, monkeypatch, image_folder):
    done = Command(capfd, monkeypatch)(
        *("train", "-m", *TINY, f"data.root={image_folder()}", "output_dir=batch"),
        *("finetune=linear_probe,full", "finetune.epochs=1"),
    )
    assert done.code == 0, done.err
    client = MlflowClient()
    (experiment,) = [e for e in client.search_experiments() if e.name == "images"]
    found = client.search_runs([experiment.experiment_id])
    (top,) = [run for run in found if run.data.tags["tl.kind"] == "batch"]
    assert top.info.run_name.startswith("images · batch over finetune · ")
    assert top.info.status == "FINISHED"
    assert top.data.metrics["batch/jobs"] == 2
    assert top.data.metrics["batch/failed"] == 0
    jobs = [run for run in found if run.data.tags["tl.kind"] == "train"]
    assert {run.data.tags["mlflow.parentRunId"] for run in jobs} == {top.info.run_id}
    assert sorted(run.data.tags["tl.method"] for run in jobs) == ["full", "linear_probe"]
    best = max(run.data.metrics["val/acc"] for run in jobs)
    assert top.data.metrics["batch/best_val_acc"] == best
    with Path("batch/batch.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["finetune.method"] for row in rows] == ["linear_probe", "full"]
    assert {row["ended"] for row in rows} == {"done"}
    assert "batch.csv" in {f.path for f in client.list_artifacts(top.info.run_id)}
    assert "batch of 2 jobs" in done.out
    assert "TL_PARENT_RUN" not in os.environ


def test_a_job_that_fails_stays_in_the_table_of_its_sweep(capfd, monkeypatch, image_folder):
    done = Command(capfd, monkeypatch)(
        *("train", "-m", *TINY, f"data.root={image_folder()}", "output_dir=batch"),
        *("finetune=linear_probe", "finetune.epochs=1", "model.name=test_resnet,no_such_model"),
    )
    assert done.code == 1, done.out
    client = MlflowClient()
    found = client.search_runs([e.experiment_id for e in client.search_experiments()])
    (top,) = [run for run in found if run.data.tags["tl.kind"] == "batch"]
    assert top.data.metrics["batch/failed"] == 1
    assert top.info.status == "FAILED"


def test_what_follows_from_the_method_is_not_varied():
    plain = {"seed": 0, "finetune.method": "full", "finetune.head_lr": 0.1, "finetune.epochs": 5}
    probe = {**plain, "finetune.method": "probe", "finetune.head_lr": 0.2}
    assert varied_keys([plain, probe]) == ["finetune.method"]
    longer = {**probe, "finetune.epochs": 9, "seed": 1}
    assert varied_keys([plain, probe, longer]) == ["seed", "finetune.method", "finetune.epochs"]
    assert varied_keys([plain, plain]) == []


def job(folder, store):
    config = TrackingConfig(uri=store, system_metrics=False)
    return start_run(config, experiment="e", run_name="r", output_dir=folder, resume=False)


def test_the_environment_names_the_run_above_jobs_of_other_processes(tmp_path, monkeypatch):
    store = f"sqlite:///{tmp_path}/mlflow.db"
    with job(tmp_path / "top", store) as top:
        top.drain()
    monkeypatch.setenv("TL_PARENT_RUN", str(tmp_path / "top"))
    with job(tmp_path / "child", store) as child, job(tmp_path / "grandchild", store) as grandchild:
        pass
    client = MlflowClient(store)
    above = [client.get_run(r.run_id).data.tags["mlflow.parentRunId"] for r in (child, grandchild)]
    assert above == [top.run_id, child.run_id]
    monkeypatch.setenv("TL_PARENT_RUN", str(tmp_path / "gone"))
    with pytest.raises(TrackingError, match=r"TL_PARENT_RUN=.*gone names no folder of a run"):
        job(tmp_path / "other", store).__enter__()
    assert not (tmp_path / "other").exists()
