"""One MLflow run per job: opened or reopened, and closed with its true status."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tl.config import Interrupted, TrackingConfig

from .identity import job_of, job_tags, run_title
from .store import (
    StoreError,
    TrackingError,
    default_uri,
    experiment_id,
    mlflow_settings,
    open_store,
    reason_of,
    redacted,
    sqlite_file,
)
from .tracked import TrackedRun

log = logging.getLogger(__name__)

RECORD = "run.json"
SYSTEM_SECONDS = 5.0  # between two samples of the system metrics


def load(config: TrackingConfig) -> None:
    """Import what a run needs of MLflow, so that the caller chooses when; nothing if it is off."""
    if config.enabled and _rank() == 0:
        import mlflow.pyfunc

        if sqlite_file(default_uri(config)):
            import mlflow.store.tracking.sqlalchemy_store  # noqa: F401


def check_store(config: TrackingConfig, *, resume: bool) -> None:
    """Refuse a store that does not answer, before a new job writes anything.

    Raises:
        StoreError: It does not answer.
    """
    if config.enabled and not resume and _rank() == 0:
        uri = default_uri(config)
        with mlflow_settings(uri):
            open_store(uri)


@contextmanager
def start_run(
    config: TrackingConfig,
    *,
    experiment: str,
    run_name: str,
    output_dir: Path,
    resume: bool,
    kind: str = "train",
) -> Iterator[TrackedRun]:
    """Run a job within its MLflow run.

    The run ends as FINISHED, as KILLED after Ctrl-C or SIGTERM, or as FAILED after an exception,
    whose first line becomes the tag `error`. `output_dir/run.json` says where the record is. Other
    processes of a distributed job than the first log nothing.

    Args:
        config: Settings; `experiment` and `run_name` there come before the arguments.
        experiment: Name of the experiment.
        run_name: Name of the run, to which four digits of the job are added.
        output_dir: Folder of the job.
        resume: Go on with the run that `run.json` names, where there is one.
        kind: What kind of job it is, the tag `tl.kind`.

    Raises:
        StoreError: The store does not answer, or does not know the run that is resumed.
        TrackingError: The store does not take the last records.
    """
    if not config.enabled or _rank() > 0:
        yield TrackedRun(None, "", None, output_dir)
        return
    record = _read_record(output_dir / RECORD) if resume else {}
    known = record.get("tracking_uri", "")
    uri = default_uri(config) if config.uri or not known or "***@" in known else known
    with mlflow_settings(uri), _tracking_uri(uri):
        job = job_of(record)
        tags = {**job_tags(job, output_dir), "tl.kind": kind, **config.tags}
        name = config.run_name or run_title(run_name, job)
        run = _open(uri, tags, config.experiment or experiment, name, output_dir, record)
        monitor = _monitor(run, resumed=bool(record)) if config.system_metrics else None
        try:
            yield run
        except BaseException as error:
            _close(run, monitor, _status(error), error)
            raise
        _close(run, monitor, "FINISHED", None)


def _rank() -> int:
    ranks = (os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    return next((int(rank) for rank in ranks if rank and rank.isdigit()), 0)


def _status(error: BaseException) -> str:
    if isinstance(error, (KeyboardInterrupt, Interrupted)):
        return "KILLED"
    if isinstance(error, SystemExit) and not error.code:
        return "FINISHED"
    return "FAILED"


@contextmanager
def _tracking_uri(uri: str) -> Iterator[None]:
    """The address for MLflow's own functions, too, such as those that a callback calls."""
    import mlflow

    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)  # type: ignore[arg-type]  # back to the environment variable


def _open(
    uri: str,
    tags: Mapping[str, str],
    experiment: str,
    run_name: str,
    output_dir: Path,
    record: Mapping[str, Any],
) -> TrackedRun:
    import mlflow

    client = open_store(uri)
    nested = mlflow.active_run() is not None
    # Off: this room starts the monitor itself, with a shorter interval.
    common: dict[str, Any] = {"nested": nested, "log_system_metrics": False, "tags": tags}
    try:
        if record.get("run_id"):
            active = mlflow.start_run(run_id=record["run_id"], **common)
        else:
            number = experiment_id(client, uri, experiment)
            active = mlflow.start_run(experiment_id=number, run_name=run_name, **common)
        where = client.get_experiment(active.info.experiment_id)
    except StoreError:
        raise
    except Exception as error:
        reason = reason_of(error)
        if record.get("run_id"):
            reason += f"\nto log into a new run instead, delete {output_dir / RECORD}"
        raise StoreError(uri, reason) from error
    run = TrackedRun(client, uri, active.info.run_id, output_dir)
    found = {"experiment_id": active.info.experiment_id, "experiment": where.name}
    _write_record(run, {"run_id": run.run_id, "job": tags["tl.job"], **found, "status": "RUNNING"})
    return run


def _close(
    run: TrackedRun,
    monitor: Any,
    status: str,
    error: BaseException | None,
) -> None:
    """Write what is left and the status; a failure here never hides the error of the job."""
    failure: Exception | None = None
    try:
        if monitor is not None:
            _stop(monitor)
        if status == "FAILED" and error is not None:
            text = str(error).strip().split("\n")[0]
            run.log_tags({"error": f"{type(error).__name__}: {text}"})
        run.flush(final=True)
    except Exception as found:
        failure = found
        status = status if error is not None else "FAILED"
    try:
        _end(run, status)
        _write_record(run, {**_read_record(run.output_dir / RECORD), "status": status})
    except Exception as found:
        failure = failure or found
    if failure is None:
        return
    message = f"the MLflow run {run.run_id} could not be closed: {reason_of(failure)}"
    if error is None:
        message += f"\nthe job itself is done: its results are in {run.output_dir}"
        raise TrackingError(message) from failure
    log.warning(message)


def _end(run: TrackedRun, status: str) -> None:
    """Set the status; MLflow forgets its active run even where the store does not answer."""
    import mlflow

    active = mlflow.active_run()
    if active is not None and active.info.run_id == run.run_id:
        mlflow.end_run(status)
    else:  # a callback of the user ended the run
        assert run._client is not None
        run._client.set_terminated(run._id, status)


def _read_record(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        msg = f"{path} cannot be read ({reason_of(error)}): delete it to log into a new MLflow run"
        raise TrackingError(msg) from error


def _write_record(run: TrackedRun, record: Mapping[str, Any]) -> None:
    run.output_dir.mkdir(parents=True, exist_ok=True)
    partial = run.output_dir / f".{RECORD}.{os.getpid()}"
    values = {**record, "tracking_uri": redacted(run.uri)}
    partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    partial.replace(run.output_dir / RECORD)


def _monitor(run: TrackedRun, *, resumed: bool) -> Any:
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    kind: Any = SystemMetricsMonitor  # without types
    monitor = kind(
        run.run_id, sampling_interval=SYSTEM_SECONDS, resume_logging=resumed, tracking_uri=run.uri
    )
    monitor.start()
    return monitor


def _stop(monitor: Any) -> None:
    """End the monitor with one more sample, so that a job of a few seconds has one too."""
    try:
        monitor.finish()
        monitor.collect_metrics()
        monitor.publish_metrics(monitor.aggregate_metrics())
        monitor.mlflow_logger.flush()
    except Exception as error:  # a lost sample of the processor's load is no failure of the job
        log.warning("the last system metrics were not logged: %s", reason_of(error))
