"""Workers as tasks of a Ray cluster: one a job of the batch, on whichever node has room."""

from __future__ import annotations

import os
import pickle
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tl.batches.engines import ray_site as site
from tl.batches.engines.ray_node import Request
from tl.batches.errors import BatchError, EngineError
from tl.batches.ledger import LEDGER, Ledger
from tl.batches.worker import GRACE_SECONDS, Task
from tl.config.launchers import PREFIX, launcher_config
from tl.config.ray import RayConfig

FOLDER = "ray"
LINES = 3
LOOK_SECONDS = 1.0  # between two looks at the logs of tasks that wait
NODE_SECONDS = 5.0  # between two looks at the nodes
# What jobs need of the environment of the call; the rest they find on the node, or in runtime_env.
TAKEN_ALONG = ("TL_", "MLFLOW_", "HF_", "AWS_")
RAYS_OWN = ("CUDA_VISIBLE_DEVICES", "TL_CORES")


@dataclass
class Handle:
    """A task of Ray.

    Args:
        reference: Of what it returns.
        log: That its worker writes; not there as long as it waits.
        others: References of the other processes of the job.
        group: That they are placed by.
        node: Ray's name of the node that it runs on; empty: it waits.
        ended: When, on `time.monotonic`; None: it waits or runs.
        reason: Why it ended without a word of its own.
        over: Whether all of its processes are gone.
    """

    reference: Any
    log: Path
    others: tuple[Any, ...] = ()
    group: Any = None
    node: str = ""
    ended: float | None = None
    reason: str = ""
    over: bool = False


class RayEngine:
    """Starts tasks and watches them.

    Args:
        place: Folder of the batch; all nodes see it.
        settings: See `RayConfig`.

    Raises:
        ConfigError: A setting is unknown or out of its range.
        BatchError: There is no cluster, it does not let us in, or it has no room for such a job.
        ModuleNotFoundError: Ray is not installed.
    """

    per_job = True

    def __init__(self, place: Path, **settings: Any) -> None:
        self.asked = launcher_config(RayConfig, settings)
        self.place = place.absolute()
        self.folder = self.place / LEDGER / FOLDER
        self.ray = site.connect(self.asked)
        self.gpus = site.gpus(self.ray, self.asked)
        self.options = site.options(self.asked, self.gpus)
        self._begin = self.ray.remote(on_any_node())
        self._check()
        self._handles: list[Handle] = []
        self._looked = self._counted = float("-inf")
        self._dead: set[str] = set()

    def _check(self) -> None:
        """Let Ray judge what a job asks for.

        Raises:
            BatchError: It would refuse it, or has no room for it.
        """
        try:
            self._begin.options(**self.options)
        except (TypeError, ValueError) as error:
            msg = f"Ray refuses what a job asks for: {site.plain(error)}; see {PREFIX}options="
            raise BatchError(msg) from error
        site.check_room(self.ray, self.asked, self.options)

    def start(self, task: Task) -> Handle:
        """Hand a worker to Ray, which queues it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / f"{task.session}-{len(self._handles)}.txt"
        own = {name: value for name, value in task.environment.items() if name not in RAYS_OWN}
        task = replace(task, place=self.place, environment=own)
        request = Request(task, log, self._environment(), world=self.asked.processes)
        try:
            handle = self._together(request) if request.world > 1 else self._alone(request)
        except self.ray.exceptions.RayError as error:
            raise EngineError(f"Ray does not take a job: {site.plain(error)}") from error
        self._handles.append(handle)
        return handle

    def _alone(self, request: Request, **where: Any) -> Handle:
        options = {"name": f"tl {self.place.name}", "max_retries": 0, **self.options, **where}
        begin = self._begin.options(**options)
        return Handle(begin.remote(version("tl"), pickle.dumps(request)), request.log)

    def _together(self, request: Request) -> Handle:
        """Several processes, which Ray begins all or none of."""
        util, task = self.ray.util, request.task
        # When one of them goes all end, and all are begun again: an attempt is a group.
        entry = Ledger(self.place).read((task.keys or ("",))[0])
        tries = task.rules.failures(entry) + 1 if entry else 1
        task = replace(task, rules=replace(task.rules, attempts=tries))
        bundles = [site.resources(self.options)] * request.world
        group = util.placement_group(bundles, strategy=self.asked.placement.value)
        begun = [
            self._alone(
                replace(request, task=task, rank=rank),
                scheduling_strategy=util.scheduling_strategies.PlacementGroupSchedulingStrategy(
                    placement_group=group, placement_group_bundle_index=rank
                ),
            )
            for rank in range(request.world)
        ]
        others = tuple(handle.reference for handle in begun[1:])
        return replace(begun[0], others=others, group=group)

    def _environment(self) -> dict[str, str]:
        cores = str(self.asked.num_cpus)
        found = {
            name: value
            for name, value in os.environ.items()
            if name.startswith(TAKEN_ALONG) and name not in RAYS_OWN
        }
        found |= {"TL_CORES": cores, "OMP_NUM_THREADS": cores}
        # Ray hides the GPUs of others from those who asked for one only.
        return found if self.gpus else found | {"CUDA_VISIBLE_DEVICES": ""}

    def alive(self, handle: Handle) -> bool:
        """Whether it waits or runs, as far as Ray knows."""
        if handle.ended is None:
            ready, _ = self.ray.wait([handle.reference], timeout=0, fetch_local=False)
            if ready:
                handle.ended, handle.reason = time.monotonic(), self._outcome(handle)
            elif not self.waits(handle) and self._is_dead(handle.node):
                # Ray itself would wait minutes for an answer of a node whose network is gone.
                handle.ended, handle.reason = time.monotonic(), "Ray lost its node"
        if handle.ended is not None and not handle.over:
            handle.over = handle.group is None or self._disbanded(handle, handle.ended)
        return not handle.over

    def _disbanded(self, handle: Handle, since: float) -> bool:
        """Whether the other processes have ended, which are nothing without the first."""
        others = [*handle.others]
        _, left = self.ray.wait(others, num_returns=len(others), timeout=0, fetch_local=False)
        if left and time.monotonic() - since < GRACE_SECONDS:
            return False
        self.ray.util.remove_placement_group(handle.group)
        return True

    def _outcome(self, handle: Handle) -> str:
        """Why a task ended without a word of its own; empty where it did what it was to do."""
        errors = self.ray.exceptions
        try:
            return str(self.ray.get(handle.reference))
        except errors.TaskCancelledError:
            return "cancelled"
        except errors.RayTaskError as error:
            return site.plain(error.cause or error)
        except errors.RayError as error:
            return f"Ray: {type(error).__name__}: {site.plain(error)}"

    def _is_dead(self, node: str) -> bool:
        now = time.monotonic()
        if now - self._counted > NODE_SECONDS:
            self._counted = now
            self._dead = {n["NodeID"] for n in self.ray.nodes() if not n["Alive"]}
        return node in self._dead

    def waits(self, handle: Handle) -> bool:
        """Whether no node has begun it."""
        if not handle.node and handle.ended is None:
            self._look()
        return not handle.node and handle.ended is None

    def _look(self) -> None:
        """Learn from their logs which tasks were begun, and where."""
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        begun = {path.name for path in self.folder.glob("*.txt")}
        for handle in self._handles:
            if not handle.node and handle.log.name in begun:
                found = re.match(r"node (\w+) .*\n", handle.log.read_text(encoding="utf-8"))
                handle.node = found[1] if found else ""

    def said(self, handle: Handle) -> str:
        """Why it ended, else the last lines of its log."""
        if handle.reason or not handle.log.is_file():
            return handle.reason
        lines = handle.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return "\n".join(lines[1:][-LINES:])

    def why(self, handle: Handle) -> str:
        """Why Ray ended it; empty where it is not known."""
        return handle.reason

    def kill(self, handle: Handle) -> None:
        """Take it out of the queue; a job that runs writes its checkpoint."""
        for reference in (handle.reference, *handle.others):
            self.ray.cancel(reference, force=False, recursive=False)

    def close(self) -> None:
        """Leave the cluster; what still runs there would be killed, so let it end first."""
        deadline = time.monotonic() + GRACE_SECONDS
        while any(map(self.alive, self._handles)) and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)
        self.ray.shutdown()


def on_any_node() -> Callable[[str, bytes], str]:
    """What Ray runs; it travels as code, so that it can say where there is no tl."""

    def begin(wanted: str, request: bytes) -> str:
        import pickle
        import platform
        import sys
        from importlib.metadata import version as installed

        import ray

        here = f"{platform.node()} ({sys.executable})"
        try:
            from tl.batches.engines.ray_node import run
        except ImportError as error:
            msg = f"{here} cannot import tl ({error}); install tl {wanted} on all nodes"
            raise RuntimeError(msg) from None
        if installed("tl") != wanted:
            msg = f"{here} has tl {installed('tl')}, not {wanted}: install one version everywhere"
            raise RuntimeError(msg)
        util: Any = ray.util
        node = ray.get_runtime_context().get_node_id()
        return run(pickle.loads(request), node, util.get_node_ip_address())

    return begin
