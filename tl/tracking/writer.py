"""Carry out the records of a run at the MLflow store, in order, and each as if once.

Whatever is repeated because an answer was lost does no harm: MLflow keys a metric by its name,
step, time and value; settings, tags and files are set, not added; a run is looked for by its job,
and a model by its record, before it is made again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .handlers import HANDLERS, found_again, model_of, set_tags
from .spool import Entry, Spool
from .store import (
    StoreError,
    TrackingError,
    experiment_id,
    is_away,
    open_store,
    patience,
    reason_of,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

MOST_METRICS = 1000  # per request, MLflow's limit
PATHS = ("path", "example")  # of a record; relative to the run's folder
HEAVY = {
    "file",
    "model",
    "text",
    "dict",
}  # what the store of files takes, which may be another server
SECONDS, MOST_SECONDS = 10, 160  # of patience with one request
ANSWER_SECONDS = 15  # with the first answer of a store; a busy one takes long, and nobody waits
BYTES_A_SECOND = 250_000  # slowest upload that is waited for


class AwayError(TrackingError):
    """The store does not answer at present; what it was asked stays in the spool."""


class LostError(TrackingError):
    """The store answers, but there is no place in it for the run, unless somebody makes one."""


class Writer:
    """Sends the records of a spool.

    Args:
        uri: Address of the store.
        spool: Where the records are, and how far the store has them.
        opened: Called when the run of a job was made or opened again, with the job, the ids of run
            and experiment, and the name of the experiment.
    """

    def __init__(
        self, uri: str, spool: Spool, opened: Callable[[str, str, str, str], None] | None = None
    ) -> None:
        self.uri = uri
        self.spool = spool
        self.sent = 0
        self.models: dict[str, str] = {}  # id of a record -> address of the model
        self.patience = float(SECONDS)  # with the request under way, seconds
        self.ended = False  # whether the last thing that was sent is how the job ended
        self.trouble = ""  # with files, while their own store is away
        self.progress = 0.0  # when the store last took something
        self._opened = opened
        self._announced = False
        self._client: MlflowClient | None = None
        self._needed = float(SECONDS)  # what this store turned out to need

    @property
    def client(self) -> MlflowClient:
        """A client of a store that has answered.

        Raises:
            AwayError: It does not.
        """
        if self._client is None:
            self._client = self._answering()
        return self._client

    def _answering(self) -> MlflowClient:
        try:
            return open_store(self.uri, ANSWER_SECONDS)
        except StoreError as error:
            kind = AwayError if error.away else LostError
            raise kind(error.reason) from error

    def send(self, *, again: bool = True) -> None:
        """Send all that waits.

        Args:
            again: Try files once more that their own store did not take before.

        Raises:
            AwayError: The store does not answer.
            LostError: The run, or its experiment, is gone.
        """
        client, taken = self.client, self.spool.taken
        if not self._announced and taken.job in taken.runs:
            self._announce(client, taken.job)
        if again:
            self._again()
        while entries := self.spool.read(taken.offset):
            for group in _groups(entries):
                if not self._carry_out(client, group):
                    taken.later.append(group[0].start)
                taken.offset = group[-1].end
                self.spool.note()

    def _again(self) -> None:
        """Try once more what the store of files did not take before."""
        taken = self.spool.taken
        for start in [*taken.later]:
            entry = self.spool.read(start)[0]
            if self._carry_out(self.client, [entry]):
                taken.later.remove(start)
                self.spool.note()

    def _carry_out(self, client: MlflowClient, group: Sequence[Entry]) -> bool:
        """Do what records of one kind say; False where it must wait, but others need not."""
        record = group[0].record
        if record is None:
            self.spool.refuse(group[0], "the line is damaged")
            return True
        kind = str(record.get("op"))
        try:
            self.patience = self._seconds_for(record)
            with patience(self.patience):
                if kind == "run":
                    self._open_run(client, record)
                elif kind == "metrics":
                    self._log_metrics(client, group)
                elif handler := HANDLERS.get(kind):
                    handler(client, self._run_id(record), self._located(record))
                else:
                    self.spool.refuse(group[0], f"unknown kind of record {kind!r}")
            if kind == "model":
                self._note_model(client, record)
        except (AwayError, LostError):
            raise
        except Exception as error:  # drivers, HTTP, files and MLflow each have their own
            return self._failed(client, group, error)
        self.sent += len(group)
        self.ended = kind == "status"
        self.progress = time.monotonic()
        return True

    def _failed(self, client: MlflowClient, group: Sequence[Entry], error: Exception) -> bool:
        """Tell a store that is away from a run that is gone, and both from a bad record."""
        reason = reason_of(error)
        record = group[0].record or {}
        self.patience = self._needed
        if is_away(error):
            self._client = None
            self._client = self._answering()
            # The store answers again, so it was this request.
            if "timeout" in reason.lower() or "timed out" in reason.lower():
                self._needed = min(2 * self._needed, MOST_SECONDS)
            if record.get("op") in HEAVY:
                self.trouble = reason
                return False
            raise AwayError(reason) from error
        if isinstance(error, StoreError):
            raise LostError(error.reason) from error
        if record.get("op") in HEAVY and isinstance(error, ImportError):
            self.trouble = reason
            return False  # a driver for the store of files, which can be installed
        self._check_run(client, record)
        if len(group) > 1:  # find the one that is bad
            half = len(group) // 2
            return self._carry_out(client, group[:half]) and self._carry_out(client, group[half:])
        self.spool.refuse(group[0], reason)
        return True

    def _check_run(self, client: MlflowClient, record: Mapping[str, Any]) -> None:
        """Refuse to go on where the run itself is gone.

        Raises:
            LostError: It was deleted, or the store has never heard of it.
        """
        run_id = record.get("run_id") or self._run_id(record)
        try:
            found = client.get_run(run_id)
        except Exception as error:
            if is_away(error):
                raise AwayError(reason_of(error)) from error
            raise LostError(f"it does not know the run {run_id}") from error
        if found.info.lifecycle_stage == "deleted":
            what = f"its run {run_id} was deleted"
            where = client.get_experiment(found.info.experiment_id)
            if where.lifecycle_stage == "deleted":
                what = f"its experiment {where.name!r} was deleted"
                raise LostError(f"{what}; mlflow experiments restore -x {where.experiment_id}")
            raise LostError(f"{what}; mlflow runs restore --run-id {run_id}")

    def _run_id(self, record: Mapping[str, Any]) -> str:
        taken = self.spool.taken
        return taken.runs.get(record.get("job") or taken.job, "")

    def _located(self, record: Mapping[str, Any]) -> dict[str, Any]:
        base = self.spool.output_dir
        places = {k: str(base / record[k]) for k in PATHS if record.get(k)}
        return {**record, **places}

    # --- the run ----------------------------------------------------------------------------

    def _open_run(self, client: MlflowClient, record: Mapping[str, Any]) -> None:
        job = record["job"]
        known = record.get("run_id") or self.spool.taken.runs.get(job)
        if known:
            self._check_run(client, record)
            client.update_run(known, status="RUNNING")
            set_tags(client, known, record["tags"])
            found_again(client, known)
        else:
            known = self._make_run(client, record)
        self.spool.taken.job = job
        self.spool.taken.runs[job] = known
        self._announce(client, job)

    def _announce(self, client: MlflowClient, job: str) -> None:
        """Say which run a job has."""
        self._announced = True
        if self._opened is None:
            return
        run_id = self.spool.taken.runs[job]
        try:
            where = client.get_experiment(client.get_run(run_id).info.experiment_id)
        except Exception as error:
            kind = AwayError if is_away(error) else LostError
            raise kind(reason_of(error)) from error
        self._opened(job, run_id, where.experiment_id, where.name)

    def _make_run(self, client: MlflowClient, record: Mapping[str, Any]) -> str:
        number = experiment_id(client, self.uri, record["experiment"])
        job, taken = record["job"], self.spool.taken
        if (job in taken.tried or record["resumed"]) and (found := _runs_of(client, number, job)):
            for twin in found[1:]:  # a store that was stopped did late what it was asked twice
                client.delete_run(twin)
            return found[0]
        taken.tried.append(job)
        self.spool.note()
        tags = {**record["tags"], **self._parent(record.get("parent"))}
        made = client.create_run(
            number, start_time=record["start"], tags=tags, run_name=record["name"]
        )
        return str(made.info.run_id)

    def _parent(self, parent: Mapping[str, Any] | None) -> dict[str, str]:
        """The tag that puts a run below another one, whose own run may not be made yet."""
        if not parent:
            return {}
        known = parent.get("run_id")
        if not known:
            try:
                above = json.loads(Path(parent["folder"], "run.json").read_text(encoding="utf-8"))
            except (OSError, ValueError):
                above = {}
            known = above.get("run_id") if above.get("job") == parent["job"] else None
        if not known:
            raise AwayError(f"the run above it, of {parent['folder']}, is not made yet")
        return {"mlflow.parentRunId": known}

    # --- what is in it ----------------------------------------------------------------------

    def _log_metrics(self, client: MlflowClient, group: Sequence[Entry]) -> None:
        from mlflow.entities import Metric

        records = [entry.record for entry in group if entry.record]
        metrics = [
            Metric(key, float(value), r["time"], r["step"])
            for r in records
            for key, value in r["values"].items()
        ]
        for i in range(0, len(metrics), MOST_METRICS):
            client.log_batch(self._run_id(records[0]), metrics=metrics[i : i + MOST_METRICS])

    def _note_model(self, client: MlflowClient, record: Mapping[str, Any]) -> None:
        if found := model_of(client, self._run_id(record), record["id"]):
            self.models[record["id"]] = f"models:/{found.model_id}"

    def _seconds_for(self, record: Mapping[str, Any]) -> float:
        """Patience with a record: by the size of what is sent."""
        paths = [self.spool.output_dir / record[k] for k in PATHS if record.get(k)]
        files = [f for p in paths for f in (p.rglob("*") if p.is_dir() else [p]) if f.is_file()]
        size: int = sum(f.stat().st_size for f in files)
        return self._needed + size / BYTES_A_SECOND


def _groups(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Neighbouring metrics of one job together, as far as one request takes them; others alone."""
    group: list[Entry] = []
    values, job = 0, None
    for entry in entries:
        record = entry.record or {}
        if record.get("op") == "metrics":
            count = len(record["values"])
            if group and (values + count > MOST_METRICS or record.get("job") != job):
                yield group
                group, values = [], 0
            group.append(entry)
            values, job = values + count, record.get("job")
            continue
        if group:
            yield group
            group, values = [], 0
        yield [entry]
    if group:
        yield group


def _runs_of(client: MlflowClient, experiment: str, job: str) -> list[str]:
    found = client.search_runs([experiment], f"tags.`tl.job` = '{job}'", order_by=["start_time"])
    return [run.info.run_id for run in found]
