"""Pictures of what scores are worth: reliability with counts, ROC and precision-recall curves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tl.config import Task
from tl.figures.page import BLUE, GREEN, GREY, ORANGE, page, short

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from tl.evaluation import Report

# Okabe and Ito, without black and yellow, which is too light for a line.
COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9", "#E69F00")
LINES = ("-", "--", "-.", ":")
MOST_LINES = 6  # classes that are shown, those with the lowest average precision
POINTS = 400  # of a line


def save_calibration(report: Report, path: Path) -> None:
    """Draw accuracy against confidence, with the number of images in each bin below.

    Args:
        report: Of one label or several an image.
        path: File to write; its suffix says the format (.png, .pdf, .svg).
    """
    if report.bins is None or report.bins_uncalibrated is None:
        raise ValueError("a report of classes is wanted")
    m, bins = report.metrics, report.bins
    several = report.task is Task.multi
    side, low = 3.4, 0.9
    with page(Path(path), side, side + low + 0.15) as figure:
        whole = side + low + 0.15
        axes = figure.add_axes((0, (low + 0.15) / whole, 1, side / whole))
        below = figure.add_axes((0, 0, 1, low / whole), sharex=axes)
        axes.plot((0, 1), (0, 1), color=GREY, linewidth=1, linestyle="--", label="what it says")
        if report.temperature is not None and report.temperature.value != 1:
            raw = report.bins_uncalibrated
            name = f"without temperature ({m['ece_uncalibrated']:.3f})"
            axes.plot(
                raw["confidence"], raw["accuracy"], "s", color=ORANGE, markersize=4,
                markerfacecolor="none", label=name,
            )  # fmt: skip
        _bars(axes, bins, f"as it is shipped ({m['ece']:.3f})")
        middle = (bins["low"] + bins["high"]) / 2
        width = bins["high"] - bins["low"]
        below.bar(middle, bins["images"], width=0.9 * width, color=BLUE, alpha=0.35)
        below.set_yscale("log")
        below.set_ylim(bottom=0.7)
        below.yaxis.set_major_formatter(lambda count, _: f"{count:,.0f}")
        what = "decisions" if several else "images"
        below.set(xlabel="probability" if several else "score of the answer", ylabel=what)
        said = "share that is true" if several else "share that is right"
        axes.set(xlim=(0, 1), ylim=(0, 1.02), ylabel=said)
        axes.tick_params(labelbottom=False)
        axes.grid(color="#e4e4e4", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.legend(
            loc="upper left", bbox_to_anchor=(1.02, 1.0), title="calibration error",
            title_fontsize=8,
        )  # fmt: skip
        low_ece, high_ece = m["ece_low"], m["ece_high"]
        axes.set_title(
            f"{report.split}: calibration error {m['ece']:.3f}\n"
            f"(95 % CI {low_ece:.3f}–{high_ece:.3f}), {int(m['images']):,} images"
        )


def _bars(axes: Axes, bins: pd.DataFrame, name: str) -> None:
    """Accuracy of each bin with its Wilson interval: a bin of few images says little."""
    from tl.evaluation import wilson

    low, high = wilson((bins["accuracy"] * bins["images"]).to_numpy(), bins["images"].to_numpy())
    reach = np.abs(np.stack([bins["accuracy"] - low, high - bins["accuracy"]]))
    axes.errorbar(
        bins["confidence"], bins["accuracy"], yerr=reach, fmt="o", color=BLUE, markersize=4,
        elinewidth=0.8, capsize=2, label=name,
    )  # fmt: skip


def save_ranking(report: Report, path: Path) -> None:
    """Draw ROC and precision-recall curves of the classes that are told worst.

    Args:
        report: Of one label or several an image.
        path: File to write; its suffix says the format (.png, .pdf, .svg).
    """
    truth, p, m = report.truth, report.predicted, report.metrics
    if truth is None or p is None:
        raise ValueError("a report of classes is wanted")
    table = report.per_class.dropna(subset=["ap", "auc"])
    shown = table.sort_values("ap", kind="stable").index[:MOST_LINES]
    side = 3.0
    with page(Path(path), 2 * side + 0.7, side) as figure:
        width = 2 * side + 0.7
        roc = figure.add_axes((0, 0, side / width, 1))
        pr = figure.add_axes(((side + 0.7) / width, 0, side / width, 1))
        for number, k in enumerate(shown):
            present = truth[:, k].astype(bool) if truth.ndim == 2 else truth == k
            style = {"color": COLOURS[number], "linestyle": LINES[number % 4], "linewidth": 1.4}
            name = f"{short(report.classes[k], 20)} ({table.loc[k, 'images']:,})"
            _draw(roc, pr, p[:, k], present, name, **style)
        roc.plot((0, 1), (0, 1), color=GREY, linewidth=0.8, linestyle=":")
        roc.set(xlabel="false positive rate", ylabel="true positive rate")
        pr.set(xlabel="recall", ylabel="precision")
        few = f"\nthe {len(shown)} of {len(table)} told worst" if len(table) > len(shown) else ""
        for axes in (roc, pr):
            axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.02))
            axes.grid(color="#e4e4e4", linewidth=0.6)
            axes.set_axisbelow(True)
        pr.legend(
            loc="upper left",
            bbox_to_anchor=(1.02, 1.0),
            title=f"class (images){few}",
            title_fontsize=8,
        )
        mean = "map" if report.task is Task.multi else "ap"
        roc.set_title(f"{report.split}: mean ROC-AUC {_with_ends(m, 'auc')}")
        pr.set_title(f"mean average precision {_with_ends(m, mean)}")


def _with_ends(metrics: dict[str, float], name: str) -> str:
    if name not in metrics:
        return "undefined"
    low, high = metrics[f"{name}_low"], metrics[f"{name}_high"]
    return f"{metrics[name]:.3f} ({low:.3f}–{high:.3f})"


def _draw(
    roc: Axes,
    pr: Axes,
    scores: NDArray[np.float64],
    present: NDArray[np.bool_],
    name: str,
    **style: Any,
) -> None:
    from sklearn.metrics import precision_recall_curve, roc_curve

    wrong, right, _ = roc_curve(present, scores)
    precision, recall, _ = precision_recall_curve(present, scores)
    for axes, x, y in ((roc, wrong, right), (pr, recall, precision)):
        keep = np.unique(np.linspace(0, len(x) - 1, POINTS).astype(int))
        axes.plot(x[keep], y[keep], label=name, **style)
