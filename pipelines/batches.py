"""A batch of jobs (`tl train -m …`): all of them below one MLflow run, with a table at its end."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tl import ranks, stopping
from tl.batches import Batch, Job, Outcome, leading, read_states
from tl.config import BatchConfig, ConfigError, Interrupted, TlError, TrainConfig, validate
from tl.pipelines import loading, show_error

Composed = tuple[int, list[str], DictConfig]  # number, overrides and config of a job
LEFT_OUT = ("test/acc_", "test/map_", "test/mae_")  # of the table on the screen
MOST_NAMED = 12  # folders in a command that a person copies
# What jobs import sooner or later, the rest along with it.
ROOMS = (
    *("audit", "data", "display", "export", "finetuning", "models", "report", "runs", "tracking"),
    *("training", "pipelines.train"),
)
OTHERS = (
    *("mlflow", "mlflow.pyfunc", "mlflow.store.tracking.sqlalchemy_store", "alembic.command"),
    *("git", "onnx", "pyarrow.dataset", "sklearn.neighbors", "sklearn.decomposition"),
)


def load() -> None:
    """Import what jobs need."""
    with loading():
        for module in (*OTHERS, *(f"tl.{room}" for room in ROOMS)):
            importlib.import_module(module)


def job(settings: str, folder: Path) -> tuple[int, str]:
    """Run a job, or go on with it where its folder holds a run; the target of the workers.

    Returns:
        Its exit code, and the first line of what went wrong.
    """
    from tl.pipelines.train import train

    try:
        stopping.install()
        config = validate(DictConfig(OmegaConf.create(settings)), TrainConfig)
        begun = (folder / "config.yaml").is_file()
        setattr(config, "resume" if begun else "output_dir", str(folder))
        train(config)
    except Interrupted as stop:
        print(f"\ninterrupted{f'; {stop}' if str(stop) else ''}", file=sys.stderr)
        return 130, "interrupted"
    except Exception as error:
        return show_error(error), (str(error).strip() or type(error).__name__).split("\n")[0]
    return 0, ""


@dataclass
class Command:
    """One command `tl train -m`, of which Hydra hands over the jobs.

    Args:
        place: Folder of the batch.
        outcome: What became of the jobs.
        refused: Number, overrides and error of jobs whose settings are wrong.
    """

    place: Path
    outcome: Outcome | None = None
    refused: dict[int, tuple[str, str]] = field(default_factory=dict)

    def launch(
        self, engine: str, settings: Mapping[str, Any], composed: Sequence[Composed]
    ) -> list[float]:
        """Run the jobs; returns the headline of each on val, NaN where there is none.

        Raises:
            BatchError: Nothing was started; says why.
            EngineError: Workers cannot be started.
        """
        if (here := ranks.place()).world > 1:
            msg = (
                f"{here.launcher} started {here.world} processes, and each of them would run the "
                "batch: start it once; trainer=ddp or the launcher starts the processes of a job"
            )
            raise ConfigError(msg)
        varied = _varied([overrides for _, overrides, _ in composed])
        jobs, told = [], set[str]()
        for number, overrides, config in composed:
            shown = tuple(o for o in overrides if o.split("=")[0] in varied)
            try:
                jobs.append(Job(number, shown, _validated(config)))
            except ConfigError as error:
                if str(error) not in told:
                    show_error(error)
                told.add(str(error))
                self.refused[number] = (" ".join(shown), str(error).split("\n")[0])
        rows: list[dict[str, Any]] = []
        if jobs or not self.refused:
            first = jobs[0].config.batch if jobs else BatchConfig()
            batch = Batch(jobs, self.place, first, engine=engine, settings=settings)
            try:
                with _above(self.place, jobs[0].config, varied) as tracked:
                    try:
                        self.outcome = batch.run(f"{__name__}:job", f"{__name__}:load")
                    finally:
                        rows = _table(self.place, self.refused, tracked)
                    self._tell()
            except (JobsError, Interrupted):
                if self.outcome is None:
                    raise
        val = {row["job"]: _headline(row) for row in rows}
        return [val.get(number, float("nan")) for number, _, _ in composed]

    def _tell(self) -> None:
        """Let the run above the jobs end as they did.

        Raises:
            Interrupted: Some are left.
            JobsError: Some failed.
        """
        if self.outcome and self.outcome.stopped:
            raise Interrupted
        if wrong := self._wrong():
            raise JobsError(f"{len(wrong)} of the jobs failed")

    def _wrong(self) -> dict[int, tuple[str, str]]:
        """Number -> overrides and error of each job that failed."""
        found = self.outcome.wrong if self.outcome else []
        failed = {entry.number: (" ".join(entry.overrides), entry.error) for entry in found}
        return dict(sorted((self.refused | failed).items()))

    def end(self) -> int:
        """Say what went wrong and what is left; returns the exit code."""
        wrong = self._wrong()
        for number, (overrides, error) in wrong.items():
            print(f"job {number} failed ({overrides}): {error}", file=sys.stderr)
        if self.outcome is None:
            return 2  # no job was worth starting
        outcome = self.outcome
        if not outcome.stopped:
            return 1 if wrong else 0
        for entry in outcome.left:
            begun = "is checkpointed" if entry.attempts else "did not begin"
            print(f"job {entry.number} {begun} ({' '.join(entry.overrides)})", file=sys.stderr)
        print(f"{outcome.stopped}; the same command goes on: {self.place}", file=sys.stderr)
        return 130


class JobsError(TlError):
    """Jobs of the batch failed."""


def _validated(config: DictConfig) -> TrainConfig:
    """Config of one job, with absolute paths: workers may have another folder."""
    from tl import runs

    found = validate(config, TrainConfig)
    if found.resume:
        msg = "resume: is for a single run; the same batch again goes on with its jobs"
        raise ConfigError(msg)
    return runs.absolute(found)


def _varied(jobs: Sequence[Sequence[str]]) -> list[str]:
    """Keys whose values differ between jobs, in their order; all where none does."""
    values: dict[str, set[str]] = {}
    for key, _, value in (o.partition("=") for overrides in jobs for o in overrides):
        values.setdefault(key, set()).add(value)
    return [key for key, found in values.items() if len(found) > 1] or list(values)


@contextmanager
def _above(place: Path, config: TrainConfig, varied: Sequence[str]) -> Iterator[Any]:
    """Put all jobs below one MLflow run; another call of the same batch may keep it already."""
    if not config.tracking.enabled:
        yield None
        return
    from tl import runs, tracking

    with leading(place) as first:
        if not first:
            tracking.await_run(place)
            with tracking.above(place):
                yield None
            return
        title = f"{runs.data_name(config)} · batch over {', '.join(varied) or 'nothing'}"
        settings = replace(config.tracking, system_metrics=False, run_name=None)
        labels = {"experiment": runs.data_name(config), "run_name": title, "kind": "batch"}
        with (
            tracking.start_run(settings, **labels, output_dir=place, resume=True) as tracked,
            tracking.above(place),
        ):
            yield tracked


def _table(place: Path, refused: Mapping[int, Any], tracked: Any) -> list[dict[str, Any]]:
    """Show and log the table of a batch; returns its rows."""
    from tl import display, runs

    ended = dict.fromkeys(refused, "refused") | read_states(place)
    found = runs.sum_up_batch(runs.RunFolder(place), ended)
    if found.rows:
        shown = [{k: v for k, v in row.items() if not k.startswith(LEFT_OUT)} for row in found.rows]
        display.results_table(f"batch of {len(shown)} jobs", shown)
        done = [str(place / str(row["job"])) for row in found.rows if row["ended"] == "done"]
        places = {"table": str(place / runs.TABLE)}
        if 1 < len(done) <= MOST_NAMED:
            places["which is better"] = f"tl compare runs={','.join(done)}"
        display.facts("next", places)
    if tracked is not None:
        for key, value in found.metrics.items():
            tracked.log_metrics({key: value})
        if (place / runs.TABLE).is_file():
            tracked.log_file(place / runs.TABLE)
    return found.rows


def _headline(row: Mapping[str, Any]) -> float:
    known = [v for k, v in row.items() if k in ("val/acc", "val/map", "val/mae")]
    return float(known[0]) if known else float("nan")
