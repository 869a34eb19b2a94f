"""The folder of a run: its name, its files, and what resuming it means."""

from __future__ import annotations

import errno
import json
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tl.config import NO_YAML, ConfigError, Interrupted, TlError, TrainConfig, to_yaml, validate
from tl.files import replacing
from tl.runs.contents import golden_images, job_facts, job_params, where, write_results

if TYPE_CHECKING:  # so that `tl train --help` loads neither torch nor pandas
    import pandas as pd

    from tl.data import ImageTable
    from tl.evaluation import Report
    from tl.finetuning import Plan
    from tl.models import BuiltModel

__all__ = [
    "RunError",
    "RunFolder",
    "TrainResult",
    "create",
    "golden_images",
    "job_facts",
    "job_params",
    "labels",
    "open_run",
    "read_config",
    "refuse_changes",
    "resumable",
    "run_name",
    "where",
    "write_results",
]

CONFIG = "config.yaml"
MOST_GOLDEN = 64  # training images that a later export may choose from
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
        try:
            with replacing(path) as part:
                part.write_text(text)
        except OSError as error:
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
            "golden": golden_images(table, MOST_GOLDEN),
        },
    )
    if len(table.quarantined):
        table.quarantined.to_csv(folder.path / "quarantined.csv", index=False)
    # Written last: a folder with a config is a run that can be resumed.
    folder.write_config(config)


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

    def row(self, split: str) -> dict[str, Any]:
        """Row of a table that compares runs: accuracy of a split with its interval, cost."""
        return {
            "accuracy": self.metrics[f"{split}/acc"],
            "95 % low": self.metrics[f"{split}/acc_low"],
            "95 % high": self.metrics[f"{split}/acc_high"],
            "seconds": round(self.metrics["fit_seconds"], 1),
            "trained parameters": self.trainable_parameters,
        }

    @property
    def weights(self) -> Path:
        """Best weights of the run, for `model.weights` of another one."""
        return self.output_dir / "checkpoints/model.safetensors"
