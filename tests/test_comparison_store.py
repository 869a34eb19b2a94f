"""`tl compare` on MLflow stores: experiments, names, servers, and what is refused."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path

import pytest
import servers
from commands import TINY, Command
from runs_made import Maker, logged, values

from tl.comparison.stored import opened, quoted
from tl.config import CompareConfig, ConfigError, plain_names
from tl.tracking import TrackingError

QUALITIES = (("a", 0.9), ("b", 0.6))


@pytest.fixture
def command(capfd, monkeypatch) -> Command:
    return Command(capfd, monkeypatch)


@pytest.fixture
def made(tmp_path) -> Maker:
    return Maker(tmp_path)


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory) -> Path:
    """Tables of a store, which take seconds to make."""
    from tl.tracking.store import open_store

    file = tmp_path_factory.mktemp("empty") / "mlflow.db"
    open_store(f"sqlite:///{file}")
    return file


def two_runs(place: Path, empty_store: Path) -> tuple[str, list[str], Path]:
    """Two runs in a store of their own: its address as an override, ids, and where all that is."""
    (place / "store").mkdir()
    shutil.copy(empty_store, place / "store/mlflow.db")
    uri, made = f"sqlite:///{place / 'store/mlflow.db'}", Maker(place)
    ids = [logged(made(name, q), uri, seed=i) for i, (name, q) in enumerate(QUALITIES)]
    return f"tracking.uri={uri}", ids, place


@pytest.fixture
def stored(tmp_path, empty_store) -> tuple[str, list[str], Path]:
    return two_runs(tmp_path, empty_store)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory, empty_store) -> tuple[str, list[str], Path]:
    """For tests that change nothing."""
    return two_runs(tmp_path_factory.mktemp("two"), empty_store)


def test_an_experiment_is_compared_and_the_comparison_logged_to_it(command, tmp_path, image_folder):
    images = image_folder(splits={"train": 6, "val": 3, "test": 6})
    for method in ("linear_probe", "full"):
        settings = [f"data.root={images}", f"finetune={method}", "finetune.epochs=1"]
        assert command("train", *TINY, *settings, f"output_dir={tmp_path / method}").code == 0
    out = tmp_path / "out"
    done = command("compare", f"experiment={images.name}", f"output_dir={out}")
    assert done.code == 0, done.err
    found = values(out)
    assert len(found["runs"]) == 2
    assert "params.finetune.method" in found["varied"]
    for run in found["runs"]:
        method = run["params"]["params.finetune.method"]
        metrics = json.loads((tmp_path / method / "metrics.json").read_text())
        assert run["value"] == pytest.approx(metrics["test/acc"])
        assert run["low"] == pytest.approx(metrics["test/acc_low"])
        assert run["folder"] == str(tmp_path / method)
        assert run["cost"]["parameters"] > run["cost"]["trainable_parameters"] or method == "full"
        assert run["curve"]["y"]
    again = command("compare", f"experiment={images.name}", "filter=params.finetune.method != none")
    assert again.code == 0, again.err  # the comparison itself is no run to compare
    assert "of 2 runs" in again.out.replace("\n  ", " ")
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name(images.name)
    kept = client.search_runs([experiment.experiment_id], "tags.`tl.kind` = 'comparison'")
    assert len(kept) == 2
    files = {file.path for file in client.list_artifacts(kept[0].info.run_id)}
    assert {"compare.html", "compare.json", "compare.csv"} <= files


def test_runs_are_named_by_id_or_by_name(command, untouched, tmp_path):
    from mlflow import MlflowClient

    uri, ids, _ = untouched
    name = MlflowClient(uri.partition("=")[2]).get_run(ids[1]).info.run_name
    assert name.startswith("insects · b · ")
    done = command("compare", uri, f"runs={ids[0]},{name}", f"output_dir={tmp_path / 'out'}")
    assert done.code == 0, done.err
    assert "beats" in done.out


def test_a_run_whose_files_are_not_in_the_store_yet_is_read_from_its_folder(command, stored):
    uri, _, tmp = stored
    for file in (tmp / "store/mlartifacts").rglob("predictions.parquet"):
        file.unlink()
    out = tmp / "out"
    assert command("compare", uri, "experiment=insects", f"output_dir={out}").code == 0
    assert [run["group"] for run in values(out)["runs"]] == [0, 0]
    shutil.rmtree(tmp / "runs/b")
    done = command("compare", uri, "experiment=insects", f"output_dir={tmp / 'again'}")
    assert done.code == 0
    left = values(tmp / "again")["runs"][-1]
    assert "tl sync" in left["why_not"]
    assert "1 run is left out" in done.out.replace("\n  ", " ")


def test_runs_of_a_server_are_fetched_through_its_proxy(command, made, tmp_path, monkeypatch):
    database = f"sqlite:///{tmp_path / 'server.db'}"
    with servers.mlflow_server(database, tmp_path / "server") as server:
        for number, (name, quality) in enumerate((("a", 0.9), ("b", 0.6))):
            logged(made(name, quality), server.url, seed=number)
            shutil.rmtree(tmp_path / "runs" / name)
        out, uri = tmp_path / "out", f"tracking.uri={server.url}"
        done = command("compare", uri, "experiment=insects", f"output_dir={out}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        with opened(server.url) as store:
            run = store.experiment("insects", None)[0]
            assert run.file("nothing.parquet") is None
            servers.end(server.process)
            with pytest.raises(TrackingError, match=r"did not give predictions.parquet .* refused"):
                run.file("predictions.parquet")
    assert done.code == 0, done.err
    found = values(out)
    assert found["pairs"][0]["verdict"] == "a"
    assert found["runs"][0]["url"].startswith(f"{server.url}/#/experiments/")
    assert found["runs"][0]["curve"]["y"] == [0.5, 0.7]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["experiment=insect"], ["insect does not exist", "did you mean insects?"]),
        (["experiment=insects", "filter=params.seed ="], ["filter: MLflow cannot read"]),
        (["experiment=insects", "filter=params.seed = '7'"], ["no run that fulfils"]),
        (["experiment=insects", "filter=params.seed = '1'"], ["one run alone", "takes two"]),
        (["runs=nothing,like · this"], ["nothing"]),
        (["experiment=insects", "baseline=nothing"], ["nothing"]),
        (["experiment=insects", "split=val"], ["no run has val images; there are test"]),
        (["experiment=insects", "split=train"], ["split must be one of val, test"]),
        ([], ["experiment=NAME", "runs=A,B"]),
        (["runs=a,b", "filter=params.seed = 1"], ["filter chooses", "use one of both"]),
        (["experiment=insects", "confidence=2", "thumbnail=false"],
         ["confidence must be in [0.5, 0.9999]", "did you mean thumbnails?"]),
    ],
)  # fmt: skip
def test_bad_requests_are_one_clear_message(command, untouched, tmp_path, arguments, words):
    uri, _, _ = untouched
    out = tmp_path / "out"
    command("compare", uri, f"output_dir={out}", *arguments).refused(*words)
    assert not out.exists()


def test_a_store_that_is_not_there_is_not_made(command, tmp_path):
    file = tmp_path / "none.db"
    command("compare", f"tracking.uri=sqlite:///{file}", "experiment=x").refused(
        f"there is no MLflow store {file}", "runs=FOLDER"
    )
    assert not file.exists()


def test_a_store_of_another_version_is_refused_and_left_as_it_is(command, untouched, tmp_path):
    _, _, tmp = untouched
    file = Path(shutil.copy(tmp / "store/mlflow.db", tmp_path / "other.db"))
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'c8438ad8d51d'")
    before = file.read_bytes()
    done = command("compare", f"tracking.uri=sqlite:///{file}", "experiment=insects")
    done.refused("cannot be used", "MLflow")
    assert file.read_bytes() == before


def test_a_deleted_experiment_is_said(command, stored):
    from mlflow import MlflowClient

    uri, _, _ = stored
    client = MlflowClient(uri.partition("=")[2])
    client.delete_experiment(client.get_experiment_by_name("insects").experiment_id)
    command("compare", uri, "experiment=insects").refused("the experiment insects was deleted")


def test_folds_are_compared_by_the_run_above_them(command, made, tmp_path, empty_store):
    from mlflow import MlflowClient

    uri = f"sqlite:///{shutil.copy(empty_store, tmp_path / 'mlflow.db')}"
    ids = [logged(made(name, 0.9), uri) for name in ("above", "fold", "other")]
    client = MlflowClient(uri)
    client.set_tag(ids[0], "tl.kind", "folds")
    client.set_tag(ids[1], "mlflow.parentRunId", ids[0])
    out = tmp_path / "out"
    done = command("compare", f"tracking.uri={uri}", "experiment=insects", f"output_dir={out}")
    assert done.code == 0, done.err
    assert {run["id"] for run in values(out)["runs"]} == {ids[0], ids[2]}


def test_names_and_conditions_need_no_quotes_of_their_own():
    assert quoted("params.model.name = resnet18 and metrics.val/acc > 0.9") == (
        "params.`model.name` = 'resnet18' and metrics.`val/acc` > 0.9"
    )
    assert quoted("params.`a.b` = 'x y' and tags.c LIKE 'd%'") == (
        "params.`a.b` = 'x y' and tags.c LIKE 'd%'"
    )
    assert plain_names(["runs=[a, b]", "filter=params.x = \"y\""]) == [
        'runs=["a","b"]', 'filter="params.x = \\"y\\""'
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="twice"):
        CompareConfig(runs=["a", "a"])
