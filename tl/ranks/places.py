"""Where a process stands among those that were started together, and by whom."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

NO_ID = "none"  # torchrun's own where it was given none
JOB = "TL_JOB_ID"  # a name of the job that outlives its processes, by whoever starts them


@dataclass(frozen=True)
class Place:
    """Where this process stands among those that were started together.

    Args:
        rank: From 0.
        world: How many there are.
        local_rank: On this host, from 0.
        local_world: How many there are on this host.
        hosts: How many hosts there are.
        launcher: Who started them, as people call it; empty: nobody.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    hosts: int = 1
    launcher: str = ""


def place() -> Place:
    """Where the environment puts this process: torchrun's variables, else those of `srun`.

    Within a Slurm job only the tasks of a step belong together: its batch script is alone, however
    many tasks the job may have.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        world = _number("WORLD_SIZE", 1)
        local = _number("LOCAL_WORLD_SIZE", world)
        hosts = _number("GROUP_WORLD_SIZE", max(world // max(local, 1), 1))
        return Place(_number("RANK", 0), world, _number("LOCAL_RANK", 0), local, hosts, "torchrun")
    world = _number("SLURM_STEP_NUM_TASKS", 1)
    if world > 1 and "SLURM_PROCID" in env:
        hosts = _number("SLURM_STEP_NUM_NODES", 1)
        local = _number("SLURM_LOCALID", 0)
        return Place(_number("SLURM_PROCID", 0), world, local, world // hosts, hosts, "srun")
    return Place()


def _number(name: str, otherwise: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdigit() else otherwise


def job_ids() -> list[str]:
    """Names of the job that a process keeps when it is started again; none without a launcher.

    That of TL_JOB_ID, of torchrun's rendezvous (without one the agent, which starts its processes
    again), and of Slurm, which starts a job again under its number.
    """
    env, found = os.environ, []
    if named := env.get(JOB):
        found.append(f"named {named}")
    if run := env.get("TORCHELASTIC_RUN_ID"):
        agent = f"{socket.gethostname()} {os.getppid()} {_start(os.getppid())}"
        found.append(f"torchrun {agent if run == NO_ID else run}")
    if number := env.get("SLURM_JOB_ID"):
        found.append(f"slurm {env.get('SLURM_CLUSTER_NAME', '')} {number}")
    return found


def _start(pid: int) -> str:
    """When a process began, in ticks since the machine did: its number may be used again."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
