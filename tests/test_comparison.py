"""`tl compare`: verdicts on runs that are known to differ or not, and what is refused."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import servers
from commands import TINY, Command
from runs_made import answers, logged, pictures, run_folder

from tl.comparison.families import Family, family_pairs
from tl.comparison.judging import groups_of
from tl.comparison.stored import opened, quoted
from tl.config import CompareConfig, ConfigError, Task, spelled
from tl.evaluation import PairSide, sheet_of
from tl.tracking import TrackingError


@pytest.fixture
def command(capfd, monkeypatch) -> Command:
    return Command(capfd, monkeypatch)


@pytest.fixture
def made(tmp_path):
    """Factory of folders of runs on the same pictures."""
    rows = pictures(tmp_path / "images")

    def make(name: str, quality: float, *settings: str, seed: int = 0, task=Task.single, of=rows):
        table, metrics = answers(of, quality, seed, task)
        where = tmp_path / "runs" / name
        return run_folder(where, tmp_path / "images", table, metrics, f"seed={seed}", *settings)

    make.rows = rows
    return make


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory) -> Path:
    """Tables of a store, which take seconds to make."""
    from tl.tracking.store import open_store

    file = tmp_path_factory.mktemp("empty") / "mlflow.db"
    open_store(f"sqlite:///{file}")
    return file


def values(folder: Path) -> dict:
    return json.loads((folder / "compare.json").read_text())


def test_a_clear_winner_a_tie_and_what_would_tell(command, made, tmp_path):
    names = ["good", "like", "bad"]
    for name, quality in zip(names, (0.9, 0.895, 0.6), strict=True):
        made(name, quality, f"finetune.lr_ratio={len(name)}")
    out = tmp_path / "out"
    done = command("compare", f"runs={tmp_path / 'runs'}", f"output_dir={out}")
    assert done.code == 0, done.err
    assert " beats 1 (bad)." in done.out.replace("\n  ", " ")
    assert "No difference can be shown" in done.out
    found = values(out)
    by_name = {run["name"].rpartition(" ")[2]: run for run in found["runs"]}
    pair = {(p["a"], p["b"]): p for p in found["pairs"]}
    assert len(pair) == 3
    assert found["best"] in (by_name["good"]["id"], by_name["like"]["id"])
    clear = next(p for p in found["pairs"] if p["b"] == by_name["bad"]["id"])
    assert clear["verdict"] == "a"
    assert clear["low"] > 0.2
    assert clear["p"] < clear["p_adjusted"] < 1e-6
    tie = next(p for p in found["pairs"] if by_name["bad"]["id"] not in (p["a"], p["b"]))
    assert tie["verdict"] == "none"
    assert "no difference can be shown" in tie["words"]
    assert tie["detectable"] > abs(tie["difference"])
    for name in names:
        metrics = json.loads((tmp_path / "runs" / name / "metrics.json").read_text())
        assert by_name[name]["value"] == pytest.approx(metrics["test/acc"])
        assert by_name[name]["low"] == pytest.approx(metrics["test/acc_low"], abs=1e-6)
        assert by_name[name]["curve"]["y"] == [0.5, 0.7]
        assert [m["phase"] for m in by_name[name]["curve"]["marks"]] == ["head", "all"]
        images = sum(by_name[name]["reliability"]["images"])
        assert images == 200
    assert found["varied"] == ["params.finetune.lr_ratio"]
    assert {p.name for p in out.iterdir()} == {"compare.json", "compare.csv", "compare.html"}
    table = pd.read_csv(out / "compare.csv")
    assert sorted(table["verdict"]) == ["no difference shown", "reference", "worse"]
    assert table["acc"].is_monotonic_decreasing
    assert "NaN" not in (out / "compare.json").read_text()


def test_a_baseline_is_the_side_of_every_pair(command, made, tmp_path):
    runs = [made(name, q) for name, q in (("a", 0.9), ("b", 0.7), ("c", 0.9))]
    out = tmp_path / "out"
    asked = f"runs={','.join(map(str, runs))}"
    done = command("compare", asked, f"baseline={runs[1]}", f"output_dir={out}")
    assert done.code == 0, done.err
    found = values(out)
    assert found["reference"] == found["baseline"] == str(runs[1])
    assert [p["a"] for p in found["pairs"]] == [str(runs[1])] * 2
    assert {p["verdict"] for p in found["pairs"]} == {"b"}
    assert "Better than b: 2" in done.out


def test_changed_images_are_shown_where_they_are_still_the_same(command, made, tmp_path):
    a, b = made("a", 0.95), made("b", 0.6)
    out = tmp_path / "out"
    changed = made.rows["path"].iloc[0]
    assert command("compare", f"runs={a},{b}", f"output_dir={out}").code == 0
    found = values(out)
    assert found["pair"] == [str(a), str(b)]
    flip = found["flips"][0]
    one, other = (pd.read_parquet(p / "predictions.parquet") for p in (a, b))
    row = one.index[one["sha256"] == flip["sha256"]][0]
    assert flip["image"] == one["path"][row]
    assert flip["label"] == one["label"][row] == flip["a"]["predicted"]
    assert flip["b"]["predicted"] == other["predicted"][row] != flip["label"]
    assert all(f["thumbnail"].startswith("data:image/jpeg") for f in found["flips"])
    assert len(found["flips"]) == 60
    recalls = {c["class"]: (c["a"], c["b"]) for c in found["classes"]}
    ants = one["label"] == "ant"
    assert recalls["ant"] == pytest.approx(
        (one["correct"][ants].mean(), other["correct"][ants].mean())
    )
    for path in (tmp_path / "images/test").iterdir():
        path.write_bytes(b"another image")
    assert command("compare", f"runs={a},{b}", f"output_dir={tmp_path / 'again'}").code == 0
    assert {f["thumbnail"] for f in values(tmp_path / "again")["flips"]} == {None}
    assert changed


def test_runs_on_other_images_labels_or_classes_are_never_laid_beside_each_other(
    command, made, tmp_path
):
    made("a", 0.9), made("b", 0.9)
    made("images", 0.95, of=pictures(tmp_path / "images", 200, "other"))
    wrong = made.rows.assign(label=(made.rows["label"] + (made.rows.index < 7)) % 3)
    made("labels", 0.95, of=wrong)
    folder = made("classes", 0.95)
    table = pd.read_parquet(folder / "predictions.parquet").rename(columns={"p_wasp": "p_hornet"})
    table = table.replace({"label": {"wasp": "hornet"}, "predicted": {"wasp": "hornet"}})
    table.to_parquet(folder / "predictions.parquet")
    out = tmp_path / "out"
    done = command("compare", f"runs={tmp_path / 'runs'}", f"output_dir={out}")
    assert done.code == 0, done.err
    found = values(out)
    assert sorted(len(g["runs"]) for g in found["groups"]) == [1, 1, 1, 2]
    words = {p["words"].partition("not comparable: ")[2] for p in found["pairs"]} - {""}
    assert any(w.startswith("other images (0 in common, 200 and 200 not)") for w in words)
    assert any(w.startswith("other labels of the same images: test/000.png") for w in words)
    assert any("only one has wasp; only the other has hornet" in w for w in words)
    assert "3 more runs in 3 other groups are not comparable" in done.out.replace("\n  ", " ")
    best = next(run for run in found["runs"] if run["id"] == found["best"])
    assert best["group"] == 0
    assert {p["p"] for p in found["pairs"] if p["verdict"] == "incomparable"} == {None}


@pytest.mark.parametrize(("task", "metric"), [(Task.multi, "map"), (Task.regression, "mae")])
def test_several_labels_and_numbers_are_compared_too(command, made, tmp_path, task, metric):
    a, b = made("a", 0.9, task=task), made("b", 0.6, task=task)
    out = tmp_path / "out"
    done = command("compare", f"runs={a},{b}", f"output_dir={out}")
    assert done.code == 0, done.err
    found = values(out)
    assert found["metric"] == metric
    assert found["best"] == str(a)
    assert found["pairs"][0]["verdict"] == "a"
    assert found["lower_is_better"] is (metric == "mae")
    logged_value = json.loads((a / "metrics.json").read_text())[f"test/{metric}"]
    assert found["runs"][0]["value"] == pytest.approx(logged_value, abs=1e-6)
    assert len(found["flips"]) > 20
    assert found["flips"][0]["a"]["predicted"] != found["flips"][0]["b"]["predicted"]
    assert bool(found["classes"]) is (metric == "map")
    assert "beats" in done.out


def test_seeds_are_one_family_and_say_what_holds_beyond_them(command, made, tmp_path):
    for seed in range(4):
        made(f"x{seed}", 0.9, "finetune.lr_ratio=3", seed=seed)
        made(f"y{seed}", 0.7, "finetune.lr_ratio=10", seed=seed)
    made("twice", 0.7, "finetune.lr_ratio=10", seed=3)
    out = tmp_path / "out"
    done = command("compare", f"runs={tmp_path / 'runs'}", f"output_dir={out}")
    assert done.code == 0, done.err
    found = values(out)
    assert [(f["name"], f["seeds"]) for f in found["families"]] == [
        ("lr_ratio 3.0", [0, 1, 2, 3]), ("lr_ratio 10.0", [0, 1, 2, 3])
    ]  # fmt: skip
    member = {run["id"]: run for run in found["runs"]}
    first = found["families"][0]
    own = [member[run]["value"] for run in first["runs"]]
    assert first["mean"] == pytest.approx(np.mean(own))
    assert first["std"] == pytest.approx(np.std(own, ddof=1))
    assert {member[run]["family"] for run in first["runs"]} == {0}
    (pair,) = found["family_pairs"]
    assert (pair["a"], pair["b"], pair["verdict"]) == (0, 1, "a")
    assert "also beyond these seeds" in done.out.replace("\n", " ")
    assert "9 models were judged on these test images" in done.out.replace("\n  ", " ")
    assert found["optimism"] > 0
    assert found["varied"] == ["params.finetune.lr_ratio", "params.seed"]


def test_families_of_equal_settings_are_told_apart_no_more_often_than_promised(made):
    """Models whose luck is in the seed and in the images; families of three of each."""
    rng = np.random.default_rng(0)
    truth = sheet_of(answers(made.rows, 0.9, 0)[0], "test").truth
    told = held = 0
    for _ in range(300):
        hard = rng.normal(0, 1, 200)
        right = {}
        for number in range(6):
            skill = 1.2 + rng.normal(0, 0.15)
            right[str(number)] = (skill + rng.normal(0, 0.7, 200) > hard).astype(float)
        group = groups_of_sides(truth, right)
        families = [
            Family("a", ("0", "1", "2"), (0, 1, 2)),
            Family("b", ("3", "4", "5"), (0, 1, 2)),
        ]
        (pair,) = family_pairs(families, group, 0.95)
        told += pair["verdict"] != "none"
        held += pair["low"] <= 0 <= pair["high"]
    assert told / 300 <= 0.08
    assert 0.92 <= held / 300 <= 0.995


def groups_of_sides(truth, right):
    from tl.comparison.judging import Group

    ids = tuple(right)
    sides = tuple(PairSide(right[run]) for run in ids)
    means = tuple(float(side.values.mean()) for side in sides)
    return Group(truth, "acc", ids, sides, means, means, means, 0, (), 0.0, None)


def test_the_best_of_many_equal_models_beats_another_no_more_often_than_promised(made):
    """All pairs are counted where the best is chosen by the same images."""
    rng = np.random.default_rng(0)
    base = sheet_of(answers(made.rows, 0.9, 0)[0], "test")
    told = 0
    for _ in range(40):
        hard = rng.normal(0, 1, 200)
        sheets = {}
        for number in range(12):
            right = 1.0 + rng.normal(0, 0.8, 200) > hard
            said = np.where(right, base.truth.truth, (base.truth.truth + 1) % 3)
            sheets[str(number)] = type(base)("test", base.truth, said, base.score)
        (group,) = groups_of(sheets, None, 0.95)
        told += any(pair.p_adjusted <= 0.05 for pair in group.pairs)
    assert told / 40 <= 0.1


def test_without_test_images_val_is_compared_with_a_warning(command, made, tmp_path):
    for name, quality in (("a", 0.9), ("b", 0.7)):
        folder = made(name, quality)
        table = pd.read_parquet(folder / "predictions.parquet").assign(split="val")
        table.to_parquet(folder / "predictions.parquet")
    out = tmp_path / "out"
    done = command("compare", f"runs={tmp_path / 'runs'}", f"output_dir={out}")
    assert done.code == 0, done.err
    assert values(out)["split"] == "val"
    assert "These are val images, on which training chose its epochs" in done.out


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


@pytest.fixture
def stored(made, tmp_path, empty_store):
    """Two runs in a store of their own, and its address."""
    (tmp_path / "store").mkdir()
    shutil.copy(empty_store, tmp_path / "store/mlflow.db")
    uri = f"sqlite:///{tmp_path / 'store/mlflow.db'}"
    ids = [
        logged(made(name, q), uri, seed=i) for i, (name, q) in enumerate((("a", 0.9), ("b", 0.6)))
    ]
    return f"tracking.uri={uri}", ids, tmp_path


def test_runs_are_named_by_id_or_by_name(command, stored):
    uri, ids, tmp = stored
    done = command("compare", uri, f"runs={ids[0]},insects · b", f"output_dir={tmp / 'out'}")
    if "insects · b · " in done.err or done.code:  # names end with four digits of their job
        from mlflow import MlflowClient

        name = MlflowClient(uri.partition("=")[2]).get_run(ids[1]).info.run_name
        done = command("compare", uri, f"runs={ids[0]},{name}", f"output_dir={tmp / 'out2'}")
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
def test_bad_requests_are_one_clear_message(command, stored, arguments, words):
    uri, _, tmp = stored
    out = tmp / "out"
    command("compare", uri, f"output_dir={out}", *arguments).refused(*words)
    assert not out.exists()


def test_a_store_that_is_not_there_is_not_made(command, tmp_path):
    file = tmp_path / "none.db"
    command("compare", f"tracking.uri=sqlite:///{file}", "experiment=x").refused(
        f"there is no MLflow store {file}", "runs=FOLDER"
    )
    assert not file.exists()


def test_a_store_of_another_version_is_refused_and_left_as_it_is(command, stored):
    _, _, tmp = stored
    file = Path(shutil.copy(tmp / "store/mlflow.db", tmp / "other.db"))
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


def test_folders_that_cannot_be_compared_say_why(command, made, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    command("compare", f"runs={empty},{empty / 'x'}").refused(f"{empty} holds no run")
    old, cut, bare = made("old", 0.9), made("cut", 0.9), made("bare", 0.9)
    table = pd.read_parquet(old / "predictions.parquet").drop(columns="sha256")
    table.to_parquet(old / "predictions.parquet")
    (cut / "predictions.parquet").write_bytes(b"PAR1 and no more")
    (bare / "predictions.parquet").unlink()
    done = command("compare", f"runs={old},{cut},{bare}", f"output_dir={tmp_path / 'out'}")
    done.refused("no column sha256", "predictions.parquet cannot be read", "tl evaluate")
    assert not (tmp_path / "out").exists()
    good = made("good", 0.9)
    command("compare", f"runs={good},{bare}", f"baseline={bare}").refused(
        "baseline:", "cannot be compared"
    )
    (good / "config.yaml").write_text("a: [")
    command("compare", f"runs={good},{bare}").refused("config.yaml cannot be read")


def test_an_output_folder_that_cannot_be_written_is_said(command, made, tmp_path):
    a, b = made("a", 0.9), made("b", 0.8)
    (tmp_path / "file").write_text("")
    done = command("compare", f"runs={a},{b}", f"output_dir={tmp_path / 'file/out'}")
    done.refused("cannot write", "choose another output_dir")


def test_equal_figures_are_shared_and_the_cheaper_run_comes_first(command, made, tmp_path):
    dear, cheap, worse = made("longer", 0.9), made("short", 0.9), made("third", 0.7)
    out = tmp_path / "out"
    done = command("compare", f"runs={dear},{cheap},{worse}", f"output_dir={out}")
    assert done.code == 0, done.err
    assert values(out)["best"] == str(cheap)
    assert "2 runs with" in done.out
    assert "short, longer, the cheapest first" in done.out.replace("\n  ", " ")
    assert "They are right and wrong on the same images" in done.out.replace("\n  ", " ")


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
    assert spelled(["runs=[a, b]", "filter=params.x = \"y\""]) == [
        'runs=["a","b"]', 'filter="params.x = \\"y\\""'
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="twice"):
        CompareConfig(runs=["a", "a"])
