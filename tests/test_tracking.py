from __future__ import annotations

import base64
import http.server
import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import mlflow
import numpy as np
import pytest
import pytorch_lightning as pl
import timm
import torch
from PIL import Image
from sqlalchemy import event
from sqlalchemy.engine import Engine

from tl.bundle import Bundle, Preprocessing
from tl.config import Interrupted, TlError, TrackingConfig
from tl.export import ModelCard, write_bundle
from tl.tracking import StoreError, TrackingError, check_store, default_uri, start_run
from tl.tracking import environment as described

REPO = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A working directory that must stay empty, and no store from outside."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return folder


@pytest.fixture(scope="session")
def ready_store(tmp_path_factory):
    """A database with MLflow's tables, which take seconds to make."""
    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def uri(ready_store, tmp_path):
    file = tmp_path / "mlflow.db"
    file.write_bytes(ready_store.read_bytes())
    return f"sqlite:///{file}"


@pytest.fixture
def plain_server():
    """Port of a web server that knows nothing of MLflow."""
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), http.server.BaseHTTPRequestHandler
    ) as server:
        server.RequestHandlerClass.do_GET = lambda self: self.send_error(404)
        server.RequestHandlerClass.do_POST = lambda self: self.send_error(404)
        server.RequestHandlerClass.log_message = lambda *_: None
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def job(uri, folder, *, resume=False, system_metrics=False, **settings):
    config = TrackingConfig(uri=uri, system_metrics=system_metrics, **settings)
    return start_run(config, experiment="ants", run_name="a run", output_dir=folder, resume=resume)


def stored(uri, run):
    return mlflow.MlflowClient(uri).get_run(run.run_id)


def history(uri, run, name):
    return [
        (m.step, m.value) for m in mlflow.MlflowClient(uri).get_metric_history(run.run_id, name)
    ]


def record(folder):
    return json.loads((folder / "run.json").read_text())


# --- one run per job ----------------------------------------------------------------------------


def test_a_job_is_one_finished_run_and_run_json_says_where(uri, tmp_path, elsewhere):
    out = tmp_path / "out"
    with job(uri, out, tags={"project": "x"}) as run:
        assert record(out)["status"] == "RUNNING"
        run.log_params({"finetune.head_lr": 1e-3, "data.root": "d"})
        run.log_metrics({"val/acc": 0.5, "weird @1 (top)": 1}, step=3)
        run.log_text("hello", "notes/a.txt")
    data = stored(uri, run)
    assert data.info.status == "FINISHED"
    assert data.data.params == {"finetune.head_lr": "0.001", "data.root": "d"}
    assert data.data.metrics == {"val/acc": 0.5, "weird _1 _top_": 1.0}
    assert data.data.tags["project"] == "x"
    job_id = data.data.tags["tl.job"]
    assert data.data.tags["mlflow.runName"] == f"a run · {job_id[:4]}"
    assert record(out) == {
        "run_id": run.run_id,
        "job": job_id,
        "experiment_id": data.info.experiment_id,
        "experiment": "ants",
        "status": "FINISHED",
        "tracking_uri": uri,
    }
    assert (tmp_path / "mlartifacts/ants" / run.run_id / "artifacts/notes/a.txt").exists()
    assert list(elsewhere.iterdir()) == []
    assert mlflow.active_run() is None


@pytest.mark.parametrize(
    ("error", "status", "tag"),
    [
        (ValueError("bad\nmore"), "FAILED", "ValueError: bad"),
        (KeyboardInterrupt(), "KILLED", None),
        (Interrupted(), "KILLED", None),
        (SystemExit(1), "FAILED", "SystemExit: 1"),
        (SystemExit(0), "FINISHED", None),
    ],
)
def test_status_tells_how_a_job_ended(uri, tmp_path, error, status, tag):
    with pytest.raises(type(error)) as caught, job(uri, tmp_path) as run:  # noqa: PT012
        run.log_metrics({"a": 1.0})
        raise error
    assert caught.value is error
    data = stored(uri, run)
    assert data.info.status == record(tmp_path)["status"] == status
    assert data.data.tags.get("error") == tag
    assert data.data.metrics == {"a": 1.0}


def test_a_disabled_run_does_nothing(tmp_path, elsewhere):
    config = TrackingConfig(enabled=False)
    with start_run(
        config, experiment="e", run_name="r", output_dir=tmp_path / "out", resume=True
    ) as run:
        run.log_params({"a": 1})
        run.log_metrics({"a": 1})
        run.log_tags({"a": 1})
        run.log_text("a", "a.txt")
        run.log_dict({}, "a.json")
        run.log_file(tmp_path / "missing")
        run.log_config("a: 1")
        run.log_environment()
        run.log_dataset({})
        run.flush()
        assert run.log_bundle(tmp_path, tmp_path) is None
        assert run.loggers(0) == []
    assert run.run_id is None
    assert not (tmp_path / "out").exists()
    assert list(elsewhere.iterdir()) == []


def test_other_processes_of_a_distributed_job_log_nothing(uri, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with job(uri, tmp_path / "out") as run:
        run.log_metrics({"a": 1})
    assert run.run_id is None
    assert not (tmp_path / "out").exists()


def test_jobs_of_one_process_do_not_inherit_the_store(uri, tmp_path, monkeypatch):
    with job(uri, tmp_path / "a"):
        assert mlflow.get_tracking_uri() == uri
    assert "MLFLOW_TRACKING_URI" not in os.environ
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db")
    with job(uri, tmp_path / "b"):
        pass
    assert mlflow.get_tracking_uri() == os.environ["MLFLOW_TRACKING_URI"] == "sqlite:///other.db"


def test_a_job_within_a_run_becomes_its_child(uri, tmp_path):
    with job(uri, tmp_path / "outer") as outer, job(uri, tmp_path / "inner") as inner:
        pass
    assert stored(uri, inner).data.tags["mlflow.parentRunId"] == outer.run_id
    assert stored(uri, outer).info.status == stored(uri, inner).info.status == "FINISHED"


# --- resume -------------------------------------------------------------------------------------


def test_resume_goes_on_in_the_same_run(uri, tmp_path):
    with pytest.raises(KeyboardInterrupt), job(uri, tmp_path) as first:  # noqa: PT012
        first.log_params({"seed": 0, "trainer.max_time": "1h"})
        first.log_metrics({"val/acc": 0.5}, step=1)
        raise KeyboardInterrupt
    with job(None, tmp_path, resume=True) as second:  # the store is that of run.json
        assert stored(uri, second).info.status == "RUNNING"
        second.log_params({"seed": 0, "trainer.max_time": "2h", "new": 1})
        second.log_metrics({"val/acc": 0.7}, step=2)
    assert second.run_id == first.run_id
    data = stored(uri, second)
    assert data.info.status == "FINISHED"
    assert data.data.params == {"seed": "0", "trainer.max_time": "1h", "new": "1"}
    assert data.data.tags["resume.trainer.max_time"] == "2h"
    assert "resume.seed" not in data.data.tags
    assert history(uri, second, "val/acc") == [(1, 0.5), (2, 0.7)]


def test_resume_without_a_record_starts_a_run(uri, tmp_path):
    with job(uri, tmp_path, resume=True) as run:
        pass
    assert stored(uri, run).info.status == "FINISHED"


def test_a_new_job_in_an_old_folder_is_a_new_run(uri, tmp_path):
    with job(uri, tmp_path) as first:
        pass
    with job(uri, tmp_path) as second:
        pass
    assert second.run_id != first.run_id
    assert record(tmp_path)["run_id"] == second.run_id


def test_resume_names_a_run_that_the_store_does_not_have(uri, tmp_path):
    unknown = {"run_id": "0" * 32, "tracking_uri": uri}
    (tmp_path / "run.json").write_text(json.dumps(unknown))
    with pytest.raises(StoreError, match=r"0{32}[\s\S]*delete .*run\.json") as caught:
        job(None, tmp_path, resume=True).__enter__()
    assert caught.value.exit_code == 2


def test_a_damaged_record_is_named(uri, tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(TrackingError, match=r"run\.json cannot be read"):
        job(uri, tmp_path, resume=True).__enter__()


# --- address of the store -----------------------------------------------------------------------


def test_the_config_comes_before_the_environment_and_that_before_the_default(
    elsewhere, monkeypatch
):
    assert default_uri(TrackingConfig()) == f"sqlite:///{elsewhere}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert default_uri(TrackingConfig()) == "http://server:5000"
    assert default_uri(TrackingConfig(uri="sqlite:///a/b.db")) == f"sqlite:///{elsewhere}/a/b.db"


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("sqlite:////dev/null/mlflow.db", ""),
        ("sqlite:///{tmp}/text.db", "file is not a database"),
        ("./mlruns", "no longer keeps runs in a plain folder"),
        ("file:///{tmp}", "no longer keeps runs in a plain folder"),
        ("ftp://user:secret@host/x", "unsupported URI"),
        ("mysql+nosuchdriver://user:secret@127.0.0.1:{port}/db", "nosuchdriver"),
        ("http://127.0.0.1:{port}", "no MLflow server"),
    ],
)
def test_a_store_that_can_never_work_is_one_error_within_ten_seconds(
    tmp_path, plain_server, address, reason
):
    (tmp_path / "text.db").write_text("no database " * 100)
    began = time.monotonic()
    with pytest.raises(StoreError) as caught:
        job(address.format(tmp=tmp_path, port=plain_server), tmp_path / "out").__enter__()
    assert time.monotonic() - began < 11
    text = str(caught.value)
    assert caught.value.exit_code == 2
    assert isinstance(caught.value, TlError)
    assert reason in text
    assert "tracking.enabled=false" in text
    assert "secret" not in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("0" * 12, "of a newer MLflow than the installed"),
        ("bd07f7e963c5", "of an older MLflow than.*mlflow db upgrade sqlite:"),
    ],
)
def test_a_database_of_another_mlflow_is_named_with_its_remedy(uri, tmp_path, version, reason):
    with sqlite3.connect(uri.removeprefix("sqlite:///")) as database:
        database.execute("UPDATE alembic_version SET version_num = ?", (version,))
        # As the real one of an older version has not: MLflow alone would add it unasked.
        database.execute("DROP TABLE logged_model_tags")
    before = Path(uri.removeprefix("sqlite:///")).read_bytes()
    with pytest.raises(StoreError, match=reason):
        job(uri, tmp_path / "out").__enter__()
    assert Path(uri.removeprefix("sqlite:///")).read_bytes() == before
    assert not (tmp_path / "out").exists()


def test_a_deleted_experiment_is_named_with_its_remedy(uri, tmp_path):
    with job(uri, tmp_path):
        pass
    mlflow.MlflowClient(uri).delete_experiment(record(tmp_path)["experiment_id"])
    with pytest.raises(StoreError, match=r"'ants' was deleted; .*mlflow experiments restore"):
        job(uri, tmp_path).__enter__()


def test_passwords_of_addresses_are_not_written(uri, tmp_path):
    with job(uri, tmp_path) as run:
        run.log_config("tracking:\n  uri: https://me:secret@host/x\n")
        run.log_params({"tracking.uri": "https://me:secret@host/x"})
    assert stored(uri, run).data.params == {"tracking.uri": "https://***@host/x"}
    files = mlflow.MlflowClient(uri).download_artifacts(run.run_id, "config.yaml")
    assert Path(files).read_text() == "tracking:\n  uri: https://***@host/x\n"


# --- metrics ------------------------------------------------------------------------------------


def test_metrics_are_written_in_batches(uri, tmp_path, monkeypatch):
    batches = []
    log_batch = mlflow.MlflowClient.log_batch

    def counted(self, run_id, metrics=(), **others):
        batches.append(len(metrics))
        return log_batch(self, run_id, metrics=metrics, **others)

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", counted)
    with job(uri, tmp_path) as run:
        for step in range(3000):
            run.log_metrics({"train/loss": 1 / (step + 1)}, step=step)
    assert len(batches) <= 5
    assert history(uri, run, "train/loss") == [(s, 1 / (s + 1)) for s in range(3000)]


def test_metrics_arrive_while_the_job_goes_on(uri, tmp_path):
    with job(uri, tmp_path) as run:
        run.log_metrics({"a": 1.0}, step=0)
        deadline = time.monotonic() + 12
        while not history(uri, run, "a") and time.monotonic() < deadline:
            time.sleep(0.2)
        assert history(uri, run, "a") == [(0, 1.0)]
        assert stored(uri, run).info.status == "RUNNING"


def test_values_that_are_no_number_are_kept(uri, tmp_path):
    with job(uri, tmp_path) as run:
        run.log_metrics({"nan": float("nan"), "numpy": np.float32(0.5), "torch": torch.tensor(2.0)})
    metrics = stored(uri, run).data.metrics
    assert np.isnan(metrics["nan"])
    assert (metrics["numpy"], metrics["torch"]) == (0.5, 2.0)


def test_long_and_many_values_fit(uri, tmp_path):
    with job(uri, tmp_path) as run:
        run.log_params({**{f"p{i}": i for i in range(250)}, "long": "x" * 9000})
        run.log_tags({**{f"t{i}": i for i in range(250)}, "long": "x" * 9000})
    data = stored(uri, run).data
    assert len(data.params) == 251
    assert data.params["long"] == "x" * 6000
    assert data.tags["t249"] == "249"
    assert len(data.tags["long"]) == 8000


def test_a_missing_file_is_named(uri, tmp_path):
    with job(uri, tmp_path) as run, pytest.raises(TrackingError, match=r"did not take .*gone\.png"):
        run.log_file(tmp_path / "gone.png")


def test_system_metrics_are_there_even_for_a_short_job(uri, tmp_path):
    with job(uri, tmp_path, system_metrics=True):
        pass
    with job(uri, tmp_path, system_metrics=True, resume=True) as run:
        pass
    metrics = stored(uri, run).data.metrics
    assert 0 < metrics["system/system_memory_usage_percentage"] <= 100
    steps = [step for step, _ in history(uri, run, "system/cpu_utilization_percentage")]
    assert steps == [0, 1]


# --- where it ran -------------------------------------------------------------------------------


def test_the_environment_is_logged(uri, tmp_path):
    with job(uri, tmp_path) as run:
        run.log_environment()
        run.log_dataset({"sha256": "ab", "images": 9, "classes": ["a", "b"], "counts": {}})
        assert run.drain()
        client = mlflow.MlflowClient(uri)
        values = json.loads(
            Path(client.download_artifacts(run.run_id, "environment.json")).read_text()
        )
        data = json.loads(Path(client.download_artifacts(run.run_id, "data.json")).read_text())
    tags = stored(uri, run).data.tags
    assert tags["version.torch"] == values["packages"]["torch"]
    assert tags["version.python"] == sys.version.split()[0] == values["python"]
    assert tags["device"] == ", ".join(values["devices"])
    assert (tags["data.sha256"], tags["data.images"], tags["data.classes"]) == ("ab", "9", "2")
    assert data["classes"] == ["a", "b"]
    assert values["command"] == tags["command"]


def git(folder, *arguments):
    identity = ("-c", "user.name=n", "-c", "user.email=e@example.org")
    subprocess.run(["git", *identity, "-C", folder, *arguments], check=True, capture_output=True)


def test_git_revision_knows_commit_and_changes(tmp_path):
    git(tmp_path, "init", "-b", "main")
    assert described.git_revision(tmp_path) is None  # no commit yet
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-m", "first")
    clean = described.git_revision(tmp_path)
    assert clean is not None
    assert (len(clean["commit"]), clean["branch"], clean["dirty"]) == (40, "main", False)
    (tmp_path / "a").write_text("2")
    assert described.git_revision(tmp_path) == {**clean, "dirty": True}


def test_git_revision_without_repository_or_git(tmp_path, monkeypatch):
    assert described.git_revision(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert described.git_revision(REPO) is None


def test_nothing_of_mlflow_reaches_the_screen(tmp_path, elsewhere):
    script = f"""
import logging; logging.basicConfig(level=logging.INFO)
from pathlib import Path
from tl.config import TrackingConfig
from tl.tracking import start_run
out = Path({str(tmp_path)!r}) / "out"
with start_run(TrackingConfig(), experiment="e", run_name="r", output_dir=out, resume=False) as run:
    run.log_metrics({{"a": 1}})
    run.log_environment()
"""
    hidden = {**os.environ, "PATH": str(tmp_path), "PYTHONPATH": str(REPO)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=hidden
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(p.name for p in elsewhere.iterdir()) == ["mlartifacts", "mlflow.db"]


def test_mlflow_reports_its_use_to_nobody(tmp_path):
    # Without pytest's and a CI's variables, which switch the reports off, too.
    plain = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(REPO)}
    script = "import tl, mlflow.telemetry; print(mlflow.telemetry.get_telemetry_client())"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=plain, check=True
    )
    assert done.stdout == "None\n"


def test_importing_the_room_loads_neither_mlflow_nor_torch():
    script = "import sys, tl.tracking; print(sorted({'mlflow', 'torch'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=REPO, check=True
    )
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("pool", ["QueuePool", "NullPool"])
def test_a_new_store_is_made_without_syncs_and_written_with_them(tmp_path, monkeypatch, pool):
    monkeypatch.setenv("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", pool)
    levels = {"CREATE": set(), "INSERT": set()}

    def note(_connection, cursor, statement, *_):
        level = cursor.connection.execute("PRAGMA synchronous").fetchone()[0]
        levels.get(statement.split()[0], set()).add(level)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        new = f"sqlite:///{tmp_path}/new.db"
        check_store(TrackingConfig(uri=new), resume=False)
        assert levels["CREATE"] == {0}
        levels["INSERT"].clear()
        with job(new, tmp_path / "out") as run:
            run.log_params({"a": 1})
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    assert levels == {"CREATE": {0}, "INSERT": {2}}
    assert stored(new, run).data.params == {"a": "1"}


@pytest.mark.slow
def test_jobs_that_start_at_once_share_a_new_store(tmp_path):
    script = f"""
import sys
from pathlib import Path
from tl.config import TrackingConfig
from tl.tracking import start_run
config = TrackingConfig(uri="sqlite:///{tmp_path}/new/mlflow.db", system_metrics=False)
out = Path({str(tmp_path)!r}) / sys.argv[1]
with start_run(config, experiment="e", run_name="r", output_dir=out, resume=False) as run:
    run.log_metrics({{"a": 1}})
"""
    environ = {**os.environ, "PYTHONPATH": str(REPO)}
    started = [
        subprocess.Popen([sys.executable, "-c", script, name], env=environ, stderr=subprocess.PIPE)
        for name in ("a", "b", "c")
    ]
    errors = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], errors
    records = [record(tmp_path / name) for name in ("a", "b", "c")]
    assert {r["status"] for r in records} == {"FINISHED"}
    assert len({r["experiment_id"] for r in records}) == 1
    assert len({r["run_id"] for r in records}) == 3


# --- Lightning ----------------------------------------------------------------------------------


class Line(pl.LightningModule):
    """The smallest thing that trains."""

    def __init__(self):
        super().__init__()
        self.save_hyperparameters({"width": 1})
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, index):
        loss = self.layer(batch).square().mean()
        self.log("train/loss", loss, on_step=True, on_epoch=False)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(run, offset, folder):
    data = torch.utils.data.DataLoader(torch.ones(6, 1), batch_size=2)
    trainer = pl.Trainer(
        max_epochs=2,
        logger=run.loggers(offset),
        accelerator="cpu",
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[pl.callbacks.LearningRateMonitor(logging_interval="step")],
    )
    trainer.fit(Line(), data)
    return trainer


def test_phases_follow_each_other_in_one_open_run(uri, tmp_path, elsewhere):
    out = tmp_path / "out"
    with job(uri, out) as run:
        first = fit(run, 0, out)
        assert stored(uri, run).info.status == "RUNNING"
        fit(run, first.global_step, out)
        assert run.drain()
        assert stored(uri, run).info.status == "RUNNING"
        assert [step for step, _ in history(uri, run, "train/loss")] == list(range(12))
    data = stored(uri, run)
    assert data.info.status == "FINISHED"
    assert data.data.metrics["lr-SGD"] == pytest.approx(0.1)
    assert data.data.params == {}
    assert list(elsewhere.iterdir()) == []


def test_logging_costs_little(uri, tmp_path):
    with job(uri, tmp_path) as run:
        logger = run.loggers(0)[0]
        began = time.perf_counter()
        for step in range(2000):
            logger.log_metrics({"train/loss": 1.0, "lr-head": 0.1, "lr-stage4": 0.01}, step)
        per_step = (time.perf_counter() - began) / 2000
    assert per_step < 0.003  # an unbatched call to SQLite takes five times as long


# --- the bundle as a model ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A real bundle of an untrained little network, and an image of its kind."""
    folder = tmp_path_factory.mktemp("bundle")
    image = folder / "a picture.png"
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(image)
    torch.manual_seed(0)
    write_bundle(
        folder / "bundle",
        model=timm.create_model("test_resnet", num_classes=3),
        classes=["ants", "bees", "wasps"],
        preprocessing=Preprocessing.from_dict(
            {
                "input_size": [3, 32, 32],
                "mean": [0.5, 0.5, 0.5],
                "std": [0.5, 0.5, 0.5],
                "interpolation": "bicubic",
                "crop_pct": 0.9,
                "crop_mode": "center",
            }
        ),
        golden=[image],
        card=ModelCard(
            title="test", data={"images": 1}, backbone="test_resnet", weights="none",
            weights_sha256=None, licence=None, method="none", plan="", metrics={}, seed=0,
            created="today",
        ),
    )  # fmt: skip
    return folder / "bundle", image


def test_a_bundle_is_a_model_that_mlflow_loads_and_asks(uri, tmp_path, elsewhere, bundle):
    folder, image = bundle
    with job(uri, tmp_path / "out") as run:
        address = run.log_bundle(folder, image)
        assert address.startswith("models:/")
        model = mlflow.pyfunc.load_model(address)
        same = mlflow.pyfunc.load_model(f"runs:/{run.run_id}/bundle")
    text = base64.b64encode(image.read_bytes()).decode()
    answer = model.predict([{"image": text}])
    expected = Bundle.load(folder).probabilities([image])[0]
    assert answer["label"][0] == ["ants", "bees", "wasps"][expected.argmax()]
    assert answer["score"][0] == pytest.approx(expected.max(), abs=1e-6)
    assert list(answer["probabilities"][0].values()) == pytest.approx(expected.tolist(), abs=1e-6)
    assert same.predict(model.input_example)["label"][0] == answer["label"][0]
    assert [c.name for c in model.metadata.signature.inputs.inputs] == ["image"]
    assert [c.name for c in model.metadata.signature.outputs.inputs] == [
        *("label", "score", "probabilities"),
    ]
    found = mlflow.MlflowClient(uri).get_logged_model(address.removeprefix("models:/"))
    assert found.source_run_id == run.run_id
    assert found.status == "READY"
    assert list(elsewhere.iterdir()) == []


def test_the_logged_model_needs_neither_tl_nor_torch(uri, tmp_path, bundle):
    folder, image = bundle
    with job(uri, tmp_path / "out") as run:
        model = mlflow.MlflowClient(uri).get_logged_model(
            run.log_bundle(folder).removeprefix("models:/")
        )
    place = Path(model.artifact_location.removeprefix("file://"))
    requirements = (place / "requirements.txt").read_text()
    assert "torch" not in requirements
    assert "onnxruntime==" in requirements
    script = f"""
import sys
sys.modules["torch"] = sys.modules["tl"] = None
import mlflow
model = mlflow.pyfunc.load_model({str(place)!r})
print(model.predict([{{"image": {str(image)!r}}}])["label"][0])
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.strip() in {"ants", "bees", "wasps"}, done.stderr


def test_a_bundle_that_is_missing_is_named(uri, tmp_path):
    with job(uri, tmp_path) as run, pytest.raises(TrackingError, match="did not take the bundle"):
        run.log_bundle(tmp_path / "gone", tmp_path / "gone.png")


def test_logging_a_bundle_is_silent(uri, tmp_path, bundle, capfd):
    folder, image = bundle
    with job(uri, tmp_path / "out") as run:
        capfd.readouterr()
        run.log_bundle(folder, image)
        captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
