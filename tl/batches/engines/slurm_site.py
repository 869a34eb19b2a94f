"""Slurm's own commands: what a site offers, what is in the queue, what is wrong with a request.

No `sacct`: many sites have no accounting, and it says "completed" of a job that failed in Python.
"""

from __future__ import annotations

import difflib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tl.batches.errors import BatchError, EngineError
from tl.config.launchers import PREFIX
from tl.config.slurm import SlurmConfig

PROGRAMS = ("sbatch", "squeue", "sinfo", "scancel", "srun")
ANSWER_SECONDS = 20.0  # Slurm's commands give up after 9 s, where the site did not change that
# Between two questions about the queue, which tells of deaths only: all users ask one controller.
LOOK_SECONDS = (2.0, 15.0)
LOOK_SHARE = 0.05  # of the time that the batch runs
DAY_MINUTES = 24 * 60
# What Slurm says of a job that will not run again. A job of a dead node, or a preempted one, may.
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"}
OVER = {*ENDED, "NODE_FAIL", "PREEMPTED", "REVOKED"}
WAITS = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"}


@dataclass(frozen=True)
class Partition:
    """A partition of the site; None: that has no limit, or Slurm does not say.

    Args:
        name: Of it.
        default: Whether jobs go there that name none.
        up: Whether it takes jobs.
        minutes: A job may take.
        memory_mb: Of its largest node.
    """

    name: str
    default: bool
    up: bool
    minutes: int | None
    memory_mb: int | None


@dataclass(frozen=True)
class Queued:
    """A job as the queue knows it.

    Args:
        state: In Slurm's words.
        reason: Why it waits, or how it ended.
        memory_mb: That it asked for; None: not said.
    """

    state: str
    reason: str = ""
    memory_mb: float | None = None


def run(*command: str, seconds: float = ANSWER_SECONDS) -> str:
    """What one of Slurm's commands prints.

    Raises:
        EngineError: It failed, or the controller does not answer; says what Slurm says.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        msg = f"{command[0]} got no answer within {seconds:.0f} s"
        raise EngineError(msg) from error
    except OSError as error:
        msg = f"{command[0]}: {error.strerror}"
        raise EngineError(msg) from error
    if done.returncode:
        raise EngineError(plain(done.stderr) or f"{command[0]} ended with code {done.returncode}")
    return done.stdout


def plain(text: str) -> str:
    """What Slurm could not get over, else its first complaint; without the name of the program."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    worst = [line for line in lines if "fatal: " in line]
    return re.sub(r"^(\w+: )?((error|fatal): )?", "", (worst or lines)[0]) if lines else ""


def partitions() -> list[Partition]:
    """What the site offers.

    Raises:
        BatchError: This machine belongs to no cluster, or its controller does not answer.
    """
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    if missing:
        msg = (
            f"hydra/launcher=slurm needs Slurm, and this machine has no {missing[0]}: start the "
            "batch on a machine of the cluster, such as its login node, or choose "
            "hydra/launcher=local"
        )
        raise BatchError(msg)
    try:
        text = run("sinfo", "--noheader", "--exact", "--format=%P|%a|%l|%m")
    except EngineError as error:
        msg = (
            f"hydra/launcher=slurm: no cluster can be reached ({error}); "
            "`scontrol ping` says more; without one: hydra/launcher=local"
        )
        raise BatchError(msg) from error
    found: dict[str, Partition] = {}
    for line in text.splitlines():
        name, state, limit, memory = line.strip().split("|")
        plain_name, default = name.rstrip("*"), name.endswith("*")
        before = found.get(plain_name)
        sizes = [_number(memory), before.memory_mb if before else None]
        largest = max((size for size in sizes if size is not None), default=None)
        found[plain_name] = Partition(plain_name, default, state == "up", minutes(limit), largest)
    return list(found.values())


def minutes(text: str) -> int | None:
    """Whole minutes of a time limit as Slurm writes it; None: no limit.

    Example:
        >>> minutes("1-02:30:00"), minutes("45:00"), minutes("infinite")
        (1590, 45, None)
    """
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if not found:
        return None
    days, hours, mins, _ = (int(part or 0) for part in found.groups())
    return days * DAY_MINUTES + hours * 60 + mins


def _number(text: str) -> int | None:
    found = re.match(r"\d+", text)
    return int(found[0]) if found else None


def megabytes(text: str) -> float | None:
    """Memory as the queue writes it; None: all of the node, or per core.

    Example:
        >>> megabytes("1500M"), megabytes("2G"), megabytes("0")
        (1500.0, 2048.0, None)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)", text)
    if not found or not float(found[1]):
        return None
    return float(found[1]) * {"K": 2**-10, "M": 1.0, "": 1.0, "G": 2.0**10, "T": 2.0**20}[found[2]]


def chosen(asked: SlurmConfig, offered: Sequence[Partition]) -> list[Partition]:
    """The partitions that jobs go to.

    Raises:
        BatchError: One is unknown, takes no jobs, or allows less than is asked for.
    """
    by_name = {partition.name: partition for partition in offered}
    names = asked.partition.split(",") if asked.partition else []
    key = f"{PREFIX}partition={asked.partition}"
    listed = ", ".join(f"{p.name} (the default)" if p.default else p.name for p in offered)
    for name in names:
        if name not in by_name:
            near = difflib.get_close_matches(name, by_name, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            msg = f"{key}: the cluster has no partition {name}; {hint}there are {listed or 'none'}"
            raise BatchError(msg)
    found = [by_name[name] for name in names] or [p for p in offered if p.default]
    if not found:
        msg = f"the cluster has no default partition; choose one of {listed}: {PREFIX}partition="
        raise BatchError(msg)
    closed = [partition.name for partition in found if not partition.up]
    if closed:
        msg = f"partition {closed[0]} takes no jobs now; there are {listed}: {PREFIX}partition="
        raise BatchError(msg)
    _check_limits(asked, found)
    return found


def _check_limits(asked: SlurmConfig, found: Sequence[Partition]) -> None:
    """Slurm would let such a job wait for ever."""
    limit = most_minutes(found)
    names = ",".join(partition.name for partition in found)
    if limit is not None and (asked.timeout_min or 0) > limit:
        msg = (
            f"{PREFIX}timeout_min={asked.timeout_min}: partition {names} allows at most {limit} "
            "minutes; a job that needs longer goes on in a new one by itself"
        )
        raise BatchError(msg)
    memory = most_memory(found)
    if memory is not None and (asked.mem_gb or 0) * 1024 > memory:
        msg = (
            f"{PREFIX}mem_gb={asked.mem_gb:g}: the largest node of partition {names} has "
            f"{memory / 1024:.1f} GB"
        )
        raise BatchError(msg)


def most_minutes(found: Sequence[Partition]) -> int | None:
    """Minutes that all of these partitions allow; None: as many as you like."""
    return min((p.minutes for p in found if p.minutes is not None), default=None)


def most_memory(found: Sequence[Partition]) -> int | None:
    """MB that a node of one of these partitions has; None: not said."""
    known = [partition.memory_mb for partition in found]
    return None if None in known else max((size for size in known if size), default=None)


def check_request(script: Path) -> None:
    """Let Slurm judge a job without queueing it.

    Raises:
        BatchError: It would refuse the job.
    """
    try:
        run("sbatch", "--test-only", str(script))
    except EngineError as error:
        text = str(error)
        if "down, drained or reserved" in text:  # now; the queue waits for them
            return
        text = re.sub(r"^allocation failure: ", "", text)
        msg = (
            f"Slurm refuses these jobs: {text}. Ask for what the partition has, which `sinfo --long"
            f" --Node` shows, with {PREFIX}cpus_per_task=, mem_gb=, gpus_per_node=, nodes=, …; "
            f"the job is in {script}"
        )
        raise BatchError(msg) from error


@dataclass
class Queue:
    """The jobs of one name in the queue, asked for all at once and not too often.

    Args:
        name: Of the jobs.
    """

    name: str
    jobs: dict[str, Queued] = field(default_factory=dict)
    looks: int = 0
    _began: float = field(default_factory=time.monotonic)
    _asked: float = float("-inf")

    def look(self) -> int:
        """Ask again where the last answer is old; returns how many answers there were.

        While the controller does not answer, all is as it was: jobs go on without it.
        """
        now = time.monotonic()
        least, most = LOOK_SECONDS
        if now - self._asked < min(max((now - self._began) * LOOK_SHARE, least), most):
            return self.looks
        try:
            text = run(
                *("squeue", "--noheader", "--states=all", "--format=%A|%T|%m|%r"),
                *(f"--user={os.getuid()}", f"--name={self.name}"),
            )
        except EngineError:
            return self.looks
        finally:
            self._asked = time.monotonic()
        self.jobs, self.looks = {}, self.looks + 1
        for line in text.splitlines():
            number, state, memory, reason = line.strip().split("|", 3)
            self.jobs[number] = Queued(state, reason, megabytes(memory))
        return self.looks
