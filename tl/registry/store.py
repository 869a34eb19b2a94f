"""The registry of a store, its errors in words, and a lock that one job has at a time."""

from __future__ import annotations

import os
import platform
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from tl.config import TlError, TrackingConfig
from tl.registry.errors import BusyError, RegistryError
from tl.tracking.store import default_uri, mlflow_settings, open_store, reason_of, redacted

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

T = TypeVar("T")
OWNER, SINCE = "tl.lock_owner", "tl.lock_since"
STALE_SECONDS = 1800.0  # after which the job that took a lock counts as killed
DENIED = {"PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"}
ABSENT = {"ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED", "FEATURE_DISABLED"}


@dataclass(frozen=True)
class Registry:
    """A store that answered.

    Args:
        client: Of the store.
        uri: Its address.
    """

    client: MlflowClient
    uri: str


def serve_command(registry: Registry, address: str) -> str:
    """What a person types to serve a registered model.

    Args:
        registry: Where it is.
        address: Of the model, such as `models:/flowers@champion`.
    """
    where = f"MLFLOW_TRACKING_URI={redacted(registry.uri)}"
    return f"{where} mlflow models serve -m '{address}' --env-manager local"


@contextmanager
def open_registry(given: str | None, known: str | None = None) -> Iterator[Registry]:
    """The registry of a store, with MLflow quiet.

    Args:
        given: Address of the store, as a person set it.
        known: Address that counts where nobody set one; default: `default_uri`.

    Raises:
        StoreError: The store does not answer.
        RegistryError: It has no registry, or the token may not look into it.
    """
    uri = default_uri(TrackingConfig(uri=given or known))
    with mlflow_settings(uri):
        registry = Registry(open_store(uri), uri)
        with asking(registry, "look into the registry"):
            registry.client.search_registered_models(max_results=1)
        yield registry


@contextmanager
def asking(registry: Registry, what: str) -> Iterator[None]:
    """Turn what the store says no with into one sentence.

    Args:
        registry: Asked.
        what: What it is asked for, as in "you may not …".

    Raises:
        RegistryError: In the place of MLflow's own errors.
    """
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException

    place = redacted(registry.uri)
    try:
        yield
    except TlError:
        raise
    except MlflowException as error:
        if error.error_code in DENIED or "error code 403" in str(error):
            msg = f"the MLflow server {place} does not let you {what}: ask whoever runs it for "
            raise RegistryError(f"{msg}the right, or use another token") from error
        if error.error_code in ABSENT or "error code 404" in str(error):
            msg = f"the MLflow store {place} has no model registry: "
            raise RegistryError(f"{msg}a database or an MLflow server has one") from error
        raise RegistryError(f"cannot {what} ({place}): {reason_of(error)}") from error
    except (OSError, RequestException) as error:
        raise RegistryError(f"cannot {what} ({place}): {reason_of(error)}") from error


def model_named(registry: Registry, name: str) -> RegisteredModel | None:
    """The registered model of that name, where there is one."""
    return _found(lambda: registry.client.get_registered_model(name))


def version_called(registry: Registry, name: str, alias: str) -> ModelVersion | None:
    """The version of that alias or number, where there is one."""
    if alias.isdigit():
        return _found(lambda: registry.client.get_model_version(name, alias))
    model = model_named(registry, name)
    number = None if model is None else model.aliases.get(alias)
    if number is None:
        return None
    return _found(lambda: registry.client.get_model_version(name, str(number)))


def _found(ask: Callable[[], T]) -> T | None:
    from mlflow.exceptions import MlflowException

    try:
        return ask()
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


# --- one job at a time ---------------------------------------------------------------------------


class Lock:
    """What one job at a time has of a registered model; see `locked`.

    Args:
        registry: Where.
        name: Of the registered model.
    """

    def __init__(self, registry: Registry, name: str) -> None:
        self._client = registry.client
        self.place = f"{name}.lock"
        self.owner = f"{platform.node()}, process {os.getpid()}, {uuid.uuid4().hex[:8]}"

    def take(self) -> None:
        """Make the entry that no two jobs can make.

        Raises:
            BusyError: Another job has it.
        """
        for _ in range(2):
            if self._made():
                return
            found = _found(lambda: self._client.get_registered_model(self.place))
            if found is None:
                continue  # given back in this moment
            age = time.time() - float(found.tags.get(SINCE, 0))
            if age < STALE_SECONDS:
                holder = found.tags.get(OWNER, "an unknown process")
                msg = (
                    f"another job has been changing it for {age:.0f} s ({holder}): try again "
                    f"later, or delete the registered model {self.place!r} if that job was killed"
                )
                raise BusyError(msg)
            self._remove()
        raise BusyError("other jobs are changing it: try again")

    def held(self) -> bool:
        """Whether it is still ours: it counts as forgotten after half an hour."""
        found = _found(lambda: self._client.get_registered_model(self.place))
        return found is not None and found.tags.get(OWNER) == self.owner

    def give_back(self) -> None:
        """Remove the entry, if it is ours."""
        if self.held():
            self._remove()

    def _made(self) -> bool:
        from mlflow.exceptions import MlflowException

        tags = {OWNER: self.owner, SINCE: f"{time.time():.0f}"}
        words = "tl register or tl promote is at work; gone when it ends"
        try:
            # Names are unique in every store of MLflow: there is nothing else that is atomic.
            self._client.create_registered_model(self.place, tags=tags, description=words)
        except MlflowException as error:
            if error.error_code == "RESOURCE_ALREADY_EXISTS":
                return False
            raise
        return self.held()

    def _remove(self) -> None:
        from mlflow.exceptions import MlflowException

        with suppress(MlflowException):  # another job was faster
            self._client.delete_registered_model(self.place)


@contextmanager
def locked(registry: Registry, name: str) -> Iterator[Lock]:
    """Keep other jobs from changing a registered model.

    Raises:
        BusyError: Another job is at it.
    """
    lock = Lock(registry, name)
    with asking(registry, f"change the registered model {name}"):
        try:
            lock.take()
        except BusyError as error:
            raise BusyError(f"{name}: {error}") from None
    try:
        yield lock
    finally:
        with suppress(Exception):  # the error of the job matters more; a lock is forgotten in time
            lock.give_back()
