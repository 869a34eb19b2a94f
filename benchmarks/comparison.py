"""What `tl compare` takes for a thousand runs, and whether its statistics keep their word.

python benchmarks/comparison.py store FOLDER --runs 1000 --images 1000   # a store to compare
python benchmarks/comparison.py time --runs 1000 --images 1000
python benchmarks/comparison.py coverage                                 # of intervals, verdicts
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

CLASSES = 10
EPOCHS = 30
MODELS = ("resnet18", "resnet50", "mobilenetv2_100", "convnext_tiny")
METHODS = ("linear_probe", "lp_ft", "full", "lora", "norm_affine")


def main() -> None:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("store", "time", "coverage"))
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--images", type=int, default=1000)
    args = parser.parse_args()
    if args.what == "coverage":
        coverage()
    elif args.what == "store":
        make_store(Path(args.folder), args.runs, args.images)
    else:
        with tempfile.TemporaryDirectory() as folder:
            make_store(Path(args.folder or folder), args.runs, args.images)
            measure(Path(args.folder or folder))


def make_store(folder: Path, runs: int, images: int) -> None:
    """A sqlite store with as many runs as asked for, each with what a run of `tl train` logs.

    Rows are written past MLflow, which takes tens of milliseconds for each run.
    """
    from mlflow import MlflowClient

    folder.mkdir(parents=True, exist_ok=True)
    uri = f"sqlite:///{folder.absolute()}/mlflow.db"
    client = MlflowClient(uri)
    artifacts = folder.absolute() / "mlartifacts"
    experiment = client.create_experiment("many", artifact_location=artifacts.as_uri())
    rng = np.random.default_rng(0)
    digests = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(images)]
    truth, hard = rng.integers(CLASSES, size=images), rng.random(images)
    began = time.perf_counter()
    rows: dict[str, list[tuple]] = {
        name: [] for name in ("runs", "params", "latest_metrics", "tags")
    }
    for number in range(runs):
        run_id = hashlib.md5(str(number).encode()).hexdigest()
        place = artifacts / run_id / "artifacts"
        place.mkdir(parents=True)
        facts = write_files(place, number, digests, truth, hard)
        add_rows(rows, run_id, number, int(experiment), place, facts)
    insert(folder / "mlflow.db", rows)
    print(f"made {runs:,} runs of {images:,} images in {time.perf_counter() - began:.1f} s")


def write_files(
    place: Path, number: int, digests: list[str], truth: np.ndarray, hard: np.ndarray
) -> dict[str, float]:
    """The predictions and the history of a run; returns its metrics."""
    rng = np.random.default_rng(number)
    quality = 0.80 + 0.1 * (number % len(METHODS)) / len(METHODS) + 0.05 * (number % 7) / 7
    right = hard + rng.normal(0, 0.05, len(truth)) < quality
    said = np.where(right, truth, (truth + rng.integers(1, CLASSES, len(truth))) % CLASSES)
    shares = rng.random((len(truth), CLASSES)).astype(np.float32) * 0.05
    shares[np.arange(len(truth)), said] = 0.9
    shares /= shares.sum(axis=1, keepdims=True)
    names = np.array([f"class{k}" for k in range(CLASSES)])
    table = pd.DataFrame(
        {
            "path": [f"test/{i}.jpg" for i in range(len(truth))],
            "split": "test",
            "sha256": digests,
            "label": names[truth],
            "predicted": names[said],
            "correct": right,
            "score": shares.max(axis=1),
            **{f"p_class{k}": shares[:, k] for k in range(CLASSES)},
        }
    )
    table.to_parquet(place / "predictions.parquet", index=False)
    curve = quality - 0.4 * np.exp(-np.arange(EPOCHS) / 5)
    phases = ["head"] * 10 + ["all"] * (EPOCHS - 10)
    epochs = pd.DataFrame({"phase": phases, "epoch": range(1, EPOCHS + 1), "val/acc": curve})
    epochs.to_csv(place / "history.csv", index=False)
    return {"test/acc": float(right.mean()), "fit_seconds": float(rng.gamma(3, 30))}


def add_rows(
    rows: dict[str, list[tuple]],
    run_id: str,
    number: int,
    experiment: int,
    place: Path,
    facts: dict[str, float],
) -> None:
    """What the database holds of a run: about as much as of one of `tl train`."""
    name = f"many · {MODELS[number % 4]} · {METHODS[number % 5]} · {run_id[:4]}"
    now = int(1000 * time.time()) + number
    row = {
        "run_uuid": run_id, "name": name, "source_type": "LOCAL", "source_name": "",
        "entry_point_name": "", "user_id": "user", "status": "FINISHED", "start_time": now,
        "end_time": now + 1000, "source_version": "", "lifecycle_stage": "active",
        "artifact_uri": place.as_uri(), "experiment_id": experiment,
    }  # fmt: skip
    rows["runs"].append(tuple(row.items()))
    params = {
        "model.name": MODELS[number % 4], "finetune.method": METHODS[number % 5],
        "finetune.lr_ratio": str((3.0, 5.0, 10.0)[number % 3]), "seed": str(number % 5),
        **{f"setting.{k}": "the same" for k in range(90)},
    }  # fmt: skip
    metrics = {**facts, "total_seconds": 2 * facts["fit_seconds"], "trainable_parameters": 1e6,
               **{f"val/metric{k}": 0.5 for k in range(25)}}  # fmt: skip
    tags = {"mlflow.runName": name, "tl.kind": "train", **{f"tag.{k}": "text" for k in range(35)}}
    rows["params"] += [(("key", k), ("value", v), ("run_uuid", run_id)) for k, v in params.items()]
    rows["tags"] += [(("key", k), ("value", v), ("run_uuid", run_id)) for k, v in tags.items()]
    rows["latest_metrics"] += [
        (("key", k), ("value", v), ("timestamp", now), ("step", 0), ("is_nan", 0),
         ("run_uuid", run_id))
        for k, v in metrics.items()
    ]  # fmt: skip


def insert(database: Path, rows: dict[str, list[tuple]]) -> None:
    """Write the rows."""
    with sqlite3.connect(database) as connection:
        for table, found in rows.items():
            columns = [name for name, _ in found[0]]
            marks = ", ".join("?" * len(columns))
            connection.executemany(
                f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})",
                [[value for _, value in row] for row in found],
            )


def measure(folder: Path) -> None:
    """Run `tl compare` as a user does, and print its seconds, its processor's and its memory."""
    script = Path(sys.executable).with_name("tl")
    command = [str(script), "compare", "experiment=many", f"output_dir={folder / 'out'}"]
    env = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder.absolute()}/mlflow.db"}
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    print(done.stdout[:1200], done.stderr[-2000:])
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(
        f"{seconds:.1f} s, {processor:.1f} s of processor, {after.ru_maxrss / 1e3:.0f} MB at most"
    )
    for file in sorted((folder / "out").iterdir()):
        print(f"{file.name}: {file.stat().st_size / 1e6:.1f} MB")


def coverage(repeats: int = 2000) -> None:
    """How often intervals hold the truth, and how often equal models are told apart."""
    from tl.evaluation.paired import PairSide, compare_pair

    print("accuracy: share of 95 % intervals that hold the truth, share of verdicts")
    for images in (30, 100, 400, 2000):
        for a_alone, b_alone in ((0.01, 0.01), (0.05, 0.05), (0.08, 0.02), (0.2, 0.1), (0.03, 0.0)):
            rng = np.random.default_rng(0)
            held = told = 0
            for _ in range(repeats):
                kinds = rng.choice(3, size=images, p=[a_alone, b_alone, 1 - a_alone - b_alone])
                a, b = PairSide((kinds != 1).astype(float)), PairSide((kinds != 0).astype(float))
                found = compare_pair(a, b, metric="acc", seed=int(rng.integers(1 << 30)))
                held += found.low - 1e-9 <= a_alone - b_alone <= found.high + 1e-9
                told += found.verdict != "none"
            print(f"{images:5} images, {a_alone:.2f} and {b_alone:.2f} alone: {held / repeats:.3f}"
                  f" {told / repeats:.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
