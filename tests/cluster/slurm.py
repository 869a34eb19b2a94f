"""A real Slurm of our own: a controller and nodes, each a host with its own network and name.

    with slurm(tmp_path) as cluster:
        cluster.run(["sbatch", "--wrap", "hostname"])       # on the host of the controller
        cluster["n2"].kill()                                # the power goes out on one node
        cluster.start("n2")                                 # and comes back

All its files are in the folder that it is given, all its networks are those of `hosts.py`: it
touches no other Slurm of this machine. The daemons are Debian's (slurmctld slurmd slurm-client
munge).

As at many sites, there is no accounting (sacct fails), a job that takes more memory than it asked
for is killed, and the job of a dead node goes back to the queue. Unlike there, a node counts as
dead after seconds, and its jobs wait seconds before they start again (`cred_expire`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hosts import Host, hosts, possible

CONTROLLER = "ctl"
PARTITION = "main"
START_SECONDS = 60  # a busy machine with two cores; a second on an idle one
DEAD_SECONDS = 20  # a node that does not answer for so long is down
AGAIN_SECONDS = 5  # its jobs start again after so long; Slurm's default is 120
# One line of Slurm's own each; what is not here is as Slurm has it.
CONFIG = f"""\
ClusterName=tl
SlurmctldHost={CONTROLLER}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={{folder}}/munge.sock,cred_expire={AGAIN_SECONDS}
StateSaveLocation={{folder}}/state
SlurmdSpoolDir={{folder}}/spool.%n
SlurmctldPidFile={{folder}}/slurmctld.pid
SlurmdPidFile={{folder}}/slurmd.%n.pid
SlurmctldLogFile={{folder}}/slurmctld.log
SlurmdLogFile={{folder}}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherParams=OverMemoryKill,UsePss
JobAcctGatherFrequency=task=1
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=batch_sched_delay=1,sched_interval=5,bf_interval=5
ReturnToService=2
SlurmdParameters=config_overrides
SlurmdTimeout={DEAD_SECONDS}
KillWait=10
MinJobAge=300
"""


@dataclass
class Slurm:
    """A running cluster.

    Args:
        folder: Of its files: logs of the daemons, `slurm.conf`.
        found: The hosts by name, the controller's too.
    """

    folder: Path
    found: dict[str, Host]

    def __getitem__(self, name: str) -> Host:
        return self.found[name]

    @property
    def login(self) -> Host:
        """Where people start their jobs from; it outlives the nodes."""
        return self.found[CONTROLLER]

    @property
    def nodes(self) -> list[str]:
        """Names of the nodes."""
        return [name for name in self.found if name != CONTROLLER]

    def run(self, args: Sequence[str | Path], **settings: Any) -> str:
        """Output of a command on the login host, without its line end."""
        done = self.login.run(args, **settings)
        assert done.returncode == 0, f"{args}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def start(self, node: str) -> None:
        """Start the daemon of a node, for the first time or after it was killed."""
        _daemon(self.found[node], ["slurmd", "-D"], self.folder / f"slurmd.{node}.out")

    def states(self) -> dict[str, str]:
        """Node -> idle, mixed, allocated, down, …; `*` behind it says that it does not answer."""
        lines = self.run(["sinfo", "--noheader", "--Node", "--format=%N %T"]).splitlines()
        return dict(line.split() for line in lines)

    def queue(self) -> dict[str, str]:
        """Job -> PENDING, RUNNING, …, for all that is in the queue."""
        lines = self.run(["squeue", "--noheader", "--format=%i %T"]).splitlines()
        return dict(line.split() for line in lines)

    def wait_for(self, state: str, node: str, seconds: float = START_SECONDS) -> None:
        """Wait until a node is in a state."""
        deadline = time.monotonic() + seconds
        while (now := self.states().get(node)) != state:
            assert time.monotonic() < deadline, f"{node} is {now}, not {state}:\n{self.logs()}"
            time.sleep(0.2)

    def logs(self) -> str:
        """The ends of all logs of its daemons."""
        files = [*sorted(self.folder.glob("*.log")), *sorted(self.folder.glob("*.out"))]
        return "\n".join(f"--- {f.name}\n{f.read_text(errors='replace')[-2000:]}" for f in files)


@contextlib.contextmanager
def slurm(
    folder: Path, nodes: Sequence[str] = ("n1", "n2"), cpus: int = 2, memory: int = 8000
) -> Iterator[Slurm]:
    """A cluster from the first idle node to the end of the block; all its jobs end with it.

    Args:
        folder: Where its files go.
        nodes: Names of its nodes.
        cpus: Of each node, whatever this machine has.
        memory: Of each node, MB.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = [CONFIG.format(folder=folder)]
    lines += [f"NodeName={n} CPUs={cpus} RealMemory={memory} State=UNKNOWN\n" for n in nodes]
    lines += [f"PartitionName={PARTITION} Nodes={','.join(nodes)} Default=YES MaxTime=INFINITE\n"]
    config = folder / "slurm.conf"
    config.write_text("".join(lines))
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    with hosts([CONTROLLER, *nodes], {"SLURM_CONF": str(config)}) as found:
        cluster = Slurm(folder, found)
        _daemon(cluster.login, _munged(folder), folder / "munged.out")
        _until((folder / "munge.sock").exists, cluster)
        _daemon(cluster.login, ["slurmctld", "-D"], folder / "slurmctld.out")
        for name in nodes:
            cluster.start(name)
        ping = ["scontrol", "ping"]
        _until(lambda: " UP" in cluster.login.run(ping).stdout, cluster)
        for name in nodes:
            cluster.wait_for("idle", name)
        yield cluster


def _munged(folder: Path) -> list[str | Path]:
    """The daemon that vouches for users: one for all hosts, as they share this file system."""
    files = {"key": "key", "socket": "sock", "pid": "pid", "log": "log", "seed": "seed"}
    options = [
        f"--{option if option == 'socket' else f'{option}-file'}={folder / f'munge.{suffix}'}"
        for option, suffix in files.items()
    ]
    return ["munged", "--foreground", "--force", *options]


def _daemon(host: Host, command: Sequence[str | Path], log: Path) -> subprocess.Popen[str]:
    with log.open("a") as out:
        settings: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out}
        return host.start(command, cwd=log.parent, **settings)


def _until(ready: Any, cluster: Slurm) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not ready():
        assert time.monotonic() < deadline, f"Slurm does not start:\n{cluster.logs()}"
        time.sleep(0.05)


def missing() -> str:
    """Why there can be no Slurm here; empty where there can."""
    programs = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client"}
    absent = [package for name, package in programs.items() if not shutil.which(name)]
    absent += ["munge"] if not shutil.which("munged") else []
    return possible() or (f"not installed: {' '.join(absent)}" if absent else "")
