"""The decision table: from evidence to a plan, with reasons. Pure functions, no torch."""

from __future__ import annotations

from tl.decision.axes import Axes
from tl.decision.cost import Cost
from tl.decision.deciding import Decision, decide
from tl.decision.recipes import METHODS, recipe
from tl.decision.table import table_rows
from tl.decision.thresholds import DIFFERENT, SIMILAR, TIERS, UNKNOWN, Thresholds

__all__ = [
    "DIFFERENT",
    "METHODS",
    "SIMILAR",
    "TIERS",
    "UNKNOWN",
    "Axes",
    "Cost",
    "Decision",
    "Thresholds",
    "decide",
    "recipe",
    "table_rows",
]
