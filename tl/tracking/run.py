"""One MLflow run per job: opened or reopened, filled in batches, closed with its true status."""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl.config import Interrupted, TrackingConfig

from .environment import environment, main_packages
from .model import log_bundle
from .store import (
    StoreError,
    TrackingError,
    default_uri,
    experiment_id,
    first_line,
    mlflow_settings,
    open_store,
    redacted,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric
    from pytorch_lightning.loggers import Logger

log = logging.getLogger(__name__)

RECORD = "run.json"
FLUSH_METRICS = 500  # queued metrics that are written at once
FLUSH_SECONDS = 5.0  # or as soon as the oldest is that old
RETRY_SECONDS = 60.0  # after a failed write
SYSTEM_SECONDS = 5.0  # between two samples of the system metrics
MOST_METRICS, MOST_PARAMS = 1000, 100  # per request, MLflow's limits
VALUE_LENGTH, TAG_LENGTH = 6000, 8000


class TrackedRun:
    """A run under way; with `run_id` None every method does nothing.

    Metrics are queued and written in batches. While a store is down they stay queued and the
    training goes on; only the end of the job, or a file that is not taken, raises.
    """

    def __init__(
        self, client: MlflowClient | None, uri: str, run_id: str | None, output_dir: Path
    ) -> None:
        self.uri = uri
        self.run_id = run_id
        self._id = run_id or ""
        self.output_dir = output_dir
        self._client = client
        self._queue: list[Metric] = []
        self._lock = threading.RLock()
        self._next_flush = 0.0
        self._known_params: dict[str, str] | None = None

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Queue numbers; a name's characters outside MLflow's alphabet become `_`."""
        if self._client is None:
            return
        from mlflow.entities import Metric

        now = time.time()
        entities = [
            Metric(_key(k), float(v), int(1000 * now), step or 0) for k, v in metrics.items()
        ]
        with self._lock:
            if not self._queue:
                self._next_flush = max(self._next_flush, time.monotonic() + FLUSH_SECONDS)
            self._queue += entities
            if len(self._queue) >= FLUSH_METRICS or time.monotonic() >= self._next_flush:
                self.flush()

    def flush(self, *, final: bool = False) -> None:
        """Write what is queued.

        Args:
            final: Raise where the store does not take it, instead of trying again later.

        Raises:
            TrackingError: The store does not take it, and `final` is set.
        """
        with self._lock:
            if not final and self._down():
                return
            try:
                while self._queue and self._client is not None:
                    self._client.log_batch(self._id, metrics=self._queue[:MOST_METRICS])
                    del self._queue[:MOST_METRICS]
            except Exception as error:
                if final:
                    raise self._refused(f"{len(self._queue):,} metrics", error) from error
                self._next_flush = time.monotonic() + RETRY_SECONDS
                log.warning(
                    "the MLflow store %s does not answer (%s); %s metrics wait, next try in %.0f s",
                    redacted(self.uri), first_line(error), f"{len(self._queue):,}", RETRY_SECONDS,
                )  # fmt: skip

    def _down(self) -> bool:
        """Whether the last write failed less than a minute ago."""
        return self._next_flush > time.monotonic() + FLUSH_SECONDS

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log settings; those that a resumed run has with another value become tags `resume.*`."""
        if self._client is None:
            return
        from mlflow.entities import Param

        if self._known_params is None:
            self._known_params = dict(self._client.get_run(self._id).data.params)
        wanted = {_key(k): redacted(str(v))[:VALUE_LENGTH] for k, v in params.items()}
        new = [Param(k, v) for k, v in wanted.items() if k not in self._known_params]
        changed = {k: v for k, v in wanted.items() if self._known_params.get(k, v) != v}
        with self._asking("the settings"):
            for i in range(0, len(new), MOST_PARAMS):
                self._client.log_batch(self._id, params=new[i : i + MOST_PARAMS])
        self._known_params.update({p.key: p.value for p in new})
        self.log_tags({f"resume.{k}": v for k, v in changed.items()})

    def log_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags; an older value of the same name is replaced."""
        if self._client is None:
            return
        from mlflow.entities import RunTag

        entities = [RunTag(_key(k), redacted(str(v))[:TAG_LENGTH]) for k, v in tags.items()]
        with self._asking("the tags"):
            for i in range(0, len(entities), MOST_PARAMS):
                self._client.log_batch(self._id, tags=entities[i : i + MOST_PARAMS])

    def log_text(self, text: str, name: str) -> None:
        """Log a text as file `name` (with its folder, as in `data/classes.txt`)."""
        if self._client is not None:
            with self._asking(name):
                self._client.log_text(self._id, text, name)

    def log_dict(self, values: Mapping[str, Any], name: str) -> None:
        """Log plain values as file `name`, .json or .yaml."""
        if self._client is not None:
            with self._asking(name):
                self._client.log_dict(self._id, dict(values), name)

    def log_file(self, path: Path, folder: str = "") -> None:
        """Log a file, or a folder with all that is in it, into `folder` of the run."""
        if self._client is not None:
            with self._asking(str(path)):
                log_it = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
                log_it(self._id, str(path), folder or None)

    def log_config(self, yaml: str) -> None:
        """Log the resolved config as config.yaml, without passwords of addresses."""
        self.log_text(redacted(yaml), "config.yaml")

    def log_environment(self) -> None:
        """Log command, revision, versions and machine; the most important ones as tags too."""
        if self._client is None:
            return
        values = environment()
        self.log_dict(values, "environment.json")
        git = values["git"] or {"commit": "unknown", "dirty": "unknown"}
        tags = {"git.commit": git["commit"], "git.dirty": git["dirty"]}
        if values["git"]:
            tags["mlflow.source.git.commit"] = git["commit"]
        tags |= {f"version.{k}": v for k, v in main_packages(values["packages"]).items()}
        tags |= {"version.python": values["python"], "device": ", ".join(values["devices"])}
        self.log_tags({**tags, "command": values["command"]})

    def log_dataset(self, fingerprint: Mapping[str, Any]) -> None:
        """Log what the data was: counts and hash as tags, the whole as data.json."""
        if self._client is None:
            return
        self.log_dict(fingerprint, "data.json")
        tags = {"images": fingerprint.get("images"), "sha256": fingerprint.get("sha256")}
        tags["classes"] = len(fingerprint.get("classes", ()))
        self.log_tags({f"data.{k}": v for k, v in tags.items() if v is not None})

    def log_bundle(self, bundle: Path, example: Path) -> str | None:
        """Log a bundle as an MLflow model; returns its address, None where nothing is logged."""
        if self._client is None:
            return None
        with self._asking("the bundle"):
            return log_bundle(Path(bundle), Path(example))

    def loggers(self, step_offset: int) -> list[Logger]:
        """Loggers for the `Trainer` of one phase, whose steps follow those of the phases before."""
        if self._client is None:
            return []
        from .lightning import RunLogger

        return [RunLogger(self, step_offset)]

    def _refused(self, what: str, error: BaseException) -> TrackingError:
        return TrackingError(
            f"the MLflow store {redacted(self.uri)} did not take {what}: {first_line(error)}"
        )

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # drivers, HTTP, files and MLflow each have their own
            raise self._refused(what, error) from error


def _key(name: str) -> str:
    """`name` within MLflow's alphabet and length."""
    return re.sub(r"[^\w./ :-]", "_", str(name))[:250]


# --- opening and closing ------------------------------------------------------------------------


@contextmanager
def start_run(
    config: TrackingConfig, *, experiment: str, run_name: str, output_dir: Path, resume: bool
) -> Iterator[TrackedRun]:
    """Run a job within its MLflow run.

    The run ends as FINISHED, as KILLED after Ctrl-C or SIGTERM, or as FAILED after an exception,
    whose first line becomes the tag `error`. `output_dir/run.json` says where the record is. Other
    processes of a distributed job than the first log nothing.

    Args:
        config: Settings; `experiment` and `run_name` there come before the arguments.
        experiment: Name of the experiment.
        run_name: Name of the run.
        output_dir: Folder of the job.
        resume: Go on with the run that `run.json` names, where there is one.

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
        run = _open(uri, config, experiment, run_name, output_dir, record)
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
    config: TrackingConfig,
    experiment: str,
    run_name: str,
    output_dir: Path,
    record: Mapping[str, Any],
) -> TrackedRun:
    import mlflow

    client = open_store(uri)
    nested = mlflow.active_run() is not None
    # Off: this room starts the monitor itself, with a shorter interval.
    common: dict[str, Any] = {"nested": nested, "log_system_metrics": False, "tags": config.tags}
    try:
        if record.get("run_id"):
            active = mlflow.start_run(run_id=record["run_id"], **common)
        else:
            number = experiment_id(client, uri, config.experiment or experiment)
            name = config.run_name or run_name
            active = mlflow.start_run(experiment_id=number, run_name=name, **common)
        where = client.get_experiment(active.info.experiment_id)
    except StoreError:
        raise
    except Exception as error:
        reason = first_line(error)
        if record.get("run_id"):
            reason += f"\nto log into a new run instead, delete {output_dir / RECORD}"
        raise StoreError(uri, reason) from error
    run = TrackedRun(client, uri, active.info.run_id, output_dir)
    found = {"experiment_id": active.info.experiment_id, "experiment": where.name}
    _write_record(run, {"run_id": run.run_id, **found, "status": "RUNNING"})
    return run


def _close(
    run: TrackedRun,
    monitor: Any,
    status: str,
    error: BaseException | None,
) -> None:
    """Write what is left and the status; a failure here never hides the error of the job."""
    import mlflow

    try:
        if monitor is not None:
            _stop(monitor)
        if status == "FAILED" and error is not None:
            run.log_tags({"error": f"{type(error).__name__}: {first_line(error)}"})
        run.flush(final=True)
        active = mlflow.active_run()
        if active is not None and active.info.run_id == run.run_id:
            mlflow.end_run(status)
        else:  # a callback of the user ended the run
            assert run._client is not None
            run._client.set_terminated(run._id, status)
        _write_record(run, {**_read_record(run.output_dir / RECORD), "status": status})
    except Exception as failure:
        message = f"the MLflow run {run.run_id} could not be closed: {first_line(failure)}"
        if error is None:
            raise TrackingError(message) from failure
        log.warning(message)


def _read_record(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        msg = f"{path} cannot be read ({first_line(error)}): delete it to log into a new MLflow run"
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
    monitor.finish()
    monitor.collect_metrics()
    monitor.publish_metrics(monitor.aggregate_metrics())
    monitor.mlflow_logger.flush()
