"""One MLflow run per job: opened or reopened, and closed with its true status."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from tl import ranks
from tl.config import Interrupted, TlError, TrackingConfig
from tl.environment import environment

from .identity import job_of, job_tags, run_title
from .parents import GIVEN, parent_named, run_given
from .processes import process_tags, repair_runs
from .records import RECORD, RunRecord, read_record
from .sending import Sender
from .spool import Spool
from .store import (
    StoreError,
    TrackingError,
    default_uri,
    mlflow_settings,
    open_store,
    reason_of,
    redacted,
    sqlite_file,
)
from .tracked import DRAIN_SECONDS, TrackedRun
from .usage import PREFIX, UsageMonitor
from .writer import LostError, Writer

log = logging.getLogger(__name__)

START_SECONDS = 15.0  # that a store which answers may take to make the run
AWAY_SECONDS = 600.0  # a store that was away so recently does not hold up the job again
KILLED_SECONDS = 4.0  # that a user who stops a job waits for a store that takes nothing
SHOWN = 3  # runs of other jobs that were closed, and refused records, one line each

_away: dict[str, float] = {}  # address of a store -> when it last did not answer
_above: ContextVar[tuple[TrackedRun, ...]] = ContextVar("runs under way", default=())


def load(config: TrackingConfig) -> None:
    """Import what a run needs of MLflow, so that the caller chooses when; nothing if it is off."""
    if config.enabled and ranks.place().rank == 0:
        import mlflow.pyfunc

        if sqlite_file(default_uri(config)):
            import mlflow.store.tracking.sqlalchemy_store  # noqa: F401


@ranks.on_first
def check_store(config: TrackingConfig, *, resume: bool) -> None:
    """Refuse a store that can never work, before a new job writes anything.

    One that is only away now is no reason not to begin: what the job records waits for it.

    Raises:
        StoreError: Its address, its schema or its kind is wrong.
    """
    if config.enabled and not resume and ranks.place().rank == 0:
        uri = default_uri(config)
        with mlflow_settings(uri, retries=0):
            _answers(uri)


def repair(uri: str) -> list[str]:
    """Close the runs of a store whose jobs were killed; returns one line for each.

    Raises:
        StoreError: The store does not answer.
    """
    with mlflow_settings(uri):
        found = repair_runs(open_store(uri))
    return [f"closed {run.name or run.run_id} as KILLED: {run.reason}" for run in found]


@contextmanager
def start_run(
    config: TrackingConfig,
    *,
    experiment: str,
    run_name: str,
    output_dir: Path,
    resume: bool,
    kind: str = "train",
    parent: str | None = None,
) -> Iterator[TrackedRun]:
    """Run a job within its MLflow run.

    The run ends as FINISHED, as KILLED after Ctrl-C or SIGTERM, or as FAILED after an exception,
    whose first line becomes the tag `error`. `output_dir/run.json` says where the record is. Other
    processes of a distributed job than the first log nothing. While the store is away, all that is
    logged waits in `output_dir/spool`; a job within a job is its child. Where MLFLOW_RUN_ID names a
    run, as within `mlflow run`, a new job logs into that one.

    Args:
        config: Settings; `experiment` and `run_name` there come before the arguments.
        experiment: Name of the experiment.
        run_name: Name of the run, to which four digits of the job are added.
        output_dir: Folder of the job.
        resume: Go on with the run that `run.json` names, where there is one.
        kind: What kind of job it is, the tag `tl.kind`.
        parent: Id of the MLflow run above it; default: that of the job around it, else the run
            in the folder that TL_PARENT_RUN names.

    Raises:
        StoreError: The store can never work, or does not know the run that is resumed.
        TrackingError: The records can be kept neither in the folder nor in the store.
    """
    if not config.enabled or ranks.place().rank > 0:
        yield TrackedRun(None, "", output_dir)
        return
    output_dir = output_dir.absolute()
    known = read_record(output_dir) if resume else {}
    address = known.get("tracking_uri") or ""
    uri = default_uri(config) if config.uri or not address or "***@" in address else address
    with mlflow_settings(uri, retries=0), tracking_uri(uri):
        job = job_of(known)
        tags = {**job_tags(job, output_dir), "tl.kind": kind, **config.tags}
        values = {
            "experiment": config.experiment or experiment,
            "name": config.run_name or run_title(run_name, job),
            "tags": {k: redacted(str(v)) for k, v in tags.items()},
            "parent": _parent(parent),
            "run_id": known.get("run_id") or (None if known or _above.get() else run_given()),
        }
        run, record = _begin(uri, job, values, output_dir, known)
        monitor = None
        if config.system_metrics:
            monitor = UsageMonitor(run, _next_sample(run, known))
        token = _above.set((*_above.get(), run))
        try:
            with _own_run(run):
                yield run
        except BaseException as error:
            _close(run, record, monitor, _status(error), error)
            raise
        else:
            _close(run, record, monitor, "FINISHED", None)
        finally:
            _above.reset(token)


def _status(error: BaseException) -> str:
    if isinstance(error, (KeyboardInterrupt, Interrupted)):
        return "KILLED"
    if isinstance(error, SystemExit) and not error.code:
        return "FINISHED"
    return "FAILED"


@contextmanager
def tracking_uri(uri: str) -> Iterator[None]:
    """The address for MLflow's own functions, too, such as those that a callback calls."""
    import mlflow

    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)  # type: ignore[arg-type]  # back to the environment variable


@contextmanager
def _own_run(run: TrackedRun) -> Iterator[None]:
    """Let MLflow's own functions, such as those that a callback calls, log into the run."""
    import mlflow

    with environment({"MLFLOW_RUN_ID": run.run_id} if run.run_id else {}):
        try:
            yield
        finally:
            active = mlflow.active_run()
            if active is not None and active.info.run_id == run.run_id:
                with suppress(Exception):  # its true status follows
                    mlflow.end_run("RUNNING")


def _answers(uri: str) -> bool:
    """Whether a store answers now; one that did not a moment ago is not asked again.

    Raises:
        StoreError: It never will.
    """
    if time.monotonic() - _away.get(uri, -AWAY_SECONDS) < AWAY_SECONDS:
        return False
    try:
        open_store(uri)
    except StoreError as error:
        if not error.away:
            raise
        _away[uri] = time.monotonic()
        return False
    return True


def _parent(given: str | None) -> dict[str, Any] | None:
    """The run above a new one, whose own id may not be known yet."""
    import mlflow

    if given:
        return {"run_id": given}
    if above := _above.get():
        run = above[-1]
        return {"run_id": run.run_id, "job": run.job, "folder": str(run.output_dir)}
    if named := parent_named():
        return named
    active = mlflow.active_run()
    return {"run_id": active.info.run_id} if active else None


def _begin(
    uri: str, job: str, values: Mapping[str, Any], output_dir: Path, known: Mapping[str, Any]
) -> tuple[TrackedRun, RunRecord]:
    """Write down that the job begins, and have its run made, if the store answers."""
    from mlflow.tracking.context.registry import resolve_tags

    answers = _answers(uri)
    made = not output_dir.exists()
    spool = Spool(output_dir)
    before = spool.size
    record = RunRecord(output_dir, job, uri, values["experiment"], known)
    spool.append(
        {
            "op": "run",
            "job": job,
            "tracking_uri": redacted(uri),
            **values,
            "tags": {**resolve_tags(), **values["tags"], **process_tags()},
            "resumed": bool(known),
            "start": time.time_ns() // 10**6,
        }
    )
    sender = Sender(Writer(uri, spool, record.opened), then=_close_dead)
    sender.start()
    if answers and sender.attempted(START_SECONDS) and isinstance(sender.failure, LostError):
        sender.stop()
        spool.cut(before)
        spool.close(remove=before == 0)
        if made:
            with suppress(OSError):
                output_dir.rmdir()
        reason = str(sender.failure)
        if known.get("run_id"):
            reason += f"\nto log into a new run instead, delete {output_dir / RECORD}"
        elif values["run_id"]:
            reason += f"\nto log into a new run instead, unset {GIVEN}, which names that one"
        raise StoreError(uri, reason) from sender.failure
    record.begin()
    return TrackedRun(sender, uri, output_dir, job), record


def _close_dead(writer: Writer) -> None:
    """Close the runs of other jobs that were killed."""
    for run in repair_runs(writer.client)[:SHOWN]:
        log.warning("the MLflow run %s was open: %s; closed as KILLED", run.name, run.reason)


def _close(
    run: TrackedRun,
    record: RunRecord,
    monitor: UsageMonitor | None,
    status: str,
    error: BaseException | None,
) -> None:
    """Record the status and send what is left; a failure never hides the error of the job."""
    sender = run._sender
    assert sender is not None
    try:
        if monitor is not None:
            _end_monitor(monitor)
        if status == "FAILED" and error is not None:
            text = str(error).strip().split("\n")[0]
            run.log_tags({"error": f"{type(error).__name__}: {text}"})
        run.record("status", status=status, time=time.time_ns() // 10**6)
        sender.drain(KILLED_SECONDS if status == "KILLED" else DRAIN_SECONDS)
        sender.stop()
        spool = sender.spool
        spool.settle()
        waiting, refused = spool.waiting(), spool.refused()
        record.end(status, waiting, monitor.step if monitor else None)
        spool.close(remove=not waiting)
    except (TlError, OSError) as failure:
        sender.stop()
        sender.spool.close()
        message = f"the MLflow run of {run.output_dir} could not be closed: {reason_of(failure)}"
        if error is None:
            message += f"\nthe job itself is done: its results are in {run.output_dir}"
            raise TrackingError(message) from failure
        log.warning(message)
        return
    _tell(run, waiting, refused)


def _tell(run: TrackedRun, waiting: int, refused: list[str]) -> None:
    sender = run._sender
    assert sender is not None
    if waiting:
        why = sender.failure or sender.writer.trouble or "it is slow"
        log.warning(
            "%s wait in %s, as the MLflow store %s does not take them (%s); send them with: "
            "tl sync %s", counted(waiting), sender.spool.folder, redacted(run.uri), why,
            run.output_dir,
        )  # fmt: skip
    if refused:
        log.warning(
            "the MLflow store %s refused %s, kept in %s: %s", redacted(run.uri),
            counted(len(refused)), sender.spool.folder, "; ".join(refused[:SHOWN]),
        )  # fmt: skip


def counted(records: int) -> str:
    """A number of records, in words."""
    return f"{records:,} record{'' if records == 1 else 's'}"


def _end_monitor(monitor: UsageMonitor) -> None:
    try:
        monitor.end()
    except Exception as error:  # a lost sample of the processor's load is no failure of the job
        log.warning("the last system metrics were not logged: %s", reason_of(error))


def _next_sample(run: TrackedRun, known: Mapping[str, Any]) -> int:
    """Number of the first sample of system metrics: a job that goes on counts on."""
    step = int(known.get("usage_samples") or 0)
    assert run._sender is not None
    spool, offset = run._sender.spool, 0
    while known and (entries := spool.read(offset)):  # what a killed job could not count
        for entry in entries:
            values = (entry.record or {}).get("values", {})
            if entry.record and any(name.startswith(PREFIX) for name in values):
                step = max(step, int(entry.record.get("step", 0)) + 1)
        offset = entries[-1].end
    return step
