"""Lightning's view of the processes of a job: they are there already, and know each other."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment

from tl import ranks
from tl.training.sharding import NAME, fsdp


class Started(ClusterEnvironment):
    """Processes that `tl.ranks` has brought together, whoever started them."""

    @property
    def creates_processes_externally(self) -> bool:
        """Lightning starts none."""
        return True

    @property
    def main_address(self) -> str:
        """Host of the first process."""
        return os.environ.get("MASTER_ADDR", "127.0.0.1")

    @property
    def main_port(self) -> int:
        """Where it listens."""
        return int(os.environ.get("MASTER_PORT", "0"))

    @staticmethod
    def detect() -> bool:
        """It is given to the trainer, not found."""
        return False

    def world_size(self) -> int:
        """Of the group."""
        return ranks.world()

    def set_world_size(self, size: int) -> None:
        """It is what it is."""

    def global_rank(self) -> int:
        """In the group."""
        return ranks.rank()

    def set_global_rank(self, rank: int) -> None:
        """It is what it is."""

    def local_rank(self) -> int:
        """On this host."""
        return ranks.here().local_rank

    def node_rank(self) -> int:
        """Number of this host."""
        here = ranks.here()
        return here.rank // here.local_world


def for_processes(args: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a trainer, for the processes that there are.

    What the user left open follows them. A single one shares nothing out; only one that is left of
    several goes on as they began, as its checkpoints are theirs.

    Args:
        args: As the user asked.
    """
    found = dict(args)
    if "num_nodes" in found or ranks.grouped():
        found["num_nodes"] = ranks.here().hosts
    shared = found.get("strategy") is not None
    if not ranks.grouped() or (ranks.world() == 1 and not shared):
        if shared:
            found |= {"strategy": "auto", "devices": 1}
        return found
    if not isinstance(found.get("devices"), (list, tuple)):
        found["devices"] = ranks.here().local_world
    if found.get("strategy") == NAME:
        found |= fsdp(ranks.world())
    plugins = found.get("plugins") or []
    found["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), Started()]
    return found
