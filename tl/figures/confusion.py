"""The confusion matrix as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tl.figures.page import page, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from tl.evaluation import Report

MOST_NUMBERED = 60  # classes up to which each cell of the matrix shows its count
MOST_NAMED = 100  # classes up to which the axes show names


def save_confusion(report: Report, path: Path) -> None:
    """Draw the confusion matrix: counts as numbers, the share of the true class as colour.

    Args:
        report: What `tl.evaluation.evaluate` returned.
        path: File to write; its suffix says the format (.png, .pdf, .svg).
    """
    from matplotlib.colors import PowerNorm

    if report.confusion is None:
        raise ValueError("only with one class an image there is a confusion matrix")

    count = len(report.classes)
    names = [short(name) for name in report.classes]
    cell = max(0.32, 0.1 * len(f"{report.confusion.max():,}"))
    side = float(np.clip(cell * count, 2.4, 11))
    with page(Path(path), width := side + 0.5, side) as figure:
        axes = figure.add_axes((0, 0, side / width, 1))
        beside = figure.add_axes(((side + 0.15) / width, 0.1, 0.046 * side / width, 0.8))
        rows = report.confusion.sum(axis=1, keepdims=True)
        shares = report.confusion / np.maximum(rows, 1)
        # The root lets rare confusions show beside a strong diagonal.
        image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1))
        bar = figure.colorbar(image, cax=beside)
        bar.set_label("share of the true class")
        bar.outline.set_visible(False)
        _confusion_axes(axes, names, side)
        if count <= MOST_NUMBERED:
            _confusion_numbers(axes, report.confusion, shares, side)
        m = report.metrics
        axes.set_title(
            f"{report.split}: accuracy {100 * m['acc']:.1f} % "
            f"(95 % CI {100 * m['acc_low']:.1f}–{100 * m['acc_high']:.1f} %), "
            f"{int(m['images']):,} images",
            pad=10,
        )


def _confusion_axes(axes: Axes, names: Sequence[str], side: float) -> None:
    axes.set(xlabel="predicted class", ylabel="true class")
    for spine in axes.spines.values():
        spine.set_visible(False)
    if len(names) > MOST_NAMED:
        axes.set(xlabel="predicted class (index)", ylabel="true class (index)")
        return
    size = float(np.clip(side / len(names) * 30, 4.5, 9))
    ticks = range(len(names))
    steep = max(map(len, names)) * size * 0.6 / 72 > side / len(names)
    axes.set_xticks(
        ticks,
        names,
        rotation=90 if steep and len(names) > 12 else 45 if steep else 0,
        ha="right" if steep and len(names) <= 12 else "center",
        rotation_mode="anchor" if steep and len(names) <= 12 else "default",
        fontsize=size,
    )
    axes.set_yticks(ticks, names, fontsize=size)
    axes.tick_params(length=0)
    # Not as a grid: each of its lines would be a tick, with two labels.
    between, width = np.arange(1, len(names)) - 0.5, min(1.5, 12 / len(names))
    for lines in (axes.hlines, axes.vlines):
        lines(between, -0.5, len(names) - 0.5, colors="white", linewidths=width, in_layout=False)


def _confusion_numbers(
    axes: Axes, counts: np.ndarray[Any, Any], shares: np.ndarray[Any, Any], side: float
) -> None:
    digits = max(2, len(f"{counts.max():,}"))
    cell_points = side / len(counts) * 72
    size = float(np.clip(cell_points / digits * 1.1, 3.5, 11))
    for i, j in zip(*np.nonzero(counts), strict=True):
        colour = "white" if shares[i, j] > 0.4 else "black"
        axes.text(
            j, i, f"{counts[i, j]:,}", ha="center", va="center", fontsize=size, color=colour,
            in_layout=False,  # it lies within its cell
        )  # fmt: skip
