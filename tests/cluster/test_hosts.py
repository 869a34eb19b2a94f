"""The hosts that other tests stand on: apart from this machine, and together with each other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hosts import hosts, two_hosts  # noqa: F401

pytestmark = pytest.mark.cluster
SERVE = """
import socket
connection, _ = socket.create_server(("0.0.0.0", 5000)).accept()
connection.send(b"hello")
"""
ASK = "import socket; print(socket.create_connection((%r, 5000), timeout=5).recv(9).decode())"


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_hosts_have_names_and_reach_each_other_by_them(two_hosts):  # noqa: F811
    one, two = two_hosts
    assert (one.run(["hostname"]).stdout, two.run(["hostname"]).stdout) == ("one\n", "two\n")
    server = two.start(python(SERVE))
    ask = f"import time; time.sleep(1)\n{ASK % 'two'}"
    assert one.run(python(ask)).stdout == "hello\n"
    assert server.wait(timeout=10) == 0
    assert one.run(["cat", "/proc/1/comm"]).stdout  # the same machine beneath
    assert Path("/sys/fs/cgroup").is_dir()
    assert one.run(["ls", "/sys/fs/cgroup"]).stdout.split()


def test_a_killed_host_takes_its_processes_along_and_a_cut_cable_does_not(two_hosts):  # noqa: F811
    one, two = two_hosts
    kept, lost = one.start(["sleep", "60"]), two.start(["sleep", "60"])
    assert two.kill() == [lost.pid]
    assert lost.wait(timeout=5) == -9
    assert kept.poll() is None
    server = two.start(python(SERVE))
    one.unplug()
    assert one.run(python(f"import time; time.sleep(1)\n{ASK % 'two'}")).returncode == 1
    assert server.poll() is None
    one.plug()
    assert one.run(python(ASK % "two")).stdout == "hello\n"


def test_nothing_is_left_and_sessions_do_not_collide():
    with hosts(["one"]) as first, hosts(["one"]) as second:
        assert first["one"].address == second["one"].address
        left = second["one"].start(["sleep", "60"])
    assert left.wait(timeout=5) == -9
    assert first["one"].holder.poll() is not None
    names = subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout
    assert "eth0" not in {line.split(":")[1].strip() for line in names.splitlines() if "@v" in line}
