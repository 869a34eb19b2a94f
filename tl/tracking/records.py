"""`run.json`: where the MLflow run of a folder is, and how it stands."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tl.files import replacing

from .store import TrackingError, reason_of, redacted

RECORD = "run.json"
PENDING = "PENDING"


def read_record(output_dir: Path) -> dict[str, Any]:
    """Content of `run.json`; empty where there is none.

    Raises:
        TrackingError: It is damaged.
    """
    path = output_dir / RECORD
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        msg = f"{path} cannot be read ({reason_of(error)}): delete it to log into a new MLflow run"
        raise TrackingError(msg) from error


class RunRecord:
    """Keeps `run.json` true while a job is under way.

    Args:
        output_dir: Folder of the job.
        job: Its id.
        uri: Address of the store.
        experiment: Name of the experiment.
        known: What the file said before, for a job that goes on.
    """

    def __init__(
        self, output_dir: Path, job: str, uri: str, experiment: str, known: Mapping[str, Any]
    ) -> None:
        self._path = output_dir / RECORD
        self._mutex = threading.Lock()
        self._begun = False
        self._values: dict[str, Any] = {
            "run_id": known.get("run_id"),
            "job": job,
            "experiment_id": known.get("experiment_id"),
            "experiment": known.get("experiment") or experiment,
            "status": PENDING,
            "tracking_uri": redacted(uri),
        }

    def begin(self, **values: Any) -> None:
        """Write it for the first time: RUNNING, or PENDING while the store has no such run."""
        self._begun = True
        self._update(**values)

    def opened(self, job: str, run_id: str, experiment_id: str, experiment: str) -> None:
        """Note the run that a job was given."""
        if job != self._values["job"]:
            return  # an earlier job in the same folder
        found = {"run_id": run_id, "experiment_id": experiment_id, "experiment": experiment}
        status = self._values["status"]
        self._update(**found, status="RUNNING" if status == PENDING else status)

    def end(self, status: str, waiting: int, usage_samples: int | None = None) -> None:
        """Note how the job ended, and how many records wait."""
        self._update(status=status, waiting=waiting, usage_samples=usage_samples)

    def _update(self, **values: Any) -> None:
        with self._mutex:
            self._values |= values
            for name in ("waiting", "usage_samples"):
                if not self._values.get(name):
                    self._values.pop(name, None)
            if self._begun:
                write_record(self._path.parent, self._values)


def write_record(output_dir: Path, values: Mapping[str, Any]) -> None:
    """Write `run.json`, whole."""
    output_dir.mkdir(parents=True, exist_ok=True)
    with replacing(output_dir / RECORD) as part:
        part.write_text(json.dumps(dict(values), indent=2) + "\n", encoding="utf-8")
