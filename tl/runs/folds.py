"""Cross-validation as a set of runs: one folder a fold, and what they amount to together."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tl import ranks
from tl.config import TrainConfig
from tl.runs.again import note_job
from tl.runs.contents import where
from tl.runs.folder import CONFIG, RunFolder, TrainResult, read_config

SUMMARY = "folds.json"
MOST_COLUMNS = 6  # folds with a column of their own on the screen
ADDED = ("images", "seconds", "epochs")  # last words of the metrics that are sums over the folds


def folds_of(config: TrainConfig) -> int | None:
    """How many folds a job asks for, or the one that it resumes; None for a run of one fold.

    Raises:
        RunError: There is no such run to resume.
    """
    data = (read_config(Path(config.resume)) if config.resume else config).data
    return data.folds if data.fold is None else None


@dataclass(frozen=True)
class Fold:
    """A run whose val is one part of the images.

    Args:
        number: From 0.
        config: Of the job that trains it, or goes on with it.
        result: What it found, where it is done.
    """

    number: int
    config: TrainConfig
    result: TrainResult | None = None


@ranks.on_first
def create_folds(folder: RunFolder, config: TrainConfig) -> None:
    """Make the folder of a new cross-validation.

    Raises:
        RunError: It cannot be written.
    """
    folder.make()
    if not folder.resumed:
        note_job(folder)
        folder.write_config(config)


def folds_params(config: TrainConfig) -> dict[str, Any]:
    """Parameters of the MLflow run above the folds; each fold's own run has all of them."""
    return {
        "data.folds": config.data.folds,
        "data.root": config.data.root,
        "model.name": config.model.name,
        "finetune.method": config.finetune.method,
        "seed": config.seed,
    }


def folds_tags(config: TrainConfig) -> dict[str, str]:
    """Tags of that run, as far as all folds share them."""
    return {
        "model.name": config.model.name,
        "tl.method": config.finetune.method,
        "seed": str(config.seed),
    }


def where_folds(
    folder: RunFolder, config: TrainConfig, run_id: str | None, uri: str
) -> dict[str, str]:
    """Where everything of a cross-validation is, and what comes after it."""
    places = where(folder, None, run_id, uri)
    del places["pictures"]
    places["metrics"] = f"{SUMMARY}, metrics.json, predictions.parquet (each image by its fold)"
    places["folds"] = f"{folder.path}/fold-*"
    places["next"] = (
        f"tl train data.root={config.data.root} … without data.folds: one model of all images, "
        "judged on test once"
    )
    return places


def each_fold(folder: RunFolder, config: TrainConfig) -> Iterator[Fold]:
    """The folds in turn: those that are done, the one that was interrupted, and new ones.

    Args:
        folder: Of the cross-validation.
        config: As `open_run` gives it; `data.folds` is set.
    """
    for number in range(config.data.folds or 0):
        path = folder.path / f"fold-{number}"
        begun = (path / CONFIG).exists()
        name = config.tracking.run_name
        tracking = replace(config.tracking, run_name=name and f"{name} · fold {number}")
        job = replace(
            config,
            data=replace(config.data, fold=number),
            tracking=tracking,
            resume=str(path) if begun else None,
            output_dir=str(path),
        )
        done = _known(folder).get(number)
        yield Fold(number, job, _result(RunFolder(path), done) if done else None)


@ranks.on_first
def note_fold(folder: RunFolder, fold: Fold, result: TrainResult) -> None:
    """Remember that a fold is done, for a cross-validation that is resumed."""
    runs = _known(folder)
    runs[fold.number] = {
        "fold": fold.number,
        "folder": result.output_dir.name,
        "method": RunFolder(result.output_dir).read_plan()["method"],
        "run_id": result.run_id,
        "bundle": str(result.bundle) if result.bundle else None,
        "trainable_parameters": result.trainable_parameters,
    }
    folder.write_json(SUMMARY, {"folds": fold.config.data.folds, "runs": [*runs.values()]})


def _known(folder: RunFolder) -> dict[int, dict[str, Any]]:
    """Number of each fold that is done -> what `note_fold` wrote of it."""
    file = folder.path / SUMMARY
    runs = json.loads(file.read_text(encoding="utf-8"))["runs"] if file.exists() else []
    return {run["fold"]: run for run in runs}


def _result(folder: RunFolder, known: Mapping[str, Any]) -> TrainResult:
    bundle = Path(known["bundle"]) if known["bundle"] else None
    metrics = folder.read_metrics()
    return TrainResult(folder.path, metrics, bundle, known["run_id"], known["trainable_parameters"])


@dataclass(frozen=True)
class FoldsSummary:
    """What the folds amount to.

    Args:
        metrics: Mean of each metric of val, its standard deviation between the folds as `…_std`;
            sums of images, seconds and epochs.
        table: One row a metric, with mean, spread and the value of each fold, or the extremes.
        runs: One row a fold.
    """

    metrics: dict[str, float]
    table: list[dict[str, Any]]
    runs: list[dict[str, Any]]


@ranks.on_first
def sum_up(folder: RunFolder, config: TrainConfig, results: Sequence[TrainResult]) -> FoldsSummary:
    """Write `folds.json`, `metrics.json` and the predictions of all images, each by its fold.

    The spread is the standard deviation between folds. It says how much a figure depends on which
    images are val; it is no error of the mean, as the folds share most of their training images.

    Args:
        folder: Of the cross-validation.
        config: Of it.
        results: One a fold, in order.
    """
    import pandas as pd

    known = [key for key in results[0].metrics if all(key in r.metrics for r in results)]
    values = {key: np.array([r.metrics[key] for r in results], float) for key in known}
    facts: dict[str, Any] = {}
    metrics: dict[str, float] = {}
    for key, numbers in values.items():
        if key.endswith(("_low", "_high")):
            continue  # limits of the figure of one fold
        if key.endswith(ADDED) and "worst_group" not in key:
            metrics[key] = float(numbers.sum())
        elif key == "trainable_parameters":
            metrics[key] = int(numbers.max())
        else:
            mean, std = float(numbers.mean()), float(numbers.std(ddof=1))
            metrics |= {key: mean, f"{key}_std": std}
            facts[key] = {"mean": mean, "std": std, "values": numbers.tolist()}
    tables = [
        pd.read_parquet(r.output_dir / "predictions.parquet").assign(fold=number)
        for number, r in enumerate(results)
    ]
    pd.concat(tables, ignore_index=True).to_parquet(
        folder.path / "predictions.parquet", index=False
    )
    runs = [*_known(folder).values()]
    folder.write_json(
        SUMMARY,
        {"folds": len(results), "seed": config.seed, "metrics": facts, "runs": runs},
    )
    folder.write_json("metrics.json", metrics)
    return FoldsSummary(metrics, [*_rows(facts)], [*_fold_rows(runs, results)])


def _rows(facts: Mapping[str, Mapping[str, Any]]) -> Iterable[dict[str, Any]]:
    for key, found in facts.items():
        values = found["values"]
        each = {f"fold {n}": v for n, v in enumerate(values)}
        if len(values) > MOST_COLUMNS:
            each = {"lowest": min(values), "highest": max(values)}
        yield {"metric": key, "mean": found["mean"], "spread": found["std"], **each}


def _fold_rows(
    runs: Sequence[Mapping[str, Any]], results: Sequence[TrainResult]
) -> Iterable[dict[str, Any]]:
    for run, result in zip(runs, results, strict=True):
        yield {
            "fold": str(run["fold"]),
            "method": run["method"],
            "val images": int(result.metrics["val/images"]),
            "epochs": int(result.metrics["epochs"]),
            "seconds": round(result.metrics["total_seconds"]),
        }
