"""Settings of `hydra/launcher=ray`: the cluster, and what each job of a batch takes of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from tl.config.settings import Checked, setting


class Placement(Enum):
    """Which nodes the processes of a job are on, in Ray's words."""

    PACK = "PACK"
    SPREAD = "SPREAD"
    STRICT_PACK = "STRICT_PACK"
    STRICT_SPREAD = "STRICT_SPREAD"


@dataclass
class RayConfig(Checked):
    """A cluster of Ray and what a job takes of it; all keys stand below `hydra.launcher`."""

    address: str | None = setting(
        None,
        "HOST:PORT of the cluster's head, on a node of it; ray://HOST:PORT from elsewhere; auto: "
        "the cluster of this machine; default: RAY_ADDRESS, else an own Ray on this machine",
    )
    processes: int = setting(
        1, "processes of a job, one a GPU: trainer=ddp or fsdp trains in all of them", low=1
    )
    placement: Placement = setting(
        Placement.PACK,
        "their nodes: PACK: as few as possible; SPREAD: as many; STRICT_PACK: one; STRICT_SPREAD: "
        "one each",
    )
    num_cpus: int = setting(2, "cores of a process", low=1)
    num_gpus: float | None = setting(
        None, "GPUs of a process; 0.5: two share one; default: one where the cluster has any", low=0
    )
    mem_gb: float | None = setting(None, "memory of a process, GB; default: not asked for", above=0)
    resources: dict[str, Any] = setting(
        factory=dict, help="further resources of a process, as the nodes name them: {a100: 1}"
    )
    runtime_env: dict[str, Any] = setting(
        factory=dict, help="what Ray prepares on the nodes: env_vars, working_dir, image_uri, …"
    )
    options: dict[str, Any] = setting(
        factory=dict, help="further options of ray.remote: {label_selector: {market: spot}}"
    )
