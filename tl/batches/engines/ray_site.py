"""A cluster of Ray: the way in, what it has, and what is wrong with a request."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tl.batches.errors import BatchError
from tl.config.launchers import PREFIX
from tl.config.ray import RayConfig
from tl.cores import usable_cores
from tl.display import say

ANSWER_SECONDS = 5.0
LOCAL = "127.0.0.1"
MODE, TOKEN, TOKEN_FILE = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
GB = 1024**3


def connect(asked: RayConfig) -> Any:
    """Join the cluster, or start an own Ray on this machine; returns the module `ray`.

    Raises:
        BatchError: There is no cluster, or it does not let us in.
        ModuleNotFoundError: Ray is not installed.
    """
    address = _address(asked)
    # Ray reads it when it is imported, and does so by itself for a cluster of this machine only.
    if address and _has_token():
        os.environ.setdefault(MODE, "token")
    import ray

    settings: dict[str, Any] = {"runtime_env": asked.runtime_env} if asked.runtime_env else {}
    if address:
        _knock(address)
        settings["address"] = address
    else:
        settings |= {"address": "local", "_node_ip_address": LOCAL, "include_dashboard": False}
        settings |= {"num_cpus": usable_cores()}
    if not address.startswith("ray://"):  # which hands all that is new to it to the cluster
        settings |= {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        with _own_signals():
            ray.init(**settings)
    except ray.exceptions.AuthenticationError as error:
        raise BatchError(f"{_what(address)} asks for a token: {_remedy()}") from error
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        raise BatchError(_refused(address, error)) from error
    # Of a dead node it would print a page of its log over our table; the ledger says what was lost.
    ray._private.worker.print_to_stdstream = lambda *_args, **_kwargs: None
    return ray


def _address(asked: RayConfig) -> str:
    """HOST:PORT, ray://HOST:PORT or auto; empty for an own Ray on this machine."""
    named = asked.address or os.environ.get("RAY_ADDRESS", "")
    if named == "auto":
        named = os.environ.get("RAY_ADDRESS", "") or _last() or "auto"
    return "" if named == "local" else named


def _last() -> str:
    """Where `ray start` put the address of the last cluster of this machine; it may be gone."""
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    try:
        return Path(folder, "ray", "ray_current_cluster").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _knock(address: str) -> None:
    """See that somebody listens there: Ray itself would try for ten minutes.

    Raises:
        BatchError: Nobody does, or it is no address.
    """
    if address != "auto" and (problem := address_problem(address)):
        raise BatchError(problem)


def address_problem(address: str) -> str:
    """Why there is no cluster at an address; empty where somebody listens there."""
    found = re.fullmatch(r"(?:ray://)?\[?([^\s/]+?)\]?:(\d+)", address)
    if not found:
        return f"{_what(address)}: write HOST:PORT, ray://HOST:PORT or auto"
    try:
        socket.create_connection((found[1], int(found[2])), timeout=ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return (
            f"{_what(address)}: no cluster can be reached there ({reason}). `ray start --head` "
            "prints its address; on the head `ray status` says whether it runs; without a "
            f"cluster: {PREFIX}address=local"
        )
    return ""


def _what(address: str) -> str:
    return f"hydra/launcher=ray, {PREFIX}address={address}"


def _has_token() -> bool:
    if os.environ.get(TOKEN) or os.environ.get(TOKEN_FILE):
        return True
    return (Path.home() / ".ray" / "auth_token").is_file()


def _remedy() -> str:
    return (
        "copy the file ~/.ray/auth_token of its head, or name such a file in RAY_AUTH_TOKEN_PATH, "
        "with RAY_AUTH_MODE=token"
    )


def _refused(address: str, error: Exception) -> str:
    """What to say where Ray does not connect."""
    reason = plain(error)
    if address == "auto":
        return (
            f"{_what(address)}: no Ray runs on this machine; start it with `ray start`, name the "
            f"head of a cluster, {PREFIX}address=HOST:6379, or take {PREFIX}address=local"
        )
    if isinstance(error, ConnectionError) and not address.startswith("ray://"):
        known = "another token" if _has_token() else "none"
        return (
            f"{_what(address)}: it answers, but does not let us in. Most likely it asks for its "
            f"token, and this process has {known}: {_remedy()}. From a machine that is no node of "
            "the cluster: ray://HOST:10001"
        )
    if not address:
        return f"hydra/launcher=ray: cannot start Ray on this machine: {reason}"
    return f"{_what(address)}: {reason}"


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ray would end this process at SIGTERM, and with it jobs that want to write checkpoints."""
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def plain(error: BaseException) -> str:
    """The first sentence of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    return re.split(r"(?<=\w\w)\. (?=[A-Z])", first)[0]


# --- resources ------------------------------------------------------------------------------------


def gpus(ray: Any, asked: RayConfig) -> float:
    """GPUs of a job."""
    if asked.num_gpus is not None:
        return asked.num_gpus
    return 1.0 if ray.cluster_resources().get("GPU") else 0.0


def options(asked: RayConfig, gpus: float) -> dict[str, Any]:
    """What `ray.remote` takes for a job."""
    found: dict[str, Any] = {"num_cpus": asked.num_cpus, "num_gpus": gpus}
    if asked.mem_gb:
        found["memory"] = int(asked.mem_gb * GB)
    if asked.resources:
        found["resources"] = dict(asked.resources)
    return found | asked.options


def resources(options: Mapping[str, Any]) -> dict[str, float]:
    """What a process takes, as nodes and placement groups of Ray name it."""
    named = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
    found = {name: options.get(key, 0) for name, key in named.items()}
    return {
        name: value for name, value in {**found, **options.get("resources", {})}.items() if value
    }


def check_room(ray: Any, asked: RayConfig, options: Mapping[str, Any]) -> None:
    """Whether the nodes have all that a job asks for; Ray would let it wait for ever.

    Raises:
        BatchError: They have not, and no cluster was named that may yet grow.
    """
    wanted = resources(options)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    rooms = [
        min((int(node.get(name, 0) // wanted[name]) for name in wanted), default=asked.processes)
        for node in nodes
    ]
    spread, packed = (asked.placement.value == f"STRICT_{way}" for way in ("SPREAD", "PACK"))
    room = sum(map(bool, rooms)) if spread else max(rooms, default=0) if packed else sum(rooms)
    if room >= asked.processes:
        return
    asks = ", ".join(_amount(name, value) for name, value in wanted.items())
    several = f"{asked.processes} processes, each " if asked.processes > 1 else ""
    there = "; ".join(", ".join(_amount(n, x.get(n, 0)) for n in wanted) for x in nodes)
    msg = f"Ray has no room for a job that asks for {several}{asks}; its nodes have {there}"
    if not _address(asked):
        raise BatchError(f"{msg}. Ask for less with {PREFIX}num_cpus=, num_gpus=, mem_gb=")
    say(f"warning: {msg}. The jobs wait until others join the cluster")


def _amount(name: str, value: float) -> str:
    return f"{value / GB:.1f} GB" if name == "memory" else f"{value:g} {name}"
