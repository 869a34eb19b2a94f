"""How many jobs a machine holds at once, and the share of it that each of them takes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tl.cores import usable_cores
from tl.locks import Lock, take


@dataclass(frozen=True)
class Slots:
    """Shares of a machine.

    Args:
        count: Jobs at once.
        cores: Of each.
        gpus: Names of the GPUs that are shared out, one to a job; empty: none.
        reason: What limits the count, for people.
    """

    count: int
    cores: int
    gpus: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class Slot:
    """One share, held until it is released or the process ends.

    Args:
        index: From 0.
        environment: Variables by which a job keeps to its share.
        lock: That holds it; None where the machine has no place for locks.
    """

    index: int
    environment: dict[str, str]
    lock: Lock | None

    def release(self) -> None:
        """Give it back."""
        if self.lock is not None:
            self.lock.release()


def slots(requested: int | None, jobs: int) -> Slots:
    """Shares for a batch of so many jobs on this machine."""
    cores = usable_cores()
    count = max(1, min(requested or cores, jobs))
    reason = f"batch.jobs={requested}" if requested else f"{cores} cores"
    return Slots(count, max(1, cores // count), reason=reason)


def take_slot(shares: Slots, folder: Path | None = None) -> Slot | None:
    """A free share of this machine; None where other jobs have all of them."""
    place = folder or Path(tempfile.gettempdir(), f"tl-slots-{os.getuid()}")
    place.mkdir(exist_ok=True)
    for index in range(shares.count):
        try:
            lock = take(place / f"slot-{index}.lock")
        except BlockingIOError:
            continue
        return Slot(index, _environment(shares, index), lock)
    return None


def _environment(shares: Slots, index: int) -> dict[str, str]:
    found = {"TL_CORES": str(shares.cores), "OMP_NUM_THREADS": str(shares.cores)}
    names: Sequence[str] = shares.gpus
    return found | ({"CUDA_VISIBLE_DEVICES": names[index % len(names)]} if names else {})
