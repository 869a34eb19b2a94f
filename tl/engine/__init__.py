"""Engine: runs the frozen part of a network over all images once, as fast as this machine can."""

from __future__ import annotations

from tl.engine.choosing import BF16_TOLERANCE, CHOICES, Engine, choose_engine

__all__ = ["BF16_TOLERANCE", "CHOICES", "Engine", "choose_engine"]
