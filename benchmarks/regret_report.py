"""From the fits of the regret benchmark to its tables, its fitted thresholds and its picture."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from regret_cells import Cell
from regret_rates import RATES, of_today, share_of_today
from scipy.stats import sem

from tl.decision import TIERS, Axes, Thresholds
from tl.decision.axes import read
from tl.decision.evidence import Evidence
from tl.decision.table import Choice, choose

DEFAULT = 1.0  # the rate that a method has by itself
ERRORS = 2  # paired standard errors below which a difference counts as none
SHOWN = ("linear_probe", "lp_ft", "full")  # beside auto in the picture
GOALS = {"mean": 1.5, "90 %": 4.0, "worst": 8.0}  # points


@dataclass(frozen=True)
class Judged:
    """A cell with all its fits.

    Args:
        cell: Which.
        evidence: What was measured of its training images.
        fits: (method, rate) -> row of the results.
        number: Test images.
        former: Fits of former recipes. The oracle may be one of them; no policy is.
    """

    cell: Cell
    evidence: Evidence
    fits: Mapping[tuple[str, float], Mapping[str, Any]]
    number: int
    former: Mapping[tuple[str, float], Mapping[str, Any]] = field(default_factory=dict)

    @cached_property
    def all_fits(self) -> dict[tuple[str, float], Mapping[str, Any]]:
        """Today's fits, and the former ones by a name of their own."""
        return {**self.fits, **{(f"former {m}", r): f for (m, r), f in self.former.items()}}

    @cached_property
    def hits(self) -> dict[tuple[str, float], np.ndarray]:
        """Which test images each fit had right."""
        return {key: bits(row["hits"], self.number) for key, row in self.all_fits.items()}

    @cached_property
    def best(self) -> tuple[str, float]:
        """The oracle: the fit that was best on test."""
        return max(self.all_fits, key=lambda key: float(self.all_fits[key]["acc"]))

    @cached_property
    def place(self) -> Axes:
        """Where the default thresholds put it in the table."""
        return read(self.evidence, Thresholds())

    def regret(self, method: str, *, counted: bool = True) -> float:
        """Points by which the oracle is better than a method at its default rate.

        Args:
            method: Key of a method.
            counted: Differences within `ERRORS` paired standard errors are 0.
        """
        better = self.hits[self.best].astype(float) - self.hits[method, DEFAULT]
        points = 100 * float(better.mean())
        return 0.0 if counted and better.mean() <= ERRORS * sem(better) else points

    def apart(self, method: str) -> float:
        """Points by which the oracle is better where it was chosen on other images.

        The best of many fits is best partly by luck on the images that chose it. Here each half
        of test chooses an oracle, and the other half judges it: the mean has no such luck in it,
        and may be below 0.

        Args:
            method: Key of a method, at its default rate.
        """
        halves = np.arange(self.number) % 2
        found = []
        for half in (0, 1):
            chosen, judging = halves == half, halves != half
            best = max(self.all_fits, key=lambda key: float(self.hits[key][chosen].mean()))
            mine = self.hits[method, DEFAULT][judging].mean()
            found.append(float(self.hits[best][judging].mean() - mine))
        return 100 * float(np.mean(found))

    def choice(self, thresholds: Thresholds) -> str:
        """Key of the method that `finetune=auto` chooses; the neighbour where it cannot be had.

        Only the parts of the decision that choose a method: thresholds are fitted by thousands.
        """
        axes = read(self.evidence, thresholds)
        found = choose(axes, self.evidence.backbone)
        keys = [method_key(choice) for choice in found]
        return next((key for key in keys if (key, DEFAULT) in self.fits), "linear_probe")

    def by_validation(self) -> str:
        """The method with the best val accuracy at its default rate, the earlier one in a tie."""
        usual = {m: row for (m, rate), row in self.fits.items() if rate == DEFAULT}
        return max(usual, key=lambda method: float(usual[method]["val_acc"]))


def method_key(choice: Choice) -> str:
    """The benchmark's name of a choice."""
    return f"lp_partial_{choice.stages}" if choice.method == "lp_partial" else choice.method


def bits(text: str, number: int) -> np.ndarray:
    """Flags from the hexadecimal digits that results keep."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))[:number].astype(bool)


def judged(
    rows: Sequence[Mapping[str, Any]], methods: Sequence[str], *, every_fit: bool = False
) -> list[Judged]:
    """Cells in which every method was trained at all rates that any cell has, or cannot be had.

    At its own rate it must be trained by today's recipe; at the others a former fit stands in where
    there is no newer one.

    Args:
        rows: Of the results.
        methods: Those that count.
        every_fit: The oracle may be any fit that there is, also at rates of former recipes.
    """
    names = ("set", "per_class", "backbone", "seed")
    about = {tuple(r[n] for n in names): r for r in rows if r["kind"] == "cell"}
    seen = {key: Evidence.from_dict(row["evidence"]) for key, row in about.items()}
    fits: dict[tuple[Any, ...], dict[tuple[str, float], Any]] = {}
    former: dict[tuple[Any, ...], dict[tuple[str, float], Any]] = {}
    for row in rows:
        key = tuple(row[name] for name in names)
        if row["kind"] == "fit" and row["method"] in methods and key in seen:
            rate = share_of_today(row, seen[key])
            today = rate in RATES and of_today(row, seen[key])
            if today or every_fit or rate in RATES:
                place = fits if today else former
                place.setdefault(key, {})[row["method"], rate] = row
    methods_seen, rates_seen = (
        {key[i] for all_fits in fits.values() for key in all_fits} for i in (0, 1)
    )
    wanted = set(itertools.product(methods_seen, rates_seen & set(RATES)))
    found = []
    for key, all_fits in fits.items():
        old = former.get(key, {})
        old = old if every_fit else {k: row for k, row in old.items() if k not in all_fits}
        if wanted <= all_fits.keys() | {k for k in old if k[1] != DEFAULT}:
            good = {k: row for k, row in all_fits.items() if "error" not in row}
            number = about[key]["counts"]["test"]
            found.append(Judged(Cell(*key), seen[key], good, number, old))
    return sorted(found, key=lambda j: (j.cell.set, j.cell.per_class, j.cell.backbone, j.cell.seed))


# --- policies -----------------------------------------------------------------------------------


def policies(cells: Sequence[Judged], methods: Sequence[str]) -> dict[str, list[tuple[int, str]]]:
    """Name of a policy -> the (number of a cell, method) pairs that it stands for."""
    usual = Thresholds()
    fitted = leave_one_set_out(cells)
    numbers = range(len(cells))
    trained = [(i, m) for i in numbers for m in methods if (m, DEFAULT) in cells[i].fits]
    found = {
        "auto": [(i, cells[i].choice(usual)) for i in numbers],
        "auto, thresholds of the other sets": [
            (i, cells[i].choice(fitted[cells[i].cell.set])) for i in numbers
        ],
        **{f"always {m}": [pair for pair in trained if pair[1] == m] for m in methods},
        "at random": trained,
        "all trained, best on val": [(i, cells[i].by_validation()) for i in numbers],
    }
    return {name: pairs for name, pairs in found.items() if pairs}


def regrets(
    cells: Sequence[Judged], pairs: Iterable[tuple[int, str]], *, counted: bool = True
) -> np.ndarray:
    """Regret of each pair, points."""
    return np.array([cells[i].regret(method, counted=counted) for i, method in pairs])


GRID: dict[str, tuple[Any, ...]] = {
    "tiny": (3, 5, 10),
    "least_images": (0, 30, 60),
    "small": (10, 20, 50),
    "medium_images": (0, 100, 300),
    "quality": (0.3, 0.5, 0.7),
    "concat_gain": (0.05, 0.1),
    "drift": (0.1, 0.2, 0.5),
    "enough": (None, 0.9),
}


def leave_one_set_out(cells: Sequence[Judged]) -> dict[str, Thresholds]:
    """For each set the thresholds with the least mean regret on the cells of all other sets.

    The usual ones stay where the gain is within its standard error: with few cells the best of
    thousands is best by luck.
    """
    usual = Thresholds()
    values = itertools.product(*GRID.values())
    tried = [usual, *(replace(usual, **dict(zip(GRID, v, strict=True))) for v in values)]
    known = [{m: c.regret(m) for m, rate in c.fits if rate == DEFAULT} for c in cells]
    table = np.array([[k[c.choice(t)] for c, k in zip(cells, known, strict=True)] for t in tried])
    found = {}
    for name in sorted({cell.cell.set for cell in cells}):
        others = table[:, [cell.cell.set != name for cell in cells]]
        found[name] = usual
        if others.shape[1] > 1:
            best = int(others.mean(axis=1).argmin())
            gain = others[0] - others[best]
            if gain.mean() > sem(gain):
                found[name] = tried[best]
    return found


# --- what people read ---------------------------------------------------------------------------


def text(
    rows: Sequence[Mapping[str, Any]], methods: Sequence[str], *, every_fit: bool = False
) -> str:
    """Tables in Markdown: policies, sets and amounts, thresholds, cells."""
    cells = judged(rows, methods, every_fit=every_fit)
    if not cells:
        return "No cell is complete yet: every method at every rate, or an error that says why not."
    found = policies(cells, methods)
    auto = [method for _, method in found["auto"]]
    return "\n\n".join(
        [
            _extent(rows, cells, methods),
            _policy_table(cells, found),
            _mean_table(cells, found, "set"),
            _mean_table(cells, found, "per_class"),
            _mean_table(cells, found, "backbone"),
            _place_table(cells, auto),
            _threshold_table(cells),
            _cell_table(cells, auto),
        ]
    )


def _extent(rows: Sequence[Mapping[str, Any]], cells: Sequence[Judged], methods: Any) -> str:
    fits = [row for row in rows if row["kind"] == "fit"]
    hours = sum(_cost(row) for row in fits) / 3600
    number = sum(len(cell.fits) for cell in cells)
    return (
        f"{len(cells)} complete cells with {number:,} fits (of {len(fits):,} in the file, "
        f"{hours:.1f} hours of one core); methods: {', '.join(methods)}."
    )


def _cost(row: Mapping[str, Any]) -> float:
    """Seconds of a core; the wall time where a row lacks them."""
    return float(row.get("cpu_seconds", row["seconds"]))


def _policy_table(cells: Sequence[Judged], found: Mapping[str, Any]) -> str:
    lines = [
        "| policy | mean | 90 % | worst | mean, all differences | worst, all differences "
        "| mean, oracle chosen on other images | seconds a fit |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, pairs in found.items():
        counted, plain = regrets(cells, pairs), regrets(cells, pairs, counted=False)
        seconds = np.mean([_cost(cells[i].fits[m, DEFAULT]) for i, m in pairs])
        figures = (
            *(counted.mean(), np.quantile(counted, 0.9), counted.max()),
            *(plain.mean(), plain.max()),
            np.mean([cells[i].apart(method) for i, method in pairs]),
        )
        words = " | ".join(f"{figure:.2f}" for figure in figures)
        lines.append(f"| {name} | {words} | {seconds:.1f} |")
    goal = ", ".join(f"{name} {points:g}" for name, points in GOALS.items())
    return "\n".join([*lines, "", f"Regret in points of test accuracy; goal of auto: {goal}."])


def _mean_table(cells: Sequence[Judged], found: Mapping[str, Any], field: str) -> str:
    """Mean regret of each policy by a field of the cells."""
    values = sorted({getattr(cell.cell, field) for cell in cells})
    lines = [
        f"| mean regret by {field} | {' | '.join(map(str, values))} |",
        "| --- |" + " --- |" * len(values),
    ]
    for name, pairs in found.items():
        means = []
        for value in values:
            mine = [(i, m) for i, m in pairs if getattr(cells[i].cell, field) == value]
            means.append(f"{regrets(cells, mine).mean():.2f}" if mine else "–")
        lines.append(f"| {name} | {' | '.join(means)} |")
    return "\n".join(lines)


def _place_table(cells: Sequence[Judged], auto: Sequence[str]) -> str:
    """Per cell of the table: what `auto` reaches, and what the best one fit for all of it would."""
    lines = [
        "| cell of the table | cells | auto, mean accuracy | best with hindsight "
        "| its mean accuracy | difference ± error |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    places = [(TIERS.index(cell.place.amount), cell.place.similarity) for cell in cells]
    for place in sorted(set(places)):
        members = [i for i, own in enumerate(places) if own == place]
        mine = np.array([cells[i].fits[auto[i], DEFAULT]["acc"] for i in members])
        keys = set.intersection(*(set(cells[i].fits) for i in members))
        means = {k: float(np.mean([cells[i].fits[k]["acc"] for i in members])) for k in keys}
        best = max(sorted(means), key=lambda k: (means[k], k[1] == DEFAULT))
        better = np.array([cells[i].fits[best]["acc"] for i in members]) - mine
        error = sem(better) if len(better) > 1 else np.nan
        lines.append(
            f"| {TIERS[place[0]]}, {place[1]} | {len(members)} | {100 * mine.mean():.1f} "
            f"| {best[0]} × {best[1]:g} | {100 * means[best]:.1f} "
            f"| {100 * better.mean():.1f} ± {100 * error:.1f} |"
        )
    return "\n".join(lines)


def _threshold_table(cells: Sequence[Judged]) -> str:
    lines = [f"| left out | {' | '.join(GRID)} |", "| --- |" + " --- |" * len(GRID)]
    rows = {"(default)": Thresholds(), **leave_one_set_out(cells)}
    for name, thresholds in rows.items():
        lines.append(f"| {name} | {' | '.join(str(getattr(thresholds, k)) for k in GRID)} |")
    return "\n".join(lines)


def _cell_table(cells: Sequence[Judged], auto: Sequence[str]) -> str:
    lines = [
        "| set | a class | backbone | seed | cell of the table | auto | its accuracy | best fit "
        "| its accuracy | regret |",
        "| --- |" * 1 + " --- |" * 9,
    ]
    for judged_cell, method in zip(cells, auto, strict=True):
        c, best = judged_cell.cell, judged_cell.best
        place = judged_cell.place
        mine, top = judged_cell.fits[method, DEFAULT], judged_cell.all_fits[best]
        lines.append(
            f"| {c.set} | {c.per_class} | {c.backbone} | {c.seed} | {place.amount}, "
            f"{place.similarity} | {method} | {100 * mine['acc']:.1f} | {best[0]} × {best[1]:g} | "
            f"{100 * top['acc']:.1f} | {judged_cell.regret(method):.1f} |"
        )
    return "\n".join(lines)


def draw(rows: Sequence[Mapping[str, Any]], methods: Sequence[str], file: Path) -> None:
    """Draw regret by policy, and accuracy over the amount of data of every set."""
    from matplotlib.figure import Figure

    cells = judged(rows, methods)
    found = policies(cells, methods)
    names = sorted({cell.cell.set for cell in cells})
    figure = Figure(figsize=(4 + 3 * len(names), 4.2), layout="constrained")
    axes = figure.subplots(1, 1 + len(names), width_ratios=[1.6, *[1] * len(names)])
    _draw_regrets(axes[0], {name: regrets(cells, pairs) for name, pairs in found.items()})
    for axis, name in zip(axes[1:], names, strict=True):
        _draw_accuracies(axis, [cell for cell in cells if cell.cell.set == name])
        axis.set_title(name)
    axes[1].set_ylabel("test accuracy, %")
    axes[-1].legend(fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def _draw_regrets(axis: Any, found: Mapping[str, np.ndarray]) -> None:
    """A dot a cell, a bar at the mean."""
    for place, (_, values) in enumerate(reversed(found.items())):
        jitter = place + np.random.default_rng(0).uniform(-0.25, 0.25, len(values))
        axis.plot(values, jitter, ".", color="0.6", markersize=4)
        axis.plot([values.mean()] * 2, [place - 0.35, place + 0.35], color="C3", linewidth=2.5)
    axis.set_yticks(range(len(found)), list(reversed(found)))
    axis.set_xlabel("regret, points (bar: mean)")
    axis.set_xscale("symlog", linthresh=1)
    axis.set_xlim(left=-0.1)


def _draw_accuracies(axis: Any, cells: Sequence[Judged]) -> None:
    table = pd.DataFrame(
        {
            "a class": cell.cell.per_class,
            "best of all fits": cell.all_fits[cell.best]["acc"],
            "auto": cell.fits[cell.choice(Thresholds()), DEFAULT]["acc"],
            **{m: cell.fits[m, DEFAULT]["acc"] for m in SHOWN if (m, DEFAULT) in cell.fits},
        }
        for cell in cells
    )
    means = 100 * table.groupby("a class").mean()
    styles = {"best of all fits": "k:x", "auto": "C3-o"}
    for name in means.columns:
        axis.plot(means.index, means[name], styles.get(name, "--."), label=name, markersize=4)
    axis.set_xscale("log")
    axis.set_xticks(list(means.index), [str(n) for n in means.index])
    axis.minorticks_off()
    axis.set_xlabel("images a class")
