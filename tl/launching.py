"""One job in several processes: who starts them, and what they are told.

Lightning would start a script again for each further device when its trainer is made: in the middle
of the job, with all that came before it once more. Here they are there from the beginning. Without
`torchrun` or `srun` around it a job of several devices starts its processes by torch's elastic
agent, waits for them, and starts them again from the last checkpoint where one of them was killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import traceback
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tl import ranks, stopping
from tl.config import ConfigError, Interrupted, TlError, TrainConfig, to_yaml, validate
from tl.cores import SHARE, usable_cores
from tl.environment import environment
from tl.files import replacing

if TYPE_CHECKING:
    from tl.runs import TrainResult

AGAIN = 3  # times that killed processes are started again
STOP_SECONDS = 120  # that they have to write their state: whoever stops the job allows less
MODULE = "tl.pipelines.together"
CONFIG, RESULT, FAILURE = "config.yaml", "result.json", "failure.json"
SPAWNS = ("spawn", "fork", "notebook")
# torch's agent then makes a store for each round: with the shared one a host that takes the place
# of another waits for an address that nobody publishes.
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
SHARED = "trainer=ddp or trainer=fsdp share a job out"


def processes(trainer: Mapping[str, Any], batch_size: int) -> int:
    """How many processes a job must start here; 1: none, it is one process or was started so.

    Args:
        trainer: As the user asked.
        batch_size: Over all processes; each gets one image of a step at least.

    Raises:
        ConfigError: It contradicts how the job was started, or cannot be had.
    """
    place = ranks.place()
    devices, hosts = _devices(trainer), _whole(trainer.get("num_nodes"))
    problems = _impossible(trainer)
    if place.launcher:
        problems += [*_contradictions(trainer, place), *_too_many(place.world, batch_size)]
        if problems:
            raise ConfigError(problems)
        return 1
    if (hosts or 1) > 1:
        problems.append(
            f"trainer.num_nodes={hosts} needs the command on each of the hosts: torchrun "
            f"--nnodes {hosts} --nproc-per-node {devices or 'N'} --rdzv-backend c10d "
            "--rdzv-endpoint FIRST_HOST:29400 --rdzv-id NAME -m tl train …, or srun "
            f"--nodes {hosts} tl train … (docs/distributed.md)"
        )
    number = devices or _all_devices(trainer)
    problems += _too_many(number, batch_size)
    if problems:
        raise ConfigError(problems)
    return number


def _too_many(number: int, batch_size: int) -> list[str]:
    if number <= batch_size:
        return []
    return [
        f"data.batch_size={batch_size} is that of all processes together, and there are {number}: "
        "each needs an image"
    ]


def _impossible(trainer: Mapping[str, Any]) -> list[str]:
    name = str(trainer.get("strategy") or "")
    problems = []
    if any(way in name for way in SPAWNS):
        problems.append(
            f"trainer.strategy={name} starts processes in the middle of the job: use ddp or fsdp"
        )
    if trainer.get("sync_batchnorm"):
        problems.append(
            "trainer.sync_batchnorm: torch's own layers would take the place of timm's, which hold "
            "activations, too. Leave it out: finetune.batch_norm=frozen needs no statistics"
        )
    return problems


def _contradictions(trainer: Mapping[str, Any], place: ranks.Place) -> list[str]:
    """What the user asked against what was started."""
    devices, hosts = _devices(trainer), _whole(trainer.get("num_nodes"))
    if place.world == 1 and (devices or 1) == 1 and (hosts or 1) == 1:
        return []
    problems = []
    if place.world != place.local_world * place.hosts:
        problems.append(
            f"{place.launcher} started {place.world} processes on {place.hosts} hosts: each host "
            "must have as many"
        )
    if devices is not None and devices != place.local_world:
        plain = "strategy" not in trainer
        hint = SHARED if plain else "leave it out, and it follows"
        problems.append(
            f"trainer.devices={devices}, but {place.launcher} started {place.local_world} "
            f"process{'es' * (place.local_world != 1)} on each host: {hint}"
        )
    if hosts is not None and hosts != place.hosts:
        problems.append(
            f"trainer.num_nodes={hosts}, but {place.launcher} runs on {place.hosts} host"
            f"{'s' * (place.hosts != 1)}: leave it out, and it follows the hosts that are there"
        )
    return problems


def _whole(value: Any) -> int | None:
    """A number of the trainer; None where it is left open."""
    text = str(value)
    return int(text) if text.isdigit() and int(text) else None


def _devices(trainer: Mapping[str, Any]) -> int | None:
    """Devices of a host; None: all of them."""
    value = trainer.get("devices")
    if isinstance(value, (list, tuple)):
        return len(value)
    if isinstance(value, str) and "," in value:
        return len([part for part in value.split(",") if part.strip()])
    return _whole(value)


def _all_devices(trainer: Mapping[str, Any]) -> int:
    """What `devices=auto` means here: each GPU, or one process on the processor."""
    if "strategy" not in trainer or trainer.get("accelerator") == "cpu":
        return 1
    import torch

    return max(torch.cuda.device_count(), 1)


# --- the processes of one host --------------------------------------------------------------------


def launch(config: TrainConfig, number: int) -> TrainResult:
    """Run a job in so many processes on this host, and hand back what it found.

    Args:
        config: Of the job.
        number: Of processes.

    Raises:
        TlError: The job failed; with the exit code and the words of the process that failed.
        Interrupted: SIGTERM or Ctrl-C came; the processes have written their state.
    """
    job = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="tl-") as name:
        place = Path(name)
        (place / CONFIG).write_text(to_yaml(config), encoding="utf-8")
        for left in range(AGAIN, -1, -1):
            (place / FAILURE).unlink(missing_ok=True)
            ended, killed = _run(place, job, number)
            failure = _read(place / FAILURE)
            if failure is None and not ended:
                return _result(place / RESULT)
            # Where one was killed, the others were stopped, too, and some found it gone.
            follows = {ranks.LostError.__name__, *([Interrupted.__name__] if killed else [])}
            if failure and failure["kind"] not in follows:
                _raise(failure)
            if not left:
                msg = f"{ended}, after {AGAIN} new starts; resume= goes on where it stopped"
                raise TlError(msg)
            print(f"{ended}: starting again at the last checkpoint", file=sys.stderr, flush=True)
    raise AssertionError("the last round returns or raises")


def _run(place: Path, job: str, number: int) -> tuple[str, bool]:
    """Start the processes and wait.

    Returns:
        How one of them failed, empty where none did; and whether a signal killed it.
    """
    import logging

    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=number,
        run_id=job,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,  # only what was killed is worth another try, and the agent starts all again
        shutdown_timeout=STOP_SECONDS,
    )
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    share = str(max(usable_cores() // number, 1))
    variables = {"OMP_NUM_THREADS": share, **os.environ, SHARE: share, OWN_STORE: "1"}
    try:
        with environment(variables):
            elastic_launch(settings, sys.executable)("-m", MODULE, str(place))
    except ChildFailedError as error:
        ended = {rank: failure.exitcode for rank, failure in error.failures.items()}
        rank = min(ended, key=lambda r: ended[r] >= 0)  # a signal is the cause of all others
        if ended[rank] >= 0:
            return f"process {rank} ended with code {ended[rank]}", False
        return f"process {rank} was killed ({signal.Signals(-ended[rank]).name})", True
    except SignalException as stop:
        failure = _read(place / FAILURE) or {}
        raise Interrupted(failure.get("text", "")) from stop
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    return "", False


def _read(file: Path) -> dict[str, Any] | None:
    """What a process left in a file; None where it left none."""
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values


def _result(file: Path) -> TrainResult:
    from tl.runs import TrainResult

    values = _read(file)
    if values is None:
        raise TlError("the processes of the job ended without a result")
    bundle = values["bundle"]
    paths = {"output_dir": Path(values["output_dir"]), "bundle": bundle and Path(bundle)}
    return TrainResult(**{**values, **paths})


def _raise(failure: Mapping[str, Any]) -> NoReturn:
    """The error of a process, under its own name and with its exit code."""
    if failure["kind"] == Interrupted.__name__:
        raise Interrupted(failure["text"])
    kind = type(failure["kind"], (TlError,), {"exit_code": failure["code"]})
    raise kind(failure["text"])


def serve(place: Path, train: Callable[[TrainConfig], TrainResult]) -> int:
    """What one of the started processes does; returns its exit code.

    Args:
        place: Folder that `launch` made.
        train: Does the job.
    """
    from omegaconf import DictConfig, OmegaConf

    stopping.install()
    failure: BaseException | None = None
    try:
        text = (place / CONFIG).read_text(encoding="utf-8")
        config = validate(DictConfig(OmegaConf.create(text)), TrainConfig)
        with ranks.joined():
            result = train(config)
            if ranks.rank() == 0:
                _write(place / RESULT, asdict(result))
            ranks.wait()
    except (Exception, Interrupted) as error:
        failure = error
    if failure is not None and not ranks.silent():
        said = {**ranks.said(failure), "code": 130 if isinstance(failure, Interrupted) else 1}
        if isinstance(failure, TlError):
            said["code"] = failure.exit_code
        elif isinstance(failure, Exception):
            traceback.print_exception(failure)  # a bug of ours
        _write(place / FAILURE, said)
    ranks.leave()
    return 0 if failure is None else 1


def _write(file: Path, values: Mapping[str, Any]) -> None:
    with replacing(file) as part:
        part.write_text(json.dumps(values, default=str), encoding="utf-8")
