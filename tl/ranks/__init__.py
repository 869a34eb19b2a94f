"""Which process of a job this one is, and what its processes say to each other.

A job of several processes is always started by somebody else: `torchrun`, `srun`, or `tl train`
itself (`tl.launching`). They form a group at its beginning (`joined`). From then on the first one
reads, decides, shows and writes, and hands the others what it found; without a group, or in one of
a single process, all functions here do nothing beyond calling what they are given.
"""

from __future__ import annotations

from tl.ranks.group import (
    ElsewhereError,
    LostError,
    agree,
    alike,
    gather,
    grouped,
    here,
    in_turn,
    joined,
    leave,
    on_first,
    rank,
    said,
    sharing,
    silent,
    wait,
    world,
)
from tl.ranks.places import JOB, Place, job_ids, place

__all__ = [
    "JOB",
    "ElsewhereError",
    "LostError",
    "Place",
    "agree",
    "alike",
    "gather",
    "grouped",
    "here",
    "in_turn",
    "job_ids",
    "joined",
    "leave",
    "on_first",
    "place",
    "rank",
    "said",
    "sharing",
    "silent",
    "wait",
    "world",
]
