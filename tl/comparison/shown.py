"""What a comparison shows: columns with the text of each cell, places of intervals, axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

Run = Mapping[str, Any]

NAMES = {
    "acc": "accuracy",
    "map": "mAP",
    "mae": "mean absolute error",
    "rmse": "root mean squared error",
    "ece": "calibration error",
    "f1_macro": "macro F1",
    "balanced_acc": "balanced accuracy",
}
PERCENT = {"acc", "map", "top5", "balanced_acc", "exact_match", "hamming", "sure_acc", "sure_share"}
SHOWN_VARIED = 6  # columns of what was varied that are there at once
MOST_TICKS = 8  # values of one axis that have room below each other
LONG = 24  # characters up to which a value is shown whole though it be a path
APART = 0.04  # of an axis: nearer texts lie on each other
LOG_RATIO = 50.0  # from this ratio of largest to smallest on, an axis is logarithmic


def named(metric: str) -> str:
    """A metric as people call it."""
    return NAMES.get(metric, metric.replace("_", " "))


def metric_text(metric: str, value: float | None, *, difference: bool = False) -> str:
    """A value of a metric as text; a difference has its sign, and points instead of per cent."""
    if value is None:
        return "–"
    sign = "+" if difference else ""
    if metric in PERCENT:
        return f"{100 * value:{sign}.1f}" + (" points" if difference else " %")
    return f"{value:{sign}.3f}" if abs(value) < 10 else f"{value:{sign}.4g}"


def percent(share: float | None) -> str:
    """A share, or how sure a run was."""
    return "–" if share is None else f"{100 * share:.0f} %"


def number_text(value: Any) -> str:
    """A value of a setting or metric."""
    if value is None:
        return "–"
    if isinstance(value, str):  # of a file its name: the folder is the same for all, or no matter
        path = PurePath(value)
        return path.name if len(value) > LONG and path.suffix else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def seconds_text(value: float | None) -> str:
    """A duration: `48 s`, `12 min`, `3.2 h`."""
    if value is None:
        return "–"
    if value < 120:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def count_text(value: float | None) -> str:
    """A large number: `2.2 M`."""
    if value is None:
        return "–"
    for least, unit in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if value >= least:
            return f"{value / least if least != 1e4 else value / 1e3:.3g}{unit}"
    return f"{value:,.0f}"


def bytes_text(value: float | None) -> str:
    """A size of a file."""
    return "–" if value is None else f"{value / 1e6:,.1f} MB"


def milliseconds_text(value: float | None) -> str:
    """A short duration."""
    return "–" if value is None else f"{value:.3g} ms"


# Column of a cost: label, text of a cell, there at once.
COSTS: dict[str, tuple[str, Callable[[Any], str], bool]] = {
    "fit_seconds": ("training", seconds_text, True),
    "total_seconds": ("whole job", seconds_text, False),
    "ms_an_image": ("an image", milliseconds_text, True),
    "parameters": ("parameters", count_text, True),
    "trainable_parameters": ("trained parameters", count_text, False),
    "bytes": ("weights", bytes_text, False),
}


def reference(values: Mapping[str, Any]) -> str | None:
    """The run that the others are measured against: the baseline where one was named."""
    found = values.get("reference") or values.get("baseline") or values["best"]
    return None if found is None else str(found)


def verdicts(values: Mapping[str, Any]) -> dict[str, str]:
    """What can be said of each run against the reference, in a word or two."""
    first = reference(values)
    words = {"a": "worse", "b": "better", "none": "no difference shown"}
    turned = {"a": "b", "b": "a"}
    said = {p["b"]: p["verdict"] for p in values["pairs"] if p["a"] == first}
    said |= {
        p["a"]: turned.get(p["verdict"], p["verdict"])
        for p in values["pairs"]
        if p["b"] == first and p["a"] not in said
    }

    def word(run: Run) -> str:
        if run["group"] is None:
            return "not compared"
        if run["id"] == first:
            return "best" if first == values["best"] else "baseline"
        return words.get(said.get(run["id"], ""), "other test images")

    return {run["id"]: word(run) for run in values["runs"]}


def columns(values: Mapping[str, Any], runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Columns of the table beside the name: first what is there at once, in order of use.

    Returns:
        For each `key, label, kind` (number | text), `shown`, `varied`, `values` to sort by and
        `texts` to show. One that no run has anything for is left out.
    """
    metric = values["metric"]
    against = f"against the {'best' if reference(values) == values['best'] else 'baseline'}"
    found = [
        _column("value", named(metric), [r["value"] for r in runs], _metric(metric)),
        _column("verdict", against, [r["verdict"] for r in runs], str),
    ]
    telling = distinct(values, runs)
    for name in sorted(values["varied"], key=lambda name: name not in telling):
        own = [r["params"].get(name) for r in runs]
        shown = name in telling[:SHOWN_VARIED]
        found.append(_column(name, _short(name), own, number_text, shown=shown, varied=True))
    for key, (label, text, shown) in COSTS.items():
        found.append(_column(key, label, [r["cost"].get(key) for r in runs], text, shown=shown))
    found.append(_column("ece", "calibration error", [r["ece"] for r in runs], number_text))
    if "params.seed" not in values["varied"]:
        found.append(_column("seed", "seed", [r["seed"] for r in runs], number_text, shown=False))
    others = sorted({name for r in runs for name in r["metrics"]} - {metric, "ece"})
    for name in others:
        own = [r["metrics"].get(name) for r in runs]
        text = _metric(name)
        found.append(_column(f"metric {name}", named(name), own, text, shown=False))
    for name in sorted({name for r in runs for name in r["tags"]}):
        own = [r["tags"].get(name) for r in runs]
        found.append(_column(f"tag {name}", name, own, number_text, shown=False))
    if len(values["groups"]) > 1:
        own = [None if r["group"] is None else r["group"] + 1 for r in runs]
        found.insert(2, _column("group", "group", own, number_text))
    if any(r["full"] != r["name"] for r in runs):
        found.append(_column("full", "whole name", [r["full"] for r in runs], str, shown=False))
    found.append(_column("status", "status", [r["status"] for r in runs], str, shown=False))
    return [column for column in found if any(v is not None for v in column["values"])]


def distinct(values: Mapping[str, Any], runs: Sequence[Run]) -> list[str]:
    """What was varied, without what says the same as one before: a model's name and its weights."""
    seen: set[tuple[int, ...]] = set()
    found = []
    for name in values["varied"]:
        first: dict[str, int] = {}
        parts = tuple(
            first.setdefault(str(run["params"].get(name)), i) for i, run in enumerate(runs)
        )
        if parts not in seen:
            seen.add(parts)
            found.append(name)
    return found


def _metric(name: str) -> Callable[[Any], str]:
    return lambda value: metric_text(name, value)


def _column(
    key: str,
    label: str,
    values: Sequence[Any],
    text: Callable[[Any], str],
    *,
    shown: bool = True,
    varied: bool = False,
) -> dict[str, Any]:
    numbers = all(isinstance(v, int | float) for v in values if v is not None)
    own = list(values) if numbers else [None if v is None else str(v) for v in values]
    return {
        **{"key": key, "label": label, "shown": shown, "varied": varied},
        "kind": "number" if numbers else "text",
        "values": own,
        "texts": ["–" if v is None else text(v) for v in own],
    }


def _short(name: str) -> str:
    """A setting without the word that every one begins with."""
    return name.removeprefix("params.").removeprefix("tags.")


def positions(
    shown: Sequence[Run], within: Sequence[Run] | None = None
) -> list[dict[str, float] | None]:
    """Where intervals lie, 0 to 100.

    Args:
        shown: With `low, value, high`.
        within: Those whose lowest and highest end are 0 and 100, what goes beyond is cut off: the
            interval of a mean of two seeds can be wider than anything else. None: `shown`.
    """
    keys = ("low", "value", "high")
    ends = [r[key] for r in within or shown for key in keys if r[key] is not None]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    span = (high - low) or 1.0

    def place(run: Run) -> dict[str, float] | None:
        if run["value"] is None:
            return None
        own = {key: run["value"] if run[key] is None else run[key] for key in keys}
        return {key: min(max(100 * (own[key] - low) / span, 0.0), 100.0) for key in keys}

    return [place(run) for run in shown]


def class_places(found: Sequence[Mapping[str, Any]]) -> list[dict[str, float] | None]:
    """Where the shares of each class lie between the lowest and the highest of all, 0 to 100.

    Returns:
        For each class `low, high` of the two runs, `value` of the first, and `worst, best` of all
        runs; None where one of the two has no share.
    """
    keys = ("a", "b", "worst", "best")
    ends = [c[key] for c in found for key in keys if c[key] is not None]
    low, span = min(ends, default=0.0), (max(ends, default=1.0) - min(ends, default=0.0)) or 1.0

    def place(row: Mapping[str, Any]) -> dict[str, float] | None:
        if row["a"] is None or row["b"] is None:
            return None
        at = {key: 100 * ((row[key] if row[key] is not None else row["a"]) - low) / span
              for key in keys}  # fmt: skip
        ends = {"low": min(at["a"], at["b"]), "high": max(at["a"], at["b"]), "value": at["a"]}
        return ends | {"worst": at["worst"], "best": at["best"]}

    return [place(row) for row in found]


def axes(values: Mapping[str, Any], runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Axes of the parallel coordinates: what was varied, then the metric.

    Returns:
        For each `label`, `places` of the runs (0 to 1; null where unset) and `ticks`: pairs of
        place and text.
    """
    metric = values["metric"]
    found = [
        _axis(_short(name), [r["params"].get(name) for r in runs], number_text)
        for name in distinct(values, runs)
    ]
    last = _axis(named(metric), [r["value"] for r in runs], lambda v: metric_text(metric, v))
    return [axis for axis in (*found, last) if axis["ticks"]]


def _axis(label: str, values: Sequence[Any], text: Callable[[Any], str]) -> dict[str, Any]:
    there = [v for v in values if v is not None]
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in there)
    if numeric and len(set(there)) > 1:
        places, ticks = _numeric(values, sorted(set(there)), text)
    else:
        names = sorted({text(v) for v in there})
        at = {name: (i + 0.5) / len(names) for i, name in enumerate(names)}
        places = [None if v is None else at[text(v)] for v in values]
        step = math.ceil(len(names) / MOST_TICKS)
        ticks = [[at[name], name] for name in names[::step]] if names else []
    return {"label": label, "places": places, "ticks": ticks}


def _numeric(
    values: Sequence[float | None], distinct: Sequence[float], text: Callable[[Any], str]
) -> tuple[list[float | None], list[list[Any]]]:
    low, high = distinct[0], distinct[-1]
    log = low > 0 and high / low >= LOG_RATIO
    scale = math.log10 if log else float

    def place(value: float) -> float:
        return (scale(value) - scale(low)) / (scale(high) - scale(low))

    marks = list(distinct)
    if len(marks) > MOST_TICKS:
        steps = [scale(low) + (scale(high) - scale(low)) * i / 4 for i in range(5)]
        marks = [10**step if log else step for step in steps]
    ticks: list[list[Any]] = []
    for mark in marks[::-1]:  # the highest stays; what would lie on another's text goes
        if not ticks or ticks[-1][0] - place(mark) >= APART:
            ticks.append([place(mark), text(mark)])
    return [None if v is None else place(v) for v in values], ticks[::-1]
