"""How far and how fast an engine is."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from tl.engine.runners import Outputs, Runner, UnavailableError

SHORT = 0.1  # seconds: measurements that are over sooner are repeated


def timed(runner: Runner, batch: Tensor) -> tuple[Outputs, float]:
    """Outputs of a batch and seconds an image, the least of three where they are short."""
    best, spent = math.inf, 0.0
    for _ in range(3):
        begin = time.perf_counter()
        outputs = runner(batch)
        seconds = time.perf_counter() - begin
        best, spent = min(best, seconds), spent + seconds
        if spent > SHORT:
            break
    return outputs, best / len(batch)


def relative_difference(outputs: Outputs, reference: Outputs) -> float:
    """Largest difference, relative to the largest value of the same output; over all outputs.

    Raises:
        UnavailableError: Their numbers or shapes differ.
    """
    shapes = [tuple(t.shape) for t in outputs], [tuple(t.shape) for t in reference]
    if shapes[0] != shapes[1]:
        raise UnavailableError(f"gives shapes {shapes[0]}, eager {shapes[1]}")
    worst = 0.0
    for value, expected in zip(outputs, reference, strict=True):
        same = (value == expected) | (value.isnan() & expected.isnan())
        gap = torch.where(same, 0.0, (value - expected).abs()).max().item()
        scale = expected.nan_to_num(0.0, 0.0, 0.0).abs().max().item()
        if gap:
            worst = max(worst, gap / scale if scale and not math.isnan(gap) else math.inf)
    return worst
