"""Pictures for a paper: what an evaluation found, and learning curves.

Colours are those of Okabe and Ito ("Color universal design", 2008) and of sequential maps with one
direction of lightness, so that nobody depends on telling red from green; line styles and markers
repeat what colour says. matplotlib is imported only when a picture is drawn.
"""

from __future__ import annotations

from tl.figures.confusion import save_confusion
from tl.figures.curves import save_curves
from tl.figures.judged import save_predicted, save_report, save_scores
from tl.figures.trusted import save_calibration, save_ranking

__all__ = [
    "save_calibration",
    "save_confusion",
    "save_curves",
    "save_predicted",
    "save_ranking",
    "save_report",
    "save_scores",
]
