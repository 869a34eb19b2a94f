"""An advice as one HTML page: styles and plots inside, nothing from outside, no scripts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tl.advice.sections import COLUMNS, METHODS, Section

TEMPLATE = "page.html"
WIDTH, HEIGHT = 480, 280  # of the curve, in units that are pixels on a phone
LEFT, RIGHT, TOP, BOTTOM = 40, 464, 28, 236
BLUE, ORANGE = "#0072B2", "#D55E00"  # Okabe and Ito, "Color universal design", 2008
LEAST_SPAN = 0.1  # of the axis of quality
ROUNDING = 1e-9


def page(title: str, subtitle: str, sections: Sequence[Section], footer: str) -> str:
    """HTML text of all sections; what comes from names of files is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("tl.advice", "."), autoescape=True, undefined=StrictUndefined
    )
    environment.globals |= {"chart": chart, "words": METHODS}
    return environment.get_template(TEMPLATE).render(
        title=title, subtitle=subtitle, sections=sections, footer=footer, columns=COLUMNS
    )


def chart(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Coordinates of a learning curve: axes, lines and points.

    Args:
        rows: Of a section of kind `curve`, by number of images.
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
            "colour": BLUE if r["measured"] else ORANGE,
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
