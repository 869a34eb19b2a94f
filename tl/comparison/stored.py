"""Runs of an MLflow store: found by experiment, condition, name or id; read and never changed."""

from __future__ import annotations

import difflib
import json
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from tl.comparison.errors import CompareError
from tl.comparison.records import RECORD, Record
from tl.tracking.finding import find_run
from tl.tracking.paging import all_pages
from tl.tracking.store import (
    TrackingError,
    mlflow_settings,
    open_store,
    reason_of,
    redacted,
    sqlite_file,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PAGE = 250  # runs of a request: more at once take more memory, not less time
SHOWN = 8  # experiments that a message names
PARENT = "mlflow.parentRunId"
NOT_THERE = ("404", "RESOURCE_DOES_NOT_EXIST", "No such", "NoSuchKey", "Not Found")
# Kinds of MLflow runs that judge no model.
OTHERS = {"audit", "comparison", "batch", "sweep", "search", "trial"}


class Store:
    """A store that is open for reading.

    Args:
        uri: Its address, which answered.
        client: Of it.
        cache: Folder for files that are fetched from a server.
    """

    def __init__(self, uri: str, client: MlflowClient, cache: Path) -> None:
        self.uri = uri
        self.client = client
        self.cache = cache

    def experiment(self, name: str, condition: str | None) -> list[Record]:
        """Runs of an experiment that judged a model, the newest first.

        Raises:
            CompareError: There is no such experiment, the condition cannot be read, or no run
                fulfils it.
        """
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(name)
        if found is None or found.lifecycle_stage == "deleted":
            raise CompareError(self._no_experiment(name, deleted=found is not None))
        try:
            runs = self._search(found.experiment_id, quoted(condition or ""))
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE" or not condition:
                raise
            raise CompareError(
                f"filter: MLflow cannot read {condition!r} ({reason_of(error)}); write it as in "
                "params.model.name = 'resnet18' and metrics.`val/acc` > 0.9"
            ) from error
        judged = [run for run in runs if run.data.tags.get("tl.kind", "train") not in OTHERS]
        # The run above the folds of a cross-validation has what each of them said.
        above = {run.info.run_id for run in runs if run.data.tags.get("tl.kind") == "folds"}
        judged = [run for run in judged if run.data.tags.get(PARENT) not in above]
        if not judged:
            what = f"no run that fulfils {condition}" if condition else "no run of tl train"
            raise CompareError(f"the experiment {name} has {what}")
        return [self._record(run) for run in judged]

    def named(self, names: Sequence[str], experiment: str | None) -> list[Record]:
        """Runs by their ids or names.

        Args:
            names: Of the runs.
            experiment: Where names are looked for; default: in all.

        Raises:
            TrackingError: There is no such run, or several have the name.
            CompareError: There is no such experiment.
        """
        within = None
        if experiment:
            found = self.client.get_experiment_by_name(experiment)
            if found is None:
                raise CompareError(self._no_experiment(experiment, deleted=False))
            within = [found.experiment_id]
        return [self._record(find_run(self.client, name, within)) for name in names]

    def experiment_of(self, run_id: str) -> str | None:
        """Name of the experiment of a run; None where the store does not know the run."""
        from mlflow.exceptions import MlflowException

        try:
            number = self.client.get_run(run_id).info.experiment_id
            return str(self.client.get_experiment(number).name)
        except MlflowException:
            return None

    def _search(self, experiment: str, condition: str) -> list[Run]:
        return all_pages(
            lambda n, token: self.client.search_runs(
                [experiment], condition, max_results=n, page_token=token
            )
        )

    def _no_experiment(self, name: str, *, deleted: bool) -> str:
        known = [e.name for e in self.client.search_experiments(max_results=1000)]
        near = difflib.get_close_matches(name, known, n=1)
        what = "was deleted" if deleted else "does not exist"
        hint = f"did you mean {near[0]}? " if near else ""
        some = ", ".join(known[:SHOWN]) + (" …" if len(known) > SHOWN else "")
        return f"the experiment {name} {what} in {redacted(self.uri)}; {hint}" + (
            f"there are {some}" if known else "there is none"
        )

    def _record(self, run: Run) -> Record:
        tags, info = run.data.tags, run.info
        folder = _own_folder(tags, info.run_id)
        kept = _local_artifacts(info.artifact_uri)
        url = None
        if self.uri.startswith("http"):
            url = f"{redacted(self.uri)}/#/experiments/{info.experiment_id}/runs/{info.run_id}"
        return Record(
            id=info.run_id,
            name=info.run_name or info.run_id,
            status=info.status,
            params=run.data.params,
            tags=tags,
            metrics=run.data.metrics,
            file=self._files(info.run_id, info.artifact_uri, kept, folder),
            folder=folder,
            url=url,
            where="among its artifacts in MLflow",
            started=(info.start_time or 0) / 1000,
        )

    def _files(
        self, run_id: str, artifacts: str, kept: Path | None, folder: Path | None
    ) -> Callable[[str], Path | None]:
        """Where a file of a run is: its artifact, else in its folder, else fetched."""

        def file(name: str) -> Path | None:
            for place in (kept, folder):
                if place is not None and (place / name).is_file():
                    return place / name
            return None if kept is not None else self._fetched(run_id, artifacts, name)

        return file

    def _fetched(self, run_id: str, artifacts: str, name: str) -> Path | None:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        place = self.cache / run_id
        place.mkdir(exist_ok=True)
        repository: Any = get_artifact_repository(artifacts)  # without types
        try:
            found = repository.download_artifacts(name, str(place))
        except Exception as error:  # each kind of place for files has errors of its own
            text = str(error)
            if isinstance(error, FileNotFoundError) or any(sign in text for sign in NOT_THERE):
                return None
            told = re.search(r"(\d{3} \w+ Error: [^\n]*?) for url", text)
            reason = told[1] if told else reason_of(error)
            msg = f"{redacted(self.uri)} did not give {name} of the run {run_id}: {reason}"
            raise TrackingError(msg) from error
        path = Path(found)
        return path if path.is_file() else None


@contextmanager
def opened(uri: str) -> Iterator[Store]:
    """Open a store for reading.

    Args:
        uri: Its address, as `tl.tracking.default_uri` gives it.

    Raises:
        StoreError: It does not answer.
        CompareError: It is a file that is not there.
    """
    file = sqlite_file(uri)
    if file is not None and not file.is_file():  # MLflow would make an empty one
        raise CompareError(
            f"there is no MLflow store {file}: go to the folder in which the runs were made, set "
            "tracking.uri, or name folders of runs (runs=FOLDER,FOLDER)"
        )
    with mlflow_settings(uri), TemporaryDirectory(prefix="tl-compare-") as cache:
        import mlflow

        client = open_store(uri)
        mlflow.set_tracking_uri(uri)
        try:
            yield Store(uri, client, Path(cache))
        finally:
            mlflow.set_tracking_uri(None)  # type: ignore[arg-type]


def quoted(condition: str) -> str:
    """A condition with the quotes that MLflow wants around names with dots and slashes, and texts.

    Example:
        >>> quoted("metrics.val/acc > 0.9 and params.model.name = resnet18")
        "metrics.`val/acc` > 0.9 and params.`model.name` = 'resnet18'"
    """
    names = re.sub(r"\b(metrics|params|tags)\.([\w-]+[./][\w./-]*)", r"\1.`\2`", condition)
    texts = r"((?:params|tags)\.(?:`[^`]+`|\w+)\s*!?=\s*)([^\s'\"`]+)"
    return re.sub(texts, r"\1'\2'", names)


def _own_folder(tags: Any, run_id: str) -> Path | None:
    """Folder of the run, where it is on this machine and still this run's."""
    given = tags.get("tl.output_dir")
    if not given or tags.get("tl.host") != platform.node():
        return None
    folder = Path(given)
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return folder if isinstance(record, dict) and record.get("run_id") == run_id else None


def _local_artifacts(uri: str) -> Path | None:
    parts = urlsplit(uri)
    if parts.scheme not in ("", "file"):
        return None
    return Path(unquote(parts.path))


def records(names: Iterable[Record]) -> list[Record]:
    """The runs, each once, in the order in which they come."""
    return [*{record.id: record for record in names}.values()]
