"""The group of processes of a job: how it forms, what is said in it, and whose error is shown."""

from __future__ import annotations

import json
import logging
import os
import secrets
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from tl import cores
from tl.config import Interrupted, TlError
from tl.ranks.places import Place, place

if TYPE_CHECKING:  # torch is loaded where there are several processes only
    from torch._C._distributed_c10d import Store
    from torch.distributed import ProcessGroup

P = ParamSpec("P")
T = TypeVar("T")

# The first process may read and check images for hours while the others wait for what it finds.
PATIENCE = timedelta(days=30)
ERROR = "tl/error"  # key of the group's store: what went wrong first
# What torch says where the process at the other end is gone.
GONE = ("gloo", "connection closed by peer", "connection reset by peer", "broken pipe", "nccl")


@dataclass
class _Group:
    """Processes that have found each other."""

    place: Place
    store: Store
    talk: ProcessGroup


class LostError(TlError):
    """Another process of the job is gone."""


class ElsewhereError(TlError):
    """The first process failed, and says why."""


_group: _Group | None = None
_silent = False
_alone: ContextVar[bool] = ContextVar("what the first process does alone", default=False)


# --- the group ------------------------------------------------------------------------------------


@contextmanager
def joined() -> Iterator[None]:
    """Within it the processes that were started together are one group, if there are several.

    A group lasts as long as the process: jobs of one process that follow each other share it.

    Raises:
        LostError: They do not find each other.
    """
    here = place()
    # Some platforms call every process the first of one, and say no more.
    if _group is None and here.launcher and (here.world > 1 or "MASTER_ADDR" in os.environ):
        _join(here)
    try:
        yield
    except Interrupted as stop:
        _note(stop)
        raise
    except Exception as error:
        _note(error)
        if isinstance(error, TlError) or not _gone(error):
            raise
        raise _lost(error) from error


def _join(here: Place) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    global _group
    if here.launcher == "srun":
        _address_by_slurm(here)
    gpus = torch.cuda.is_available()
    if gpus:
        torch.cuda.set_device(here.local_rank % torch.cuda.device_count())
    try:
        # A generator that holds the store of the first process open: it must live as long.
        store, rank, world = next(iter(rendezvous("env://")))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpus else "gloo", store=store, rank=rank, world_size=world
        )
        talk: Any = dist.new_group(backend="gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = str(error).split("\n")[0]
        msg = (
            f"process {here.rank} of {here.world} does not find the others at {address} "
            f"({reason}). That name must resolve, and the port be open, on all hosts"
        )
        raise LostError(msg) from error
    _group = _Group(here, store, talk)
    if rank:
        logging.disable(logging.WARNING)  # the first process warns
        warnings.simplefilter("ignore")
    if here.local_world > 1 and cores.SHARE not in os.environ:
        os.environ[cores.SHARE] = str(max(cores.usable_cores() // here.local_world, 1))
        cores.keep_to_share()


def _address_by_slurm(here: Place) -> None:
    """Where the first task waits for the others: Lightning knows the host, by the step's list.

    Its port is that of the whole Slurm job; two steps of a job must not meet at one.
    """
    from lightning_fabric.plugins.environments.slurm import SLURMEnvironment

    slurm = SLURMEnvironment(auto_requeue=False)
    os.environ.setdefault("MASTER_ADDR", slurm.main_address)
    step = os.environ.get("SLURM_STEP_ID", "")
    port = slurm.main_port + (int(step) % 1000 if step.isdigit() else 0)
    os.environ.setdefault("MASTER_PORT", str(port))
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(here.rank), str(here.world)
    os.environ["LOCAL_RANK"] = str(here.local_rank)
    os.environ["LOCAL_WORLD_SIZE"] = str(here.local_world)
    os.environ["GROUP_WORLD_SIZE"] = str(here.hosts)


def here() -> Place:
    """Where this process stands in its group; alone without one."""
    return _group.place if _group is not None and not _alone.get() else Place()


def grouped() -> bool:
    """Whether there is a group, maybe of one process that is left."""
    return _group is not None


def rank() -> int:
    """Number of this process in its group."""
    return here().rank


def world() -> int:
    """Processes of the group."""
    return here().world


def leave() -> None:
    """Take the group apart, at the end of the process."""
    global _group
    if _group is not None:
        import torch.distributed as dist

        _group = None
        with suppress(Exception):  # others may have gone before
            dist.destroy_process_group()


# --- talking --------------------------------------------------------------------------------------


def agree(value: T) -> T:
    """What the first process has."""
    if world() == 1:
        return value
    import torch.distributed as dist

    assert _group is not None
    values = [value]
    dist.broadcast_object_list(values, src=0, group=_group.talk)
    return values[0]


def gather(value: T) -> list[T]:
    """What each process has, in the order of their ranks."""
    if world() == 1:
        return [value]
    import torch.distributed as dist

    assert _group is not None
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value, group=_group.talk)
    return values


def wait() -> None:
    """Go on when all have come here."""
    gather(None)


def on_first(work: Callable[P, T]) -> Callable[P, T]:
    """Let the first process do it alone, and hand all others what it returns or raises.

    Raises:
        ElsewhereError: In the others, where the first one fails.
    """

    @wraps(work)
    def done(*args: P.args, **kwargs: P.kwargs) -> T:
        if world() == 1:
            return work(*args, **kwargs)
        if rank():
            failed, found = agree((None, None))
            if failed is not None:
                raise _raised(failed)
            return found  # type: ignore[return-value]
        try:
            with _by_itself():
                result = work(*args, **kwargs)
        except Exception as error:
            agree((said(error), None))
            raise
        agree((None, result))
        return result

    return done


@contextmanager
def _by_itself() -> Iterator[None]:
    """Talk to nobody, and use the cores of those who wait, too."""
    token = _alone.set(True)
    share = os.environ.pop(cores.SHARE, "")
    if share and _group is not None:
        os.environ[cores.SHARE] = str(int(share) * _group.place.local_world)
    try:
        yield
    finally:
        _alone.reset(token)
        if share:
            os.environ[cores.SHARE] = share


def in_turn(work: Callable[P, T]) -> Callable[P, T]:
    """Let the first process do it before all others: they find what it has fetched."""

    @wraps(work)
    def done(*args: P.args, **kwargs: P.kwargs) -> T:
        if rank() or world() == 1:
            wait()
            return work(*args, **kwargs)
        try:
            return work(*args, **kwargs)
        finally:
            wait()

    return done


def alike(work: Callable[[], T], *kinds: type[Exception]) -> T:
    """Do something in every process; where it fails in one, it fails in all.

    Args:
        work: Talks to no other process.
        kinds: Errors that the job survives; any other ends it.

    Raises:
        Exception: Of `kinds`; that of the first process that has one.
    """
    result, failure = None, None
    try:
        result = work()
    except kinds as error:
        if world() == 1:
            raise
        failure = error
    failures = gather(None if failure is None else (str(failure),))
    for text in filter(None, failures):
        raise failure or kinds[0](*text)
    return result  # type: ignore[return-value]


def sharing(folder: Path) -> list[int]:
    """Ranks of the processes that see this very folder under its name; the own one is among them.

    Those of a host do; those of different hosts where a network file system has it.
    """
    if world() == 1:
        return [0]
    word = agree(secrets.token_hex(8))
    marks = [folder / f".{word}-{number}" for number in range(world())]
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        marks[rank()].touch()
    wait()
    seen = gather([number for number, mark in enumerate(marks) if mark.exists()])
    with suppress(OSError):
        marks[rank()].unlink()
    return [n for n in range(world()) if n == rank() or seen[n] == seen[rank()] != []]


# --- errors ---------------------------------------------------------------------------------------


def silent() -> bool:
    """Whether an error that this process met was shown by another one, or will be."""
    return _silent if _group is not None else bool(place().local_rank)


def said(error: BaseException) -> dict[str, Any]:
    """What another process should know of an error."""
    code = getattr(error, "exit_code", 1)
    return {"kind": type(error).__name__, "text": str(error), "code": code}


def _raised(what: dict[str, Any]) -> TlError:
    """An error of another process, under its own name and with its exit code."""
    kind = type(what["kind"], (ElsewhereError,), {"exit_code": what["code"]})
    error: TlError = kind(what["text"])
    return error


def _note(error: BaseException) -> None:
    """The first error of the group is shown, by the process that met it; what follows from it not.

    Where the store of the group is gone with its first process, so is who would show it: then an
    error that is not a mere consequence is shown.
    """
    global _silent
    if _group is None or _group.place.world == 1:
        return
    consequence = isinstance(error, ElsewhereError) or _gone(error)
    mine = f"{_group.place.rank} {os.getpid()} {json.dumps(said(error))}"
    try:
        _group.store.set_timeout(timedelta(seconds=5))
        _silent = _group.store.compare_set(ERROR, "", mine).decode() != mine
    except Exception:  # whatever torch raises where nobody answers
        _silent = consequence and _group.place.rank > 0


def _gone(error: BaseException) -> bool:
    """Whether an error says that the process at the other end is gone."""
    import torch.distributed as dist

    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in GONE)


def _lost(error: BaseException) -> LostError:
    reason = str(error).strip().split("\n")[0]
    return LostError(
        f"a process of this job is gone or cannot be reached ({reason}). What it said itself, or "
        "the log of its host, tells why; the same command goes on from the last checkpoint"
    )
