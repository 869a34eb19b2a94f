from __future__ import annotations

import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
import time

import mlflow
import pytest
from commands import SCRIPT
from registering import aliases, everything, record, spoil, table
from servers import mlflow_server

from tl.bundle import seal_sha256
from tl.registry import BusyError, open_registry, store
from tl.tracking.finding import find_run

# --- register ------------------------------------------------------------------------------------


def test_a_run_becomes_a_version_with_what_is_known_of_it(
    tl, run_store, store_client, recorded, run_bundles
):
    done = tl("register", "run=good", "name=flowers")
    assert done.code == 0, done.err
    assert "1, new" in done.out
    serve = f"MLFLOW_TRACKING_URI={run_store} mlflow models serve -m 'models:/flowers@challenger'"
    assert serve in done.out
    version = store_client.get_model_version_by_alias("flowers", "challenger")
    assert version.tags["tl.bundle_sha256"] == seal_sha256(run_bundles["one"])
    assert version.tags["tl.task"] == "single"
    assert float(version.tags["test/acc"]) == 0.8
    assert version.tags["model.name"] == "test_resnet"
    assert version.run_id == json.loads((recorded / "good/run.json").read_text())["run_id"]
    assert "registered from the run" in version.description
    model = mlflow.pyfunc.load_model("models:/flowers@challenger")
    assert model.metadata.run_id == version.run_id
    assert len(model.predict(model.input_example)) == 1


@pytest.mark.parametrize("how", ["id", "name", "folder"])
def test_a_run_is_an_id_a_name_or_a_folder(tl, run_store, store_client, recorded, how):
    run_id = json.loads((recorded / "better/run.json").read_text())["run_id"]
    given = {"id": run_id, "name": "better", "folder": recorded / "better"}[how]
    done = tl("register", f"run={given}", "name=flowers", f"tracking.uri={run_store}")
    assert done.code == 0, done.err
    assert store_client.get_model_version("flowers", "1").run_id == run_id


def test_a_folder_knows_its_store(tl, recorded, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///nowhere/else.db")
    done = tl("register", f"run={recorded / 'good'}", "name=of the folder")
    assert done.code == 0, done.err
    there = mlflow.MlflowClient(f"sqlite:///{recorded / 'mlflow.db'}")
    assert aliases(there, "of the folder") == {"challenger": 1}
    there.delete_registered_model("of the folder")


def test_the_same_bundle_is_registered_once(tl, run_store, store_client):
    assert tl("register", "run=good", "name=flowers").code == 0
    assert tl("register", "run=better", "name=flowers").code == 0
    done = tl("register", "run=good", "name=flowers", "alias=second")
    assert done.code == 0
    assert "1, registered already" in done.out
    assert aliases(store_client) == {"challenger": 2, "second": 1}
    assert len(store_client.search_model_versions("name = 'flowers'")) == 2


def test_the_champion_does_not_become_a_challenger(tl, crowned):
    before = everything(crowned)
    done = tl("register", "run=good", "name=flowers")
    assert done.code == 0
    assert "champion, and it stays that: nothing was changed" in done.out
    assert everything(crowned) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run=nobody", "name=flowers"], "no run has the id or name 'nobody'"),
        (["run=bare", "name=flowers"], "has no bundle in the store"),
        (["run=good", "name=a/b"], "name must have neither / nor :"),
        (["run=good", "name=flowers", "alias=champion"], "alias=champion is given by tl promote"),
        (["run=good", "name=flowers", "alias=v3"], "alias must be letters"),
        (["run=good"], "name is required"),
    ],
)
def test_what_cannot_be_registered_is_said_and_leaves_nothing(tl, store_client, arguments, message):
    tl("register", *arguments).refused(message)
    assert store_client.search_registered_models() == []


def test_runs_that_are_not_wholly_there_are_named(tl, store_client, tmp_path):
    bare = find_run(store_client, "bare")
    place = bare.data.tags["tl.output_dir"]
    store_client.create_logged_model(bare.info.experiment_id, "bundle", bare.info.run_id)
    done = tl("register", "run=bare", "name=flowers")
    done.refused("the bundle of the run bare", "not wholly in the store yet", f"tl sync {place}")
    waiting = tmp_path / "waiting"
    waiting.mkdir()
    (waiting / "run.json").write_text('{"run_id": null, "status": "PENDING"}')
    done = tl("register", f"run={waiting}", "name=flowers")
    done.refused(f"the run of {waiting} is not in MLflow yet: tl sync {waiting}")
    (waiting / "run.json").unlink()
    tl("register", f"run={waiting}", "name=flowers").refused(f"{waiting} is no run that MLflow")
    (waiting / "run.json").write_text("{")
    tl("register", f"run={waiting}", "name=flowers").refused("run.json cannot be read")
    (waiting / "run.json").write_text(json.dumps({"run_id": "0" * 32}))
    tl("register", f"run={waiting}", "name=flowers").refused("the store does not know the run 0")
    store_client.delete_run(bare.info.run_id)
    tl("register", f"run={bare.info.run_id}", "name=flowers").refused("was deleted", "restore")
    assert store_client.search_registered_models() == []


def test_runs_of_one_name_are_listed(tl, run_store, store_client, recorded, run_bundles, tmp_path):
    record(run_store, tmp_path / "again", run_bundles["one"], table(0.8), name="good")
    done = tl("register", "run=good", "name=flowers")
    done.refused("2 runs have the name 'good': say which")
    assert json.loads((tmp_path / "again/run.json").read_text())["run_id"] in done.err


def test_a_name_that_is_not_ours_is_left_alone(tl, store_client):
    store_client.register_prompt("prompts", "What is on {{image}}?")
    tl("register", "run=good", "name=prompts").refused("the name 'prompts' is taken by a prompt")
    store_client.create_registered_model("theirs")
    store_client.create_model_version("theirs", source="/nowhere")
    before = everything(store_client, "theirs")
    done = tl("register", "run=good", "name=theirs")
    done.refused("the name 'theirs' is taken by a model that tl register did not make")
    assert everything(store_client, "theirs") == before
    store_client.create_registered_model("empty")  # made by hand, for its rights
    assert tl("register", "run=good", "name=empty").code == 0


def test_another_class_list_needs_another_name(tl, crowned):
    before = everything(crowned)
    tl("register", "run=other", "name=flowers").refused("'flowers' has another class list")
    assert everything(crowned) == before


def test_a_bundle_that_was_changed_in_the_store_is_not_registered(
    tl, run_store, store_client, tmp_path, run_bundles
):
    record(run_store, tmp_path / "run", run_bundles["one"], table(0.8), name="mine")
    spoil(store_client, tmp_path / "run")
    done = tl("register", "run=mine", "name=flowers")
    done.refused("cannot be registered", "its files are not those that were sealed")
    assert store_client.search_registered_models() == []


# --- several at once -----------------------------------------------------------------------------


def test_one_of_many_takes_the_lock(run_store):
    held, refused = [], []
    start = threading.Barrier(8)

    def take():
        lock = store.Lock(registry, "flowers")
        start.wait()
        try:
            lock.take()
            held.append(lock)
        except BusyError as error:
            refused.append(str(error))

    with open_registry(run_store) as registry:
        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        names = [m.name for m in registry.client.search_registered_models()]
        assert names == ["flowers.lock"]
        owner = registry.client.get_registered_model("flowers.lock").tags[store.OWNER]
        assert len(refused) == 7
        assert all("another job has been changing it for" in text for text in refused)
        (lock,) = held
        assert lock.owner == owner
        lock.give_back()
        assert registry.client.search_registered_models() == []


def test_a_lock_of_a_killed_job_is_forgotten_in_time(tl, run_store, store_client):
    tl("register", "run=good", "name=flowers")
    tags = {store.OWNER: "elsewhere, process 7", store.SINCE: f"{time.time() - 60:.0f}"}
    store_client.create_registered_model("flowers.lock", tags=tags)
    done = tl("promote", "name=flowers")
    done.refused("flowers: another job has been changing it for 6", "elsewhere, process 7", code=1)
    assert aliases(store_client) == {"challenger": 1}
    old = f"{time.time() - store.STALE_SECONDS - 1:.0f}"
    store_client.set_registered_model_tag("flowers.lock", store.SINCE, old)
    assert tl("promote", "name=flowers").code == 0
    assert aliases(store_client) == {"champion": 1}


def test_two_promotions_at_once_never_both_replace_the_same_champion(tl, crowned):
    tl("register", "run=worse", "name=flowers", "alias=first")
    tl("register", "run=better", "name=flowers", "alias=second")
    command = [str(SCRIPT), "promote", "name=flowers", "margin=0.4"]
    started = [
        subprocess.Popen(
            [*command, f"candidate={alias}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for alias in ("first", "second")
    ]
    ended = [(*process.communicate(timeout=120), process.returncode) for process in started]
    replaced = [
        re.search(r"in place of version (\d)", out)[1] for out, _, code in ended if not code
    ]
    assert 1 <= len(replaced) == len(set(replaced)), ended
    for _, err, code in ended:
        assert code == 0 or (code == 1 and ("another job" in err or "may be worse" in err)), err
    champion = crowned.get_model_version_by_alias("flowers", "champion")
    assert champion.tags["tl.replaced"] in replaced
    assert not [m for m in crowned.search_registered_models() if m.name.endswith(".lock")]


# --- stores --------------------------------------------------------------------------------------


class NoRegistry(http.server.BaseHTTPRequestHandler):
    """What answers as an MLflow server does that knows runs alone."""

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer()

    def answer(self):
        known = "experiments/search" in self.path
        self.send_response(200 if known else 404)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b"{}" if known else b'{"error_code": "ENDPOINT_NOT_FOUND"}')

    def log_message(self, *args):
        pass


def test_a_store_without_a_registry_is_named(tl):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), NoRegistry) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}"
        done = tl("promote", "name=flowers", f"tracking.uri={uri}")
        server.shutdown()
    done.refused(f"the MLflow store {uri} has no model registry")


def test_a_store_that_does_not_answer_is_named(tl):
    done = tl("promote", "name=flowers", "tracking.uri=http://127.0.0.1:9")
    done.refused("http://127.0.0.1:9", "cannot be used")


@pytest.mark.slow
def test_on_a_server_with_users_others_change_nothing(tl, recorded, tmp_path, monkeypatch):
    from mlflow.server import get_app_client

    settings = tmp_path / "auth.ini"
    settings.write_text(
        "[mlflow]\ndefault_permission = READ\n"
        f"database_uri = sqlite:///{tmp_path / 'users.db'}\n"
        "admin_username = admin\nadmin_password = ants and bees 12\n"
    )
    env = {"MLFLOW_AUTH_CONFIG_PATH": str(settings), "MLFLOW_FLASK_SERVER_SECRET_KEY": "of tests"}
    shutil.copyfile(recorded / "crowned.db", tmp_path / "mlflow.db")
    backend = f"sqlite:///{tmp_path / 'mlflow.db'}"

    def become(user, password):
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)

    with mlflow_server(backend, tmp_path, "--app-name", "basic-auth", env=env) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
        become("admin", "ants and bees 12")
        assert tl("register", "run=better", "name=flowers").code == 0
        client = mlflow.MlflowClient(server.url)
        before = everything(client)
        users = get_app_client("basic-auth", tracking_uri=server.url)
        users.create_user("guest", "only looks around")
        become("guest", "only looks around")
        denied = f"the MLflow server {server.url} does not let you"
        for command in (
            ("promote", "name=flowers"),
            ("promote", "name=flowers", "rollback=true"),
            ("register", "run=worse", "name=flowers"),
        ):
            tl(*command).refused(denied)
        become("guest", "a wrong password")
        tl("promote", "name=flowers").refused(server.url)
        become("admin", "ants and bees 12")
        assert everything(client) == before
        assert [model.name for model in client.search_registered_models()] == ["flowers"]
        assert tl("promote", "name=flowers").code == 0
        assert aliases(client) == {"champion": 2, "previous": 1}


@pytest.mark.slow
def test_on_a_team_server_files_go_through_its_proxy(
    tl, team_server, run_bundles, tmp_path, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", team_server.url)
    for number, (bundle, right) in enumerate({"one": 0.8, "two": 0.9}.items()):
        given = table(right, seed=number)
        record(team_server.url, tmp_path / bundle, run_bundles[bundle], given, name=f"its {bundle}")
        done = tl("register", f"run=its {bundle}", "name=team flowers")
        assert done.code == 0, done.err
        assert tl("promote", "name=team flowers").code == 0
    client = mlflow.MlflowClient(team_server.url)
    assert aliases(client, "team flowers") == {"champion": 2, "previous": 1}
    model = mlflow.pyfunc.load_model("models:/team flowers@champion")
    assert len(model.predict(model.input_example)) == 1


# --- what is loaded ------------------------------------------------------------------------------


def test_registering_and_promoting_need_no_torch(run_store, recorded):
    code = (
        "import sys\n"
        "from tl.pipelines import main\n"
        "for args in (['register', 'run=good', 'name=flowers'], ['promote', 'name=flowers']):\n"
        "    try:\n        main(args)\n"
        "    except SystemExit as stop:\n        assert not stop.code\n"
        "print(sorted({'torch', 'timm', 'pytorch_lightning'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("[]\n")
    assert aliases(mlflow.MlflowClient(run_store)) == {"champion": 1}
