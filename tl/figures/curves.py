"""Learning curves as a picture."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tl.figures.page import BLUE, GREY, ORANGE, page, short

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

LABEL = -0.12  # place of the names beside the curves, in widths of the axes
MOST_MARKED = 60  # epochs up to which each has a marker on its line
# The headline metric of each task beside the loss.
QUANTITIES = {"loss": "loss", "acc": "accuracy", "map": "mAP", "mae": "mean absolute error"}

Phase = tuple[str, int, int]  # name, first and last epoch on the common axis


def save_curves(history: pd.DataFrame, path: Path) -> None:
    """Draw loss, headline metric and learning rates over the epochs of all phases.

    The circle of each phase is its epoch with the lowest val/loss, the best of the phase.

    Args:
        history: Columns `phase` and `epoch` (counted on or anew in each phase), and what there is
            of `train/loss`, `val/loss`, `train/acc`, `val/acc`, `val/map`, `val/mae`, `lr/…` and
            `lr-…`; the values of an epoch may be spread over several rows.
        path: File to write; its suffix says the format (.png, .pdf, .svg).
    """
    from matplotlib.ticker import MaxNLocator

    table, phases = _one_axis(history)
    rates = _learning_rates(table)
    quantities = [q for q in QUANTITIES if {f"train/{q}", f"val/{q}"} & set(table.columns)]
    heights = [3.0] * len(quantities) + ([2.2] if rates else [])
    with page(Path(path), 5.0, 0.72 * sum(heights) + 0.2 * len(heights)) as figure:
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
    ax.set_ylabel(QUANTITIES[quantity])
    if quantity in ("loss", "mae"):
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
            ax, table.assign(rate=values), phases, "rate", label=short(name, 20),
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
            short(name, 24), (x, 1.0), xycoords=("data", "axes fraction"),
            xytext=(0, 4), textcoords="offset points", rotation=angle, rotation_mode="anchor",
            ha="left" if angle else "center", va="center" if angle == 90 else "bottom",
            fontsize=8.5,
        )  # fmt: skip
