"""Jobs whose MLflow server is down, dies, hangs, fails or refuses: real server, real faults."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest
import servers
from commands import TINY, script
from faulty import faulty

from tl.config import TrackingConfig
from tl.tracking import StoreError, run, runs_below, sending, start_run, sync_run, writer
from tl.tracking.spool import Spool

REPO = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """A database with MLflow's tables, which take seconds to make."""
    file = tmp_path_factory.mktemp("tables") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{file}").search_experiments()
    return file.read_bytes()


@pytest.fixture(scope="module")
def mlflow_url(tables, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    (folder / "mlflow.db").write_bytes(tables)
    with servers.mlflow_server(f"sqlite:///{folder}/mlflow.db", folder) as server:
        yield server.url


@pytest.fixture
def server(mlflow_url, monkeypatch):
    """The real server behind one that can fail; nobody waits long for it."""
    monkeypatch.setattr(sending, "SECONDS", 0.3)
    monkeypatch.setattr(sending, "RETRY_SECONDS", (0.2, 1.0))
    monkeypatch.setattr(writer, "SECONDS", 2)
    monkeypatch.setattr(writer, "ANSWER_SECONDS", 2)
    monkeypatch.setattr("tl.tracking.store.CONNECT_SECONDS", 1)
    monkeypatch.setattr(run, "DRAIN_SECONDS", 4.0)
    run._away.clear()
    with faulty(mlflow_url) as server:
        yield server


def job(server, folder, *, resume=False, **settings):
    config = TrackingConfig(uri=server.url, system_metrics=False, **settings)
    return start_run(config, experiment="out", run_name="a run", output_dir=folder, resume=resume)


def record(folder):
    return json.loads((folder / "run.json").read_text())


def stored(url, run_id):
    return mlflow.MlflowClient(url).get_run(run_id)


def history(url, run_id, name):
    found = mlflow.MlflowClient(url).get_metric_history(run_id, name)
    return [(m.step, m.value) for m in found]


def text_of(url, run_id, name):
    return Path(mlflow.MlflowClient(url).download_artifacts(run_id, name)).read_text()


def work(run, steps=range(5)):
    for step in steps:
        run.log_metrics({"a": float(step)}, step=step)


FAULTS = ["down", "500", "hang", "401", "403", "deaf"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_fails_in_mid_run_loses_nothing(server, mlflow_url, tmp_path, caplog, fault):
    with job(server, tmp_path) as run:
        work(run, range(5))
        assert run.drain()
        server.turn(fault)
        began = time.monotonic()
        work(run, range(5, 10))
        run.log_tags({"late": "yes"})
        run.log_text("words", "notes/late.txt")
        assert time.monotonic() - began < 0.5  # the job does not feel it
        time.sleep(2.5)
        server.turn("up")
        run.log_params({"seed": 3})
        assert run.drain()
    assert "does not take records" in caplog.text
    assert history(mlflow_url, run.run_id, "a") == [(s, float(s)) for s in range(10)]
    data = stored(mlflow_url, run.run_id)
    assert data.info.status == "FINISHED"
    assert (data.data.tags["late"], data.data.params["seed"]) == ("yes", "3")
    assert text_of(mlflow_url, run.run_id, "notes/late.txt") == "words"
    assert not (tmp_path / "spool").exists()
    assert "waiting" not in record(tmp_path)


@pytest.mark.slow
def test_the_servers_of_a_team_are_stopped_killed_and_started_again(
    postgres, mlflow_tables, tmp_path, monkeypatch
):
    monkeypatch.setattr(sending, "SECONDS", 0.3)
    monkeypatch.setattr(sending, "RETRY_SECONDS", (0.5, 2.0))
    backend, port = postgres.create("outage", mlflow_tables), servers.free_port()
    config = TrackingConfig(uri=f"http://127.0.0.1:{port}", system_metrics=False)
    common = {"experiment": "out", "run_name": "a run", "resume": False}
    with (
        servers.mlflow_server(backend, tmp_path / "server", port=port) as server,
        start_run(config, output_dir=tmp_path / "out", **common) as found,
    ):
        work(found, range(10))
        assert found.drain()
        os.killpg(server.process.pid, signal.SIGSTOP)  # takes requests, and does them later
        work(found, range(10, 20))
        time.sleep(4)
        os.killpg(server.process.pid, signal.SIGCONT)
        assert found.drain(60)
        # The database ends all connections, as when it is started again.
        postgres.query(
            "postgres",
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'outage'",
        )
        work(found, range(20, 30))
        assert found.drain(60)
        servers.end(server.process, signal.SIGKILL)
        work(found, range(30, 40))
        time.sleep(2)
        with servers.mlflow_server(backend, tmp_path / "server", port=port) as again:
            work(found, range(40, 50))
            assert found.drain(60)
            metrics = history(again.url, found.run_id, "a")
    assert metrics == [(s, float(s)) for s in range(50)]
    assert record(tmp_path / "out")["waiting"] == 1  # the status: the server is gone for good


@pytest.mark.parametrize("fault", ["down", "500", "hang", "401", "403"])
def test_a_server_that_fails_at_start_and_end_gets_all_by_sync(
    server, mlflow_url, tmp_path, caplog, fault
):
    server.turn(fault)
    began = time.time()
    with job(server, tmp_path) as run:
        assert record(tmp_path)["status"] == "PENDING"
        assert run.run_id is None
        work(run)
        run.log_dict({"a": 1}, "a.json")
    assert time.time() - began < 20
    assert record(tmp_path)["status"] == "FINISHED"
    assert record(tmp_path)["run_id"] is None
    assert record(tmp_path)["waiting"] == 8
    last = caplog.records[-1].getMessage()
    assert last.startswith("8 records wait in")
    assert last.endswith(f"tl sync {tmp_path}")

    server.turn("up")
    done = sync_run(tmp_path)
    assert (done.sent, done.waiting) == (8, 0)
    known = record(tmp_path)
    data = stored(mlflow_url, known["run_id"])
    assert (known["status"], data.info.status) == ("FINISHED", "FINISHED")
    assert began - 1 < data.info.start_time / 1000 < began + 5
    assert data.info.end_time / 1000 < began + 20
    assert history(mlflow_url, known["run_id"], "a") == [(s, float(s)) for s in range(5)]
    assert not (tmp_path / "spool").exists()
    assert "nothing waits" in sync_run(tmp_path).words


def test_a_server_that_hangs_for_long_does_not_hold_up_the_end(server, tmp_path, monkeypatch):
    monkeypatch.setattr(sending, "LONG_SECONDS", 1.0)
    monkeypatch.setattr(run, "DRAIN_SECONDS", 60.0)
    server.turn("hang")
    with job(server, tmp_path) as found:
        work(found)
        time.sleep(3)
        began = time.monotonic()
    assert time.monotonic() - began < 4
    assert record(tmp_path)["waiting"] == 7
    server.turn("up")
    assert sync_run(tmp_path).waiting == 0


def test_a_run_that_was_made_though_nobody_heard_is_not_made_again(server, mlflow_url, tmp_path):
    server.turn("deaf", only="runs/create")
    with job(server, tmp_path) as run:
        work(run)
        time.sleep(2)
        server.turn("up")
        assert run.drain(20)
    client = mlflow.MlflowClient(mlflow_url)
    made = client.search_runs([record(tmp_path)["experiment_id"]], f"tags.`tl.job` = '{run.job}'")
    assert [found.info.run_id for found in made] == [run.run_id]
    creations = [r for r in server.requests if r.endswith("runs/create")]
    assert len(creations) == 1
    assert history(mlflow_url, run.run_id, "a") == [(s, float(s)) for s in range(5)]


def test_a_store_of_files_that_fails_holds_back_files_alone(server, mlflow_url, tmp_path, caplog):
    with job(server, tmp_path / "run") as run:
        server.turn("500", only="mlflow-artifacts")
        (tmp_path / "elsewhere.txt").write_text("content")
        run.log_file(tmp_path / "elsewhere.txt", "notes")
        work(run)
    (tmp_path / "elsewhere.txt").unlink()  # its copy waits
    assert stored(mlflow_url, run.run_id).info.status == "FINISHED"
    assert len(history(mlflow_url, run.run_id, "a")) == 5
    assert record(tmp_path / "run")["waiting"] == 1
    assert "1 record wait" in caplog.records[-1].getMessage()
    still = sync_run(tmp_path / "run")
    assert still.waiting == 1
    assert "500" in still.words
    server.turn("up")
    assert sync_run(tmp_path / "run").waiting == 0
    assert text_of(mlflow_url, run.run_id, "notes/elsewhere.txt") == "content"


def test_a_record_that_is_never_taken_is_kept_with_the_reason(server, mlflow_url, tmp_path, caplog):
    with job(server, tmp_path) as run:
        work(run)
        run.record("tags", values={"x" * 300: "too long a name"})
        run.record("nonsense")
        work(run, range(5, 8))
    assert len(history(mlflow_url, run.run_id, "a")) == 8
    assert stored(mlflow_url, run.run_id).info.status == "FINISHED"
    lines = (tmp_path / "spool/refused.jsonl").read_text().splitlines()
    assert [json.loads(line)["record"]["op"] for line in lines] == ["tags", "nonsense"]
    assert "refused 2 records" in caplog.text
    assert not (tmp_path / "spool/records.jsonl").exists()


KILLED = """
import sys, time
from pathlib import Path
from tl.config import TrackingConfig
from tl.tracking import start_run
config = TrackingConfig(uri=sys.argv[1], system_metrics=False)
job = dict(experiment="out", run_name="killed", output_dir=Path(sys.argv[2]), resume=False)
with start_run(config, **job) as run:
    run.log_metrics({"a": 0.0}, step=0)
    run.drain()
    for step in range(1, 100):
        run.log_metrics({"a": float(step)}, step=step)
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def killed(server, tmp_path):
    """Folder of a job that was killed with records in its spool, and the id of its run."""
    out = tmp_path / "killed"
    code = "import tl.tracking.sending as s; s.SECONDS = 60\n" + KILLED
    process = subprocess.Popen(
        [sys.executable, "-c", code, server.url, str(out)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(REPO)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    return out, record(out)["run_id"]


def test_what_a_killed_job_recorded_is_sent_and_its_run_ends_as_killed(
    server, mlflow_url, tmp_path, killed
):
    out, run_id = killed
    assert stored(mlflow_url, run_id).info.status == "RUNNING"
    with (out / "spool/records.jsonl").open("ab") as file:
        file.write(b'{"op":"metrics","time":1,"st')  # a torn line
    done = sync_run(out)
    assert done.waiting == 0
    assert "KILLED" in done.words
    data = stored(mlflow_url, run_id)
    assert data.info.status == record(out)["status"] == "KILLED"
    assert "its process ended" in data.data.tags["tl.lost"]
    assert history(mlflow_url, run_id, "a") == [(s, float(s)) for s in range(100)]


def test_the_next_job_closes_the_run_of_a_killed_one_and_no_living_one(
    server, mlflow_url, tmp_path, killed, caplog
):
    out, run_id = killed
    with job(server, tmp_path / "living") as living:
        with job(server, tmp_path / "next") as other:
            assert other.drain()
            deadline = time.monotonic() + 10
            while stored(mlflow_url, run_id).info.status == "RUNNING":
                assert time.monotonic() < deadline
                time.sleep(0.1)
        assert stored(mlflow_url, living.run_id).info.status == "RUNNING"
    data = stored(mlflow_url, run_id)
    assert data.info.status == "KILLED"
    assert "is gone" in data.data.tags["tl.lost"]
    assert f"tl sync {out}" in data.data.tags["tl.lost"]
    with job(server, out, resume=True) as again:  # sends what was left, and goes on
        again.log_metrics({"a": 100.0}, step=100)
    assert again.run_id == run_id
    data = stored(mlflow_url, run_id)
    assert data.info.status == "FINISHED"
    assert "tl.lost" not in data.data.tags
    assert len(history(mlflow_url, run_id, "a")) == 101


def test_a_job_that_was_taken_for_dead_lives_again_and_ends_well(
    server, mlflow_url, tmp_path, monkeypatch
):
    monkeypatch.setattr(sending, "BEAT_SECONDS", 0.0)
    monkeypatch.setattr(sending, "LATE_SECONDS", 0.0)  # as after a network that was away for long
    client = mlflow.MlflowClient(mlflow_url)
    with job(server, tmp_path) as found:
        assert found.drain()
        client.set_tag(found.run_id, "tl.lost", "no sign of life")
        client.set_terminated(found.run_id, "KILLED")
        deadline = time.monotonic() + 10
        while stored(mlflow_url, found.run_id).info.status == "KILLED":
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert "tl.lost" not in stored(mlflow_url, found.run_id).data.tags
    assert stored(mlflow_url, found.run_id).info.status == "FINISHED"


@pytest.mark.parametrize(("minutes", "status"), [(5, "RUNNING"), (45, "KILLED")])
def test_a_job_on_another_host_is_dead_when_it_is_silent_for_long(
    server, mlflow_url, tmp_path, minutes, status
):
    client = mlflow.MlflowClient(mlflow_url)
    sign = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(time.time() - 60 * minutes))
    tags = {"tl.process": "another-boot/pid:[1] 7 12", "tl.host": "far", "tl.heartbeat": sign}
    made = client.create_run("0", tags=tags, run_name="far away").info.run_id
    lines = run.repair(mlflow_url)
    assert stored(mlflow_url, made).info.status == status
    assert any("far away" in line for line in lines) == (status == "KILLED")
    client.set_terminated(made)


def test_resume_goes_on_in_a_run_that_was_never_made(server, mlflow_url, tmp_path):
    server.turn("down")
    with pytest.raises(KeyboardInterrupt), job(server, tmp_path) as first:  # noqa: PT012
        first.log_metrics({"a": 0.0}, step=0)
        raise KeyboardInterrupt
    assert record(tmp_path)["status"] == "KILLED"
    server.turn("up")
    run._away.clear()
    with job(server, tmp_path, resume=True) as second:
        second.log_metrics({"a": 1.0}, step=1)
    assert second.job == first.job
    assert history(mlflow_url, second.run_id, "a") == [(0, 0.0), (1, 1.0)]
    assert stored(mlflow_url, second.run_id).info.status == "FINISHED"
    client = mlflow.MlflowClient(mlflow_url)
    made = client.search_runs([record(tmp_path)["experiment_id"]], f"tags.`tl.job` = '{first.job}'")
    assert len(made) == 1


def test_a_child_waits_for_the_run_above_it(server, mlflow_url, tmp_path):
    server.turn("down")
    with job(server, tmp_path) as above, job(server, tmp_path / "fold-0") as below:
        work(above)
        work(below)
    server.turn("up")
    folders = runs_below([tmp_path])
    assert folders == [tmp_path, tmp_path / "fold-0"]
    assert [sync_run(folder).waiting for folder in folders] == [0, 0]
    child = stored(mlflow_url, record(tmp_path / "fold-0")["run_id"])
    assert child.data.tags["mlflow.parentRunId"] == record(tmp_path)["run_id"]


def test_a_whole_disk_is_said_once_the_job_is_done(server, tmp_path, monkeypatch):
    real = os.write

    def full(descriptor, data):
        if b'"op":"metrics"' in bytes(data):
            real(descriptor, bytes(data)[:10])
            raise OSError(28, "No space left on device")
        return real(descriptor, data)

    spool = Spool(tmp_path)
    spool.append({"op": "tags"})
    monkeypatch.setattr(os, "write", full)
    spool.append({"op": "metrics"})
    monkeypatch.setattr(os, "write", real)
    assert [e.record for e in spool.read(0)] == [{"op": "tags"}]
    assert spool.waiting() == 2
    spool.append({"op": "text"})
    assert [e.record["op"] for e in spool.read(0)] == ["tags", "metrics", "text"]
    spool.close()


def test_a_forked_process_adds_to_the_same_records(tmp_path):
    spool = Spool(tmp_path)
    spool.append({"op": "tags", "values": {}})
    child = os.fork()
    if child == 0:
        spool.append({"op": "metrics", "values": {"a": 1.0}})
        os._exit(0)
    os.waitpid(child, 0)
    assert [entry.record["op"] for entry in spool.read(0)] == ["tags", "metrics"]
    assert not spool.empty
    spool.close()


def test_tl_train_ends_well_with_the_server_down_and_sync_sends_all(
    server, mlflow_url, tmp_path, image_folder
):
    server.turn("down")
    data, out = image_folder(), tmp_path / "run"
    settings = [f"data.root={data}", f"output_dir={out}", f"tracking.uri={server.url}"]
    done = script("train", *TINY, *settings)
    assert done.code == 0, done.err
    assert "does not take records" in done.err
    assert f"tl sync {out}" in done.err
    assert f"not all of it is there yet: tl sync {out}" in " ".join(done.out.split())
    server.turn("up")
    synced = script("sync", out)
    assert synced.code == 0, synced.err
    assert "is complete, FINISHED" in synced.out
    known = record(out)
    found = stored(mlflow_url, known["run_id"])
    metrics = json.loads((out / "metrics.json").read_text())
    assert found.data.metrics["val/acc"] == metrics["val/acc"]
    names = {f.path for f in mlflow.MlflowClient(mlflow_url).list_artifacts(known["run_id"])}
    assert {"config.yaml", "plan.json", "pictures", "predictions.parquet"} <= names


def test_a_database_that_vanishes_in_mid_run_is_an_outage(tables, tmp_path, monkeypatch):
    monkeypatch.setattr(sending, "SECONDS", 0.3)
    file = tmp_path / "store/mlflow.db"
    file.parent.mkdir()
    file.write_bytes(tables)
    config = TrackingConfig(uri=f"sqlite:///{file}", system_metrics=False)
    common = {"experiment": "out", "run_name": "r", "resume": False}
    with start_run(config, output_dir=tmp_path / "out", **common) as found:
        work(found)
        assert found.drain()
        with sqlite3.connect(file, timeout=1) as database:  # somebody holds it
            database.execute("BEGIN EXCLUSIVE")
            work(found, range(5, 8))
            time.sleep(1)
            database.rollback()
    assert len(history(f"sqlite:///{file}", found.run_id, "a")) == 8


def test_an_experiment_that_is_deleted_in_mid_run_is_named_with_its_remedy(
    server, mlflow_url, tmp_path, caplog
):
    client = mlflow.MlflowClient(mlflow_url)
    with job(server, tmp_path, experiment="gone") as found:
        assert found.drain()
        client.delete_experiment(record(tmp_path)["experiment_id"])
        work(found)
    number = record(tmp_path)["experiment_id"]
    assert f"mlflow experiments restore -x {number}" in caplog.text
    assert record(tmp_path)["waiting"] == 6
    client.restore_experiment(number)
    assert sync_run(tmp_path).waiting == 0
    assert len(history(mlflow_url, found.run_id, "a")) == 5


def test_a_run_that_the_store_has_forgotten_ends_a_resumed_job_before_it_begins(server, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"run_id": "0" * 32, "job": "1"}))
    with pytest.raises(StoreError, match=r"does not know the run 0{32}[\s\S]*delete"):
        job(server, tmp_path, resume=True).__enter__()
    assert not (tmp_path / "spool").exists()
