"""What jobs take of memory, measured on random images with random weights.

`python -m tl.training.footprint MODULE:FUNCTION` calls the function, which imports what jobs need,
reads requests from its input, a JSON list of [key, settings in YAML], and prints a line of JSON,
[key, figures], for each. A process of its own, so that what it takes is what a job takes, and so
that whoever asks needs no torch.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from tl.config import AUTO, TrainConfig, validate
from tl.finetuning import build_plan, freeze
from tl.models import BuiltModel, build_model

FEW, MANY = 4, 12  # images of two steps, whose difference is that of so many images
SLOW_SECONDS = 2.0  # of the first step: then fewer images tell enough
CLASSES = 10
LARGE = 10**6  # images: no setting is chosen as for a small data set
PRECISIONS = {"bf16-mixed": torch.bfloat16}


@dataclass(frozen=True)
class Footprint:
    """What a job takes, in bytes.

    Args:
        process: A process that has imported all.
        weights: The model.
        trained: Weights of the phase that trains most.
        train: An image of a step of that phase, at its peak.
        score: An image of a pass without training.
        image: An image as the model reads it.
    """

    process: int
    weights: int
    trained: int
    train: int
    score: int
    image: int


def measure(config: TrainConfig, process: int) -> Footprint:
    """Take a few steps of the phase that trains most.

    Args:
        config: Of the job; its weights and images are not read.
        process: Resident bytes of this process before its first model.
    """
    built = build_model(replace(config.model, weights="none"), CLASSES, pretrained=False)
    model = built.model
    side = built.preprocessing.input_size
    _heaviest(config, built)
    precision = PRECISIONS.get(config.finetune.precision)

    def step(count: int) -> None:
        images = torch.randn(count, *side).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
            outputs: Tensor = model(images)
        torch.autograd.backward(outputs.float().square().mean())

    def score(count: int) -> None:
        images = torch.randn(count, *side).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            model(images)

    sizes = [p.numel() * p.element_size() for p in model.parameters() if p.requires_grad]
    rest = [b.numel() * b.element_size() for b in model.buffers()]
    fixed = [p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad]
    train = _per_image(step)
    model.eval()
    return Footprint(
        process=process,
        weights=sum(sizes) + sum(fixed) + sum(rest),
        trained=sum(sizes),
        train=train,
        score=_per_image(score),
        image=4 * side[0] * side[1] * side[2],
    )


def _heaviest(config: TrainConfig, built: BuiltModel) -> None:
    """Let train what trains in the heaviest phase; where that is open yet, everything."""
    if config.finetune.method == AUTO:
        built.model.requires_grad_(True)
        built.model.train()
        return
    plan = build_plan(config.finetune, built, train_images=LARGE, batch_size=config.data.batch_size)
    # Adapters come later; what waits for the backward pass is about what it is without them.
    phases = [replace(phase, trains="all") for phase in plan.phases]
    freeze(built.model, built.stages, max(phases, key=lambda phase: len(phase.trainable)))


def _per_image(work: Callable[[int], None]) -> int:
    """Bytes at the peak that each further image adds."""
    began = time.perf_counter()
    work(1)  # prepares kernels, and makes the gradients
    slow = time.perf_counter() - began > SLOW_SECONDS
    few, many = (1, 3) if slow else (FEW, MANY)
    peaks = [_peak(lambda: work(few)), _peak(lambda: work(many))]
    return max(peaks[1] - peaks[0], 0) // (many - few)


def _peak(work: Callable[[], None]) -> int:
    """Largest resident size of this process in the meantime, above what it is before."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # forgets the largest size so far
    before = psutil.Process().memory_info().rss
    work()
    return most_resident() - int(before)


def most_resident() -> int:
    """Largest resident size of this process since it was last forgotten."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    return int(psutil.Process().memory_info().rss)


def main() -> None:
    """Answer requests one by one; one that cannot be answered gets its reason."""
    module, _, function = sys.argv[1].partition(":")
    getattr(importlib.import_module(module), function)()
    process = psutil.Process().memory_info().rss
    for key, settings in json.load(sys.stdin):
        try:
            config = validate(DictConfig(OmegaConf.create(settings)), TrainConfig)
            found: object = asdict(measure(config, process))
        except Exception as error:  # whatever it is, the job itself will say it better
            found = str(error).strip().split("\n")[0] or type(error).__name__
        print(json.dumps([key, found]), flush=True)


if __name__ == "__main__":
    main()
