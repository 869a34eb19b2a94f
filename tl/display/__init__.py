"""What a person sees: tables, progress and errors, alike readable on a terminal and in a log file.

The pictures are in `tl.figures`; `save_confusion` and `save_curves` are reachable from here too.
"""

from __future__ import annotations

from tl.display.progress import bar
from tl.display.reports import predictions, report, summary
from tl.display.sections import sections
from tl.display.tables import console, error, facts, results_table, say, stage_table
from tl.figures import save_confusion, save_curves, save_report

__all__ = [
    "bar",
    "console",
    "error",
    "facts",
    "predictions",
    "report",
    "results_table",
    "save_confusion",
    "save_curves",
    "save_report",
    "say",
    "sections",
    "stage_table",
    "summary",
]
