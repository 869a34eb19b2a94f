"""Settings of `hydra/launcher=slurm`: what each job of a batch asks Slurm for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tl.config.settings import Checked, setting


@dataclass
class SlurmConfig(Checked):
    """What a job asks Slurm for; all keys stand below `hydra.launcher`."""

    partition: str | None = setting(None, "partition, or several: a,b; default: the site's")
    account: str | None = setting(None, "whose share is charged; default: yours")
    qos: str | None = setting(None, "quality of service")
    constraint: str | None = setting(None, "features that a node must have, such as a100")
    cpus_per_task: int = setting(2, "cores of a process", low=1)
    mem_gb: float | None = setting(
        None,
        "memory of a job on each of its nodes, GB; default: what the site gives; twice as much "
        "after an attempt that needed more",
        above=0,
    )
    gpus_per_node: int | None = setting(None, "GPUs on each node", low=0)
    nodes: int = setting(1, "nodes of a job: trainer=ddp or fsdp trains over them", low=1)
    tasks_per_node: int = setting(1, "processes of a job on each node: one a GPU", low=1)
    timeout_min: int | None = setting(
        None,
        "minutes after which Slurm ends a job, which then goes on in a new one; default: the "
        "limit of the partition, at most a day",
        low=1,
    )
    signal_s: int = setting(
        120, "seconds before that limit at which a job writes its checkpoint and ends", low=5
    )
    setup: list[str] = setting(
        factory=list, help="lines of the job's shell script before Python starts: module load …"
    )
    python: str | None = setting(
        None, "command that starts Python on the nodes: apptainer exec IMAGE python; default: this"
    )
    options: dict[str, Any] = setting(
        factory=dict, help="further options of sbatch by their long names: {reservation: night}"
    )
    srun: list[str] = setting(factory=list, help="further options of srun")

    def problems(self) -> list[str]:
        """The checkpoint fits before the limit."""
        if self.timeout_min is not None and self.signal_s >= self.timeout_min * 60:
            limit = f"the {self.timeout_min * 60} s of timeout_min={self.timeout_min}"
            return [f"signal_s must be below {limit}, got {self.signal_s}"]
        return []
