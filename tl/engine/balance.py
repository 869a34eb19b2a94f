"""Processes that decode and threads that compute share the cores: how many of each."""

from __future__ import annotations

import math

# Rounding up for less than this share of a core would only crowd the rest.
SLACK = 0.1


def workers_and_threads(decode: float, engine: float, cores: int) -> tuple[int, int]:
    """Loader processes and threads of the engine for one pass over the data on a CPU.

    Each side gets at least the cores that its share of the work is, and one thread more than that
    fills the gaps: threads of ONNX Runtime that wait give their core away. `benchmarks/engines.py
    --loading` measures it.

    Args:
        decode: Seconds that one core needs to read and prepare an image.
        engine: Seconds of one core that the network needs for an image: those of `Engine` times its
            threads. 0 on a GPU.
        cores: That the job may use, 1 or more.

    Returns:
        At least one of each.

    Example:
        >>> workers_and_threads(0.0055, 0.0085, 2)
        (1, 2)
        >>> workers_and_threads(0.0055, 0.0085, 16)
        (7, 10)
        >>> workers_and_threads(0.0055, 0, 16)
        (16, 1)
    """
    both = decode + engine
    share = decode / both if both > 0 else 0.5
    workers = min(cores, max(1, math.ceil(cores * share - SLACK)))
    return workers, cores - workers + 1
