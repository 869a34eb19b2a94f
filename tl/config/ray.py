"""Settings of `hydra/launcher=ray`: the cluster, and what each job of a batch takes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tl.config.settings import Checked, setting


@dataclass
class RayConfig(Checked):
    """A cluster of Ray and what a job takes of it; all keys stand below `hydra.launcher`."""

    address: str | None = setting(
        None,
        "HOST:PORT of the cluster's head, on a node of it; ray://HOST:PORT from elsewhere; auto: "
        "the cluster of this machine; default: RAY_ADDRESS, else an own Ray on this machine",
    )
    num_cpus: int = setting(2, "cores of a job", low=1)
    num_gpus: float | None = setting(
        None, "GPUs of a job; 0.5: two share one; default: one where the cluster has any", low=0
    )
    mem_gb: float | None = setting(None, "memory of a job, GB; default: not asked for", above=0)
    resources: dict[str, Any] = setting(
        factory=dict, help="further resources of a job, as the nodes name them: {a100: 1}"
    )
    runtime_env: dict[str, Any] = setting(
        factory=dict, help="what Ray prepares on the nodes: env_vars, working_dir, image_uri, …"
    )
    options: dict[str, Any] = setting(
        factory=dict, help="further options of ray.remote: {label_selector: {market: spot}}"
    )
