"""Every pipeline from the command line: what it writes, what it says, and how it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pandas as pd
import pytest
from commands import REPO, TINY, UNTRACKED, Done, files, script, start, wait_for
from mlflow import MlflowClient

from tl.config import PIPELINES

RUN_FILES = {
    "config.yaml",
    "plan.json",
    "history.csv",
    "metrics.json",
    "predictions.parquet",
    "train_images.parquet",
    "run.json",
    "report.html",
    "audit.html",
    "audit.json",
    "per_class.csv",
    "calibration.json",
    "pictures/calibration_val.png",
    "pictures/ranking_val.png",
    "pictures/confusion_val.png",
    "pictures/learning_curves.png",
    "checkpoints/model.json",
    "checkpoints/model.safetensors",
    "checkpoints/progress.json",
    "checkpoints/1-head/activations.json",
    "checkpoints/1-head/best.ckpt",
    "checkpoints/1-head/last.ckpt",
    "checkpoints/2-all/activations.json",
    "checkpoints/2-all/best.ckpt",
    "checkpoints/2-all/last.ckpt",
}
BUNDLE_FILES = {
    "MLmodel",
    "README.md",
    "classes.txt",
    "config.json",
    "input_example.json",
    "model.onnx",
    "model.safetensors",
    "preprocessing.json",
    "python_env.yaml",
    "requirements.txt",
    "serving_input_example.json",
    "golden/expected.json",
    "bundle.json",
}
WITH_INTERVAL = {
    *("acc", "f1_macro", "f1_weighted", "balanced_acc", "log_loss", "brier", "ece", "auc", "ap")
}
JUDGED = {f"{name}{end}" for name in WITH_INTERVAL for end in ("", "_low", "_high")}
JUDGED |= {"loss", "ece_uncalibrated", "sure_share", "images"}
SUMS = {"fit_seconds", "total_seconds", "trainable_parameters", "epochs", "ms_an_image"}
LEARNS = ["experiment=smoke", "model.image_size=32", "tracking.system_metrics=false"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, object]:
    """One run of the console script as a user starts it: folder, data, store, what it said."""
    import numpy as np
    from PIL import Image

    place = tmp_path_factory.mktemp("user")
    rng = np.random.default_rng(0)
    colours = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (200, 50, 40)}
    for split, number in {"train": 8, "val": 4, "test": 4}.items():
        for name, colour in colours.items():
            folder = place / "photos" / split / name
            folder.mkdir(parents=True)
            for n in range(number):
                noise = rng.normal(0, 12, (32, 40, 3)) + colour
                Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(folder / f"{n}.png")
    store = f"sqlite:///{place / 'mlflow.db'}"
    env = {"MLFLOW_TRACKING_URI": store, "TL_CACHE_DIR": str(place / "cache")}
    settings = ["finetune.epochs=6", "finetune.head_lr=0.02", "augment=none"]
    done = script(
        "train",
        f"data.root={place / 'photos'}",
        *LEARNS,
        *settings,
        f"output_dir={place / 'run'}",
        **env,
    )
    assert done.code == 0, done.out + done.err
    return {"run": place / "run", "data": place / "photos", "store": store, "done": done}


@pytest.fixture
def bundle(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained["run"] / "bundle", tmp_path / "bundle"))


# --- train --------------------------------------------------------------------------------------


def test_train_writes_exactly_these_files(trained):
    found = files(trained["run"])
    in_bundle = {f.removeprefix("bundle/") for f in found if f.startswith("bundle/")}
    golden = {f"golden/{i:02d}.png" for i in range(8)}
    code = {f for f in in_bundle if f.startswith("code/tl_bundle/") and f.endswith(".py")}
    assert {f for f in found if not f.startswith("bundle/")} == RUN_FILES | {
        f"pictures/{name}_test.png" for name in ("calibration", "confusion", "ranking")
    }
    assert in_bundle - code == BUNDLE_FILES | golden
    assert "code/tl_bundle/reader.py" in code
    assert files(trained["run"].parent) - {
        f for f in files(trained["run"].parent) if f.startswith(("run/", "photos/", "mlartifacts/"))
    } == {"mlflow.db", *(f for f in files(trained["run"].parent) if f.startswith("cache/"))}


def test_metrics_json_is_flat_with_the_promised_keys(trained):
    metrics = json.loads((trained["run"] / "metrics.json").read_text())
    judged = {f"{split}/{key}" for split in ("val", "test") for key in JUDGED}
    assert set(metrics) == judged | SUMS
    assert metrics["val/images"] == metrics["test/images"] == 12
    assert metrics["epochs"] == len(pd.read_csv(trained["run"] / "history.csv"))
    assert metrics["val/acc_low"] <= metrics["val/acc"] <= metrics["val/acc_high"]
    assert 0 < metrics["fit_seconds"] < metrics["total_seconds"]
    assert 0.05 < metrics["ms_an_image"] < 5000
    predictions = pd.read_parquet(trained["run"] / "predictions.parquet")
    for split, rows in predictions.groupby("split"):
        assert metrics[f"{split}/acc"] == pytest.approx(rows["correct"].mean())


def test_train_shows_data_plan_results_and_where_everything_is(trained):
    done = trained["done"]
    for text in (
        "24 train, 12 val, 12 test images in 3 classes",
        "lp_ft: head -> all",
        "phase 1 of 2: head",
        "phase 2 of 2: all, after",
        "val: accuracy",
        "95 % interval",
        f"tl predict bundle={trained['run'] / 'bundle'}",
        f"mlflow ui --backend-store-uri {trained['store']}",
    ):
        assert text in done.out
    assert "\x1b" not in done.out, "colour codes in a log"
    assert done.err == ""


def test_train_logs_one_whole_mlflow_run(trained):
    client = MlflowClient(trained["store"])
    record = json.loads((trained["run"] / "run.json").read_text())
    (run,) = client.search_runs([record["experiment_id"]])
    assert (run.info.run_id, run.info.status) == (record["run_id"], "FINISHED")
    assert run.info.run_name == f"photos · test_resnet · lp_ft · {record['job'][:4]}"
    metrics = json.loads((trained["run"] / "metrics.json").read_text())
    logged = run.data.metrics
    assert {k: logged[k] for k in metrics} == pytest.approx(metrics)
    epochs = {m.step for m in client.get_metric_history(record["run_id"], "train/loss")}
    assert len(epochs) == metrics["epochs"], "one loss an epoch, steps running on over phases"
    assert any(key.startswith("lr") for key in logged)
    assert run.data.params["finetune.method"] == "lp_ft"
    assert run.data.params["phase.head.head_lr"] == "0.02"
    assert run.data.tags["data.images"] == "48"
    assert len(run.data.tags["data.sha256"]) == len(run.data.params["model.weights_sha256"]) == 64
    assert {"version.torch", "version.timm", "git.commit", "command"} <= set(run.data.tags)
    names = {f.path for f in client.list_artifacts(record["run_id"])}
    assert {"config.yaml", "data.json", "environment.json", "phases", "pictures"} <= names
    assert len(client.search_logged_models([record["experiment_id"]])) == 1


def test_python_file_does_what_the_console_script_does(tl, image_folder):
    settings = [f"data.root={image_folder()}", *UNTRACKED]
    assert tl("train", *settings, "output_dir=script").code == 0
    command = (sys.executable, REPO / "pipelines/train.py")
    done = script(*settings, "output_dir=file", command=command)
    assert done.code == 0, done.err
    assert files(Path("script")) == files(Path("file")) == RUN_FILES - {"run.json"}
    left, right = (json.loads(Path(p, "metrics.json").read_text()) for p in ("script", "file"))
    assert {k: v for k, v in left.items() if not k.endswith("seconds")} == {
        k: v for k, v in right.items() if not k.endswith("seconds")
    }


def test_folder_of_a_run_is_named_after_date_data_model_and_method(tl, image_folder):
    data = image_folder()
    first, second = (tl("train", f"data.root={data}", *UNTRACKED) for _ in range(2))
    assert first.code == second.code == 0, second.err
    names = sorted(p.name for p in Path("runs").iterdir())
    assert len(names) == 2, "runs that begin within one second do not collide"
    assert all("_images_test_resnet_lp_ft" in name for name in names)


def test_train_without_val_and_with_numbered_classes(tl, image_folder):
    data = image_folder(splits={"": 6}, classes=("2", "10", "1"))
    done = tl("train", f"data.root={data}", *UNTRACKED, "output_dir=run")
    assert done.code == 0, done.err
    assert "no val: took" in done.out
    assert json.loads(Path("run/checkpoints/model.json").read_text())["classes"] == ["1", "2", "10"]


def test_tracking_can_be_off(tl, image_folder):
    done = tl("train", f"data.root={image_folder()}", *UNTRACKED, "output_dir=run")
    assert done.code == 0
    assert files(Path("run")) == RUN_FILES - {"run.json"}
    assert not Path("mlflow.db").exists()


# --- several jobs -------------------------------------------------------------------------------


def test_a_failed_job_of_a_batch_is_named_and_the_others_finish(tl, image_folder):
    done = tl(
        "train",
        f"data.root={image_folder()}",
        *UNTRACKED,
        "-m",
        "finetune=linear_probe,full",
        "finetune.epochs=1",
        "model.weights=none,nothing.pth",
        "output_dir=batch",
    )
    assert done.code == 1
    assert sorted(p.parent.name for p in Path("batch").glob("*/metrics.json")) == ["0", "2"]
    assert not files(Path("batch/1")), "a refused job leaves nothing"
    last = done.err.strip().splitlines()[-2:]
    assert last[0].startswith("job 1 failed (")
    assert last[1].startswith("job 3 failed (")
    assert "finetune=linear_probe" in last[0]
    assert "finetune=full" in last[1]
    assert all("there is no file" in line and "nothing.pth" in line for line in last)
    assert "Traceback" not in done.err


def test_a_batch_without_failures_ends_with_0(tl, image_folder):
    settings = ["finetune=linear_probe", "finetune.epochs=1", "seed=1,2"]
    done = tl("train", "-m", f"data.root={image_folder()}", *UNTRACKED, *settings)
    assert done.code == 0, done.err
    (batch,) = Path("runs").iterdir()
    assert batch.name.endswith("_batch")
    assert {p.parent.name for p in batch.glob("*/metrics.json")} == {"0", "1"}


# --- predict, evaluate, export ------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["csv", "parquet", "json"])
def test_predict_writes_a_table(tl, trained, bundle, ending):
    source = trained["data"] / "test"
    done = tl("predict", f"bundle={bundle}", f"source={source}", f"output=out/p.{ending}")
    assert done.code == 0, done.err
    path = Path("out") / f"p.{ending}"
    assert files(Path("out")) == {path.name}
    readers = {"csv": pd.read_csv, "parquet": pd.read_parquet, "json": pd.read_json}
    table = readers[ending](path)
    assert list(table.columns) == ["source", "label", "score", "sure", "top", "error"]
    assert not table["sure"].any()  # 12 images of val cannot promise 95 %
    assert len(table) == 12
    assert table["label"].isin(["blue", "green", "red"]).all()
    assert table["score"].between(1 / 3, 1).all()
    assert table["error"].isna().all()
    assert table["source"].is_monotonic_increasing
    assert f"12 predictions: {path}" in done.out


def test_predict_equals_what_training_said(tl, trained, bundle):
    tl("predict", f"bundle={bundle}", f"source={trained['data'] / 'test'}", "output=p.csv")
    ours = pd.read_csv("p.csv").set_index("source")
    rows = pd.read_parquet(trained["run"] / "predictions.parquet").query("split == 'test'")
    assert len(rows) == len(ours)
    for row in rows.itertuples():
        one = ours.loc[str(trained["data"] / row.path)]
        assert one.label == row.predicted
        assert one.score == pytest.approx(row.score, abs=1e-4)


def test_predict_takes_a_file_a_pattern_and_skips_bad_images_when_told(tl, trained, bundle):
    image = trained["data"] / "test/red/0.png"
    one = tl("predict", f"bundle={bundle}", f"source={image}", "output=one.csv")
    assert one.code == 0
    assert len(pd.read_csv("one.csv")) == 1
    pattern = trained["data"] / "*/red/*.png"
    many = tl("predict", f"bundle={bundle}", f"source='{pattern}'", "output=many.csv")
    assert many.code == 0, many.err
    assert len(pd.read_csv("many.csv")) == 16
    Path("mixed").mkdir()
    shutil.copy(image, "mixed/good.png")
    Path("mixed/bad.png").write_bytes(b"")
    tl("predict", f"bundle={bundle}", "source=mixed").refused("mixed/bad.png: 0 bytes")
    settings = ["source=mixed", "bad_images=skip", "output=mixed.csv"]
    assert tl("predict", f"bundle={bundle}", *settings).code == 0
    table = pd.read_csv("mixed.csv").set_index("source")
    assert "0 bytes" in table.loc["mixed/bad.png", "error"]
    assert pd.isna(table.loc["mixed/good.png", "error"])


def test_evaluate_equals_what_training_said(tl, trained, bundle):
    done = tl("evaluate", f"bundle={bundle}", f"data.root={trained['data']}", "output_dir=judged")
    assert done.code == 0, done.err
    assert files(Path("judged")) == {
        *("metrics.json", "predictions.parquet", "per_class.csv", "calibration.json"),
        *(f"pictures/{name}_test.png" for name in ("calibration", "confusion", "ranking")),
    }
    ours = json.loads(Path("judged/metrics.json").read_text())
    theirs = json.loads((trained["run"] / "metrics.json").read_text())
    assert set(ours) == {f"test/{key}" for key in JUDGED}
    assert ours == pytest.approx({k: theirs[k] for k in ours}, abs=1e-4)
    assert "test: accuracy" in done.out


def test_evaluate_takes_a_split_and_a_folder_of_some_classes(tl, trained, bundle, image_folder):
    data = image_folder(splits={"": 2}, classes=("red", "blue"))
    done = tl("evaluate", f"bundle={bundle}", f"data.root={data}", "split=all", "output_dir=some")
    assert done.code == 0, done.err
    assert json.loads(Path("some/metrics.json").read_text())["all/images"] == 4


@pytest.mark.parametrize("pipeline", ["predict", "evaluate"])
def test_predict_and_evaluate_never_import_torch(trained, bundle, pipeline):
    data = {"predict": "source", "evaluate": "data.root"}[pipeline]
    code = (
        "import sys; from tl.pipelines import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'torchvision', 'timm', 'pytorch_lightning', 'mlflow'}\n"
        "print('heavy:', sorted(heavy & set(sys.modules)))"
    )
    done = script(
        pipeline,
        f"bundle={bundle}",
        f"{data}={trained['data']}",
        "output_dir=out",
        command=(sys.executable, "-c", code),
    )
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == "heavy: []"


def test_export_writes_the_bundle_of_a_run_again(tl, trained, tmp_path):
    run = Path(shutil.copytree(trained["run"], tmp_path / "run"))
    before = files(run / "bundle")
    shutil.rmtree(run / "bundle")
    done = tl("export", f"run={run}")
    assert done.code == 0, done.err
    assert "sealed: 8 images, largest difference" in done.out
    assert files(run / "bundle") == before
    other = tl("export", f"run={run}", "output_dir=elsewhere")
    assert other.code == 0, other.err
    assert files(Path("elsewhere")) == before


def test_a_seal_that_breaks_leaves_the_old_bundle(tl, trained, tmp_path):
    run = Path(shutil.copytree(trained["run"], tmp_path / "run"))
    before = {f: (run / "bundle" / f).read_bytes() for f in files(run / "bundle")}
    tl("export", f"run={run}", "export.tolerance=1e-30").refused("sealing failed", code=1)
    assert {f: (run / "bundle" / f).read_bytes() for f in files(run / "bundle")} == before
    tl("export", f"run={run}", "export.tolerance=1e-30", "output_dir=new").refused(code=1)
    assert not Path("new").exists()


# --- interrupted --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "signum", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_an_interrupted_run_says_how_to_go_on_and_goes_on(tl, image_folder, signum, monkeypatch):
    run = Path("run").absolute()
    data = image_folder(Path("photos"))  # a relative path
    settings = ["finetune.epochs=12", "finetune.patience=0", f"output_dir={run}"]
    process = start("train", f"data.root={data}", *TINY, *settings)
    wait_for(run / "checkpoints/1-head/last.ckpt", process)
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    done = Done(process.returncode, out, err)
    done.refused("interrupted", f"tl train resume={run}", code=130)
    before = json.loads((run / "run.json").read_text())
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    assert before["status"] == client.get_run(before["run_id"]).info.status == "KILLED"
    assert not (run / "metrics.json").exists()

    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    again = tl("train", f"resume={run}")
    assert again.code == 0, again.err
    after = json.loads((run / "run.json").read_text())
    assert (after["run_id"], after["status"]) == (before["run_id"], "FINISHED")
    assert client.get_run(after["run_id"]).info.status == "FINISHED"
    history = pd.read_csv(run / "history.csv")
    assert history.groupby("phase").epoch.max().to_dict() == {"all": 12, "head": 12}
    assert files(run) == RUN_FILES


def test_resuming_a_finished_run_changes_no_metric(tl, image_folder):
    assert tl("train", f"data.root={image_folder()}", *UNTRACKED, "output_dir=run").code == 0
    before = json.loads(Path("run/metrics.json").read_text())
    again = tl("train", "resume=run")
    assert again.code == 0, again.err
    assert "phase all is done already" in again.out
    after = json.loads(Path("run/metrics.json").read_text())
    assert {k: v for k, v in after.items() if k != "total_seconds"} == {
        k: v for k, v in before.items() if k != "total_seconds"
    }


# --- the script itself --------------------------------------------------------------------------


def test_help_lists_every_pipeline_in_well_under_a_second():
    import time

    began = time.monotonic()
    done = script("--help")
    assert done.code == 0
    for name in ("advise", "cache", "demo", "evaluate", "export", "predict", "train"):
        assert f"\n  {name}" in done.out
    assert time.monotonic() - began < 5, "torch was imported?"


@pytest.mark.parametrize(
    "name", ["advise", "cache", "demo", "evaluate", "export", "predict", "train"]
)
def test_help_of_a_pipeline_shows_its_keys(tl, name):
    done = tl(name, "--help")
    assert done.code == 0
    assert {"cache": "prune"}.get(name, "output_dir") in done.out
    assert "Settings used most" in done.out


def test_a_misspelt_pipeline_is_refused_with_the_nearest_name(tl):
    tl("trian").refused("no pipeline trian; did you mean train?")
    tl("xyz").refused(f"there are {', '.join(sorted(PIPELINES))}")


@pytest.mark.slow
def test_demo_compares_three_methods_and_names_the_next_command(tmp_path):
    done = script("demo", "output_dir=demo", f"tracking.uri=sqlite:///{tmp_path / 'demo.db'}")
    assert done.code == 0, done.err
    for text in ("linear_probe", "lp_ft", "scratch", "test accuracy", "mlflow ui", "tl train"):
        assert text in done.out
    runs = {p.parent.name for p in Path("demo").glob("*/metrics.json")}
    assert runs == {"pretraining", "linear_probe", "lp_ft", "scratch"}
    assert len(list(Path("demo").glob("*/bundle/model.onnx"))) == 3
    client = MlflowClient(f"sqlite:///{tmp_path / 'demo.db'}")
    experiment = client.get_experiment_by_name("demo")
    found = client.search_runs([experiment.experiment_id])
    assert {r.info.run_name for r in found} == runs
    assert {r.info.status for r in found} == {"FINISHED"}
