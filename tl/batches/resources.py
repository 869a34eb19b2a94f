"""How many jobs a machine holds at once, and the share of it that each of them takes.

Torch-free. Batches on one machine share it by locks in its temp folder, one for each core and each
GPU: the kernel frees them when their holder dies.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tl.batches.gpus import Gpu, visible_gpus
from tl.cores import free_memory, memory_limit, usable_cores
from tl.locks import Lock, take

if TYPE_CHECKING:
    from collections.abc import Iterator

GB = 1e9
GUARD = "slots.lock"
UNSEEN = "what other batches of this machine run is not seen"
SPARE = 0.9  # share of the memory that jobs may fill: the rest is for what else runs


def core_numbers() -> tuple[int, ...]:
    """Numbers of the cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    numbers = sorted(affinity(0)) if affinity else list(range(usable_cores()))
    return tuple(numbers[: usable_cores()])


@dataclass(frozen=True)
class Machine:
    """What this process may use of its machine.

    Args:
        cores: By affinity, container, and share of a batch.
        memory: Bytes that are free now, within the limits of a container.
        gpus: That CUDA shows to it.
    """

    cores: int
    memory: int
    gpus: tuple[Gpu, ...] = ()


@dataclass(frozen=True)
class Slots:
    """Shares of a machine.

    Args:
        count: Jobs at once.
        cores: Of each.
        gpus: That are shared out; empty: none.
        reason: What limits the count, for people.
        memory: Bytes that a job takes; 0: unknown.
        warning: What a person should know before the jobs start; empty: nothing.
        gpus_each: GPUs of a job.
        places: Numbers of the cores that are shared out. Two jobs of a scheduler on one machine
            have different ones.
    """

    count: int
    cores: int
    gpus: tuple[Gpu, ...] = ()
    reason: str = ""
    memory: int = 0
    warning: str = ""
    gpus_each: int = 1
    places: tuple[int, ...] = field(default_factory=core_numbers)


@dataclass(frozen=True)
class Slot:
    """One share, held until it is released or the process ends.

    Args:
        index: The first of its cores.
        environment: Variables by which a job keeps to its share.
        locks: That hold it; empty where the machine has no place for locks.
    """

    index: int
    environment: dict[str, str] = field(default_factory=dict)
    locks: tuple[Lock, ...] = ()

    def release(self) -> None:
        """Give it back."""
        for lock in self.locks:
            lock.release()


def machine() -> Machine:
    """What is there, now."""
    return Machine(usable_cores(), free_memory(), visible_gpus())


def slots(
    requested: int | None,
    jobs: int,
    *,
    memory: int = 0,
    gpus_each: int = 0,
    at: Machine | None = None,
) -> Slots:
    """Shares for a batch of so many jobs on this machine: as many as all of its parts hold.

    Args:
        requested: `batch.jobs`; None: as many as fit.
        jobs: Of the batch.
        memory: Bytes that a job takes; 0: unknown.
        gpus_each: That a job wants where there are any.
        at: The machine; default: this one.

    Example:
        >>> slots(None, 9, memory=4 * 10**9, at=Machine(2, 24 * 10**9)).reason
        '2 cores hold 2, 24 GB of free memory hold 5'
        >>> slots(1, 9, at=Machine(2, 24 * 10**9)).reason
        'batch.jobs=1, 2 cores hold 2'
    """
    here = at or machine()
    gpus = here.gpus if gpus_each else ()
    each = min(gpus_each, len(gpus))
    held = [(here.cores, f"{_count(here.cores, 'core')} hold{'s' * (here.cores == 1)}")]
    if memory:
        free = f"{here.memory / GB:.3g} GB of free memory hold"
        held.append((int(SPARE * here.memory // memory), free))
    if gpus:
        held.append((len(gpus) // each, f"{_count(len(gpus), 'GPU')} hold{'s' * (len(gpus) == 1)}"))
    fits = max(1, min(most for most, _ in held))
    count = min(fits, jobs, requested or fits)
    said = [f"{text} {most}" for most, text in sorted(held)]
    if requested:
        said.insert(0 if requested <= fits else len(said), f"batch.jobs={requested}")
    warning = "" if _place() else f"{_folder()} cannot be locked: {UNSEEN}"
    if memory > SPARE * here.memory:
        warning = (
            f"a job takes about {memory / GB:.3g} GB, and {here.memory / GB:.3g} GB are free: it "
            "may be killed; a smaller data.batch_size takes less"
        )
    cores = max(1, here.cores // count)
    return Slots(count, cores, gpus, ", ".join(said), memory, warning, each)


def take_slot(shares: Slots, folder: Path | None = None) -> Slot | None:
    """A free share of this machine; None where other jobs have all of it.

    Args:
        shares: What a job takes.
        folder: Of the locks; default: one of this user in the temp folder. Where it cannot be
            written, each batch is alone with itself.
    """
    place = folder or _place()
    if place is None:
        return Slot(0, _environment(shares, shares.gpus[: shares.gpus_each]))
    with _guarded(place), ExitStack() as taken:
        if not _memory_left(place, shares.memory):
            return None
        cores = _take(place, [f"slot-{core}" for core in shares.places], shares.cores, taken)
        names = [f"gpu-{gpu.name}" for gpu in shares.gpus]
        gpus = _take(place, names, shares.gpus_each if names else 0, taken)
        if cores is None or gpus is None:
            return None
        taken.pop_all()
        (core, first), *_ = cores
        claim = json.dumps({"pid": os.getpid(), "memory": shares.memory})
        with suppress(OSError):
            os.ftruncate(first.descriptor, 0)
            os.pwrite(first.descriptor, claim.encode(), 0)
        own = [shares.gpus[number] for number, _ in gpus]
        locks = tuple(lock for _, lock in (*cores, *gpus))
        return Slot(shares.places[core], _environment(shares, own), locks)


def _take(
    place: Path, names: Sequence[str], wanted: int, taken: ExitStack
) -> list[tuple[int, Lock]] | None:
    """So many of some locks, with their numbers; None where fewer are free."""
    found: list[tuple[int, Lock]] = []
    for number, name in enumerate(names):
        if len(found) == wanted:
            break
        with suppress(BlockingIOError):
            lock = take(place / f"{name}.lock")
            taken.callback(lock.release)
            found.append((number, lock))
    return found if len(found) == wanted else None


def _memory_left(place: Path, wanted: int) -> bool:
    """Whether the jobs that run leave a new one as much memory as it will want.

    A job takes its memory over minutes: what the others said that they will take counts, not what
    they have taken so far. A job alone may always run.
    """
    claims = []
    for file in place.glob("slot-*.lock"):
        try:
            take(file).release()
        except BlockingIOError:
            with suppress(OSError, ValueError):
                claims.append(int(json.loads(file.read_text())["memory"]))
        except OSError:
            continue
    if not claims or not wanted:
        return True
    import psutil

    most = min(int(psutil.virtual_memory().total), memory_limit() or 2**63)
    return sum(claims) + wanted <= SPARE * most


@contextmanager
def _guarded(place: Path) -> Iterator[None]:
    """One process at a time looks and takes."""
    lock = take(place / GUARD, wait=True)
    try:
        yield
    finally:
        lock.release()


def _folder() -> Path:
    return Path(tempfile.gettempdir(), f"tl-slots-{os.getuid()}")


def _place() -> Path | None:
    """Folder of the locks; None where there can be none."""
    folder = _folder()
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            return None
        take(folder / GUARD, wait=True).release()
    except OSError:
        return None
    return folder


def _environment(shares: Slots, gpus: Sequence[Gpu]) -> dict[str, str]:
    found = {"TL_CORES": str(shares.cores), "OMP_NUM_THREADS": str(shares.cores)}
    names = ",".join(gpu.visible_as for gpu in gpus)
    return found | ({"CUDA_VISIBLE_DEVICES": names} if names else {})


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
