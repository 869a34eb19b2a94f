"""`tl sync` as a user meets it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
from commands import script

from tl.config import RequestError, TrackingConfig
from tl.tracking import run, runs_below, start_run, sync_run
from tl.tracking.spool import Spool

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Nobody waits for a server that is not there."""
    monkeypatch.setattr(run, "DRAIN_SECONDS", 1.0)


def waiting(folder, uri=NOWHERE, **settings):
    """The folder of a job whose store was away."""
    config = TrackingConfig(uri=uri, system_metrics=False, **settings)
    job = {"experiment": "sync", "run_name": folder.name, "output_dir": folder, "resume": False}
    with start_run(config, **job) as tracked:
        tracked.log_metrics({"a": 1.0}, step=3)
    return folder


def store():
    return mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])


def record(folder):
    return json.loads((folder / "run.json").read_text())


def test_a_folder_of_runs_is_sent_to_the_store_that_is_named(tl, tmp_path):
    for name in ("one", "two"):
        waiting(tmp_path / "all runs" / name)
    done = tl("sync", tmp_path / "all runs", f"tracking.uri={os.environ['MLFLOW_TRACKING_URI']}")
    assert done.code == 0, done.err
    assert done.out.count("sent 3 records; run ") == 2
    found = record(tmp_path / "all runs/one")
    assert store().get_run(found["run_id"]).data.metrics == {"a": 1.0}
    assert (found["status"], "waiting" in found) == ("FINISHED", False)
    again = tl("sync", tmp_path / "all runs/one")
    assert f"nothing waits; run {found['run_id']}" in again.out


def test_a_store_that_is_still_away_is_said_and_the_exit_code_is_1(tl, tmp_path):
    folder = waiting(tmp_path / "one")
    before = (folder / "spool/records.jsonl").read_bytes()
    done = tl("sync", f"run={folder}")
    assert "3 records still wait" in done.out
    assert "Connection refused" in done.out
    done.refused("3 records of 1 of 1 runs still wait", code=1)
    assert (folder / "spool/records.jsonl").read_bytes() == before


def test_folders_without_runs_are_all_named(tl, tmp_path):
    (tmp_path / "empty").mkdir()
    done = tl("sync", tmp_path / "empty", tmp_path / "nowhere")
    done.refused("empty is no run", "holds no run.json", "nowhere is no run", "no such folder")


def test_sync_without_a_folder_says_what_to_write(tl):
    tl("sync").refused("which run? tl sync runs/NAME")


def test_a_run_under_way_and_a_second_sync_are_left_alone(tl, tmp_path):
    folder = waiting(tmp_path / "one")
    spool = Spool(folder)  # as a job or another tl sync has it
    try:
        done = script("sync", folder)
    finally:
        spool.close()
    assert done.code == 0
    assert f"in use by {os.getpid()} on " in done.out
    assert sync_run(folder, os.environ["MLFLOW_TRACKING_URI"]).waiting == 0


def test_a_half_synced_run_goes_on_where_it_was(tmp_path, monkeypatch):
    folder = waiting(tmp_path / "one")
    uri = os.environ["MLFLOW_TRACKING_URI"]

    def stop(*_args, **_settings):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patch.setattr(mlflow.MlflowClient, "log_batch", stop)
        sync_run(folder, uri)
    assert record(folder)["run_id"] is not None
    assert record(folder)["waiting"] == 3
    done = sync_run(folder, uri)
    assert (done.sent, done.waiting) == (2, 0)
    (made,) = store().search_runs([record(folder)["experiment_id"]])
    assert made.info.run_id == record(folder)["run_id"]
    assert (made.data.metrics, made.info.status) == ({"a": 1.0}, "FINISHED")


def test_a_sync_that_was_killed_before_it_wrote_run_json_is_no_reason_for_a_second_run(tmp_path):
    folder = waiting(tmp_path / "one")
    before = (folder / "run.json").read_text()
    uri = os.environ["MLFLOW_TRACKING_URI"]
    spool = Spool(folder)
    made = store().create_run(
        store().create_experiment("sync"), tags={"tl.job": record(folder)["job"]}
    )
    spool.taken.tried.append(record(folder)["job"])
    spool.note()
    spool.close()
    assert (folder / "run.json").read_text() == before
    assert sync_run(folder, uri).sent == 3
    assert record(folder)["run_id"] == made.info.run_id
    assert len(store().search_runs([made.info.experiment_id])) == 1


def test_a_deleted_experiment_is_named_with_its_remedy(tl, tmp_path):
    uri = os.environ["MLFLOW_TRACKING_URI"]
    number = store().create_experiment("sync")
    store().delete_experiment(number)
    folder = waiting(tmp_path / "one")
    done = tl("sync", folder, f"tracking.uri={uri}")
    assert done.code == 1
    assert f"mlflow experiments restore -x {number}" in done.out
    store().restore_experiment(number)
    assert tl("sync", folder, f"tracking.uri={uri}").code == 0


def test_an_address_with_a_password_must_be_named_again(tl, tmp_path):
    folder = waiting(tmp_path / "one", uri="http://me:secret@127.0.0.1:9")
    assert "secret" not in "".join(p.read_text() for p in folder.rglob("*") if p.is_file())
    tl("sync", folder).refused("***@127.0.0.1:9 had a password", "tracking.uri=")


def test_runs_above_others_come_first(tmp_path):
    for name in ("a/fold-1", "a", "b", "a/fold-0"):
        folder = tmp_path / name
        (folder / "spool").mkdir(parents=True)
        (folder / "spool/records.jsonl").write_text("")
    found = [p.relative_to(tmp_path).as_posix() for p in runs_below([tmp_path])]
    assert found == ["a", "b", "a/fold-0", "a/fold-1"]
    with pytest.raises(RequestError):
        runs_below([Path("nowhere")])


def test_sync_loads_no_torch(tmp_path):
    code = "import sys; from tl.tracking import syncing; import mlflow; "
    code += "print({'torch', 'pytorch_lightning'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
