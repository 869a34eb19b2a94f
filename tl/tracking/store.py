"""Where the records are kept: the address of the store, whether it answers, and its experiments."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import socket
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tl.config import RequestError, TlError, TrackingConfig
from tl.environment import environment

from .schema import trouble, version_of_engine, version_of_file

if TYPE_CHECKING:
    from mlflow import MlflowClient

CONNECT_SECONDS = 3
SQLITE = "sqlite:///"
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
TIMEOUT, RETRIES = "MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
# What a store answers to a request that it will never take.
REFUSALS = {
    *("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS"),
    *("ALREADY_EXISTS", "INVALID_STATE", "NOT_IMPLEMENTED"),
}
NO_MLFLOW = {"ENDPOINT_NOT_FOUND", "NOT_FOUND"}
TEMPORARY = {401, 403, 404, 408, 425, 429}  # a new token, or the server behind a proxy, may help
NO_ROUTE = {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN}
# What no waiting changes: another schema, another kind of file, an account that is not there.
NEVER = (
    "database schema|locate revision|not a database|unable to open|readonly|attempt to write|"
    "No connection adapters|Invalid URL"
)
NO_ACCOUNT = "authentication failed|password|does not exist"


class TrackingError(TlError):
    """The store no longer takes the records of a job."""


class StoreError(TrackingError, RequestError):
    """The store cannot be used at all; nothing was written."""

    def __init__(self, uri: str, reason: str, *, away: bool = False) -> None:
        self.reason = redacted(reason)
        self.away = away  # it may answer later
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
    text = re.sub(r"^\([\w.]+\) ", "", text)  # the driver's own name of the error
    if "code 404" in text:
        return "something answers there, but it is no MLflow server"
    if isinstance(error, ModuleNotFoundError):
        return f"its driver is not installed ({text})"
    inner = re.search(r"Caused by \w+\(['\"]?(?:<?[^:]*>?: )?(.*?)['\"]?\)+$", text)
    return inner.group(1) if inner else text


@contextmanager
def mlflow_settings(uri: str, seconds: int | None = None, retries: int = 3) -> Iterator[None]:
    """Point MLflow at a store, keep its chatter off the screen, and undo both afterwards.

    MLflow writes the address into MLFLOW_TRACKING_URI, where the next job of this process would
    take it for the user's wish.

    Args:
        uri: Address of the store.
        seconds: Limit of each request; None leaves it to MLflow.
        retries: Of each request, unless the user has set MLflow's own variable. MLflow's 7 take
            minutes; a job needs none, as what fails is repeated from its spool.
    """
    import mlflow  # noqa: F401 - sets its own level when it is imported, so it comes first

    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic")]
    levels = [logger.level for logger in loggers]
    settings = {
        "MLFLOW_TRACKING_URI": uri,
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "GIT_PYTHON_REFRESH": "quiet",  # else a machine without git gets a page of warnings
        RETRIES: os.environ.get(RETRIES, str(retries)),
    }
    with environment(settings), patience(seconds):
        for logger in loggers:
            logger.setLevel(
                logging.CRITICAL
            )  # tl.tracking says itself what went wrong, in one line
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


class _Limits:
    """MLflow's limit of a request is a variable of the process; threads need different ones."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._wanted: dict[object, float] = {}

    def add(self, key: object, seconds: float) -> None:
        with self._mutex:
            if self._wanted or TIMEOUT not in os.environ:  # else the user has said it
                self._wanted[key] = seconds
                self._set()

    def remove(self, key: object) -> None:
        with self._mutex:
            if self._wanted.pop(key, None) is not None:
                self._set()

    def _set(self) -> None:
        if self._wanted:
            os.environ[TIMEOUT] = str(ceil(max(self._wanted.values())))
        else:
            os.environ.pop(TIMEOUT, None)


_limits = _Limits()


@contextmanager
def patience(seconds: float | None) -> Iterator[None]:
    """Limit how long MLflow waits for an answer, unless the user has set MLflow's own variable.

    Where several threads ask at once, the longest limit counts for all.
    """
    key = object()
    if seconds is not None:
        _limits.add(key, seconds)
    try:
        yield
    finally:
        _limits.remove(key)


def is_away(error: BaseException) -> bool:
    """Whether a store that answers so may take it later: it is down, slow, or refuses a token.

    False for what is wrong with the request itself.
    """
    from mlflow.exceptions import MlflowException

    if isinstance(error, StoreError):
        return error.away
    if isinstance(error, MlflowException):
        text = str(error)
        if error.error_code == "BAD_REQUEST":  # how MLflow hands on trouble of its database, too
            return not re.search("IntegrityError|DataError", text)
        return error.error_code not in REFUSALS
    if isinstance(error, ImportError | ValueError | TypeError | LookupError):
        return False
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status is None or status >= 500 or status in TEMPORARY


def _may_answer(error: BaseException) -> bool:
    """Whether a store that does not open may do so later, without a change of its address."""
    from mlflow.exceptions import MlflowException

    text = str(error)
    if isinstance(error, MlflowException):
        return is_away(error) and not re.search(NEVER, text) and error.error_code not in NO_MLFLOW
    if isinstance(error, OSError) and type(error).__module__ == "builtins":
        return isinstance(error, ConnectionError | TimeoutError) or error.errno in NO_ROUTE
    if isinstance(error, socket.gaierror):
        return True
    name = type(error).__name__
    wrong = re.search(f"{NEVER}|{NO_ACCOUNT}", text)
    return name in {"OperationalError", "DBAPIError"} and not wrong


def open_store(uri: str, seconds: float | None = None) -> MlflowClient:
    """A client of a store that answered.

    Args:
        uri: Address of the store.
        seconds: How long to wait for its answer; default: three, while somebody waits.

    Raises:
        StoreError: It does not answer, refuses, or is a kind of store that MLflow no longer has.
    """
    from mlflow import MlflowClient

    kind = urlsplit(uri).scheme
    try:
        if file := sqlite_file(uri):
            with _one_at_a_time(file), nullcontext() if file.stat().st_size else _without_syncs():
                _check_schema(uri, version_of_file(file))
                client = MlflowClient(uri)
                client.search_experiments(max_results=1)
            return client
        if kind.partition("+")[0] in DATABASE_PORTS:
            _check_database(uri)
        elif kind in ("", "file") and os.environ.get("MLFLOW_ALLOW_FILE_STORE") != "true":
            msg = "MLflow 3 no longer keeps runs in a plain folder"
            raise OSError(msg)
        with patience(seconds or CONNECT_SECONDS):
            client = MlflowClient(uri)
            client.search_experiments(max_results=1)
        return client
    except StoreError:
        raise
    # Drivers, HTTP and MLflow each have their own exceptions; to the user all mean the same.
    except Exception as error:
        raise StoreError(uri, reason_of(error), away=_may_answer(error)) from error


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
        _check_schema(uri, version_of_engine(engine))
    finally:
        engine.dispose()


def _check_schema(uri: str, found: str | None) -> None:
    if reason := trouble(found, redacted(uri)):
        raise StoreError(uri, reason)


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
