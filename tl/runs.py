"""The folder of a run: its name, its files, and what resuming it means."""

from __future__ import annotations

import errno
import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tl.config import NO_YAML, ConfigError, Interrupted, TlError, TrainConfig, to_yaml, validate

if TYPE_CHECKING:  # so that `tl train --help` loads neither torch nor pandas
    import pandas as pd

    from tl.data import ImageTable
    from tl.evaluation import Report
    from tl.finetuning import Plan
    from tl.models import BuiltModel
    from tl.training import FitResult

CONFIG = "config.yaml"
MODEL = "checkpoints/model.json"
# What a resumed run may do otherwise than it began: none of it changes a number.
FREE_ON_RESUME = ("resume", "output_dir")


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

    def write_report(self, report: Report, predictions: pd.DataFrame) -> None:
        """Write `metrics.json`, `predictions.parquet` and the confusion matrix of an evaluation.

        Raises:
            RunError: The folder cannot be written.
        """
        from tl.figures import save_confusion

        self.make()
        save_confusion(report, self.pictures / f"confusion_{report.split}.png")
        predictions.to_parquet(self.path / "predictions.parquet", index=False)
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

    def read_metrics(self) -> dict[str, float]:
        """Content of `metrics.json`."""
        return self._read("metrics.json")

    def _read(self, name: str) -> dict[str, Any]:
        path = self.path / name
        if not path.is_file():
            msg = f"{self.path} is no finished run: it has no {name}"
            raise RunError(msg)
        values: dict[str, Any] = json.loads(path.read_text())
        return values

    def write_json(self, name: str, values: Any) -> Path:
        """Write a JSON file in one move, so that a reader never sees half of it."""
        return self._write(name, json.dumps(values, indent=2, ensure_ascii=False) + "\n")

    def write_config(self, config: TrainConfig) -> Path:
        """Write the resolved config."""
        return self._write(CONFIG, to_yaml(config))

    def _write(self, name: str, text: str) -> Path:
        path = self.path / name
        part = path.with_name(f"{path.name}.part")
        try:
            part.write_text(text)
            part.replace(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            msg = f"cannot write {path}: {error.strerror}"
            if error.errno == errno.ENOSPC:  # the job failed, the request was right
                raise TlError(f"{msg}; free some space, then continue with resume=") from error
            raise RunError(msg) from error
        return path


def run_name(config: TrainConfig) -> str:
    """Name for people: data · model · method."""
    return f"{data_name(config)} · {config.model.name.split('.')[0]} · {config.finetune.method}"


def data_name(config: TrainConfig) -> str:
    """Name of the data folder."""
    return Path(config.data.root).resolve().name or "data"


def labels(folder: RunFolder, config: TrainConfig) -> dict[str, Any]:
    """What names a job in MLflow: arguments of `tl.tracking.start_run`."""
    return {
        "config": config.tracking,
        "experiment": data_name(config),
        "run_name": run_name(config),
        "output_dir": folder.path,
        "resume": folder.resumed,
    }


def open_run(config: TrainConfig) -> tuple[RunFolder, TrainConfig]:
    """Folder and config of a job: new ones, or those of the run that `config.resume` names.

    Nothing is written yet; see `create`.

    Raises:
        RunError: There is no run to resume, or the output folder holds another run.
    """
    if config.resume is None:
        stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
        words = re.sub(r"[^\w.-]+", "_", run_name(config).replace(" · ", "_"))
        path = Path(config.output_dir or _free(f"runs/{stamp}_{words}")).absolute()
        if (path / CONFIG).exists():
            msg = f"{path} holds a run already: resume= continues it; or choose another output_dir"
            raise RunError(msg)
        return RunFolder(path), absolute(config)
    path = Path(config.resume).absolute()
    stored = read_config(path)
    stored.resume = config.resume
    stored.output_dir = str(path)
    return RunFolder(path, resumed=True), stored


def _free(name: str) -> str:
    """The name, numbered where another run of the same second has it."""
    names = (f"{name}_{number}" if number else name for number in (0, *range(2, 1000)))
    return next(n for n in names if not Path(n).exists())


def absolute(config: TrainConfig) -> TrainConfig:
    """The config with absolute paths of data and weights, so that any folder may resume the run."""

    def full(path: str) -> str:
        given = path not in {MISSING, "hub", "none"}
        return str(Path(path).expanduser().absolute()) if given else path

    data = replace(config.data, root=full(config.data.root))
    return replace(
        config, data=data, model=replace(config.model, weights=full(config.model.weights))
    )


@contextmanager
def resumable(folder: RunFolder) -> Iterator[None]:
    """Say how to go on after Ctrl-C or SIGTERM."""
    try:
        yield
    except Interrupted as stop:
        raise Interrupted(f"continue with: tl train resume={folder.path}") from stop


def create(
    folder: RunFolder, config: TrainConfig, table: ImageTable, built: BuiltModel, plan: Plan
) -> None:
    """Make the folder of a new run: its config, its plan, and what export needs to know.

    Raises:
        RunError: The folder cannot be written.
    """
    folder.make()
    if folder.resumed:
        return
    folder.checkpoints.mkdir(exist_ok=True)
    folder.write_json("plan.json", plan.to_dict())
    folder.write_json(
        MODEL,
        {
            "name": built.name,
            "args": built.model_args,
            "classes": list(table.classes),
            "preprocessing": built.preprocessing.to_dict(),
            "weights": asdict(built.weights),
            "data": table.fingerprint(),
            "created": time.strftime("%Y-%m-%d %H:%M %Z"),
            "golden": golden_images(table, config.export.golden_images),
        },
    )
    if len(table.quarantined):
        table.quarantined.to_csv(folder.path / "quarantined.csv", index=False)
    # Written last: a folder with a config is a run that can be resumed.
    folder.write_config(config)


def golden_images(table: ImageTable, number: int) -> list[str]:
    """Paths (relative to the root) of training images that a bundle keeps: classes in turn."""
    train = table.split("train").sort_values("sha256")
    turn = train.groupby("label").cumcount()
    return [str(p) for p in train.assign(turn=turn).sort_values(["turn", "label"])["path"][:number]]


def job_facts(table: ImageTable, built: BuiltModel, plan: Plan) -> dict[str, str]:
    """What a person should know before the first epoch: data, model, preprocessing, plan."""
    counts = table.counts()
    p = built.preprocessing
    return {
        "data": ", ".join(f"{sum(c.values()):,} {split}" for split, c in counts.items())
        + f" images in {len(table.classes)} classes ({table.root})",
        **({"data notes": "; ".join(table.notes)} if table.notes else {}),
        **({"left out": f"{len(table.quarantined)} unreadable"} if len(table.quarantined) else {}),
        "model": f"{built.name}, weights {built.weights.source} "
        f"(sha256 {built.weights.sha256[:12]})",
        **({"weights": "; ".join(built.weights.notes)} if built.weights.notes else {}),
        "preprocessing": f"{p.input_size[2]} x {p.input_size[1]}, {p.interpolation}, {p.crop_mode} "
        f"crop {p.crop_pct:g}, mean {_numbers(p.mean)}, std {_numbers(p.std)}",
        "plan": f"{plan.method}: " + " -> ".join(phase.name for phase in plan.phases),
        **({"plan notes": "; ".join(plan.notes)} if plan.notes else {}),
    }


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

    plain = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(plain, dict)
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
    }


def write_results(
    folder: RunFolder,
    fit: FitResult,
    reports: Sequence[Report],
    predictions: pd.DataFrame,
    total_seconds: float,
) -> dict[str, float]:
    """Write `metrics.json`, `predictions.parquet` and `pictures/`; returns the metrics."""
    from tl.figures import save_confusion, save_curves

    metrics: dict[str, float] = {}
    for report in reports:
        metrics |= report.flat()
        save_confusion(report, folder.pictures / f"confusion_{report.split}.png")
    metrics |= {
        "fit_seconds": round(fit.seconds, 3),
        "total_seconds": round(total_seconds, 3),
        "trainable_parameters": fit.trainable_parameters,
        "epochs": sum(phase.epochs for phase in fit.phases),
    }
    save_curves(fit.history, folder.pictures / "learning_curves.png")
    predictions.to_parquet(folder.path / "predictions.parquet", index=False)
    fit.history.to_csv(folder.path / "history.csv", index=False)
    folder.write_json("metrics.json", metrics)
    return metrics


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


def refuse_changes(keys: Iterable[str], config: TrainConfig) -> None:
    """Refuse overrides that would make a resumed run another one.

    Args:
        keys: Dotted keys and groups that the user set.
        config: What they amount to; `config.resume` names the run.

    Raises:
        ConfigError: Names each key with both values.
        RunError: There is no such run.
    """
    given = OmegaConf.structured(absolute(config))
    stored = OmegaConf.structured(read_config(Path(config.resume or "")))
    problems = []
    for key in keys:
        if key in FREE_ON_RESUME:
            continue
        now, then = (OmegaConf.select(node, key) for node in (given, stored))
        if now != then:
            problems.append(f"resume: {key} was {then} when the run began, and is {now} now")
    if problems:
        problems.append("A resumed run goes on as it began: leave these out, or begin a new run.")
        raise ConfigError(problems)


def where(folder: RunFolder, bundle: Path | None, run_id: str | None, uri: str) -> dict[str, str]:
    """Where everything of a finished run is, and the next command, for the summary."""
    places = {
        "run": str(folder.path),
        "metrics": "metrics.json, history.csv, predictions.parquet",
        "pictures": str(folder.pictures),
    }
    if bundle:
        places["bundle"] = str(bundle)
        places["use it"] = f"tl predict bundle={bundle} source=IMAGE_OR_FOLDER"
    if run_id:
        places["MLflow"] = f"run {run_id}: mlflow ui --backend-store-uri {uri}"
        if uri.startswith("http"):
            places["MLflow"] = f"run {run_id} at {uri}"
    return places


@dataclass(frozen=True)
class TrainResult:
    """What `tl.train` hands back.

    Args:
        output_dir: Folder of the run.
        metrics: Content of `metrics.json`: `val/acc` in [0, 1], `fit_seconds`, …
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
    def weights(self) -> Path:
        """Best weights of the run, for `model.weights` of another one."""
        return self.output_dir / "checkpoints/model.safetensors"
