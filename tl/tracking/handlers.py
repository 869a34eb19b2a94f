"""What each kind of record does at the MLflow store; each may be done twice."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .dataset import log_inputs
from .model import log_bundle
from .processes import PROCESS_GONE

if TYPE_CHECKING:
    from mlflow import MlflowClient

MOST_PARAMS = 100  # per request, MLflow's limit
RECORD_TAG = "tl.record"
RUN_ID = "MLFLOW_RUN_ID"  # which `mlflow.end_run` takes away
Handler = Callable[["MlflowClient", str, Mapping[str, Any]], None]


def model_of(client: MlflowClient, run_id: str, record: str) -> Any:
    """The model that a record has made already, in whatever state."""
    where = client.get_run(run_id).info.experiment_id
    found = client.search_logged_models(
        [where], filter_string=f"tags.`{RECORD_TAG}` = '{record}'", max_results=1
    )
    return found[0] if found else None


def _log_params(client: MlflowClient, run_id: str, record: Mapping[str, Any]) -> None:
    """Log settings; those that a resumed run has with another value become tags `resume.*`."""
    from mlflow.entities import Param

    known, wanted = client.get_run(run_id).data.params, record["values"]
    new = [Param(k, v) for k, v in wanted.items() if k not in known]
    for i in range(0, len(new), MOST_PARAMS):
        client.log_batch(run_id, params=new[i : i + MOST_PARAMS])
    set_tags(client, run_id, {f"resume.{k}": v for k, v in wanted.items() if known.get(k, v) != v})


def _log_tags(client: MlflowClient, run_id: str, record: Mapping[str, Any]) -> None:
    set_tags(client, run_id, record["values"])


def set_tags(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    """Set tags of a run, as many at once as MLflow takes."""
    from mlflow.entities import RunTag

    entities = [RunTag(k, v) for k, v in tags.items()]
    for i in range(0, len(entities), MOST_PARAMS):
        client.log_batch(run_id, tags=entities[i : i + MOST_PARAMS])


def _log_text(client: MlflowClient, run_id: str, record: Mapping[str, Any]) -> None:
    client.log_text(run_id, record["text"], record["name"])


def _log_file(client: MlflowClient, run_id: str, record: Mapping[str, Any]) -> None:
    path = Path(record["path"])
    if not path.exists():
        msg = f"{path} was deleted before it was sent"
        raise ValueError(msg)
    log_it = client.log_artifacts if path.is_dir() else client.log_artifact
    log_it(run_id, str(path), record["folder"] or None)


def _log_model(client: MlflowClient, run_id: str, record: Mapping[str, Any]) -> None:
    import mlflow
    from mlflow.entities import LoggedModelStatus

    bundle = Path(record["path"])
    if not bundle.is_dir():
        msg = f"{bundle} was deleted before it was sent"
        raise ValueError(msg)
    if done := model_of(client, run_id, record["id"]):
        if done.status == LoggedModelStatus.READY:
            return
        client.delete_logged_model(done.model_id)  # half of it
    example, outer = record.get("example"), os.environ.get(RUN_ID)
    mlflow.start_run(run_id=run_id, nested=True, log_system_metrics=False)
    try:
        log_bundle(bundle, Path(example) if example else None, tags={RECORD_TAG: record["id"]})
    finally:
        mlflow.end_run("RUNNING")  # it goes on: its own last record ends it
        if outer:
            os.environ[RUN_ID] = outer


def _log_dict(client: MlflowClient, run_id: str, record: Mapping[str, Any]) -> None:
    client.log_dict(run_id, record["values"], record["name"])


def _log_inputs(client: MlflowClient, run_id: str, record: Mapping[str, Any]) -> None:
    log_inputs(client, run_id, record["datasets"])


def found_again(client: MlflowClient, run_id: str) -> None:
    """Take back that the job was lost."""
    if PROCESS_GONE in client.get_run(run_id).data.tags:
        client.delete_tag(run_id, PROCESS_GONE)


def _set_status(client: MlflowClient, run_id: str, record: Mapping[str, Any]) -> None:
    found_again(client, run_id)
    client.set_terminated(run_id, record["status"], record["time"])


# What a record says -> what does it.
HANDLERS: dict[str, Handler] = {
    "params": _log_params,
    "tags": _log_tags,
    "inputs": _log_inputs,
    "text": _log_text,
    "dict": _log_dict,
    "file": _log_file,
    "model": _log_model,
    "status": _set_status,
}
