"""Loader processes: how many, and one clear message when one of them dies."""

from __future__ import annotations

import logging
import multiprocessing.connection
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from tl.config import TlError
from tl.cores import memory_limit, usable_cores
from tl.data.errors import DataError
from tl.data.metering import Meter
from tl.data.sampling import EpochSampler

log = logging.getLogger(__name__)

MAX_WORKERS = 8
FEW_IMAGES = 64  # starting workers costs more than they save below this
PREFETCH = 2
SHARED_MEMORY = Path("/dev/shm")
DYING_SECONDS, EXIT_SECONDS = 1.0, 0.2
STOP_SECONDS = 8  # that a loader process lives on after a SIGTERM
GB = 1e9
# What torch says of its workers, in Python and in C++.
DEAD = re.compile(r"DataLoader worker \(pid(?:\(s\))? (?P<pids>[\d, ]+)\)(?P<rest>.*)", re.DOTALL)
FULL = ("shared memory", "unable to write to file </torch_", "unable to mmap", "/torch_")


class LoaderError(TlError):
    """A loader process died, or cannot hand over what it read; says why and what to change."""


class ImageLoader(DataLoader[dict[str, Any]]):
    """A `DataLoader` whose errors are one message: no traceback of a worker.

    It can go on in the middle of an epoch, as Lightning asks of a resumed fit: its state is the
    number of batches that it handed out.

    Raises:
        DataError: An image went bad.
        LoaderError: A loader process died, wherever the main process is at that moment.
    """

    _handed = 0
    meter: Meter | None = None  # of the last pass

    def state_dict(self) -> dict[str, int]:
        """Batches of the running epoch that were handed out; 0 after its last one."""
        return {"batches": 0 if self._handed >= len(self) else self._handed}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Begin the next epoch after that many batches."""
        assert isinstance(self.sampler, EpochSampler)
        assert self.batch_size is not None
        self._handed = state_dict["batches"]
        self.sampler.skip = self._handed * self.batch_size

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override] # a generator round torch's
        skipped = isinstance(self.sampler, EpochSampler) and self.sampler.skip > 0
        self._handed = self._handed if skipped else 0
        self.meter = meter = Meter(self.num_workers)
        batches = super().__iter__()
        if isinstance(batches, _MultiProcessingDataLoaderIter):
            _listen(self.num_workers)
        try:
            asked = time.perf_counter()
            for number, batch in enumerate(batches):
                self._handed += 1
                got = time.perf_counter()
                yield batch
                now = time.perf_counter()
                if number:
                    meter.images += len(batch["index"])
                    meter.waited += got - asked
                    meter.worked += now - got
                asked = now
        except (TlError, RuntimeError, OSError, EOFError) as error:
            found = _cause(error, batches, self.num_workers)
            if found is None:
                raise
        else:
            return
        # Workers that are left to the garbage collector, as a traceback does, take 5 seconds each.
        if isinstance(batches, _MultiProcessingDataLoaderIter):
            with _unheard():
                batches._shutdown_workers()
            self._iterator = None
        raise found from None


def _cause(error: Exception, batches: object, workers: int) -> TlError | None:
    """What a person should know of an error of a loader; None: it is of something else."""
    if isinstance(error, DataError):  # a worker puts its traceback round the message
        return DataError(str(error).split(f"{DataError.__name__}: ")[-1].strip())
    if isinstance(error, TlError):
        return error
    if isinstance(error, RuntimeError):
        return explained(str(error), workers, _exit_codes(batches))
    # A batch that a worker had announced could not be fetched from it: has it died?
    with _unheard():
        processes = getattr(batches, "_workers", [])
        multiprocessing.connection.wait([w.sentinel for w in processes], DYING_SECONDS)
        time.sleep(EXIT_SECONDS)  # its files are closed before it can be seen to have ended
        dead = [str(w.pid) for w in processes if w.exitcode]
        text = f"DataLoader worker (pid(s) {', '.join(dead)}) exited unexpectedly"
        return explained(text, workers, _exit_codes(batches)) if dead else None


def _exit_codes(batches: object) -> dict[int, int]:
    """Exit code of each loader process that has ended, by its id; below 0: the signal."""
    workers = getattr(batches, "_workers", [])
    return {w.pid: w.exitcode for w in workers if w.pid and w.exitcode is not None}


class _Handler:
    """Torch's handler of SIGCHLD, with words for a person.

    It raises in whatever the main process does when a worker dies.
    """

    def __init__(self, of_torch: Callable[[int, FrameType | None], Any]) -> None:
        self.of_torch = of_torch
        self.workers = 0
        self.silent = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.silent:
            return
        try:
            self.of_torch(number, frame)
        except RuntimeError as error:
            found = explained(str(error), self.workers, {})
            if found is None:
                raise
            raise found from None


def _listen(workers: int) -> None:
    """Put our handler before torch's, which torch sets with the first workers of a process."""
    if threading.current_thread() is not threading.main_thread():
        return
    handler = signal.getsignal(signal.SIGCHLD)
    if not isinstance(handler, _Handler) and callable(handler):
        handler = _Handler(handler)
        signal.signal(signal.SIGCHLD, handler)
    if isinstance(handler, _Handler):
        handler.workers = workers


@contextmanager
def _unheard() -> Iterator[None]:
    """Let no death of a worker interrupt the search for dead ones, or the end of the others."""
    handler = signal.getsignal(signal.SIGCHLD)
    if not isinstance(handler, _Handler):
        yield
        return
    handler.silent = True
    try:
        yield
    finally:
        handler.silent = False


def explained(text: str, workers: int, exit_codes: dict[int, int]) -> LoaderError | None:
    """What a RuntimeError of torch says about loader processes; None: something else.

    Args:
        text: Its message.
        workers: Loader processes that there were.
        exit_codes: Of those that have ended; below 0: the signal.
    """
    fewer = f"data.num_workers={workers // 2} (now {workers})"
    if not (dead := DEAD.search(text)):
        if any(sign in text for sign in FULL):
            return LoaderError(f"{_shared_memory()}. {_more_shared_memory()}")
        if "ancdata" in text or "Too many open files" in text:
            return LoaderError(
                "the loader processes have too many open files: raise the limit (ulimit -n 65536), "
                f"or use fewer of them, {fewer}"
            )
        return None
    pids = [int(pid) for pid in dead["pids"].split(",")]
    who = f"a loader process (pid {dead['pids']})"
    killed_by = next((-exit_codes[pid] for pid in pids if exit_codes.get(pid, 0) < 0), 0)
    name = str(signal.strsignal(killed_by)) if killed_by else dead["rest"]
    if str(signal.strsignal(signal.SIGBUS)) in name:
        return LoaderError(
            f"{who} died of a bus error (SIGBUS): {_shared_memory()}. {_more_shared_memory()}"
        )
    if str(signal.strsignal(signal.SIGKILL)) in name:
        return LoaderError(
            f"{who} was killed (SIGKILL), as the kernel does when memory runs out: {_memory()}. "
            f"Use fewer loader processes, {fewer}, a smaller data.batch_size, or give the job "
            "more RAM"
        )
    crashed = re.sub(r"\s+", " ", name).strip(" .") or "without a word"
    return LoaderError(
        f"{who} died ({crashed.removeprefix('is killed by signal: ')}). data.num_workers=0 reads "
        "in the main process, where the error itself can be seen"
    )


def _shared_memory() -> str:
    if not SHARED_MEMORY.is_dir():
        return "shared memory is full"
    room = shutil.disk_usage(SHARED_MEMORY)
    left = f"{room.free / GB:.3g} of {room.total / GB:.3g} GB are free"
    return f"shared memory ({SHARED_MEMORY}), in which batches wait, is full or was ({left} now)"


def _more_shared_memory() -> str:
    return (
        "Give the container more (docker run --shm-size=2g; in Kubernetes a volume of medium "
        f"Memory at {SHARED_MEMORY}), or read in the main process: data.num_workers=0"
    )


def _memory() -> str:
    free, limit = psutil.virtual_memory().available, memory_limit()
    text = f"{free / GB:.3g} GB of RAM are free now"
    return text if limit is None else f"{text}, and the container may use {limit / GB:.3g} GB"


def _start_worker(_: int) -> None:
    # Ctrl-C reaches the whole process group; the main process alone decides how to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # So does SIGTERM where Slurm sends it: the main process needs the batches of its last step.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(STOP_SECONDS))


def loader_settings(workers: int) -> dict[str, Any]:
    """What all loaders of images have in common."""
    return {
        "num_workers": workers,
        "worker_init_fn": _start_worker,
        "prefetch_factor": PREFETCH if workers else None,
        "pin_memory": torch.cuda.is_available(),
    }


def default_workers(images: int, batch_bytes: int) -> int:
    """Loader processes: the usable cores, fewer where images or shared memory are few.

    Args:
        images: How many a pass over the loader reads.
        batch_bytes: Size of one batch; batches wait in shared memory, which containers keep small.
    """
    if images < FEW_IMAGES:
        return 0
    workers = min(usable_cores(), MAX_WORKERS)
    if SHARED_MEMORY.is_dir():
        room = shutil.disk_usage(SHARED_MEMORY).free // (2 * (PREFETCH + 1) * batch_bytes)
        if room < workers:
            log.warning(
                "%s has room for the batches of %d workers only (docker run --shm-size)",
                SHARED_MEMORY,
                room,
            )
        workers = min(workers, int(room))
    return workers
