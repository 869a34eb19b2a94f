"""Coordinates of a learning curve."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH, HEIGHT = 480, 280  # of the curve, in units that are pixels on a phone
LEFT, RIGHT, TOP, BOTTOM = 40, 464, 28, 236
LEAST_SPAN = 0.1  # of the axis of quality
ROUNDING = 1e-9


def chart(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Coordinates of a learning curve: axes, lines and points.

    Args:
        rows: By number of images: `images`, `value`, `low`, `high` in [0, 1], and `measured`.
    """
    low = float(max(min(r["low"] for r in rows), 0.0))
    high = float(min(max(r["high"] for r in rows), 1.0))
    step = next((s for s in (0.02, 0.05, 0.1, 0.2) if (high - low) / s <= 5), 0.5)
    bottom = math.floor(low / step + ROUNDING) * step
    span = max(step, LEAST_SPAN)
    top = max(math.ceil(high / step - ROUNDING) * step, bottom + span)
    if top > 1:  # there is no quality above 1
        bottom, top = min(bottom, 1 - span), 1.0
    most = int(max(r["images"] for r in rows))

    def x(images: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * images / (1.04 * most), 1)

    def y(quality: float) -> float:
        share = (min(max(quality, bottom), top) - bottom) / (top - bottom)
        return round(BOTTOM - (BOTTOM - TOP) * share, 1)

    points = [
        {
            "x": x(r["images"]),
            "y": y(r["value"]),
            "low": y(r["low"]),
            "high": y(r["high"]),
            "measured": r["measured"],
        }
        for r in rows
    ]
    measured = [p for p in points if p["measured"]]
    expected = [p for p in points if not p["measured"]]
    marks = [bottom + i * step for i in range(round((top - bottom) / step) + 1)]
    labelled = [r["images"] for r in rows if r["measured"]] + [most] * bool(expected)
    return {
        **{"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "bottom": BOTTOM},
        "quality": [(y(q), f"{100 * q:.0f}") for q in marks],
        "images": [(x(n), f"{n:,}") for n in labelled],
        "points": points,
        "measured": _line(measured),
        "expected": _line([*measured[-1:], *expected]) if expected else "",
    }


def _line(points: Sequence[Mapping[str, Any]]) -> str:
    return " ".join(f"{p['x']},{p['y']}" for p in points)
