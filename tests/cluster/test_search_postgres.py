"""Two commands on one PostgreSQL study, one of them killed in mid-trial."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from commands import SCRIPT
from mlflow import MlflowClient
from optuna.trial import TrialState
from servers import Postgres

pytestmark = pytest.mark.cluster

TRIALS = 6
JOB = [
    *("experiment=smoke", "model.image_size=32", "finetune=full", "finetune.epochs=12"),
    *("finetune.patience=0", "tracking.system_metrics=false", "export.enabled=false"),
    *("search.pruner=none", "search.folds=0", "cache.mode=off", f"search.trials={TRIALS}"),
]


def start(folder: Path, root: Path, uri: str) -> subprocess.Popen[str]:
    """One more command of the same words; `output_dir` may differ, as on another host."""
    args = [*JOB, f"data.root={root}", f"output_dir={folder}", f"search.storage={uri}"]
    return subprocess.Popen(
        [str(SCRIPT), "search", *args, "search.study=shared"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def await_(what: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 600) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def running_of(uri: str, pid: int) -> list[optuna.trial.FrozenTrial]:
    """Trials under way of a process."""
    try:
        study = optuna.load_study(study_name="shared", storage=uri)
    except KeyError:
        return []
    trials = study.get_trials(states=(TrialState.RUNNING,))
    return [t for t in trials if t.user_attrs.get("worker", "").split(" ")[1:2] == [str(pid)]]


def test_a_worker_is_killed_and_its_trial_is_tried_again(
    postgres: Postgres, image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    uri = postgres.create("search")
    root = image_folder(splits={"train": 16, "val": 8})
    # Both begin at once on an empty database: tables and study are made once.
    first, second = (start(tmp_path / name, root, uri) for name in ("one", "two"))
    await_(
        lambda: postgres.query("search", "SELECT 1 FROM pg_tables WHERE tablename='trials'"), first
    )
    lead = await_(lambda: _leader(tmp_path), first)
    victim, other = (second, first) if lead == "one" else (first, second)
    (lost, *_) = await_(lambda: running_of(uri, victim.pid), victim)
    run = tmp_path / ("two" if lead == "one" else "one") / f"trials/{lost.number:04d}/run.json"
    await_(lambda: run.is_file() and json.loads(run.read_text()).get("run_id"), victim)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    out, _ = other.communicate(timeout=900)
    assert other.returncode == 0, out

    study = optuna.load_study(study_name="shared", storage=uri)
    trials = study.get_trials()
    (marked,) = [t for t in trials if t.user_attrs.get("lost")]
    assert marked.number == lost.number
    assert marked.state == TrialState.FAIL
    assert f"its worker died (process {victim.pid}" in marked.user_attrs["error"]
    counted = [t for t in trials if t.state == TrialState.COMPLETE]
    assert len(counted) == TRIALS
    assert len(trials) == TRIALS + 1
    again = [t for t in counted if t.user_attrs.get("attempt") == 2]
    assert [t.params for t in again] == [marked.params]
    # Its results: one study, one winner, one look at the files of the leader.
    folder = tmp_path / lead
    found = json.loads((folder / "search.json").read_text())
    assert found["trials"]["complete"] == TRIALS
    assert found["trials"]["lost and tried again"] == 1
    rows = [*csv.DictReader((folder / "trials.csv").open())]
    assert sorted(r["state"] for r in rows) == [*["complete"] * TRIALS, "lost"]
    assert (folder / "best/metrics.json").is_file()
    # One MLflow run a trial, below that of the search.
    client, top = MlflowClient(), json.loads((folder / "run.json").read_text())["run_id"]
    experiment = client.get_run(top).info.experiment_id
    runs = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{top}'")
    kinds = [r.data.tags["tl.kind"] for r in runs]
    assert kinds.count("trial") == TRIALS + 1
    assert kinds.count("train") == 1
    done = [r for r in runs if r.data.tags.get("tl.trial.state") == "complete"]
    assert len(done) == TRIALS


def test_the_process_that_leads_is_killed_and_the_other_one_ends_the_search(
    postgres: Postgres, image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    uri = postgres.create("search_led")
    root, folder = image_folder(splits={"train": 16, "val": 8}), tmp_path / "search"
    first = start(folder, root, uri)
    await_(lambda: (folder / "search.yaml").is_file(), first)
    second = start(folder, root, uri)
    await_(lambda: running_of(uri, second.pid), second)
    await_(lambda: running_of(uri, first.pid), first)
    top = json.loads((folder / "run.json").read_text())["run_id"]
    first.send_signal(signal.SIGKILL)
    first.communicate()
    out, _ = second.communicate(timeout=900)
    assert second.returncode == 0, out
    found = json.loads((folder / "search.json").read_text())
    assert found["trials"]["complete"] == TRIALS
    assert found["trials"]["lost and tried again"] == 1
    assert (folder / "best/metrics.json").is_file()
    assert json.loads((folder / "run.json").read_text())["run_id"] == top
    assert MlflowClient().get_run(top).info.status == "FINISHED"


def _leader(place: Path) -> str | None:
    """Who set the search up: its folder has the config."""
    return next((n for n in ("one", "two") if (place / n / "search.yaml").is_file()), None)


def test_a_database_that_is_not_there_is_refused(
    postgres: Postgres, image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    uri = postgres.uri("nowhere")
    process = start(tmp_path / "one", image_folder(), uri)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 2, out
    assert "SearchError: search.storage=postgresql+psycopg://tl@127.0.0.1" in out
    assert 'database "nowhere" does not exist' in out
    assert "Traceback" not in out
