"""The GPUs that CUDA would show to this process, without loading torch."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Args:
        name: Its UUID: the same in all processes of the machine.
        visible_as: What `CUDA_VISIBLE_DEVICES` calls it.
        memory: Bytes that are free now.
    """

    name: str
    visible_as: str
    memory: int = 0


def visible_gpus() -> tuple[Gpu, ...]:
    """GPUs of this machine that `CUDA_VISIBLE_DEVICES` leaves; none without NVIDIA's driver."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is not None and shown.strip() in {"", "-1", "NoDevFiles"}:
        return ()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pynvml
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        there = [
            (_text(pynvml.nvmlDeviceGetUUID(h)), int(pynvml.nvmlDeviceGetMemoryInfo(h).free))
            for h in handles
        ]
    except pynvml.NVMLError:
        return ()
    finally:
        pynvml.nvmlShutdown()
    return chosen(there, shown)


def chosen(there: list[tuple[str, int]], shown: str | None) -> tuple[Gpu, ...]:
    """The GPUs that a value of `CUDA_VISIBLE_DEVICES` leaves, in its order.

    Args:
        there: UUID and free bytes of each, by number.
        shown: Numbers or beginnings of UUIDs, with commas; what comes after the first that is
            none does not count, as CUDA has it. None: all.

    Example:
        >>> [g.name for g in chosen([("GPU-a", 1), ("GPU-b", 1)], "1,GPU-a,7,0")]
        ['GPU-b', 'GPU-a']
    """
    if shown is None:
        return tuple(Gpu(uuid, uuid, free) for uuid, free in there)
    found: list[Gpu] = []
    for part in (part.strip() for part in shown.split(",")):
        if part.startswith("MIG-"):
            gpu = Gpu(part, part)  # a part of a GPU, whose memory the driver tells elsewhere
        elif part.isdecimal() and int(part) < len(there):
            uuid, free = there[int(part)]
            gpu = Gpu(uuid, part, free)
        else:
            fits = [(u, free) for u, free in there if part and u.startswith(part)]
            if len(fits) != 1:
                break
            gpu = Gpu(fits[0][0], part, fits[0][1])
        if gpu in found:
            return ()  # CUDA shows none where one is named twice
        found.append(gpu)
    return tuple(found)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
