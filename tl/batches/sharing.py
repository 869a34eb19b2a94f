"""How a batch shares this machine among its jobs, by what their settings ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tl.batches.memory import GB, job_memory, surely_below
from tl.batches.resources import SPARE, Machine, Slots, machine, slots
from tl.config import BatchConfig, TrainConfig

ALL = 1_000_000  # devices
ON_GPUS = {"auto", "gpu", "cuda"}


def shares(
    config: BatchConfig,
    jobs: Sequence[TrainConfig],
    load: str,
    say: Callable[[str], None],
    at: Machine | None = None,
) -> Slots:
    """Shares of this machine for the jobs of a batch.

    What a job takes of memory is measured only where memory could be what limits their number.

    Args:
        config: Of the batch.
        jobs: That are to be run.
        load: "module:function" that imports what jobs need.
        say: Told what is measured, and what came of it.
        at: The machine; default: this one.
    """
    here = at or machine()
    gpus = max(map(gpus_wanted, jobs), default=0)
    without = slots(config.jobs, len(jobs), gpus_each=gpus, at=here)
    memory = int((config.memory_gb or 0) * GB)
    if not memory and without.count > 1:
        bounds = [surely_below(job) for job in jobs]
        known = [bound for bound in bounds if bound is not None]
        memory = max(known, default=0)
        if len(known) < len(bounds) or without.count * memory > SPARE * here.memory:
            found = job_memory(jobs, without.cores, load=load, say=say)
            memory = found.bytes
            say(found.text)
    return slots(config.jobs, len(jobs), memory=memory, gpus_each=gpus, at=here)


def gpus_wanted(job: TrainConfig) -> int:
    """GPUs that a job takes where there are any; 0: it computes on the processor.

    Example:
        >>> from tl.config import DataConfig, ModelConfig
        >>> parts = {"data": DataConfig(root="x"), "model": ModelConfig(name="x")}
        >>> gpus_wanted(TrainConfig(**parts, trainer={"accelerator": "auto", "devices": 2}))
        2
    """
    if str(job.trainer.get("accelerator", "auto")) not in ON_GPUS:
        return 0
    devices: Any = job.trainer.get("devices", 1)
    if isinstance(devices, (list, tuple)):
        return len(devices)
    if str(devices) in {"auto", "-1"}:
        return ALL
    return int(devices) if str(devices).isdecimal() else 1
