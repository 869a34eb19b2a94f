"""Engine: runs the frozen part of a network over all images once, as fast as this machine can."""

from __future__ import annotations

from tl.engine.balance import workers_and_threads
from tl.engine.choosing import CHOICES, choose_engine
from tl.engine.engines import BF16_TOLERANCE, Engine

__all__ = ["BF16_TOLERANCE", "CHOICES", "Engine", "choose_engine", "workers_and_threads"]
