"""`mlflow run .`: what MLproject says, and that MLflow's run and the job's are one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import yaml
from commands import REPO, TINY

import tl
from tl.config import TrackingConfig
from tl.pipelines.commandline import spelled
from tl.tracking import StoreError, start_run
from tl.tracking.parents import GIVEN


@pytest.fixture
def given(tmp_path, monkeypatch) -> tuple[mlflow.MlflowClient, str]:
    """A run that somebody made for this process."""
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    run = client.create_run(client.create_experiment("by hand"), run_name="mine")
    monkeypatch.setenv(GIVEN, run.info.run_id)
    return client, run.info.run_id


def begin(tmp_path: Path, name: str, **more):
    config = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", system_metrics=False)
    return start_run(
        config, experiment="birds", run_name=name, output_dir=tmp_path / name, resume=False, **more
    )


def test_a_job_logs_into_the_run_that_was_made_for_it(given, tmp_path):
    client, number = given
    with begin(tmp_path, "first") as run:
        run.log_params({"seed": 1})
        with begin(tmp_path, "inner") as inner:
            pass
    assert run.run_id == number
    found = client.get_run(number)
    assert (found.info.run_name, found.info.status) == ("mine", "FINISHED")
    assert found.data.params == {"seed": "1"}
    assert found.data.tags["tl.output_dir"] == str(tmp_path / "first")
    with begin(tmp_path, "second") as second:
        pass
    for below in (inner, second):
        assert client.get_run(below.run_id).data.tags["mlflow.parentRunId"] == number


def test_jobs_of_a_batch_do_not_take_the_run_above_them(given, tmp_path, monkeypatch):
    client, number = given
    with begin(tmp_path, "batch", kind="batch") as batch:
        pass
    assert batch.run_id == number
    monkeypatch.setenv("TL_PARENT_RUN", str(tmp_path / "batch"))
    with begin(tmp_path, "job") as job:
        pass
    assert client.get_run(job.run_id).data.tags["mlflow.parentRunId"] == number


def test_a_run_that_the_store_does_not_know_is_refused(given, tmp_path, monkeypatch):
    monkeypatch.setenv(GIVEN, "0" * 32)
    text = r"does not know the run 0{32}[^$]*unset MLFLOW_RUN_ID"
    with pytest.raises(StoreError, match=text), begin(tmp_path, "first"):
        pass
    assert not (tmp_path / "first").exists()


def test_entry_points_are_commands_that_there_are(tmp_path):
    project = yaml.safe_load((REPO / "MLproject").read_text())
    assert project["entry_points"].keys() == {"main", "train", "batch", "advise"}
    for name, point in project["entry_points"].items():
        values = {
            key: value["default"] if isinstance(value, dict) else str(tmp_path)
            for key, value in point["parameters"].items()
        }
        assert set(re.findall(r"{(\w+)}", point["command"])) == set(values), name
        words = point["command"].format(**values).partition("exec tl ")[2].split()
        assert words.pop() == "$settings"
        if "-m" in words:
            words = [word.split(",")[0] for word in words if word != "-m"]
        assert tl.compose(words[0], spelled(words[0], words[1:])).data.root == str(tmp_path)


def test_its_environment_has_the_versions_that_were_tested(tmp_path):
    from mlflow.utils.environment import _PythonEnv

    env = _PythonEnv.from_yaml(str(REPO / "python_env.yaml"))
    assert env.dependencies == ["-c constraints.txt", "."]


@pytest.mark.slow
def test_mlflow_run_is_one_run(image_folder, tmp_path):
    data = image_folder(tmp_path / "my photos")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    settings = " ".join([*TINY, f"output_dir={tmp_path / 'run'}"])
    parameters = [f"data={data}", "model=test_resnet", f"settings={settings}"]
    command = [sys.executable, "-m", "mlflow", "run", REPO, "--env-manager", "local"]
    command += ["-e", "train", "--experiment-name", "birds", "--run-name", "by mlflow"]
    done = subprocess.run(
        [*command, *(part for p in parameters for part in ("-P", p))],
        env={
            **os.environ,
            "MLFLOW_TRACKING_URI": uri,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        },
        capture_output=True, text=True, cwd=tmp_path, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    client = mlflow.MlflowClient(uri)
    numbers = [e.experiment_id for e in client.search_experiments()]
    (run,) = client.search_runs(numbers)
    assert (run.info.run_name, run.info.status) == ("by mlflow", "FINISHED")
    assert run.data.params["data"] == f"'{data}'"  # as MLflow gave it to the shell
    assert run.data.params["model.name"] == "test_resnet.r160_in1k"
    assert run.data.metrics["val/acc"] >= 0
    assert client.get_experiment(run.info.experiment_id).name == "birds"
