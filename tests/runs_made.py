"""Runs as `tl train` leaves them, without a training: predictions of a wanted quality."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from tl.config import Task, TrackingConfig, compose, to_yaml
from tl.evaluation import evaluate, predictions_table
from tl.tracking import start_run

CLASSES = ("ant", "bee", "wasp")


def pictures(root: Path, images: int = 200, name: str = "") -> pd.DataFrame:
    """Test images on disk, as rows of an image table; `name` makes them others."""
    rng = np.random.default_rng(0)
    (root / "test").mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(images):
        path = root / f"test/{name}{i:03d}.png"
        pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        pixels[0, 0] = len(name), i % 256, 7
        Image.fromarray(pixels).save(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        rows.append({"path": f"test/{name}{i:03d}.png", "label": i % 3, "sha256": digest})
    return pd.DataFrame(rows).assign(split="test")


def answers(
    rows: pd.DataFrame,
    quality: float,
    seed: int,
    task: Task = Task.single,
    classes: Sequence[str] = CLASSES,
) -> tuple[pd.DataFrame, dict[str, float]]:
    """Predictions and metrics of a model; the same images are hard for all models."""
    rng, hard = np.random.default_rng(100 + seed), np.random.default_rng(1).random(len(rows))
    right = hard + rng.normal(0, 0.03, len(rows)) < quality
    labels = rows["label"].to_numpy()
    marks = np.eye(len(classes))[labels]
    if task is Task.regression:
        targets = 10.0 + labels
        outputs = targets + np.where(right, 0.1, 1.0) * rng.choice([-1, 1], len(rows))
        meant: dict[str, Any] = {"task": task, "targets": targets}
        report = evaluate(outputs, targets, ["age"], "test", task=task)
        return predictions_table(rows, outputs, ["age"], **meant), report.flat()
    told = np.where(right, labels, (labels + 1) % len(classes))
    shares = np.full(marks.shape, 0.05)
    sure = rng.uniform(0.5, 0.9, len(rows))
    shares[np.arange(len(rows)), told] = sure
    if task is Task.multi:
        meant = {"task": task, "thresholds": [0.4] * len(classes)}
        report = evaluate(shares, marks, classes, "test", **meant)
        return predictions_table(rows, shares, classes, targets=marks, **meant), report.flat()
    shares = np.repeat((1 - sure)[:, None] / (len(classes) - 1), len(classes), axis=1)
    shares[np.arange(len(rows)), told] = sure
    report = evaluate(shares, labels, classes, "test")
    return predictions_table(rows, shares, classes), report.flat()


def run_folder(
    folder: Path, root: Path, table: pd.DataFrame, metrics: dict[str, float], *settings: str
) -> Path:
    """The folder of a finished run."""
    folder.mkdir(parents=True)
    config = compose("train", ["finetune=lp_ft", *settings], {"data.root": str(root)})
    (folder / "config.yaml").write_text(to_yaml(config))
    phase = {"name": "head", "trainable": ["head"], "epochs": 3}
    plan = {"method": config.finetune.method, "phases": [phase], "notes": []}
    (folder / "plan.json").write_text(json.dumps(plan))
    metrics = {**metrics, "fit_seconds": 10.0 + len(folder.name), "total_seconds": 30.0}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    history = "phase,epoch,val/acc,val/map,val/mae\nhead,1,0.5,0.5,2\nhead,2,0.7,0.6,1\nall,1,,,\n"
    (folder / "history.csv").write_text(history)
    table.to_parquet(folder / "predictions.parquet", index=False)
    return folder


def logged(folder: Path, uri: str, experiment: str = "insects", **params: Any) -> str:
    """Log a run's folder as `tl train` does; returns the run's id."""
    metrics = json.loads((folder / "metrics.json").read_text())
    config = TrackingConfig(uri=uri, system_metrics=False)
    name = f"insects · {folder.name}"
    with start_run(
        config, experiment=experiment, run_name=name, output_dir=folder, resume=False
    ) as tracked:
        tracked.log_params({"finetune.method": "lp_ft", "model.parameters": 1000, **params})
        tracked.log_results(metrics, 3, folder)
    return str(tracked.run_id)


def values(folder: Path) -> dict[str, Any]:
    """What a comparison has written."""
    return dict(json.loads((folder / "compare.json").read_text()))


class Maker:
    """Folders of runs on the same pictures.

    Args:
        place: Where they are made.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self.rows = pictures(place / "images")

    def __call__(
        self,
        name: str,
        quality: float,
        *settings: str,
        seed: int = 0,
        task: Task = Task.single,
        of: pd.DataFrame | None = None,
    ) -> Path:
        """Make one; `of` are other images."""
        table, metrics = answers(self.rows if of is None else of, quality, seed, task)
        where = self.place / "runs" / name
        return run_folder(where, self.place / "images", table, metrics, f"seed={seed}", *settings)
