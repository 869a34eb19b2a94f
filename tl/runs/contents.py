"""What a run says: to a person before and after it, to MLflow, and in the files of its results."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl import ranks
from tl.config import Task, TrainConfig

SUFFIXES = {"jpeg": "jpg", "tiff": "tif"}

if TYPE_CHECKING:
    import pandas as pd

    from tl.data import ImageTable
    from tl.evaluation import Report
    from tl.finetuning import Plan
    from tl.models import BuiltModel
    from tl.runs import RunFolder
    from tl.training import FitResult


def golden_images(table: ImageTable, number: int) -> list[str]:
    """Names of training images that a bundle keeps: classes in turn."""
    return [str(name) for name in _golden_rows(table, number)["path"]]


def _golden_rows(table: ImageTable, number: int) -> pd.DataFrame:
    train = table.split("train").sort_values("sha256", kind="stable")
    turn = train.groupby("label").cumcount()
    return train.assign(turn=turn).sort_values(["turn", "label"], kind="stable")[:number]


def keep_golden(folder: RunFolder, table: ImageTable, number: int) -> None:
    """Copy the images for the bundle into the run where they are not files below the data folder.

    An export does not read the table again; files it finds by their names.

    Args:
        folder: Of the run.
        table: Images.
        number: How many to keep.
    """
    from PIL import Image

    from tl.data.stores import FileStore

    if isinstance(table.store, FileStore) and table.store.root == table.root:
        return
    folder.golden.mkdir(parents=True, exist_ok=True)
    images = table.images(_golden_rows(table, number))
    for i in range(len(images)):
        contents = images.read(i)
        with Image.open(io.BytesIO(contents)) as image:
            kind = (image.format or "image").lower()
        (folder.golden / f"{i:02d}.{SUFFIXES.get(kind, kind)}").write_bytes(contents)


def keep_trained_on(folder: RunFolder, table: ImageTable) -> None:
    """Write which images a model is trained on: it can be no judge of itself on those.

    Args:
        folder: Of the run; gets `train_images.parquet`, unless nobody looked at the images.
        table: Images.
    """
    digests = table.split("train")[["sha256"]].drop_duplicates()
    if (digests["sha256"] != "").all():
        digests.to_parquet(folder.path / "train_images.parquet", index=False)


def job_facts(table: ImageTable, built: BuiltModel, plan: Plan) -> dict[str, str]:
    """What a person should know before the first epoch: data, model, preprocessing, plan."""
    left = len(table.quarantined)
    p = built.preprocessing
    return {
        "data": ", ".join(f"{len(table.split(split)):,} {split}" for split in table.counts())
        + f" images {_labelled(table)} ({table.root})",
        **({"data notes": " ".join("; ".join(table.notes).split())} if table.notes else {}),
        **({"left out": f"{left}: quarantined.csv says why"} if left else {}),
        "model": f"{built.name}, weights {built.weights.source} "
        f"(sha256 {built.weights.sha256[:12]})",
        **({"weights": "; ".join(built.weights.notes)} if built.weights.notes else {}),
        "preprocessing": f"{p.input_size[2]} x {p.input_size[1]}, {p.interpolation}, {p.crop_mode} "
        f"crop {p.crop_pct:g}, mean {_numbers(p.mean)}, std {_numbers(p.std)}",
        "plan": f"{plan.method}: " + " -> ".join(phase.name for phase in plan.phases),
        **({"processes": _processes()} if ranks.world() > 1 else {}),
        **({"plan notes": "; ".join(plan.notes)} if plan.notes else {}),
    }


def _processes() -> str:
    here = ranks.here()
    return f"{here.world} on {here.hosts} host{'s' * (here.hosts != 1)}, together for each batch"


def _labelled(table: ImageTable) -> str:
    if table.task is Task.single:
        return f"in {len(table.classes)} classes"
    if table.task is Task.multi:
        mean = float(table.targets("all").sum(axis=1).mean())
        return f"with {len(table.classes)} labels, {mean:.1f} on an image"
    targets = table.targets("train")
    low, high = (f"{value:.4g}" for value in (targets.min(), targets.max()))
    return f"with a number each, {table.classes[0]}, {low} to {high} in train"


def _numbers(values: Iterable[float]) -> str:
    return "/".join(f"{v:g}" for v in values)


def job_params(
    config: TrainConfig, table: ImageTable, built: BuiltModel, plan: Plan
) -> dict[str, Any]:
    """Flat parameters of the MLflow run: the config, and what it amounted to."""
    values: dict[str, Any] = {}

    def flatten(node: Any, path: str) -> None:
        for key, value in node.items():
            if isinstance(value, dict):
                flatten(value, f"{path}{key}.")
            elif value is not None:
                values[f"{path}{key}"] = value.name if isinstance(value, Enum) else value

    plain = asdict(config)
    # The resolved phases say more than what the config left to its defaults.
    plain["finetune"].pop("phases")
    flatten({k: v for k, v in plain.items() if k not in {"resume", "output_dir"}}, "")
    for phase in plan.phases:
        flatten({k: v for k, v in asdict(phase).items() if k != "name"}, f"phase.{phase.name}.")
    fingerprint = table.fingerprint()
    return values | {
        "model.weights_source": built.weights.source,
        "model.weights_sha256": built.weights.sha256,
        "model.parameters": sum(p.numel() for p in built.model.parameters()),
        "data.sha256": fingerprint["sha256"],
        "data.images": fingerprint["images"],
        "data.classes": len(table.classes),
        "data.task": table.task.value,
        **({"processes": ranks.world()} if ranks.world() > 1 else {}),
    }


def job_tags(config: TrainConfig, built: BuiltModel, plan: Plan) -> dict[str, str]:
    """Tags of the MLflow run by which people look for runs."""
    return {
        "model.name": config.model.name,
        "model.weights_sha256": built.weights.sha256,
        "tl.method": plan.method.removeprefix("auto: "),
        "tl.plan": ", ".join(phase.name for phase in plan.phases),
        "seed": str(config.seed),
    }


@ranks.on_first
def write_results(
    folder: RunFolder,
    fit: FitResult,
    reports: Sequence[Report],
    predictions: pd.DataFrame,
    total_seconds: float,
) -> dict[str, float]:
    """Write `metrics.json`, `predictions.parquet`, tables and `pictures/`; returns the metrics.

    With several labels an image `thresholds.json`, too.
    """
    from tl.figures import save_curves, save_report
    from tl.runs.judged import write_judged

    metrics: dict[str, float] = {}
    for report in reports:
        metrics |= report.flat()
        save_report(report, folder.pictures)
        if report.thresholds is not None:  # of val, and used on test
            chosen = dict(zip(report.classes, report.thresholds, strict=True))
            folder.write_json("thresholds.json", chosen)
    metrics |= {
        "fit_seconds": round(fit.seconds, 3),
        "total_seconds": round(total_seconds, 3),
        "trainable_parameters": fit.trainable_parameters,
        "epochs": sum(phase.epochs for phase in fit.phases),
    }
    save_curves(fit.history, folder.pictures / "learning_curves.png")
    predictions.to_parquet(folder.path / "predictions.parquet", index=False)
    fit.history.to_csv(folder.path / "history.csv", index=False)
    write_judged(folder, reports)
    folder.write_json("metrics.json", metrics)
    return metrics


def where(folder: RunFolder, bundle: Path | None, run_id: str | None, uri: str) -> dict[str, str]:
    """Where everything of a finished run is, and the next command, for the summary."""
    places = {
        "run": str(folder.path),
        **({"page": str(page)} if (page := folder.path / "report.html").is_file() else {}),
        "metrics": "metrics.json, per_class.csv, history.csv, predictions.parquet"
        + (", thresholds.json" if (folder.path / "thresholds.json").is_file() else ""),
        "pictures": str(folder.pictures),
    }
    if bundle:
        places["bundle"] = str(bundle)
        places["use it"] = f"tl predict bundle={bundle} source=IMAGE_OR_FOLDER"
    if run_id:
        places["MLflow"] = f"run {run_id}: mlflow ui --backend-store-uri {uri}"
        if uri.startswith("http"):
            places["MLflow"] = f"run {run_id} at {uri}"
    if uri and (folder.path / "spool/records.jsonl").is_file():  # as tl.tracking leaves it
        places["MLflow"] = f"not all of it is there yet: tl sync {folder.path}"
    return places
