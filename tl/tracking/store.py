"""Where the records are kept: the address of the store, whether it answers, and its experiments."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import socket
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tl.config import RequestError, TlError, TrackingConfig

if TYPE_CHECKING:
    from mlflow import MlflowClient

CONNECT_SECONDS = 4
SQLITE = "sqlite:///"
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


class TrackingError(TlError):
    """The store no longer takes the records of a job."""


class StoreError(TrackingError, RequestError):
    """The store cannot be used at all; nothing was written."""

    def __init__(self, uri: str, reason: str) -> None:
        super().__init__(
            f"the MLflow store {redacted(uri)} cannot be used: {redacted(reason)}\n"
            "set tracking.uri or MLFLOW_TRACKING_URI (sqlite:///mlflow.db is a store in a file), "
            "or switch the log off with tracking.enabled=false"
        )


def default_uri(config: TrackingConfig) -> str:
    """`tracking.uri`, else MLFLOW_TRACKING_URI, else `mlflow.db` in the working directory.

    A relative sqlite path is made absolute, so that a later change of directory does not matter.
    """
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}mlflow.db"
    file = sqlite_file(uri)
    return f"{SQLITE}{file}" if file else uri


def sqlite_file(uri: str) -> Path | None:
    """Absolute path of the database of a `sqlite:///` address, None for other addresses."""
    if not uri.startswith(SQLITE):
        return None
    return Path(uri.removeprefix(SQLITE).partition("?")[0]).absolute()


def redacted(text: str) -> str:
    """`text` without the passwords of addresses such as https://user:password@host."""
    return re.sub(r"(?<=://)[^/@\s]+:[^/@\s]+@", "***@", text)


def reason_of(error: BaseException) -> str:
    """What an error says, on one line: the cause that MLflow and urllib3 wrap into a paragraph."""
    text = redacted(str(error).strip().split("\n")[0] or type(error).__name__)
    if "code 404" in text:
        return "something answers there, but it is no MLflow server"
    if isinstance(error, ModuleNotFoundError):
        return f"its driver is not installed ({text})"
    inner = re.search(r"Caused by \w+\(['\"]?(?:<?[^:]*>?: )?(.*?)['\"]?\)+$", text)
    return inner.group(1) if inner else text


@contextmanager
def mlflow_settings(uri: str, seconds: int | None = None) -> Iterator[None]:
    """Point MLflow at a store, keep its chatter off the screen, and undo both afterwards.

    MLflow writes the address into MLFLOW_TRACKING_URI, where the next job of this process would
    take it for the user's wish.

    Args:
        uri: Address of the store.
        seconds: Limit of each request; None leaves it to MLflow.
    """
    import mlflow  # noqa: F401 - sets its own level when it is imported, so it comes first

    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic")]
    levels = [logger.level for logger in loggers]
    settings = {
        "MLFLOW_TRACKING_URI": uri,
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "GIT_PYTHON_REFRESH": "quiet",  # else a machine without git gets a page of warnings
        # MLflow's own 7 retries would stop a training for minutes; a run retries at its next flush.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1" if seconds else os.environ.get(
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3"
        ),
        **({"MLFLOW_HTTP_REQUEST_TIMEOUT": str(seconds)} if seconds else {}),
    }  # fmt: skip
    with _environment(settings):
        for logger in loggers:
            logger.setLevel(
                logging.CRITICAL
            )  # tl.tracking says itself what went wrong, in one line
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def open_store(uri: str) -> MlflowClient:
    """A client of a store that answered within about ten seconds.

    Raises:
        StoreError: It does not answer, refuses, or is a kind of store that MLflow no longer has.
    """
    from mlflow import MlflowClient

    kind = urlsplit(uri).scheme
    try:
        if file := sqlite_file(uri):
            with _one_at_a_time(file), nullcontext() if file.stat().st_size else _without_syncs():
                client = MlflowClient(uri)
                client.search_experiments(max_results=1)
            return client
        if kind.partition("+")[0] in DATABASE_PORTS:
            _check_database(uri)
        elif kind in ("", "file") and os.environ.get("MLFLOW_ALLOW_FILE_STORE") != "true":
            msg = "MLflow 3 no longer keeps runs in a plain folder"
            raise OSError(msg)
        with mlflow_settings(uri, seconds=CONNECT_SECONDS):
            client = MlflowClient(uri)
            client.search_experiments(max_results=1)
        return client
    # Drivers, HTTP and MLflow each have their own exceptions; to the user all mean the same.
    except Exception as error:
        raise StoreError(uri, reason_of(error)) from error


@contextmanager
def _one_at_a_time(file: Path) -> Iterator[None]:
    """Let one process alone make the tables of a new database; others wait for it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab"):  # says at once that a path cannot be written; MLflow retries for an hour
        pass
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


@contextmanager
def _without_syncs() -> Iterator[None]:
    """Let MLflow make its tables without waiting for the disk after each of 400 steps.

    That waiting is most of the time that it takes. What a job records afterwards is synced as ever,
    and with it the tables.
    """
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    connections = []

    def relax(connection: Any, _record: object) -> None:
        connections.append((connection, connection.execute("PRAGMA synchronous").fetchone()[0]))
        connection.execute("PRAGMA synchronous = OFF")

    event.listen(Engine, "connect", relax)
    try:
        yield
    finally:
        event.remove(Engine, "connect", relax)
        for connection, level in connections:
            with suppress(sqlite3.ProgrammingError):  # some pools have closed it by now
                connection.execute(f"PRAGMA synchronous = {level}")


def _check_database(uri: str) -> None:
    """Connect once: MLflow would repeat a refused connection for an hour."""
    from sqlalchemy import create_engine

    parts = urlsplit(uri)
    port = parts.port or DATABASE_PORTS[parts.scheme.partition("+")[0]]
    socket.create_connection((parts.hostname or "localhost", port), CONNECT_SECONDS).close()
    engine = create_engine(uri)
    try:
        engine.connect().close()
    finally:
        engine.dispose()


def experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    """Id of the experiment of that name, which is made where it does not exist.

    Raises:
        StoreError: The experiment was deleted, and its name is not free yet.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=_artifacts(uri, name)))
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another job was faster
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        reason = f"its experiment {name!r} was deleted; choose another tracking.experiment"
        raise StoreError(
            uri, f"{reason} or run: mlflow experiments restore -x {found.experiment_id}"
        )
    return str(found.experiment_id)


def _artifacts(uri: str, experiment: str) -> str | None:
    """Folder for the files of an experiment: beside the database, not in the working directory."""
    file = sqlite_file(uri)
    if file is None:
        return None
    return (file.parent / "mlartifacts" / re.sub(r"[^\w.-]+", "-", experiment)).as_uri()
