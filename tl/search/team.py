"""The folder of a search, and the processes that work on it: one leads, others join."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from tl.config import ConfigError, SearchConfig, to_yaml, validate
from tl.runs import RunFolder, absolute, data_name, run_name
from tl.search.errors import SearchError

if TYPE_CHECKING:  # so that `tl search --help` does not load Optuna
    from optuna.storages import BaseStorage

    from tl.search.locking import Locks

CONFIG = "search.yaml"
STORAGE = "TL_SEARCH_STORAGE"  # address of the storage for our own workers: it may hold a password
# What may be otherwise when a search goes on, or when somebody joins it.
FREE = {
    *("output_dir", "resume", "tracking", "batch", "cache", "export", "checkpoint_minutes"),
    *("search.name", "search.trials", "search.workers", "search.storage", "search.study"),
    *("search.finish", "search.sampler", "search.pruner"),
}
PLACES = {"data.root", "data.table", "model.weights"}  # compared by what lies there
# Each process that torchrun or srun starts is a worker of its own, not a part of one job.
RANKS = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"),
)
SETUP_SECONDS = 3600.0  # that the first worker may look at the images


def open_search(config: SearchConfig) -> tuple[RunFolder, SearchConfig]:
    """Folder and config of a search, with absolute paths; nothing slow happens.

    The default folder is named by what is asked for, so that the same command goes on with it.

    Raises:
        SearchError: The folder holds something else, or a search of something else.
        DataError: There is no such data folder.
    """
    from tl.launching import processes

    for name in RANKS:
        os.environ.pop(name, None)
    if processes(config.trainer, config.data.batch_size) > 1:
        msg = "trainer: a trial trains in one process; search.workers=N tries N settings at once"
        raise ConfigError(msg)
    path = Path(config.output_dir or _default(config)).absolute()
    if (path / "config.yaml").exists():
        msg = f"{path} holds a run of tl train; choose another output_dir"
        raise SearchError(msg)
    from tl.data.sources import source_format  # not on the way to --help

    source_format(config.data)
    asked = replace(_full(config), output_dir=str(path))
    resumed = (path / CONFIG).is_file()
    if resumed:
        refuse_others(comparable(asked), comparable(read_config(path)), path)
    return RunFolder(path, resumed=resumed), asked


def _full(config: SearchConfig) -> SearchConfig:
    job = absolute(config)
    return replace(config, data=job.data, model=job.model)


def _default(config: SearchConfig) -> str:
    name = re.sub(r"[^\w.-]+", "_", run_name(config).replace(" · ", "_"))
    values = {**comparable(config), **{k: v for k, v in _flat(config) if k in PLACES}}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return f"runs/search_{name}_{digest[:6]}"


def write_config(folder: RunFolder, config: SearchConfig) -> None:
    """Write the config of a search, without the password of its storage."""
    from tl.tracking.store import redacted

    folder.make()
    folder.write_text(CONFIG, redacted(to_yaml(config)))


def read_config(path: Path) -> SearchConfig:
    """Config of the search in a folder."""
    return validate(DictConfig(OmegaConf.create((path / CONFIG).read_text())), SearchConfig)


def comparable(config: SearchConfig) -> dict[str, Any]:
    """Flat settings that make a search what it is."""

    def free(key: str) -> bool:
        parts = key.split(".")
        return any(".".join(parts[:n]) in FREE for n in range(1, len(parts) + 1))

    return {key: value for key, value in _flat(config) if not free(key) and key not in PLACES}


def _flat(config: SearchConfig) -> Iterator[tuple[str, Any]]:
    def walk(node: Any, path: str) -> Iterator[tuple[str, Any]]:
        if isinstance(node, Mapping) and node:
            for key, value in node.items():
                yield from walk(value, f"{path}.{key}" if path else str(key))
        else:
            yield path, node.value if isinstance(node, Enum) else node

    yield from walk(asdict(config), "")


def refuse_others(now: Mapping[str, Any], then: Mapping[str, Any], where: object) -> None:
    """Refuse to go on with a search as another one.

    Raises:
        ConfigError: Names each setting with both values.
    """
    keys = [k for k in {**then, **now} if now.get(k) != then.get(k)]
    if keys:
        lines = [
            f"{k} was {then.get(k)} when the search began, and is {now.get(k)} now" for k in keys
        ]
        lines.append(f"{where} goes on as it began: leave these out, or choose another output_dir")
        raise ConfigError(lines)


# --- who works on it ------------------------------------------------------------------------------


@dataclass
class Team:
    """This process among all that work on a search.

    Args:
        folder: Of the search.
        asked: Config of this command.
        storage: Of the study.
        locks: Shared by all.
        name: Of the study.
        lead: The lock of who leads, where that is this process.
    """

    folder: RunFolder
    asked: SearchConfig
    storage: BaseStorage
    locks: Locks
    name: str
    lead: Any = None

    @property
    def leads(self) -> bool:
        """Whether this process sets the search up and ends it."""
        return self.lead is not None

    def try_to_lead(self) -> bool:
        """Lead where nobody does."""
        self.lead = self.lead or self.locks.attempt("lead")
        return self.leads

    def setup(self) -> dict[str, Any] | None:
        """What all share; waits for the leader, or becomes it where that one is gone.

        Returns:
            None where this process leads and has to make it.
        """
        from tl import display
        from tl.search.study import read_setup

        deadline, said = time.monotonic() + SETUP_SECONDS, False
        while (found := read_setup(self.storage, self.name)) is None:
            if self.try_to_lead():
                return read_setup(self.storage, self.name)
            if not said:
                display.say("another process sets this search up: waiting for it")
                said = True
            if time.monotonic() > deadline:
                raise SearchError("the process that sets this search up did not end in an hour")
            time.sleep(0.3)
        return found


@contextmanager
def team(folder: RunFolder, asked: SearchConfig, *, join: bool = False) -> Iterator[Team]:
    """Open the storage of a search, and lead it where nobody does.

    Args:
        folder: Of the search.
        asked: Its config.
        join: Do not lead at first.

    Raises:
        SearchError: The storage cannot be used.
    """
    from tl.search.study import open_storage, study_name

    folder.make()
    name = study_name(asked.search, folder.path)
    storage, locks = open_storage(asked.search.storage, folder.path, name)
    found = Team(folder, asked, storage, locks, name)
    try:
        if not join:
            found.try_to_lead()
        yield found
    finally:
        if found.lead is not None:
            found.lead.release()


def labels(team: Team) -> dict[str, Any]:
    """What names a search in MLflow: arguments of `tl.tracking.start_run`."""
    return {
        "config": replace(team.asked.tracking, system_metrics=False),
        "experiment": data_name(team.asked),
        "run_name": f"{run_name(team.asked)} · search",
        "kind": "search",
        "output_dir": team.folder.path,
        "resume": (team.folder.path / "run.json").is_file(),
    }
