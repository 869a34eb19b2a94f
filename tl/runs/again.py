"""A job that its launcher starts again goes on in the folder that it has begun.

`torchrun` starts all processes of a job again when one of them dies, Slurm a whole job, Kubernetes
a pod: each by the same command, which names no run to resume.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from tl import ranks
from tl.config import TrainConfig
from tl.runs.folder import CONFIG, RunError, RunFolder, read_config

JOB = "checkpoints/job.json"
VISIBLE_SECONDS = 30.0  # that a network file system may take to show a new file


def note_job(folder: RunFolder) -> None:
    """Remember which job begins here, where it has a name that outlives its processes."""
    if ids := ranks.job_ids():
        folder.checkpoints.mkdir(exist_ok=True)
        folder.write_json(JOB, {"ids": ids})


def end_job(folder: Path) -> None:
    """All processes are done: the same command from now on is a new one."""
    ranks.wait()
    if ranks.rank() == 0:
        (folder / JOB).unlink(missing_ok=True)


def begun(config: TrainConfig, path: Path | None, free: Iterable[str]) -> Path | None:
    """The run that this very job has begun, with the same settings, and has not ended.

    None: it begins one.

    Args:
        config: As the user asked, with absolute paths.
        path: Where the job was told to put it; None: anywhere below runs/.
        free: Settings that may differ.
    """
    ids = set(ranks.job_ids())
    if not ids:
        return None
    places = [path] if path is not None else sorted(Path("runs").glob(f"*/{JOB}"), reverse=True)
    for place in places:
        folder = place if path is not None else place.parents[1]
        if ids & _ids(folder) and (folder / CONFIG).is_file() and _same(folder, config, free):
            return folder.absolute()
    return None


def _ids(folder: Path) -> set[str]:
    try:
        return set(json.loads((folder / JOB).read_text(encoding="utf-8"))["ids"])
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _same(folder: Path, config: TrainConfig, free: Iterable[str]) -> bool:
    try:
        then, now = asdict(read_config(folder)), asdict(config)
    except RunError:
        return False
    left_out = set(free)
    return all(then.get(key) == now[key] for key in now if key not in left_out)


def check_seen(folder: RunFolder) -> None:
    """Refuse a folder that some hosts of the job do not see.

    Raises:
        RunError: Names them.
    """
    if ranks.world() == 1:
        return
    file, deadline = folder.path / CONFIG, time.monotonic() + VISIBLE_SECONDS
    while not (seen := file.is_file()) and time.monotonic() < deadline:
        time.sleep(0.1)
    blind = sorted({host for host, sees in ranks.gather((socket.gethostname(), seen)) if not sees})
    if blind:
        msg = (
            f"{folder.path} is not seen on {', '.join(blind)}: output_dir must name a folder on a "
            "file system that all hosts of the job share"
        )
        raise RunError(msg)
