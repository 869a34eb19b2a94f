"""Files of a run, and what a finished one hands back."""

from __future__ import annotations

import errno
import json
import time
from dataclasses import asdict, dataclass
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tl import ranks
from tl.config import NO_YAML, ConfigError, Task, TlError, TrainConfig, to_yaml, validate
from tl.files import replacing
from tl.runs.contents import golden_images

if TYPE_CHECKING:
    import pandas as pd

    from tl.data import ImageTable
    from tl.evaluation import Report
    from tl.finetuning import Plan
    from tl.models import BuiltModel

CONFIG = "config.yaml"
MODEL = "checkpoints/model.json"
THRESHOLDS = "thresholds.json"
HEADLINES = {"acc": "accuracy", "map": "mAP", "mae": "mean absolute error"}
MOST_GOLDEN = 64  # training images that a later export may choose from


class RunError(TlError):
    """A run's folder cannot be written, or is not what it is said to be."""

    exit_code = 2


@dataclass(frozen=True)
class RunFolder:
    """Files of a run.

    Args:
        path: The folder.
        resumed: Whether the run was begun earlier.
    """

    path: Path
    resumed: bool = False

    @property
    def checkpoints(self) -> Path:
        """One folder a phase, and the state between phases."""
        return self.path / "checkpoints"

    @property
    def pictures(self) -> Path:
        """Confusion matrices and learning curves."""
        return self.path / "pictures"

    @property
    def bundle(self) -> Path:
        """The exported model."""
        return self.path / "bundle"

    @property
    def golden(self) -> Path:
        """Training images for the bundle, where they are no files that an export finds again."""
        return self.checkpoints / "golden"

    def write_report(self, report: Report, predictions: pd.DataFrame) -> None:
        """Write `metrics.json`, `predictions.parquet`, tables and pictures of an evaluation.

        Raises:
            RunError: The folder cannot be written.
        """
        from tl.figures import save_report
        from tl.runs.judged import write_judged

        self.make()
        save_report(report, self.pictures)
        predictions.to_parquet(self.path / "predictions.parquet", index=False)
        write_judged(self, [report])
        self.write_json("metrics.json", report.flat())

    def make(self) -> None:
        """Make the folder.

        Raises:
            RunError: It cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            msg = f"cannot make {self.path}: {error.strerror}; choose another with output_dir="
            raise RunError(msg) from error

    def read_model(self) -> dict[str, Any]:
        """What export needs beside the weights: classes, preprocessing, origin of the weights."""
        return self._read(MODEL)

    def read_plan(self) -> dict[str, Any]:
        """Method and phases."""
        return self._read("plan.json")

    def read_metrics(self) -> dict[str, float]:
        """Content of `metrics.json`."""
        return self._read("metrics.json")

    def read_thresholds(self) -> dict[str, float]:
        """Class name -> probability from which it counts as present, with several labels."""
        return self._read(THRESHOLDS)

    def read_calibration(self) -> dict[str, Any]:
        """Temperature and threshold of sure answers; empty for a run of before there were any."""
        from tl.runs.judged import CALIBRATION

        there = (self.path / CALIBRATION).is_file()
        return self._read(CALIBRATION) if there else {}

    def _read(self, name: str) -> dict[str, Any]:
        path = self.path / name
        if not path.is_file():
            msg = f"{self.path} is no finished run: it has no {name}"
            raise RunError(msg)
        values: dict[str, Any] = json.loads(path.read_text())
        return values

    def write_json(self, name: str, values: Any) -> Path:
        """Write a JSON file in one move, so that a reader never sees half of it."""
        return self.write_text(name, json.dumps(values, indent=2, ensure_ascii=False) + "\n")

    def write_config(self, config: TrainConfig) -> Path:
        """Write the resolved config."""
        return self.write_text(CONFIG, to_yaml(config))

    def write_text(self, name: str, text: str) -> Path:
        """Write a file in one move.

        Raises:
            RunError: The folder cannot be written.
            TlError: The disk is full.
        """
        path = self.path / name
        try:
            with replacing(path) as part:
                part.write_text(text, encoding="utf-8")
        except OSError as error:
            msg = f"cannot write {path}: {error.strerror}"
            if error.errno == errno.ENOSPC:  # the job failed, the request was right
                raise TlError(f"{msg}; free some space, then continue with resume=") from error
            raise RunError(msg) from error
        return path


def read_config(path: Path) -> TrainConfig:
    """Config of a run.

    Raises:
        RunError: The folder holds no run of this version of tl.
    """
    file = path / CONFIG
    if not file.is_file():
        msg = f"{path} is no run: it has no {CONFIG}"
        raise RunError(msg)
    try:
        return validate(DictConfig(OmegaConf.create(file.read_text())), TrainConfig)
    except (*NO_YAML, OSError) as error:
        msg = f"{file} cannot be read ({' '.join(str(error).split())})"
        raise RunError(msg) from error
    except (ConfigError, OmegaConfBaseException) as error:
        reason = str(error).split("\n    full_key:")[0]
        msg = f"{file} does not fit this version of tl:\n{reason}"
        raise RunError(msg) from error


def run_name(config: TrainConfig, method: str | None = None) -> str:
    """Name for people: data · model · method, by default that of the config, · fold."""
    used = method or config.finetune.method
    name = f"{data_name(config)} · {config.model.name.split('.')[0]} · {used}"
    return name if config.data.fold is None else f"{name} · fold {config.data.fold}"


def data_name(config: TrainConfig) -> str:
    """Name of the data folder."""
    return Path(config.data.root).resolve().name or "data"


@ranks.on_first
def write_model(folder: RunFolder, table: ImageTable, built: BuiltModel, plan: Plan) -> None:
    """Write the plan, and what export needs to know of the model."""
    folder.write_json("plan.json", plan.to_dict())
    folder.write_json(
        MODEL,
        {
            "name": built.name,
            "args": built.model_args,
            "head": built.head,
            "task": table.task.value,
            **_target(table),
            "classes": list(table.classes),
            "preprocessing": built.preprocessing.to_dict(),
            "weights": asdict(built.weights),
            "data": table.fingerprint(),
            "created": time.strftime("%Y-%m-%d %H:%M %Z"),
            "golden": golden_images(table, MOST_GOLDEN),
        },
    )


def _target(table: ImageTable) -> dict[str, Any]:
    """What a network says of a number is in units of these."""
    if table.task is not Task.regression:
        return {}
    mean, std = table.target_scale()
    return {"target": {"name": table.classes[0], "mean": mean, "std": std}}


@dataclass(frozen=True)
class TrainResult:
    """What `tl.train` hands back.

    Args:
        output_dir: Folder of the run.
        metrics: Content of `metrics.json`: `val/acc` (or `val/map`, `val/mae`), `fit_seconds`, …
        bundle: The sealed model, or None with `export.enabled=false`.
        run_id: MLflow run, or None with `tracking.enabled=false`.
        trainable_parameters: Most parameters that a phase trained.
    """

    output_dir: Path
    metrics: dict[str, float]
    bundle: Path | None
    run_id: str | None
    trainable_parameters: int

    @property
    def headline(self) -> float:
        """Of val: `val/acc`, `val/map` or `val/mae`."""
        keys = (f"val/{name}" for name in HEADLINES)
        return next(self.metrics[key] for key in keys if key in self.metrics)

    def row(self, split: str) -> dict[str, Any]:
        """Row of a table that compares runs: headline of a split with its interval, cost.

        A mean over folds has no interval: NaN.
        """
        key = next(name for name in HEADLINES if f"{split}/{name}" in self.metrics)
        return {
            HEADLINES[key]: self.metrics[f"{split}/{key}"],
            "95 % low": self.metrics.get(f"{split}/{key}_low", nan),
            "95 % high": self.metrics.get(f"{split}/{key}_high", nan),
            "seconds": round(self.metrics["fit_seconds"], 1),
            "trained parameters": self.trainable_parameters,
        }

    @property
    def weights(self) -> Path:
        """Best weights of the run, for `model.weights` of another one."""
        return self.output_dir / "checkpoints/model.safetensors"
