"""Versions of a registered model: what is kept of them, and their bundles."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl.bundle import Bundle, BundleError, seal_sha256
from tl.fingerprints import classes_sha256
from tl.registry.errors import RegistryError
from tl.registry.store import Registry, asking, model_named
from tl.tracking.model import SEAL
from tl.tracking.paging import all_pages

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel, Run
    from mlflow.entities.model_registry import ModelVersion

TASK, CLASSES = "tl.task", "tl.classes_sha256"
BUNDLE = "bundle"  # name of the model in its run
# Tags of a run that its versions have, too, so that the registry's page says what they are.
COPIED = (
    *("data.name", "data.sha256", "data.test_sha256", "data.val_sha256"),
    *("model.name", "tl.method", "tl.job", "tl.version", "git.commit"),
)
HEADLINES = tuple(f"{split}/{name}" for split in ("val", "test") for name in ("acc", "map", "mae"))


def logged_bundle(registry: Registry, run: Run) -> LoggedModel:
    """The bundle that a run has logged, the last of them.

    Raises:
        RegistryError: It has none, or not all of it.
    """
    name, run_id = run.info.run_name, run.info.run_id
    with asking(registry, f"read the models of the run {run_id}"):
        found = registry.client.search_logged_models(
            [run.info.experiment_id],
            filter_string=f"source_run_id = '{run_id}' AND name = '{BUNDLE}'",
            order_by=[{"field_name": "creation_timestamp", "ascending": False}],
        )
    ready = [model for model in found if str(model.status) == "READY"]
    if ready:
        return ready[0]
    where = run.data.tags.get("tl.output_dir")
    sync = f"tl sync {where} where it was trained" if where else "tl sync with its folder"
    if found:
        msg = f"the bundle of the run {name} ({run_id}) is not wholly in the store yet: {sync}"
        raise RegistryError(msg)
    msg = (
        f"the run {name} ({run_id}) has no bundle in the store: it is not finished, was trained "
        f"with export.enabled=false, or its records wait: {sync}"
    )
    raise RegistryError(msg)


def fetch(registry: Registry, source: str, folder: Path) -> Bundle:
    """Copy the bundle of a logged model into a folder and read it.

    Args:
        registry: Where it is.
        source: Address of the logged model, `models:/m-…`.
        folder: An empty one.

    Raises:
        RegistryError: It is not there any more, or no bundle of tl.
        BundleError: It is damaged.
    """
    import mlflow
    from mlflow.models import Model

    with asking(registry, f"fetch the model {source}"):
        # Copied always: MLflow writes into the folder that it hands out.
        place = mlflow.artifacts.download_artifacts(
            source, dst_path=str(folder), tracking_uri=registry.uri
        )
        facts = Model.load(place).flavors.get("python_function", {})
    data = facts.get("data")
    if facts.get("loader_module") != "tl_bundle" or not data:
        raise RegistryError(f"{source} is a model of another kind than the bundles of tl")
    return Bundle.load(Path(place) / data)


def check_seal(bundle: Bundle, expected: str | None) -> str:
    """Hash of a bundle whose seal holds.

    Args:
        bundle: As it was fetched.
        expected: Hash that was noted when it was written; None where nobody did.

    Raises:
        BundleError: Files were changed since, or the golden images give other answers.
    """
    found = seal_sha256(bundle.path)
    if expected is not None and found != expected:
        raise BundleError(
            f"its files are not those that were sealed (hash {found[:12]}, not {expected[:12]}): "
            "somebody changed them in the store; train or export it again"
        )
    bundle.verify()
    return found


def question(bundle: Bundle) -> dict[str, str]:
    """What a bundle answers, as tags: two with other ones cannot take each other's place."""
    return {TASK: bundle.task, CLASSES: classes_sha256(sorted(bundle.classes))}


def ensure_model(registry: Registry, name: str, asked: Mapping[str, str]) -> None:
    """Make the registered model, or see that the one of that name is ours and asks the same.

    Raises:
        RegistryError: The name is taken by something else.
    """
    client = registry.client
    model = model_named(registry, name)
    if model is None:
        _create(registry, name, asked)
        return
    known = {key: model.tags.get(key) for key in asked}
    if not any(known.values()):
        if client.search_model_versions(f"name = {_quoted(name)}", max_results=1):
            raise _taken(name, "a model that tl register did not make")
        for key, value in asked.items():  # made by hand, with nothing in it: somebody gave rights
            client.set_registered_model_tag(name, key, value)
        return
    if known != dict(asked):
        what = "task" if known[TASK] != asked[TASK] else "class list"
        raise RegistryError(
            f"the registered model {name!r} has another {what}: who uses it could not use this one "
            "in its place; choose another name"
        )


def _create(registry: Registry, name: str, asked: Mapping[str, str]) -> None:
    from mlflow.exceptions import MlflowException

    try:
        registry.client.create_registered_model(name, tags=dict(asked))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        # Prompts have the same names, but are not found among the models.
        raise _taken(name, "a prompt") from error


def _taken(name: str, by: str) -> RegistryError:
    return RegistryError(f"the name {name!r} is taken by {by}: choose another name")


def same_bundle(registry: Registry, name: str, seal: str) -> ModelVersion | None:
    """The version that is this very bundle, where there is one."""
    for version in versions_of(registry, name):
        if version.tags.get(SEAL) == seal:
            return version
    return None


def versions_of(registry: Registry, name: str) -> list[ModelVersion]:
    """All versions, the newest first."""
    found = all_pages(
        lambda n, token: registry.client.search_model_versions(
            f"name = {_quoted(name)}", max_results=n, page_token=token
        )
    )
    return sorted(found, key=lambda version: -int(version.version))


def _quoted(name: str) -> str:
    """A name within MLflow's filters, which know no escape."""
    return f'"{name}"' if "'" in name else f"'{name}'"


def facts_of(run: Run) -> dict[str, str]:
    """Tags of a version, from its run: data, model, and the headline of each split."""
    tags = {key: run.data.tags[key] for key in COPIED if key in run.data.tags}
    for key, value in run.data.metrics.items():
        if key.removesuffix("_low").removesuffix("_high") in HEADLINES:
            tags[key] = f"{value:.6g}"
    return tags


def noted(version: ModelVersion, words: str) -> str:
    """The description of a version with one more line of its history."""
    line = f"{time.strftime('%Y-%m-%d %H:%M')} {words}"
    return f"{version.description.rstrip()}\n\n{line}" if version.description else line


def call(model: Any) -> str:
    """`version 3`."""
    return f"version {model.version}"
