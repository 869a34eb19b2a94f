"""What a job writes into its run, in batches, also while the store is away for a time."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from .environment import environment, main_packages
from .identity import data_tags
from .model import log_bundle
from .store import TrackingError, reason_of, redacted

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric
    from pytorch_lightning.loggers import Logger

log = logging.getLogger(__name__)

FLUSH_METRICS = 500  # queued metrics that are written at once
FLUSH_SECONDS = 5.0  # or as soon as the oldest is that old
RETRY_SECONDS = 60.0  # after a failed write
MOST_METRICS, MOST_PARAMS = 1000, 100  # per request, MLflow's limits
VALUE_LENGTH, TAG_LENGTH = 6000, 8000
PLAIN_FILES = {
    "plan.json",
    "evidence.json",
    "decision.json",
    "folds.json",
    "thresholds.json",
    "advice.html",
    "audit.json",
    "audit.html",
}  # of a run's folder, beside tables


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
                    redacted(self.uri), reason_of(error), f"{len(self._queue):,}", RETRY_SECONDS,
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
        self.log_tags(data_tags(fingerprint))

    def log_job(
        self,
        params: Mapping[str, Any],
        yaml: str,
        fingerprint: Mapping[str, Any],
        evidence: Mapping[str, float] = MappingProxyType({}),
        tags: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Log what a job is before it begins: parameters, config, data, environment.

        Args:
            params: Flat settings.
            yaml: The config.
            fingerprint: Of the data.
            evidence: What was measured before; becomes metrics.
            tags: What the job is, and what was decided.
        """
        self.log_params(params)
        self.log_metrics(evidence)
        self.log_tags(tags)
        self.log_config(yaml)
        self.log_dataset(fingerprint)
        self.log_environment()

    def log_results(self, metrics: Mapping[str, float], step: int, folder: Path) -> None:
        """Log what a job found.

        Args:
            metrics: Those of `metrics.json`.
            step: Optimizer steps of the whole job, so that these are the last values of the run.
            folder: The run's folder, with its pictures and tables.
        """
        self.log_metrics(metrics, step=step)
        for path in sorted(folder.iterdir()):
            if path.suffix in {".csv", ".parquet"} or path.name in PLAIN_FILES:
                self.log_file(path)
            elif path.name == "pictures":
                self.log_file(path, "pictures")

    def log_bundle(self, bundle: Path | None, example: Path | None = None) -> str | None:
        """Log a bundle as an MLflow model; returns its address, None where nothing is logged.

        Args:
            bundle: Folder of the bundle; None logs nothing.
            example: An image file as the input example; None takes the bundle's own.
        """
        if self._client is None or bundle is None:
            return None
        with self._asking("the bundle"):
            return log_bundle(Path(bundle), example)

    def loggers(self, step_offset: int) -> list[Logger]:
        """Loggers for the `Trainer` of one phase, whose steps follow those of the phases before."""
        if self._client is None:
            return []
        from .lightning import RunLogger

        return [RunLogger(self, step_offset)]

    def _refused(self, what: str, error: BaseException) -> TrackingError:
        return TrackingError(
            f"the MLflow store {redacted(self.uri)} did not take {what}: {reason_of(error)}"
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
