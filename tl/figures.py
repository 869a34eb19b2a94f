"""Pictures for a paper: confusion matrix and learning curves.

Colours are those of Okabe and Ito ("Color universal design", 2008) and of sequential maps with one
direction of lightness, so that nobody depends on telling red from green; line styles and markers
repeat what colour says. matplotlib is imported only when a picture is drawn.
"""

from __future__ import annotations

import itertools
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tl.evaluation import Report

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
DPI = 200
MARGIN = 0.06  # inches around a picture
LABEL = -0.12  # place of the names beside the curves, in widths of the axes
COMPRESSION = 3  # of PNG: higher levels take several times as long for a few per cent
MOST_NUMBERED = 60  # classes up to which each cell of the matrix shows its count
MOST_MARKED = 60  # epochs up to which each has a marker on its line
MOST_NAMED = 100  # classes up to which the axes show names
STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "text.parse_math": False,
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
}

Phase = tuple[str, int, int]  # name, first and last epoch on the common axis


@contextmanager
def _figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure that is written to `path` in one step, without a display, with a thin margin.

    Axes have their places in inches of a page of so many; what stands around them (names, legends)
    may reach beyond it, and the picture is cut where the ink ends. That is found out once and drawn
    once: matplotlib's own layouts do both several times.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(STYLE), warnings.catch_warnings():
        # A class name in a script that the font lacks is drawn as boxes; the tables have it right.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(width, height), dpi=DPI)
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{os.getpid()}.{path.name}")
        try:
            kind = path.suffix.lstrip(".") or "png"
            canvas: Any = FigureCanvasAgg(figure)
            ink = figure.get_tightbbox(canvas.get_renderer())
            png = {"pil_kwargs": {"compress_level": COMPRESSION}}
            options: dict[str, Any] = png if kind == "png" else {}
            figure.savefig(partial, format=kind, bbox_inches=ink.padded(MARGIN), **options)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


# --- confusion matrix ---------------------------------------------------------------------------


def save_confusion(report: Report, path: Path) -> None:
    """Draw the confusion matrix: counts as numbers, the share of the true class as colour.

    Args:
        report: What `tl.evaluation.evaluate` returned.
        path: File to write; its suffix says the format (.png, .pdf, .svg).
    """
    from matplotlib.colors import PowerNorm

    count = len(report.classes)
    names = [_short(name) for name in report.classes]
    cell = max(0.32, 0.1 * len(f"{report.confusion.max():,}"))
    side = float(np.clip(cell * count, 2.4, 11))
    with _figure(Path(path), width := side + 0.5, side) as figure:
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


def _short(name: str, most: int = 28) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


# --- learning curves ----------------------------------------------------------------------------


def save_curves(history: pd.DataFrame, path: Path) -> None:
    """Draw loss, accuracy and learning rates over the epochs of all phases.

    The circle of each phase is its epoch with the lowest val/loss, the best of the phase.

    Args:
        history: Columns `phase` and `epoch` (counted on or anew in each phase), and what there is
            of `train/loss`, `val/loss`, `train/acc`, `val/acc`, `lr/…` and `lr-…`; the values of
            an epoch may be spread over several rows.
        path: File to write; its suffix says the format (.png, .pdf, .svg).
    """
    from matplotlib.ticker import MaxNLocator

    table, phases = _one_axis(history)
    rates = _learning_rates(table)
    quantities = [q for q in ("loss", "acc") if {f"train/{q}", f"val/{q}"} & set(table.columns)]
    heights = [3.0] * len(quantities) + ([2.2] if rates else [])
    with _figure(Path(path), 5.0, 0.72 * sum(heights) + 0.2 * len(heights)) as figure:
        place = {"left": 0, "right": 1, "bottom": 0, "top": 1, "hspace": 0.1}
        grid = figure.add_gridspec(len(heights), 1, height_ratios=heights, **place)
        axes = list(grid.subplots(sharex=True, squeeze=False)[:, 0])
        for ax, quantity in zip(axes, quantities, strict=False):
            _draw_quantity(ax, table, phases, quantity)
        if rates:
            _draw_rates(axes[-1], table, phases, rates)
        for ax in axes:
            _mark_phases(ax, phases, names=ax is axes[0])
            ax.grid(axis="y", color="#e4e4e4", linewidth=0.6)
            ax.set_axisbelow(True)
            ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))
            # In one line; to find it out of the ticks of all axes takes half of the drawing.
            ax.yaxis.set_label_coords(LABEL, 0.5)
        axes[-1].set_xlabel("epoch")
        axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _draw_quantity(ax: Axes, table: pd.DataFrame, phases: Sequence[Phase], quantity: str) -> None:
    for split, colour, line, marker in (("train", GREY, "--", "s"), ("val", BLUE, "-", "o")):
        if f"{split}/{quantity}" in table:
            _draw_line(
                ax, table, phases, f"{split}/{quantity}", label=split,
                color=colour, linestyle=line, linewidth=1.6, markersize=3,
                marker=_marker(table, marker),
            )  # fmt: skip
    kept = "best of its\nphase (val loss)" if quantity == "loss" else None
    _draw_best(ax, table, phases, f"val/{quantity}", label=kept)
    ax.set_ylabel({"acc": "accuracy"}.get(quantity, quantity))
    if quantity == "loss":
        ax.set_ylim(0, 1.03 * ax.get_ylim()[1])


def _one_axis(history: pd.DataFrame) -> tuple[pd.DataFrame, list[Phase]]:
    """One row per epoch with a running number `x` from 1, and (name, first x, last x) per phase."""
    import pandas as pd

    parts, phases, offset = [], [], 0
    for name, part in history.groupby("phase", sort=False):
        merged = part.drop(columns="phase").groupby("epoch").first().sort_index()
        merged.index = pd.RangeIndex(offset + 1, offset + 1 + len(merged), name="x")
        phases.append((str(name), offset + 1, offset + len(merged)))
        offset += len(merged)
        parts.append(merged)
    return pd.concat(parts).reset_index(), phases


def _learning_rates(table: pd.DataFrame) -> dict[str, pd.Series[float]]:
    """Learning rates by group of parameters; groups that never differ share one line."""
    by_group: dict[str, pd.Series[float]] = {}
    for column in (c for c in table.columns if str(c).startswith(("lr/", "lr-"))):
        # Lightning writes lr-<optimizer>/<group>; the optimizer may change from phase to phase.
        name = re.sub(r"^lr(?:/|-(?:[A-Za-z]+/)?(?=.))", "", str(column))
        values = table[column].where(table[column] > 0)
        by_group[name] = by_group[name].combine_first(values) if name in by_group else values
    merged: dict[tuple[float, ...], list[str]] = {}
    for name, values in by_group.items():
        if values.notna().any():
            merged.setdefault(tuple(values.fillna(-1.0)), []).append(name)
    return {_common_name(names): by_group[names[0]] for names in merged.values()}


def _common_name(names: Sequence[str]) -> str:
    """`head` for head/decay and head/no_decay; else the first and the last name."""
    if len(names) == 1:
        return names[0]
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in same).rstrip("/-_. ") or f"{names[0]} … {names[-1]}"


def _draw_line(
    ax: Axes, table: pd.DataFrame, phases: Sequence[Phase], column: str, **style: Any
) -> None:
    """One line with a gap between phases: each starts anew from the weights that were kept."""
    label = style.pop("label")
    for _, first, last in phases:
        points = table[table["x"].between(first, last)].dropna(subset=column)
        if len(points):
            ax.plot(points["x"], points[column], label=label, **style)
            label = None


def _draw_best(
    ax: Axes, table: pd.DataFrame, phases: Sequence[Phase], column: str, *, label: str | None
) -> None:
    """Circle the epoch with the lowest val/loss of each phase."""
    if not {"val/loss", column} <= set(table.columns):
        return
    for _, first, last in phases:
        epochs = table[table["x"].between(first, last)].dropna(subset="val/loss")
        if epochs.empty:
            continue
        best = epochs.sort_values("val/loss", kind="stable").iloc[0]
        ax.plot(
            best["x"], best[column], "o", markersize=8, linestyle="none", label=label,
            markerfacecolor="none", markeredgecolor=ORANGE, markeredgewidth=1.6,
        )  # fmt: skip
        label = None


def _draw_rates(
    ax: Axes, table: pd.DataFrame, phases: Sequence[Phase], rates: dict[str, pd.Series[float]]
) -> None:
    from matplotlib import colormaps
    from matplotlib.ticker import LogLocator, NullFormatter

    shades = colormaps["viridis"](np.linspace(0.0, 0.85, len(rates)))
    lines, markers = ("-", "--", "-.", ":"), "osD^vP"
    # The fastest group first, as the lines lie on the page.
    for i, (name, values) in enumerate(sorted(rates.items(), key=lambda r: -r[1].max())):
        _draw_line(
            ax, table.assign(rate=values), phases, "rate", label=_short(name, 20),
            color=shades[i], linestyle=lines[i % 4], linewidth=1.4, markersize=3,
            marker=_marker(table, markers[i % 6]),
        )  # fmt: skip
    ax.set_yscale("log")
    ax.set_ylabel("learning rate")
    low, high = ax.get_ylim()
    if high < 30 * low:  # too few whole decades to read a value off them
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(lambda v, _: f"{v:.0e}".replace("e-0", "e-"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _marker(table: pd.DataFrame, marker: str) -> str | None:
    return marker if len(table) <= MOST_MARKED else None


def _mark_phases(ax: Axes, phases: Sequence[Phase], *, names: bool) -> None:
    last = phases[-1][2]
    ax.set_xlim(0.5, last + 0.5)
    for _, first, _ in phases[1:]:
        ax.axvline(first - 0.5, color="black", linewidth=0.8, alpha=0.7)
    if not names:
        return
    inch = 4.2 / last  # width of an epoch on the page, about
    crowded = any(0.07 * len(name) > (end - first + 1) * inch for name, first, end in phases)
    centres = [(first + end) / 2 for _, first, end in phases]
    closest = min(np.diff(centres), default=np.inf) * inch
    angle = 0 if not crowded else 40 if closest > 0.25 else 90
    for (name, _, _), x in zip(phases, centres, strict=True):
        ax.annotate(
            _short(name, 24), (x, 1.0), xycoords=("data", "axes fraction"),
            xytext=(0, 4), textcoords="offset points", rotation=angle, rotation_mode="anchor",
            ha="left" if angle else "center", va="center" if angle == 90 else "bottom",
            fontsize=8.5,
        )  # fmt: skip
