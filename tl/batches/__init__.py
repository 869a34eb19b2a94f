"""Batches: many jobs, each in a process of its own, and a ledger of what became of each.

Torch-free: what jobs need is imported by the workers only.
"""

from __future__ import annotations

from tl.batches.calls import BASIC, Batch, Outcome, leading, read_states
from tl.batches.errors import BatchError, EngineError
from tl.batches.jobs import Job

__all__ = [
    "BASIC",
    "Batch",
    "BatchError",
    "EngineError",
    "Job",
    "Outcome",
    "check",
    "leading",
    "read_states",
]
