"""Enter the bundle of a run into the registry."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tl.bundle import BundleError
from tl.config import CHAMPION
from tl.registry.errors import RegistryError
from tl.registry.store import Registry, asking, locked, version_called
from tl.registry.versions import (
    check_seal,
    ensure_model,
    facts_of,
    fetch,
    logged_bundle,
    noted,
    question,
    same_bundle,
)
from tl.tracking.finding import find_run
from tl.tracking.model import SEAL

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel, Run
    from mlflow.entities.model_registry import ModelVersion


@dataclass(frozen=True)
class Registered:
    """A run's model in the registry.

    Args:
        name: Of the registered model.
        version: Its number.
        alias: What it is called; None where it keeps the name that it had.
        new: Whether it was not there before.
        run_id: MLflow run that it comes from.
    """

    name: str
    version: int
    alias: str | None
    new: bool
    run_id: str

    @property
    def address(self) -> str:
        """As `mlflow.pyfunc.load_model` and `mlflow models serve -m` take it."""
        return f"models:/{self.name}@{self.alias}" if self.alias else self.numbered

    @property
    def numbered(self) -> str:
        """The address that always means this version."""
        return f"models:/{self.name}/{self.version}"


def register(registry: Registry, run: str, name: str, alias: str) -> Registered:
    """Make a run's bundle a version of a registered model.

    Args:
        registry: Where.
        run: Id, name or folder of the run.
        name: Of the registered model; made where there is none.
        alias: What the version is called from now on, in the place of the one that was before.

    Raises:
        UnknownRunError: No single run is what `run` says.
        RegistryError: It has no bundle, the bundle is not whole, or the name is taken.
        BusyError: Another job is changing that registered model.
    """
    with asking(registry, f"read the run {run}"):
        found = find_run(registry.client, run)
    logged = logged_bundle(registry, found)
    with tempfile.TemporaryDirectory(prefix="tl-register-") as folder:
        try:
            bundle = fetch(registry, logged.model_uri, Path(folder))
            seal = check_seal(bundle, logged.tags.get(SEAL))
        except BundleError as error:
            msg = f"the bundle of the run {run} cannot be registered: {error}"
            raise RegistryError(msg) from error
        asked = question(bundle)
    with locked(registry, name), asking(registry, f"register a version of {name}"):
        ensure_model(registry, name, asked)
        there = same_bundle(registry, name, seal)
        version = there or _made(registry, name, found, logged, {SEAL: seal, **asked})
        champion = version_called(registry, name, CHAMPION)
        keeps = champion is not None and champion.version == version.version
        if not keeps:
            registry.client.set_registered_model_alias(name, alias, str(version.version))
    return Registered(
        name=name,
        version=int(version.version),
        alias=CHAMPION if keeps else alias,
        new=there is None,
        run_id=version.run_id or found.info.run_id,
    )


def _made(
    registry: Registry, name: str, run: Run, logged: LoggedModel, tags: dict[str, str]
) -> ModelVersion:
    version = registry.client.create_model_version(
        name,
        source=logged.model_uri,
        run_id=run.info.run_id,
        tags={**facts_of(run), **tags},
        description=run.info.run_name,
        model_id=logged.model_id,
    )
    words = noted(version, f"registered from the run {run.info.run_id}")
    registry.client.update_model_version(name, str(version.version), words)
    return version
