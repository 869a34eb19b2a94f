"""A batch of jobs: what was varied, and what each of them found."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tl.runs.folder import CONFIG, HEADLINES, RunFolder

TABLE = "batch.csv"
OWN = ("output_dir", "resume")  # settings that differ in any case


@dataclass(frozen=True)
class BatchSummary:
    """What the jobs of a batch amount to.

    Args:
        rows: One a job, in order: its number, what was varied, its headline, how it ended.
        metrics: Counts of jobs and of failed ones, and the best headline of val.
    """

    rows: list[dict[str, Any]]
    metrics: dict[str, float]


def sum_up_batch(folder: RunFolder, ended: Mapping[int, str]) -> BatchSummary:
    """Write `batch.csv` and return what it says.

    Args:
        folder: Of the batch; its jobs are in folders that are named by their numbers.
        ended: Number of each job -> how it ended.
    """
    jobs = [folder.path / str(number) for number in sorted(ended)]
    settings = [dict(_settings(job)) for job in jobs]
    varied = varied_keys([s for s in settings if s])
    rows = [
        {
            "job": int(job.name),
            **{key: known.get(key) for key in varied},
            **_found(job),
            "ended": ended[int(job.name)],
        }
        for job, known in zip(jobs, settings, strict=True)
    ]
    if rows:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        folder.write_text(TABLE, text.getvalue())
    return BatchSummary(rows, _metrics(rows))


def varied_keys(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Settings that not all jobs share, without those that follow from others of them.

    `finetune=a,b` changes every setting of its phases; its method says it.
    """

    def values(key: str, jobs: Sequence[Mapping[str, Any]]) -> set[str]:
        return {json.dumps(job.get(key)) for job in jobs}

    known = list(dict.fromkeys(key for job in settings for key in job))
    varied = [key for key in known if len(values(key, settings)) > 1]
    method = "finetune.method"
    if method not in varied:
        return varied
    alike = [[job for job in settings if job.get(method) == name] for name in _names(settings)]
    return [
        key
        for key in varied
        if key == method
        or not key.startswith("finetune.")
        or any(len(values(key, jobs)) > 1 for jobs in alike)
    ]


def _names(settings: Sequence[Mapping[str, Any]]) -> list[Any]:
    return list(dict.fromkeys(job.get("finetune.method") for job in settings))


def _settings(job: Path) -> Iterator[tuple[str, Any]]:
    """Flat settings of a job; nothing where it did not come so far."""

    def flat(node: Any, path: str) -> Iterator[tuple[str, Any]]:
        if isinstance(node, dict):
            for key, value in node.items():
                yield from flat(value, f"{path}.{key}" if path else str(key))
        else:
            yield path, node

    file = job / CONFIG
    if file.is_file():
        found = flat(yaml.safe_load(file.read_text(encoding="utf-8")), "")
        yield from ((key, value) for key, value in found if key not in OWN)


def _found(job: Path) -> dict[str, Any]:
    try:
        metrics = json.loads((job / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    found: dict[str, Any] = {}
    for split in ("val", "test"):
        for key in HEADLINES:
            if f"{split}/{key}" in metrics:
                names = (f"{split}/{key}", f"{split}/{key}_low", f"{split}/{key}_high")
                found |= {name: metrics[name] for name in names if name in metrics}
    return {**found, "seconds": round(metrics.get("total_seconds", 0), 1)}


def _metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    done = [row for row in rows if row["ended"] == "done"]
    metrics = {"batch/jobs": float(len(rows)), "batch/failed": float(len(rows) - len(done))}
    for key in HEADLINES:
        values = [row[f"val/{key}"] for row in done if f"val/{key}" in row]
        if values and len(values) == len(done):
            metrics[f"batch/best_val_{key}"] = min(values) if key == "mae" else max(values)
    return metrics
