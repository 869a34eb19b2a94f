"""Who a run is: the job that it records, where that ran, and where its phases begin."""

from __future__ import annotations

import platform
import uuid
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

SHOWN = 4  # hex digits of a job in the name of its run


def job_of(record: Mapping[str, Any]) -> str:
    """Id of a job: that of its `run.json`, where it goes on, else a new one."""
    return str(record.get("job") or uuid.uuid4().hex)


def run_title(name: str, job: str) -> str:
    """Name of a run, told apart from its likes: `birds · resnet50 · lp_ft · 1f3c`."""
    return f"{name} · {job[:SHOWN]}"


def job_tags(job: str, output_dir: Path) -> dict[str, str]:
    """What is known of a job before it begins."""
    return {
        "tl.job": job,
        "tl.version": _version(),
        "tl.host": platform.node(),
        "tl.output_dir": str(output_dir.absolute()),
    }


def data_tags(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Name, hashes and counts of the data."""
    tags = {k: v for k, v in fingerprint.items() if k == "images" or k.endswith("sha256")}
    tags["classes"] = len(fingerprint.get("classes", ()))
    if root := fingerprint.get("root"):
        tags["name"] = Path(root).name
    return {f"data.{k}": v for k, v in tags.items()}


def _version() -> str:
    try:
        return version("tl")
    except PackageNotFoundError:  # a source tree on the path
        return "unknown"
