"""Coordinates of the plots of a search's page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from tl.search.samplers import COARSE, FINE, GIVEN
from tl.search.space import Dimension, shown

WIDTH, HEIGHT = 640, 300  # units that are pixels on a phone's long side
SMALL_WIDTH, SMALL_HEIGHT = 320, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 44
TICKS = 5
CUT = 0.25  # share of the trials that an axis may cut off, where they are far below the others
FAR = 3.0  # times the range of the others
HEIGHT_OF_LINES = 320
MOST_LINES = 200  # trials of the parallel plot
GOOD = 0.2  # share of the trials that it shows as good ones


@dataclass(frozen=True)
class Axis:
    """An axis from `low` to `high`, drawn from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Coordinate of a value; one beyond the axis is at its end."""
        low, high = self.low, self.high
        value = min(max(value, low), high)
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        share = (value - low) / (high - low) if high > low else 0.5
        return round(self.start + (self.end - self.start) * share, 1)

    def ticks(self) -> list[tuple[float, str]]:
        """Places and labels."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high))
            values = [10.0**n for n in range(first, last + 1)]
            values = values if len(values) > 1 else [self.low, self.high]
            return [(self.at(v), f"{v:g}") for v in values]
        step = _step((self.high - self.low) / TICKS)
        first = math.ceil(self.low / step - 1e-9)
        count = math.floor(self.high / step + 1e-9) - first + 1
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        return [
            (self.at((first + i) * step), f"{(first + i) * step:.{digits}f}") for i in range(count)
        ]


def _step(least: float) -> float:
    if least <= 0:
        return 1.0
    size = 10.0 ** math.floor(math.log10(least))
    return next(size * m for m in (1, 2, 5, 10) if size * m >= least * (1 - 1e-9))


def value_axis(values: Sequence[float], *, highest: bool, start: float, end: float) -> Axis:
    """The axis of what decides; trials that went wrong do not press all others into a line."""
    ordered = sorted(values, reverse=highest)
    kept = ordered[: max(2, math.ceil(len(ordered) * (1 - CUT)))]
    spread = abs(kept[-1] - kept[0])
    inside = [v for v in ordered if abs(v - kept[0]) <= FAR * spread] or ordered
    low, high = min(inside), max(inside)
    margin = 0.06 * (high - low) or 0.01 * max(abs(high), 1e-3)
    return Axis(low - margin, high + margin, start, end)


def kind_of(trial: FrozenTrial) -> str:
    """How a trial is drawn."""
    if trial.state != TrialState.COMPLETE:
        return "cut"
    kind = str(trial.user_attrs.get("kind"))
    return kind if kind in (GIVEN, COARSE, FINE) else FINE


def _drawn(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    return [t for t in trials if t.value is not None and math.isfinite(t.value)]


def history(trials: Sequence[FrozenTrial], *, highest: bool) -> dict[str, Any] | None:
    """Trials in their order, and the best so far."""
    drawn = sorted(_drawn(trials), key=lambda t: t.number)
    if not drawn:
        return None
    x = Axis(0.5, len(drawn) + 0.5, LEFT, WIDTH - RIGHT)
    values = [float(t.value or 0) for t in drawn]
    y = value_axis(values, highest=highest, start=HEIGHT - BOTTOM, end=TOP)
    line, best = [], None
    better: Callable[[float, float], float] = max if highest else min
    for i, trial in enumerate(drawn, start=1):
        if trial.state == TrialState.COMPLETE:
            now = (
                better(best, float(trial.value or 0))
                if best is not None
                else float(trial.value or 0)
            )
            if best is not None:
                line.append(f"{x.at(i)},{y.at(best)}")
            line.append(f"{x.at(i)},{y.at(now)}")
            best = now
    if best is not None:
        line.append(f"{x.at(len(drawn) + 0.5)},{y.at(best)}")
    step = max(1, round(_step(len(drawn) / 10)))
    return {
        **_frame(WIDTH, HEIGHT),
        "x_ticks": [(x.at(i), str(i)) for i in range(step, len(drawn) + 1, step)],
        "y_ticks": y.ticks(),
        "points": [_point(t, x.at(i), y) for i, t in enumerate(drawn, start=1)],
        "line": " ".join(line),
        "x_name": "trial",
    }


def _frame(width: int, height: int) -> dict[str, int]:
    return {
        **{"width": width, "height": height, "left": LEFT, "right": width - RIGHT},
        **{"top": TOP, "bottom": height - BOTTOM},
    }


def _point(trial: FrozenTrial, x: float, y: Axis) -> dict[str, Any]:
    value = float(trial.value or 0)
    beyond = not y.low <= value <= y.high
    return {"x": x, "y": y.at(value), "kind": "beyond" if beyond else kind_of(trial)}


def axis_of(d: Dimension, start: float, end: float) -> Axis:
    """The axis of a dimension; choices stand at whole numbers."""
    if d.choices:
        return Axis(-0.5, len(d.choices) - 0.5, start, end)
    return Axis(d.low, d.high, start, end, d.log)


def place_of(d: Dimension, value: Any) -> float:
    """A value as a number on `axis_of`."""
    return float(d.choices.index(value)) if d.choices else float(value)


def ticks_of(d: Dimension, axis: Axis) -> list[tuple[float, str]]:
    """Labels of the axis of a dimension."""
    if d.choices:
        return [(axis.at(i), shown(c)[:18]) for i, c in enumerate(d.choices)]
    return axis.ticks()


def slices(
    trials: Sequence[FrozenTrial], space: Sequence[Dimension], best: FrozenTrial, *, highest: bool
) -> list[dict[str, Any]]:
    """A plot for each dimension: its value, and what the trials with it reached."""
    drawn = _drawn(trials)
    values = [float(t.value or 0) for t in drawn]
    found = []
    for d in space:
        x = axis_of(d, LEFT, SMALL_WIDTH - RIGHT)
        y = value_axis(values, highest=highest, start=SMALL_HEIGHT - BOTTOM, end=TOP)
        points = [
            _point(t, x.at(place_of(d, t.params[d.key])), y) for t in drawn if d.key in t.params
        ]
        found.append(
            {
                **_frame(SMALL_WIDTH, SMALL_HEIGHT),
                "x_ticks": ticks_of(d, x),
                "y_ticks": y.ticks(),
                "points": points,
                "best": x.at(place_of(d, best.params[d.key])) if d.key in best.params else None,
                "x_name": d.key,
                "line": "",
            }
        )
    return found


def parallel(
    ranked: Sequence[FrozenTrial], space: Sequence[Dimension], metric: str, *, highest: bool = True
) -> dict[str, Any] | None:
    """A line for each trial through its settings to what it reached; good ones stand out."""
    drawn = [t for t in ranked if all(d.key in t.params for d in space)][:MOST_LINES]
    if len(drawn) < 2 or len(space) < 2:
        return None
    top, bottom = 34, HEIGHT_OF_LINES - 22
    values = [float(t.value or 0) for t in drawn]
    last = value_axis(values, highest=highest, start=bottom, end=top)
    axes = [axis_of(d, bottom, top) for d in space]
    columns = [round(60 + i * (WIDTH - 120) / len(space), 1) for i in range(len(space) + 1)]
    good = max(1, round(GOOD * len(drawn)))
    lines = [
        {
            "points": " ".join(
                [
                    *(
                        f"{c},{a.at(place_of(d, t.params[d.key]))}"
                        for c, a, d in zip(columns, axes, space, strict=False)
                    ),
                    f"{columns[-1]},{last.at(float(t.value or 0))}",
                ]
            ),
            "kind": "best" if i == 0 else "good" if i < good else "other",
        }
        for i, t in enumerate(drawn)
    ]
    heads = [*(d.short for d in space), metric]
    labels = [*(ticks_of(d, a) for d, a in zip(space, axes, strict=True)), last.ticks()]
    return {
        "width": WIDTH,
        "height": HEIGHT_OF_LINES,
        "top": top,
        "bottom": bottom,
        "columns": [
            {"x": c, "name": n, "low": h % 2, "ticks": t}
            for h, (c, n, t) in enumerate(zip(columns, heads, labels, strict=True))
        ],
        "lines": lines[::-1],  # the best on top
    }
