"""A real Ray cluster of two hosts on this one, which are `hosts.Host`s: they can go down.

    with ray_cluster() as cluster:
        cluster.one.run(["tl", "train", "-m", …, f"hydra.launcher.address={cluster.address}"])
        cluster.two.kill()                 # the node goes down, with all that runs on it

The head runs on `one`. Ray listens on all addresses of a host, so its hosts are on a network of
their own. All of it ends with the block: Ray's own `ray stop` would end every Ray of this machine.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hosts import Host, hosts, possible

RAY = Path(sys.executable).with_name("ray")
PORT = 6379
STORE_BYTES = 100_000_000  # of the store of objects; jobs of tl put nothing in it
VARIABLES = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",  # nobody is told about our tests
    # A node that does not answer is dead after seconds; Ray's own is a minute.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_memory_monitor_refresh_ms": "0",  # others may use up the memory of this machine
}


@dataclass
class RayCluster:
    """Two nodes of Ray.

    Args:
        one: Host of the head.
        two: The other host.
        address: Of the cluster, within their network.
        token: File with the token that lets a process in; the hosts' environment names it.
        folder: Ray's own files, a folder for each host.
    """

    one: Host
    two: Host
    address: str
    token: Path
    folder: Path


@contextlib.contextmanager
def ray_cluster(cpus: tuple[int, int] = (2, 2), *, bare: bool = False) -> Iterator[RayCluster]:
    """A cluster whose processes end with the block.

    Args:
        cpus: Of the nodes.
        bare: Whether `two` has a Python with Ray, but without tl.
    """
    with contextlib.ExitStack() as stack:
        # Not pytest's folder: the path of a socket holds 107 characters, and Ray adds 60.
        folder = Path(tempfile.mkdtemp(prefix="tl-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        variables = {**VARIABLES, "RAY_AUTH_TOKEN_PATH": str(token)}
        found = stack.enter_context(hosts(["one", "two"], variables))
        one, two = found["one"], found["two"]
        address = f"{one.address}:{PORT}"
        head = ("--head", f"--port={PORT}", "--include-dashboard=false")
        roles = ((one, head), (two, (f"--address={address}",)))
        for (host, role), number in zip(roles, cpus, strict=True):
            own = (
                f"--node-ip-address={host.address}",
                f"--temp-dir={folder / host.name}",
                f"--num-cpus={number}",
                f"--object-store-memory={STORE_BYTES}",
            )
            program, also = _without_tl() if bare and host is two else ([RAY], {})
            started = host.run([*program, "start", *role, *own], env={**os.environ, **also})
            assert started.returncode == 0, started.stdout + started.stderr
        yield RayCluster(one, two, address, token, folder)


def _without_tl() -> tuple[list[str], dict[str, str]]:
    """The command `ray` of a Python that has our packages, and variables for it.

    An editable installation is a file in site-packages that only its own environment reads.
    """
    packages = sysconfig.get_paths()["purelib"]
    code = "from ray.scripts.scripts import main; main()"
    return [sys._base_executable, "-c", code], {"PYTHONPATH": packages}


def missing() -> str:
    """Why there can be no cluster here; empty where there can."""
    return possible() or ("" if RAY.exists() else 'not installed: pip install "tl[ray]"')


@pytest.fixture
def cluster() -> Iterator[RayCluster]:
    """A cluster of two nodes with two cores each."""
    if reason := missing():
        pytest.skip(reason)
    with ray_cluster() as found:
        yield found
