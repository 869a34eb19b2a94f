"""Advice before any training: what was measured, what follows, what it costs, and which backbone.

Torch-free: it takes what others measured as plain values.
"""

from __future__ import annotations

from tl.advice.asking import models, several
from tl.advice.ranking import Candidate, best, ranking
from tl.advice.sections import brief
from tl.advice.whole import heading, sections
from tl.advice.writing import AdviceError, write

__all__ = [
    "AdviceError",
    "Candidate",
    "best",
    "brief",
    "heading",
    "models",
    "ranking",
    "sections",
    "several",
    "write",
]
