"""What the Ray engine does on a node: in a worker of Ray, and in a process beside it.

A worker of Ray runs two dozen threads, so nothing may be forked from it. It keeps a process of its
own, which has imported what jobs need and forks one for each job, as long as the worker lives: Ray
gives the next job to the same worker.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from tl.batches.engines.together import take_part
from tl.batches.worker import Task, work
from tl.files import replacing

LOOK_SECONDS = 0.2  # Ray interrupts Python code only
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


@dataclass(frozen=True)
class Request:
    """A task, and what a node must be told to do it.

    Args:
        task: What the worker is to do.
        log: What the worker prints; its first line says where it runs.
        environment: Variables that the call of the batch has.
        rank: Of this process among those of the job.
        world: How many the job has.
    """

    task: Task
    log: Path
    environment: dict[str, str]
    rank: int = 0
    world: int = 1

    @property
    def own_log(self) -> Path:
        """That of this process."""
        return self.log.with_suffix(f".{self.rank}.txt") if self.rank else self.log


def run(request: Request, node: str, address: str) -> str:
    """Do a task in the process beside this worker of Ray.

    Args:
        request: Of the call.
        node: Ray's name of this node.
        address: By which other nodes reach it.

    Returns:
        Why the process ended; empty where it did its task.

    Raises:
        FileNotFoundError: This node does not see the folder of the batch.
    """
    place = request.task.place
    if not (place / "ledger").is_dir():
        msg = f"{platform.node()} does not see {place}: output_dir must be on a disk of all nodes"
        raise FileNotFoundError(msg)
    request.own_log.write_text(f"node {node} {platform.node()} {address}\n", encoding="utf-8")
    return _beside().do(request, {**os.environ, **request.environment})


class _Beside:
    """A process that runs the jobs of one worker of Ray, and dies with it."""

    def __init__(self) -> None:
        self.ours, theirs = Pipe()
        module = [sys.executable, "-m", "tl.batches.engines.ray_node"]
        self.process = subprocess.Popen(
            [*module, str(theirs.fileno()), str(os.getpid())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()

    def do(self, request: Request, environment: dict[str, str]) -> str:
        """Hand it a task and wait."""
        self.ours.send((request, environment))
        while True:
            try:
                answer = self._answer()
            except KeyboardInterrupt:  # ray.cancel; the job writes its checkpoint
                self.process.terminate()
                continue
            if answer is not None:
                return answer

    def _answer(self) -> str | None:
        if self.ours.poll(LOOK_SECONDS):
            try:
                found: str = self.ours.recv()
            except (EOFError, OSError):
                self.process.wait()
            else:
                return found
        code = self.process.poll()
        if code is None:
            return None
        how = f"by signal {-code}" if code < 0 else f"with code {code}"
        return f"the process that ran it on {platform.node()} was ended {how}"


_kept: list[_Beside] = []


def _beside() -> _Beside:
    """The process of this worker, a new one where it ended."""
    if not _kept or _kept[-1].process.poll() is not None:
        _kept[:] = [_Beside()]
    return _kept[-1]


# --- in the process beside ------------------------------------------------------------------------


def main() -> None:
    """Do tasks until the worker of Ray ends."""
    pipe, parent = Connection(int(sys.argv[1])), int(sys.argv[2])
    _die_with(parent)
    own = os.getpid()
    # A job that went on would take what Ray gives to others.
    os.register_at_fork(after_in_child=lambda: _die_with(own) if os.getppid() == own else None)
    while True:
        try:
            request, environment = pipe.recv()
        except EOFError:
            return
        os.environ.clear()
        os.environ.update(environment)
        pipe.send(_done(request))
        if request.rank:
            return  # the job ran in this very process


def _done(request: Request) -> str:
    """Do a task; what went wrong with it."""
    log = os.open(request.own_log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    try:
        if request.world > 1:
            _together(request)
        else:
            work(request.task)
    except Exception as error:
        traceback.print_exc()
        return str(error).split("\n")[0] or type(error).__name__
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return ""


def _together(request: Request) -> None:
    """Run a job with the processes of other tasks; each of them is a host to the others."""
    meeting, over = request.log.with_suffix(".meeting"), request.log.with_suffix(".over")
    if request.rank == 0:
        address = request.log.read_text(encoding="utf-8").split()[3]
        with socket.socket() as probe:
            probe.bind((address, 0))
            port = probe.getsockname()[1]
        with replacing(meeting) as part:
            part.write_text(f"{address} {port}", encoding="utf-8")
    while not meeting.exists():
        time.sleep(LOOK_SECONDS)
    address, port = meeting.read_text(encoding="utf-8").split()
    variables = {"RANK": request.rank, "LOCAL_RANK": 0, "MASTER_ADDR": address, "MASTER_PORT": port}
    variables |= {"WORLD_SIZE": request.world, "GROUP_WORLD_SIZE": request.world}
    os.environ.update({name: str(value) for name, value in variables.items()}, LOCAL_WORLD_SIZE="1")
    name = request.log.stem
    try:
        if request.rank:
            take_part(request.task, name, over)
        else:
            work(request.task, name)
    finally:
        if not request.rank:
            over.touch()


def _die_with(parent: int) -> None:
    """Let the kernel end this process when its parent ends."""
    ctypes.CDLL(None, use_errno=True).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        os._exit(1)


if __name__ == "__main__":
    main()
