"""How many cores and how much memory this process may use."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
SHARE = "TL_CORES"


class CoresError(ValueError):
    """`TL_CORES` is no number of cores."""

    exit_code = 2


def usable_cores(cgroup: Path = CGROUPS) -> int:
    """Cores that this process may use.

    Those of its CPU affinity, cut by the quota of its container, and by its share where a batch
    divides the machine: the variable `TL_CORES`.

    Raises:
        CoresError: `TL_CORES` is no whole number from 1.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quotas = [_quota(folder) for folder in _groups(cgroup, "cpu")]
    shares = [cores, *(int(q) for q in quotas if q is not None)]
    if (share := _share()) is not None:
        shares.append(share)
    return max(1, min(shares))


def keep_to_share() -> None:
    """Let the libraries that are loaded start no more threads than this process has cores.

    They count the cores of the machine, or were loaded before a batch gave this process its share.

    Raises:
        CoresError: `TL_CORES` is no whole number from 1.
    """
    cores = usable_cores()
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() > cores:
        torch.set_num_threads(cores)
    arrow = sys.modules.get("pyarrow")
    if arrow is not None and arrow.cpu_count() > cores:
        arrow.set_cpu_count(cores)
    if "numpy" in sys.modules:
        from threadpoolctl import ThreadpoolController

        pools = ThreadpoolController().select(user_api="blas")
        if any(pool["num_threads"] > cores for pool in pools.info()):
            pools.limit(limits=cores)


def memory_limit(cgroup: Path = CGROUPS) -> int | None:
    """Bytes of RAM that the container of this process may use; None: as many as there are."""
    found = [_limit(folder) for folder in _groups(cgroup, "memory")]
    return min((limit for limit in found if limit is not None), default=None)


def free_memory(cgroup: Path = CGROUPS) -> int:
    """Bytes of RAM that this process may still take, within the limits of its container."""
    import psutil

    free = [int(psutil.virtual_memory().available)]
    for folder in _groups(cgroup, "memory"):
        limit = _limit(folder)
        used = _first(folder, "memory.current", "memory.usage_in_bytes")
        if limit is not None and used is not None:
            free.append(limit - used + _cached(folder / "memory.stat"))
    return max(min(free), 0)


def _share() -> int | None:
    """`TL_CORES`; None where it is not set."""
    text = os.environ.get(SHARE, "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise CoresError(f"{SHARE} must be a whole number from 1, got {text!r}; or leave it out")
    return int(text)


def _groups(cgroup: Path, controller: str) -> Iterator[Path]:
    """The control groups of this process: its own and all that hold it, of both versions.

    Slurm limits a job and puts its processes into groups below.
    """
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    own = {names: path for _, names, path in (line.split(":", 2) for line in lines)}
    v1 = next((path for names, path in own.items() if controller in names.split(",")), "")
    for folder, path in ((cgroup, own.get("", "")), (cgroup / controller, v1)):
        yield folder
        for part in path.strip("/").split("/"):
            folder /= part
            yield folder


def _limit(folder: Path) -> int | None:
    """Bytes that a control group may use; None where it has no limit."""
    found = _first(folder, "memory.max", "memory.limit_in_bytes")
    # Version 1 writes no limit as a huge one.
    return found if found is not None and found < 2**60 else None


def _quota(folder: Path) -> float | None:
    """Cores that a control group may use; None where it has no limit."""
    try:
        limit, period = (folder / "cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        found, period_us = _first(folder, "cpu.cfs_quota_us"), _first(folder, "cpu.cfs_period_us")
        return found / period_us if found and period_us and found > 0 else None


def _cached(file: Path) -> int:
    """Bytes of files in memory that the kernel gives back when they are needed."""
    try:
        lines = dict(line.split() for line in file.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(lines.get("total_inactive_file", lines.get("inactive_file", 0)))


def _first(folder: Path, *names: str) -> int | None:
    """The number in the first of some files that holds one."""
    for name in names:
        try:
            return int((folder / name).read_text())
        except (OSError, ValueError):
            continue  # another version of cgroups, no cgroups, or "max"
    return None
