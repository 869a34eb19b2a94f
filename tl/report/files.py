"""What the folder of a finished run holds, read when it is asked for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tl.advice import brief
from tl.config import Task, TrainConfig
from tl.data import ImageTable
from tl.decision import Decision
from tl.decision.evidence import Evidence
from tl.evaluation import headline
from tl.runs import RunError, read_config, run_name
from tl.sections import Section

METRICS, PREDICTIONS, HISTORY = "metrics.json", "predictions.parquet", "history.csv"
PER_CLASS, GROUPS, CALIBRATION = "per_class.csv", "groups.csv", "calibration.json"
MODEL, PROGRESS = "checkpoints/model.json", "checkpoints/progress.json"
RECORD, JOB_DIGITS = "run.json", 4  # so many as in the name of the MLflow run
SPLITS = ("test", "val")  # the first that there is speaks for the model


@dataclass(frozen=True)
class Judged:
    """What the model said of the images of a split.

    Args:
        split: `test` or `val`.
        task: What the images are labelled with.
        classes: Names; for regression that of the number.
        rows: Of `predictions.parquet`, without the probabilities.
        outputs: Probabilities (N, C), or numbers (N,).
        truth: Class indices (N,), marks (N, C) as bool, or numbers (N,).
    """

    split: str
    task: Task
    classes: tuple[str, ...]
    rows: pd.DataFrame
    outputs: NDArray[np.floating]
    truth: NDArray[Any]

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def of(cls, table: pd.DataFrame, split: str, task: Task, classes: tuple[str, ...]) -> Judged:
        """From the table of all predictions."""
        rows = table[table["split"].astype(str) == split].reset_index(drop=True)
        if task is Task.regression:
            numbers = [rows[name].to_numpy(np.float64) for name in ("predicted", "target")]
            return cls(split, task, classes, rows, *numbers)
        shares = [f"p_{name}" for name in classes]
        outputs, rows = rows[shares].to_numpy(np.float32), rows.drop(columns=shares)
        place = {name: index for index, name in enumerate(classes)}
        if task is Task.single:
            truth = rows["label"].map(place).to_numpy(np.int64)
            return cls(split, task, classes, rows, outputs, truth)
        marks = np.zeros(outputs.shape, bool)
        for row, names in enumerate(rows["labels"]):
            marks[row, [place[name] for name in names]] = True
        return cls(split, task, classes, rows, outputs, marks)


def titled(name: str, path: Path) -> str:
    """A name with the digits that tell the job from its likes, where `run.json` has them."""
    try:
        job = str(read_json(path / RECORD).get("job", ""))
    except RunError:  # it has its name all the same
        job = ""
    return f"{name} · {job[:JOB_DIGITS]}" if job else name


def read_json(file: Path) -> dict[str, Any]:
    """Values of a JSON file; empty where there is none.

    Raises:
        RunError: It cannot be read.
    """
    if not file.is_file():
        return {}
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{file} cannot be read ({' '.join(str(error).split())})") from error
    return values


class RunFiles:
    """The files of a run; what is not there is None or empty.

    Args:
        path: Folder.
        table: The images, where they are at hand: small pictures come from it.

    Raises:
        RunError: It is no run, or none that is finished; or its figures cannot be read.
    """

    def __init__(self, path: Path, table: ImageTable | None = None) -> None:
        self.path = path
        self.table = table
        self.config: TrainConfig = read_config(path)
        if not self.metrics:
            msg = (
                f"{path} is no finished run: it has no {METRICS}; "
                f"tl train resume={path} goes on with it"
            )
            raise RunError(msg)

    def has(self, name: str) -> bool:
        """Whether there is such a file or folder."""
        return (self.path / name).exists()

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file; empty where there is none. A `RunError` where it cannot be read."""
        return read_json(self.path / name)

    def csv(self, name: str) -> pd.DataFrame:
        """A table; a class or group may be called `NA` or `007`, and stays so."""
        names = dict.fromkeys(("class", "group"), str)
        path = self.path / name
        return pd.read_csv(path, dtype=names, keep_default_na=False, na_values=[""])

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Of `metrics.json`."""
        return self.json(METRICS)

    @cached_property
    def model(self) -> dict[str, Any]:
        """What export needs: classes, preprocessing, weights, the data's fingerprint."""
        return self.json(MODEL)

    @cached_property
    def plan(self) -> dict[str, Any]:
        """Method and phases."""
        return self.json("plan.json")

    @cached_property
    def done(self) -> list[dict[str, Any]]:
        """What came of each phase."""
        return cast(list[dict[str, Any]], self.json(PROGRESS).get("phases", []))

    @cached_property
    def bundle(self) -> dict[str, Any]:
        """Facts of the sealed model."""
        return self.json("bundle/bundle.json")

    @cached_property
    def task(self) -> Task:
        """What the images are labelled with."""
        return Task(self.model.get("task", "single"))

    @property
    def classes(self) -> tuple[str, ...]:
        """Names; for regression that of the number."""
        return tuple(self.model.get("classes", ()))

    @property
    def headline(self) -> str:
        """`acc`, `map` or `mae`."""
        return headline(self.task)

    @cached_property
    def method(self) -> str:
        """How was transferred, without a word on who chose it."""
        return str(self.plan.get("method", self.config.finetune.method)).removeprefix("auto: ")

    @cached_property
    def name(self) -> str:
        """As the MLflow run: data · model · method · four digits of the job."""
        name = self.config.tracking.run_name
        return name or titled(run_name(self.config, self.method), self.path)

    @cached_property
    def split(self) -> str:
        """The split that speaks for the model: test where there is one."""
        return next(s for s in SPLITS if f"{s}/images" in self.metrics)

    @cached_property
    def history(self) -> pd.DataFrame | None:
        """One row an epoch."""
        return pd.read_csv(self.path / HISTORY) if self.has(HISTORY) else None

    @cached_property
    def judged(self) -> dict[str, Judged]:
        """Split -> what the model said, the one that speaks for it first."""
        if not self.has(PREDICTIONS):
            return {}
        table = pd.read_parquet(self.path / PREDICTIONS)
        there = set(table["split"].astype(str))
        return {s: Judged.of(table, s, self.task, self.classes) for s in SPLITS if s in there}

    @cached_property
    def evidence(self) -> Evidence | None:
        """What was measured, with `finetune=auto`."""
        values = self.json("evidence.json")
        return Evidence.from_dict(values) if values else None

    @cached_property
    def decision(self) -> Decision | None:
        """What was decided, with `finetune=auto`."""
        values = {k: v for k, v in self.json("decision.json").items() if k != "confirmed"}
        return Decision.from_dict(values) if values else None

    def reasons(self) -> tuple[Section, ...]:
        """Evidence and decision as people read them."""
        if self.evidence is None or self.decision is None:
            return ()
        parts = brief(self.evidence, self.decision)
        if confirmed := self.json("decision.json").get("confirmed"):
            row = {"text": f"kept: {confirmed[confirmed['kept']]}; {confirmed['why']}"}
            parts = (*parts, Section("choice and neighbour compared", "list", (row,)))
        return parts
