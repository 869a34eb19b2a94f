"""Pictures of an evaluation: average precision of each label, predicted against true numbers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tl.config import Task
from tl.figures.confusion import save_confusion
from tl.figures.page import BLUE, GREY, ORANGE, page, short
from tl.figures.trusted import save_calibration, save_ranking

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from tl.evaluation import Report

MOST_BARS = 60  # classes that are shown
MOST_POINTS = 3000  # images up to which each is a point


def save_report(report: Report, folder: Path) -> Path:
    """Draw what fits the task: confusion matrix, average precision, or predicted numbers.

    With too many classes for a confusion matrix the F1 of the lowest of them. Beside it, where
    there are classes, what the scores are worth: `calibration_<split>.png` and
    `ranking_<split>.png`.

    Args:
        report: What `tl.evaluation.evaluate` returned.
        folder: Where the picture goes; its name says what it is, and the split.

    Returns:
        The picture.
    """
    name, save = {
        Task.single: ("confusion", save_confusion)
        if report.confusion is not None
        else ("f1", save_scores),
        Task.multi: ("average_precision", save_scores),
        Task.regression: ("predicted", save_predicted),
    }[report.task]
    path = folder / f"{name}_{report.split}.png"
    save(report, path)
    if report.task is not Task.regression:
        save_calibration(report, folder / f"calibration_{report.split}.png")
        save_ranking(report, folder / f"ranking_{report.split}.png")
    return path


def save_scores(report: Report, path: Path) -> None:
    """Draw the average precision of each label, or the F1 of each class, the worst at the bottom.

    The mark on a bar is the share of images with the label: the average precision of guessing.

    Args:
        report: Of several labels or one an image.
        path: File to write; its suffix says the format (.png, .pdf, .svg).
    """
    m, multi = report.metrics, report.task is Task.multi
    column, what, mean, key = (
        ("ap", "average precision", "map", "map") if multi else ("f1", "F1", "f1_macro", "acc")
    )
    table = report.per_class.dropna(subset=column)
    table = table.sort_values([column, "images"], ascending=[True, False], kind="stable")
    shown = table.head(MOST_BARS)
    names = [f"{short(r['class'])} ({r['images']:,})" for _, r in shown.iterrows()]
    with page(Path(path), 5.0, max(0.2 * len(shown), 0.6)) as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        places = np.arange(len(shown))
        handles: list[Any] = [axes.barh(places, shown[column], color=BLUE, height=0.7, label=what)]
        if multi:
            handles += axes.plot(
                shown["images"] / m["images"], places, "|", color=ORANGE, markersize=10,
                markeredgewidth=2, linestyle="none", label="guessing",
            )  # fmt: skip
        handles.append(
            axes.axvline(m[mean], color=GREY, linewidth=1, linestyle="--", label="mean of all")
        )
        size = float(np.clip(9 - len(shown) / 30, 6, 9))
        axes.set_yticks(places, names, fontsize=size)
        axes.set(xlim=(0, 1), ylim=(-0.6, len(shown) - 0.4), xlabel=what)
        _grid(axes, "x")
        axes.tick_params(axis="y", length=0)
        axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.02, 1.0))
        axes.set_title(
            f"{report.split}: {'mAP' if multi else 'accuracy'} {m[key]:.3f} "
            f"(95 % CI {m[f'{key}_low']:.3f}–{m[f'{key}_high']:.3f}), {int(m['images']):,} images"
            + (f"; the lowest {MOST_BARS} of all" if len(table) > len(shown) else ""),
            pad=10,
        )


def save_predicted(report: Report, path: Path) -> None:
    """Draw predicted against true numbers, with the line on which they are equal.

    Args:
        report: Of a regression.
        path: File to write; its suffix says the format (.png, .pdf, .svg).
    """
    from matplotlib.colors import LogNorm

    truth, predicted, m = report.truth, report.predicted, report.metrics
    if truth is None or predicted is None:
        raise ValueError("a report of a regression is wanted")
    low, high = float(min(truth.min(), predicted.min())), float(max(truth.max(), predicted.max()))
    room = 0.04 * (high - low) or 0.5
    ends = (low - room, high + room)
    with page(Path(path), 3.6, 3.6) as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        if len(truth) <= MOST_POINTS:
            alpha = float(np.clip(150 / len(truth), 0.15, 0.8))
            axes.plot(
                truth, predicted, "o", color=BLUE, markersize=4, markeredgewidth=0, alpha=alpha
            )
        else:
            cells = axes.hexbin(
                truth, predicted, gridsize=50, cmap="Blues", mincnt=1, extent=(*ends, *ends),
                norm=LogNorm(vmin=0.3), linewidths=0,  # a cell with one image is seen, too
            )  # fmt: skip
            bar = figure.colorbar(cells, cax=figure.add_axes((1.03, 0.1, 0.04, 0.8)))
            bar.set_label("images")
            bar.outline.set_visible(False)
            bar.ax.set_ylim(bottom=1)
            bar.ax.yaxis.set_major_formatter(lambda count, _: f"{count:,.0f}")
        axes.plot(ends, ends, color=ORANGE, linewidth=1.2, linestyle="--")
        name = short(report.classes[0])
        axes.set(xlim=ends, ylim=ends, xlabel=f"true {name}", ylabel=f"predicted {name}")
        _grid(axes, "both")
        r2 = f", R² {m['r2']:.3f}" if "r2" in m else ""
        axes.set_title(
            f"{report.split}: mean absolute error {m['mae']:.4g}\n"
            f"(95 % CI {m['mae_low']:.4g}–{m['mae_high']:.4g}){r2}, {int(m['images']):,} images"
        )


def _grid(axes: Axes, which: str) -> None:
    axes.grid(axis=which, color="#e4e4e4", linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
