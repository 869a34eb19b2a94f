"""What a job records of itself: each call is a line in the spool, which a thread sends."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from .dataset import dataset_inputs
from .environment import environment, main_packages
from .identity import data_tags
from .sending import Sender
from .store import TrackingError, reason_of, redacted

if TYPE_CHECKING:
    from pytorch_lightning.loggers import Logger

log = logging.getLogger(__name__)

VALUE_LENGTH, TAG_LENGTH = 6000, 8000
DRAIN_SECONDS = 15.0  # that a store may take nothing, before it is left to tl sync
PLAIN_FILES = {
    "plan.json",
    "evidence.json",
    "decision.json",
    "folds.json",
    "thresholds.json",
    "advice.html",
    "audit.json",
    "audit.html",
    "calibration.json",
    "report.html",
}  # of a run's folder, beside tables


class TrackedRun:
    """A run under way; without a sender every method does nothing.

    What is logged is in the run's folder when a call returns, and at the store some seconds later,
    or when the store is back.

    Args:
        sender: Sends the records of this job and maybe of those before it in the same folder.
        uri: Address of the store.
        output_dir: Folder of the job.
        job: Its id.
    """

    def __init__(self, sender: Sender | None, uri: str, output_dir: Path, job: str = "") -> None:
        self.uri = uri
        self.output_dir = output_dir
        self.job = job
        self._sender = sender
        self._phase = 0

    @property
    def run_id(self) -> str | None:
        """Id of the MLflow run; None where nothing is logged, or the store never answered yet."""
        return self._sender.spool.taken.runs.get(self.job) if self._sender else None

    def record(self, op: str, **values: Any) -> None:
        """Add a record to the spool.

        Args:
            op: What to do: a key of `HANDLERS` in `tl.tracking.writer`.
            values: What it needs, fit for JSON.

        Raises:
            TrackingError: A value is no JSON.
        """
        if self._sender is None:
            return
        try:
            self._sender.spool.append({"op": op, "job": self.job, **values})
        except (TypeError, ValueError) as error:
            raise self._refused(op, error) from error

    def flush(self, *, final: bool = False) -> None:
        """Send now what is there.

        Args:
            final: Wait until the store has it, or does not answer.
        """
        if self._sender is None:
            return
        self._sender.hurry()
        if final:
            self.drain()

    def drain(self, seconds: float = DRAIN_SECONDS) -> bool:
        """Wait until the store has everything; False where it takes nothing for `seconds`."""
        return self._sender is None or self._sender.drain(seconds)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record numbers; a name's characters outside MLflow's alphabet become `_`."""
        if self._sender is None or not metrics:
            return
        values = {_key(k): float(v) for k, v in metrics.items()}
        line = {"op": "metrics", "time": time.time_ns() // 10**6, "step": step or 0}
        self._sender.spool.append({**line, "values": values})

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log settings; those that a resumed run has with another value become tags `resume.*`."""
        values = {_key(k): redacted(str(v))[:VALUE_LENGTH] for k, v in params.items()}
        if values:
            self.record("params", values=values)

    def log_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags; an older value of the same name is replaced."""
        values = {_key(k): redacted(str(v))[:TAG_LENGTH] for k, v in tags.items()}
        if values:
            self.record("tags", values=values)

    def log_phase(self, facts: Mapping[str, Any], name: str) -> None:
        """Log what a phase leaves in the records as `phases/NAME.json`; mark where one begins.

        The metric `train/phase` is a staircase over the steps of the job, beside the curves of
        train.

        Args:
            facts: Plain values; those of a beginning have `first_step`, `number` and `phase`.
            name: Of the file.
        """
        self.log_dict(facts, f"phases/{name}.json")
        if "first_step" not in facts:
            return
        step, number = facts["first_step"], facts["number"]
        if number > 1:
            self.log_metrics({"train/phase": number - 1}, step=step)
        self.log_metrics({"train/phase": number}, step=step)
        self.log_tags({f"tl.phase.{number}": f"{facts['phase']}, from step {step}"})
        self._phase = number

    def log_inputs(self, datasets: Sequence[Mapping[str, Any]]) -> None:
        """Log data sets as MLflow's own, as `dataset_inputs` describes them."""
        if datasets:
            self.record("inputs", datasets=[*datasets])

    def log_text(self, text: str, name: str) -> None:
        """Log a text as file `name` (with its folder, as in `data/classes.txt`)."""
        self.record("text", text=text, name=name)

    def log_dict(self, values: Mapping[str, Any], name: str) -> None:
        """Log plain values as file `name`, .json or .yaml."""
        self.record("dict", values=dict(values), name=name)

    def log_file(self, path: Path, folder: str = "") -> None:
        """Log a file, or a folder with all that is in it, into `folder` of the run.

        Files in the job's own folder are sent from there; others are copied into the spool.

        Raises:
            TrackingError: There is no such file.
        """
        if self._sender is not None:
            self.record("file", path=self._kept(path, str(path)), folder=folder)

    def _kept(self, path: Path, what: str) -> str:
        assert self._sender is not None
        try:
            path.stat()
            return self._sender.spool.keep(path)
        except OSError as error:
            raise self._refused(what, error) from error

    def log_config(self, yaml: str) -> None:
        """Log the resolved config as config.yaml, without passwords of addresses."""
        self.log_text(redacted(yaml), "config.yaml")

    def log_environment(self) -> None:
        """Log command, revision, versions and machine; the most important ones as tags too."""
        if self._sender is None:
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
        if self._sender is None:
            return
        self.log_dict(fingerprint, "data.json")
        self.log_tags(data_tags(fingerprint))
        self.log_inputs(dataset_inputs(fingerprint))

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
        if self._phase:
            self.log_metrics({"train/phase": self._phase}, step=step)
        for path in sorted(folder.iterdir()):
            if path.suffix in {".csv", ".parquet"} or path.name in PLAIN_FILES:
                self.log_file(path)
            elif path.name == "pictures":
                self.log_file(path, "pictures")

    def log_bundle(self, bundle: Path | None, example: Path | None = None) -> str | None:
        """Log a bundle as an MLflow model.

        Args:
            bundle: Folder of the bundle; None logs nothing.
            example: An image file as the input example; None takes the bundle's own.

        Returns:
            Address of the model; None where nothing is logged, or the store does not take it now.

        Raises:
            TrackingError: There is no such bundle.
        """
        if self._sender is None or bundle is None:
            return None
        token = uuid.uuid4().hex
        paths = {"path": self._kept(Path(bundle), f"the bundle {bundle}")}
        if example is not None:
            paths["example"] = self._kept(example, str(example))
        self.record("model", id=token, **paths)
        if self._sender.failure is None:  # else the end of the job waits, and once is enough
            self.drain()
        return self._sender.writer.models.get(token)

    def loggers(self, step_offset: int) -> list[Logger]:
        """Loggers for the `Trainer` of one phase, whose steps follow those of the phases before."""
        if self._sender is None:
            return []
        from .lightning import RunLogger

        return [RunLogger(self, step_offset)]

    def _refused(self, what: str, error: BaseException) -> TrackingError:
        return TrackingError(
            f"the MLflow run of {self.output_dir} did not take {what}: {reason_of(error)}"
        )


def _key(name: str) -> str:
    """`name` within MLflow's alphabet and length."""
    return re.sub(r"[^\w./ :-]", "_", str(name))[:250]
