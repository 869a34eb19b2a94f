"""How many cores and how much memory this process may use."""

from __future__ import annotations

import os
from pathlib import Path


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process may use: its CPU affinity, cut by the quota of its container."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quotas = [_quota(cgroup / "cpu.max")]
    try:
        own = Path("/proc/self/cgroup").read_text().split("::")[-1].strip().lstrip("/")
        quotas.append(_quota(cgroup / own / "cpu.max"))
        v1 = cgroup / "cpu"
        limit = int((v1 / "cpu.cfs_quota_us").read_text())
        quotas.append(limit / int((v1 / "cpu.cfs_period_us").read_text()) if limit > 0 else None)
    except (OSError, ValueError):
        pass  # cgroup v2 only, or no cgroups: what was found so far counts
    return max(1, min([cores, *(int(q) for q in quotas if q is not None)]))


def memory_limit(cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes of RAM that the container of this process may use; None: as many as there are."""
    found = []
    try:
        own = Path("/proc/self/cgroup").read_text().split("::")[-1].strip().lstrip("/")
        files = (cgroup / own / "memory.max", cgroup / "memory.max")
    except OSError:
        files = (cgroup / "memory.max",) * 2
    for file in (*files, cgroup / "memory" / "memory.limit_in_bytes"):
        try:
            found.append(int(file.read_text()))
        except (OSError, ValueError):
            continue  # another version of cgroups, no cgroups, or "max"
    real = [limit for limit in found if limit < 2**60]  # cgroup v1 writes no limit as a huge one
    return min(real, default=None)


def _quota(file: Path) -> float | None:
    try:
        limit, period = file.read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        return None
