"""Runs as their folders or MLflow keep them, with what each of them says of itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tl.comparison.errors import CompareError
from tl.config import NO_YAML

CONFIG, RECORD, PREDICTIONS, HISTORY = (
    "config.yaml",
    "run.json",
    "predictions.parquet",
    "history.csv",
)
NO_PARAMS = {"resume", "output_dir"}
STATUSES = {"RUNNING": "is still under way", "FAILED": "failed", "KILLED": "was interrupted"}


@dataclass(frozen=True)
class Record:
    """One run.

    Args:
        id: Of MLflow, or the folder where MLflow does not know the run.
        name: For people.
        status: As MLflow has it.
        params: Flat settings, as texts.
        tags: Texts.
        metrics: Numbers.
        file: Path of one of the run's files on this machine, by its name; None where there is none.
        folder: Of the run, where it is on this machine.
        url: Page of the run, where a server shows one.
        where: Words for a message on what is missing.
        started: Seconds since 1970; 0 where nobody knows.
    """

    id: str
    name: str
    status: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    file: Callable[[str], Path | None] = field(repr=False)
    folder: Path | None = None
    url: str | None = None
    where: str = ""
    started: float = 0.0

    def why_no_predictions(self) -> str:
        """Why the run cannot be compared when it has no predictions."""
        if self.status in STATUSES:
            error = self.tags.get("error", "")
            return (
                f"it {STATUSES[self.status]}{f' ({error})' if error else ''}: it has no predictions"
            )
        here = self.tags.get("tl.output_dir")
        late = f", or tl sync {here} on {self.tags.get('tl.host', 'its machine')}" if here else ""
        return (
            f"it has no {PREDICTIONS} {self.where}: its records are not all there (runs=FOLDER "
            f"takes a run's folder{late}), or it was made by an earlier version of tl"
        )


def from_folders(place: Path) -> list[Record]:
    """The run of a folder, or all runs of a folder of runs.

    Raises:
        CompareError: It holds none.
    """
    if (place / CONFIG).is_file():
        return [_from_folder(place)]
    found = [_from_folder(file.parent) for file in sorted(place.glob(f"*/{CONFIG}"))]
    if not found:
        raise CompareError(f"runs: {place} holds no run of tl: there is no {CONFIG} in it")
    return found


def _from_folder(folder: Path) -> Record:
    folder = folder.absolute()
    record = _json(folder / RECORD)
    metrics = {k: float(v) for k, v in _json(folder / "metrics.json").items() if v is not None}
    model, plan = _json(folder / "checkpoints/model.json"), _json(folder / "plan.json")
    try:
        config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except (*NO_YAML, OSError) as error:
        text = " ".join(str(error).split())
        raise CompareError(f"runs: {folder / CONFIG} cannot be read ({text})") from error
    params = dict(_flat(config if isinstance(config, dict) else {}))
    params |= _derived(model, plan)
    data = model.get("data", {})
    tags = {f"data.{k}": str(v) for k, v in data.items() if k.endswith("sha256")}
    return Record(
        id=str(record.get("run_id") or folder),
        name=_name(folder, params, record),
        status=str(record.get("status") or ("FINISHED" if metrics else "UNKNOWN")),
        params=params,
        tags=tags,
        metrics=metrics,
        file=lambda name: folder / name if (folder / name).is_file() else None,
        folder=folder,
        where=f"in {folder}",
        started=(folder / CONFIG).stat().st_mtime,
    )


def _name(folder: Path, params: Mapping[str, str], record: Mapping[str, Any]) -> str:
    data = Path(params.get("data.root", "data")).name
    model = params.get("model.name", "?").split(".")[0]
    job = f" · {str(record['job'])[:4]}" if record.get("job") else ""
    return f"{data} · {model} · {params.get('finetune.method', '?')}{job or f' · {folder.name}'}"


def _derived(model: Mapping[str, Any], plan: Mapping[str, Any]) -> dict[str, str]:
    """What the job made of its settings, under the names that MLflow has for it."""
    found: dict[str, Any] = {}
    if weights := model.get("weights"):
        found |= {
            "model.weights_source": weights["source"],
            "model.weights_sha256": weights["sha256"],
        }
    if data := model.get("data"):
        found |= {"data.sha256": data.get("sha256"), "data.images": data.get("images")}
    if plan:
        found["finetune.method"] = plan["method"]
        for phase in plan["phases"]:
            rest = {k: v for k, v in phase.items() if k != "name"}
            rest["trainable"] = tuple(rest.get("trainable", ()))
            found |= dict(_flat(rest, f"phase.{phase['name']}."))
    return {k: str(v) for k, v in found.items() if v is not None}


def _flat(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and texts, as `tl.runs.job_params` gives MLflow."""
    for key, value in values.items():
        full = f"{path}{key}"
        if full in NO_PARAMS or full == "finetune.phases" or value is None:
            continue
        if isinstance(value, dict):
            yield from _flat(value, f"{full}.")
        else:
            yield full, str(value)


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CompareError(f"runs: {path} cannot be read ({error})") from error
