"""The server of a team: `compose.yaml` with its own commands, over a real database and S3 store."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import pytest
import servers
from commands import SCRIPT, script
from compose import REPO, composed, variables
from mlflow.exceptions import MlflowException
from mlflow.server.auth.client import AuthServiceClient

from tl.config import TrackingConfig
from tl.tracking import start_run, sync_run

PASSWORD = "a password of the tests"
HOSTED = {
    "DATABASE_PASSWORD": "x",
    "STORE_KEY": "x",
    "STORE_SECRET": "x",
    "ADMIN_PASSWORD": PASSWORD,
    "FORM_SECRET": "a secret of the tests",
    "PUBLIC_NAME": "mlflow.example.com",
}


# --- the files ----------------------------------------------------------------------------------


def test_the_example_names_every_variable_that_compose_needs():
    text = (REPO / "deploy/team.env.example").read_text()
    offered = dict(re.findall(r"^([A-Z_]+)=(.*)$", text, re.MULTILINE))
    asked = variables()
    assert {name for name, default in asked.items() if default is None} <= set(offered)
    assert set(offered) <= set(asked)
    empty = {name for name, value in offered.items() if not value}
    assert empty == {name for name, default in asked.items() if default is None}


def test_images_have_tags_and_only_the_proxy_is_open_to_others():
    services = composed(HOSTED)["services"]
    job = services.pop("train")  # of this repository, and no server: see test_deploy_compose
    assert "ports" not in job
    for name, service in services.items():
        assert re.search(r":\d+(\.\d+)+$", service["image"]), name
        assert name == "proxy" or service["healthcheck"]["retries"] >= 10
    opened = {
        name: [p for p in service.get("ports", []) if not p.startswith("127.0.0.1:")]
        for name, service in services.items()
    }
    assert {name for name, ports in opened.items() if ports} == {"proxy"}
    assert composed(HOSTED)["networks"]["inside"]["internal"] is True
    for line in (REPO / "constraints.txt").read_text().splitlines():
        if line.startswith("mlflow=="):
            assert services["mlflow"]["image"].endswith(line.removeprefix("mlflow=="))


# --- the server ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def team(
    postgres: servers.Postgres,
    mlflow_tables: str,
    object_store: servers.ObjectStore,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[servers.Server]:
    """What the service `mlflow` of compose.yaml runs: its script with its environment."""
    folder, port = tmp_path_factory.mktemp("hosted"), servers.free_port()
    env: dict[str, str] = composed(HOSTED)["services"]["mlflow"]["environment"]
    assert "@database/" in env["MLFLOW_BACKEND_STORE_URI"]
    ours = {
        **env,
        **object_store.env,
        "MLFLOW_BACKEND_STORE_URI": postgres.create("hosted", mlflow_tables),
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
        "HOST": servers.HOST,
        "PORT": str(port),
        "WORKERS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "MLFLOW_TRACKING_URI": "",
    }
    url = f"http://{servers.HOST}:{port}"
    command = ["sh", REPO / "deploy/mlflow/start.sh"]
    ready = lambda: servers.answers(f"{url}/health")  # noqa: E731
    with servers.serving(command, ready, folder / "log", ours) as process:
        yield servers.Server(url, folder, process)


@pytest.fixture
def admin(team: servers.Server, monkeypatch: pytest.MonkeyPatch) -> mlflow.MlflowClient:
    """A client with all rights."""
    return login(team, monkeypatch, "admin", PASSWORD)


def login(team: servers.Server, monkeypatch: Any, name: str, password: str) -> mlflow.MlflowClient:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", name)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    return mlflow.MlflowClient(team.url)


def test_files_go_through_the_proxy_into_the_s3_store(team, admin, object_store, tmp_path):
    number = admin.create_experiment("files")
    run = admin.create_run(number).info
    assert run.artifact_uri.startswith("mlflow-artifacts:/")
    assert admin.list_artifacts(run.run_id) == []
    big = tmp_path / "model.onnx"
    big.write_bytes(os.urandom(3_000_000))
    admin.log_artifact(run.run_id, str(big), "bundle")
    found = admin.download_artifacts(run.run_id, "bundle/model.onnx", str(tmp_path / "back"))
    assert Path(found).read_bytes() == big.read_bytes()
    kept = object_store.client().list_objects_v2(Bucket="mlflow")["Contents"]
    assert [k["Size"] for k in kept if k["Key"].endswith("bundle/model.onnx")] == [3_000_000]


def test_users_and_runs_are_in_one_database(postgres, team, admin):
    admin.create_experiment("one database")
    assert postgres.query("hosted", "select username from users order by 1") == ["admin"]
    assert "one database" in postgres.query("hosted", "select name from experiments")
    config = (team.folder / "auth.ini").read_text()
    assert "password" not in config
    assert (team.folder / "auth.ini").stat().st_mode & 0o077 == 0


def test_a_wrong_password_and_a_user_without_rights_are_refused(team, admin, monkeypatch):
    number = admin.create_experiment("of the admin")
    AuthServiceClient(team.url).create_user("reader", "password of a reader")
    reader = login(team, monkeypatch, "reader", "password of a reader")
    assert reader.get_experiment(number).name == "of the admin"
    with pytest.raises(MlflowException, match=r"[Pp]ermission denied"):
        reader.create_run(number)
    assert reader.create_run(reader.create_experiment("of the reader"))
    wrong = login(team, monkeypatch, "reader", "another password")
    with pytest.raises(MlflowException, match=r"401|not authenticated"):
        wrong.get_experiment(number)


def test_other_host_names_are_refused(team):
    import requests

    page = f"{team.url}/"
    for host, code in (("mlflow.example.com", 401), ("evil.example.com", 403)):
        assert requests.get(page, headers={"Host": host}, timeout=20).status_code == code


# --- jobs ---------------------------------------------------------------------------------------

# Eight processes; MLflow is imported once before they part, for that takes most of their time.
JOBS = """
import multiprocessing
import sys
from pathlib import Path

from tl.config import TrackingConfig
from tl.fingerprints import images_sha256
from tl.tracking import load, start_run

folder = Path(sys.argv[2])
config = TrackingConfig(uri=sys.argv[1], system_metrics=False)


def job(number):
    out = folder / f"job-{number}"
    labels = {"experiment": "eight at once", "run_name": f"job {number}"}
    splits = {"train": {"images": 9, "sha256": images_sha256(["a"])}}
    with start_run(config, **labels, output_dir=out, resume=False) as run:
        run.log_params({"number": number})
        run.log_dataset({"root": "/photos", "splits": splits, "counts": {"train": {"a": 9}}})
        for step in range(400):
            run.log_metrics({"train/loss": number + step / 1000, "lr": 0.1}, step=step)
        (out / "model.bin").write_bytes(bytes([number]) * 300_000)
        run.log_file(out / "model.bin", "bundle")
        run.log_text(f"job {number}", "notes.txt")


load(config)
context = multiprocessing.get_context("fork")
started = [context.Process(target=job, args=(number,)) for number in range(8)]
for process in started:
    process.start()
for process in started:
    process.join()
sys.exit(max(process.exitcode for process in started))
"""


def test_eight_jobs_at_once(team, admin, tmp_path):
    command = [sys.executable, "-c", JOBS, team.url, str(tmp_path)]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert "duplicate" not in done.stderr, "two jobs make one data set"
    # On a busy machine the server may be slow, and a job leaves what waits to tl sync.
    assert not done.stderr or "does not take" in done.stderr
    for number in range(8):
        assert sync_run(tmp_path / f"job-{number}").waiting == 0
    named = [e for e in admin.search_experiments() if e.name == "eight at once"]
    assert len(named) == 1
    runs = admin.search_runs([named[0].experiment_id])
    assert len(runs) == 8
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert sorted(run.data.params["number"] for run in runs) == [*map(str, range(8))]
    for run in runs:
        number = int(run.data.params["number"])
        losses = admin.get_metric_history(run.info.run_id, "train/loss")
        assert [m.step for m in losses] == [*range(400)]
        assert [m.value for m in losses] == pytest.approx([number + s / 1000 for s in range(400)])
        assert len(run.inputs.dataset_inputs) == 1
        file = admin.download_artifacts(run.info.run_id, "bundle/model.bin")
        assert Path(file).read_bytes() == bytes([number]) * 300_000
        assert not (tmp_path / f"job-{number}/spool").exists(), "all was taken"
    # One data set, made once, in all eight; one model with eight versions, entered at once
    digests = {run.inputs.dataset_inputs[0].dataset.digest for run in runs}
    assert len(digests) == 1
    admin.create_registered_model("eight")
    with ThreadPoolExecutor(8) as pool:
        made = pool.map(lambda run: enter(admin, run.info.run_id), runs)
        assert sorted(made) == [str(n) for n in range(1, 9)]
    admin.set_registered_model_alias("eight", "champion", "3")
    assert admin.get_model_version_by_alias("eight", "champion").version == "3"


def enter(client, run_id):
    """Version of a model that a run's files become; the registry counts them."""
    return client.create_model_version("eight", f"runs:/{run_id}/bundle", run_id=run_id).version


def tracked(team, folder, experiment="of the admin"):
    config = TrackingConfig(uri=team.url, system_metrics=False)
    labels = {"experiment": experiment, "run_name": "job"}
    return start_run(config, **labels, output_dir=folder, resume=False)


def test_a_job_outlives_a_wrong_password(team, admin, monkeypatch, tmp_path, caplog):
    login(team, monkeypatch, "admin", "mistyped")
    with tracked(team, tmp_path / "job", "with a wrong password") as run:
        run.log_metrics({"val/acc": 0.5}, step=1)
    assert run.run_id is None
    assert "tl sync" in caplog.text
    assert "401" in caplog.text or "not authenticated" in caplog.text
    login(team, monkeypatch, "admin", PASSWORD)
    assert sync_run(tmp_path / "job").waiting == 0
    (found,) = admin.search_runs(
        [admin.get_experiment_by_name("with a wrong password").experiment_id]
    )
    assert found.data.metrics == {"val/acc": 0.5}
    assert found.info.status == "FINISHED"


def test_a_job_of_a_user_without_rights_waits_for_them(team, admin, monkeypatch, tmp_path, caplog):
    number = admin.create_experiment("closed")
    users = AuthServiceClient(team.url)
    users.create_user("guest", "password of a guest")
    login(team, monkeypatch, "guest", "password of a guest")
    with tracked(team, tmp_path / "job", "closed") as run:
        run.log_metrics({"val/acc": 0.5}, step=1)
    assert "ermission denied" in caplog.text
    assert "tl sync" in caplog.text
    login(team, monkeypatch, "admin", PASSWORD)
    assert admin.search_runs([number]) == []
    users.grant_user_permission("guest", "experiment", number, "EDIT")
    login(team, monkeypatch, "guest", "password of a guest")
    assert sync_run(tmp_path / "job").waiting == 0
    (found,) = admin.search_runs([number])
    assert (found.info.status, found.data.metrics) == ("FINISHED", {"val/acc": 0.5})


@pytest.mark.slow
def test_eight_trainings_at_once_and_one_in_the_registry(team, admin, image_folder, tmp_path):
    """As eight people would: `tl train` with passwords in the environment, files in S3."""
    data = image_folder()
    settings = ["experiment=smoke", "model.image_size=32", f"tracking.uri={team.url}"]
    started = [
        subprocess.Popen(
            [SCRIPT, "train", *settings, f"data.root={data}", f"output_dir={n}", f"seed={n}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(8)
    ]
    said = [process.communicate(timeout=580) for process in started]
    assert [process.returncode for process in started] == [0] * 8, said
    number = admin.get_experiment_by_name("images").experiment_id
    for n in range(8):
        assert sync_run(Path(str(n))).waiting == 0
    runs = admin.search_runs([number])
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert sorted(run.data.tags["seed"] for run in runs) == [*map(str, range(8))]
    assert len({run.data.tags["data.val_sha256"] for run in runs}) == 1
    assert len(admin.search_logged_models([number])) == 8
    for run in runs:
        names = {f.path for f in admin.list_artifacts(run.info.run_id)}
        assert {"config.yaml", "predictions.parquet", "report.html", "pictures"} <= names
    entered = script(
        "register", "run=0", "name=team", "alias=challenger", f"tracking.uri={team.url}"
    )
    assert entered.code == 0, entered.err
    assert admin.get_model_version_by_alias("team", "challenger").version == "1"


# --- TLS ----------------------------------------------------------------------------------------


def test_the_proxy_speaks_tls(team, admin, tmp_path, monkeypatch):
    caddy = shutil.which("caddy")
    if caddy is None:
        pytest.skip("no Caddy: apt-get install caddy")
    number = admin.create_experiment("behind TLS")
    port = servers.free_port()
    ours = "{\n\tadmin off\n\tskip_install_trust\n\tauto_https disable_redirects\n"
    ours += f"\tdefault_bind {servers.HOST}\n}}\nimport {REPO}/deploy/Caddyfile\n"
    (tmp_path / "Caddyfile").write_text(ours)
    root = tmp_path / "data/caddy/pki/authorities/local/root.crt"
    env = {
        "PUBLIC_NAME": f"localhost:{port}",
        "CERTIFICATES": "internal",
        "UPSTREAM": team.url.removeprefix("http://"),
        "XDG_DATA_HOME": str(tmp_path / "data"),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "HOME": str(tmp_path),
    }
    command = [caddy, "run", "--config", tmp_path / "Caddyfile"]
    with servers.serving(command, root.exists, tmp_path / "log", env):
        monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(root))
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        client = mlflow.MlflowClient(f"https://localhost:{port}")
        run = client.create_run(number).info
        client.log_text(run.run_id, "x" * 2_000_000, "long.txt")
        assert [f.file_size for f in client.list_artifacts(run.run_id)] == [2_000_000]
        monkeypatch.delenv("MLFLOW_TRACKING_SERVER_CERT_PATH")
        with pytest.raises(MlflowException, match=r"(?i)certificate verify failed"):
            client.get_run(run.run_id)


# --- backup -------------------------------------------------------------------------------------


def test_a_dump_restores_runs_and_users(postgres, team, admin, tmp_path):
    run = admin.create_run(admin.create_experiment("kept")).info
    for step in range(5):
        admin.log_metric(run.run_id, "val/acc", step / 10, step=step)
    dump = tmp_path / "mlflow.dump"
    postgres.run("pg_dump", "-Fc", "-f", dump, "hosted")
    postgres.run("createdb", "restored")
    postgres.run("pg_restore", "--clean", "--if-exists", "--no-owner", "-d", "restored", dump)
    again = mlflow.MlflowClient(postgres.uri("restored"))
    found = [(m.step, m.value) for m in again.get_metric_history(run.run_id, "val/acc")]
    assert found == [(step, step / 10) for step in range(5)]
    assert again.get_run(run.run_id).info.artifact_uri == run.artifact_uri
    users = "select username, password_hash from users order by 1"
    assert postgres.query("restored", users) == postgres.query("hosted", users)


@pytest.mark.slow
def test_a_database_of_an_older_mlflow_is_upgraded(postgres):
    """By the command of the docs, and what is in it stays."""
    from alembic import command
    from mlflow.store.db.utils import _get_alembic_config, create_sqlalchemy_engine
    from mlflow.store.db.utils import _get_latest_schema_revision as latest
    from mlflow.store.tracking.dbmodels.initial_models import Base

    uri = postgres.create("older")
    Base.metadata.create_all(create_sqlalchemy_engine(uri))
    command.upgrade(_get_alembic_config(uri), "17e22815139b")  # of 2026, three migrations ago
    row = "values ('old', 'active', 'default')"
    postgres.query("older", f"insert into experiments (name, lifecycle_stage, workspace) {row}")
    upgrade = [sys.executable, "-m", "mlflow", "db", "upgrade", uri]
    subprocess.run(upgrade, check=True, capture_output=True)
    assert postgres.query("older", "select version_num from alembic_version") == [latest()]
    assert mlflow.MlflowClient(uri).get_experiment_by_name("old").lifecycle_stage == "active"
