"""Several hosts on this one: each has its own network, its own name and its own `/etc/hosts`.

    with hosts(["one", "two"]) as found:
        found["one"].run(["hostname"])                 # waits, as subprocess.run
        job = found["two"].start(["sleep", "100"])     # as subprocess.Popen
        found["two"].kill()                            # the host goes down: SIGKILL to all on it
        found["one"].unplug()                          # the cable is pulled; `plug` puts it back

A host is a process that holds namespaces, and nothing else: no names in the system, so sessions of
tests cannot collide, and nothing is left however a session ends. They share processor, disk and
process ids with this machine; only hosts of one call reach each other. Needs root and iproute2.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

NET = "10.77.0"
# Its input is a pipe of ours: it ends when we do, and with it the namespaces.
HOLD = 'mount --bind "$1" /etc/hosts && hostname "$2" && ip link set lo up && echo up && exec cat'


@dataclass
class Host:
    """A host of its own.

    Args:
        name: By which the others find it.
        address: By which they reach it.
        holder: Process whose namespaces it is.
        environment: Variables of all that is started on it.
    """

    name: str
    address: str
    holder: subprocess.Popen[str]
    environment: dict[str, str] = field(default_factory=dict)

    def command(self, args: Sequence[str | Path]) -> list[str]:
        """The command line that runs `args` on it, in the working directory of the caller."""
        inside = ["nsenter", f"--target={self.holder.pid}", "--net", "--uts", "--mount"]
        return [*inside, f"--wd={Path.cwd()}", "--", *map(str, args)]

    def start(self, args: Sequence[str | Path], **settings: Any) -> subprocess.Popen[str]:
        """Start a command on it; its process id is that of the command itself."""
        return subprocess.Popen(self.command(args), **self._with_defaults(settings))

    def run(self, args: Sequence[str | Path], **settings: Any) -> subprocess.CompletedProcess[str]:
        """Run a command on it and wait; default: its output is captured."""
        defaults = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 120}
        return subprocess.run(self.command(args), **self._with_defaults({**defaults, **settings}))

    def _with_defaults(self, settings: dict[str, Any]) -> dict[str, Any]:
        environment = {**(settings.pop("env", None) or os.environ), **self.environment}
        # A session of its own: what is sent to our terminal is not meant for it.
        return {"text": True, "start_new_session": True, **settings, "env": environment}

    def pids(self) -> list[int]:
        """Processes that run on it now."""
        own = _network(self.holder.pid)
        numbers = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()]
        return [n for n in numbers if n != self.holder.pid and _network(n) == own]

    def kill(self) -> list[int]:
        """End all processes on it at once with SIGKILL, as a power cut does; returns their ids."""
        ended: list[int] = []
        while found := self.pids():  # what was being forked meanwhile, too
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            ended += [pid for pid in found if pid not in ended]
        return ended

    def unplug(self) -> None:
        """Cut it off from the others; its processes go on."""
        self._link("down")

    def plug(self) -> None:
        """Connect it again."""
        self._link("up")

    def _link(self, state: str) -> None:
        subprocess.run(self.command(["ip", "link", "set", "eth0", state]), check=True)


def _network(pid: int) -> int | None:
    """Which network a process is in; None where it ended, or is about to."""
    try:
        # A process that was killed and not yet waited for has lost its namespaces already.
        return (Path("/proc") / str(pid) / "ns/net").stat().st_ino
    except OSError:
        return None


def _holder(name: str, table: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        ["unshare", "--net", "--uts", "--mount", "sh", "-c", HOLD, "sh", table, name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    if process.stdout.readline() != "up\n":
        process.wait()
        raise OSError(f"no namespaces for {name}: is this root?")
    return process


def _ip(target: subprocess.Popen[str], line: str) -> None:
    enter = ["nsenter", f"--target={target.pid}", "--net", "--"]
    subprocess.run([*enter, "ip", *line.split()], check=True)


@contextlib.contextmanager
def hosts(
    names: Sequence[str], environment: dict[str, str] | None = None
) -> Iterator[dict[str, Host]]:
    """Hosts on a network of their own, name -> host; all that runs on them ends with the block.

    Args:
        names: Plain words; they resolve on each of the hosts.
        environment: Variables of all that is started on them.
    """
    addresses = {name: f"{NET}.{number}" for number, name in enumerate(names, start=1)}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        table = folder / "hosts"
        lines = ["127.0.0.1 localhost", *(f"{a} {name}" for name, a in addresses.items())]
        table.write_text("\n".join(lines) + "\n")
        switch = stack.enter_context(_ending(_holder("switch", table)))
        _ip(switch, "link add br0 type bridge")
        _ip(switch, "link set br0 up")
        found = {}
        for number, (name, address) in enumerate(addresses.items(), start=1):
            holder = stack.enter_context(_ending(_holder(name, table)))
            _ip(switch, f"link add v{number} type veth peer name eth0 netns {holder.pid}")
            _ip(switch, f"link set v{number} master br0 up")
            _ip(holder, f"addr add {address}/24 dev eth0")
            _ip(holder, "link set eth0 up")
            found[name] = Host(name, address, holder, dict(environment or {}))
            stack.callback(found[name].kill)
        yield found


@contextlib.contextmanager
def _ending(holder: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    try:
        yield holder
    finally:
        holder.kill()
        holder.communicate()


def possible() -> str:
    """Why there can be no hosts here; empty where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in ("ip", "nsenter", "unshare") if not shutil.which(name)]
    return f"not installed: {', '.join(missing)}" if missing else ""


@pytest.fixture
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """`one` and `two`, which reach each other by these names."""
    if reason := possible():
        pytest.skip(reason)
    with hosts(["one", "two"]) as found:
        yield found["one"], found["two"]
