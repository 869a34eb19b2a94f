"""One job over two hosts by torchrun: the figures of one process, whatever dies on the way."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
import pytest
from hosts import Host, two_hosts  # noqa: F401

pytestmark = pytest.mark.cluster

PORT = 29400
# What the docs tell people to set.
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
SECONDS = 400
STEPS = 20
FIGURES = ("val/loss", "val/acc", "test/loss", "test/acc")


def settings(images: Path, folder: Path, *more: str) -> list[str]:
    """Two phases of ten steps; no batch can be shared out evenly to the end of an epoch."""
    return [
        "train",
        f"data.root={images}",
        "model=test_resnet",
        "model.weights=none",
        "finetune=lp_ft",
        "finetune.epochs=2",
        "finetune.head_lr=0.01",
        "finetune.lr_ratio=1",
        "finetune.batch_norm=frozen",
        "finetune.patience=0",
        "data.batch_size=16",
        "data.num_workers=0",
        "cache.mode=off",
        "logger=csv",
        f"output_dir={folder}",
        *more,
    ]


@pytest.fixture
def images(image_folder) -> Path:
    """69 images to train on: four steps of 16, and one of 5, which two cannot share evenly."""
    return image_folder(splits={"train": 23, "val": 7, "test": 5})


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where the jobs write: shared by the hosts, as a network file system would be."""
    return tmp_path


def environment(place: Path, name: str) -> dict[str, str]:
    own = {
        "TL_CACHE_DIR": str(place / f"cache-{name}"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{place / f'{name}.db'}",
        "OMP_NUM_THREADS": "1",
    }
    return {**os.environ, **OWN_STORE, **own}


def alone(images: Path, place: Path, *more: str) -> Path:
    """The run of a single process."""
    folder = place / "alone"
    command = [sys.executable, "-m", "tl", *settings(images, folder, "trainer=cpu", *more)]
    done = subprocess.run(
        command, env=environment(place, "alone"), capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Torchrun:
    """One job on two hosts.

    Args:
        hosts: Where it runs; the first one is where they meet.
        arguments: Of `tl`.
        place: For logs.
        nodes: As `--nnodes`.
    """

    def __init__(
        self, hosts: Sequence[Host], arguments: list[str], place: Path, nodes: str = "2"
    ) -> None:
        self.hosts, self.arguments, self.place, self.nodes = hosts, arguments, place, nodes
        self.agents: list[subprocess.Popen[str]] = []
        self.logs: list[Path] = []

    def start(self, host: Host) -> subprocess.Popen[str]:
        meet = f"{self.hosts[0].name}:{PORT}"
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", self.nodes),
            *("--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-backend", "c10d"),
            *("--rdzv-endpoint", meet, "--rdzv-id", "job"),
            *("--rdzv-conf", "join_timeout=120,last_call_timeout=5"),
            *("-m", "tl", *self.arguments),
        ]
        self.logs.append(self.place / f"{len(self.logs)}-{host.name}.log")
        with self.logs[-1].open("w") as log:
            agent = host.start(
                command, env=environment(self.place, "both"), stdout=log, stderr=subprocess.STDOUT
            )
        self.agents.append(agent)
        return agent

    def finish(self) -> None:
        """Wait for the agents that nobody killed."""
        deadline = time.monotonic() + SECONDS
        for agent in self.agents:
            code = agent.wait(timeout=max(deadline - time.monotonic(), 1))
            assert code in {0, -signal.SIGKILL}, self.said()

    def said(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text()[-6000:]}" for log in self.logs)

    def until(self, file: Path) -> None:
        """Wait until the job has written a file."""
        deadline = time.monotonic() + SECONDS
        while not file.exists():
            assert all(agent.poll() is None for agent in self.agents), self.said()
            assert time.monotonic() < deadline, f"{file} never appeared\n{self.said()}"
            time.sleep(0.02)


@contextlib.contextmanager
def job(
    hosts: Sequence[Host], images: Path, place: Path, *more: str, nodes: str = "2"
) -> Iterator[tuple[Torchrun, Path]]:
    folder = place / "both"
    arguments = settings(images, folder, "trainer=ddp", "trainer.accelerator=cpu", *more)
    run = Torchrun(hosts, arguments, place, nodes)
    for host in hosts:
        run.start(host)
    yield run, folder
    run.finish()


def workers(host: Host) -> list[int]:
    """The processes of the job, without torchrun's own."""
    found = []
    for pid in host.pids():
        with contextlib.suppress(OSError):
            line = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            if "tl" in line and "torch.distributed.run" not in line:
                found.append(pid)
    return found


def figures(folder: Path) -> dict[str, float]:
    found = json.loads((folder / "metrics.json").read_text())
    return {name: found[name] for name in FIGURES}


def curve(folder: Path) -> list[float]:
    """Loss of each step, over the phases."""
    files = sorted(folder.rglob("from_step_*/metrics.csv"))
    parts = [pd.read_csv(file)["train/loss_step"].dropna() for file in files]
    return pd.concat(parts).tolist()


def files_of(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def runs_in(store: Path) -> list[tuple[str]]:
    with contextlib.closing(sqlite3.connect(store)) as database:
        return database.execute("select status from runs").fetchall()


def test_two_hosts_train_as_one_process_does(two_hosts, images, place):  # noqa: F811
    every = "trainer.log_every_n_steps=1"
    one = alone(images, place, every)
    with job(two_hosts, images, place, every) as (_, both):
        pass
    losses = curve(one)
    assert len(losses) == STEPS
    assert curve(both) == pytest.approx(losses, abs=1e-4)
    assert losses[-1] < losses[0]
    assert figures(both) == pytest.approx(figures(one), abs=1e-4)
    assert files_of(both) == files_of(one)
    assert (both / "bundle/model.onnx").is_file()
    assert runs_in(place / "both.db") == [("FINISHED",)]


@pytest.mark.parametrize("victim", ["first", "second"])
def test_a_killed_process_comes_back(two_hosts, images, place, victim):  # noqa: F811
    longer = "finetune.epochs=12"
    one = alone(images, place, longer)
    with job(two_hosts, images, place, longer) as (run, both):
        run.until(both / "checkpoints/2-all/last.ckpt")
        (pid,) = workers(two_hosts[victim == "second"])
        os.kill(pid, signal.SIGKILL)
    assert "phase head is done already" in run.said()
    assert figures(both) == pytest.approx(figures(one), abs=1e-4)
    history = pd.read_csv(both / "history.csv")
    assert history["epoch"].tolist() == pd.read_csv(one / "history.csv")["epoch"].tolist()
    assert runs_in(place / "both.db") == [("FINISHED",)]


def test_a_host_is_replaced(two_hosts, images, place):  # noqa: F811
    longer = "finetune.epochs=12"
    one = alone(images, place, longer)
    with job(two_hosts, images, place, longer) as (run, both):
        run.until(both / "checkpoints/2-all/last.ckpt")
        two_hosts[1].kill()
        time.sleep(3)
        run.start(two_hosts[1])
    assert "phase head is done already" in run.said()
    assert figures(both) == pytest.approx(figures(one), abs=1e-4)
    assert runs_in(place / "both.db") == [("FINISHED",)]


def test_a_job_goes_on_with_the_hosts_that_are_left(two_hosts, images, place):  # noqa: F811
    longer = "finetune.epochs=12"
    one = alone(images, place, longer)
    with job(two_hosts, images, place, longer, nodes="1:2") as (run, both):
        run.until(both / "checkpoints/2-all/last.ckpt")
        two_hosts[1].kill()
    assert "phase head is done already" in run.said()
    # The batch is that of all processes, so one of them trains the same.
    assert figures(both) == pytest.approx(figures(one), abs=1e-3)
    assert runs_in(place / "both.db") == [("FINISHED",)]
