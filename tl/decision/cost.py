"""What training by a plan would take, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """What training by a plan takes at most on this machine's processor, estimated.

    Args:
        images_per_second: Forward passes of the whole network in PyTorch, without decoding.
        decode_ms: Reading and preparing one image, all loaders at work, in milliseconds.
        phase_seconds: Of each phase if no early stop ends it.
        memory_bytes: Peak of the process: what it holds now, gradients, optimizer, activations.
        parameters: Most parameters that train at once.
    """

    images_per_second: float
    decode_ms: float
    phase_seconds: Mapping[str, float]
    memory_bytes: float
    parameters: int

    @property
    def seconds(self) -> float:
        """Of all phases."""
        return sum(self.phase_seconds.values())
