"""Find a run by what a person calls it: its id, its name, or the folder that it wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl.config import RequestError

from .paging import all_pages, experiment_ids
from .records import RECORD
from .store import TrackingError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

ID = re.compile(r"[0-9a-f]{32}")
SHOWN = 5  # runs of one name that an error lists


class UnknownRunError(TrackingError, RequestError):
    """No run, or no single one, is what was named."""


def record_of(folder: Path) -> dict[str, Any]:
    """Content of the `run.json` of a run's folder: id, store, status and more.

    Raises:
        UnknownRunError: The folder has none, or one that cannot be read.
    """
    path = folder / RECORD
    if not path.is_file():
        msg = f"{folder} is no run that MLflow knows: it has no {RECORD} (tracking.enabled=false?)"
        raise UnknownRunError(msg)
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UnknownRunError(f"{path} cannot be read: {error}") from error


def store_named(given: str) -> str | None:
    """The store in which a folder's run is; None where no folder is named, or a secret is in it."""
    folder = Path(given)
    if not folder.is_dir():
        return None
    address = str(record_of(folder).get("tracking_uri") or "")
    return address if address and "***@" not in address else None


def find_run(client: MlflowClient, given: str, experiments: Sequence[str] | None = None) -> Run:
    """The run that a person means.

    Args:
        client: Of the store.
        given: Id of a run, the name of one that no other has, or a folder with its `run.json`.
        experiments: Ids of the experiments to look for a name in; default: all.

    Raises:
        UnknownRunError: There is none, it was deleted, or several have that name.
    """
    found = _run_of_folder(client, Path(given)) if Path(given).is_dir() else None
    if found is None and ID.fullmatch(given):
        found = _run_of_id(client, given)
    if found is None:
        found = _run_of_name(client, given, experiments)
    if found.info.lifecycle_stage == "deleted":
        run_id = found.info.run_id
        msg = f"the run {given} was deleted; mlflow runs restore --run-id {run_id} brings it back"
        raise UnknownRunError(msg)
    return found


def _run_of_folder(client: MlflowClient, folder: Path) -> Run:
    run_id = record_of(folder).get("run_id")
    if not run_id:
        msg = f"the run of {folder} is not in MLflow yet: tl sync {folder}"
        raise UnknownRunError(msg)
    found = _run_of_id(client, str(run_id))
    if found is None:
        msg = (
            f"the store does not know the run {run_id} of {folder}: another tracking.uri, or a run "
            "that was removed for good"
        )
        raise UnknownRunError(msg)
    return found


def _run_of_id(client: MlflowClient, run_id: str) -> Run | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _run_of_name(client: MlflowClient, name: str, experiments: Sequence[str] | None) -> Run:
    runs = _named(client, name, experiments or experiment_ids(client))
    if not runs:
        msg = f"no run has the id or name {name!r}, and it is no folder of a run"
        raise UnknownRunError(msg)
    if len(runs) > 1:
        some = ", ".join(run.info.run_id for run in runs[:SHOWN])
        more = f" and {len(runs) - SHOWN} more" if len(runs) > SHOWN else ""
        raise UnknownRunError(f"{len(runs)} runs have the name {name!r}: say which, {some}{more}")
    return runs[0]


def _named(client: MlflowClient, name: str, experiments: Iterable[str]) -> list[Run]:
    # MLflow's filters know no escape: a name with both kinds of quotes is looked for by hand.
    quote = '"' if "'" in name else "'"
    filter_string = "" if quote in name else f"attributes.run_name = {quote}{name}{quote}"
    ids = list(experiments)
    found = all_pages(
        lambda n, token: client.search_runs(ids, filter_string, max_results=n, page_token=token)
    )
    return [run for run in found if run.info.run_name == name]
