"""Which jobs still live: their process, their host, and the runs that dead ones left open."""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from .paging import all_pages, experiment_ids
from .spool import in_use, waits

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)

PROCESS, HEARTBEAT, PROCESS_GONE = "tl.process", "tl.heartbeat", "tl.lost"
BEAT_SECONDS = 60.0
LOST_SECONDS = 1800.0  # without a sign of life, for a job on another host


@dataclass(frozen=True)
class Repaired:
    """A run that was still open though its job is gone.

    Args:
        run_id: Of the run.
        name: Of the run.
        reason: How one knows.
    """

    run_id: str
    name: str
    reason: str


def own_process() -> str:
    """This process, told apart from all others that ever had its number: machine, number, start."""
    return f"{_machine()} {os.getpid()} {_started(os.getpid())}"


def lives(process: str) -> bool | None:
    """Whether a process that called itself so is still there; None: it is of another machine."""
    machine, _, own = process.partition(" ")
    number, _, started = own.partition(" ")
    if machine != _machine() or not started:
        return None
    return _started(number) == started


def process_tags() -> dict[str, str]:
    """What a job says of its process when its run begins."""
    return {PROCESS: own_process(), HEARTBEAT: _now()}


def beat(client: MlflowClient, run_id: str) -> None:
    """Say that the job of a run lives."""
    client.set_tag(run_id, HEARTBEAT, _now())


def revive(client: MlflowClient, run_id: str) -> None:
    """Open a run again that somebody took for dead, while its job had no way to the store."""
    found = client.get_run(run_id)
    if PROCESS_GONE in found.data.tags:
        client.delete_tag(run_id, PROCESS_GONE)
    if found.info.status != "RUNNING":
        client.update_run(run_id, status="RUNNING")


def repair_runs(client: MlflowClient) -> list[Repaired]:
    """Close the runs of a store whose jobs were killed without a chance to say so.

    They get the status KILLED and the tag `tl.lost`, which says how one knows: the process is gone
    from this machine, or a job elsewhere has given no sign of life for half an hour.

    Args:
        client: Of a store that answers.

    Returns:
        What was closed.
    """
    found = []
    for run in _open_runs(client):
        reason = _death(run)
        if reason is None or client.get_run(run.info.run_id).info.status != "RUNNING":
            continue
        folder = run.data.tags.get("tl.output_dir", "")
        if folder and run.data.tags.get("tl.host") == platform.node() and waits(Path(folder)):
            reason += f"; what the store does not have yet: tl sync {folder}"
        client.set_tag(run.info.run_id, PROCESS_GONE, reason)
        client.set_terminated(run.info.run_id, "KILLED", _last_sign(run))
        found.append(Repaired(run.info.run_id, run.info.run_name or "", reason))
    return found


def _open_runs(client: MlflowClient) -> Iterator[Run]:
    ids = experiment_ids(client)
    for i in range(0, len(ids), 100):
        yield from _open_runs_of(client, ids[i : i + 100])


def _open_runs_of(client: MlflowClient, experiments: list[str]) -> list[Run]:
    condition = f"attributes.status = 'RUNNING' and tags.`{PROCESS}` != ''"
    return all_pages(
        lambda n, token: client.search_runs(experiments, condition, max_results=n, page_token=token)
    )


def _death(run: Run) -> str | None:
    """Why the job of a run must be dead; None where it may live."""
    tags = run.data.tags
    host = tags.get("tl.host", "its host")
    found = lives(tags[PROCESS])
    if found is not None:
        number = tags[PROCESS].split(" ")[1]
        return None if found else f"its process {number} on {host} is gone"
    folder = tags.get("tl.output_dir", "")
    if folder and in_use(Path(folder)):
        return None  # another machine or container, with the same files
    silent = time.time() - _last_sign(run) / 1000
    if silent < LOST_SECONDS:
        return None
    return f"no sign of life from {host} since {tags.get(HEARTBEAT, 'its start')}"


def _last_sign(run: Run) -> int:
    """When the job was last known to live, in milliseconds since 1970."""
    try:
        sign = datetime.fromisoformat(run.data.tags[HEARTBEAT]).timestamp()
    except (KeyError, ValueError):
        return int(run.info.start_time)
    return int(1000 * sign)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _machine() -> str:
    """One start of one machine, and the container in it: where process numbers mean the same."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = Path("/proc/self/ns/pid").readlink().name
    except OSError:
        return platform.node()
    return f"{boot}/{space}"


def _started(number: int | str) -> str:
    """When a process began, in ticks since the machine's start; empty where there is none."""
    try:
        text = Path(f"/proc/{number}/stat").read_text()
    except OSError:
        return ""
    fields = text.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]
