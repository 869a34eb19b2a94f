"""What a job takes of memory, estimated before it starts.

What a process and an image of a step take is measured once for each kind of job, in a process of
its own, and remembered in the cache folder; the sizes of batches and loaders give the rest.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tl.config import DataConfig, ModelConfig, TrainConfig, to_yaml
from tl.files import replacing

log = logging.getLogger(__name__)

GB = 1e9
MEMORY = "footprints.json"
KEPT = 500
SECONDS = 120.0  # of measuring before a batch begins; what is not known then counts as the largest
MOST_WORKERS, BATCHES_AHEAD = 8, 3  # as `tl.data.loading` has it
# Beside what is measured, found with real jobs, which `docs/batches.md` lists: tables, pictures and
# pages; an exporter; a loader process.
REST, EXPORT, WORKER = 100e6, 100e6, 60e6
# Loader processes of val are forked after the first epoch, and keep some of what it had taken.
INHERITED = 0.4
FILL_IMAGES = 32  # of a batch that fills the cache
COPIES = 6  # of what trains: gradients, AdamW's two, an average, the best, those of the start
MARGIN = 1.05
# A job below this needs no measuring: the largest networks take half as much an image.
SURE, SURE_IMAGE, SURE_SIDE = 2.5e9, 1e9, 224


@dataclass(frozen=True)
class JobMemory:
    """What the heaviest of some jobs takes.

    Args:
        bytes: 0: unknown.
        text: For people.
    """

    bytes: int
    text: str


def job_memory(
    configs: Sequence[TrainConfig],
    cores: int,
    *,
    load: str,
    say: Callable[[str], None] = lambda _: None,
    seconds: float = SECONDS,
) -> JobMemory:
    """Estimate what the heaviest of some jobs takes of RAM, its loader processes included.

    Args:
        configs: Of the jobs.
        cores: Of each.
        load: "module:function" that imports what jobs need.
        say: Told before something is measured, which takes some seconds for each kind of job.
        seconds: That measuring may take.
    """
    kinds: dict[str, TrainConfig] = {}
    for config in configs:
        kinds.setdefault(_kind(config), config)
    known = _Known(configs[0].cache.path() / MEMORY)
    missing = [(key, c) for key, c in kinds.items() if key not in known.figures]
    if missing:
        count = f"{len(missing)} kind{'' if len(missing) == 1 else 's'} of job"
        say(f"measuring what {count} take{'s' * (len(missing) == 1)} of memory")
        known.add(_measured(missing, load, seconds))
    found = [
        (estimate(known.figures[key], config, cores), config)
        for config in configs
        if isinstance(known.figures.get(key := _kind(config)), dict)
    ]
    if not found:
        return JobMemory(0, "what a job takes of memory could not be measured")
    most, config = max(found, key=lambda pair: pair[0])
    what = f"{config.model.name}, {config.data.batch_size} images a batch"
    return JobMemory(most, f"about {most / GB:.2g} GB a job ({what})")


def estimate(figures: dict[str, int], config: TrainConfig, cores: int) -> int:
    """Bytes that a job takes at its peak, all its processes together.

    Args:
        figures: As `tl.training.footprint` has them.
        config: Of the job.
        cores: Of it.
    """
    batch = config.data.batch_size
    train = COPIES * figures["trained"] + batch * figures["train"]
    score = max(batch, FILL_IMAGES) * figures["score"]
    export = EXPORT + 4 * figures["weights"] if config.export.enabled else 0
    work = max(train, score, export)
    main = figures["process"] + REST + 2 * figures["weights"] + work
    devices = str(config.trainer.get("devices", 1))
    # Of a job in several processes on the processor, each takes its part of the batch.
    main += (int(devices) - 1) * figures["process"] if devices.isdecimal() else 0
    asked = config.data.num_workers
    workers = min(cores, MOST_WORKERS) if asked is None else asked
    # One set of them reads train, another val.
    loaders = 2 * workers * (WORKER + BATCHES_AHEAD * batch * figures["image"])
    loaders += INHERITED * work if workers else 0
    return int(MARGIN * (main + loaders))


def device_memory(figures: dict[str, int], config: TrainConfig) -> int:
    """Bytes that a job takes of a GPU: weights, what trains, and the images of a step."""
    train = 4 * figures["trained"] + config.data.batch_size * figures["train"]
    return int(MARGIN * (figures["weights"] + train))


def surely_below(config: TrainConfig) -> int | None:
    """Bytes that a job of small images takes at most, whatever its network; None: who knows."""
    side = config.model.image_size
    if side is None:
        return None
    return int(SURE + config.data.batch_size * SURE_IMAGE * (side / SURE_SIDE) ** 2)


def _kind(config: TrainConfig) -> str:
    """What decides the figures, and nothing else of a job."""
    alike = TrainConfig(
        data=DataConfig(root="x"),
        model=replace(config.model, weights=ModelConfig(name="x").weights),
        finetune=config.finetune,
    )
    place = f"{platform.machine()} {version('torch')} {version('timm')} {version('tl')}"
    return hashlib.sha256(f"{place}\n{to_yaml(alike)}".encode()).hexdigest()[:16]


class _Known:
    """Figures of kinds of jobs in a file of the cache folder."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.figures: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            found = json.loads(file.read_text())
            self.figures = found if isinstance(found, dict) else {}

    def add(self, figures: dict[str, Any]) -> None:
        """Keep what was measured; what another process measured meanwhile, too."""
        self.figures = {**_Known(self.file).figures, **self.figures, **figures}
        kept = {k: v for k, v in self.figures.items() if isinstance(v, dict)}
        with suppress(OSError):  # a cache that cannot be written costs another measuring only
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.file) as part:
                part.write_text(json.dumps(dict(list(kept.items())[-KEPT:])))


def _measured(
    missing: Sequence[tuple[str, TrainConfig]], load: str, seconds: float
) -> dict[str, Any]:
    """Figures of kinds of jobs; those for which time was too short are left out."""
    # The heaviest first, as far as one can tell.
    by_size = sorted(missing, key=lambda pair: -(pair[1].model.image_size or 224))
    asked = [[key, to_yaml(config)] for key, config in by_size]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    found: dict[str, Any] = {}
    with subprocess.Popen(
        [sys.executable, "-m", "tl.training.footprint", load],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        try:
            with suppress(BrokenPipeError):
                process.stdin.write(json.dumps(asked))
                process.stdin.close()
            for line in process.stdout:
                with suppress(ValueError):
                    key, figures = json.loads(line)
                    found[key] = figures
        finally:
            timer.cancel()
            process.kill()
    for key, figures in found.items():
        if isinstance(figures, str):
            log.debug("no figures for %s: %s", key, figures)
    return found
